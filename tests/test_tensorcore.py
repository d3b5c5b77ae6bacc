"""Emulated tensor cores: golden vectors of MMA-Sim, and a model in whole numbers that knows only the six rules."""

import dataclasses
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minidsv3.quant.blockwise import quantize_blocks, quantize_tiles
from minidsv3.quant.formats import BF16, E4M3, E5M2, FP16
from minidsv3.quant.tensorcore import UNITS, deepgemm, fma32, tensorcore_matmul, tiled_matmul

# hopper_fp8.npz: outputs of microsoft/MMA-Sim@c785138 (MIT), wgmma m64nNk32 of "Hopper", run on a CPU; see the .json
GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "hopper_fp8.json").read_text(encoding="utf-8"))["cases"]
SINGLE = [case for case in CASES if "out" in case]

# --- the slow way, in integers ----------------------------------------------------------------------------------------

LAYOUT = {E4M3: (4, 3, 7), E5M2: (5, 2, 15), BF16: (8, 7, 127), FP16: (5, 10, 15), np.dtype(np.float32): (8, 23, 127)}


def fields(bits, dtype):
    """(integer significand, exponent of its unit, exponent of the number) from the bits alone; None if not finite."""
    E, m, bias = LAYOUT[dtype]
    sign, field, fraction = -1 if bits >> (E + m) & 1 else 1, bits >> m & (2**E - 1), bits & (2**m - 1)
    if field == 2**E - 1 and (dtype != E4M3 or fraction == 7):
        return None
    e = max(field, 1) - bias
    return sign * (fraction + (2**m if field else 0)), e - m, e


def toward_zero(numerator, shift):
    """trunc(numerator * 2^shift)."""
    magnitude = abs(numerator) << shift if shift >= 0 else abs(numerator) >> -shift
    return magnitude if numerator >= 0 else -magnitude


def one_step(a, b, c, unit, a_dtype, b_dtype):
    """One fused step over lists of bits, finite numbers only; c as a Fraction with its exponent's floor; a Fraction."""
    F, (_, m, bias) = unit.fraction_bits, LAYOUT[unit.accumulator]
    addends = []  # integer, exponent of its unit, exponent
    for x, y in zip(a, b):
        (s, u, e), (t, v, f) = fields(x, a_dtype), fields(y, b_dtype)
        if s and t:
            addends.append((s * t, u + v, e + f))
    if c:
        e = max(floor_log2(abs(c)), 1 - bias)
        unit_exponent = 1 - bias - m
        addends.append((int(c / Fraction(2) ** unit_exponent), unit_exponent, e))
    if not addends:
        return Fraction(0)
    largest = max(e for _, _, e in addends)
    total = sum(toward_zero(s, u + F - largest) for s, u, _ in addends) * Fraction(2) ** (largest - F)
    return rounded(total, unit.output)


def floor_log2(x):
    e = x.numerator.bit_length() - x.denominator.bit_length()
    return e if Fraction(2) ** e <= x else e - 1


def rounded(x, output):
    """A Fraction in the output format, as a Fraction."""
    if not x:
        return x
    bits, smallest = {"rz13": (13, -126), "rz23": (23, -126), "rne16": (10, -14)}[output]
    step = Fraction(2) ** (max(floor_log2(abs(x)), smallest) - bits)
    whole, rest = divmod(abs(x), step)
    if output == "rne16" and (rest * 2 > step or (rest * 2 == step and whole % 2)):
        whole += 1
    return whole * step if x > 0 else -whole * step


def as_number(x, dtype):
    """The Fraction as a number of the accumulator's type; overflow is infinity."""
    largest = Fraction(float(np.finfo(dtype).max))
    return dtype.type(np.inf if x > largest else -np.inf if x < -largest else float(x))


