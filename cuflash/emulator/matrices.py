"""Matrix products of warps.

Fragments are registers, arrays that broadcast to Lanes.shape.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cuflash.emulator.conversions import FLOAT8, halves, pack_half_pair
from cuflash.emulator.dtypes import F4, F8, I2, I4, U2, U4, U8

if TYPE_CHECKING:
    from cuflash.emulator.lanes import Lanes

Registers = tuple[np.ndarray, ...]


def _stack(X: Lanes, registers: Registers, dtype: np.dtype) -> np.ndarray:
    """Registers as one array (warps, registers, 8 groups, 4 lanes)."""
    stacked = np.empty((*X.shape[:2], len(registers), 32), dtype)
    for k, register in enumerate(registers):
        stacked[:, :, k] = register
    return stacked.reshape(-1, len(registers), 8, 4)


def _left_words(X: Lanes, registers: Registers, dtype: np.dtype) -> np.ndarray:
    """A: (warps, 16 rows, words): register r holds rows group + 8·(r % 2), words lane % 4 + 4·(r // 2)."""
    words = _stack(X, registers, dtype)
    half = len(registers) // 2
    return words.reshape(-1, half, 2, 8, 4).transpose(0, 2, 3, 1, 4).reshape(-1, 16, 4 * half)


def _right_words(X: Lanes, registers: Registers, dtype: np.dtype) -> np.ndarray:
    """B transposed: (warps, 8 columns, words): register r holds words lane % 4 + 4·r of column group."""
    words = _stack(X, registers, dtype)
    return words.transpose(0, 2, 1, 3).reshape(-1, 8, 4 * len(registers))


# --- float32 sums -----------------------------------------------------------------------------------------------------
#
# A lane has four sums: rows group and group + 8, columns 2·(lane % 4) and the next. Factors lie as the sums do, behind
# the depth: A (depth, 2 rows, 1, lanes), B (depth, 1, 2 columns, lanes), so that every step is one long loop.


class Factor(NamedTuple):
    """float32 numbers, and their exponents as a float32 has them, biased by 127."""

    value: np.ndarray
    exponent: np.ndarray  # int16


NO_EXPONENT, NOT_FINITE = np.int16(-600), np.int16(1000)  # of zero; of infinity and NaN


def _exponents(value: np.ndarray) -> np.ndarray:
    return (value.view(U4) >> np.uint32(23)).astype(I2) & np.int16(0xFF)


def _factor(value: np.ndarray, exponent: np.ndarray, left: bool) -> Factor:
    """The factor of numbers (depth, rows or columns, warps) and their exponents."""
    if exponent.min() == 0 or exponent.max() == 0xFF:
        small = np.where(value == 0, NO_EXPONENT, np.int16(1))
        exponent = np.where(exponent == 0, small, np.where(exponent == 0xFF, NOT_FINITE, exponent))
    spread = _rows_of_lanes if left else _columns_of_lanes
    return Factor(spread(value), spread(exponent))


def _rows_of_lanes(x: np.ndarray) -> np.ndarray:
    """(depth, 16, warps) to (depth, 2, 1, lanes)."""
    depth, _, warps = x.shape
    return np.repeat(x.reshape(depth, 2, 8, warps).swapaxes(2, 3), 4, axis=3).reshape(depth, 2, 1, -1)


def _columns_of_lanes(x: np.ndarray) -> np.ndarray:
    """(depth, 8, warps) to (depth, 1, 2, lanes); the four of a group are repeated as one wide number."""
    depth, _, warps = x.shape
    fours = np.ascontiguousarray(x.reshape(depth, 4, 2, warps).transpose(0, 2, 3, 1))
    wide = fours.view(np.complex128 if x.itemsize == 4 else np.int64)
    return np.repeat(wide, 8, axis=3).view(x.dtype).reshape(depth, 1, 2, -1)


def _words(X: Lanes, registers: Registers, left: bool) -> np.ndarray:
    """Words of a factor (depth in words, rows or columns, warps)."""
    return (_left_words if left else _right_words)(X, registers, U4).T


HALF_EXPONENT = np.float32(2.0**112)


def factor_f16(X: Lanes, registers: Registers, left: bool) -> Factor:
    """Sign, exponent and mantissa move to their places in a float32, whose exponent is then too small by 112."""
    words = _words(X, registers, left)
    bits = np.concatenate([words << np.uint32(16), words & np.uint32(0xFFFF0000)]).view(I4)
    bits >>= 3
    bits &= np.int32(-1879056384)  # 0x8FFFE000
    value = bits.view(F4) * HALF_EXPONENT
    exponent = _exponents(value)
    if exponent.max() == 143:  # an exponent of all ones: infinity or NaN
        value = np.concatenate([*np.moveaxis(halves(words), -1, 0)]).astype(F4)
        exponent = _exponents(value)
    return _factor(value, exponent, left)


def _factor_of_bits(bits: np.ndarray, left: bool) -> Factor:
    value = bits.view(F4)
    return _factor(value, _exponents(value), left)


def factor_bf16(X: Lanes, registers: Registers, left: bool) -> Factor:
    words = _words(X, registers, left)
    return _factor_of_bits(np.concatenate([words << np.uint32(16), words & np.uint32(0xFFFF0000)]), left)


def factor_tf32(X: Lanes, registers: Registers, left: bool) -> Factor:
    """The low thirteen bits of a float32 do not take part."""
    return _factor_of_bits(_words(X, registers, left) & np.uint32(0xFFFFE000), left)


def _factor_float8(X: Lanes, registers: Registers, left: bool, kind: str) -> Factor:
    """The two low bytes of all words come before the two high ones."""
    words = _words(X, registers, left)
    patterns = np.concatenate([words >> np.uint32(k) & np.uint32(0xFF) for k in (0, 8, 16, 24)])
    return _factor_of_bits(FLOAT8[kind][patterns], left)


def factor_e4m3(X: Lanes, registers: Registers, left: bool) -> Factor:
    return _factor_float8(X, registers, left, "e4m3")


def factor_e5m2(X: Lanes, registers: Registers, left: bool) -> Factor:
    return _factor_float8(X, registers, left, "e5m2")


KEPT_BITS = 25  # of a term, below the largest exponent
SMALLEST, LARGEST = 254 - 102, 254 + 127  # exponents, biased twice, for which scales and products are float32
_EXPONENTS = np.arange(2 * int(NOT_FINITE) + 1) - 254 - KEPT_BITS
UNITS = np.exp2(np.minimum(_EXPONENTS, 1000.0))  # by twice biased exponent: float64 of the last bit kept
SCALES = np.exp2(np.clip(-_EXPONENTS, -126.0, 127.0)).astype(F4)
HALVES, ZERO = (slice(16), slice(16, 32)), np.zeros((), F4)
SINGLE_BITS = np.uint64(0xFFFFFFFFE0000000)  # of a float64 that are a float32's too


def _space(X: Lanes, shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Arrays that every product writes anew: fresh memory would cost more than the arithmetic."""
    spaces = X.machine.spaces
    if shape not in spaces:
        spaces[shape] = tuple(np.empty(shape, dtype) for dtype in (F4, I4, I2))
    return spaces[shape]


def multiply(X: Lanes, left: Factor, right: Factor, start: Registers) -> list[np.ndarray]:
    """left @ right + start as the tensor cores of an H200 add, bit for bit (docs/float32-on-tensor-cores.md).

    Products are exact. They and start are aligned to the largest exponent among them, a product's being the sum of its
    factors'; of each, what lies more than 25 bits below is cut off; their sum is exact and cut to float32.
    Exponents below -102 count as -102: of a result below 2^-102 much may be lost.
    """
    depth, lanes = len(left.value), left.value.shape[3]
    terms, whole, exponents = _space(X, (depth + 1, 2, 2, lanes))
    first = terms[depth].reshape(2, 2, *X.shape)
    for k, c in enumerate(start):
        first[k // 2, k % 2] = c
    exponents[depth] = (terms[depth].view(I4) >> 23 & 0xFF) + 127
    np.add(left.exponent, right.exponent, out=exponents[:depth])
    largest = np.maximum(exponents.max(axis=0), SMALLEST)
    np.multiply(left.value, right.value, out=terms[:depth])
    terms *= SCALES.take(largest)
    np.copyto(whole, terms, casting="unsafe")  # cuts
    while depth > 2:  # up to eight terms below 2^27 each, and start's below 2^26, fit in an int32
        depth //= 2
        whole[:depth] += whole[depth : 2 * depth]
    whole[0] += whole[-1]
    total = np.add(whole[0], whole[1], dtype=F8) * UNITS.take(largest)
    result = (total.view(U8) & SINGLE_BITS).view(F8).astype(F4)
    if largest.max() >= LARGEST:  # infinity, NaN, overflow
        plain = (left.value.astype(F8) * right.value).sum(axis=0)
        for k, c in enumerate(start):
            plain.reshape(first.shape)[k // 2, k % 2] += c
        result = np.where(largest >= LARGEST, plain.astype(F4), result)
    result = result.reshape(first.shape)
    return [result[k // 2, k % 2] for k in range(4)]


def multiply_float8(X: Lanes, left: Factor, right: Factor, start: Registers) -> list[np.ndarray]:
    """multiply as the assembler writes it for sm_90: two products of float16 on zero, and an addition."""
    low, high = ((Factor(*(x[part] for x in left)), Factor(*(x[part] for x in right))) for part in HALVES)
    sums = multiply(X, *high, tuple(multiply(X, *low, (ZERO,) * 4)))
    return [x + c for x, c in zip(sums, start, strict=True)]


def multiply_half(X: Lanes, left: Factor, right: Factor, start: Registers) -> tuple[np.ndarray, ...]:
    """multiply with accumulators in pairs of float16."""
    wide = [halves(c).astype(F4) for c in start]
    sums = multiply(X, left, right, tuple(w[..., k] for w in wide for k in (0, 1)))
    return tuple(pack_half_pair(sums[2 * k], sums[2 * k + 1]) for k in range(len(start)))


# --- float64 sums -----------------------------------------------------------------------------------------------------


def left_f64(X: Lanes, registers: Registers) -> np.ndarray:
    """A (warps, 16, depth)."""
    return _left_words(X, registers, F8)


def right_f64(X: Lanes, registers: Registers) -> np.ndarray:
    """B transposed, or A of eight rows: (warps, 8, depth)."""
    return _right_words(X, registers, F8)


def multiply_f64(X: Lanes, left: np.ndarray, right: np.ndarray, start: Registers) -> list[np.ndarray]:
    """left @ right + start, summed in the order of NumPy's library; a GPU adds them in turn, each rounded."""
    product = np.matmul(left, right)
    parts = product.reshape(*X.shape[:2], product.shape[1] // 8, 32, 2)
    return [parts[:, :, k // 2, :, k % 2] + c for k, c in enumerate(start)]


def transpose_matrix(X: Lanes, value: np.ndarray) -> np.ndarray:
    """movmatrix: an 8 x 8 matrix of 16-bit elements in one register, transposed."""
    matrix = np.ascontiguousarray(np.broadcast_to(value, X.shape)).view(U2).reshape(-1, 8, 8)
    return np.ascontiguousarray(matrix.swapaxes(1, 2)).view(U4).reshape(X.shape)
