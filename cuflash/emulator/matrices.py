"""Matrix products of warps.

Fragments are registers, arrays that broadcast to Lanes.shape; matrices are (number of warps, rows, columns).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cuflash.emulator.conversions import FLOAT8, halves, pack_half_pair
from cuflash.emulator.dtypes import F2, F4, F8, I4, U1, U2, U4, U8

if TYPE_CHECKING:
    from cuflash.emulator.lanes import Lanes

Registers = tuple[np.ndarray, ...]


def _stack(X: Lanes, registers: Registers, dtype: np.dtype) -> np.ndarray:
    """Registers as one array (warps, registers, 8 groups, 4 lanes)."""
    stacked = np.empty((X.warp_count, len(registers), 32), dtype)
    for k, register in enumerate(registers):
        if np.shape(register) != X.shape:
            register = np.broadcast_to(register, X.shape)
        stacked[:, k] = register.reshape(-1, 32)
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


HALF_EXPONENT = np.float32(2.0**112)


def _widen_half(words: np.ndarray) -> np.ndarray:
    """float32 of float16 pairs: all low halves of a row, then all high ones (the order along k does not matter to a
    product).

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


def _widen_bfloat(words: np.ndarray) -> np.ndarray:
    """float32 of bfloat16 pairs, in the same order."""
    wide = np.empty((*words.shape[:-1], 2, words.shape[-1]), U4)
    np.left_shift(words, np.uint32(16), out=wide[..., 0, :])
    np.bitwise_and(words, np.uint32(0xFFFF0000), out=wide[..., 1, :])
    return wide.reshape(*words.shape[:-1], -1).view(F4)


def left_f16(X: Lanes, registers: Registers, rows: int, depth: int) -> np.ndarray:
    return _widen_half(_left_words(X, registers, U4))


def right_f16(X: Lanes, registers: Registers, columns: int, depth: int) -> np.ndarray:
    return _widen_half(_right_words(X, registers, U4)).transpose(0, 2, 1)


def left_bf16(X: Lanes, registers: Registers, rows: int, depth: int) -> np.ndarray:
    return _widen_bfloat(_left_words(X, registers, U4))


def right_bf16(X: Lanes, registers: Registers, columns: int, depth: int) -> np.ndarray:
    return _widen_bfloat(_right_words(X, registers, U4)).transpose(0, 2, 1)


def left_tf32(X: Lanes, registers: Registers, rows: int, depth: int) -> np.ndarray:
    """float64, which holds products and nearly all their sums exactly. The low thirteen bits of a float32 do not take
    part."""
    return (_left_words(X, registers, U4) & np.uint32(0xFFFFE000)).view(F4).astype(F8)


def right_tf32(X: Lanes, registers: Registers, columns: int, depth: int) -> np.ndarray:
    return (_right_words(X, registers, U4) & np.uint32(0xFFFFE000)).view(F4).astype(F8).transpose(0, 2, 1)


def left_e4m3(X: Lanes, registers: Registers, rows: int, depth: int) -> np.ndarray:
    return FLOAT8["e4m3"][_left_words(X, registers, U4).view(U1)]


def right_e4m3(X: Lanes, registers: Registers, columns: int, depth: int) -> np.ndarray:
    return FLOAT8["e4m3"][_right_words(X, registers, U4).view(U1)].transpose(0, 2, 1)


def left_e5m2(X: Lanes, registers: Registers, rows: int, depth: int) -> np.ndarray:
    return FLOAT8["e5m2"][_left_words(X, registers, U4).view(U1)]


def right_e5m2(X: Lanes, registers: Registers, columns: int, depth: int) -> np.ndarray:
    return FLOAT8["e5m2"][_right_words(X, registers, U4).view(U1)].transpose(0, 2, 1)


def left_f64(X: Lanes, registers: Registers, rows: int, depth: int) -> np.ndarray:
    if rows == 8:
        return _right_words(X, registers, F8)
    return _left_words(X, registers, F8)


def right_f64(X: Lanes, registers: Registers, columns: int, depth: int) -> np.ndarray:
    return _right_words(X, registers, F8).transpose(0, 2, 1)


def multiply(
    X: Lanes, left: np.ndarray, right: np.ndarray, start: Registers
) -> list[np.ndarray] | tuple[np.ndarray, ...]:
    """left @ right + start; start and the result are accumulator registers: two columns per lane, rows group and
    group + 8."""
    product = np.matmul(left, right)
    parts = product.reshape(*X.shape[:2], product.shape[1] // 8, 32, 2)
    return [parts[:, :, k // 2, :, k % 2] + c for k, c in enumerate(start)]


SINGLE_BITS = np.uint64(0xFFFFFFFFE0000000)  # of a float64 that are a float32's too


def multiply_cut(X: Lanes, left: np.ndarray, right: np.ndarray, start: Registers) -> list[np.ndarray]:
    """multiply of float64 factors, each sum cut to float32 toward zero.

    So do tensor cores (Fasi et al. 2021, Ootomo and Yokota 2022), where it decides whether float32 made of TF32 is
    accurate: the errors of a chain of sums have one sign and add up. Cut once an instruction, the least that is known.
    """
    return [(x.view(U8) & SINGLE_BITS).view(F8).astype(F4) for x in multiply(X, left, right, start)]


def multiply_half(
    X: Lanes, left: np.ndarray, right: np.ndarray, start: Registers
) -> list[np.ndarray] | tuple[np.ndarray, ...]:
    """multiply with accumulators in pairs of float16."""
    wide = [halves(c).astype(F4) for c in start]
    sums = multiply(X, left, right, tuple(w[..., k] for w in wide for k in (0, 1)))
    return tuple(pack_half_pair(sums[2 * k], sums[2 * k + 1]) for k in range(len(start)))


def transpose_matrix(X: Lanes, value: np.ndarray) -> np.ndarray:
    """movmatrix: an 8 x 8 matrix of 16-bit elements in one register, transposed."""
    matrix = np.ascontiguousarray(np.broadcast_to(value, X.shape)).view(U2).reshape(-1, 8, 8)
    return np.ascontiguousarray(matrix.swapaxes(1, 2)).view(U4).reshape(X.shape)
