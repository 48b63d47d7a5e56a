"""Launches kernels directly on an emulated device, with records written here as plan/params.py declares them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cuflash.emulator import Device
from cuflash.jit import compile_ptx
from cuflash.options import Options
from cuflash.plan.arch import arch_named
from cuflash.plan.forward import ForwardPlan, Launch, plan_forward
from cuflash.plan.params import COMBINE_PARAMS, FORWARD_PARAMS, NO_BOUND
from cuflash.problem import Problem

ARCH = "sm_80"


@dataclass
class Run:
    """Results of the launches of one plan."""

    out: np.ndarray
    lse: np.ndarray
    reports: list[Any]
    plan: ForwardPlan


def problem_of(q, k, v, *, causal=False, window=None, bias=None, scale=None, softcap=None, cu_seqlens=None) -> Problem:
    left, right = window or (None, None)
    if causal:
        right = 0 if right is None else min(right, 0)
    packed: dict[str, Any] = {}
    if cu_seqlens is None:
        batch, seqlen_q, heads, dim = q.shape
        seqlen_k, kv_heads = k.shape[1:3]
    else:
        (total_q, heads, dim), (total_k, kv_heads) = q.shape, k.shape[:2]
        batch = len(cu_seqlens[0]) - 1
        longest = (int(max(np.diff(edges), default=0)) for edges in cu_seqlens)
        seqlen_q, seqlen_k = (min(max(n, 1), total) for n, total in zip(longest, (total_q, total_k), strict=True))
        packed = {"total_q": total_q, "total_k": total_k}
    return Problem(
        batch, seqlen_q, seqlen_k, heads, kv_heads, dim, v.shape[-1], q.dtype.name,
        dim**-0.5 if scale is None else scale, softcap or 0.0, left, right,
        None if bias is None else bias.dtype.name, **packed,
    )  # fmt: skip


def access_bytes(array: np.ndarray) -> int:
    rows = [s for s, n in zip(array.strides[:-1], array.shape, strict=False) if n > 1]
    return int(np.gcd.reduce([16, array.ctypes.data % 16, array.shape[-1] * array.itemsize, *rows]))


def strides_of(array: np.ndarray, axes: int = 3) -> list[int]:
    strides = [0 if n == 1 else s // array.itemsize for s, n in zip(array.strides, array.shape, strict=True)][:axes]
    return [0] * (axes - len(strides)) + strides


def run_forward(
    q, k, v, *, bias=None, cu_seqlens=None, options: Options | None = None, load_bytes=None, device=None, **keywords
) -> Run:
    """Attention by the kernels; q, k, v (batch, seqlen, heads, dim) or packed (tokens, heads, dim), C-contiguous."""
    device = device or Device(ARCH)
    problem = problem_of(q, k, v, bias=bias, cu_seqlens=cu_seqlens, **keywords)
    out = np.empty((*q.shape[:-1], v.shape[-1]), q.dtype)
    lse_shape = (q.shape[0], q.shape[2], q.shape[1]) if cu_seqlens is None else (q.shape[1], q.shape[0])
    plan = plan_forward(
        problem, arch_named(ARCH), options=options,
        load_bytes=load_bytes or min(16, *(row & -row for row in (q.itemsize * q.shape[-1], v.itemsize * v.shape[-1]))),
        store_bytes=min(16, (row := v.itemsize * v.shape[-1]) & -row),
    )  # fmt: skip
    record = np.zeros((), FORWARD_PARAMS)
    arrays = {"q": q, "k": k, "v": v, "bias": bias}
    if cu_seqlens is not None:
        arrays |= {f"cu_seqlens_{n}": np.asarray(e, np.int32) for n, e in zip("qk", cu_seqlens, strict=True)}
    held = {name: device.to_device(np.ascontiguousarray(a), name=name) for name, a in arrays.items() if a is not None}
    for name, array in held.items():
        record[name] = array.pointer
    for name in "qkv":
        record[f"{name}_strides"] = [0 if q.ndim == 3 else arrays[name][0].size, *_row_strides(arrays[name])]
    if bias is not None:
        full = np.ascontiguousarray(bias)
        record["bias_strides"] = [0] * (4 - full.ndim) + [
            0 if n == 1 else s // full.itemsize for s, n in zip(full.strides, full.shape, strict=True)
        ]
    for name in ("scale", "softcap", "batch", "num_heads", "seqlen_q", "seqlen_k"):
        record[name] = getattr(problem, name)
    record["scale64"], record["softcap64"] = problem.scale, problem.softcap
    record["group"], record["total_q"], record["total_k"] = problem.group, problem.total_q or 0, problem.total_k or 0
    record["left"], record["right"] = (NO_BOUND if b is None else b for b in (problem.left, problem.right))
    record["num_splits"], record["q_tiles"] = plan.num_splits, plan.q_tiles
    sums = np.dtype(np.float64 if q.dtype == np.float64 else np.float32)
    o, lse = device.empty(out.shape, out.dtype, name="o"), device.empty(lse_shape, sums, name="lse")
    o_strides = [0 if q.ndim == 3 else out[0].size, *_row_strides(out)]
    lse_strides = [0] * (3 - len(lse_shape)) + [s // 4 for s in np.empty(lse_shape, np.float32).strides]
    record["o_strides"], record["lse_strides"] = o_strides, lse_strides
    record["o"], record["lse"] = o.pointer, lse.pointer
    reports = []
    if plan.combine is None:
        reports.append(launch(device, plan.forward, record))
    else:
        o_partial = device.empty((plan.num_splits, *out.shape), sums, name="o_partial")
        lse_partial = device.empty((plan.num_splits, *lse_shape), sums, name="lse_partial")
        record["o"], record["lse"] = o_partial.pointer, lse_partial.pointer
        record["o_split_stride"], record["lse_split_stride"] = out.size, int(np.prod(lse_shape))
        reports.append(launch(device, plan.forward, record))
        combine = np.zeros((), COMBINE_PARAMS)
        combine["states"], combine["lses"] = o_partial.pointer, lse_partial.pointer
        combine["state_stride"], combine["state_lse_stride"] = out.size, int(np.prod(lse_shape))
        combine["o"], combine["lse"] = o.pointer, lse.pointer
        combine["state_strides"] = combine["o_strides"] = o_strides
        combine["state_lse_strides"] = combine["lse_strides"] = lse_strides
        combine["num_states"], combine["num_heads"] = plan.num_splits, problem.num_heads
        combine["seqlen_q"] = lse_shape[-1]
        combine["rows"] = int(np.prod(lse_shape))
        reports.append(launch(device, plan.combine, combine))
    return Run(o.to_host(), lse.to_host(), reports, plan)


def _row_strides(array: np.ndarray) -> list[int]:
    """Token and head strides of a contiguous array."""
    return [array.shape[-2] * array.shape[-1], array.shape[-1]]


def launch(device: Device, what: Launch, record: np.ndarray):
    kernel = device.load(compile_ptx(what.config, ARCH)).kernel(what.config.entry)
    return kernel.launch(what.grid, what.block, [record], shared_bytes=what.shared_bytes)
