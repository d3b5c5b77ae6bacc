"""Decoding side by side: microseconds a token, minidsv3 against PyTorch eager, the same weights and greedy tokens.

    python tests/benchmarks/bench_decode.py --preset tiny --tokens 256 [--json]        (extra: parity)

Each contestant lives in a process of its own and they take turns; PyTorch runs with one and with two threads, and the
faster counts. The ratio is the median over the rounds of ours / theirs. Not a test: it prints, it does not fail.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
CONTESTANTS = ("minidsv3", "torch, 1 thread", "torch, 2 threads")


def contestant(name: str, folder: Path, tokens: int, pipe) -> None:
    """Serve rounds: each message is answered with (seconds, greedy tokens)."""
    if name == "minidsv3":
        import numpy as np
        from threadpoolctl import threadpool_limits

        from minidsv3 import LatentCache, load_pretrained

        threadpool_limits(1)
        model = load_pretrained(folder, mtp=False)

        def decode() -> list[int]:
            cache, out = LatentCache(model.config, 1), [0]
            for _ in range(tokens):
                logits = model.head(model.decode(np.array([[out[-1]]]), cache))[0, 0]
                cache.extend(1)
                out.append(int(logits.argmax()))
            return out
    else:
        import torch
        from torch_decode import TorchDecoder

        torch.set_num_threads(int(name.split()[1]))
        peer = TorchDecoder(folder, tokens + 1)

        def decode() -> list[int]:
            out = [0]
            for at in range(tokens):
                out.append(int(peer.step(out[-1], at).argmax()))
            return out

    decode()
    while pipe.recv():
        start = time.perf_counter()
        out = decode()
        pipe.send((time.perf_counter() - start, out))


def main() -> None:
    """Run the rounds and print the ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    import numpy as np
    from threadpoolctl import threadpool_info

    from minidsv3 import ModelConfig, Transformer, save_pretrained

    model = Transformer(ModelConfig.preset(args.preset))
    model.init_weights(np.random.default_rng(0), std=0.05)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, Path(folder) / "model")
        pipes = {}
        for name in CONTESTANTS:
            ours, theirs = context.Pipe()
            context.Process(
                target=contestant, args=(name, Path(folder) / "model", args.tokens, theirs), daemon=True
            ).start()
            pipes[name] = ours
        seconds, tokens = {name: [] for name in CONTESTANTS}, {}
        for _ in range(args.rounds):
            for name, pipe in pipes.items():
                pipe.send(True)
                spent, tokens[name] = pipe.recv()
                seconds[name].append(spent)
        for pipe in pipes.values():
            pipe.send(False)
    ratios = [ours / min(a, b) for ours, a, b in zip(*(seconds[name] for name in CONTESTANTS))]
    quartiles = statistics.quantiles(ratios, n=4)
    result = {
        "preset": args.preset,
        "tokens": args.tokens,
        "microseconds_per_token": {n: statistics.median(s) / args.tokens * 1e6 for n, s in seconds.items()},
        "ratio": statistics.median(ratios),
        "quartiles": [quartiles[0], quartiles[2]],
        "same_greedy_tokens": len({tuple(t) for t in tokens.values()}) == 1,
        "blas": [f"{i['internal_api']} {i.get('architecture')}" for i in threadpool_info()],
    }
    if args.json:
        print(json.dumps(result))
        return
    for name, value in result["microseconds_per_token"].items():
        print(f"{name:18} {value:8.0f} us a token")
    print(f"ratio minidsv3 / PyTorch: {result['ratio']:.2f} (quartiles {quartiles[0]:.2f}, {quartiles[2]:.2f})")
    print(f"same greedy tokens: {result['same_greedy_tokens']}; BLAS: {result['blas']}")


if __name__ == "__main__":
    main()
