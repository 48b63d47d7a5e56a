"""The one oracle of all tests: attention in float64 with every score in memory, and standard attention in a dtype.

Written from the definition and independent of the product's code: plain loops over batch entries and heads,
visibility as a boolean matrix: by causal and window, and what `seen`, which broadcasts to (batch, heads, seqlen_q,
seqlen_k), leaves of it. Arrays are NumPy arrays of any float dtype (ml_dtypes included).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Result(NamedTuple):
    """out shaped like q with v's head_dim; lse (batch, heads, seqlen_q), without the axes that q lacks."""

    out: np.ndarray
    lse: np.ndarray


class Gradients(NamedTuple):
    """Each of the shape of what it is a gradient of."""

    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray
    dbias: np.ndarray | None


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
    s, _ = _scores(q, k, bias, seen, scale, softcap, fmt)
    p, lse = _softmax(s, fmt)
    return Result(fmt.round(p @ v), lse)


def _scores(q, k, bias, seen, scale, softcap, fmt: _Format) -> tuple[np.ndarray, np.ndarray | float]:
    """Scores (m, n), -inf where not seen, and the slope of softcap there."""
    slope = 1.0
    with np.errstate(invalid="ignore", over="ignore"):
        if fmt is EXACT:
            s = (q @ k.T) * scale
        else:
            s = fmt.round(fmt.round(q * fmt.compute(scale)) @ k.T)
        if softcap:
            t = np.tanh(s / softcap)
            s, slope = fmt.round(softcap * t), fmt.round(1 - t**2)
        if bias is not None:
            s = fmt.round(s + bias)
    return np.where(seen, s, -np.inf), slope


def _softmax(s, fmt: _Format) -> tuple[np.ndarray, np.ndarray]:
    """Weights (m, n) and lse (m,); a row of -inf gives 0 and -inf."""
    m = s.max(axis=1, initial=-np.inf)
    m = np.where(np.isneginf(m), 0, m)
    p = np.exp(s - m[:, None])
    total = p.sum(axis=1)
    empty = total == 0
    with np.errstate(divide="ignore"):
        return fmt.round(p / np.where(empty, 1, total)[:, None]), m + np.log(total)


def _one_head_gradients(q, k, v, bias, seen, scale, softcap, dout, dlse, fmt: _Format) -> tuple[np.ndarray, ...]:
    """dq, dk, dv and dS, by the Jacobian of the softmax: neither out nor lse is used."""
    rows, keys = seen.any(axis=1)[:, None], seen.any(axis=0)[:, None]
    q, dout, k, v = np.where(rows, q, 0), np.where(rows, dout, 0), np.where(keys, k, 0), np.where(keys, v, 0)
    s, slope = _scores(q, k, bias, seen, scale, softcap, fmt)
    p, _ = _softmax(s, fmt)
    dp = fmt.round(dout @ v.T)
    along_row = (p * dp).sum(axis=1, keepdims=True)  # Σ_l p_il dp_il
    ds = fmt.round(p * (dp - along_row + np.where(rows[:, 0], dlse, 0)[:, None]))
    dx = fmt.round(ds * slope)
    return scale * (dx @ k), scale * (dx.T @ q), p.T @ dout, ds


def _rank_4(*arrays: np.ndarray) -> list[np.ndarray]:
    return [{2: lambda x: x[None, :, None], 3: lambda x: x[None], 4: lambda x: x}[x.ndim](x) for x in arrays]


def _seen(shape: tuple[int, ...], causal, window, seen) -> np.ndarray:
    """Boolean (batch, heads, seqlen_q, seqlen_k)."""
    return np.broadcast_to(visible(*shape[2:], causal, window) & (True if seen is None else np.asarray(seen)), shape)


