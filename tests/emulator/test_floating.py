"""Floating-point instructions against exact arithmetic, NumPy and ml_dtypes."""

from __future__ import annotations

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from tests.emulator.programs import evaluate

BF16 = np.dtype(ml_dtypes.bfloat16)
ALL16 = np.arange(1 << 16, dtype=np.uint16)
SPECIAL = np.array(
    [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 2.0**-149, -(2.0**-126), 2.0**-127, 3.4e38, -3.4e38, 65504, 1e-8],
    np.float32,
)


def floats(count: int, seed: int, spread: int = 30) -> np.ndarray:
    """Random float32 of many magnitudes, with pairs of special values at the front."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(count) * 2.0 ** rng.integers(-spread, spread, count)).astype(np.float32)


def pairs(seed: int) -> tuple[np.ndarray, np.ndarray]:
    x, y = (grid.ravel() for grid in np.meshgrid(SPECIAL, SPECIAL))
    return np.concatenate([x, floats(500, seed)]), np.concatenate([y, floats(500, seed + 1)])


def same(result: np.ndarray, expected: np.ndarray) -> None:
    """Equal bit for bit, except that any NaN is as good as another."""
    result, expected = np.asarray(result), np.asarray(expected, result.dtype)
    word = f"u{result.dtype.itemsize}"
    where = ~(np.isnan(result) & np.isnan(expected))
    np.testing.assert_array_equal(result.view(word)[where], expected.view(word)[where])


@pytest.mark.parametrize(
    ("name", "function"), [("add", np.add), ("sub", np.subtract), ("mul", np.multiply), ("div.rn", np.divide)]
)
@pytest.mark.parametrize("dtype", ["f4", "f8"])
@np.errstate(all="ignore")
def test_two_operands(name: str, function: np.ufunc, dtype: str) -> None:
    a, b = (x.astype(dtype) for x in pairs(1))
    if dtype == "f8":
        a, b = a * (1 + 1e-12), b * (1 - 1e-11)
    kind = "f32" if dtype == "f4" else "f64"
    same(evaluate(f"{name}.{kind} %d, %0, %1;", a, b, out=dtype), function(a, b))


def rounded_fma(a: float, b: float, c: float, dtype: np.dtype) -> float:
    """a·b + c rounded once, by exact rationals."""
    if not all(map(math.isfinite, (a, b, c))):
        return float(dtype.type(a) * dtype.type(b) + dtype.type(c))
    return nearest(Fraction(a) * Fraction(b) + Fraction(c), dtype)


def nearest(exact: Fraction, dtype: np.dtype) -> float:
    """The nearest value of a floating type (ties to even) that is not beyond its range."""
    digits, least = {"f4": (24, -149), "f8": (53, -1074), "f2": (11, -24)}[dtype.str[1:]]
    if exact == 0:
        return 0.0
    exponent = max(math.floor(math.log2(abs(exact))) - digits + 1, least)
    while abs(exact) / Fraction(2) ** exponent >= 2**digits:
        exponent += 1
    while exponent > least and abs(exact) / Fraction(2) ** exponent < 2 ** (digits - 1):
        exponent -= 1
    return float(round(exact / Fraction(2) ** exponent) * Fraction(2) ** exponent)


@np.errstate(all="ignore")
def test_fma_rounds_once() -> None:
    rng = np.random.default_rng(2)
    a, b, c = floats(600, 3, 8), floats(600, 4, 8), floats(600, 5, 8)
    # sums that fall on a tie of float32 but for a far smaller part: two roundings would go wrong
    ties = rng.integers(1 << 23, 1 << 24, 200).astype(np.float64)
    a[:200], b[:200], c[:200] = 1 + 2.0**-23, 1 - 2.0**-23, ties * 2 + 1
    c[:200] = np.ldexp((2 * rng.integers(1 << 22, 1 << 23, 200)).astype(np.float32), 1)
    a[200:300], b[200:300], c[200:300] = np.float32(2.0**-60), np.float32(3), floats(100, 6, 2)
    a[300:400], b[300:400], c[300:400] = np.float32(2.0**-75), floats(100, 7, 1), np.float32(2.0**-149)
    expected = [rounded_fma(*map(float, x), np.dtype("f4")) for x in zip(a, b, c, strict=True)]
    same(evaluate("fma.rn.f32 %d, %0, %1, %2;", a, b, c, out="f4"), np.array(expected, np.float32))
    x, y, z = (v.astype(np.float64) * (1 + rng.random(600) * 1e-9) for v in (a, b, c))
    z[:300] = -x[:300] * y[:300]
    expected = [rounded_fma(*map(float, v), np.dtype("f8")) for v in zip(x, y, z, strict=True)]
    same(evaluate("fma.rn.f64 %d, %0, %1, %2;", x, y, z, out="f8"), np.array(expected))


def test_fma_ties_are_hit() -> None:
    """1 + 2^-24 (1 ± 2^-30) lies next to a tie: the product's last bits decide."""
    one = np.float32(1)
    a = np.array([2.0**-12 * (1 + 2.0**-15), 2.0**-12 * (1 - 2.0**-15), 2.0**-12], np.float32)
    b = np.array([2.0**-12 * (1 + 2.0**-20), 2.0**-12 * (1 - 2.0**-20), 2.0**-12], np.float32)
    tiny = evaluate("fma.rn.f32 %d, %0, %1, %2;", a, b, one, out="f4")
    assert tiny.tolist() == [1 + 2.0**-23, 1.0, 1.0]
    # 2^-24 + 2^-60, too close to the tie for a sum in float64 to tell
    a, b = np.array([2.0**-24 * (1 + 2.0**-23)], np.float32), np.array([1 - 2.0**-23], np.float32)
    assert evaluate("fma.rn.f32 %d, %0, %1, %2;", a, b, one, out="f4")[0] == 1.0
    far = evaluate("fma.rn.f32 %d, %0, %1, %2;", np.float32(2.0**-80), one, np.float32(1 + 2.0**-23), out="f4")
    assert far[0] == np.float32(1 + 2.0**-23)


