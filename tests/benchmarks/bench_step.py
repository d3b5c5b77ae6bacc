"""A training step beside PyTorch eager on the same CPU: ``python tests/benchmarks/bench_step.py [--json]``.

Before anything is timed, the peer's gradients are compared with ours, tensor by tensor: both do the same work. Rows:

    step, 2 threads      wall time; ours two shards on two workers, the peer two OpenMP threads
    step, 1 thread       CPU time
    sgemm peak           share of the measured matmul speed of two cores that our step reaches
    memory               peak of a step above model and optimizer; with recomputation in --growth
    batch, experts       time per token for batches 4 to 32, and 128 experts against 8 at equal active work (1 thread)
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import contest
import numpy as np
from contest import Contestant, threads

SETTINGS = {"mtp_weight": 0.3, "balance_weight": 1e-4, "lr": 1e-3, "weight_decay": 0.1, "grad_clip": 1.0, "gamma": 1e-3}
MTP = ("torch", "torch again")
SILENT = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}


def batch(batch_size: int, seq_len: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and targets int64 [B, S]."""
    rows = np.random.default_rng(seed).integers(0, 257, (batch_size, seq_len + 1))
    return rows[:, :-1].copy(), rows[:, 1:].copy()


def build_ours(preset: str, workers: int, model: Any = None, **changes: Any) -> Any:
    """Our training step on random tokens; `model` and `changes` replace fields of the preset's two configs."""
    import dataclasses
    from contextlib import ExitStack

    from minidsv3 import ModelConfig, TrainConfig, Transformer
    from minidsv3.train.machine import keep_freed_memory, worker_pool
    from minidsv3.train.optim import AdamW, FlatParameters
    from minidsv3.train.step import cut, train_step

    keep_freed_memory()
    net = Transformer(dataclasses.replace(ModelConfig.preset(preset), **(model or {})))
    net.init_weights(np.random.default_rng(0))
    cfg = TrainConfig.preset(preset)
    cfg = dataclasses.replace(cfg, learning_rate=SETTINGS["lr"], warmup_steps=0, **changes)
    flat = FlatParameters(net)
    optimizer, gradients = AdamW(flat, cfg), [flat.new_gradient() for _ in range(cfg.shards)]
    shards = cut(*batch(cfg.batch_size, cfg.seq_len), cfg.shards)
    stack = ExitStack()
    run = stack.enter_context(worker_pool(workers))
    step = 0

    def work(_keep: ExitStack = stack) -> float:
        nonlocal step
        step += 1
        return train_step(net, optimizer, gradients, shards, cfg, step, run).loss

    return work


def build_torch(path: Path, batch_size: int, seq_len: int, n_threads: int, which: str = "torch") -> Any:
    """The peer's step: 'torch' with MTP, 'torch without MTP', or 'transformers' (which has none)."""
    import torch
    from torch_model import TorchModel, TorchTrainer

    torch.set_num_threads(n_threads)
    tokens, targets = (torch.from_numpy(a) for a in batch(batch_size, seq_len))
    if which == "transformers":
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        vocabulary = model.config.vocab_size

        def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            logits = model(input_ids=x, use_cache=False).logits
            return torch.nn.functional.cross_entropy(logits.view(-1, vocabulary), y.flatten())
    else:
        model = TorchModel(path, mtp=which == "torch")

        def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return model.loss(x, y, SETTINGS["mtp_weight"], SETTINGS["balance_weight"])

    trainer = TorchTrainer(model, loss, SETTINGS)
    return lambda: trainer.step(tokens, targets)


def write_model(preset: str, path: Path) -> None:
    """Random weights of a preset as a released-format directory."""
    from minidsv3 import ModelConfig, Transformer, save_pretrained

    model = Transformer(ModelConfig.preset(preset))
    model.init_weights(np.random.default_rng(0))
    save_pretrained(model, path)


def worst_gradient(path: Path, preset: str) -> tuple[float, str]:
    """Largest relative difference (norm of each tensor) between the peer's gradients and ours, and where."""
    import torch
    from torch_model import TorchModel

    from minidsv3 import TrainConfig, load_pretrained
    from minidsv3.autograd import backward

    cfg = TrainConfig.preset(preset)
    x, y = batch(4, cfg.seq_len)
    peer, ours = TorchModel(path), load_pretrained(path)
    peer.loss(torch.from_numpy(x), torch.from_numpy(y), SETTINGS["mtp_weight"], SETTINGS["balance_weight"]).backward()
    backward(ours.loss(x, y, mtp_weight=SETTINGS["mtp_weight"], balance_weight=SETTINGS["balance_weight"]).total)
    expected = peer.gradients()
    worst = (0.0, "")
    for name, parameter in ours.named_parameters():
        theirs = expected.pop(name).numpy()
        difference = np.linalg.norm(parameter.grad - theirs) / max(np.linalg.norm(theirs), 1e-12)
        worst = max(worst, (float(difference), name))
    assert not expected, f"the peer has gradients that we have not: {sorted(expected)[:3]}"
    return worst


