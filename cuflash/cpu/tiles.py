"""Tiles of scores for BLAS: how large they are, and their bias."""

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


def add_bias(s: np.ndarray, bias: np.ndarray) -> None:
    """S += bias (queries of s less the padding, keys); a broadcast axis is read once."""
    count = len(bias)
    bias = bias[tuple(slice(1) if stride == 0 else slice(None) for stride in bias.strides)]
    s.reshape(-1, s.shape[2])[:count] += bias.astype(s.dtype, copy=False)
