"""Attention in chunks (Rabe & Staats 2021, "Self-attention does not need O(n²) memory")."""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt
from typing import Any

from cuflash import check
from cuflash.errors import InvalidValueError
from cuflash.reference.arrays import Array, add, finite, put, row_max, zeros
from cuflash.reference.inputs import Inputs, chunks, prepare
from cuflash.reference.standard import gradients, reduce_bias


def chunked_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    bias: Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    query_chunk: int = 1024,
    key_chunk: int | None = None,
) -> Any:
    """Exact attention that holds query_chunk x key_chunk scores at a time (Rabe & Staats 2021, section 3).

    Memory beyond arrays of the size of the inputs and the output is O(query_chunk key_chunk), O(√seqlen_k) by default.

    Parameters
    ----------
    q, k, v, causal, window, bias, scale, softcap, return_lse
        As for `standard_attention`.
    query_chunk : int
        Queries of a chunk.
    key_chunk : int, optional
        Keys of a chunk, about √seqlen_k by default. The last chunk of either is what remains.

    Returns
    -------
    out, lse
        As for `standard_attention`.

    Raises
    ------
    InvalidTypeError, InvalidDtypeError, InvalidShapeError, InvalidValueError
        An argument is not what this page says.
    """
    inputs = prepare(q, k, v, bias, causal=causal, window=window, scale=scale, softcap=softcap)
    sizes = _sizes(inputs, query_chunk, key_chunk)
    return inputs.give(*_forward(inputs, *sizes), return_lse)


def chunked_attention_vjp(
    q: Array,
    k: Array,
    v: Array,
    *,
    bias: Array | None = None,
    return_lse: bool = False,
    query_chunk: int = 1024,
    key_chunk: int | None = None,
    **keywords: Any,
) -> tuple[Any, Callable[[Any], tuple[Array, ...]]]:
    """`chunked_attention` and its pullback, which keeps out and lse and computes each chunk again.

    Parameters are those of `chunked_attention`.

    Returns
    -------
    result : array, or pair of arrays with return_lse
        What `chunked_attention` returns.
    pullback : callable
        Takes a cotangent like `result`, returns the gradients of q, k, v and, where given, bias. Memory beyond them
        is as for `chunked_attention`.
    """
    inputs = prepare(q, k, v, bias, **keywords)
    sizes = _sizes(inputs, query_chunk, key_chunk)
    out, lse = _forward(inputs, *sizes)

    def pullback(cotangent: Any) -> tuple[Array, ...]:
        dout, dlse = inputs.take(cotangent, return_lse)
        return gradients(inputs, *_backward(inputs, *sizes, out, lse, dout, dlse), bias)

    return inputs.give(out, lse, return_lse), pullback


def _sizes(inputs: Inputs, query_chunk: int, key_chunk: int | None) -> tuple[int, int]:
    sizes = query_chunk, isqrt(inputs.problem.seqlen_k) + 1 if key_chunk is None else key_chunk
    for name, size in zip(("query_chunk", "key_chunk"), sizes, strict=True):
        if check.whole_number(name, size) == 0:
            raise InvalidValueError(f"{name} = {size}: must be >= 1")
    return sizes


def _forward(inputs: Inputs, query_chunk: int, key_chunk: int) -> tuple[Array, Array]:
    """out (batch, seqlen_q, num_heads, head_dim_v) and lse (batch, num_heads, seqlen_q) in the dtype of the sums."""
    xp, problem = inputs.xp, inputs.problem
    batch, len_q, heads = problem.batch, problem.seqlen_q, problem.num_heads
    out = zeros(xp, (batch, len_q, heads, problem.head_dim_v), inputs.dtype, inputs.q)
    lse = zeros(xp, (batch, heads, len_q), inputs.dtype, inputs.q) - xp.inf
    for rows in chunks(0, len_q, query_chunk):
        q = inputs.by_head(inputs.q, rows)
        total = None
        for columns in chunks(*problem.key_range(rows.start, rows.stop), key_chunk):
            summary = _summarise(inputs, q, rows, columns)
            total = summary if total is None else _merge(xp, total, summary)
        if total is None:
            continue
        o, l_i, m_i = total
        empty = l_i == 0  # a row that sees nothing: out = 0, lse = -inf
        l_i = xp.where(empty, 1.0, l_i)
        out = put(out, (slice(None), rows), inputs.by_token(o / l_i))
        chunk_lse = xp.where(empty, -xp.inf, m_i + xp.log(l_i))
        lse = put(lse, (slice(None), slice(None), rows), chunk_lse.reshape(batch, heads, rows.stop - rows.start))
    return out, lse