def _attention(q, k, v, causal, window, seen, bias, scale, softcap, fmt: _Format) -> Result:
    missing = 4 - q.ndim
    q, k, v = (np.asarray(x).astype(fmt.compute) for x in _rank_4(q, k, v))
    batch, seqlen_q, heads, dim = q.shape
    seqlen_k, group = k.shape[1], heads // k.shape[2] if k.shape[2] else 1
    scale = dim**-0.5 if scale is None else scale
    full = (batch, heads, seqlen_q, seqlen_k)
    if bias is not None:
        bias = np.broadcast_to(np.asarray(bias), full)
    seen = _seen(full, causal, window, seen)
    out = np.zeros((batch, seqlen_q, heads, v.shape[3]), fmt.compute)
    lse = np.full((batch, heads, seqlen_q), -np.inf, fmt.compute)
    for b in range(batch):
        for h in range(heads):
            own = None if bias is None else bias[b, h].astype(fmt.compute)
            out[b, :, h], lse[b, h] = _one_head(
                q[b, :, h], k[b, :, h // group], v[b, :, h // group], own, seen[b, h], scale, softcap, fmt
            )
    if missing >= 1:
        out, lse = out[0], lse[0]
    if missing == 2:
        out, lse = out[:, 0], lse[0]
    return Result(out, lse)


def attention(q, k, v, *, causal=False, window=None, seen=None, bias=None, scale=None, softcap=None) -> Result:
    """Attention in float64; arguments mean what they mean in `cuflash.attention`."""
    return _attention(q, k, v, causal, window, seen, bias, scale, softcap, EXACT)


def standard(
    q, k, v, *, causal=False, window=None, seen=None, bias=None, scale=None, softcap=None, dtype=None
) -> Result:
    """Standard attention as a framework computes it in `dtype` (default q's): each result rounded to it.

    Products of 16-bit numbers are summed in float32. lse is not rounded below float32.
    """
    dtype = np.dtype(q.dtype if dtype is None else dtype)
    compute = np.float64 if dtype == np.float64 else np.float32
    fmt = _Format(compute, lambda x: x.astype(dtype).astype(compute))
    return _attention(q, k, v, causal, window, seen, bias, scale, softcap, fmt)


def _gradients(q, k, v, dout, dlse, causal, window, seen, bias, scale, softcap, fmt: _Format) -> Gradients:
    shapes = q.shape, k.shape, v.shape
    q, k, v, dout = (np.asarray(x).astype(fmt.compute) for x in _rank_4(q, k, v, dout))
    batch, seqlen_q, heads, dim = q.shape
    seqlen_k, group = k.shape[1], heads // k.shape[2] if k.shape[2] else 1
    scale = dim**-0.5 if scale is None else scale
    dlse = np.zeros((batch, heads, seqlen_q)) if dlse is None else dlse.reshape(batch, heads, seqlen_q)
    full = (batch, heads, seqlen_q, seqlen_k)
    wide = None if bias is None else np.broadcast_to(bias, full).astype(fmt.compute)
    seen = _seen(full, causal, window, seen)
    dq, dk, dv, ds = (np.zeros(shape, fmt.compute) for shape in (q.shape, k.shape, v.shape, full))
    for b in range(batch):
        for h in range(heads):
            own = None if wide is None else wide[b, h]
            dq[b, :, h], dk_h, dv_h, ds[b, h] = _one_head_gradients(
                q[b, :, h], k[b, :, h // group], v[b, :, h // group], own, seen[b, h], scale, softcap,
                dout[b, :, h], dlse[b, h].astype(fmt.compute), fmt,
            )  # fmt: skip
            dk[b, :, h // group] += dk_h
            dv[b, :, h // group] += dv_h
    dq, dk, dv = (fmt.round(x.reshape(shape)) for x, shape in zip((dq, dk, dv), shapes, strict=True))
    return Gradients(dq, dk, dv, None if bias is None else fmt.round(_sum_to(ds, bias.shape)))


def _sum_to(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Summed over the axes along which an array of `shape` is broadcast to this one."""
    padded = (1,) * (array.ndim - len(shape)) + tuple(shape)
    return array.sum(axis=tuple(i for i, n in enumerate(padded) if n == 1), keepdims=True).reshape(shape)


def gradients(
    q, k, v, dout, dlse=None, *, causal=False, window=None, seen=None, bias=None, scale=None, softcap=None
) -> Gradients:
    """Gradients of the sum of dout * out and dlse * lse in float64."""
    return _gradients(q, k, v, dout, dlse, causal, window, seen, bias, scale, softcap, EXACT)


def standard_gradients(
    q, k, v, dout, dlse=None, *, causal=False, window=None, seen=None, bias=None, scale=None, softcap=None, dtype=None
) -> Gradients:
    """Gradients as a framework computes them for `standard` in `dtype`: each intermediate result rounded to it."""
    dtype = np.dtype(q.dtype if dtype is None else dtype)
    compute = np.float64 if dtype == np.float64 else np.float32
    fmt = _Format(compute, lambda x: x.astype(dtype).astype(compute))
    return _gradients(q, k, v, dout, dlse, causal, window, seen, bias, scale, softcap, fmt)


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