@np.errstate(all="ignore")
def test_short_types_on_all_values() -> None:
    others = np.array([0x0000, 0x8000, 0x3C00, 0xBC00, 0x0001, 0x7BFF, 0x4248, 0x7C00, 0x7E00], np.uint16)
    shift = np.array([0x0000, 0x8000, 0x3F80, 0xBF80, 0x0001, 0x7F7F, 0x4049, 0x7F80, 0x7FC0], np.uint16)
    for kind, dtype, second in (("f16", np.dtype("f2"), others), ("bf16", BF16, shift)):
        for other in second:
            x, y = ALL16.view(dtype), np.full(1, other).view(dtype)
            for name, function in (("add", np.add), ("sub", np.subtract), ("mul", np.multiply)):
                result = evaluate(f"{name}.{kind} %d, %0, %1;", ALL16, other, out="u2").view(dtype)
                same(
                    result.astype(np.float32),
                    function(x.astype("f8"), y.astype("f8")).astype("f4").astype(dtype).astype(np.float32),
                )
            break_even = np.fmin(x.astype("f4"), y.astype("f4"))
            result = evaluate(f"min.{kind} %d, %0, %1;", ALL16, other, out="u2").view(dtype).astype("f4")
            np.testing.assert_array_equal(result, break_even)


