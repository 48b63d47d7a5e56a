"""Tiles of scores for BLAS: how large they are, their bias, and which of their elements the window hides."""

from __future__ import annotations

import numpy as np

from cuflash.problem import Problem

# OpenBLAS keeps a matrix product of up to 2 * 4 * 65536 multiply-adds and a matrix-vector product of fewer than
# 4 * 2304 on the calling thread.
MAX_PRODUCT = 2 * 4 * 65536 - 1
MAX_MATVEC = 4 * 2304 - 1

MAX_ROWS = 64  # queries of one product
MAX_KEYS = 512


def sum_dtype(problem: Problem) -> type:
    return np.float64 if problem.dtype == "float64" else np.float32


def keys_of_a_tile(rows: int, dim: int) -> int:
    """Keys of a tile whose products with `rows` queries of up to `dim` columns stay on the calling thread.

    A multiple of two AVX-512 registers where that costs few keys: BLAS's kernels have no tail then.
    """
    most = min(MAX_KEYS, MAX_MATVEC // rows, MAX_PRODUCT // max(1, dim) // rows)
    unit = 32 if most >= 96 else 8
    return max(8, most // unit * unit)


def groups_that_see(n: int, groups: int, rows: int, low: int | None, high: int | None) -> tuple[int, int]:
    """Groups [first, last) of `rows` rows that see some of n columns: row i sees columns i + low to i + high."""
    first = 0 if high is None else max(0, -high // rows)
    last = groups if low is None else min(groups, (n - 1 - low) // rows + 1)
    return first, last


def add_bias(s: np.ndarray, bias: np.ndarray) -> None:
    """S += bias (queries of s less the padding, keys); a broadcast axis is read once."""
    count = len(bias)
    bias = bias[tuple(slice(1) if stride == 0 else slice(None) for stride in bias.strides)]
    s.reshape(-1, s.shape[2])[:count] += bias.astype(s.dtype, copy=False)


def hide(s: np.ndarray, low: int | None, high: int | None, first: int, value: float) -> None:
    """Set s (groups, rows, n) to `value` outside of the window: row i of the item sees columns i + low to i + high.

    `first` is the item's group with which s begins.
    """
    groups, rows, n = s.shape
    if high is not None:
        high += first * rows
        end = min(groups, -(-(n - 1 - high) // rows))  # rows from n - 1 - high on see every column
        if end > 0:
            np.copyto(s[:end], value, where=_by_diagonal(np.arange(1 - end * rows, n) > high, (end, rows, n)))
    if low is not None:
        low += first * rows
        begin = max(0, (1 - low) // rows)  # rows up to -low see every column
        if begin < groups:
            shape = (groups - begin, rows, n)
            hidden = np.arange(1 - shape[0] * rows, n) < low + begin * rows
            np.copyto(s[begin:], value, where=_by_diagonal(hidden, shape))


def _by_diagonal(diagonals: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """A Toeplitz view (groups, rows, n): row i, counted over the groups, and column j have the element of j - i."""
    groups, rows, _ = shape
    return np.ndarray(shape, bool, diagonals, groups * rows - 1, (-rows, -1, 1))
