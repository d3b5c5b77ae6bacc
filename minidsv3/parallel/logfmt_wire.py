"""LogFMT-10 on the way back: the experiment of the ISCA'25 paper (section 3.2), as a wire of its own.

Low-latency dispatch in FP8, and a combine of ten bits a number: a sign and the rounded logarithm, four numbers in five
bytes, and the ends of each 1x128 tile's range as two BF16 numbers. A row of 7,168 takes 9,184 bytes, 64 % of BF16.

Not used by DeepSeek-V3: encoding and decoding cost more than the bytes saved. Simplified against DeepEP's kernel,
which leaves tiles with magnitudes of 1 and more in BF16: here every tile is cast.
"""

from __future__ import annotations

import numpy as np

from ..autograd import Array
from ..quant.formats import BF16, from_bf16, to_bf16
from ..quant.logfmt import TILE, LogTiles, logfmt_decode, logfmt_encode
from .wire import FP8, Format, Wire

BITS = 10
_STEPS = 2 ** (BITS - 1) - 2  # from the smallest number of a tile to the largest


def _encode(x: Array) -> Array:
    """uint8 [N, 5 ceil(D / 4) + 4 tiles]: codes, then smallest and largest magnitude of each tile."""
    N, groups, n_tiles = len(x), -(-x.shape[1] // 4), -(-x.shape[1] // TILE)
    x = from_bf16(to_bf16(x))  # the ends of a range are numbers of the tile: they travel exactly
    tiles = logfmt_encode(x, BITS)
    codes = np.pad(tiles.codes, ((0, 0), (0, -x.shape[1] % 4))).reshape(N, groups, 4).astype(np.uint64)
    word = codes[..., 0] | codes[..., 1] << 10 | codes[..., 2] << 20 | codes[..., 3] << 30
    packed = word[..., None].astype("<u8").view(np.uint8)[..., :5]  # 40 of 64 bits
    ends = np.exp(np.stack([tiles.low, tiles.low + _STEPS * tiles.step], axis=-1))  # [N, tiles, 2]
    ends = to_bf16(ends.reshape(N, 2 * n_tiles)).view(np.uint8)
    return np.concatenate([packed.reshape(N, 5 * groups), ends], axis=1)


def _decode(rows: Array, columns: int) -> Array:
    N, groups, n_tiles = len(rows), -(-columns // 4), -(-columns // TILE)
    word = np.zeros((N, groups, 8), dtype=np.uint8)
    word[..., :5] = rows[:, : 5 * groups].reshape(N, groups, 5)
    word = word.view("<u8")[..., 0].astype(np.uint64)
    codes = np.stack([word >> shift & 1023 for shift in (0, 10, 20, 30)], axis=-1).astype(np.uint16)
    codes = codes.reshape(N, 4 * groups)[:, :columns]
    ends = from_bf16(np.ascontiguousarray(rows[:, 5 * groups :]).view(BF16)).astype(np.float64)
    low, high = np.moveaxis(np.log(ends.reshape(N, n_tiles, 2)), -1, 0)
    return logfmt_decode(LogTiles(codes, low, (high - low) / _STEPS, BITS))


LOGFMT10 = Format("logfmt10", _encode, _decode)
LOW_LATENCY_LOGFMT10 = Wire("low-latency-logfmt10", FP8, LOGFMT10, sums_on_the_way=False, direct=True)