def slow_matmul(a, b, c, name):
    """`tensorcore_matmul` one output after the other; nothing may overflow on the way."""
    unit = UNITS[name]
    pad = -a.shape[1] % unit.step
    widths = {1: np.uint8, 2: np.uint16}
    x, y = (np.pad(m.view(widths[m.dtype.itemsize]), ((0, 0), (0, pad))).tolist() for m in (a, b))
    out = np.empty((len(a), len(b)), dtype=unit.accumulator)
    for i, j in np.ndindex(*out.shape):
        d = Fraction(float(c[i, j])) if c is not None else Fraction(0)
        for k in range(0, a.shape[1] + pad, unit.step):
            d = one_step(x[i][k : k + unit.step], y[j][k : k + unit.step], d, unit, a.dtype, b.dtype)
        out[i, j] = as_number(d, unit.accumulator)
    return out


def bits_of(x):
    return np.ascontiguousarray(x).view({2: np.uint16, 4: np.uint32}[x.dtype.itemsize])


def assert_same_bits(got, want):
    assert got.dtype == want.dtype and got.shape == want.shape
    wrong = np.argwhere(bits_of(got) != bits_of(want))
    assert not len(wrong), (
        f"{len(wrong)} differ, first at {wrong[0]}: {got[tuple(wrong[0])]!r} {want[tuple(wrong[0])]!r}"
    )


def finite_codes(rng, shape, dtype):
    """Every finite bit pattern equally likely: exponents mixed as widely as they get."""
    width = np.uint8 if dtype.itemsize == 1 else np.uint16
    codes = rng.integers(0, np.iinfo(width).max, shape, dtype=width, endpoint=True)
    while (bad := ~np.isfinite(codes.view(dtype).astype(np.float32))).any():
        codes[bad] = rng.integers(0, np.iinfo(width).max, int(bad.sum()), dtype=width, endpoint=True)
    return codes.view(dtype)


def normal(rng, shape, dtype, scale=1.0):
    return (rng.standard_normal(shape) * scale).astype(np.float32).astype(dtype)


# --- golden vectors ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "hopper_fp8.npz") as data:
        return dict(data)


@pytest.mark.parametrize("case", SINGLE, ids=lambda case: case["name"])
def test_hopper_fp8_equals_mma_sim(golden, case):
    name, half = case["name"], case["out"] == "f16"
    a, b = golden[f"{name}.a"].view(E4M3), golden[f"{name}.b"].view(E4M3).T
    c = golden[f"{name}.c"].view(np.float16 if half else np.float32)
    d = tensorcore_matmul(a, b, c, unit="hopper-fp8-f16" if half else "hopper-fp8")
    assert bits_of(d).tolist() == golden[f"{name}.d"].tolist()


def test_golden_vectors_are_all_there():
    assert len(CASES) == 22 and len(SINGLE) == 21 and sum(case["out"] == "f16" for case in SINGLE) == 3


@pytest.fixture(scope="module")
def gemm_case(golden):
    def part(key):
        return golden[f"deepgemm_m64n136k512.{key}"]

    return {
        "a": part("a").view(E4M3), "b": part("b_nk").view(E4M3), "sa": part("sa").view(np.float32),
        "sb": part("sb").view(np.float32), "partials": part("partials"), "final": part("final"),
        "final_bf16": part("final_bf16"),
    }  # fmt: skip


def test_deepgemm_equals_mma_sim(gemm_case):
    final = deepgemm(gemm_case["a"], gemm_case["sa"], gemm_case["b"], gemm_case["sb"])
    assert bits_of(final).tolist() == gemm_case["final"].view(np.uint32).tolist()
    assert final.astype(BF16).view(np.uint16).tolist() == gemm_case["final_bf16"].view(np.uint16).tolist()


def test_deepgemm_partials_are_chains_of_four(gemm_case):
    partials = gemm_case["partials"].view(np.uint32)
    for i in range(4):
        k = slice(128 * i, 128 * (i + 1))
        assert bits_of(tensorcore_matmul(gemm_case["a"][:, k], gemm_case["b"][:, k])).tolist() == partials[i].tolist()


# --- against whole numbers --------------------------------------------------------------------------------------------

