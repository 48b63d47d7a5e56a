"""Conversions between types, and packed 16-bit pairs.

Arguments are arrays whose shapes broadcast, or NumPy scalars; results do not depend on how many elements are computed
together.
"""

from __future__ import annotations

import numpy as np

from cuflash.emulator.dtypes import F2, F4, F8, I4, U1, U2, U4, U8

NAN16 = np.uint16(0x7FFF)


def halves(packed: np.ndarray) -> np.ndarray:
    """Pairs of float16 from 32-bit words: a new last axis of length 2, low half first."""
    return np.ascontiguousarray(packed)[..., None].view(F2)


def from_halves(pair: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(pair, F2).view(U4)[..., 0]


def bfloat(bits: np.ndarray) -> np.ndarray:
    """float32 value of bfloat16 bits."""
    return (np.asarray(bits).astype(U4) << np.uint32(16)).view(F4)


def bfloats(packed: np.ndarray) -> np.ndarray:
    packed = np.asarray(packed)
    return np.stack([(packed << np.uint32(16)).view(F4), (packed & np.uint32(0xFFFF0000)).view(F4)], axis=-1)


def to_bfloat(value: np.ndarray) -> np.ndarray:
    """bfloat16 bits of float32, rounded to nearest even; NaN becomes the canonical 0x7FFF."""
    bits = np.asarray(value, F4).view(U4)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    if np.isnan(value).any():
        rounded = np.where(np.isnan(value), np.uint32(0x7FFF), rounded)
    return rounded.astype(U2)


def from_bfloats(pair: np.ndarray) -> np.ndarray:
    low, high = to_bfloat(pair[..., 0]).astype(U4), to_bfloat(pair[..., 1]).astype(U4)
    return low | (high << np.uint32(16))


def pack16(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """One 32-bit word from two 16-bit ones."""
    return np.asarray(low).astype(U4) | (np.asarray(high).astype(U4) << np.uint32(16))


def to_half(value: np.ndarray) -> np.ndarray:
    """float16 of float32 or float64, rounded to nearest even, with the canonical NaN 0x7FFF."""
    result = np.asarray(value).astype(F2)
    if np.isnan(result).any():
        result = np.where(np.isnan(result), NAN16.view(F2), result)
    return result


INT_RANGE = {f"{s}{w}": (np.iinfo(f"{s}{w}").min, np.iinfo(f"{s}{w}").max) for s in "iu" for w in (1, 2, 4, 8)}


def float_to_int(x: np.ndarray, kind: str) -> np.ndarray:
    """An integral float to an integer type, saturating; NaN becomes the top bit alone if either has 64 bits, else 0."""
    low, high = INT_RANGE[kind]
    x = np.asarray(x)
    unsigned = f"u{kind[1]}"
    nan = np.array(1 << 8 * int(kind[1]) - 1 if "8" in (kind[1], x.dtype.str[2]) else 0, unsigned).view(kind)
    x = x.astype(F8)
    top, bottom = x >= float(high), x <= float(low)
    inside = np.where(top | bottom | np.isnan(x), 0.0, x)
    result = inside.astype(kind) if kind != "u8" else inside.astype(U8)
    result = np.where(top, np.array(high, kind), np.where(bottom, np.array(low, kind), result))
    return np.where(np.isnan(x), nan, result).astype(kind)


def saturate_int(x: np.ndarray, kind: str) -> np.ndarray:
    """An integer to a narrower or differently signed type, clamped to its range."""
    low, high = INT_RANGE[kind]
    x = np.asarray(x)
    have_low, have_high = INT_RANGE[f"{x.dtype.kind}{x.dtype.itemsize}"]
    return np.clip(x, max(low, have_low), min(high, have_high)).astype(kind)


def truncate32(x: np.ndarray) -> np.ndarray:
    """float64 to float32 rounded toward zero."""
    x = np.asarray(x).astype(F8)
    result = x.astype(F4)
    over = np.abs(result.astype(F8)) > np.abs(x)
    return np.where(over, np.nextafter(result, np.float32(0)), result)


def truncate_bfloat(value: np.ndarray) -> np.ndarray:
    """bfloat16 bits of float32 rounded toward zero."""
    bits = np.asarray(value, F4).view(U4) >> np.uint32(16)
    return np.where(np.isnan(value), np.uint32(0x7FFF), bits).astype(U2)


def truncate_half(value: np.ndarray) -> np.ndarray:
    """float16 of float32 rounded toward zero."""
    value = np.asarray(value)
    result = to_half(value)
    over = np.abs(result.astype(F8)) > np.abs(value.astype(F8))
    return np.where(over, np.nextafter(result, np.float16(0)), result)


def to_tf32(value: np.ndarray, rounding: str) -> np.ndarray:
    """TF32 of float32, ten bits of mantissa: to nearest with ties away from zero (rna) or to even (rn), or toward
    zero (rz)."""
    bits = np.asarray(value, F4).view(U4)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    if rounding == "rna":
        magnitude = magnitude + np.uint32(0x1000)
    elif rounding == "rn":
        magnitude = magnitude + (np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1)))
    rounded = magnitude & np.uint32(0x7FFFE000) | bits & np.uint32(0x80000000)
    return np.where(np.isnan(value), np.uint32(0x7FFFFFFF), rounded)


