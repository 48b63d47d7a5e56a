"""The forward pass from native arrays to native results: problem, plan, records and launches, or the CPU executor.

Everything that does not depend on addresses is prepared once per problem, layout and device, and kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from cuflash import check, records, tile_lists
from cuflash.check import Packing, Scores
from cuflash.device import Call, Device, Kernel, Workspaces, workspaces
from cuflash.layout import Layout, NativeArray, check_separate, contiguous_strides, layout
from cuflash.masks.program import Program
from cuflash.options import Options
from cuflash.plan.forward import plan_forward
from cuflash.plan.params import COMBINE_PARAMS, FORWARD_PARAMS
from cuflash.problem import Problem
from cuflash.tile_lists import Lengths, ListLaunches

MAX_PREPARED = 1024  # problems kept per device
INPUTS = ("q", "k", "v", "bias")

FORWARD_BYTES, COMBINE_BYTES = records.as_bytes(FORWARD_PARAMS), records.as_bytes(COMBINE_PARAMS)
AT, COMBINE_AT = records.address_words(FORWARD_PARAMS), records.address_words(COMBINE_PARAMS)


class Operands(NamedTuple):
    """Native arrays of one call; cu_seqlens are int64 on the host, int32 on a GPU."""

    q: NativeArray
    k: NativeArray
    v: NativeArray
    bias: NativeArray | None
    out: NativeArray | None
    cu_seqlens_q: NativeArray | None = None
    cu_seqlens_k: NativeArray | None = None
    block_tables: NativeArray | None = None  # int32, of a paged cache
    seq_lens: NativeArray | None = None
    mask: Program | None = None  # with its arrays; what else a call depends on of it is in `Scores`


@dataclass(frozen=True, slots=True)
class Split:
    """What a plan that splits the keys launches after the forward kernel; see `records.split_combine_record`."""

    combine: Kernel
    words: np.ndarray
    partials: Workspaces  # outputs, lse; of even work also the table that says whose they are


@dataclass(frozen=True, slots=True)
class Launches:
    """Kernels of one plan and their parameters, complete but for the addresses."""

    forward: Kernel
    words: np.ndarray
    split: Split | None
    lists: ListLaunches | None


@dataclass(frozen=True, slots=True)
class Prepared:
    """What every call of one problem, layout and device shares."""

    problem: Problem
    copied: tuple[str, ...]  # inputs whose rows are not contiguous
    out_shape: tuple[int, ...]
    out_dtype: np.dtype
    lse_shape: tuple[int, ...]
    lse_dtype: np.dtype
    launches: Launches | None  # None: the CPU executor, or nothing to compute


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
    if options is not None:
        check.check_options(options, on_kernels=device is not None)
    layouts = tuple([None if array is None else layout(array) for array in operands[:5]])
    known = _prepared_for_cpu if device is None else device.prepared
    # Of a mask the CPU prepares nothing; what a device prepares keeps none of its arrays alive.
    asked = asked._replace(mask=None) if device is None else check.without_arrays(asked)
    key = (layouts, asked, packing, options)
    prepared = known.get(key)
    if prepared is None:
        prepared = _prepare(device, *key)  # type: ignore[arg-type]
        if len(known) >= MAX_PREPARED:
            known.clear()
        known[key] = prepared
    if operands.out is not None:
        check_separate(operands.out, INPUTS, operands[:4])
    if device is None:
        return _run_on_cpu(prepared, operands, return_lse)
    return _run_on_device(device, prepared, operands, return_lse)


def _prepare(
    device: Device | None,
    layouts: tuple[Layout, Layout, Layout, Layout | None, Layout | None],
    asked: Scores,
    packing: Packing | None,
    options: Options | None,
) -> Prepared:
    q, k, v, bias, out = layouts
    out_rows = q.shape[:-1]
    single = packing is not None and packing.single
    if single:
        q = q.with_token_axis()
    problem = check.problem(q, k, v, bias, asked, packing)
    if device is not None:
        check.check_kernel_limits(problem, device.arch)
    if options is not None:
        check.check_precision(problem, options)
    out_shape = (*out_rows, problem.head_dim_v)
    if out is not None:
        check.check_out(out, out_shape, q.dtype)
    lse_shape = {4: q.shape[:1] + q.shape[2:0:-1], 3: q.shape[1::-1], 2: q.shape[:1]}[len(q.shape)]
    prepared = Prepared(
        problem,
        tuple(name for name, array in zip("qkv", (q, k, v), strict=True) if not array.rows_contiguous),
        out_shape,
        q.dtype,
        lse_shape[:2] if single else lse_shape,
        np.dtype(np.float64 if problem.dtype == "float64" else np.float32),
        None,
    )
    if device is None or 0 in lse_shape:
        return prepared
    q, k, v = (array if array.rows_contiguous else array.contiguous() for array in (q, k, v))
    if out is None:
        out = Layout(out_shape, contiguous_strides(out_shape, q.dtype.itemsize), q.dtype, 0)
    if single:
        out = out.with_token_axis()
    return replace(prepared, launches=_launches(device, problem, (q, k, v, bias, out), lse_shape, options or Options()))


def _launches(
    device: Device,
    problem: Problem,
    layouts: tuple[Layout, Layout, Layout, Layout | None, Layout],
    lse_shape: tuple[int, ...],
    options: Options,
) -> Launches:
    q, k, v, bias, out = layouts
    plan = plan_forward(
        problem,
        device.arch,
        load_bytes=records.access_bytes(q, k, v),
        store_bytes=records.access_bytes(out),
        options=options,
        sm_count=device.sm_count,
    )
    words = records.as_words(records.forward_record(problem, plan, q, k, v, bias, out, lse_shape))
    forward = device.load(plan.forward)
    lists = None if plan.lists is None else tile_lists.prepare(device, problem, plan.lists)
    if plan.combine is None:
        return Launches(forward, words, None, lists)
    parts = records.partials(problem, plan)
    partials = [("o_partial", parts.shape, parts.dtype), ("lse_partial", parts.lse_shape, parts.dtype)]
    if plan.even is not None:
        partials.append(("shares", (problem.batch, 2), np.dtype(np.int32)))
    split = Split(
        device.load(plan.combine),
        records.as_words(records.split_combine_record(problem, plan, out, lse_shape)),
        workspaces(*partials),
    )
    return Launches(forward, words, split, lists)


def _run_on_device(
    device: Device, prepared: Prepared, operands: Operands, return_lse: bool
) -> tuple[NativeArray, NativeArray | None]:
    with device.call() as call:
        out = operands.out
        if out is None:
            out = device.empty(prepared.out_shape, prepared.out_dtype)
        lse = device.empty(prepared.lse_shape, prepared.lse_dtype) if return_lse else None
        if prepared.launches is not None:
            _launch(call, device, prepared.launches, _with_copies(prepared, operands), out, lse)
    return out, lse


def _launch(
    call: Call, device: Device, launches: Launches, operands: Operands, out: NativeArray, lse: NativeArray | None
) -> None:
    q, k, v, bias, _, cu_seqlens_q, cu_seqlens_k, block_tables, seq_lens, mask = operands
    words = launches.words.copy()
    words[AT["q"]], words[AT["k"]], words[AT["v"]] = call.read(q, "q"), call.read(k, "k"), call.read(v, "v")
    if bias is not None:
        words[AT["bias"]] = call.read(bias, "bias")
    if cu_seqlens_q is not None:
        # Kept until the launch: the pool would give a copy's memory to the next workspace.
        cu_seqlens_q = device.indices(cu_seqlens_q)
        words[AT["cu_seqlens_q"]] = call.read(cu_seqlens_q, "cu_seqlens_q")
    if cu_seqlens_k is not None:
        cu_seqlens_k = device.indices(cu_seqlens_k)
        words[AT["cu_seqlens_k"]] = call.read(cu_seqlens_k, "cu_seqlens_k")
    if block_tables is not None:
        block_tables, seq_lens = device.indices(block_tables), device.indices(seq_lens)
        words[AT["block_tables"]] = call.read(block_tables, "block_tables")
        words[AT["seq_lens"]] = call.read(seq_lens, "seq_lens")
    if launches.lists is not None and mask is not None:
        tables = tile_lists.table_addresses(call, device, mask)
        lengths = Lengths(*(int(words[AT[name]]) for name in Lengths._fields))
        lists = tile_lists.tile_lists(call, device, launches.lists, mask, tables, lengths)
        words[AT["mask_tables"]], (words[AT["tile_lists"]], words[AT["tile_counts"]]) = tables, lists
    o_address = call.write(out, "o")
    lse_address = 0 if lse is None else call.write(lse, "lse")
    split = launches.split
    if split is None:
        words[AT["o"]], words[AT["lse"]] = o_address, lse_address
        launches.forward(words.view(FORWARD_BYTES))
        return
    for name, address in zip(("o", "lse", "shares"), call.workspaces(split.partials), strict=False):
        words[AT[name]] = address
    launches.forward(words.view(FORWARD_BYTES))
    merge = split.words.copy()
    merge[COMBINE_AT["states"]], merge[COMBINE_AT["lses"]] = words[AT["o"]], words[AT["lse"]]
    merge[COMBINE_AT["shares"]] = words[AT["shares"]]
    merge[COMBINE_AT["o"]], merge[COMBINE_AT["lse"]] = o_address, lse_address
    split.combine(merge.view(COMBINE_BYTES))


def _with_copies(prepared: Prepared, operands: Operands) -> Operands:
    """The operands with C-contiguous copies of those whose rows are not contiguous."""
    if not prepared.copied:
        return operands
    return operands._replace(**{name: getattr(operands, name).copy(order="C") for name in prepared.copied})


def _run_on_cpu(prepared: Prepared, operands: Operands, return_lse: bool) -> tuple[np.ndarray, np.ndarray | None]:
    from cuflash.cpu.forward import forward

    problem = prepared.problem
    operands = _with_copies(prepared, operands)
    q, k, v, bias, out, cu_seqlens_q, cu_seqlens_k, block_tables, _, mask = operands
    if mask is not None:  # raises before anything is written
        problem = replace(problem, mask=mask)
        mask.check(problem.lengths)
        for i in range(len(mask.tables)):
            mask.host_table(i)
    if out is None:
        out = np.empty(prepared.out_shape, prepared.out_dtype)
    lse = np.empty(prepared.lse_shape, prepared.lse_dtype) if return_lse else None
    if 0 in prepared.lse_shape:
        return out, lse
    if block_tables is not None:
        _run_paged_on_cpu(problem, operands, out, lse)
    else:
        forward(
            problem,
            normal(q, problem.varlen),
            normal(k, problem.varlen),
            normal(v, problem.varlen),
            None if bias is None else full_bias(bias, problem),
            cu_seqlens_q,
            cu_seqlens_k,
            normal(out, problem.varlen),
            lse if lse is None or problem.varlen else lse.reshape(problem.batch, problem.num_heads, problem.seqlen_q),
        )
    return out, lse


def _run_paged_on_cpu(problem: Problem, operands: Operands, out: np.ndarray, lse: np.ndarray | None) -> None:
    """As a packed problem, whose keys and values are brought together."""
    from cuflash.cpu.forward import forward

    tables: Any = operands.block_tables
    block_size: int = operands.k.shape[1]
    lengths = np.asarray(operands.seq_lens, np.int64)
    used = np.arange(tables.shape[1]) < -(-lengths[:, None] // block_size)  # entries that lead to keys
    tokens = np.arange(problem.seqlen_k) < lengths[:, None]  # of the room of a sequence, those that exist
    in_used_blocks = tokens.reshape(*tables.shape, block_size)[used].ravel()
    k, v = (x[tables[used]].reshape(-1, *x.shape[2:])[in_used_blocks] for x in (operands.k, operands.v))
    q, cu_seqlens_q = operands.q, operands.cu_seqlens_q
    single = cu_seqlens_q is None and q.ndim == 3
    if cu_seqlens_q is None:
        q = q.reshape(-1, *q.shape[-2:])
        cu_seqlens_q = np.arange(problem.batch + 1) * problem.seqlen_q
    packed_out = np.empty((q.shape[0], *out.shape[-2:]), out.dtype)
    packed_lse = None if lse is None else np.empty((problem.num_heads, q.shape[0]), lse.dtype)
    bias = None if operands.bias is None else full_bias(operands.bias, problem)
    packed = replace(
        problem, total_q=q.shape[0], total_k=k.shape[0], seqlen_k=int(lengths.max(initial=0)), block_size=None
    )  # fmt: skip
    forward(packed, q, k, v, bias, cu_seqlens_q, np.append(0, np.cumsum(lengths)), packed_out, packed_lse)
    out[...] = packed_out.reshape(out.shape)
    if lse is not None and packed_lse is not None:
        in_rows = packed_lse.T.reshape(*out.shape[:-1])  # (tokens, heads) or (batch, seqlen_q, heads)
        lse[...] = in_rows if single else np.moveaxis(in_rows, -1, -2)


def normal(array: np.ndarray, varlen: bool) -> np.ndarray:
    """View as (batch, seqlen, heads, dim), packed (tokens, heads, dim)."""
    if varlen or array.ndim == 4:
        return array
    return array[None] if array.ndim == 3 else array[None, :, None, :]


def full_bias(bias: np.ndarray, problem: Problem) -> np.ndarray:
    """View as (batch, num_heads, seqlen_q, seqlen_k); of a longer sequence axis of a packed problem the beginning."""
    lengths = (problem.seqlen_q, problem.seqlen_k)
    cut = tuple(
        slice(None) if size == 1 else slice(length)
        for size, length in zip(bias.shape[-2:], lengths[2 - bias.ndim :] if bias.ndim < 2 else lengths, strict=True)
    )
    return np.broadcast_to(bias[(..., *cut)], (problem.batch, problem.num_heads, *lengths))
