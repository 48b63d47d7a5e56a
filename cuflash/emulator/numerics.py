"""Arithmetic that NumPy has no ufunc for. Everything here is elementwise and is the vocabulary of translated blocks.

Arguments are arrays whose shapes broadcast, or scalars. Nothing here depends on how many threads are computed together.
"""

from __future__ import annotations

import numpy as np

U1, U2, U4, U8 = (np.dtype(f"u{w}") for w in (1, 2, 4, 8))
I1, I2, I4, I8 = (np.dtype(f"i{w}") for w in (1, 2, 4, 8))
F2, F4, F8 = (np.dtype(f"f{w}") for w in (2, 4, 8))
TRUE, FALSE = np.array(True), np.array(False)

minimum, maximum, fmin, fmax, where = np.minimum, np.maximum, np.fmin, np.fmax, np.where
sqrt, exp2, log2, tanh, sin, cos, copysign = np.sqrt, np.exp2, np.log2, np.tanh, np.sin, np.cos, np.copysign
isnan, isinf, isfinite, rint, trunc, floor, ceil = np.isnan, np.isinf, np.isfinite, np.rint, np.trunc, np.floor, np.ceil

SIGN32, HALF_BITS, HALF_TIE = np.uint32(0x80000000), np.uint64(0x1FFFFFFF), np.uint64(0x10000000)
TINY32 = np.float32(2.0**-126)
NAN32, NAN16 = np.uint32(0x7FFFFFFF), np.uint16(0x7FFF)


def choose(condition, first, second):
    """first where the condition holds, else second."""
    if np.ndim(condition) == 0:
        return first if condition else second
    return np.where(condition, first, second)


# --- integers


def high_product(a, b, kind):
    """Upper half of a product (mul.hi)."""
    a, b = np.asarray(a), np.asarray(b)
    if a.dtype.itemsize < 8:
        wide = np.dtype(f"{kind[0]}{2 * a.dtype.itemsize}")
        return (a.astype(wide) * b.astype(wide) >> 8 * a.dtype.itemsize).astype(a.dtype)
    low, thirty_two = np.uint64(0xFFFFFFFF), np.uint64(32)
    x, y = a.view(U8), b.view(U8)
    x0, x1, y0, y1 = x & low, x >> thirty_two, y & low, y >> thirty_two
    middle = x1 * y0 + (x0 * y0 >> thirty_two)
    other = (middle & low) + x0 * y1
    high = x1 * y1 + (middle >> thirty_two) + (other >> thirty_two)
    if kind[0] == "i":
        high = high - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    return high.view(a.dtype)


def divide(a, b, kind):
    """Integer quotient rounded toward zero; division by zero gives all ones, as the hardware does."""
    zero = b == 0
    divisor = np.where(zero, b.dtype.type(1), b)
    if kind[0] == "u":
        quotient = a // divisor
    else:
        quotient = a // divisor
        quotient = quotient + ((quotient * divisor != a) & ((a < 0) != (divisor < 0))).astype(quotient.dtype)
    return np.where(zero, np.array(-1).astype(b.dtype), quotient).astype(b.dtype)


def remainder(a, b, kind):
    """Integer remainder with the sign of the dividend; by zero, the dividend."""
    divisor = np.where(b == 0, b.dtype.type(1), b)
    return np.where(b == 0, a, a - divide(a, divisor, kind) * divisor).astype(b.dtype)


def shift_left(a, count):
    return a << np.minimum(count, np.uint32(8 * a.dtype.itemsize)).astype(a.dtype)


def shift_right(a, count):
    """Logical or arithmetic by the type of a; counts past the width are clamped."""
    return a >> np.minimum(count, np.uint32(8 * a.dtype.itemsize)).astype(a.dtype)


def funnel_left(low, high, count, wrap):
    count = (count & np.uint32(31) if wrap else np.minimum(count, np.uint32(32))).astype(U8)
    both = (np.asarray(high).astype(U8) << np.uint64(32)) | low
    return ((both << count) >> np.uint64(32)).astype(U4)


def funnel_right(low, high, count, wrap):
    count = (count & np.uint32(31) if wrap else np.minimum(count, np.uint32(32))).astype(U8)
    both = (np.asarray(high).astype(U8) << np.uint64(32)) | low
    return (both >> count).astype(U4)


