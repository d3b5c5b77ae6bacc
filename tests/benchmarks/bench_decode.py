"""Decoding beside PyTorch eager on the same CPU: ``python tests/benchmarks/bench_decode.py [--json]``.

Both decode greedily from the same weights with the same algorithm (absorbed, latent cache), and must find the same
tokens. By default ours is `generate`, with all that it does between two tokens, one thread; the peer is
`torch_decode.py` with one thread, twice (A/A), and with two, of which the faster counts.

    --batch 1 2 4 ...    several sequences at once
    --context 1 256 ...  microseconds a token behind that many others, and what of them attention itself takes
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import contest
import numpy as np
from contest import Contestant, threads

OURS, PEER, AGAIN, PEER_2 = "minidsv3", "torch", "torch again", "torch, 2 threads"


def build_ours(path: Path, tokens: int, batch: int) -> Any:
    """Greedy decoding of `batch` sequences that begin with different tokens."""
    from minidsv3 import generate, load_pretrained

    model = load_pretrained(path, mtp=False)
    return lambda: [row.tolist() for row in generate(model, [[b] for b in range(batch)], tokens).tokens]


def build_torch(path: Path, tokens: int, batch: int, n_threads: int) -> Any:
    """The same with the peer."""
    import torch
    from torch_decode import TorchBatchDecoder, TorchDecoder

    torch.set_num_threads(n_threads)
    one = TorchDecoder(path, tokens) if batch == 1 else None
    many = TorchBatchDecoder(path, batch, tokens)

    def work() -> list[list[int]]:
        rows: list[list[int]] = [[b] for b in range(batch)]
        for at in range(tokens):
            if one is not None:
                rows[0].append(int(one.step(rows[0][-1], at).argmax()))
                continue
            for row, token in zip(rows, many.step([row[-1] for row in rows], at).argmax(1).tolist()):
                row.append(token)
        return [row[1:] for row in rows]

    return work


def build_probe() -> Any:
    """The gemm probe, and which BLAS it ran on."""
    from minidsv3.train.machine import environment, sgemm_gflops

    blas = environment()["blas"]
    return lambda: (sgemm_gflops(1, seconds=0.2), blas)


def race(preset: str, path: Path, tokens: int, batch: int, rounds: int, kernel: str | None) -> dict[str, Any]:
    """Microseconds a token of all contestants, and the ratio."""
    work = {"path": path, "tokens": tokens, "batch": batch}
    ours = Contestant(OURS, build_ours, work, {"OPENBLAS_CORETYPE": kernel, **threads(1)})
    peers = [
        Contestant(name, build_torch, {**work, "n_threads": n}, {"OPENBLAS_CORETYPE": kernel, **threads(n)})
        for name, n in ((PEER, 1), (AGAIN, 1), (PEER_2, 2))
    ]
    probe = Contestant("probe", build_probe, {}, {"OPENBLAS_CORETYPE": kernel, **threads(1)})
    for contestant in (ours, *peers, probe):
        contestant.start()
    blas = probe.work()[2][1]
    found = {c.name: c.work()[2] for c in (ours, *peers)}
    outcome = contest.contest([ours, *peers], rounds, lambda: probe.work()[2][0])
    for contestant in (ours, *peers, probe):
        contestant.stop()
    seconds = {name: statistics.median(outcome.wall[name]) for name in outcome.names}
    fastest = PEER if seconds[PEER] <= seconds[PEER_2] else PEER_2
    return {
        "preset": preset,
        "tokens": tokens,
        "batch": batch,
        "blas": blas,
        "microseconds_per_token": {name: s / (tokens * batch) * 1e6 for name, s in seconds.items()},
        "peer": fastest,
        "ratio": outcome.ratio(OURS, fastest),
        "machine": outcome.quiet(PEER, AGAIN, cores=1),
        "same_tokens": all(tokens_ == found[OURS] for tokens_ in found.values()),
    }


def growth(preset: str, path: Path, contexts: list[int], kernel: str | None) -> dict[str, Any]:
    """Seconds of one step behind n tokens, and of its attention alone, for each n (one thread)."""
    arguments = {"path": path, "contexts": contexts}
    measured = Contestant("growth", build_growth, arguments, {"OPENBLAS_CORETYPE": kernel, **threads(1)})
    measured.start()
    step, alone = np.median([measured.work()[2] for _ in range(5)], axis=0)
    measured.stop()
    return {"preset": preset, "contexts": contexts, "step": step.tolist(), "attention_alone": alone.tolist()}


def build_growth(path: Path, contexts: list[int]) -> Any:
    """Times a step behind each context, and the same products and softmax on bare arrays."""
    from minidsv3 import LatentCache, load_pretrained
    from minidsv3.generation.decoder import Decoder

    model = load_pretrained(path, mtp=False)
    decoder, cfg, token = Decoder(model), model.config, np.array([[1]], dtype=np.int64)
    empty = LatentCache(cfg, 1, page=1)
    cache = LatentCache(cfg, 1, page=max(contexts))
    rng = np.random.default_rng(0)
    for layer in cache.layers:  # what is stored does not change how long it takes
        layer.append(
            *(rng.standard_normal((1, max(contexts) - 1, n)) for n in (cfg.kv_lora_rank, cfg.qk_rope_head_dim))
        )
    cache.extend(max(contexts) - 1)
    query = rng.standard_normal((cfg.num_attention_heads, cache.width)).astype(np.float32)

    def attend(past: np.ndarray) -> None:
        p = query @ past.T
        p -= p.max(axis=1, keepdims=True)
        np.exp(p, out=p)
        p /= p.sum(axis=1, keepdims=True)
        p @ past

    def seconds_of(work: Any, repeat: int = 60) -> float:
        total = 0.0
        for _ in range(repeat):
            decoder.decode(token, empty)  # the weights pass the caches, as they do between two steps
            start = time.perf_counter()
            work()
            total += time.perf_counter() - start
        return total / repeat

    def work() -> list[list[float]]:
        step, alone = [], []
        for n in reversed(contexts):
            cache.truncate(n - 1)
            step.append(seconds_of(lambda: decoder.decode(token, cache)))
            pages = [layer.pages[0][0, :n] for layer in cache.layers]
            alone.append(seconds_of(lambda pages=pages: [attend(past) for past in pages]))
        cache.lengths[:] = max(contexts) - 1
        return [step[::-1], alone[::-1]]

    return work


def write_model(preset: str, path: Path) -> None:
    """Random weights of a preset as a released-format directory, large enough that greedy choices are clear."""
    from minidsv3 import ModelConfig, Transformer, save_pretrained

    model = Transformer(ModelConfig.preset(preset))
    model.init_weights(np.random.default_rng(0), std=0.05)
    save_pretrained(model, path)


def draw(path: str, results: list[dict[str, Any]]) -> None:
    """A panel for each preset."""
    from minidsv3 import plots
    from minidsv3.generation.figures import seconds_against_context

    with plots.style():
        figure, axes = plots.new_figure(1, len(results), panel=(6.4, 3.8))
        for ax, r in zip(axes, results):
            seconds_against_context(ax, r["preset"], r["contexts"], r["step"], r["attention_alone"])
    plots.save(figure, path, data=None, text=plots.description(*axes), dpi=90)


def main() -> None:
    """Run the races that were asked for and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", nargs="+", default=["tiny", "small"])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--context", nargs="+", type=int, help="instead of races: cost behind this many tokens")
    parser.add_argument("--figure", metavar="FILE", help="draw the cost against the context")
    parser.add_argument("--kernel", default="Haswell", help="OPENBLAS_CORETYPE of both sides; 'auto' as installed")
    parser.add_argument("--rounds", type=int, help="default 12 (tiny), 6 (others)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    kernel, results = None if args.kernel == "auto" else args.kernel, []
    with tempfile.TemporaryDirectory() as folder:
        for preset in args.preset:
            path = Path(folder) / preset
            write_model(preset, path)
            rounds = args.rounds or (12 if preset == "tiny" else 6)
            if args.context:
                results.append(growth(preset, path, sorted(args.context), kernel))
            else:
                results += [race(preset, path, args.tokens, b, rounds, kernel) for b in args.batch]
    if args.figure and args.context:
        draw(args.figure, results)
    if args.json:
        print(json.dumps(results))
        return
    for result in results:
        print(growth_in_words(result) if args.context else in_words(result), flush=True)


def in_words(r: dict[str, Any]) -> str:
    """A race as a few lines of text."""
    machine, ratio = r["machine"], r["ratio"]
    return "\n".join([
        f"{r['preset']}, batch {r['batch']}, {r['tokens']} tokens, {r['blas']}, machine "
        f"{'quiet' if machine['quiet'] else 'BUSY'} (peer against itself {machine['peer_against_itself']:.3f}, slowest "
        f"probe {machine['slowest_probe']:.2f} of the best)",
        "  " + ", ".join(f"{name} {us:.0f} us" for name, us in r["microseconds_per_token"].items()),
        f"  minidsv3 / {r['peer']} {ratio['median']:.3f} (quartiles {ratio['low']:.3f} to {ratio['high']:.3f}, minima "
        f"{ratio['of_minima']:.3f}); same tokens: {r['same_tokens']}",
    ])  # fmt: skip


def growth_in_words(r: dict[str, Any]) -> str:
    """A line for each context."""
    lines = [r["preset"]]
    for n, step, alone in zip(r["contexts"], r["step"], r["attention_alone"]):
        us = [1e6 * seconds for seconds in (step, alone, step - alone)]
        lines.append(
            f"  behind {n - 1:>6,} tokens {us[0]:7.0f} us a token: attention alone {us[1]:.0f}, rest {us[2]:.0f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
