"""Rotary position embedding, with YaRN, applied to the last `d_r` channels of each head (decoupled RoPE).

Position m turns channel pair j by the angle ``m theta^(-2j/d_r)``. A pair is a complex number, so a rotation is one
complex multiplication; the content channels in front are multiplied by one. Which two channels form a pair is a
convention: neighbours (2j, 2j+1) in the released weights (`interleave`), or (j, j + d_r/2) in the half-split layout.
The two differ by a permutation of channels that is the same for query and key, so scores agree when the weights are
permuted along. Mixing them up does not crash; it trains or decodes wrong.

YaRN (section 4.3; Peng et al. 2023) stretches the slow pairs by `factor`, leaves the fast ones, and blends between
two *correction dimensions*; scores are multiplied by mscale^2, which is invisible at position 0 where there is one key.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..autograd import Array, Function, Tensor
from .shape import require_shape


def yarn_mscale(factor: float, mscale: float) -> float:
    """``0.1 mscale ln(factor) + 1`` (1 for factor <= 1): the square root of YaRN's temperature on scores."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def softmax_scale(qk_head_dim: int, scaling: dict[str, Any] | None) -> float:
    """Factor on attention scores: ``qk_head_dim**-0.5``, times mscale_all_dim's mscale^2 under YaRN."""
    scale = qk_head_dim**-0.5
    if scaling and scaling.get("mscale_all_dim"):
        scale *= yarn_mscale(scaling["factor"], scaling["mscale_all_dim"]) ** 2
    return scale


def rotation_magnitude(scaling: dict[str, Any] | None) -> float:
    """Length of the rotation numbers: mscale / mscale_all_dim where both are given, else YaRN's own mscale."""
    if scaling is None:
        return 1.0
    factor, mscale, all_dim = scaling["factor"], scaling.get("mscale"), scaling.get("mscale_all_dim")
    if mscale and all_dim:
        return yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim)
    return yarn_mscale(factor, 1.0)


def correction_range(d_r: int, theta: float, scaling: dict[str, Any]) -> tuple[int, int]:
    """First and last pair that YaRN blends: those that turn beta_fast and beta_slow times in the original context."""

    def pair_of(turns: float) -> float:
        context = scaling["original_max_position_embeddings"]
        return d_r * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = math.floor(pair_of(scaling.get("beta_fast", 32)))
    high = math.ceil(pair_of(scaling.get("beta_slow", 1)))
    return max(low, 0), min(high, d_r - 1)


def rope_frequencies(d_r: int, theta: float, scaling: dict[str, Any] | None = None) -> Array:
    """Angle per position of each channel pair, float64 [d_r / 2] (radians)."""
    frequencies = theta ** (-np.arange(0, d_r, 2, dtype=np.float64) / d_r)
    if scaling is None:
        return frequencies
    low, high = correction_range(d_r, theta, scaling)
    pair = np.arange(d_r // 2, dtype=np.float64)
    stretched = np.clip((pair - low) / max(high - low, 0.001), 0, 1)  # 0: as trained, 1: stretched by factor
    return frequencies * (1 - stretched) + frequencies / scaling["factor"] * stretched


def rotation_table(positions: Array, d_r: int, theta: float, scaling: dict[str, Any] | None, dtype: Any) -> Array:
    """Rotation of positions [...] and each pair: complex [..., d_r / 2], complex64 for float32 (angles in float64)."""
    angles = np.asarray(positions, dtype=np.float64)[..., None] * rope_frequencies(d_r, theta, scaling)
    table = rotation_magnitude(scaling) * np.exp(1j * angles)
    return table.astype(np.complex128 if np.dtype(dtype) == np.float64 else np.complex64)


class RopeFunction(Function):
    """Rotate the last d_r channels of every head: x [B, S, H, d] -> [B, S, H, d].

    `rotation` is complex [S, d_r/2], or [B, S, d_r/2] where sequences stand at different positions.
    """

    def forward(self, x: Array, *, rotation: Array, interleave: bool = True) -> Array:
        require_shape("RoPE", "x", x, (None if rotation.ndim == 2 else len(rotation), rotation.shape[-2], None, None))
        if 2 * rotation.shape[-1] > x.shape[3]:
            raise ValueError(f"RoPE: rotation of {2 * rotation.shape[-1]} channels exceeds the head's {x.shape[3]}")
        if rotation.real.dtype != x.dtype:
            raise ValueError(f"RoPE: rotation is {rotation.dtype}, x is {x.dtype}: make the table for x's dtype")
        self._rotation, self._interleave = rotation, interleave
        return _rotate(x, rotation, interleave)

    def backward(self, dy: Array) -> Array:
        return _rotate(dy, self._rotation.conj(), self._interleave)  # the transpose of a rotation turns back


def _rotate(x: Array, rotation: Array, interleave: bool) -> Array:
    B, S, H, d = x.shape
    d_n, half = d - 2 * rotation.shape[-1], rotation.shape[-1]
    if interleave and d_n % 2 == 0:
        # One complex multiply over whole rows: the inner loop is H*d/2 long instead of d_r/2.
        row = np.ones((*rotation.shape[:-1], H, d // 2), dtype=rotation.dtype)
        row[..., d_n // 2 :] = rotation[..., None, :]
        pairs = np.ascontiguousarray(x).reshape(B, S, H * d).view(rotation.dtype)
        return (pairs * row.reshape(*rotation.shape[:-1], -1)).view(x.dtype).reshape(x.shape)
    if interleave:
        first, second = slice(d_n, d, 2), slice(d_n + 1, d, 2)
    else:
        first, second = slice(d_n, d_n + half), slice(d_n + half, d)
    cos, sin = rotation.real[..., None, :], rotation.imag[..., None, :]  # [.., S, 1, d_r/2]
    y = x.copy()
    y[..., first] = x[..., first] * cos - x[..., second] * sin
    y[..., second] = x[..., second] * cos + x[..., first] * sin
    return y


def rope(x: Tensor, rotation: Array, interleave: bool = True) -> Tensor:
    """Rotate the last channels of every head of x [B, S, H, d] by its position."""
    return RopeFunction.apply(x, rotation=rotation, interleave=interleave)