def lop3(a, b, c, table):
    """Any bitwise function of three operands, as a sum of its minterms."""
    table = int(table)
    simple = {0xC0: lambda: a & b, 0x3C: lambda: a ^ b, 0xFC: lambda: a | b, 0x96: lambda: a ^ b ^ c, 0xFE: lambda: a | b | c,
              0x80: lambda: a & b & c, 0xEA: lambda: (a & b) | c, 0xF8: lambda: a | (b & c), 0xE0: lambda: a & (b | c),
              0x6A: lambda: (a & b) ^ c, 0x78: lambda: a ^ (b & c), 0xCA: lambda: (a & b) | (~a & c),
              0xE8: lambda: (a & b) | (c & (a | b))}  # fmt: skip
    if table in simple:
        return simple[table]()
    result = (a ^ a) & b & c
    for k in range(8):
        if table >> k & 1:
            result = result | ((a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c))
    return result


def bit_field(a, start, length, kind):
    """bfe: extract a bit field and extend it by the sign of the kind."""
    width = 8 * a.dtype.itemsize
    unsigned = np.dtype(f"u{a.dtype.itemsize}")
    start, length = np.asarray(start & np.uint32(255)), np.asarray(length & np.uint32(255))
    bits = shift_right(np.asarray(a).view(unsigned), start)
    full = np.array(-1).astype(unsigned)
    field = np.where(length >= width, bits, bits & ~shift_left(full, length))
    if kind[0] == "u":
        return field.astype(unsigned)
    top = np.minimum(start + length, np.uint32(width)) - np.uint32(1)
    sign = (shift_right(np.asarray(a).view(unsigned), top) & unsigned.type(1)) * (length > 0)
    fill = np.where(length >= width, unsigned.type(0), shift_left(full, length))
    # bits past the top of the word are filled with the sign as well
    missing = np.maximum(start.astype(I8) + length.astype(I8) - width, 0).astype(U4)
    fill = fill | np.where(missing > 0, shift_left(full, np.maximum(length.astype(I8) - missing, 0).astype(U4)), unsigned.type(0))
    return np.where(sign != 0, field | fill, field).astype(unsigned).view(a.dtype)


def insert_field(a, b, start, length):
    """bfi: b with `length` bits from position `start` replaced by the low bits of a."""
    full = np.array(-1).astype(b.dtype)
    start, length = start & np.uint32(255), length & np.uint32(255)
    mask = shift_left(~shift_left(full, length), start)
    return (b & ~mask) | (shift_left(a, start) & mask)


def population(a):
    return np.bitwise_count(a).astype(U4)


def leading_zeros(a):
    width = 8 * a.dtype.itemsize
    for shift in (1, 2, 4, 8, 16, 32)[: 5 if width == 32 else 6]:
        a = a | (a >> a.dtype.type(shift))
    return (np.uint32(width) - np.bitwise_count(a).astype(U4)).astype(U4)


def reverse_bits(a):
    width = a.dtype.itemsize
    swapped = a.byteswap()
    for shift, pattern in ((4, 0x0F), (2, 0x33), (1, 0x55)):
        mask = np.frombuffer(bytes([pattern]) * width, a.dtype)[0]
        shift = a.dtype.type(shift)
        swapped = ((swapped & mask) << shift) | ((swapped >> shift) & mask)
    return swapped


def find_bit(a, kind, amount):
    """bfind: position of the highest bit that differs from the sign (or is one); none gives all ones."""
    unsigned = np.dtype(f"u{a.dtype.itemsize}")
    value = np.where(a < 0, ~a, a).astype(a.dtype).view(unsigned) if kind[0] == "i" else a
    zeros = leading_zeros(np.asarray(value))
    width = np.uint32(8 * a.dtype.itemsize)
    return np.where(zeros == width, np.uint32(0xFFFFFFFF), zeros if amount else width - np.uint32(1) - zeros).astype(U4)


def permute_bytes(a, b, selector, mode):
    """prmt: choose four bytes of the pair (a, b)."""
    both = np.asarray(a).astype(U8) | (np.asarray(b).astype(U8) << np.uint64(32))
    control = selector & np.uint32(3)
    result = np.uint32(0)
    for k in range(4):
        if mode is None:
            pick = (selector >> np.uint32(4 * k)) & np.uint32(15)
        elif mode == "f4e":
            pick = control + np.uint32(k)
        elif mode == "b4e":
            pick = (control - np.uint32(k)) & np.uint32(7)
        elif mode == "rc8":
            pick = control
        elif mode == "ecl":
            pick = np.maximum(control, np.uint32(k))
        elif mode == "ecr":
            pick = np.minimum(control, np.uint32(k))
        else:  # rc16
            pick = ((control & np.uint32(1)) << np.uint32(1)) + np.uint32(k & 1)
        byte = ((both >> ((pick & np.uint32(7)).astype(U8) << np.uint64(3))) & np.uint64(255)).astype(U4)
        if mode is None:
            sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
            byte = np.where(pick & np.uint32(8), sign, byte).astype(U4)
        result = result | (byte << np.uint32(8 * k))
    return result


