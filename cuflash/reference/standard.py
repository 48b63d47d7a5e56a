"""Standard attention: every score in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cuflash.reference.arrays import Array, cast, finite, row_max
from cuflash.reference.inputs import Inputs, prepare


def standard_attention(
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
) -> Any:
    """Attention by its definition, softmax(softcap(scale q kᵀ) + bias) v, in O(seqlen_q seqlen_k) memory.

    Parameters
    ----------
    q : array (batch, seqlen_q, num_heads, head_dim)
        Of any array module: NumPy, CuPy, torch, JAX. Also of rank 3 or 2; float16, bfloat16, float32 or float64.
    k, v : array (batch, seqlen_k, num_kv_heads, head_dim), (batch, seqlen_k, num_kv_heads, head_dim_v)
        Of q's module, rank and dtype.
    causal, window, bias, scale, softcap, return_lse
        As for `cuflash.attention`.

    Returns
    -------
    out : array (batch, seqlen_q, num_heads, head_dim_v)
        Of q's rank and dtype.
    lse : array (batch, num_heads, seqlen_q)
        With return_lse: float32, float64 for float64.

    Raises
    ------
    InvalidTypeError, InvalidDtypeError, InvalidShapeError, InvalidValueError
        An argument is not what this page says.

    Notes
    -----
    All operations are in float32, in float64 for float64: the result is a reference for, not a model of, 16-bit
    arithmetic.
    """
    inputs = prepare(q, k, v, bias, causal=causal, window=window, scale=scale, softcap=softcap)
    out, lse, _ = _forward(inputs)
    return inputs.give(out, lse, return_lse)


def standard_attention_vjp(
    q: Array, k: Array, v: Array, *, bias: Array | None = None, return_lse: bool = False, **keywords: Any
) -> tuple[Any, Callable[[Any], tuple[Array, ...]]]:
    """`standard_attention` and its pullback, which keeps the probabilities.

    Parameters are those of `standard_attention`.

    Returns
    -------
    result : array, or pair of arrays with return_lse
        What `standard_attention` returns.
    pullback : callable
        Takes a cotangent like `result`, returns the gradients of q, k, v and, where given, bias.
    """
    inputs = prepare(q, k, v, bias, **keywords)
    out, lse, (p, slope) = _forward(inputs)

    def pullback(cotangent: Any) -> tuple[Array, ...]:
        dout, dlse = inputs.take(cotangent, return_lse)
        everything = slice(0, inputs.problem.seqlen_q), slice(0, inputs.problem.seqlen_k)
        q_h, dout = (inputs.by_head(x, everything[0]) for x in (inputs.q, dout))
        k_h, v_h = (inputs.keys(x, everything[1]) for x in (inputs.k, inputs.v))
        dp = inputs.xp.matmul(dout, v_h.swapaxes(-1, -2))  # dP = dO Vᵀ
        ds = dp - (p * dp).sum(-1)[..., None]
        if dlse is not None:
            ds = ds + dlse.reshape(*inputs.heads, inputs.problem.seqlen_q, 1)
        ds = p * ds
        dbias = None if bias is None else reduce_bias(inputs, ds)
        ds = inputs.problem.scale * slope * ds
        dq = inputs.xp.matmul(ds, k_h)
        dk = inputs.xp.matmul(ds.swapaxes(-1, -2), q_h).sum(2)[:, :, None]
        dv = inputs.xp.matmul(p.swapaxes(-1, -2), dout).sum(2)[:, :, None]
        return gradients(inputs, inputs.by_token(dq), inputs.by_token(dk), inputs.by_token(dv), dbias, bias)

    return inputs.give(out, lse, return_lse), pullback


def _forward(inputs: Inputs) -> tuple[Array, Array, tuple[Array, Array | float]]:
    xp, problem = inputs.xp, inputs.problem
    rows, columns = slice(0, problem.seqlen_q), slice(0, problem.seqlen_k)
    s, slope = inputs.scores(inputs.by_head(inputs.q, rows), inputs.keys(inputs.k, columns), rows, columns)
    m = finite(xp, row_max(xp, s))
    p = xp.exp(s - m)
    total = p.sum(-1)[..., None]
    empty = total == 0  # a row that sees nothing: out = 0, lse = -inf
    p = p / xp.where(empty, 1.0, total)
    out = inputs.by_token(xp.matmul(p, inputs.keys(inputs.v, columns)))
    lse = xp.where(empty, -xp.inf, m + xp.log(xp.where(empty, 1.0, total)))
    return out, lse.reshape(problem.batch, problem.num_heads, problem.seqlen_q), (p, slope)


def reduce_bias(inputs: Inputs, ds: Array) -> Array:
    """dS (batch, kv_head, group, query, key) summed over the axes along which the bias is broadcast, in rank 4."""
    ds = ds.reshape(ds.shape[0], ds.shape[1] * ds.shape[2], *ds.shape[3:])
    for axis, size in enumerate(inputs.bias.shape):  # type: ignore[union-attr]
        if size == 1 and ds.shape[axis] != 1:
            ds = ds.sum(axis)
            ds = ds[(slice(None),) * axis + (None,)]
    return ds


def gradients(
    inputs: Inputs, dq: Array, dk: Array, dv: Array, dbias: Array | None, bias: Array | None
) -> tuple[Array, ...]:
    """Gradients of rank 4 in the ranks and dtypes of what they are gradients of."""
    of_qkv = tuple(cast(inputs.drop_axes(g), inputs.q.dtype) for g in (dq, dk, dv))
    if bias is None or dbias is None:
        return of_qkv
    return (*of_qkv, cast(dbias.reshape(tuple(bias.shape)), bias.dtype))