def test_packed_pairs_are_two_numbers() -> None:
    rng = np.random.default_rng(8)
    low, high = rng.permutation(ALL16), rng.permutation(ALL16)
    other_low, other_high = rng.permutation(ALL16), rng.permutation(ALL16)
    a, b = (x.astype(np.uint32) | y.astype(np.uint32) << 16 for x, y in ((low, high), (other_low, other_high)))
    for kind in ("f16", "bf16"):
        for name in ("add", "mul", "sub", "max", "min"):
            packed = evaluate(f"{name}.{kind}x2 %d, %0, %1;", a, b)
            single = [
                evaluate(f"{name}.{kind} %d, %0, %1;", x, y, out="u2")
                for x, y in ((low, other_low), (high, other_high))
            ]
            np.testing.assert_array_equal(packed, single[0].astype(np.uint32) | single[1].astype(np.uint32) << 16)
        fused = evaluate(f"fma.rn.{kind}x2 %d, %0, %1, %0;", a, b)
        single = [
            evaluate(f"fma.rn.{kind} %d, %0, %1, %0;", x, y, out="u2")
            for x, y in ((low, other_low), (high, other_high))
        ]
        np.testing.assert_array_equal(fused, single[0].astype(np.uint32) | single[1].astype(np.uint32) << 16)
        np.testing.assert_array_equal(evaluate(f"neg.{kind}x2 %d, %0;", a), a ^ 0x80008000)
        np.testing.assert_array_equal(evaluate(f"abs.{kind}x2 %d, %0;", a), a & 0x7FFF7FFF)


@np.errstate(all="ignore")
def test_short_fma_rounds_once() -> None:
    rng = np.random.default_rng(9)
    a, b, c = (rng.integers(0, 0x7C00, 3000).astype(np.uint16) for _ in range(3))
    result = evaluate("fma.rn.f16 %d, %0, %1, %2;", a, b, c, out="u2").view("f2")
    exact = [
        Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        for x, y, z in zip(a.view("f2"), b.view("f2"), c.view("f2"), strict=True)
    ]
    for value, want in zip(result.tolist(), exact, strict=True):
        assert value == (nearest(want, np.dtype("f2")) if want < 65520 else math.inf)
    a, b, c = (rng.integers(0x3000, 0x4800, 3000).astype(np.uint16) for _ in range(3))
    result = evaluate("fma.rn.bf16 %d, %0, %1, %2;", a, b, c, out="u2").view(BF16)
    for value, x, y, z in zip(result, a.view(BF16), b.view(BF16), c.view(BF16), strict=True):
        want = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        error = abs(Fraction(float(value)) - want)
        bits = int(np.array(value).view(np.uint16))
        for neighbour in (bits - 1, bits + 1):
            near = abs(Fraction(float(np.uint16(neighbour).view(BF16))) - want)
            assert error < near or (error == near and bits % 2 == 0)


@np.errstate(all="ignore")
def test_minimum_and_maximum() -> None:
    a, b = pairs(10)
    both_zero = (a == 0) & (b == 0)
    for name, ignore, carry, zero in (
        ("min", np.fmin, np.minimum, np.logical_or),
        ("max", np.fmax, np.maximum, np.logical_and),
    ):
        expected = ignore(a, b)
        signs = zero(np.signbit(a), np.signbit(b))
        expected = np.where(both_zero, np.where(signs, np.float32(-0.0), np.float32(0)), expected)
        same(evaluate(f"{name}.f32 %d, %0, %1;", a, b, out="f4"), expected)
        result = evaluate(f"{name}.NaN.f32 %d, %0, %1;", a, b, out="f4")
        np.testing.assert_array_equal(np.isnan(result), np.isnan(a) | np.isnan(b))
        same(result, np.where(both_zero, expected, carry(a, b)))


@np.errstate(all="ignore")
def test_flush_to_zero() -> None:
    a = np.array([2.0**-149, -(2.0**-130), 2.0**-126, 1.0], np.float32)
    np.testing.assert_array_equal(
        evaluate("add.ftz.f32 %d, %0, %0;", a, out="f4"), np.array([0, 0, 2.0**-125, 2], np.float32)
    )
    assert np.signbit(evaluate("add.ftz.f32 %d, %0, %0;", a, out="f4")[1])
    half = evaluate("mul.ftz.f32 %d, %0, 0f3F000000;", a, out="f4")
    np.testing.assert_array_equal(half, np.array([0, 0, 0, 0.5], np.float32))
    np.testing.assert_array_equal(evaluate("mul.f32 %d, %0, 0f3F000000;", a, out="f4"), a * np.float32(0.5))
    np.testing.assert_array_equal(
        evaluate("setp.eq.ftz.f32 %d, %0, 0f00000000;", a, out=bool), [True, True, False, False]
    )