# --- packed and short floating types


def halves(packed):
    """Pairs of float16 from 32-bit words: a new last axis of length 2, low half first."""
    return np.ascontiguousarray(packed)[..., None].view(F2)


def from_halves(pair):
    return np.ascontiguousarray(pair, F2).view(U4)[..., 0]


def bfloat(bits):
    """float32 value of bfloat16 bits."""
    return (np.asarray(bits).astype(U4) << np.uint32(16)).view(F4)


def bfloats(packed):
    packed = np.asarray(packed)
    return np.stack([(packed << np.uint32(16)).view(F4), (packed & np.uint32(0xFFFF0000)).view(F4)], axis=-1)


def to_bfloat(value):
    """bfloat16 bits of float32, rounded to nearest even; NaN becomes the canonical 0x7FFF."""
    bits = np.asarray(value, F4).view(U4)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    if np.isnan(value).any():
        rounded = np.where(np.isnan(value), np.uint32(0x7FFF), rounded)
    return rounded.astype(U2)


def from_bfloats(pair):
    low, high = to_bfloat(pair[..., 0]).astype(U4), to_bfloat(pair[..., 1]).astype(U4)
    return low | (high << np.uint32(16))


def pack16(low, high):
    """One 32-bit word from two 16-bit ones."""
    return np.asarray(low).astype(U4) | (np.asarray(high).astype(U4) << np.uint32(16))


def to_half(value):
    """float16 of float32 or float64, rounded to nearest even, with the canonical NaN 0x7FFF."""
    result = np.asarray(value).astype(F2)
    if np.isnan(result).any():
        result = np.where(np.isnan(result), NAN16.view(F2), result)
    return result


# --- floating point


def flush(x):
    """Subnormal float32 to zero of the same sign (.ftz)."""
    small = np.abs(x) < TINY32
    if not small.any():
        return x
    return np.where(small, np.copysign(np.float32(0), x), x)


def saturate(x):
    """Clamp to [0, 1]; NaN becomes 0."""
    return np.where(x > 0, np.minimum(x, x.dtype.type(1)), x.dtype.type(0))


def multiply_add(a, b, c):
    """float32 a·b + c with one rounding. The product is exact in float64; only a sum that lands on a tie needs more care."""
    a, b, c = (np.asarray(x).astype(F8) for x in (a, b, c))
    total = a * b + c
    result = total.astype(F4)
    doubtful = ((total.view(U8) & HALF_BITS) == HALF_TIE) | (np.abs(result) <= TINY32)
    if doubtful.any():
        result = np.where(doubtful, odd_sum(a * b, c).astype(F4), result)
    return result


def odd_sum(a, b):
    """float64 a + b rounded to odd, so that a second rounding to a shorter type is the only one."""
    total = a + b
    part = total - a
    error = (a - (total - part)) + (b - part)
    bits = np.asarray(total).view(I8)
    inexact = (error != 0) & np.isfinite(total) & (bits & 1 == 0)
    step = np.where((error > 0) == (total > 0), 1, -1)
    return np.where(inexact, (bits + step).view(F8), total)


def multiply_add64(a, b, c):
    """float64 a·b + c with one rounding (Boldo and Melquiond: error-free products and sums, then a sum rounded to odd)."""
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


def directed(a, b, direction):
    """float64 a + b to float32, rounded toward zero (rz), minus infinity (rm) or plus infinity (rp)."""
    exact = odd_sum(a, b)
    near = exact.astype(F4)
    up, down = near.astype(F8) > exact, near.astype(F8) < exact
    low = np.where(up, np.nextafter(near, np.float32(-np.inf)), near)
    high = np.where(down, np.nextafter(near, np.float32(np.inf)), near)
    result = {"rm": low, "rp": high, "rz": np.where(exact > 0, low, high)}[direction]
    return np.where(np.isfinite(exact), result, near)


def _two_sum(a, b):
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def multiply_add_half(a, b, c):
    """float16 a·b + c with one rounding; float64 holds every intermediate exactly."""
    return to_half(np.asarray(a).astype(F8) * np.asarray(b).astype(F8) + np.asarray(c).astype(F8))


def multiply_add_bfloat(a, b, c):
    """bfloat16 values (held as float32) a·b + c, rounded to odd in float32 so that the rounding to bfloat16 is the only one."""
    exact = odd_sum(np.asarray(a).astype(F8) * np.asarray(b).astype(F8), np.asarray(c).astype(F8))
    result = exact.astype(F4)
    bits = result.view(I4)
    back = result.astype(F8)
    inexact = (back != exact) & np.isfinite(result) & (bits & 1 == 0)
    step = np.where((exact > back) == (exact > 0), 1, -1).astype(I4)
    return np.where(inexact, (bits + step).view(F4), result)


