"""Integer arithmetic of PTX that NumPy has no ufunc for.

Arguments are arrays whose shapes broadcast, or NumPy scalars; results do not depend on how many elements are computed
together.
"""

from __future__ import annotations

import numpy as np

from cuflash.emulator.dtypes import I8, U4, U8


def high_product(a: np.ndarray, b: np.ndarray, kind: str) -> np.ndarray:
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


def divide(a: np.ndarray, b: np.ndarray, kind: str) -> np.ndarray:
    """Integer quotient rounded toward zero; division by zero gives all ones, as the hardware does."""
    zero = b == 0
    divisor = np.where(zero, b.dtype.type(1), b)
    if kind[0] == "u":
        quotient = a // divisor
    else:
        quotient = a // divisor
        quotient = quotient + ((quotient * divisor != a) & ((a < 0) != (divisor < 0))).astype(quotient.dtype)
    return np.where(zero, np.array(-1).astype(b.dtype), quotient).astype(b.dtype)


def remainder(a: np.ndarray, b: np.ndarray, kind: str) -> np.ndarray:
    """Integer remainder with the sign of the dividend; by zero, the dividend."""
    divisor = np.where(b == 0, b.dtype.type(1), b)
    return np.where(b == 0, a, a - divide(a, divisor, kind) * divisor).astype(b.dtype)


def shift_left(a: np.ndarray, count: np.ndarray) -> np.ndarray:
    return a << np.minimum(count, np.uint32(8 * a.dtype.itemsize)).astype(a.dtype)


def shift_right(a: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Logical or arithmetic by the type of a; counts past the width are clamped."""
    return a >> np.minimum(count, np.uint32(8 * a.dtype.itemsize)).astype(a.dtype)


def funnel_left(low: np.ndarray, high: np.ndarray, count: np.ndarray, wrap: bool) -> np.ndarray:
    count = (count & np.uint32(31) if wrap else np.minimum(count, np.uint32(32))).astype(U8)
    both = (np.asarray(high).astype(U8) << np.uint64(32)) | low
    return ((both << count) >> np.uint64(32)).astype(U4)


def funnel_right(low: np.ndarray, high: np.ndarray, count: np.ndarray, wrap: bool) -> np.ndarray:
    count = (count & np.uint32(31) if wrap else np.minimum(count, np.uint32(32))).astype(U8)
    both = (np.asarray(high).astype(U8) << np.uint64(32)) | low
    return (both >> count).astype(U4)


def lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: int) -> np.ndarray:
    """Any bitwise function of three operands, as a sum of its minterms."""
    table = int(table)
    simple = {
        0xC0: lambda: a & b,
        0x3C: lambda: a ^ b,
        0xFC: lambda: a | b,
        0x96: lambda: a ^ b ^ c,
        0xFE: lambda: a | b | c,
        0x80: lambda: a & b & c,
        0xEA: lambda: (a & b) | c,
        0xF8: lambda: a | (b & c),
        0x6A: lambda: (a & b) ^ c,
        0x78: lambda: a ^ (b & c),
        0xCA: lambda: (a & b) | (~a & c),
        0xE8: lambda: (a & b) | (c & (a | b)),
    }
    if table in simple:
        return simple[table]()
    result = (a ^ a) & b & c
    for k in range(8):
        if table >> k & 1:
            result = result | ((a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c))
    return result


def bit_field(a: np.ndarray, start: np.ndarray, length: np.ndarray, kind: str) -> np.ndarray:
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
    fill = fill | np.where(
        missing > 0, shift_left(full, np.maximum(length.astype(I8) - missing, 0).astype(U4)), unsigned.type(0)
    )
    return np.where(sign != 0, field | fill, field).astype(unsigned).view(a.dtype)


def insert_field(a: np.ndarray, b: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """bfi: b with `length` bits from position `start` replaced by the low bits of a."""
    full = np.array(-1).astype(b.dtype)
    start, length = start & np.uint32(255), length & np.uint32(255)
    mask = shift_left(~shift_left(full, length), start)
    return (b & ~mask) | (shift_left(a, start) & mask)


def population(a: np.ndarray) -> np.ndarray:
    return np.bitwise_count(a).astype(U4)


def leading_zeros(a: np.ndarray) -> np.ndarray:
    width = 8 * a.dtype.itemsize
    for shift in (1, 2, 4, 8, 16, 32)[: 5 if width == 32 else 6]:
        a = a | (a >> a.dtype.type(shift))
    return (np.uint32(width) - np.bitwise_count(a).astype(U4)).astype(U4)


def reverse_bits(a: np.ndarray) -> np.ndarray:
    width = a.dtype.itemsize
    swapped = a.byteswap()
    for shift, pattern in ((4, 0x0F), (2, 0x33), (1, 0x55)):
        mask = np.frombuffer(bytes([pattern]) * width, a.dtype)[0]
        shift = a.dtype.type(shift)
        swapped = ((swapped & mask) << shift) | ((swapped >> shift) & mask)
    return swapped


def find_bit(a: np.ndarray, kind: str, amount: bool) -> np.ndarray:
    """bfind: position of the highest bit that differs from the sign (or is one); none gives all ones."""
    unsigned = np.dtype(f"u{a.dtype.itemsize}")
    value = np.where(a < 0, ~a, a).astype(a.dtype).view(unsigned) if kind[0] == "i" else a
    zeros = leading_zeros(np.asarray(value))
    width = np.uint32(8 * a.dtype.itemsize)
    return np.where(zeros == width, np.uint32(0xFFFFFFFF), zeros if amount else width - np.uint32(1) - zeros).astype(U4)


def permute_bytes(a: np.ndarray, b: np.ndarray, selector: np.ndarray, mode: str | None) -> np.ndarray:
    """prmt: choose four bytes of the pair (a, b)."""
    both = np.asarray(a).astype(U8) | (np.asarray(b).astype(U8) << np.uint64(32))
    control = selector & np.uint32(3)
    result = np.zeros((), np.uint32)
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
