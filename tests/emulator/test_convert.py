"""cvt: over all 16-bit patterns where a side has 16 bits, around every rounding boundary where it rounds."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from cuflash.emulator import UnsupportedInstruction
from tests.emulator.programs import evaluate

BF16 = np.dtype(ml_dtypes.bfloat16)
ALL16 = np.arange(1 << 16, dtype=np.uint16)
INTEGERS = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")


def around_boundaries(dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """float32 values around every boundary between neighbours of a 16-bit type, and the patterns they round to."""
    top = 0x7C00 if dtype == np.float16 else 0x7F80
    bits = np.arange(top, dtype=np.uint16)
    here = bits.view(dtype).astype(np.float64)
    largest_step = here[-1] - here[-2]
    after = np.append(here[1:], here[-1] + largest_step)
    middle = ((here + after) / 2).astype(np.float32)
    assert (middle.astype(np.float64) == (here + after) / 2).all()
    below, above = np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(np.inf))
    values = np.concatenate([here.astype(np.float32), middle, below, above])
    even = np.where(bits % 2 == 0, bits, bits + 1).astype(np.uint16)
    return values, np.concatenate([bits, even, bits, (bits + 1).astype(np.uint16)])


@pytest.mark.parametrize(("kind", "dtype"), [("f16", np.dtype("f2")), ("bf16", BF16)])
def test_rounding_from_float32(kind: str, dtype: np.dtype) -> None:
    values, expected = around_boundaries(dtype)
    for sign in (0, 0x8000):
        x = -values if sign else values
        np.testing.assert_array_equal(evaluate(f"cvt.rn.{kind}.f32 %d, %0;", x, out="u2"), expected | sign)
        swapped = np.roll(x, 1)
        packed = evaluate(f"cvt.rn.{kind}x2.f32 %d, %0, %1;", swapped, x)
        want = (np.roll(expected, 1).astype(np.uint32) | sign) << 16 | expected | sign
        np.testing.assert_array_equal(packed, want)
        down = np.concatenate([expected[: len(expected) // 4]] * 4)
        np.testing.assert_array_equal(evaluate(f"cvt.rz.{kind}.f32 %d, %0;", x, out="u2"), down | sign)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_infinities_and_nan(kind: str) -> None:
    x = np.array([np.inf, -np.inf, np.nan], np.float32)
    infinity = 0x7C00 if kind == "f16" else 0x7F80
    assert evaluate(f"cvt.rn.{kind}.f32 %d, %0;", x, out="u2").tolist() == [infinity, infinity | 0x8000, 0x7FFF]
    packed = evaluate(f"cvt.rn.{kind}x2.f32 %d, %0, %1;", x, x)
    assert packed.tolist() == [infinity << 16 | infinity, (infinity << 16 | infinity) | 0x80008000, 0x7FFF7FFF]
    relu = evaluate(f"cvt.rn.relu.{kind}x2.f32 %d, %0, %1;", np.float32(-2), np.float32(1))
    assert relu[0] == (0x3C00 if kind == "f16" else 0x3F80)


def test_widening_of_all_patterns() -> None:
    for kind, dtype in (("f16", np.dtype("f2")), ("bf16", BF16)):
        wide = evaluate(f"cvt.f32.{kind} %d, %0;", ALL16, out="f4")
        expected = ALL16.view(dtype).astype(np.float32)
        number = ~np.isnan(expected)
        np.testing.assert_array_equal(np.isnan(wide), ~number)
        np.testing.assert_array_equal(wide[number].view("u4"), expected[number].view("u4"))
    double = evaluate("cvt.f64.f16 %d, %0;", ALL16, out="f8")
    np.testing.assert_array_equal(double, ALL16.view("f2").astype(np.float64))


def limits(kind: str) -> tuple[int, int]:
    width = int(kind[1:])
    return (0, 2**width - 1) if kind[0] == "u" else (-(2 ** (width - 1)), 2 ** (width - 1) - 1)


ROUNDINGS = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("kind", ["s32", "u32", "s16", "u8", "s64", "u64"])
def test_floats_to_integers(rounding: str, kind: str) -> None:
    low, high = limits(kind)
    out = f"{'i' if kind[0] == 's' else 'u'}{int(kind[1:]) // 8}"
    store = "i2" if kind == "u8" else out  # a byte is converted into a wider register
    half = evaluate(f"cvt.{rounding}.{kind}.f16 %d, %0;", ALL16, out=store)
    finite = np.isfinite(ALL16.view("f2"))
    want = [min(max(ROUNDINGS[rounding](float(v)), low), high) for v in ALL16.view("f2")[finite]]
    np.testing.assert_array_equal(half[finite], np.array(want, store))
    values = np.array(
        [
            0.5,
            1.5,
            2.5,
            -0.5,
            -1.5,
            2.0**31,
            -(2.0**31),
            2.0**32,
            2.0**63,
            2.0**64,
            -(2.0**63),
            1e30,
            -1e30,
            0.49999997,
        ],
        np.float32,
    )
    want = [min(max(ROUNDINGS[rounding](float(v)), low), high) for v in values]
    result = evaluate(f"cvt.{rounding}.{kind}.f32 %d, %0;", values, out=store)
    assert [int(v) for v in result] == want
    infinite = evaluate(f"cvt.{rounding}.{kind}.f32 %d, %0;", np.array([np.inf, -np.inf], np.float32), out=store)
    assert [int(v) for v in infinite] == [high, low]
    double = evaluate(f"cvt.{rounding}.{kind}.f64 %d, %0;", values.astype(np.float64), out=store)
    assert [int(v) for v in double] == want


def test_nan_to_integers() -> None:
    nan = np.array([np.nan], np.float32)
    assert evaluate("cvt.rzi.s32.f32 %d, %0;", nan, out="i4")[0] == 0
    assert evaluate("cvt.rzi.u32.f32 %d, %0;", nan, out="u4")[0] == 0
    assert evaluate("cvt.rzi.u64.f32 %d, %0;", nan, out="u8")[0] == 1 << 63
    assert evaluate("cvt.rzi.s64.f32 %d, %0;", nan, out="i8")[0] == -(1 << 63)
    assert evaluate("cvt.rzi.s32.f64 %d, %0;", nan.astype("f8"), out="i4")[0] == -(1 << 31)
    assert evaluate("cvt.rzi.u32.f64 %d, %0;", nan.astype("f8"), out="u4")[0] == 1 << 31
    assert evaluate("cvt.rzi.s16.f64 %d, %0;", nan.astype("f8"), out="i2")[0] == -(1 << 15)


def test_rounding_to_integral_floats() -> None:
    x = np.array([0.5, 1.5, -2.5, 3.7, -3.2, 1e9], np.float32)
    for name, function in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)):
        np.testing.assert_array_equal(evaluate(f"cvt.{name}.f32.f32 %d, %0;", x, out="f4"), function(x))


@pytest.mark.parametrize("kind", INTEGERS)
def test_integers_to_floats(kind: str) -> None:
    low, high = limits(kind)
    rng = np.random.default_rng(1)
    width = int(kind[1:]) // 8
    values = [low, low + 1, 0, 1, high - 1, high, *(int(v) for v in np.linspace(low, high, 50))]
    values += [int(v) for v in rng.integers(low // 2, high // 2, 50)]
    values = [min(max(v, low), high) for v in values]
    x = np.array(values, f"{'i' if kind[0] == 's' else 'u'}{width}")
    x = x.astype("i2" if kind[0] == "s" else "u2") if width == 1 else x
    np.testing.assert_array_equal(evaluate(f"cvt.rn.f64.{kind} %d, %0;", x, out="f8"), x.astype(np.float64))
    np.testing.assert_array_equal(evaluate(f"cvt.rn.f32.{kind} %d, %0;", x, out="f4"), x.astype(np.float32))
    short = evaluate(f"cvt.rn.f16.{kind} %d, %0;", x, out="u2").view("f2")
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(short, x.astype(np.float64).astype(np.float16))


@pytest.mark.parametrize("to", INTEGERS)
@pytest.mark.parametrize("source", INTEGERS)
def test_integers_to_integers(to: str, source: str) -> None:
    """Values of `source` in a register at least 16 bits wide; what is above the type's own width must not matter."""
    width = max(2, int(source[1:]) // 8)
    rng = np.random.default_rng(2)
    words = np.concatenate(
        [
            np.array([0, 1, 127, 128, 255, 256, 32767, 32768, 2**31, 2**32 - 1, 2**63, 2**64 - 1], np.uint64),
            rng.integers(0, 2**64 - 1, 60, np.uint64),
        ]
    )
    x = words.astype(f"u{width}")
    out_width = max(2, int(to[1:]) // 8)
    bits, to_bits = int(source[1:]), int(to[1:])
    plain, saturated = [], []
    for value in x.tolist():
        value %= 1 << bits
        if source[0] == "s" and value >> (bits - 1):
            value -= 1 << bits
        low, high = limits(to)
        wrapped = value % (1 << to_bits)
        if to[0] == "s" and wrapped >> (to_bits - 1):
            wrapped -= 1 << to_bits
        plain.append(wrapped % (1 << 8 * out_width))
        saturated.append(min(max(value, low), high) % (1 << 8 * out_width))
    assert evaluate(f"cvt.{to}.{source} %d, %0;", x, out=f"u{out_width}").tolist() == plain
    assert evaluate(f"cvt.sat.{to}.{source} %d, %0;", x, out=f"u{out_width}").tolist() == saturated


def test_float64_to_shorter() -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal(500) * 2.0 ** rng.integers(-140, 120, 500)
    np.testing.assert_array_equal(evaluate("cvt.rn.f32.f64 %d, %0;", x, out="f4"), x.astype(np.float32))
    toward_zero = evaluate("cvt.rz.f32.f64 %d, %0;", x, out="f4").astype(np.float64)
    assert (np.abs(toward_zero) <= np.abs(x)).all()
    assert (
        np.abs(
            np.nextafter(toward_zero.astype(np.float32), np.copysign(np.float32(np.inf), x.astype(np.float32))).astype(
                np.float64
            )
        )
        > np.abs(x)
    ).all()
    near = np.float64(1 + 2.0**-11) + 2.0**-40  # just above a tie of float16, on it after a rounding to float32
    assert evaluate("cvt.rn.f16.f64 %d, %0;", near, out="u2").view("f2")[0] == np.float16(1 + 2.0**-10)


def test_tf32() -> None:
    """Around a boundary, an odd and an even neighbour below it, the largest number, a subnormal one."""
    x = np.array(
        [0x3F800FFF, 0x3F801000, 0x3F801001, 0x3F803000, 0xBF803000, 0xBF801000, 0x7F7FFFFF, 0x00001000], np.uint32
    ).view(np.float32)  # fmt: skip
    expected = {
        "rna": [0x3F800000, 0x3F802000, 0x3F802000, 0x3F804000, 0xBF804000, 0xBF802000, 0x7F800000, 0x00002000],
        "rn": [0x3F800000, 0x3F800000, 0x3F802000, 0x3F804000, 0xBF804000, 0xBF800000, 0x7F800000, 0x00000000],
        "rz": [0x3F800000, 0x3F800000, 0x3F800000, 0x3F802000, 0xBF802000, 0xBF800000, 0x7F7FE000, 0x00000000],
    }
    special = np.array([np.inf, -np.inf, np.nan, -0.0], np.float32)
    for rounding, words in expected.items():
        assert evaluate(f"cvt.{rounding}.tf32.f32 %d, %0;", x).tolist() == words
        kept = evaluate(f"cvt.{rounding}.tf32.f32 %d, %0;", special).tolist()
        assert kept == [0x7F800000, 0xFF800000, 0x7FFFFFFF, 0x80000000]
    assert evaluate("cvt.rn.relu.tf32.f32 %d, %0;", np.float32([-2, 3])).tolist() == [0, 0x40400000]


FLOAT8 = {"e4m3": np.dtype(ml_dtypes.float8_e4m3fn), "e5m2": np.dtype(ml_dtypes.float8_e5m2)}


@pytest.mark.parametrize("name", FLOAT8)
def test_rounding_to_float8(name: str) -> None:
    """Every finite number, every boundary and its neighbours, of both signs; beyond the largest number; NaN."""
    numbers = np.arange(128, dtype=np.uint8).view(FLOAT8[name]).astype(np.float32)
    numbers = numbers[np.isfinite(numbers)]
    last = len(numbers) - 1
    pattern = np.arange(last, dtype=np.uint8)
    middle = (numbers[1:] + numbers[:-1]) / 2
    below, above = np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(np.inf))
    x = np.concatenate([numbers, middle, below, above, [numbers[-1] * 2, np.inf]]).astype(np.float32)
    expected = np.concatenate([np.arange(last + 1), pattern + pattern % 2, pattern, pattern + 1, [last, last]])
    packed = evaluate(f"cvt.rn.satfinite.{name}x2.f32 %d, %0, %1;", x, -x, out="u2")
    np.testing.assert_array_equal(packed, expected << 8 | expected | 0x80)
    nan = evaluate(f"cvt.rn.satfinite.{name}x2.f32 %d, %0, %1;", np.float32(np.nan), np.float32(1), out="u2")
    assert nan[0] >> 8 == 0x7F
    relu = evaluate(f"cvt.rn.satfinite.relu.{name}x2.f32 %d, %0, %1;", np.float32(-2), np.float32(0), out="u2")
    assert relu[0] == 0


@pytest.mark.parametrize("name", FLOAT8)
def test_float8_to_and_from_float16(name: str) -> None:
    low, high = (ALL16 & 0xFF).astype(np.uint8).view(FLOAT8[name]), (ALL16 >> 8).astype(np.uint8).view(FLOAT8[name])
    wide = evaluate(f"cvt.rn.f16x2.{name}x2 %d, %0;", ALL16).view("f2").reshape(-1, 2)
    np.testing.assert_array_equal(wide, np.stack([low, high], -1).astype("f2"))
    words = wide.copy().view("u4")[:, 0]
    finite = np.isfinite(wide).all(axis=1)
    back = evaluate(f"cvt.rn.satfinite.{name}x2.f16x2 %d, %0;", words, out="u2")
    np.testing.assert_array_equal(back[finite], ALL16[finite])


@pytest.mark.parametrize(
    "form", ["rn.satfinite.f16.f32", "rna.satfinite.tf32.f32", "rna.relu.tf32.f32", "rn.e4m3x2.f32", "rz.f16x2.e5m2x2"]
)
def test_other_forms_are_refused(form: str) -> None:
    with pytest.raises(UnsupportedInstruction, match="cvt"):
        evaluate(f"cvt.{form} %d, %0;", np.float32(1))


def test_saturating_to_unit_interval() -> None:
    x = np.array([-1, 0.5, 3], np.float32)
    np.testing.assert_array_equal(evaluate("cvt.sat.f32.f32 %d, %0;", x, out="f4"), [0, 0.5, 1])
