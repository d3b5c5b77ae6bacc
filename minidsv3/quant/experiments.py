"""What FP8 costs and where, measured with the emulated tensor core: numbers for `quant.figures`.

    accumulation_error   what is lost over a long K, with and without promotion
    interval_prices      the same against what promotion and scales cost, for intervals of 32 to K
    tile_against_block   quantisation error of 1x128 tiles beside 128x128 blocks

Errors of a sum are against the exact sum of the *same* FP8 operands (float64 holds it). For numbers of both signs the
error of single elements means nothing near zero, so it is divided by the mean magnitude of all outputs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .blockwise import BLOCK, dequantize, quantize_blocks, quantize_tiles, quantized
from .formats import E4M3, encode
from .tensorcore import fma32, tensorcore_matmul

DISTRIBUTIONS = ("N(0,1)", "U(-1,1)", "U(0,1)")


def draw(distribution: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """E4M3 codes of random numbers, unscaled."""
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution={distribution!r} is not one of {', '.join(DISTRIBUTIONS)}")
    if distribution == "N(0,1)":
        return encode(rng.standard_normal(shape, dtype=np.float32), E4M3)
    return encode(rng.uniform(-1.0 if distribution == "U(-1,1)" else 0.0, 1.0, shape).astype(np.float32), E4M3)


def accumulation_error(
    distribution: str, K: int, *, promote_every: int | None = None, size: int = 512, seed: int = 0
) -> float:
    """Largest error of ``size`` x ``size`` outputs over their mean magnitude."""
    rng = np.random.default_rng(seed)
    a, b = draw(distribution, (size, K), rng), draw(distribution, (size, K), rng)
    exact = a.astype(np.float64) @ b.astype(np.float64).T
    got = tensorcore_matmul(a, b, promote_every=promote_every)
    return float(np.abs(got - exact).max() / np.abs(exact).mean())


class Price(NamedTuple):
    """One interval N_C: a scale and a promotion every so many products."""

    interval: int
    accumulation_error: float  # max over mean magnitude, against the same FP8 operands summed exactly
    quantisation_error: float  # relative rms, against the operands before quantisation
    promotions: float  # FP32 fused multiply-adds on CUDA cores for each 1,000 products on tensor cores
    scale_bytes: float  # bytes of scales for each 1,000 bytes of codes


def interval_prices(intervals: tuple[int, ...], *, K: int = 4096, size: int = 256, seed: int = 0) -> list[Price]:
    """Prices of tiles of 1 x interval on one side and blocks of interval x interval on the other.

    The numbers are normal with channels of different size (a few a hundred times the others), as activations have.
    """
    rng = np.random.default_rng(seed)
    channel = np.exp(rng.standard_normal(K) * 1.2).astype(np.float32)
    x = rng.standard_normal((size, K), dtype=np.float32) * channel
    w = rng.standard_normal((size, K), dtype=np.float32)
    exact = x.astype(np.float64) @ w.astype(np.float64).T
    prices = []
    for interval in intervals:
        qx, qw = quantized(x, 1, interval, "fp32"), quantized(w, interval, interval, "fp32")
        w_scales = np.repeat(qw.scales, interval, axis=0)[:size]
        operands = dequantize(*qx, 1, interval), dequantize(*qw, interval, interval)
        total, summed = np.zeros((size, size), dtype=np.float32), operands[0].astype(np.float64) @ operands[1].T
        for i, k in enumerate(range(0, K, interval)):
            partial = tensorcore_matmul(qx.codes[:, k : k + interval], qw.codes[:, k : k + interval])
            total = fma32(qx.scales[:, i, None] * w_scales[None, :, i], partial, total)
        prices.append(
            Price(
                interval,
                float(np.abs(total - summed).max() / np.abs(summed).mean()),
                float(np.sqrt(np.mean((summed - exact) ** 2) / np.mean(exact**2))),
                1000 / interval,
                1000 * 4 * (qx.scales.size / qx.codes.size + 1 / interval**2),
            )
        )
    return prices


def tile_against_block(x: np.ndarray) -> tuple[float, float]:
    """Relative rms error of x [N, K] in 1x128 tiles, and in 128x128 blocks."""
    size = np.sqrt(np.mean(np.square(x, dtype=np.float64)))
    if size == 0:
        return 0.0, 0.0
    pairs = dequantize(*quantize_tiles(x), 1, BLOCK), dequantize(*quantize_blocks(x))
    tile, block = (float(np.sqrt(np.mean(np.square(q - x, dtype=np.float64))) / size) for q in pairs)
    return tile, block