PAIRS = [
    ("hopper-fp8", E4M3, E4M3), ("hopper-fp8", E5M2, E5M2), ("hopper-fp8", E4M3, E5M2), ("hopper-fp8", E5M2, E4M3),
    ("hopper-fp8-f16", E4M3, E4M3), ("ada-fp8", E4M3, E5M2), ("ada-fp8-f16", E4M3, E4M3), ("blackwell-fp8", E4M3, E4M3),
    ("blackwell-fp8", E5M2, E4M3), ("hopper-bf16", BF16, BF16), ("hopper-bf16", FP16, FP16),
    ("ampere-bf16", BF16, BF16), ("ampere-bf16", FP16, FP16),
]  # fmt: skip


@pytest.mark.parametrize("K", [1, 31, 32, 75])
@pytest.mark.parametrize("unit, a_dtype, b_dtype", PAIRS)
def test_unit_equals_the_rules_in_integers(unit, a_dtype, b_dtype, K):
    rng = np.random.default_rng(K)
    # numbers near 1, so that float16 accumulators do not overflow; all bit patterns where the accumulator holds them
    make = finite_codes if unit == "hopper-fp8" or unit.startswith("bl") else normal
    a, b = make(rng, (3, K), a_dtype), make(rng, (4, K), b_dtype)
    c = (rng.standard_normal((3, 4)) * 30).astype(UNITS[unit].accumulator)
    for start in (None, c):
        assert_same_bits(tensorcore_matmul(a, b, start, unit=unit), slow_matmul(a, b, start, unit))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_hopper_step_equals_the_rules_for_any_bits(data):
    """One row, one column, any finite operands and any finite C."""
    K = data.draw(st.integers(1, 70))
    dtypes = [data.draw(st.sampled_from([E4M3, E5M2])) for _ in "ab"]
    a, b = (
        np.array(data.draw(st.lists(st.integers(0, 255), min_size=K, max_size=K)), dtype=np.uint8).view(d)[None]
        for d in dtypes
    )
    for x in (a, b):
        x[~np.isfinite(x.astype(np.float32))] = 0
    c = np.array([[data.draw(st.floats(width=32, allow_nan=False, allow_infinity=False))]], dtype=np.float32)
    assert_same_bits(tensorcore_matmul(a, b, c), slow_matmul(a, b, c, "hopper-fp8"))


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_hopper_fast_path_equals_the_table(dtype):
    """More outputs than integers allow: the slow reading of the table, which is checked above, on 20 seeds."""
    other_way = dataclasses.replace(UNITS["hopper-fp8"], operands=(E4M3, E5M2, BF16))  # not the fast path's unit
    for seed in range(20):
        rng = np.random.default_rng(seed)
        a = (finite_codes if seed % 2 else normal)(rng, (37, 161), dtype)
        b = (finite_codes if seed % 3 else normal)(rng, (53, 161), E4M3)
        c = None if seed % 4 == 0 else np.exp2(rng.uniform(-140, 20, (37, 53))).astype(np.float32)
        if c is not None:
            a[5], c[6] = 0, -c[6]  # outputs without any product
        assert_same_bits(tensorcore_matmul(a, b, c), tensorcore_matmul(a, b, c, unit=other_way))


def test_hopper_blocks_of_outputs_do_not_matter():
    rng = np.random.default_rng(3)
    a, b = normal(rng, (300, 40), E4M3, 9), normal(rng, (520, 40), E4M3, 9)
    whole = tensorcore_matmul(a, b)
    assert_same_bits(whole[250:, 200:300], tensorcore_matmul(a[250:], b[200:300]))


def test_k_of_7168_that_is_no_multiple_of_32():
    rng = np.random.default_rng(4)
    a, b = normal(rng, (2, 7168 - 5), E4M3, 20), normal(rng, (3, 7168 - 5), E4M3, 20)
    assert_same_bits(tensorcore_matmul(a, b), slow_matmul(a, b, None, "hopper-fp8"))