def _float8(mantissa: int, bias: int) -> np.ndarray:
    """float32 of every pattern of eight bits, as if there were neither infinity nor NaN."""
    patterns = np.arange(256)
    exponent, fraction = patterns >> mantissa & (0x7F >> mantissa), patterns & ((1 << mantissa) - 1)
    whole = fraction + np.where(exponent > 0, 1 << mantissa, 0)
    value = np.ldexp(whole.astype(F4), np.maximum(exponent, 1) - bias - mantissa)
    return np.where(patterns < 128, value, -value)


FLOAT8 = {"e4m3": _float8(3, 7), "e5m2": _float8(2, 15)}  # float32 by pattern
FLOAT8["e4m3"][[0x7F, 0xFF]] = np.nan
FLOAT8["e5m2"][[0x7C, 0xFC]] = np.inf, -np.inf
FLOAT8["e5m2"][[0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF]] = np.nan


def _middles(kind: str) -> np.ndarray:
    """Boundaries between neighbours among the finite numbers that are not negative, in the order of their patterns."""
    values = FLOAT8[kind][:128].astype(F8)
    values = values[np.isfinite(values)]
    return (values[1:] + values[:-1]) / 2


FLOAT8_MIDDLES = {kind: _middles(kind) for kind in FLOAT8}


def to_float8(value: np.ndarray, kind: str) -> np.ndarray:
    """float8 bits of float16 or float32, rounded to nearest even; past the largest number that one (.satfinite); NaN
    becomes 0x7F."""
    value = np.asarray(value).astype(F8)
    below, upto = (np.searchsorted(FLOAT8_MIDDLES[kind], np.abs(value), side) for side in ("left", "right"))
    pattern = np.where(below % 2 == 0, below, upto)  # they differ by one on a boundary
    return np.where(np.isnan(value), 0x7F, pattern | np.where(np.signbit(value), 0x80, 0)).astype(U1)


def pack_float8_pair(low: np.ndarray, high: np.ndarray, kind: str) -> np.ndarray:
    """One 16-bit word of two float8, each rounded from float16 or float32."""
    return to_float8(low, kind).astype(U2) | (to_float8(high, kind).astype(U2) << np.uint16(8))


def widen_float8_pair(packed: np.ndarray, kind: str) -> np.ndarray:
    """One 32-bit word of two float16 from a 16-bit word of two float8."""
    packed = np.asarray(packed)
    return pack_half_pair(FLOAT8[kind][packed & np.uint16(0xFF)], FLOAT8[kind][packed >> np.uint16(8)])


def odd_to_single(x: np.ndarray) -> np.ndarray:
    """float64 to float32 rounded to odd, before a further rounding to a short type."""
    x = np.asarray(x).astype(F8)
    result = x.astype(F4)
    bits = result.view(I4)
    back = result.astype(F8)
    inexact = (back != x) & np.isfinite(result) & (bits & 1 == 0)
    step = np.where(np.abs(x) > np.abs(back), 1, -1).astype(I4)
    return np.where(inexact, (bits + step).view(F4), result)


def pack_half_pair(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """One word of two float16, each rounded to nearest even from float32."""
    return pack16(to_half(low).view(U2), to_half(high).view(U2))


def pack_bfloat_pair(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """One word of two bfloat16, each rounded to nearest even from float32."""
    return pack16(to_bfloat(low), to_bfloat(high))