def test_sign_instructions_keep_nan_bits() -> None:
    a = np.array([0x7FC12345, 0xFFC12345, 0x3F800000, 0x80000000], np.uint32)
    np.testing.assert_array_equal(evaluate("neg.f32 %d, %0;", a.view("f4"), out="f4").view("u4"), a ^ 0x80000000)
    np.testing.assert_array_equal(evaluate("abs.f32 %d, %0;", a.view("f4"), out="f4").view("u4"), a & 0x7FFFFFFF)
    np.testing.assert_array_equal(
        evaluate("copysign.f32 %d, %0, %1;", np.float32(-1), np.array([2, -3], "f4"), out="f4"), [-2, -3]
    )


FUNCTIONS = {
    "ex2.approx.ftz": (np.exp2, (-140, 127)),
    "lg2.approx": (np.log2, (1e-30, 1e30)),
    "rcp.approx.ftz": (np.reciprocal, (1e-30, 1e30)),
    "rcp.rn": (np.reciprocal, (1e-30, 1e30)),
    "sqrt.rn": (np.sqrt, (0, 1e30)),
    "sqrt.approx.ftz": (np.sqrt, (1e-30, 1e30)),
    "rsqrt.approx": (lambda x: 1 / np.sqrt(x), (1e-30, 1e30)),
    "tanh.approx": (np.tanh, (-9, 9)),
    "sin.approx": (np.sin, (-3, 3)),
    "cos.approx": (np.cos, (-3, 3)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str) -> None:
    function, (low, high) = FUNCTIONS[name]
    x = np.linspace(low, high, 5000).astype(np.float32)
    result = evaluate(f"{name}.f32 %d, %0;", x, out="f4")
    expected = function(x.astype(np.float64))
    expected = np.where(np.abs(expected) < 2.0**-126, result, expected)  # subnormal results: flushed or not
    np.testing.assert_allclose(result, expected, rtol=4e-7, atol=1e-37)


@np.errstate(all="ignore")
def test_functions_at_special_values() -> None:
    x = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, -1.0], np.float32)
    same(evaluate("ex2.approx.f32 %d, %0;", x, out="f4"), np.array([1, 1, np.inf, 0, np.nan, 0.5], np.float32))
    same(
        evaluate("lg2.approx.f32 %d, %0;", x, out="f4"),
        np.array([-np.inf, -np.inf, np.inf, np.nan, np.nan, np.nan], np.float32),
    )
    same(evaluate("rcp.approx.f32 %d, %0;", x, out="f4"), np.array([np.inf, -np.inf, 0, -0.0, np.nan, -1], np.float32))
    same(
        evaluate("rsqrt.approx.f32 %d, %0;", x, out="f4"),
        np.array([np.inf, -np.inf, 0, np.nan, np.nan, np.nan], np.float32),
    )


def test_functions_do_not_depend_on_the_place_of_an_element() -> None:
    """Vectorised mathematics must give a number the same result wherever it stands in an array."""
    x = floats(257, 11, 4)
    for name in ("ex2.approx.ftz", "lg2.approx", "tanh.approx", "sin.approx"):
        whole = evaluate(f"{name}.f32 %d, %0;", np.abs(x), out="f4")
        single = np.array(
            [evaluate(f"{name}.f32 %d, %0;", np.abs(x[k : k + 1]), out="f4")[0] for k in range(0, 257, 16)]
        )
        np.testing.assert_array_equal(whole[::16].view("u4"), single.view("u4"))


COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}


