"""Figures of expert parallelism: who sends to whom, what the node limit saves, what redundant experts even out."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap

from ..plots import COLOURS, colour, describe, headline, look

_BLUES = LinearSegmentedColormap.from_list("minidsv3.bytes", ["#FFFFFF", COLOURS[0]])


def traffic_matrix(ax: Axes, bytes_of_pair: np.ndarray) -> Axes:
    """Bytes from each rank to each: int [R, R]."""
    R = len(bytes_of_pair)
    image = ax.imshow(bytes_of_pair / 1e6, cmap=_BLUES, interpolation="nearest")
    ax.figure.colorbar(image, ax=ax, shrink=0.8, label="sent in a dispatch (MB)")
    ax.set(xlabel="to rank", ylabel="from rank")
    ax.grid(False)
    partners = (bytes_of_pair > 0).sum(axis=1) - (bytes_of_pair.diagonal() > 0)
    finding = f"A GPU exchanges rows with {partners.max()} of the {R - 1} others: its node, and its slot on each node"
    if partners.max() == R - 1:
        finding = f"A GPU exchanges rows with all {R - 1} others"
    describe(ax, f"{finding}. The busiest pair sends {bytes_of_pair.max() / 1e6:,.1f} MB.")
    return headline(ax, finding)


def load_of_gpus(ax: Axes, before: np.ndarray, after: np.ndarray) -> Axes:
    """Load of each GPU over the mean, busiest first, without and with redundant experts: float [R] each."""
    peaks = []
    for i, (label, load) in enumerate((("experts in order", before), ("EPLB, with replicas", after))):
        share = np.sort(load / load.mean())[::-1]
        peaks.append(share[0])
        ax.plot(np.arange(1, len(share) + 1, dtype=np.int64), share, label=label, **look(i, len(share)))
    ax.axhline(1, color="black", linewidth=1, linestyle=":")
    ax.set(xlabel="GPU, busiest first", ylabel="load over the mean")
    ax.legend()
    finding = f"EPLB takes the busiest GPU from {peaks[0]:.2f} to {peaks[1]:.2f} times the mean load"
    describe(ax, f"{finding}, over {len(before)} GPUs.")
    return headline(ax, finding)


def node_limits(ax: Axes, limit: np.ndarray, nodes_per_token: np.ndarray, ranks_per_token: np.ndarray) -> Axes:
    """Distinct nodes and ranks of a token against the node limit M: [n] each."""
    for i, (label, values) in enumerate((("nodes", nodes_per_token), ("ranks", ranks_per_token))):
        ax.plot(limit, values, label=f"distinct {label}", **{**look(i, len(limit)), "markevery": 1})
    ax.plot(limit, limit, color=colour(5), linewidth=1, linestyle=":", label="the limit itself")
    ax.set(xlabel="node limit M", ylabel="per token", xticks=limit, ylim=(0, None))
    ax.legend()
    half = len(limit) // 2 - 1
    finding = (
        f"Without a limit a token goes to {nodes_per_token[-1]:.2f} nodes, "
        f"with M = {limit[half]} to {nodes_per_token[half]:.2f}"
    )
    describe(ax, f"{finding}; ranks fall from {ranks_per_token[-1]:.2f} to {ranks_per_token[0]:.2f} at M = {limit[0]}.")
    return headline(ax, finding)