def nan_min(a, b):
    return np.minimum(a, b)


def order_min(a, b):
    """Minimum that ignores a NaN and orders -0 below +0."""
    result = np.fmin(a, b)
    zero = (result == 0) & (a == b)
    return np.where(zero & (np.signbit(a) | np.signbit(b)), -np.abs(result), result) if zero.any() else result


def order_max(a, b):
    """Maximum that ignores a NaN and orders -0 below +0."""
    result = np.fmax(a, b)
    zero = (result == 0) & (a == b)
    return np.where(zero & ~(np.signbit(a) & np.signbit(b)), np.abs(result), result) if zero.any() else result


def reciprocal_root(x):
    return x.dtype.type(1) / np.sqrt(x)


# --- conversions

INT_RANGE = {f"{s}{w}": (np.iinfo(f"{s}{w}").min, np.iinfo(f"{s}{w}").max) for s in "iu" for w in (1, 2, 4, 8)}


def float_to_int(x, kind):
    """An integral float to an integer type, saturating; NaN becomes 0 (32 bits and less) or the largest magnitude bit (64)."""
    low, high = INT_RANGE[kind]
    x = np.asarray(x).astype(F8)
    top, bottom = x >= float(high), x <= float(low)
    inside = np.where(top | bottom | np.isnan(x), 0.0, x)
    result = inside.astype(kind) if kind != "u8" else inside.astype(U8)
    result = np.where(top, np.array(high, kind), np.where(bottom, np.array(low, kind), result))
    nan = np.array(1 << 63, U8).view(kind) if kind[1] == "8" else np.array(0, kind)
    return np.where(np.isnan(x), nan, result).astype(kind)


def saturate_int(x, kind):
    """An integer to a narrower or differently signed type, clamped to its range."""
    low, high = INT_RANGE[kind]
    x = np.asarray(x)
    have_low, have_high = INT_RANGE[f"{x.dtype.kind}{x.dtype.itemsize}"]
    return np.clip(x, max(low, have_low), min(high, have_high)).astype(kind)


def round_even(x):
    return np.rint(x)


def truncate32(x):
    """float64 to float32 rounded toward zero."""
    x = np.asarray(x).astype(F8)
    result = x.astype(F4)
    over = np.abs(result.astype(F8)) > np.abs(x)
    return np.where(over, np.nextafter(result, np.float32(0)), result)


def truncate_bfloat(value):
    """bfloat16 bits of float32 rounded toward zero."""
    bits = np.asarray(value, F4).view(U4) >> np.uint32(16)
    return np.where(np.isnan(value), np.uint32(0x7FFF), bits).astype(U2)


def truncate_half(value):
    """float16 of float32 rounded toward zero."""
    value = np.asarray(value)
    result = to_half(value)
    over = np.abs(result.astype(F8)) > np.abs(value.astype(F8))
    return np.where(over, np.nextafter(result, np.float16(0)), result)


def to_tf32(value):
    """TF32 of float32 (cvt.rna): ten bits of mantissa, ties away from zero."""
    bits = np.asarray(value, F4).view(U4)
    rounded = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(value), rounded, bits).astype(U4)


def odd_to_single(x):
    """float64 to float32 rounded to odd, before a further rounding to a short type."""
    x = np.asarray(x).astype(F8)
    result = x.astype(F4)
    bits = result.view(I4)
    back = result.astype(F8)
    inexact = (back != x) & np.isfinite(result) & (bits & 1 == 0)
    step = np.where(np.abs(x) > np.abs(back), 1, -1).astype(I4)
    return np.where(inexact, (bits + step).view(F4), result)


def pack_half_pair(low, high):
    """One word of two float16, each rounded to nearest even from float32."""
    return pack16(to_half(low).view(U2), to_half(high).view(U2))


def pack_bfloat_pair(low, high):
    """One word of two bfloat16, each rounded to nearest even from float32."""
    return pack16(to_bfloat(low), to_bfloat(high))


# --- matrices: fragments are (blocks, warps, 32) registers, matrices are (number of warps, rows, columns)


def _stack(X, registers, dtype):
    """Registers as one array (warps, registers, 8 groups, 4 lanes)."""
    stacked = np.empty((X.warp_count, len(registers), 32), dtype)
    for k, register in enumerate(registers):
        stacked[:, k] = np.broadcast_to(register, X.shape).reshape(-1, 32)
    return stacked.reshape(-1, len(registers), 8, 4)


