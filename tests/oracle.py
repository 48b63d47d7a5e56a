"""The one oracle of all tests: attention in float64 with every score in memory, and standard attention in a dtype.

Written from the definition and independent of the product's code: plain loops over batch entries and heads,
visibility as a boolean matrix. Arrays are NumPy arrays of any float dtype (ml_dtypes included).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Result(NamedTuple):
    """out shaped like q with v's head_dim; lse (batch, heads, seqlen_q), without the axes that q lacks."""

    out: np.ndarray
    lse: np.ndarray


class _Format(NamedTuple):
    """Arithmetic: operations run in `compute` and their results are rounded by `round`."""

    compute: type
    round: Callable[[np.ndarray], np.ndarray]


EXACT = _Format(np.float64, lambda x: x)


def visible(seqlen_q: int, seqlen_k: int, causal: bool = False, window: tuple | None = None) -> np.ndarray:
    """Boolean (seqlen_q, seqlen_k): which keys each query sees; diagonals are aligned to the bottom right."""
    row, column = np.ogrid[:seqlen_q, :seqlen_k]
    diagonal = row + (seqlen_k - seqlen_q)
    seen = np.ones((seqlen_q, seqlen_k), bool)
    left, right = window or (None, None)
    if causal:
        seen &= column <= diagonal
    if right is not None:
        seen &= column <= diagonal + right
    if left is not None:
        seen &= column >= diagonal - left
    return seen


def _one_head(q, k, v, bias, seen, scale, softcap, fmt: _Format) -> Result:
    """q (m, d), k (n, d), v (n, dv), bias and seen (m, n) -> out (m, dv), lse (m,) in fmt.compute."""
    v = np.where(seen.any(axis=0)[:, None], v, 0)  # what no query sees may be NaN
    with np.errstate(invalid="ignore", over="ignore"):
        if fmt is EXACT:
            s = (q @ k.T) * scale
        else:
            s = fmt.round(fmt.round(q * fmt.compute(scale)) @ k.T)
        if softcap:
            s = fmt.round(softcap * np.tanh(s / softcap))
        if bias is not None:
            s = fmt.round(s + bias)
    s = np.where(seen, s, -np.inf)
    m = s.max(axis=1, initial=-np.inf)
    m = np.where(np.isneginf(m), 0, m)
    p = np.exp(s - m[:, None])
    total = p.sum(axis=1)
    empty = total == 0
    p = fmt.round(p / np.where(empty, 1, total)[:, None])
    with np.errstate(divide="ignore"):
        return Result(fmt.round(p @ v), m + np.log(total))


def _attention(q, k, v, causal, window, bias, scale, softcap, fmt: _Format) -> Result:
    missing = 4 - q.ndim
    if q.ndim == 2:
        q, k, v = q[:, None], k[:, None], v[:, None]
    if q.ndim == 3:
        q, k, v = q[None], k[None], v[None]
    q, k, v = (np.asarray(x).astype(fmt.compute) for x in (q, k, v))
    batch, seqlen_q, heads, dim = q.shape
    seqlen_k, group = k.shape[1], heads // k.shape[2] if k.shape[2] else 1
    scale = dim**-0.5 if scale is None else scale
    if bias is not None:
        bias = np.broadcast_to(np.asarray(bias), (batch, heads, seqlen_q, seqlen_k))
    seen = visible(seqlen_q, seqlen_k, causal, window)
    out = np.zeros((batch, seqlen_q, heads, v.shape[3]), fmt.compute)
    lse = np.full((batch, heads, seqlen_q), -np.inf, fmt.compute)
    for b in range(batch):
        for h in range(heads):
            own = None if bias is None else bias[b, h].astype(fmt.compute)
            out[b, :, h], lse[b, h] = _one_head(
                q[b, :, h], k[b, :, h // group], v[b, :, h // group], own, seen, scale, softcap, fmt
            )
    if missing >= 1:
        out, lse = out[0], lse[0]
    if missing == 2:
        out, lse = out[:, 0], lse[0]
    return Result(out, lse)


def attention(q, k, v, *, causal=False, window=None, bias=None, scale=None, softcap=None) -> Result:
    """Attention in float64; arguments mean what they mean in `cuflash.attention`."""
    return _attention(q, k, v, causal, window, bias, scale, softcap, EXACT)


def standard(q, k, v, *, causal=False, window=None, bias=None, scale=None, softcap=None, dtype=None) -> Result:
    """Standard attention as a framework computes it in `dtype` (default q's): each result rounded to it.

    Products of 16-bit numbers are summed in float32. lse is not rounded below float32.
    """
    dtype = np.dtype(q.dtype if dtype is None else dtype)
    compute = np.float64 if dtype == np.float64 else np.float32
    fmt = _Format(compute, lambda x: x.astype(dtype).astype(compute))
    return _attention(q, k, v, causal, window, bias, scale, softcap, fmt)


def over_sequences(function: Callable[..., Result], q, k, v, cu_seqlens_q, cu_seqlens_k, **keywords) -> Result:
    """`attention` or `standard` for each sequence of packed arrays (tokens, heads, dim); lse is (heads, tokens).

    Rows that belong to no sequence give 0 and -inf.
    """
    out = np.zeros((*q.shape[:2], v.shape[2]))
    lse = np.full((q.shape[1], q.shape[0]), -np.inf)
    q_edges, k_edges = (np.asarray(edges).tolist() for edges in (cu_seqlens_q, cu_seqlens_k))
    for i in range(len(q_edges) - 1):
        rows, columns = slice(*q_edges[i : i + 2]), slice(*k_edges[i : i + 2])
        out[rows], lse[:, rows] = function(q[rows], k[columns], v[columns], **keywords)
    return Result(out, lse)