def test_any_strides_give_the_same_bits():
    rng = np.random.default_rng(5)
    a, b = normal(rng, (64, 96), E4M3), normal(rng, (96, 40), E4M3)
    want = tensorcore_matmul(a[::2, ::-1].copy(), b.T[::2, ::-1].copy())
    assert_same_bits(tensorcore_matmul(a[::2, ::-1], b.T[::2, ::-1]), want)


def test_order_inside_a_step_is_irrelevant():
    rng = np.random.default_rng(6)
    a, b, order = finite_codes(rng, (5, 32), E4M3), finite_codes(rng, (7, 32), E4M3), rng.permutation(32)
    assert_same_bits(tensorcore_matmul(a, b), tensorcore_matmul(a[:, order], b[:, order]))


# --- promotion, scaling -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit, every, K", [("hopper-fp8", 64, 200), ("ada-fp8", 16, 100), ("hopper-bf16", 48, 100)])
def test_promote_every_adds_partials_in_float32(unit, every, K):
    rng = np.random.default_rng(7)
    dtype = BF16 if "bf16" in unit else E4M3
    a, b, c = normal(rng, (3, K), dtype), normal(rng, (5, K), dtype), rng.standard_normal((3, 5)).astype(np.float32)
    want = c.copy()
    for k in range(0, K, every):
        want = want + slow_matmul(a[:, k : k + every], b[:, k : k + every], None, unit)
    assert_same_bits(tensorcore_matmul(a, b, c, unit=unit, promote_every=every), want)


def test_promotion_with_a_float16_accumulator_ends_in_float16():
    rng = np.random.default_rng(8)
    a, b = normal(rng, (3, 70), E4M3), normal(rng, (5, 70), E4M3)
    parts = [
        slow_matmul(a[:, k : k + 32], b[:, k : k + 32], None, "hopper-fp8-f16").astype(np.float32) for k in (0, 32, 64)
    ]
    got = tensorcore_matmul(a, b, unit="hopper-fp8-f16", promote_every=32)
    assert_same_bits(got, ((parts[0] + parts[1]) + parts[2]).astype(np.float16))


def exact_fma(x, y, z):
    """One rounding to float32 of the exact value: compare with every neighbour in fractions."""
    exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
    near = np.float32(float(exact))  # rounded twice: may be off by one
    candidates = [near, np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(-np.inf))]
    return min(candidates, key=lambda v: (abs(Fraction(float(v)) - exact), int(np.float32(v).view(np.uint32)) & 1))


@settings(max_examples=300, deadline=None)
@given(*[st.floats(min_value=-(2.0**50), max_value=2.0**50, width=32) for _ in "xyz"])
def test_fma32_rounds_once(x, y, z):
    got = fma32(*(np.array([v], dtype=np.float32) for v in (x, y, z)))[0]
    assert got == exact_fma(x, y, z)


def test_fma32_where_two_roundings_differ():
    """x y = 2^-24 (1 - 2^-30) takes z = 1 + 2^-23 to just below a tie; float64 sees the tie, which goes up to even."""
    x, y, z = (np.array([v], dtype=np.float32) for v in (1 + 2.0**-15, (1 - 2.0**-15) * 2.0**-24, 1 + 2.0**-23))
    twice = (x.astype(np.float64) * y.astype(np.float64) + z.astype(np.float64)).astype(np.float32)
    assert twice[0] == np.float32(1 + 2.0**-22)
    assert fma32(x, y, z)[0] == exact_fma(x[0], y[0], z[0]) == np.float32(1 + 2.0**-23)


