"""Bytes of a token on its way to its experts, and the switches that carry them (lessons 10 and 12)."""

import numpy as np

from ..hardware.topology import fat_tree_2, fat_tree_3, multi_plane
from .numeric import Given, Question, numeric_exercise

GIVEN = dict(hidden_size=7168, moe_layers=58, nodes_per_token=4, dispatch_bytes=1, combine_bytes=2, ports=64, planes=8)


def _dispatch(g: Given) -> float:
    return g["hidden_size"] * g["nodes_per_token"] * g["dispatch_bytes"]


def _step(g: Given) -> float:
    return g["moe_layers"] * g["hidden_size"] * g["nodes_per_token"] * (g["dispatch_bytes"] + g["combine_bytes"])


def _draw(rng: np.random.Generator) -> Given:
    return dict(
        hidden_size=512 * int(rng.integers(4, 13)), moe_layers=int(rng.integers(20, 57)),
        nodes_per_token=int(rng.choice([2, 3, 5, 6])), dispatch_bytes=2, combine_bytes=4,
        ports=int(rng.choice([24, 32, 40, 48])), planes=int(rng.choice([2, 4, 6])),
    )  # fmt: skip


EXERCISE = numeric_exercise(
    "a token's bytes between nodes, and the switches that carry them",
    lesson=10,
    minutes=30,
    given=GIVEN,
    draw=_draw,
    questions=(
        Question(
            "dispatch_bytes_per_token",
            2,
            "bytes",
            "sent between nodes for one token's dispatch in one layer, none of its nodes being its own",
            _dispatch,
            "a token travels once to each of its nodes, however many experts it has there",
        ),
        Question(
            "forward_bytes_per_token",
            2,
            "bytes",
            "dispatch and combine of one token in all layers with experts, forward pass",
            _step,
            "the sums come back the same way, in combine_bytes a number; scales are left out",
        ),
        Question(
            "ft2_endpoints",
            2,
            "endpoints",
            "of a two-layer fat-tree of switches with `ports` ports",
            lambda g: fat_tree_2(g["ports"]).endpoints,
            "half of a leaf's ports go down; a spine reaches one leaf with each port",
        ),
        Question(
            "ft3_switches",
            2,
            "switches",
            "of the three-layer fat-tree at full size",
            lambda g: fat_tree_3(g["ports"]).switches,
            "k pods of k/2 + k/2 switches, and (k/2)^2 cores",
        ),
        Question(
            "mpft_switches",
            2,
            "switches",
            "of `planes` separate two-layer fat-trees",
            lambda g: multi_plane(g["ports"], g["planes"]).switches,
            "k leaves and k/2 spines in each plane",
        ),
    ),
)
