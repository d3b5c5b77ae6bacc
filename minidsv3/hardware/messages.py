"""How long dispatch and combine take: three constants, fitted on DeepEP's published benchmark.

    normal kernels       max(bytes over InfiniBand / r_IB, bytes over NVLink / r_NV)
                         InfiniBand: tokens * distinct nodes * (N-1)/N * row bytes, a token once to each other node
                         NVLink:     tokens * distinct ranks * row bytes, forwarded inside the node
    low-latency kernels  t_0 + bytes * (N-1)/N / r_IB, one message per (token, expert); on one node over NVLink, 7/8

DeepEP's own GB/s are *logical*: they count the own node's tokens, which never cross InfiniBand, so 58 GB/s over a
50 GB/s card is no contradiction (`logical_bandwidth`). `fit` finds the three constants in a table of measurements.

The same constants turn a traffic ledger of the expert-parallel runtime into seconds (`ledger_seconds`): every rank
sends and receives at once, and the busiest rank is waited for.

Simplified: one rate a link class, whatever the message size; no congestion between groups of experts. EP128 and larger
are outside of the fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

FP8_SCALE = 4 / 128  # bytes of an FP32 scale for each number of a 1x128 tile


@dataclass(frozen=True)
class Links:
    """Achieved rates between GPUs. The defaults are `fit` to DeepEP's tables (data/published/deepep_kernels.json)."""

    infiniband_bytes_per_second: float = 43.66e9
    nvlink_bytes_per_second: float = 141.6e9
    low_latency_seconds: float = 27.9e-6
    gpus_per_node: int = 8

    def faster(self, infiniband: float = 1.0, nvlink: float = 1.0) -> Links:
        """The same with rates times these factors (infinite ones are allowed)."""
        return replace(
            self,
            infiniband_bytes_per_second=self.infiniband_bytes_per_second * infiniband,
            nvlink_bytes_per_second=self.nvlink_bytes_per_second * nvlink,
        )


class Traffic(NamedTuple):
    """Where the tokens of a rank go, on average."""

    nodes_per_token: float  # distinct nodes, the own one included
    ranks_per_token: float  # distinct ranks
    busiest: float = 1.0  # rows of the busiest rank over the mean


def row_bytes(hidden_size: int, fp8: bool) -> float:
    """Bytes of one token's row: FP8 with a scale a tile, or BF16."""
    return hidden_size * (1 + FP8_SCALE) if fp8 else 2.0 * hidden_size


