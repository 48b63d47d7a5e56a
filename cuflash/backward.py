"""The backward pass from native arrays to native gradients: the counterpart of `cuflash.forward`.

Everything that does not depend on addresses is prepared once per problem, layouts and device, and kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from cuflash import check, forward, records, tile_lists
from cuflash.check import Packing, Scores
from cuflash.device import Call, Device, Kernel, Workspaces, workspaces
from cuflash.forward import MAX_PREPARED, Operands, full_bias, normal
from cuflash.layout import NativeArray, layout
from cuflash.options import Options
from cuflash.plan.backward import check_gradient_shape, plan_backward
from cuflash.plan.forward import MAX_HEAD_DIM
from cuflash.plan.params import BACKWARD_PARAMS
from cuflash.tile_lists import Lengths, ListLaunches

Pullback = Callable[[NativeArray, NativeArray | None], tuple[NativeArray, ...]]

UINT32 = np.dtype(np.uint32)
BACKWARD_BYTES, AT = records.as_bytes(BACKWARD_PARAMS), records.address_words(BACKWARD_PARAMS)


class Kept(NamedTuple):
    """What a pullback keeps of the forward pass and the cotangents it is called with, named as in BACKWARD_PARAMS."""

    q: NativeArray
    k: NativeArray
    v: NativeArray
    bias: NativeArray | None
    o: NativeArray
    lse: NativeArray
    d_o: NativeArray
    d_lse: NativeArray | None


@dataclass(frozen=True, slots=True)
class Launches:
    """Kernels of one plan in their order, their parameters complete but for the addresses, and their workspaces."""

    kernels: tuple[Kernel, ...]
    words: np.ndarray
    lists: ListLaunches | None
    workspaces: Workspaces


@dataclass(frozen=True, slots=True)
class Prepared:
    """What every pullback of one problem, layouts and device shares."""

    copied: tuple[str, ...]  # of Kept: arrays whose rows are not contiguous, cotangents less aligned than these
    launches: Launches | None  # None: nothing to compute, all gradients are 0


def run(
    device: Device | None, operands: Operands, asked: Scores, packing: Packing | None, options: Options | None
) -> tuple[NativeArray, NativeArray, Pullback]:
    """out, lse, and what turns their cotangents (dlse: or None) into the gradients of q, k, v and, if given, bias."""
    if device is not None:
        _check_shape(operands, device)
        asked = check.without_arrays(asked)
    out, lse = forward.run(device, operands, asked, packing, True, options)
    q, k, v, bias, *_ = operands

    def pullback(dout: NativeArray, dlse: NativeArray | None = None) -> tuple[NativeArray, ...]:
        kept = Kept(q, k, v, bias, out, lse, dout, dlse)
        if device is None:
            return _run_on_cpu(kept, operands, asked, packing)
        layouts = tuple(None if array is None else layout(array) for array in kept)
        key = (layouts, asked, packing, options)
        prepared = device.prepared.get(key)
        if prepared is None:
            prepared = _prepare(device, *key)
            if len(device.prepared) >= MAX_PREPARED:
                device.prepared.clear()
            device.prepared[key] = prepared
        return _run_on_device(device, prepared, kept, operands)

    return out, lse, pullback


def _check_shape(operands: Operands, device: Device) -> None:
    """Before anything is computed: whether the heads fit; what the forward pass refuses is left to it."""
    q, v = operands.q, operands.v
    if q.dtype in check.DTYPE_NAMES and min(q.ndim, v.ndim) > 0:
        head_dims = q.shape[-1], v.shape[-1]
        if min(head_dims) > 0 and max(head_dims) <= MAX_HEAD_DIM:
            check_gradient_shape(check.DTYPE_NAMES[q.dtype], *head_dims, device.arch)


def _prepare(
    device: Device,
    layouts: tuple[Any, ...],  # of the fields of Kept
    asked: Scores,
    packing: Packing | None,
    options: Options | None,
) -> Prepared:
    q, k, v, bias, _, _, d_o, d_lse = layouts
    problem = check.problem(q, k, v, bias, asked, packing)
    arrays = {name: array for name, array in zip(Kept._fields, layouts, strict=True) if array is not None}
    if 0 in (problem.batch, problem.num_heads, problem.seqlen_q, problem.seqlen_k):
        return Prepared((), None)
    copied = [name for name in ("q", "k", "v") if not arrays[name].rows_contiguous]
    inputs = (arrays[name].contiguous() if name in copied else arrays[name] for name in ("q", "k", "v", "o"))
    load_bytes = records.access_bytes(*inputs)
    if not d_o.rows_contiguous or records.access_bytes(d_o) < load_bytes:  # else every key tile would load narrowly
        copied.append("d_o")
    if d_lse is not None and any(n % d_lse.dtype.itemsize for n in (d_lse.misalignment, *d_lse.strides)):
        copied.append("d_lse")
    arrays |= {name: arrays[name].contiguous() for name in copied}
    gradients = {f"d{name}": array.contiguous() for name, array in zip("qkv", (q, k, v), strict=True)}
    plan = plan_backward(
        problem,
        device.arch,
        load_bytes=load_bytes,
        store_bytes=records.access_bytes(*gradients.values()),
        bias_shape=None if bias is None else records.bias_shape(bias),
        options=options,
    )
    if bias is not None:
        gradients["dbias"] = bias.contiguous()
    words = records.as_words(records.backward_record(problem, plan, arrays | gradients))
    sums = arrays["lse"].dtype
    row_sums = workspaces(
        ("row_lse", plan.row_shape, sums),
        ("row_delta", plan.row_shape, sums),
        ("dq_sum", plan.sum_shape, sums),
        ("turns", plan.turn_shape, UINT32),
    )
    lists = None if plan.lists is None else tile_lists.prepare(device, problem, plan.lists)
    return Prepared(tuple(copied), Launches(tuple(map(device.load, plan.launches)), words, lists, row_sums))


def _run_on_device(device: Device, prepared: Prepared, kept: Kept, operands: Operands) -> tuple[NativeArray, ...]:
    inputs = [array for array in kept[:4] if array is not None]
    with device.call() as call:
        gradients = tuple(device.empty(array.shape, array.dtype) for array in inputs)
        if prepared.launches is None:
            for gradient in gradients:
                gradient.fill(0)
        else:
            if prepared.copied:
                kept = kept._replace(**{name: getattr(kept, name).copy(order="C") for name in prepared.copied})
            _launch(call, device, prepared.launches, kept, operands, gradients)
    return gradients


def _launch(
    call: Call, device: Device, launches: Launches, kept: Kept, operands: Operands, gradients: tuple[NativeArray, ...]
) -> None:
    words = launches.words.copy()
    for name, array in zip(Kept._fields, kept, strict=True):
        if array is not None:
            words[AT[name]] = call.read(array, name)
    if operands.cu_seqlens_q is not None:
        # Kept until the launch: the pool would give a copy's memory to the next workspace.
        cu_seqlens_q, cu_seqlens_k = device.indices(operands.cu_seqlens_q), device.indices(operands.cu_seqlens_k)
        words[AT["cu_seqlens_q"]] = call.read(cu_seqlens_q, "cu_seqlens_q")
        words[AT["cu_seqlens_k"]] = call.read(cu_seqlens_k, "cu_seqlens_k")
    if launches.lists is not None and operands.mask is not None:
        tables = tile_lists.table_addresses(call, device, operands.mask)
        lengths = Lengths(int(words[AT["cu_seqlens_q"]]), int(words[AT["cu_seqlens_k"]]))
        lists = tile_lists.tile_lists(call, device, launches.lists, operands.mask, tables, lengths)
        words[AT["mask_tables"]], (words[AT["tile_lists"]], words[AT["tile_counts"]]) = tables, lists
    for name, array in zip(("dq", "dk", "dv", "dbias"), gradients, strict=False):
        words[AT[name]] = call.write(array, name)
    for (name, *_), address in zip(launches.workspaces.arrays, call.workspaces(launches.workspaces), strict=True):
        words[AT[name]] = address
    record = words.view(BACKWARD_BYTES)
    for kernel in launches.kernels:
        kernel(record)


def _run_on_cpu(kept: Kept, operands: Operands, asked: Scores, packing: Packing | None) -> tuple[np.ndarray, ...]:
    from cuflash.cpu.backward import Arrays, backward

    q, k, v, bias, out, lse, dout, dlse = kept
    asked = asked._replace(mask=operands.mask)
    problem = check.problem(layout(q), layout(k), layout(v), None if bias is None else layout(bias), asked, packing)
    lse_shape = (problem.batch, problem.num_heads, problem.seqlen_q)

    def tokens_first(array: np.ndarray) -> np.ndarray:
        return normal(array, problem.varlen)

    def heads_first(array: np.ndarray) -> np.ndarray:
        return array if problem.varlen else array.reshape(lse_shape)

    dq, dk, dv = (np.zeros(array.shape, array.dtype) for array in (q, k, v))
    dbias = None if bias is None else np.zeros(bias.shape, bias.dtype)
    arrays = Arrays(
        tokens_first(q),
        tokens_first(k),
        tokens_first(v),
        None if bias is None else full_bias(bias, problem),
        tokens_first(out),
        heads_first(lse),
        tokens_first(dout),
        None if dlse is None else heads_first(dlse),
        tokens_first(dq),
        tokens_first(dk),
        tokens_first(dv),
    )
    in_rank_4 = None if dbias is None else dbias.reshape((1,) * (4 - dbias.ndim) + dbias.shape)
    backward(problem, arrays, operands.cu_seqlens_q, operands.cu_seqlens_k, in_rank_4)
    return (dq, dk, dv) if dbias is None else (dq, dk, dv, dbias)