def contestants(
    preset: str, path: Path, n_threads: int, kernel: str | None, shape: tuple[int, int]
) -> list[Contestant]:
    """Ours, the peer twice, the peer without MTP and transformers, all with `n_threads`."""
    repeat = 4 if preset != "small" else 1
    blas = {"OPENBLAS_CORETYPE": kernel, **threads(n_threads), **SILENT}
    ours = Contestant("minidsv3", build_ours, {"preset": preset, "workers": n_threads}, blas, repeat)
    peers = [(name, "torch") for name in MTP] + [(name, name) for name in ("torch without MTP", "transformers")]
    arguments = {"path": path, "batch_size": shape[0], "seq_len": shape[1], "n_threads": n_threads}
    return [
        ours,
        *(Contestant(name, build_torch, {**arguments, "which": which}, blas, repeat) for name, which in peers),
    ]


def race(preset: str, path: Path, n_threads: int, kernel: str | None, rounds: int) -> dict[str, Any]:
    """One table row: ratios, quiet test, memory, share of the gemm peak."""
    from minidsv3 import TrainConfig
    from minidsv3.train.machine import environment

    cfg = TrainConfig.preset(preset)
    entrants = contestants(preset, path, n_threads, kernel, (cfg.batch_size, cfg.seq_len))
    probe = Contestant("probe", build_probe, {"workers": n_threads}, {"OPENBLAS_CORETYPE": kernel, **threads(1)})
    for entrant in [*entrants, probe]:
        entrant.start()
    outcome = contest.contest(entrants, rounds, lambda: probe.work()[2])
    kind = "wall" if n_threads > 1 else "cpu"
    names = [e.name for e in entrants]
    result = {
        "preset": preset,
        "threads": n_threads,
        "blas": probe_blas(kernel),
        "kind": kind,
        "milliseconds": {n: 1e3 * statistics.median(getattr(outcome, kind)[n]) for n in names},
        "ratio": outcome.ratio("minidsv3", "torch", kind),
        "ratio_transformers": outcome.ratio("minidsv3", "transformers", kind),
        "peer_without_mtp_against_transformers": outcome.ratio("torch without MTP", "transformers", kind),
        "machine": outcome.quiet(*MTP, cores=n_threads),
        "peak_bytes": {e.name: e.peak_bytes() for e in entrants},
        "sgemm_gflops": max(outcome.gflops),
        "versions": environment(),
    }
    result["share_of_peak"] = step_gflop(preset) / statistics.median(outcome.wall["minidsv3"]) / max(outcome.gflops)
    for entrant in [*entrants, probe]:
        entrant.stop()
    return result


def build_probe(workers: int) -> Any:
    """The gemm probe: GFLOP/s of `workers` threads."""
    from minidsv3.train.machine import sgemm_gflops

    return lambda: sgemm_gflops(workers, seconds=0.2)


def probe_blas(kernel: str | None) -> str:
    """The core type that OpenBLAS picks under this environment."""
    entrant = Contestant("blas", build_blas, {}, {"OPENBLAS_CORETYPE": kernel})
    entrant.start()
    name = entrant.work()[2]
    entrant.stop()
    return name


def build_blas() -> Any:
    from minidsv3.train.machine import environment

    return lambda: environment()["blas"]


def step_gflop(preset: str) -> float:
    """Gemm GFLOP of a step, forward and backward, causal attention counted half."""
    from minidsv3 import ModelConfig, TrainConfig, Transformer
    from minidsv3.autograd import no_grad, trace

    cfg, model = TrainConfig.preset(preset), Transformer(ModelConfig.preset(preset))
    model.init_weights(np.random.default_rng(0))
    with no_grad(), trace() as records:
        model.loss(*batch(1, cfg.seq_len))
    return 3 * sum(r.flops for r in records) * cfg.batch_size / 1e9