def _summarise(inputs: Inputs, q: Array, rows: slice, columns: slice) -> tuple[Array, Array, Array]:
    """One chunk of keys: P V and the row sums of P = exp(S - m), with the row maxima m."""
    xp = inputs.xp
    s, _ = inputs.scores(q, inputs.keys(inputs.k, columns), rows, columns)
    m = row_max(xp, s)
    p = xp.exp(s - finite(xp, m))
    return xp.matmul(p, inputs.keys(inputs.v, columns)), p.sum(-1)[..., None], m


def _merge(xp: Any, a: tuple[Array, Array, Array], b: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    """Two summaries over disjoint keys as one: each weighted by exp(its m - the common m)."""
    m = xp.maximum(a[2], b[2])
    weight_a, weight_b = (xp.exp(x - finite(xp, m)) for x in (a[2], b[2]))
    return weight_a * a[0] + weight_b * b[0], weight_a * a[1] + weight_b * b[1], m


def _backward(
    inputs: Inputs, query_chunk: int, key_chunk: int, out: Array, lse: Array, dout: Array, dlse: Array | None
) -> tuple[Array, Array, Array, Array | None]:
    """dq, dk, dv, dbias in rank 4 and the dtype of the sums; P is computed again from lse."""
    xp, problem = inputs.xp, inputs.problem
    dq, dk, dv = (zeros(xp, tuple(x.shape), inputs.dtype, x) for x in (inputs.q, inputs.k, inputs.v))
    dbias = None if inputs.bias is None else zeros(xp, tuple(inputs.bias.shape), inputs.dtype, inputs.q)
    for rows in chunks(0, problem.seqlen_q, query_chunk):
        q_c, out_c, dout_c = (inputs.by_head(x, rows) for x in (inputs.q, out, dout))
        per_row = (*inputs.heads, rows.stop - rows.start, 1)
        lse_c = finite(xp, lse[:, :, rows].reshape(per_row))
        delta = (dout_c * out_c).sum(-1)[..., None]  # Δ = rowsum(dO ∘ O)
        if dlse is not None:
            delta = delta - dlse[:, :, rows].reshape(per_row)
        for columns in chunks(*problem.key_range(rows.start, rows.stop), key_chunk):
            k_c, v_c = inputs.keys(inputs.k, columns), inputs.keys(inputs.v, columns)
            s, slope = inputs.scores(q_c, k_c, rows, columns)
            p = xp.exp(s - lse_c)
            ds = p * (xp.matmul(dout_c, v_c.swapaxes(-1, -2)) - delta)  # dS = P ∘ (dO Vᵀ - Δ)
            if dbias is not None:
                dbias = add(dbias, inputs.bias_index(rows, columns), reduce_bias(inputs, ds))
            ds = problem.scale * slope * ds
            keys = slice(None), columns
            dq = add(dq, (slice(None), rows), inputs.by_token(xp.matmul(ds, k_c)))
            dk = add(dk, keys, inputs.by_token(xp.matmul(ds.swapaxes(-1, -2), q_c).sum(2)[:, :, None]))
            dv = add(dv, keys, inputs.by_token(xp.matmul(p.swapaxes(-1, -2), dout_c).sum(2)[:, :, None]))
    return dq, dk, dv, dbias