def _left_words(X, registers, dtype):
    """A: (warps, 16 rows, words): register r holds rows group + 8·(r % 2), words lane % 4 + 4·(r // 2)."""
    words = _stack(X, registers, dtype)
    half = len(registers) // 2
    return words.reshape(-1, half, 2, 8, 4).transpose(0, 2, 3, 1, 4).reshape(-1, 16, 4 * half)


def _right_words(X, registers, dtype):
    """B transposed: (warps, 8 columns, words): register r holds words lane % 4 + 4·r of column group."""
    words = _stack(X, registers, dtype)
    return words.transpose(0, 2, 1, 3).reshape(-1, 8, 4 * len(registers))


HALF_EXPONENT = np.float32(2.0**112)


def _widen_half(words):
    """float32 of float16 pairs: all low halves of a row, then all high ones (the order along k does not matter to a product).

    Sign, exponent and mantissa move to their places in a float32, whose exponent is then too small by 112.
    """
    wide = np.empty((*words.shape[:-1], 2, words.shape[-1]), F4)
    for k, bits in enumerate((words << np.uint32(16), words & np.uint32(0xFFFF0000))):
        signed = bits.view(I4)
        signed >>= 3
        signed &= np.int32(-1879056384)  # 0x8FFFE000
        np.multiply(signed.view(F4), HALF_EXPONENT, out=wide[..., k, :])
    if wide.max() >= 65536 or wide.min() <= -65536:  # an exponent of all ones: infinity or NaN
        wide[...] = np.ascontiguousarray(words).view(F2).astype(F4).reshape(*words.shape, 2).swapaxes(-1, -2)
    return wide.reshape(*words.shape[:-1], -1)


def _widen_bfloat(words):
    """float32 of bfloat16 pairs, in the same order."""
    wide = np.empty((*words.shape[:-1], 2, words.shape[-1]), U4)
    np.left_shift(words, np.uint32(16), out=wide[..., 0, :])
    np.bitwise_and(words, np.uint32(0xFFFF0000), out=wide[..., 1, :])
    return wide.reshape(*words.shape[:-1], -1).view(F4)


def left_f16(X, registers, rows, depth):
    return _widen_half(_left_words(X, registers, U4))


def right_f16(X, registers, columns, depth):
    return _widen_half(_right_words(X, registers, U4)).transpose(0, 2, 1)


def left_bf16(X, registers, rows, depth):
    return _widen_bfloat(_left_words(X, registers, U4))


def right_bf16(X, registers, columns, depth):
    return _widen_bfloat(_right_words(X, registers, U4)).transpose(0, 2, 1)


def left_tf32(X, registers, rows, depth):
    """The low thirteen bits of a float32 do not take part."""
    return (_left_words(X, registers, U4) & np.uint32(0xFFFFE000)).view(F4)


def right_tf32(X, registers, columns, depth):
    return (_right_words(X, registers, U4) & np.uint32(0xFFFFE000)).view(F4).transpose(0, 2, 1)


def left_f64(X, registers, rows, depth):
    if rows == 8:
        return _right_words(X, registers, F8)
    return _left_words(X, registers, F8)


def right_f64(X, registers, columns, depth):
    return _right_words(X, registers, F8).transpose(0, 2, 1)


def multiply(X, left, right, start):
    """left @ right + start; start and the result are accumulator registers: two columns per lane, rows group and group + 8."""
    product = np.matmul(left, right)
    count, rows, _ = product.shape
    parts = product.reshape(count, rows // 8, 32, 2)
    shape = X.shape
    results = []
    for k, c in enumerate(start):
        part = parts[:, k // 2, :, k % 2]
        results.append((part + c.reshape(-1, 32)).reshape(shape) if np.shape(c) == shape else part.reshape(shape) + c)
    return results


def multiply_half(X, left, right, start):
    """multiply with accumulators in pairs of float16."""
    wide = [halves(c).astype(F4) for c in start]
    sums = multiply(X, left, right, tuple(w[..., k] for w in wide for k in (0, 1)))
    return tuple(pack_half_pair(sums[2 * k], sums[2 * k + 1]) for k in range(len(start)))


def transpose_matrix(X, value):
    """movmatrix: an 8 x 8 matrix of 16-bit elements in one register, transposed."""
    matrix = np.ascontiguousarray(np.broadcast_to(value, X.shape)).view(U2).reshape(-1, 8, 8)
    return np.ascontiguousarray(matrix.swapaxes(1, 2)).view(U4).reshape(X.shape)
