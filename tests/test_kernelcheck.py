"""Kernels of known arithmetic are recognised by their bits."""

import dataclasses

import numpy as np
import pytest

from minidsv3.quant.blockwise import quantize_blocks, quantize_tiles
from minidsv3.quant.formats import BF16, E4M3
from minidsv3.quant.kernelcheck import Dump, published, verdict
from minidsv3.quant.tensorcore import UNITS, deepgemm, fma32, tensorcore_matmul

RNG = np.random.default_rng(0)
A, B = ((RNG.standard_normal((n, 700)) * 9).astype(np.float32).astype(E4M3) for n in (9, 7))
C = (RNG.standard_normal((9, 7)) * 1e4).astype(np.float32)
QA, QB = quantize_tiles(RNG.standard_normal((9, 700))), quantize_blocks(RNG.standard_normal((140, 700)))
HOPPER = UNITS["hopper-fp8"]


def scaled(d):
    return Dump(QA.codes, QB.codes, d, QA.scales, QB.scales)


def folded(fold):
    total = np.zeros((9, 140), dtype=np.float32)
    b_scale = np.repeat(QB.scales, 128, axis=0)[:140]
    for i in range(6):
        k = slice(128 * i, 128 * (i + 1))
        p = tensorcore_matmul(QA.codes[:, k], QB.codes[:, k])
        total = fold(p, QA.scales[:, i, None], b_scale[None, :, i], total)
    return total


@pytest.mark.parametrize("unit, every, name", [
    (HOPPER, None, "Hopper: 13 fraction bits, cut, one chain"), (HOPPER, 128, "Hopper, promotion every 128"),
    (HOPPER, 64, "Hopper, promotion every 64"), (UNITS["ada-fp8"], None, "Ada: steps of 16, one chain"),
    (dataclasses.replace(HOPPER, align="floor"), None, "floor when lined up, one chain"),
    (dataclasses.replace(HOPPER, fraction_bits=14), None, "14 fraction bits, one chain"),
])  # fmt: skip
@pytest.mark.parametrize("c", [None, C])
def test_verdict_recognises_plain_kernels(unit, every, name, c):
    d = tensorcore_matmul(A, B, c, unit=unit, promote_every=every)
    scores = verdict(Dump(A, B, d, c=c))
    assert (scores[0].hypothesis, scores[0].mismatches, scores[0].of) == (name, 0, 63)
    assert scores[1].mismatches > 0


@pytest.mark.parametrize("name, fold", [
    ("fma(sa sb, p, acc)", lambda p, sa, sb, acc: fma32(sa * sb, p, acc)),
    ("fma(p sa, sb, acc)", lambda p, sa, sb, acc: fma32(p * sa, np.broadcast_to(sb, p.shape), acc)),
    ("(sa sb) p + acc", lambda p, sa, sb, acc: (sa * sb) * p + acc),
    ("(p sa) sb + acc", lambda p, sa, sb, acc: (p * sa) * sb + acc),
])  # fmt: skip
def test_verdict_recognises_the_order_of_scaling(name, fold):
    scores = verdict(scaled(folded(fold)))
    assert scores[0].hypothesis.endswith(name) and scores[0].mismatches == 0 < scores[1].mismatches


def test_published_finds_the_first_wrong_bit():
    d = deepgemm(QA.codes, QA.scales, QB.codes, QB.scales)
    assert published(scaled(d)).mismatches == 0
    d.view(np.uint32)[4, 77] ^= 1
    score = published(scaled(d))
    assert (score.mismatches, score.of, score.first, score.got ^ score.expected) == (1, 9 * 140, (4, 77), 1)


def test_bf16_output_is_compared_in_bf16():
    d = deepgemm(QA.codes, QA.scales, QB.codes, QB.scales).astype(BF16)
    assert published(scaled(d)).mismatches == 0


def test_a_part_has_the_scales_of_its_rows():
    part = scaled(np.zeros((9, 140), dtype=np.float32)).part(3, 129)
    part.check()
    assert part.b_scale.shape == (2, 6) and part.a_scale.shape == (3, 6) and part.d.shape == (3, 129)


D = np.zeros((9, 7), dtype=np.float32)


@pytest.mark.parametrize("dump, message", [
    (Dump(A, B, D.T), r"d has shape \(7, 9\), expected \(9, 7\)"), (Dump(A, B[:, :5], D), "b has shape"),
    (Dump(A, B, D.astype(np.float64)), "d is float64"), (Dump(A, B, D, a_scale=np.ones((9, 6))), "come together"),
    (Dump(QA.codes, QB.codes, np.zeros((9, 140), dtype=np.float32), QA.scales, QB.scales, np.zeros((9, 140))), "no c"),
])  # fmt: skip
def test_dump_refuses(dump, message):
    with pytest.raises(ValueError, match=message):
        verdict(dump)
