"""Makes minidsv3/exercises/golden/*.npz: one stored case for each exercise that implements something.

    python tests/golden/make_exercise_golden.py

Every expected value comes from a slow textbook loop in Python's own floats (double precision), whole numbers or
fractions, not from this package and not from NumPy's array arithmetic: a Jacobian written out entry by entry, a rank
counted, a rounding found by search, a text that is walked. One exception: what EPLB answers was recorded from the real
one (tests/golden/eplb.json, deepseek-ai/EPLB@d52c72d with a stable sort). Inputs are drawn with Python's
`random`, so the files are the same on every machine; tests/test_exercise_golden.py makes them again and compares.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
FOLDER = HERE.parents[1] / "minidsv3" / "exercises" / "golden"
Case = dict[str, np.ndarray]


def drawn(rng: random.Random, *shape: int, low: float = -2.0, high: float = 2.0) -> np.ndarray:
    """Uniform float32 numbers."""
    return np.array([rng.uniform(low, high) for _ in range(math.prod(shape))], dtype=np.float32).reshape(shape)


def single(value: Any) -> np.ndarray:
    return np.array(value, dtype=np.float32)


def whole(value: Any) -> np.ndarray:
    return np.array(value, dtype=np.int64)


def chosen(rng: random.Random, T: int, E: int, K: int) -> list[list[int]]:
    """Experts of each token, ascending."""
    return [sorted(rng.sample(range(E), K)) for _ in range(T)]


def rms_norm(rng: random.Random) -> Case:
    """The Jacobian of one row, entry by entry: dy_i/dx_j = w_i (delta_ij r - x_i x_j r^3 / D)."""
    D, eps = 5, 0.01
    x, w, dy = drawn(rng, 2, 3, D), drawn(rng, D), drawn(rng, 2, 3, D)
    y, dx, dw = x.tolist(), x.tolist(), [0.0] * D
    for b, s in product(range(2), range(3)):
        row, up = x[b, s].tolist(), dy[b, s].tolist()
        r = (sum(v * v for v in row) / D + eps) ** -0.5
        for i in range(D):
            y[b][s][i] = float(w[i]) * row[i] * r
            dw[i] += up[i] * row[i] * r
        for j in range(D):
            dx[b][s][j] = sum(up[i] * float(w[i]) * ((i == j) * r - row[i] * row[j] * r**3 / D) for i in range(D))
    return dict(x=x, w=w, eps=np.array(eps), dy=dy, y=single(y), dx=single(dx), dw=single(dw))


def cross_entropy(rng: random.Random) -> Case:
    """-log of the softmax, a row at a time; two of five targets are ignored."""
    N, V, targets, dy = 5, 7, [3, -100, 0, 6, -100], 0.75
    logits = drawn(rng, N, V, low=-4, high=4)
    valid = [n for n in range(N) if targets[n] != -100]
    loss, dlogits = 0.0, [[0.0] * V for _ in range(N)]
    for n in valid:
        powers = [math.exp(v) for v in logits[n].tolist()]
        loss -= math.log(powers[targets[n]] / math.fsum(powers)) / len(valid)
        for v in range(V):
            dlogits[n][v] = dy * (powers[v] / math.fsum(powers) - (v == targets[n])) / len(valid)
    return dict(logits=logits, targets=whole(targets), dy=single(dy), loss=single(loss), dlogits=single(dlogits))


def sequence_loss(rng: random.Random) -> Case:
    """Eq. 17-20 of the V3 report without its factor alpha, and the quotient rule for each pair of experts."""
    B, S, E, K, dy = 3, 4, 6, 2, 1.5
    scores, topk = drawn(rng, B * S, E, low=0.05, high=1), chosen(rng, B * S, E, K)
    loss, dscores = 0.0, [[0.0] * E for _ in range(B * S)]
    for b in range(B):
        tokens = range(b * S, (b + 1) * S)
        f = [E / (K * S) * sum(e in topk[t] for t in tokens) for e in range(E)]
        for t in tokens:
            s, total = scores[t].tolist(), math.fsum(scores[t].tolist())
            loss += sum(f[e] * s[e] / total for e in range(E)) / S / B
            for m in range(E):
                slope = sum(f[e] * ((e == m) * total - s[e]) / total**2 for e in range(E))
                dscores[t][m] = dy * slope / S / B
    return dict(scores=scores, topk_idx=whole(topk), batch=whole(B), dy=single(dy), loss=single(loss),
                dscores=single(dscores))  # fmt: skip


def rope(rng: random.Random) -> Case:
    """Sine and cosine, pair by pair; where each channel of the half-split layout comes from, by looking for it."""
    S, half = 4, 3
    x, angles = drawn(rng, S, 2 * half), drawn(rng, S, half, low=-3, high=3)
    pairs = {"neighbours": [(2 * j, 2 * j + 1) for j in range(half)], "halves": [(j, j + half) for j in range(half)]}
    out: Case = dict(x=x, angles=angles)
    for layout, places in pairs.items():
        y = x.tolist()
        for s, (j, (a, b)) in product(range(S), enumerate(places)):
            u, v, phi = float(x[s, a]), float(x[s, b]), float(angles[s, j])
            y[s][a], y[s][b] = u * math.cos(phi) - v * math.sin(phi), u * math.sin(phi) + v * math.cos(phi)
        out[layout] = single(y)
    order = [0] * (2 * half)
    for old, new in zip(pairs["neighbours"], pairs["halves"]):
        order[new[0]], order[new[1]] = old
    return out | dict(permutation=whole(order))


def yarn_ramp(rng: random.Random) -> Case:
    """DeepSeek-V3's own setting: 64 rotated channels, factor 40 on a context of 4,096."""
    d_r, theta, factor, context, beta_fast, beta_slow = 64, 10000.0, 40.0, 4096, 32.0, 1.0
    turns = [context * theta ** (-2 * j / d_r) / (2 * math.pi) for j in range(d_r // 2)]  # in the whole context
    low = max(j for j, n in enumerate(turns) if n >= beta_fast)  # the last pair that turns often enough
    high = min(j for j, n in enumerate(turns) if n <= beta_slow)
    out = []
    for j in range(d_r // 2):
        plain = theta ** (-2 * j / d_r)
        share = 0.0 if j <= low else 1.0 if j >= high else (j - low) / (high - low)
        out.append((1 - share) * plain + share * plain / factor)
    numbers = dict(d_r=d_r, theta=theta, factor=factor, context=context, beta_fast=beta_fast, beta_slow=beta_slow)
    return {name: np.array(value) for name, value in numbers.items()} | dict(frequencies=np.array(out))


def absorbed_decoding(rng: random.Random) -> Case:
    """Keys and values of every head and cached token are made, number by number."""
    H, d_n, d_r, d_v, r, L, scale = 3, 4, 2, 5, 6, 7, 0.25
    q, latent, k_rope = drawn(rng, H, d_n + d_r), drawn(rng, L, r), drawn(rng, L, d_r)
    w_uk, w_uv = drawn(rng, H, d_n, r), drawn(rng, H, d_v, r)
    y = [[0.0] * d_v for _ in range(H)]
    for h in range(H):
        keys = [[sum(float(w_uk[h, i, c]) * float(latent[j, c]) for c in range(r)) for i in range(d_n)]
                + k_rope[j].tolist() for j in range(L)]  # fmt: skip
        powers = [math.exp(scale * sum(a * b for a, b in zip(q[h].tolist(), key))) for key in keys]
        for v in range(d_v):
            values = [sum(float(w_uv[h, v, c]) * float(latent[j, c]) for c in range(r)) for j in range(L)]
            y[h][v] = sum(p * value for p, value in zip(powers, values)) / math.fsum(powers)
    return dict(q=q, latent=latent, k_rope=k_rope, w_uk=w_uk, w_uv=w_uv, scale=np.array(scale), y=single(y))


def router(rng: random.Random) -> Case:
    """By rank: who has fewer than K better ones is chosen; equal ones count if they stand before it. In eighths."""
    T, E, K, n_group, topk_group = 6, 8, 3, 4, 2
    scores = [[rng.randrange(8) for _ in range(E)] for _ in range(T)]
    bias = [rng.randrange(-12, 3) for _ in range(E)]

    def first(values: dict[int, int], count: int) -> list[int]:
        def better(e: int) -> int:
            return sum(v > values[e] or (v == values[e] and i < e) for i, v in values.items())

        return [e for e in values if better(e) < count]

    out = []
    for s in scores:
        choice = [a + b for a, b in zip(s, bias)]
        sums = {g: choice[2 * g] + choice[2 * g + 1] for g in range(n_group)}  # two experts a group
        groups = first(sums, topk_group)
        out.append(first({e: choice[e] for e in range(E) if e // 2 in groups}, K))
    return dict(scores=single(scores) / 8, bias=single(bias) / 8, top_k=whole(K), n_group=whole(n_group),
                topk_group=whole(topk_group), topk_idx=whole(out))  # fmt: skip


def dispatch(rng: random.Random) -> Case:
    """A slot's row is the number of slots that go before it; the last expert gets nobody."""
    T, E, K, D = 5, 6, 2, 3
    topk = chosen(rng, T, E - 1, K)
    slots = list(product(range(T), range(K)))
    before = {(t, k): sum((topk[u][m], u, m) < (topk[t][k], t, k) for u, m in slots) for t, k in slots}
    token_of_row = [next(t for (t, k), row in before.items() if row == n) for n in range(T * K)]
    rows, weights = drawn(rng, T * K, D), drawn(rng, T, K, low=0)
    y = [[sum(float(weights[t, k]) * float(rows[before[t, k], d]) for k in range(K)) for d in range(D)]
         for t in range(T)]  # fmt: skip
    counts = [sum(row.count(e) for row in topk) for e in range(E)]
    return dict(topk_idx=whole(topk), experts=whole(E), rows=rows, weights=weights, rows_per_expert=whole(counts),
                token_of_row=whole(token_of_row), y=single(y),
                row_of_slot=whole([[before[t, k] for k in range(K)] for t in range(T)]))  # fmt: skip


def bias_update(rng: random.Random) -> Case:
    """Three steps in whole 64ths: up, down, or, at the mean, not at all."""
    loads = [[3, 14, 9, 2, 20, 6], [9, 9, 0, 18, 9, 9], [1, 0, 0, 0, 0, 59]]
    bias = [[rng.randrange(-40, 41) for _ in range(6)]]
    for load in loads:
        bias.append([b + 8 * ((6 * n < sum(load)) - (6 * n > sum(load))) for b, n in zip(bias[-1], load)])
    return dict(load=whole(loads), speed=np.array(0.125), bias=single(bias) / 64)


def mtp_targets(rng: random.Random) -> Case:
    """The text is walked: a place has read its tokens, joins the one `depth` behind it, predicts the next."""
    tokens = [rng.sample(range(100), 9) for _ in range(2)]
    out: Case = dict(tokens=whole(tokens))
    for depth in (1, 2):
        seen: list[list[int]] = []
        targets: list[list[int]] = []
        for row in tokens:
            rest, seen_row, target_row = row[depth:], [], []
            while len(rest) > 1:
                seen_row.append(rest.pop(0))
                target_row.append(rest[0])
            seen.append(seen_row)
            targets.append(target_row)
        out |= {f"seen_{depth}": whole(seen), f"targets_{depth}": whole(targets)}
    return out


def accept_reject(rng: random.Random) -> Case:
    """Probability of each token that comes out, for each guess that goes in, in fractions."""
    p, q = [Fraction(n, 10) for n in (1, 2, 3, 4)], [Fraction(n, 10) for n in (4, 3, 2, 1)]
    rest = [max(a - b, Fraction(0)) for a, b in zip(p, q)]
    table = []
    for draft in range(4):
        kept = min(Fraction(1), p[draft] / q[draft])
        table.append([kept * (j == draft) + (1 - kept) * rest[j] / sum(rest) for j in range(4)])
    return {name: np.array(value, dtype=np.float64) for name, value in dict(p=p, q=q, table=table).items()}


def resume(rng: random.Random) -> Case:
    """AdamW without noise for seven steps, a weight at a time; the run is saved after the fourth."""
    start = [rng.uniform(-1, 1) for _ in range(5)]
    ends = []
    for i, weight in enumerate(start):
        mean = square = 0.0
        for step in range(1, 8):
            gradient = weight - math.sin((step - 1) * 5 + i)  # the batch begins where the last one ended
            mean, square = 0.9 * mean + 0.1 * gradient, 0.95 * square + 0.05 * gradient * gradient
            weight -= 0.05 * mean / (1 - 0.9**step) / (math.sqrt(square / (1 - 0.95**step)) + 1e-8)
        ends.append((weight, mean, square))
    after = {name: np.array(row) for name, row in zip(("weights", "exp_avg", "exp_avg_sq"), zip(*ends))}
    return dict(start=np.array(start)) | after


def rounded(value: Fraction, bits: int, cut: bool = False) -> Fraction:
    """`value` with so many significant bits: to the nearest, ties to even, or cut off towards zero."""
    if value == 0:
        return value
    step = Fraction(1)
    while abs(value) >= step * 2**bits:
        step *= 2
    while abs(value) < step * 2 ** (bits - 1):
        step /= 2
    steps = value / step
    return (math.trunc(steps) if cut else round(steps)) * step


def quantize_tile(rng: random.Random) -> Case:
    """The nearest of all E4M3 numbers, found by search; no quotient is near the middle between two of them."""
    block, sizes = 4, (0.01, 1.0, 300.0)
    x = np.concatenate([drawn(rng, 1, 10) * np.float32(size) for size in sizes])
    codes_there_are = [Fraction(m, 8) * Fraction(2) ** -6 for m in range(8)]
    codes_there_are += [(1 + Fraction(m, 8)) * Fraction(2) ** e for e in range(-6, 9) for m in range(8)][:-1]
    codes, scales = x.tolist(), [[0.0] * 3 for _ in range(3)]
    for n, tile in product(range(3), range(3)):
        columns = range(tile * block, min((tile + 1) * block, 10))
        scale = rounded(max(abs(Fraction(float(x[n, c]))) for c in columns) / 448, 24)
        scales[n][tile] = float(scale)
        for c in columns:
            quotient = Fraction(float(x[n, c])) / scale
            best, second = sorted(codes_there_are, key=lambda code: abs(code - abs(quotient)))[:2]
            assert abs(abs(abs(quotient) - best) - abs(abs(quotient) - second)) > Fraction(1, 10**4) * best
            codes[n][c] = math.copysign(float(best), float(x[n, c]))
    return dict(x=x, block=whole(block), codes=single(codes), scales=single(scales))


def promoted_sum(rng: random.Random) -> Case:
    """Every sum exact as a fraction, then rounded to float32, then cut to 14 bits; float32 between the intervals."""
    products, intervals = drawn(rng, 300, low=0.5, high=1.5), (16, 128, 300)
    sums = []
    for interval in intervals:
        total = part = Fraction(0)
        for i, value in enumerate(products.tolist(), start=1):
            part = rounded(rounded(part + Fraction(value), 24), 14, cut=True)
            if i % interval == 0 or i == len(products):
                total, part = rounded(total + part, 24), Fraction(0)
        sums.append(float(total))
    return dict(products=products, intervals=whole(intervals), sums=single(sums))


def all_to_all(rng: random.Random) -> Case:
    """No ranks at all: every token asks its two experts. Stored for three ranks with 4, 2 and 5 tokens."""
    out: Case = dict(experts_per_rank=whole(2))
    for rank, T in enumerate((4, 2, 5)):
        x, topk, weights = drawn(rng, T, 3, low=-1, high=1), chosen(rng, T, 6, 2), drawn(rng, T, 2, low=0)
        y = [[sum(float(weights[t, k]) * (math.tanh(float(x[t, d]) * (1 + e)) + e) for k, e in enumerate(topk[t]))
              for d in range(3)] for t in range(T)]  # fmt: skip
        out |= {f"x_{rank}": x, f"topk_idx_{rank}": whole(topk), f"weights_{rank}": weights, f"y_{rank}": single(y)}
    return out


def pack_experts(rng: random.Random) -> Case:
    """What the real EPLB answered: replicas of 256 experts, and the GPU of each of the 32 experts of a node."""
    cases = {case["name"]: case for case in json.loads((HERE / "eplb.json").read_text(encoding="utf-8"))["cases"]}
    spread = next(c for c in cases.values() if c["policy"] == "global")  # one group: replicas of the layer as a whole
    plain = next(c for c in cases.values() if c["num_replicas"] == c["num_logical"])  # no replicas: packing alone
    slots, room = plain["phy2log"][0][: plain["num_replicas"] // plain["num_nodes"]], 4  # node 0 has 8 GPUs of 4
    experts = sorted(slots)
    return dict(
        weight=np.array([plain["weight"][0][e] for e in experts], dtype=np.float64), packs=whole(len(slots) // room),
        pack_of_item=whole([slots.index(e) // room for e in experts]),
        load=np.array(spread["weight"][0], dtype=np.float64), count=whole(spread["num_replicas"]),
        replicas=whole(spread["logcnt"][0]),
    )  # fmt: skip


def schedule(rng: random.Random) -> Case:
    """A clock: a rank does a backward when one is there, else a forward while it holds fewer chunks than may be.

    What is stored: c + 1 for the forward of chunk c, -(c + 1) for its backward.
    """
    ranks, chunks, took = 4, 6, {1: 1, -1: 2}
    done: dict[tuple[int, int], int] = {}  # (rank, op) -> when
    rows: list[list[int]] = [[] for _ in range(ranks)]
    free = [0] * ranks
    for now in range(100):
        for r in range(ranks):
            live = sum(1 if op > 0 else -1 for op in rows[r])
            f, b = (sum(op * sign > 0 for op in rows[r]) + 1 for sign in (1, -1))
            ready_b = done.get((r + 1, -b) if r + 1 < ranks else (r, b), 99) <= now and b <= chunks
            ready_f = f <= chunks and (r == 0 or done.get((r - 1, f), 99) <= now) and live < ranks - r
            if free[r] <= now and (ready_b or ready_f):
                op = -b if ready_b else f
                rows[r].append(op)
                free[r] = done[r, op] = now + took[1 if op > 0 else -1]
    return dict(ranks=whole(ranks), chunks=whole(chunks), order=whole(rows))


MAKERS: tuple[Callable[[random.Random], Case], ...] = (
    rms_norm, cross_entropy, rope, yarn_ramp, absorbed_decoding, router, dispatch, bias_update, sequence_loss,
    mtp_targets, accept_reject, resume, quantize_tile, promoted_sum, all_to_all, pack_experts, schedule,
)  # fmt: skip


def cases() -> dict[str, Case]:
    """Arrays of every file by name: inputs and what is expected."""
    return {make.__name__: make(random.Random(make.__name__)) for make in MAKERS}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, case in cases().items():
        np.savez(FOLDER / f"{name}.npz", **case)
        print(f"{name}: {(FOLDER / f'{name}.npz').stat().st_size} bytes")