def distinct_groups(groups: int, experts: int, chosen: int) -> float:
    """Expected distinct groups of k = `chosen` of E = `experts` experts, drawn evenly: n (1 - C(E-E/n,k)/C(E,k))."""
    if experts % groups or not 1 <= chosen <= experts:
        raise ValueError(f"groups={groups} must divide experts={experts}, and chosen={chosen} be one of them at least")
    return groups * (1 - math.comb(experts - experts // groups, chosen) / math.comb(experts, chosen))


def uniform_traffic(ranks: int, gpus_per_node: int, experts: int, chosen: int) -> Traffic:
    """Traffic of a gate that chooses evenly, without a limit on nodes."""
    nodes = max(1, ranks // gpus_per_node)
    return Traffic(distinct_groups(nodes, experts, chosen), distinct_groups(ranks, experts, chosen))


def traffic_of(topk_idx: np.ndarray, experts: int, ranks: int, gpus_per_node: int) -> Traffic:
    """Traffic of routing decisions int [..., K] (-1: none), experts spread over the ranks evenly and in order.

    Raises ValueError if the experts do not divide, or an id is none.
    """
    if experts % ranks:
        raise ValueError(f"experts={experts} is not a multiple of ranks={ranks}")
    chosen = np.asarray(topk_idx, dtype=np.int64).reshape(-1, np.asarray(topk_idx).shape[-1])
    chosen = chosen[chosen.max(axis=1, initial=-1) >= 0]  # places without a token are left out
    if not chosen.size or chosen.max() >= experts:
        raise ValueError(f"no expert ids, or one that exceeds {experts} experts")
    rank = np.where(chosen >= 0, chosen // (experts // ranks), -1)
    node = np.where(rank >= 0, rank // gpus_per_node, -1)
    rows = np.bincount(rank[rank >= 0], minlength=ranks)
    return Traffic(_distinct(node), _distinct(rank), float(rows.max() / rows.mean()))


def _distinct(values: np.ndarray) -> float:
    """Mean number of distinct values of at least 0 in a row."""
    ordered = np.sort(values, axis=1)
    new = np.diff(ordered, axis=1, prepend=-1) != 0
    return float((new & (ordered >= 0)).sum(axis=1).mean())


def normal_seconds(tokens: float, row: float, traffic: Traffic, ranks: int, links: Links) -> float:
    """Dispatch or combine of `tokens` tokens a rank, `row` bytes each, among `ranks` ranks."""
    nodes = max(1.0, ranks / links.gpus_per_node)
    remote = tokens * traffic.nodes_per_token * (nodes - 1) / nodes * row
    inside = tokens * traffic.ranks_per_token * row
    busiest = max(remote / links.infiniband_bytes_per_second, inside / links.nvlink_bytes_per_second)
    return traffic.busiest * busiest


def low_latency_seconds(tokens: float, row: float, chosen: int, ranks: int, links: Links) -> float:
    """Dispatch or combine with one message per (token, expert)."""
    total, nodes = tokens * chosen * row, ranks / links.gpus_per_node
    if nodes <= 1:
        return links.low_latency_seconds + total * (ranks - 1) / ranks / links.nvlink_bytes_per_second
    return links.low_latency_seconds + total * (nodes - 1) / nodes / links.infiniband_bytes_per_second


def logical_bandwidth(tokens: float, row: float, traffic: Traffic, seconds: float) -> float:
    """DeepEP's bytes per second: every distinct node counts, the own one too."""
    return tokens * traffic.nodes_per_token * row / seconds


class Measurement(NamedTuple):
    """One published number: seconds (low-latency) or logical bytes per second (normal)."""

    kernel: str  # 'normal' or 'low-latency'
    operation: str  # 'dispatch' or 'combine'
    ranks: int
    value: float

    def predicted(self, links: Links) -> float:
        """The same quantity by the model: DeepEP's test sizes (7168 wide, top-8 of 256; 4,096 or 128 tokens)."""
        if self.kernel == "low-latency":
            message = 7168 + 4 * 56 + 16 if self.operation == "dispatch" else 2 * 7168
            return low_latency_seconds(128, message, 8, self.ranks, links)
        row = row_bytes(7168, self.operation == "dispatch")
        small = self.ranks <= 4 * links.gpus_per_node  # the gate of the test keeps to four nodes
        traffic = uniform_traffic(self.ranks, links.gpus_per_node, 256, 8) if small else LIMITED_TO_FOUR
        return logical_bandwidth(4096, row, traffic, normal_seconds(4096, row, traffic, self.ranks, links))


# A gate that keeps to 4 of 8 nodes, top-8 of 256: distinct nodes and ranks by Monte Carlo over 20,000 tokens.
LIMITED_TO_FOUR = Traffic(3.96, 7.48)


def fit(measurements: Sequence[Measurement], start: Links = Links()) -> Links:
    """The three constants with the least squared relative error, by a grid that closes in on the best point.

    Raises ValueError without measurements of both kernels: the table must fix all three.
    """
    kernels = {m.kernel for m in measurements}
    if kernels != {"normal", "low-latency"}:
        raise ValueError(f"measurements of normal and low-latency kernels are needed, got {sorted(kernels)}")

    def error(constants: Sequence[float]) -> float:
        links = _with(start, constants)
        return sum(math.log(m.predicted(links) / m.value) ** 2 for m in measurements)

    best = [start.infiniband_bytes_per_second, start.nvlink_bytes_per_second, start.low_latency_seconds]
    span = 0.5
    while span > 1e-4:
        moved = False
        for axis in range(len(best)):
            for factor in np.exp(np.linspace(-span, span, 11)):
                trial = [v * float(factor) if i == axis else v for i, v in enumerate(best)]
                if error(trial) < error(best) - 1e-15:
                    best, moved = trial, True
        if not moved:
            span /= 2
    return _with(start, best)


def _with(links: Links, constants: Sequence[float]) -> Links:
    infiniband, nvlink, latency = constants
    return Links(infiniband, nvlink, latency, links.gpus_per_node)


def ledger_seconds(rows: Iterable[Any], links: Links) -> dict[str, float]:
    """Seconds of each operation of a traffic ledger.

    Parameters
    ----------
    rows : iterable
        Each with `operation`, `source`, `destination`, `link` ('local', 'NVLink' or 'InfiniBand'), `bytes` and
        `seconds` (virtual time that a straggler comes late), as `parallel.ledger.Ledger.rows` gives them.
    links : Links

    Returns
    -------
    dict of str to float
        The busiest rank's sending or receiving, the slower of its two link classes, plus the latest straggler.
    """
    rate = {"NVLink": links.nvlink_bytes_per_second, "InfiniBand": links.infiniband_bytes_per_second}
    busy: dict[str, dict[tuple[str, str, int], float]] = {}
    late: dict[str, float] = {}
    for row in rows:
        loads = busy.setdefault(row.operation, {})
        late[row.operation] = max(late.get(row.operation, 0.0), row.seconds)
        if row.link in rate:
            for way, rank in (("out", row.source), ("in", row.destination)):
                key = (row.link, way, rank)
                loads[key] = loads.get(key, 0.0) + row.bytes / rate[row.link]
    return {operation: max(loads.values(), default=0.0) + late[operation] for operation, loads in busy.items()}


def straggler_seconds(rows: Iterable[Any]) -> float:
    """Virtual seconds that stragglers add: everybody waits for the latest rank of each operation of a ledger."""
    late: dict[str, float] = {}
    for row in rows:
        late[row.operation] = max(late.get(row.operation, 0.0), row.seconds)
    return sum(late.values())


def read_measurements(entries: Iterable[Mapping[str, Any]], quantity: Any) -> list[Measurement]:
    """Measurements from JSON objects ``{"kernel", "operation", "ranks", "value": "43 GB/s" or "118 us"}``.

    Raises ValueError naming the entry for a missing key, another kernel or operation, or a wrong unit.
    """
    found = []
    for number, entry in enumerate(entries):
        try:
            kernel, operation, ranks = entry["kernel"], entry["operation"], int(entry["ranks"])
            if kernel not in ("normal", "low-latency") or operation not in ("dispatch", "combine") or ranks < 2:
                raise ValueError(
                    f"{kernel!r}, {operation!r}, {ranks} are not a kernel, an operation, and at least 2 ranks"
                )
            value = quantity(entry["value"], "s" if kernel == "low-latency" else "B/s")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"measurement {number} ({dict(entry) if isinstance(entry, Mapping) else entry}): {error}"
            ) from None
        found.append(Measurement(kernel, operation, ranks, value))
    return found