def growth(rounds: int, kernel: str | None) -> dict[str, Any]:
    """Time per token for batches of 4 to 32 sequences, and for 8 to 128 experts at equal active work (1 thread)."""
    blas = {"OPENBLAS_CORETYPE": kernel, **threads(1)}
    variants: dict[str, dict[str, Any]] = {f"batch {b}": {"batch_size": b} for b in (4, 8, 16, 32)}
    variants |= {f"{e} experts": {"model": {"n_routed_experts": e}} for e in (8, 128)}
    entrants = [
        Contestant(name, build_ours, {"preset": "tiny", "workers": 1, "shards": 1, **change}, blas, repeat=3)
        for name, change in variants.items()
    ]
    for entrant in entrants:
        entrant.start()
    outcome = contest.contest(entrants, rounds, lambda: 1.0)
    for entrant in entrants:
        entrant.stop()
    per_token = {n: statistics.median(outcome.cpu[n]) / (128 * variants[n].get("batch_size", 16)) for n in variants}
    batches = [per_token[n] for n in variants if n.startswith("batch")]
    memory = {}
    for recompute in (False, True):
        entrant = Contestant("memory", build_ours, {"preset": "tiny", "workers": 2, "recompute": recompute}, blas)
        entrant.start()
        wall = entrant.work(5)[0]
        memory["recomputed" if recompute else "kept"] = {"peak_bytes": entrant.peak_bytes(), "milliseconds": 1e3 * wall}
        entrant.stop()
    return {
        "activations": memory,
        "microseconds_per_token": {n: 1e6 * s for n, s in per_token.items()},
        "batch_spread": max(batches) / min(batches) - 1,
        "experts_128_against_8": outcome.ratio("128 experts", "8 experts", "cpu"),
    }


def main() -> None:
    """Run the races that were asked for and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", nargs="+", default=["tiny", "small"])
    parser.add_argument("--threads", nargs="+", type=int, default=[2, 1])
    parser.add_argument("--kernel", default="Haswell", help="OPENBLAS_CORETYPE of both sides; 'auto' as installed")
    parser.add_argument("--rounds", type=int, help="default 12 (tiny), 6 (small)")
    parser.add_argument("--growth", action="store_true", help="only the rows on batch size and number of experts")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    kernel = None if args.kernel == "auto" else args.kernel
    if args.growth:
        result = growth(args.rounds or 5, kernel)
        print(json.dumps(result) if args.json else json.dumps(result, indent=2))
        return
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for preset in args.preset:
            path = Path(folder) / preset
            write_model(preset, path)
            worst, name = worst_gradient(path, preset)
            if worst > 1e-4:
                sys.exit(f"gradients differ by {worst:.1e} relative at {name}: the contestants do different work")
            for n in args.threads:
                result = race(preset, path, n, kernel, args.rounds or (6 if preset == "small" else 12))
                results.append(result | {"worst_gradient": worst})
                if not args.json:
                    print(in_words(results[-1]), flush=True)
    if args.json:
        print(json.dumps(results))


def in_words(r: dict[str, Any]) -> str:
    """A race as a few lines of text."""
    machine, ratio = r["machine"], r["ratio"]
    state = "quiet" if machine["quiet"] else "BUSY"
    lines = [
        f"{r['preset']}, {r['threads']} thread(s), {r['kind']} time, {r['blas']} on both sides, machine {state} "
        f"(peer used {machine['peer_cores']:.2f} cores, against itself {machine['peer_against_itself']:.3f}, slowest "
        f"probe {machine['slowest_probe']:.2f} of the best)",
        "  " + ", ".join(f"{name} {ms:.1f} ms" for name, ms in r["milliseconds"].items()),
        f"  minidsv3 / torch {ratio['median']:.3f} (quartiles {ratio['low']:.3f} to {ratio['high']:.3f}, minima "
        f"{ratio['of_minima']:.3f}); / transformers without MTP {r['ratio_transformers']['median']:.3f}; peer without "
        f"MTP / transformers {r['peer_without_mtp_against_transformers']['median']:.3f}",
        f"  {r['share_of_peak']:.0%} of {r['sgemm_gflops']:.0f} GFLOP/s; gradients equal to {r['worst_gradient']:.1e}",
    ]
    peak = r["peak_bytes"]
    if peak["minidsv3"]:
        share = peak["minidsv3"] / peak["torch"]
        lines.append(
            f"  memory of a step: {peak['minidsv3'] / 1e6:.0f} MB, torch {peak['torch'] / 1e6:.0f}: {share:.2f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