@pytest.mark.parametrize("name", COMPARISONS)
@np.errstate(all="ignore")
def test_comparisons(name: str) -> None:
    a, b = pairs(12)
    unordered = np.isnan(a) | np.isnan(b)
    plain = eval(f"a {COMPARISONS[name]} b", {"a": a, "b": b})
    np.testing.assert_array_equal(evaluate(f"setp.{name}.f32 %d, %0, %1;", a, b, out=bool), plain & ~unordered)
    np.testing.assert_array_equal(evaluate(f"setp.{name}u.f32 %d, %0, %1;", a, b, out=bool), plain | unordered)
    if name == "eq":
        np.testing.assert_array_equal(evaluate("setp.num.f32 %d, %0, %1;", a, b, out=bool), ~unordered)
        np.testing.assert_array_equal(evaluate("setp.nan.f32 %d, %0, %1;", a, b, out=bool), unordered)
    with np.errstate(over="ignore"):
        x, y = a.astype("f2"), b.astype("f2")
    short = eval(f"x {COMPARISONS[name]} y", {"x": x, "y": y}) & ~unordered
    np.testing.assert_array_equal(evaluate(f"setp.{name}.f16 %d, %0, %1;", x.view("u2"), y.view("u2"), out=bool), short)


def test_classes_of_numbers() -> None:
    x = np.array([0.0, 1.0, np.inf, np.nan, 2.0**-149, -(2.0**-126)], np.float32)
    expected = {
        "finite": [1, 1, 0, 0, 1, 1],
        "infinite": [0, 0, 1, 0, 0, 0],
        "number": [1, 1, 1, 0, 1, 1],
        "notanumber": [0, 0, 0, 1, 0, 0],
        "normal": [0, 1, 0, 0, 0, 1],
        "subnormal": [0, 0, 0, 0, 1, 0],
    }
    for name, values in expected.items():
        assert evaluate(f"testp.{name}.f32 %d, %0;", x, out=bool).tolist() == [bool(v) for v in values], name


def test_saturation() -> None:
    x = np.array([-1.0, 0.25, 2.0, np.nan], np.float32)
    np.testing.assert_array_equal(evaluate("add.sat.f32 %d, %0, 0f00000000;", x, out="f4"), [0, 0.25, 1, 0])
    np.testing.assert_array_equal(
        evaluate("fma.rn.sat.f32 %d, %0, 0f3F800000, 0f00000000;", x, out="f4"), [0, 0.25, 1, 0]
    )


def test_directed_rounding_keeps_the_sign_of_zero() -> None:
    zero, one = np.float32([-0.0, 0.0, -0.0, 0.0]), np.float32([1, 1, -1, -1])
    for mode in ("rn", "rz", "rm", "rp"):
        assert np.signbit(evaluate(f"mul.{mode}.f32 %d, %0, %1;", zero, one, out="f4")).tolist() == [1, 0, 0, 1]


@np.errstate(all="ignore")
def test_directed_rounding() -> None:
    a, b, c = floats(400, 20, 10), floats(400, 21, 10), floats(400, 22, 10)
    exact = {
        "add": [Fraction(float(x)) + Fraction(float(y)) for x, y in zip(a, b, strict=True)],
        "mul": [Fraction(float(x)) * Fraction(float(y)) for x, y in zip(a, b, strict=True)],
        "fma": [Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(a, b, c, strict=True)],
    }
    for name, values in exact.items():
        rest = ", %2" if name == "fma" else ""
        for mode in ("rz", "rm", "rp"):
            result = evaluate(f"{name}.{mode}.f32 %d, %0, %1{rest};", a, b, c, out="f4")
            for got, want in zip(result, values, strict=True):
                up = mode == "rp" or (mode == "rz" and want < 0)
                beyond = np.nextafter(got, np.float32(-np.inf if up else np.inf))
                if up:
                    assert Fraction(float(got)) >= want > Fraction(float(beyond))
                else:
                    assert Fraction(float(got)) <= want < Fraction(float(beyond))
