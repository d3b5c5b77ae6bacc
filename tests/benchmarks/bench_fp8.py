"""FP8 in ratios, all in one run: the exact accumulator against sgemm, rounding and codes against PyTorch's casts.

    OPENBLAS_CORETYPE=Haswell python tests/benchmarks/bench_fp8.py [--json]          (extra: parity)

One thread for everything; the minimum of many repetitions, contestants in turn. Not a test: it prints, and marks a
ratio that misses its goal. Sgemm is measured under the BLAS kernel that the environment asks for, and the ratio
depends on it: say which. Codes per second count elements.
"""

import argparse
import json
import os
import timeit

os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from threadpoolctl import threadpool_info

from minidsv3 import ModelConfig, TrainConfig, Transformer
from minidsv3.quant.blockwise import dequantize, quantize_blocks, quantize_tiles
from minidsv3.quant.formats import decode, encode, round_to
from minidsv3.quant.product import scaled_product
from minidsv3.quant.recipe import recipe_for
from minidsv3.quant.tensorcore import deepgemm, tensorcore_matmul
from minidsv3.train.machine import keep_freed_memory
from minidsv3.train.optim import AdamW, FlatParameters
from minidsv3.train.step import cut, train_step

RNG = np.random.default_rng(0)


def fastest(functions, repeat=15, number=1):
    """Seconds of each function, minimum over rounds in which they take turns."""
    for function in functions:
        function()
    rounds = [[timeit.timeit(f, number=number) / number for f in functions] for _ in range(repeat)]
    return [min(column) for column in zip(*rounds)]


def exact_against_sgemm(M, N, K):
    x, w = RNG.standard_normal((M, K), dtype=np.float32), RNG.standard_normal((N, K), dtype=np.float32)
    qx, qw = quantize_tiles(x), quantize_blocks(w)
    seconds = fastest([
        lambda: x @ w.T, lambda: tensorcore_matmul(qx.codes, qw.codes),
        lambda: tensorcore_matmul(qx.codes, qw.codes, promote_every=128),
        lambda: deepgemm(qx.codes, qx.scales, qw.codes, qw.scales),
    ])  # fmt: skip
    return [seconds[i] / seconds[0] for i in (1, 2, 3)]


def torch_tiles(x):
    """DeepSeek's cast: scales of 1x128 tiles and codes."""
    parts = x.view(x.shape[0], -1, 128)
    scales = parts.abs().amax(dim=2).clamp(1e-4) / 448
    return (parts / scales[:, :, None]).to(torch.float8_e4m3fn), scales


def casts(size):
    x = RNG.standard_normal((size, size), dtype=np.float32)
    t, out, q = torch.from_numpy(x), np.empty_like(x), quantize_tiles(x)
    codes = t.to(torch.float8_e4m3fn)
    scales = torch.from_numpy(q.scales)

    def torch_dequantize():
        return (codes.to(torch.float32).view(size, -1, 128) * scales[:, :, None]).view(size, size)

    rounding, there_and_back = fastest(
        [lambda: round_to(x, "e4m3", out=out), lambda: t.to(torch.float8_e4m3fn).to(torch.float32)]
    )
    tiles, theirs, bare = fastest(
        [lambda: quantize_tiles(x), lambda: torch_tiles(t), lambda: t.to(torch.float8_e4m3fn)]
    )
    ours, decoding = fastest([lambda: decode(q.codes), lambda: codes.to(torch.float32)])
    scaled, torch_scaled = fastest([lambda: dequantize(*q, 1, 128), torch_dequantize])
    encoding, cast = fastest([lambda: encode(x, "e4m3"), lambda: t.to(torch.float8_e4m3fn)])
    return {
        "value rounding, x torch there and back": (there_and_back / rounding, 2.0),
        "tiles with scales, x torch's": (theirs / tiles, 0.5),
        "tiles with scales, x torch's bare cast": (bare / tiles, None),
        "codes alone, x torch's bare cast": (cast / encoding, None),
        "decoding, x torch": (decoding / ours, 3.0),
        "dequantising with scales, x torch": (torch_scaled / scaled, 3.0),
    }


def fast_gemm(size=512):
    x, w = RNG.standard_normal((size, size), dtype=np.float32), RNG.standard_normal((size, size), dtype=np.float32)
    sgemm, fp8 = fastest([lambda: x @ w.T, lambda: scaled_product(quantize_tiles(x), quantize_blocks(w))])
    return fp8 / sgemm


def training_steps():
    """Seconds a step of `tiny` in each precision, turn by turn, one thread."""
    steps = {}
    for precision in ("fp32", "bf16", "fp8"):
        cfg = TrainConfig.preset("tiny")
        model = Transformer(ModelConfig.preset("tiny"), recipe_for(precision))
        model.init_weights(np.random.default_rng(0))
        flat = FlatParameters(model)
        state = model, AdamW(flat, cfg), [flat.new_gradient() for _ in range(cfg.shards)]
        tokens = np.random.default_rng(1).integers(0, 257, (cfg.batch_size, cfg.seq_len + 1))
        shards = cut(tokens[:, :-1], tokens[:, 1:], cfg.shards)
        steps[precision] = lambda state=state, shards=shards, cfg=cfg: train_step(*state, shards, cfg, 1)
    return dict(zip(steps, fastest(list(steps.values()), repeat=8)))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    results = {}  # name -> (ratio, goal, whether more is better)
    for M, N, K in ((256, 256, 512), (1024, 1024, 256)):
        names = ("one chain", "promotion every 128", "deepgemm")
        for name, ratio in zip(names, exact_against_sgemm(M, N, K)):
            results[f"exact {M}x{N}x{K}, {name}, x sgemm"] = (ratio, 45.0, False)
    for size in (512, 2048):
        results |= {f"{name} ({size}^2)": (ratio, goal, True) for name, (ratio, goal) in casts(size).items()}
    results["FP8-fast gemm with both quantisations 512^3, x sgemm"] = (fast_gemm(), 2.0, False)
    seconds = training_steps()
    results["FP8-fast step of tiny, x FP32"] = (seconds["fp8"] / seconds["fp32"], 2.0, False)
    results["BF16 step of tiny, x FP32"] = (seconds["bf16"] / seconds["fp32"], None, False)
    blas = [f"{i['internal_api']} {i.get('architecture')}" for i in threadpool_info() if i["user_api"] == "blas"]
    if args.json:
        print(json.dumps({"blas": blas, "ratios": {name: ratio for name, (ratio, _, _) in results.items()}}))
        return
    print(f"BLAS: {', '.join(blas)}; one thread")
    for name, (ratio, goal, more_is_better) in results.items():
        met = goal is None or (ratio >= goal if more_is_better else ratio <= goal)
        wanted = (
            "" if goal is None else f"   goal {'>=' if more_is_better else '<='} {goal:g}{'' if met else '  MISSED'}"
        )
        print(f"{name:62} {ratio:6.2f}{wanted}")


if __name__ == "__main__":
    main()
