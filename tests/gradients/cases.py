"""How the gradients of a case of `tests.attention.cases` are computed and held to the oracle."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
from ml_dtypes import finfo

import cuflash
from cuflash import forward
from tests import oracle, tolerances
from tests.attention import cases
from tests.attention.cases import LAYOUTS, Case, Inputs, _bias_lengths, embed, make, seen
from tests.devices import CpuDevice

Cotangent = tuple[np.ndarray, np.ndarray]


@contextmanager
def forward_on_cpu() -> Iterator[None]:
    """Within the block the CPU computes every forward pass of NumPy arrays, without options: no forward kernel is
    compiled, and what the backward kernels get is right whatever the sources say.
    """
    run = forward.run

    def on_cpu(device: Any, operands: Any, asked: Any, packing: Any, return_lse: bool, options: Any) -> Any:
        if not isinstance(operands.q, np.ndarray):
            return run(device, operands, asked, packing, return_lse, options)
        return run(None, operands, asked, packing, return_lse, None)

    with mock.patch.object(forward, "run", on_cpu):
        yield


def scores_of(case: Case) -> dict[str, Any]:
    """The keywords that say how scores are made."""
    return {"causal": case.causal, "window": case.window, "softcap": case.softcap, "scale": case.scale}


def cotangent(case: Case, inputs: Inputs) -> Cotangent:
    """Standard normal dout and dlse."""
    rng = np.random.default_rng(zlib.crc32(str(case).encode()) + 1)
    shape = (*inputs.q.shape[:-1], inputs.v.shape[-1])
    lse_shape = (shape[1], shape[0]) if case.packed else (shape[0], shape[2], shape[1])
    dlse = rng.standard_normal(lse_shape).astype(tolerances.lse_dtype(case.dtype))
    return rng.standard_normal(shape).astype(case.dtype), dlse


def vjp(case: Case, inputs: Inputs, **more: Any) -> tuple[Any, Callable[[Any], tuple[np.ndarray, ...]]]:
    """`cuflash.vjp` of the case with return_lse on the CPU; q, k and v lie in buffers as the case's layout says."""
    buffers = [embed(LAYOUTS[case.layout], x[None] if case.packed else x) for x in inputs[:3]]
    return _vjp(case, *buffers, *inputs[3:], **more)


def _vjp(case: Case, q: Any, k: Any, v: Any, bias: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, **more: Any) -> Any:
    """The same of buffers of any kind of array."""
    views = [LAYOUTS[case.layout].view(x) for x in (q, k, v)]
    keywords = {**scores_of(case), "mask": case.mask, "bias": bias, "return_lse": True, **more}
    if not case.packed:
        return cuflash.vjp(cuflash.attention, *views, **keywords)
    if case.bias:
        keywords |= dict(zip(("max_seqlen_q", "max_seqlen_k"), _bias_lengths(case), strict=True))
    return cuflash.vjp(cuflash.attention_varlen, *(x[0] for x in views), cu_seqlens_q, cu_seqlens_k, **keywords)


def gradients(device: Any, case: Case, inputs: Inputs, cotangent: Cotangent, **more: Any) -> tuple[np.ndarray, ...]:
    """Gradients of the case on a device, with the case's options where they are for kernels."""
    if device.name != "cpu":
        more["options"] = case.options
    buffers = [embed(LAYOUTS[case.layout], x[None] if case.packed else x) for x in inputs[:3]]

    def pull(*arrays: Any) -> Any:
        _, pullback = _vjp(case, *arrays[:-2], **more)
        return pullback(arrays[-2:])

    return device.run(pull, *buffers, *inputs[3:], *cotangent)


def expected(
    case: Case, inputs: Inputs, cotangent: Cotangent, function: Callable[..., oracle.Gradients]
) -> oracle.Gradients:
    """What `function` (of the oracle) gives, sequence by sequence; 0 for tokens that belong to none."""
    q, k, v, bias, q_edges, k_edges = inputs
    keywords = {**scores_of(case), "scale": case.scale if case.head_dim else 1.0}
    if case.sequences is None:
        return function(q, k, v, *cotangent, bias=bias, seen=seen(case), **keywords)
    dq, dk, dv = (np.zeros(x.shape) for x in (q, k, v))
    full = (len(case.sequences), case.num_heads, *_bias_lengths(case))
    wide, dwide = None if bias is None else np.broadcast_to(bias, full), np.zeros(full)
    for i, (len_q, len_k) in enumerate(case.sequences):
        rows, keys = slice(q_edges[i], q_edges[i] + len_q), slice(k_edges[i], k_edges[i] + len_k)
        own = None if wide is None else wide[i : i + 1, :, :len_q, :len_k]
        dout, dlse = cotangent[0][rows], cotangent[1][:, rows]
        dq[rows], dk[keys], dv[keys], dbias = function(
            q[rows], k[keys], v[keys], dout, dlse, bias=own, seen=seen(case, i), **keywords
        )
        if dbias is not None:
            dwide[i, :, :len_q, :len_k] = dbias
    return oracle.Gradients(dq, dk, dv, None if bias is None else oracle._sum_to(dwide, bias.shape))


def hold_to_oracle(case: Case, inputs: Inputs, cotangent: Cotangent, got: tuple[np.ndarray, ...]) -> None:
    """Asserts shapes, dtypes and values of gradients."""
    arrays = inputs[: 3 if inputs.bias is None else 4]
    assert [(x.shape, x.dtype) for x in got] == [(x.shape, x.dtype) for x in arrays]
    want = expected(case, inputs, cotangent, oracle.gradients)
    standard = expected(case, inputs, cotangent, oracle.standard_gradients)
    # In the precision of the sums P = exp(S - lse) errs by ulps of lse, dP - Δ by ulps of Δ.
    out, lse = cases.expected(case, inputs, oracle.attention)
    terms = (cotangent[0] * out).astype(float)  # of Δ
    ulps = 2 * sum(np.abs(x[np.isfinite(x)]).max(initial=0) for x in (lse, terms.sum(axis=-1)))
    if case.softcap:  # 1 - tanh² errs by an ulp of one, however small it is
        scale = case.scale or max(1, case.head_dim) ** -0.5
        ulps += 10 * scale * max(np.nanmax(np.abs(x.astype(float)), initial=0) for x in (inputs.q, inputs.k))
    ulps *= float(finfo(tolerances.lse_dtype(case.dtype)).eps / finfo(case.dtype).eps)
    ulps += np.linalg.norm(terms, axis=-1).max(initial=0)  # out in Δ was rounded to the dtype
    tolerances.assert_gradients(got, want, standard, case.dtype, ulps)


def check(case: Case, device: Any = None) -> None:
    """The gradients of the case are as exact as the rule asks, on the CPU or the given device."""
    inputs = make(case)
    given = cotangent(case, inputs)
    hold_to_oracle(case, inputs, given, gradients(device or CpuDevice(), case, inputs, given))
