"""Expert parallelism: tokens travel to their experts' ranks and back, and nothing changes (lesson 10)."""

from typing import Any

import numpy as np

from .calling import Mine, given
from .exercise import Exercise, Failed, Property, array, parts, require, same, sizes
from .golden import ATOL, RTOL, Case, golden

Rng = np.random.Generator


class Exchange:
    """The only way between ranks: `sent[r][s]` goes from rank r to rank s, and comes back as ``received[s][r]``.

    Copies what it passes; `bytes_between_ranks` counts what left its rank.
    """

    def __init__(self, ranks: int) -> None:
        self.ranks, self.bytes_between_ranks, self.calls = ranks, 0, 0

    def __call__(self, sent: Any) -> list[list[np.ndarray]]:
        """All messages at once."""
        rows = list(sent)
        if len(rows) != self.ranks or any(len(row) != self.ranks for row in rows):
            raise ValueError(f"exchange takes {self.ranks} lists of {self.ranks} arrays")
        self.calls += 1
        for r, row in enumerate(rows):
            self.bytes_between_ranks += sum(np.asarray(m).nbytes for s, m in enumerate(row) if s != r)
        return [[np.array(rows[r][s]) for r in range(self.ranks)] for s in range(self.ranks)]


def _expert(e: int, rows: np.ndarray) -> np.ndarray:
    return np.tanh(rows * (1 + e)) + e


def _case(rng: Rng, ranks: int, per_rank: int, K: int) -> dict[str, Any]:
    D, E = 5, ranks * per_rank
    tokens = [int(n) for n in rng.integers(1, 5, ranks)]
    return dict(
        x=[rng.standard_normal((T, D)) for T in tokens],
        topk_idx=[np.sort(np.argsort(rng.random((T, E)), axis=1)[:, :K], axis=1) for T in tokens],
        weights=[rng.random((T, K)) for T in tokens],
        experts_per_rank=per_rank,
    )


def _run(mine: Mine, case: dict[str, Any]) -> tuple[list[np.ndarray], Exchange]:
    exchange, ranks = Exchange(len(case["x"])), len(case["x"])
    held: list[tuple[int, int]] = []

    def expert(rank: int, e: int, rows: np.ndarray) -> np.ndarray:
        if e // case["experts_per_rank"] != rank:
            raise Failed(f"expert {e} was asked on rank {rank}, which does not hold it")
        held.append((rank, e))
        return _expert(e, rows)

    got = parts("the result", mine(**case, expert=given(expert), exchange=given(exchange)), ranks)
    return [array(f"the output of rank {r}", y, x.shape) for r, (y, x) in enumerate(zip(got, case["x"]))], exchange


def _expected(case: dict[str, Any]) -> list[np.ndarray]:
    out = []
    for x, idx, w in zip(case["x"], case["topk_idx"], case["weights"]):
        rows = [sum(w[t, k] * _expert(int(e), x[t]) for k, e in enumerate(idx[t])) for t in range(len(x))]
        out.append(np.array(rows))
    return out


def _equal(ranks: int, K: int) -> Any:
    def test(mine: Mine, rng: Rng) -> None:
        case = _case(rng, ranks, sizes(rng, 1, 2, 4)[0], K)
        for r, (a, b) in enumerate(zip(_run(mine, case)[0], _expected(case))):
            same(f"the output of rank {r}", a, b)

    return test


def _travels(mine: Mine, rng: Rng) -> None:
    """With one expert a token, a row leaves its rank exactly if its expert lives elsewhere."""
    case = _case(rng, 3, 2, 1)
    _, exchange = _run(mine, case)
    away = sum(int((idx // 2 != r).sum()) for r, idx in enumerate(case["topk_idx"]))
    row = case["x"][0].shape[1] * 8
    limit = away * (2 * row + 16) + 200  # there and back, and a few numbers that say what it is
    total = exchange.bytes_between_ranks
    require(total <= limit, f"{total} bytes left their rank for {away} rows: at most {limit} were needed")
    require(total >= 2 * away * row, "rows reached experts of other ranks without exchange")


def _idle(mine: Mine, rng: Rng) -> None:
    """Everybody wants the experts of rank 0."""
    case = _case(rng, 3, 2, 1)
    case["topk_idx"] = [np.zeros_like(idx) for idx in case["topk_idx"]]
    case["x"][1], case["weights"][1] = case["x"][1][:0], case["weights"][1][:0]
    case["topk_idx"][1] = case["topk_idx"][1][:0]
    for r, (a, b) in enumerate(zip(_run(mine, case)[0], _expected(case))):
        same(f"the output of rank {r}", a, b.reshape(a.shape))


def _golden(mine: Mine, case: Case) -> None:
    inputs = {name: [case[f"{name}_{r}"] for r in range(3)] for name in ("x", "topk_idx", "weights")}
    got, _ = _run(mine, inputs | dict(experts_per_rank=case["experts_per_rank"]))
    for r, y in enumerate(got):
        same(f"the output of rank {r}", y, case[f"y_{r}"], RTOL, ATOL)


EXERCISE = Exercise(
    title="an all-to-all that equals one rank",
    kind="I",
    lesson=10,
    minutes=45,
    properties=(
        Property(
            "one_expert",
            3,
            "with one expert a token the output is that of a loop",
            _equal(3, 1),
            "row -> rank e // experts_per_rank, then back to the token it came from; times its weight",
        ),
        Property(
            "several",
            2,
            "several experts a token are summed",
            _equal(4, 3),
            "a token's rows meet again at its own rank",
        ),
        Property(
            "bytes",
            2,
            "only rows whose expert lives elsewhere travel",
            _travels,
            "send to rank s the rows of its experts and nothing else, and their results back",
        ),
        Property("idle", 2, "ranks without tokens or rows take part", _idle, "an empty array is a message too"),
        golden("all_to_all", _golden),
    ),
)
