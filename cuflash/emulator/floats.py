"""Floating-point arithmetic of PTX that NumPy has no ufunc for.

Arguments are arrays whose shapes broadcast, or NumPy scalars; results do not depend on how many elements are computed
together.
"""

from __future__ import annotations

import numpy as np

from cuflash.emulator.conversions import to_half
from cuflash.emulator.dtypes import F4, F8, I4, I8, U8

HALF_BITS, HALF_TIE = np.uint64(0x1FFFFFFF), np.uint64(0x10000000)  # of a float64 beside a float32
TINY32 = np.float32(2.0**-126)


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormal float32 to zero of the same sign (.ftz)."""
    small = np.abs(x) < TINY32
    if not small.any():
        return x
    return np.where(small, np.copysign(np.float32(0), x), x)


def saturate(x: np.ndarray) -> np.ndarray:
    """Clamp to [0, 1]; NaN becomes 0."""
    return np.where(x > 0, np.minimum(x, x.dtype.type(1)), x.dtype.type(0))


def multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """float32 a·b + c with one rounding. The product is exact in float64; only a sum that lands on a tie needs more
    care."""
    a, b, c = (np.asarray(x).astype(F8) for x in (a, b, c))
    total = a * b + c
    result = total.astype(F4)
    doubtful = ((total.view(U8) & HALF_BITS) == HALF_TIE) | (np.abs(result) <= TINY32)
    if doubtful.any():
        result = np.where(doubtful, odd_sum(a * b, c).astype(F4), result)
    return result


def odd_sum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float64 a + b rounded to odd, so that a second rounding to a shorter type is the only one."""
    total = a + b
    part = total - a
    error = (a - (total - part)) + (b - part)
    bits = np.asarray(total).view(I8)
    inexact = (error != 0) & np.isfinite(total) & (bits & 1 == 0)
    step = np.where((error > 0) == (total > 0), 1, -1)
    return np.where(inexact, (bits + step).view(F8), total)


def multiply_add64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """float64 a·b + c with one rounding (Boldo and Melquiond: error-free products and sums, then a sum rounded to
    odd)."""
    a, b, c = (np.asarray(x, F8) for x in (a, b, c))
    product = a * b
    plain = product + c
    split = 134217729.0
    a1 = a * split - (a * split - a)
    b1 = b * split - (b * split - b)
    a2, b2 = a - a1, b - b1
    low = a2 * b2 - (((product - a1 * b1) - a2 * b1) - a1 * b2)
    high_sum, low_sum = _two_sum(c, low)
    top, rest = _two_sum(product, high_sum)
    result = top + odd_sum(low_sum, rest)
    return np.where(np.isfinite(result), result, plain)


def directed(a: np.ndarray, b: np.ndarray, direction: str) -> np.ndarray:
    """float64 a + b to float32, rounded toward zero (rz), minus infinity (rm) or plus infinity (rp)."""
    exact = odd_sum(a, b)
    near = exact.astype(F4)
    up, down = near.astype(F8) > exact, near.astype(F8) < exact
    low = np.where(up, np.nextafter(near, np.float32(-np.inf)), near)
    high = np.where(down, np.nextafter(near, np.float32(np.inf)), near)
    result = {"rm": low, "rp": high, "rz": np.where(exact > 0, low, high)}[direction]
    return np.where(np.isfinite(exact), result, near)


def _two_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def multiply_add_half(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """float16 a·b + c with one rounding; float64 holds every intermediate exactly."""
    return to_half(np.asarray(a).astype(F8) * np.asarray(b).astype(F8) + np.asarray(c).astype(F8))


def multiply_add_bfloat(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """bfloat16 values (held as float32) a·b + c, rounded to odd in float32 so that the rounding to bfloat16 is the
    only one."""
    exact = odd_sum(np.asarray(a).astype(F8) * np.asarray(b).astype(F8), np.asarray(c).astype(F8))
    result = exact.astype(F4)
    bits = result.view(I4)
    back = result.astype(F8)
    inexact = (back != exact) & np.isfinite(result) & (bits & 1 == 0)
    step = np.where((exact > back) == (exact > 0), 1, -1).astype(I4)
    return np.where(inexact, (bits + step).view(F4), result)


def order_min(a: np.ndarray, b: np.ndarray, nan: bool) -> np.ndarray:
    """Minimum that orders -0 below +0; a NaN wins, or loses against a number."""
    result = np.minimum(a, b) if nan else np.fmin(a, b)
    zero = (result == 0) & (a == b)
    return np.where(zero & (np.signbit(a) | np.signbit(b)), -np.abs(result), result) if zero.any() else result


def order_max(a: np.ndarray, b: np.ndarray, nan: bool) -> np.ndarray:
    """Maximum that orders -0 below +0; a NaN wins, or loses against a number."""
    result = np.maximum(a, b) if nan else np.fmax(a, b)
    zero = (result == 0) & (a == b)
    return np.where(zero & ~(np.signbit(a) & np.signbit(b)), np.abs(result), result) if zero.any() else result


def reciprocal_root(x: np.ndarray) -> np.ndarray:
    return x.dtype.type(1) / np.sqrt(x)