def deepgemm_in_loops(a, sa, b, sb):
    final = np.zeros((len(a), len(b)), dtype=np.float32)
    for i in range(sa.shape[1]):
        k = slice(128 * i, 128 * (i + 1))
        partial = slow_matmul(a[:, k], b[:, k], None, "hopper-fp8")
        for m, n in np.ndindex(*final.shape):
            final[m, n] = exact_fma(np.float32(sa[m, i] * sb[n // 128, i]), partial[m, n], final[m, n])
    return final


def test_deepgemm_equals_loops_at_sizes_that_fit_no_block():
    rng = np.random.default_rng(9)
    a, b = quantize_tiles(rng.standard_normal((2, 300))), quantize_blocks(rng.standard_normal((130, 300)))
    got = deepgemm(a.codes, a.scales, b.codes, b.scales)
    for n in (0, 5, 127, 128, 129):
        one = deepgemm_in_loops(a.codes, a.scales, b.codes[n : n + 1], b.scales[n // 128 : n // 128 + 1])
        assert_same_bits(got[:, n : n + 1].copy(), one)


def test_tiled_matmul_with_repeated_block_scales_is_deepgemm():
    rng = np.random.default_rng(10)
    a, b = quantize_tiles(rng.standard_normal((5, 200))), quantize_blocks(rng.standard_normal((150, 200)))
    spread = np.repeat(b.scales, 128, axis=0)[:150]
    assert_same_bits(tiled_matmul(a.codes, a.scales, b.codes, spread), deepgemm(a.codes, a.scales, b.codes, b.scales))


# --- corners ----------------------------------------------------------------------------------------------------------

NAN, INF, LARGEST = np.float32(np.nan), np.float32(np.inf), np.finfo(np.float32).max


def one(value, dtype=E4M3):
    return np.array([[value]], dtype=np.float32).astype(dtype)


@pytest.mark.parametrize(
    "unit, bits", [("hopper-fp8", 0x7FFFFFFF), ("hopper-fp8-f16", 0x7FFF), ("hopper-bf16", 0x7FFFFFFF)]
)
def test_nan_is_the_one_nan(unit, bits):
    dtype = BF16 if unit == "hopper-bf16" else E4M3
    for a, b in ((np.nan, 1), (1, np.nan), (np.nan, 0)):
        assert bits_of(tensorcore_matmul(one(a, dtype), one(b, dtype), unit=unit)).tolist() == [[bits]]
    c = np.array([[-np.nan]], dtype=UNITS[unit].accumulator)
    assert bits_of(tensorcore_matmul(one(1, dtype), one(1, dtype), c, unit=unit)).tolist() == [[bits]]


def test_nan_reaches_its_row_and_column_only():
    a, b = np.ones((3, 40), dtype=np.float32).astype(E4M3), np.ones((4, 40), dtype=np.float32).astype(E4M3)
    a[1, 35] = np.nan
    d = tensorcore_matmul(a, b)
    assert np.isnan(d).tolist() == [[False] * 4, [True] * 4, [False] * 4] and (d[[0, 2]] == 40).all()


@pytest.mark.parametrize("a, b, c, want", [
    (np.inf, 1, 0, np.inf), (np.inf, -1, 0, -np.inf), (np.inf, 0, 0, np.nan), (np.inf, 1, -np.inf, np.nan),
    (1, 1, -np.inf, -np.inf), (np.inf, 1, np.inf, np.inf),
])  # fmt: skip
def test_infinity_follows_ieee(a, b, c, want):
    d = tensorcore_matmul(one(a, E5M2), one(b, E5M2), np.array([[c]], dtype=np.float32))
    np.testing.assert_array_equal(d, [[want]])


@pytest.mark.parametrize("c, want", [
    (-0.0, 0x00000000), (LARGEST, 0x7F7FFC00), (-LARGEST, 0xFF7FFC00), (2.0**-126 * 1.2345, None), (1e-40, None),
    (1.2345, None),
])  # fmt: skip
def test_c_without_products_is_cut_to_13_bits(c, want):
    c = np.array([[c]], dtype=np.float32)
    want = int(bits_of(c)[0, 0]) & 0xFFFFFC00 if want is None else want
    for K in (1, 33):
        zeros = np.zeros((1, K), dtype=np.float32).astype(E4M3)
        assert bits_of(tensorcore_matmul(zeros, zeros, c)).tolist() == [[want]]


def test_largest_c_swallows_products():
    a = np.full((1, 32), 448, dtype=np.float32).astype(E4M3)
    assert bits_of(tensorcore_matmul(a, a, np.array([[LARGEST]], dtype=np.float32))).tolist() == [[0x7F7FFC00]]


def test_cancellation_gives_plus_zero():
    a = np.array([[1, -1]], dtype=np.float32).astype(E4M3)
    b = np.array([[3, 3]], dtype=np.float32).astype(E4M3)
    assert bits_of(tensorcore_matmul(a, b)).tolist() == [[0]]


def test_float16_overflows_to_infinity_and_stays():
    a = np.full((1, 64), 448, dtype=np.float32).astype(E4M3)
    b = a.copy()
    b[:, 32:] = 0
    assert tensorcore_matmul(a, b, unit="hopper-fp8-f16").tolist() == [[np.inf]]


@pytest.mark.parametrize("shape", [(0, 4, 40), (3, 0, 40), (3, 4, 0)])
def test_empty_matrices_have_empty_or_zero_products(shape):
    M, N, K = shape
    a, b = np.zeros((M, K), dtype=np.float32).astype(E4M3), np.zeros((N, K), dtype=np.float32).astype(E4M3)
    for unit in UNITS:
        if "fp8" in unit:
            d = tensorcore_matmul(a, b, unit=unit)
            assert d.shape == (M, N) and not d.any()


def test_promotion_bounds_the_loss_over_a_long_k():
    """What the recipe is for: without promotion a sum of 4,096 numbers in (0, 1) is some 7 % too small."""
    rng = np.random.default_rng(11)
    a, b = (rng.random((64, 4096)).astype(np.float32).astype(E4M3) for _ in "ab")
    exact = a.astype(np.float64) @ b.astype(np.float64).T
    plain, promoted = (tensorcore_matmul(a, b, promote_every=p) / exact - 1 for p in (None, 128))
    assert -0.075 < plain.min() and plain.max() < -0.055
    assert np.abs(promoted).max() < 1e-3


@pytest.mark.parametrize("change, message", [
    (dict(a=np.zeros((2, 3), dtype=np.float32)), "a is float32, not one of float8_e4m3fn"),
    (dict(b=np.zeros((2, 4), dtype=np.float32).astype(E4M3)), r"a \(2, 3\) and b \(2, 4\) are not"),
    (dict(unit="volta"), "unit='volta' is not one of hopper-fp8"),
    (dict(promote_every=48), "promote_every=48 is not a multiple of the unit's step of 32"),
    (dict(promote_every=0), "promote_every=0"),
    (dict(c=np.zeros((2, 5), dtype=np.float32)), r"c is float32 \(2, 5\), not float32 \(2, 2\)"),
    (dict(c=np.zeros((2, 2), dtype=np.float64)), "c is float64"),
])  # fmt: skip
def test_matmul_refuses(change, message):
    x = np.zeros((2, 3), dtype=np.float32).astype(E4M3)
    arguments = dict(a=x, b=x) | change
    with pytest.raises(ValueError, match=message):
        tensorcore_matmul(arguments.pop("a"), arguments.pop("b"), arguments.pop("c", None), **arguments)


def test_half_units_refuse_two_kinds():
    with pytest.raises(ValueError, match="two of one kind"):
        tensorcore_matmul(one(1, BF16), one(1, FP16), unit="hopper-bf16")


@pytest.mark.parametrize("sa, sb", [((2, 1), (1, 2)), ((2, 2), (2, 2)), ((3, 2), (1, 2))])
def test_deepgemm_refuses_scales_that_do_not_fit(sa, sb):
    x = np.zeros((2, 200), dtype=np.float32).astype(E4M3)
    with pytest.raises(ValueError, match="_scale"):
        deepgemm(x, np.ones(sa, dtype=np.float32), x, np.ones(sb, dtype=np.float32))
