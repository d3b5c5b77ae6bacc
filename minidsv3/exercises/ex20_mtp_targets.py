"""Multi-token prediction: which token goes in, which is to be predicted (lesson 06)."""

from typing import Any

import numpy as np

from .calling import Mine
from .exercise import Exercise, Property, array, parts, require, same, sizes
from .golden import Case, golden

Rng = np.random.Generator


def _got(mine: Mine, tokens: Any, depth: int) -> tuple[Any, Any, Any]:
    h, seen, targets = parts("the result", mine(tokens, depth), 3)
    return h, seen, targets


def _tokens(rng: Rng) -> np.ndarray:
    B, n = sizes(rng, 2, 2, 12)
    return rng.permutation(1000)[: B * (n + 4)].reshape(B, n + 4)  # all different


def _main(mine: Mine, rng: Rng) -> None:
    """Depth 0 is the main model."""
    tokens = _tokens(rng)
    _, _, targets = _got(mine, tokens, 0)
    same("targets of depth 0", targets, tokens[:, 1:])


def _lengths(mine: Mine, rng: Rng) -> None:
    tokens = _tokens(rng)
    for depth in (1, 2, 3):
        places = tokens.shape[1] - 1 - depth
        h, seen, targets = _got(mine, tokens, depth)
        array(f"positions of depth {depth}", h, (places,))
        array(f"seen of depth {depth}", seen, (len(tokens), places))
        array(f"targets of depth {depth}", targets, (len(tokens), places))


def _indices(mine: Mine, rng: Rng) -> None:
    tokens = _tokens(rng)
    for depth in (1, 2, 3):
        h, _, targets = _got(mine, tokens, depth)
        rows: list[list[int]] = []
        for row in tokens.tolist():
            rows.append([row[i + depth + 1] for i in range(len(row) - 1 - depth)])
        same(f"targets of depth {depth}", targets, np.array(rows, dtype=np.int64))
        same(f"positions of depth {depth}", h, np.arange(tokens.shape[1] - 1 - depth, dtype=np.int64))


def _seen(mine: Mine, rng: Rng) -> None:
    tokens = _tokens(rng)
    for depth in (1, 2, 3):
        _, seen, _ = _got(mine, tokens, depth)
        expected = [[row[i + depth] for i in range(len(row) - 1 - depth)] for row in tokens.tolist()]
        same(f"seen of depth {depth}", seen, np.array(expected, dtype=np.int64))


def _no_copy(mine: Mine, rng: Rng) -> None:
    """The copy test: what is to be predicted must not be among what is seen."""
    tokens = _tokens(rng)
    for depth in (1, 2, 3):
        _, seen, targets = (np.asarray(a) for a in _got(mine, tokens, depth))
        require(targets.ndim == 2 and targets.size, f"targets of depth {depth} are empty")
        require(seen.shape == targets.shape, f"seen has shape {seen.shape}, targets {targets.shape}")
        require(not np.any(seen == targets), f"at depth {depth} the module is given the token it is to predict")


def _golden(mine: Mine, case: Case) -> None:
    for depth in (1, 2):
        _, seen, targets = _got(mine, case["tokens"], depth)
        same(f"seen of depth {depth}", seen, case[f"seen_{depth}"])
        same(f"targets of depth {depth}", targets, case[f"targets_{depth}"])


EXERCISE = Exercise(
    title="multi-token prediction: inputs and targets of depth k",
    kind="I",
    lesson=6,
    minutes=20,
    properties=(
        Property(
            "main", 1, "depth 0 predicts the next token", _main, "depth 0 is the main model: position i predicts i+1"
        ),
        Property(
            "lengths", 2, "depth k has k places fewer", _lengths, "the last k positions have nothing left to predict"
        ),
        Property(
            "targets",
            2,
            "position i of depth k predicts token i+k+1",
            _indices,
            "h_i has seen tokens 0..i; depth k adds tokens i+1..i+k",
        ),
        Property(
            "seen",
            2,
            "position i of depth k is given token i+k",
            _seen,
            "the embedding that joins at depth k is that of token i+k",
        ),
        Property(
            "no_copy",
            2,
            "no module sees what it is to predict",
            _no_copy,
            "a target equal to the input makes the loss fall to zero: a copy function",
        ),
        golden("mtp_targets", _golden, "equal"),
    ),
)
