"""What a row looks like on a link: number formats of dispatch and combine, and the protocols made of them.

* `EXACT`: rows as they are, in the dtype of the model. Expert rows come back one by one, and the source sums them in
  the order of a local dispatcher: equal to it to the bit.
* `NORMAL`: the kernels that training and prefill use. Dispatch in E4M3 with one float32 scale a 1x128 tile (V3 report,
  section 3.2.2): 7,392 bytes for a row of 7,168, where BF16 takes 14,336. The experts of a rank are weighted and summed
  there, the ranks of a node on the node, the nodes at the source: three sums, each rounded to BF16.
* `LOW_LATENCY`: decoding. One message for each token and expert, header, codes and scales together, straight to the
  expert's rank; rows come back in BF16 and the source weights and sums them in float32.

Gradients travel alike: the backward of a dispatch is a combine, and the reverse.

Simplified against the real system: the experts' outputs are not rounded before their rank's sum; a low-latency sum
stays float32 at the source; magnitudes below the smallest scale follow `quant.blockwise`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ..autograd import Array
from ..quant.blockwise import BLOCK, dequantize, quantize_tiles
from ..quant.formats import E4M3, from_bf16, to_bf16


class Format(NamedTuple):
    """How rows [N, D] are sent."""

    name: str
    encode: Callable[[Array], Array]  # [N, D] -> [N, ...] in the dtype that travels
    decode: Callable[[Array, int], Array]  # (what travelled, D) -> [N, D]


class Wire(NamedTuple):
    """A protocol: formats of both ways, where sums are taken, and the kind of route."""

    name: str
    dispatch: Format
    combine: Format
    sums_on_the_way: bool  # weights applied and sums taken at ranks and nodes, else all at the source
    direct: bool  # one message for each token and expert


def _encode_fp8(x: Array) -> Array:
    """Codes and scales of each row side by side: uint8 [N, D + 4 ceil(D / 128)]."""
    if not len(x):
        return np.empty((0, x.shape[1] + 4 * -(-x.shape[1] // BLOCK)), dtype=np.uint8)
    codes, scales = quantize_tiles(x)
    return np.concatenate([codes.view(np.uint8), np.ascontiguousarray(scales).view(np.uint8)], axis=1)


def _decode_fp8(rows: Array, columns: int) -> Array:
    codes = np.ascontiguousarray(rows[:, :columns]).view(E4M3)
    scales = np.ascontiguousarray(rows[:, columns:]).view(np.float32)
    return dequantize(codes, scales, rows=1)


RAW = Format("as it is", lambda x: x, lambda x, columns: x)
FP8 = Format("fp8", _encode_fp8, _decode_fp8)
BF16_ROWS = Format("bf16", to_bf16, lambda x, columns: from_bf16(x))

EXACT = Wire("exact", RAW, RAW, sums_on_the_way=False, direct=False)
NORMAL = Wire("normal", FP8, BF16_ROWS, sums_on_the_way=True, direct=False)
LOW_LATENCY = Wire("low-latency", FP8, BF16_ROWS, sums_on_the_way=False, direct=True)
WIRES = {wire.name: wire for wire in (EXACT, NORMAL, LOW_LATENCY)}
