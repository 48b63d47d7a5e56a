"""The forward pass from native arrays to native results: problem, plan, records and launches, or the CPU executor.

Everything that does not depend on addresses is prepared once per problem, layout and device, and kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from cuflash import check
from cuflash.arrays import Layout, NativeArray, check_separate, layout
from cuflash.check import Packing, Scores
from cuflash.device import Device
from cuflash.options import Options
from cuflash.problem import Problem

MAX_PREPARED = 1024  # problems kept per device
INPUTS = ("q", "k", "v", "bias")


class Operands(NamedTuple):
    """Native arrays of one call; cu_seqlens are int64 on the host, int32 on a GPU."""

    q: NativeArray
    k: NativeArray
    v: NativeArray
    bias: NativeArray | None
    out: NativeArray | None
    cu_seqlens_q: NativeArray | None = None
    cu_seqlens_k: NativeArray | None = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """What every call of one problem, layout and device shares."""

    problem: Problem
    copied: tuple[str, ...]  # inputs whose rows are not contiguous
    out_shape: tuple[int, ...]
    out_dtype: np.dtype
    lse_shape: tuple[int, ...] | None  # None: not wanted
    lse_dtype: np.dtype


_prepared_for_cpu: dict[Any, Prepared] = {}


def run(
    device: Device | None,
    operands: Operands,
    asked: Scores,
    packing: Packing | None,
    return_lse: bool,
    options: Options | None,
) -> tuple[NativeArray, NativeArray | None]:
    """Answer a call on a device, or on the CPU where it is None; raises before anything is computed or written."""
    layouts = tuple(None if array is None else layout(array) for array in operands[:5])
    prepared_calls = _prepared_for_cpu if device is None else device.prepared
    key = (layouts, asked, packing, return_lse, options)
    prepared = prepared_calls.get(key)
    if prepared is None:
        prepared = _prepare(device, *key)  # type: ignore[arg-type]
        if len(prepared_calls) >= MAX_PREPARED:
            prepared_calls.clear()
        prepared_calls[key] = prepared
    if operands.out is not None:
        check_separate(operands.out, INPUTS, operands[:4])
    if prepared.copied:
        operands = operands._replace(**{name: getattr(operands, name).copy(order="C") for name in prepared.copied})
    return _run_on_cpu(prepared, operands)


def _prepare(
    device: Device | None,
    layouts: tuple[Layout, Layout, Layout, Layout | None, Layout | None],
    asked: Scores,
    packing: Packing | None,
    return_lse: bool,
    options: Options | None,
) -> Prepared:
    q, k, v, bias, out = layouts
    problem = check.problem(q, k, v, bias, asked, packing)
    if options is not None:
        check.check_options(options, on_kernels=device is not None)
    out_shape = (*q.shape[:-1], problem.head_dim_v)
    if out is not None:
        check.check_out(out, out_shape, q.dtype)
    lse_shape = {4: q.shape[:1] + q.shape[2:0:-1], 3: q.shape[1::-1], 2: q.shape[:1]}[len(q.shape)]
    return Prepared(
        problem,
        tuple(name for name, array in zip("qkv", (q, k, v), strict=True) if not array.rows_contiguous),
        out_shape,
        q.dtype,
        lse_shape if return_lse else None,
        np.dtype(np.float64 if problem.dtype == "float64" else np.float32),
    )


def _run_on_cpu(prepared: Prepared, operands: Operands) -> tuple[np.ndarray, np.ndarray | None]:
    from cuflash.cpu.forward import forward

    problem = prepared.problem
    out = np.empty(prepared.out_shape, prepared.out_dtype) if operands.out is None else operands.out
    lse = None if prepared.lse_shape is None else np.empty(prepared.lse_shape, prepared.lse_dtype)
    if problem.batch and problem.num_heads and (problem.total_q or problem.seqlen_q):
        forward(
            problem,
            *(_normal(array, problem.varlen) for array in operands[:3]),
            None if operands.bias is None else _full_bias(operands.bias, problem),
            operands.cu_seqlens_q,
            operands.cu_seqlens_k,
            _normal(out, problem.varlen),
            lse if lse is None or problem.varlen else lse.reshape(problem.batch, problem.num_heads, problem.seqlen_q),
        )
    return out, lse


def _normal(array: np.ndarray, varlen: bool) -> np.ndarray:
    """View as (batch, seqlen, heads, dim), packed (tokens, heads, dim)."""
    if varlen or array.ndim == 4:
        return array
    return array[None] if array.ndim == 3 else array[None, :, None, :]


def _full_bias(bias: np.ndarray, problem: Problem) -> np.ndarray:
    """View as (batch, num_heads, seqlen_q, seqlen_k); of a longer sequence axis of a packed problem the beginning."""
    lengths = (problem.seqlen_q, problem.seqlen_k)
    cut = tuple(
        slice(None) if size == 1 else slice(length)
        for size, length in zip(bias.shape[-2:], lengths[2 - bias.ndim :] if bias.ndim < 2 else lengths, strict=True)
    )
    return np.broadcast_to(bias[(..., *cut)], (problem.batch, problem.num_heads, *lengths))
