"""Costs of attention over a paged cache."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import cast

from cuflash import check
from cuflash.check import Packing
from cuflash.errors import InvalidShapeError, InvalidValueError
from cuflash.io_model.cost import Cost, product_count, special_operations
from cuflash.io_model.forward import compulsory_bytes, useful_flops
from cuflash.io_model.shapes import layout_of_shape, plan_contiguous
from cuflash.options import Options
from cuflash.plan.arch import arch_named
from cuflash.plan.config import ForwardConfig, round_up
from cuflash.plan.forward import ForwardPlan
from cuflash.plan.paged_traffic import paged_lengths, paged_tiles, paged_traffic
from cuflash.problem import Problem
from cuflash.records import partials


def paged_forward(
    q_shape: Sequence[int],
    k_cache_shape: Sequence[int],
    seq_lens: Sequence[int],
    *,
    v_cache_shape: Sequence[int] | None = None,
    max_blocks: int | None = None,
    cu_seqlens_q: Sequence[int] | None = None,
    dtype: str = "bfloat16",
    causal: bool = True,
    window: Sequence[int | None] | None = None,
    softcap: float | None = None,
    bias_shape: Sequence[int] | None = None,
    bias_dtype: str | None = None,
    return_lse: bool = False,
    arch: str = "sm_80",
    sm_count: int | None = None,
    options: Options | None = None,
) -> Cost:
    """The cost of one `cuflash.paged_attention` call, exactly as the kernels load and store.

    Parameters
    ----------
    q_shape, k_cache_shape, v_cache_shape : sequence of int
        Shapes as `cuflash.paged_attention` takes them; v_cache as k_cache where left out.
    seq_lens : sequence of int
        Keys of each sequence.
    max_blocks : int, optional
        Columns of the block table; by default as many as the longest sequence needs.
    cu_seqlens_q : sequence of int, optional
        Offsets of packed queries.
    dtype, causal, window, softcap, bias_shape, bias_dtype, return_lse, arch, options
        As `compare`; a window, no mask.
    sm_count : int, optional
        Multiprocessors of the device, on which the number of splits depends; by default those of the architecture's
        usual part.

    Raises
    ------
    InvalidValueError, InvalidTypeError
        As `cuflash.paged_attention` raises for arrays of these shapes and dtypes.
    """
    problem = _problem(
        q_shape, k_cache_shape, seq_lens, v_cache_shape, max_blocks, cu_seqlens_q, dtype,
        check.scores(causal, window, None, softcap), bias_shape, bias_dtype,
    )  # fmt: skip
    known = arch_named(arch)
    check.check_kernel_limits(problem, known)
    check.check_precision(problem, options or Options())
    plan = plan_contiguous(problem, known, options, sm_count)
    elements = None if bias_shape is None else math.prod(bias_shape)
    return _cost(problem, plan, seq_lens, cu_seqlens_q, return_lse, elements)


def workspace_bytes(problem: Problem, plan: ForwardPlan) -> int:
    """Partial states that there may be, and of even work whose they are."""
    if plan.combine is None:
        return 0
    states = partials(problem, plan)
    table = 8 * problem.batch if plan.even is not None else 0
    return states.dtype.itemsize * (math.prod(states.shape) + math.prod(states.lse_shape)) + table


def _problem(
    q_shape: Sequence[int],
    k_shape: Sequence[int],
    seq_lens: Sequence[int],
    v_shape: Sequence[int] | None,
    max_blocks: int | None,
    cu_seqlens_q: Sequence[int] | None,
    dtype: str,
    asked: check.Scores,
    bias_shape: Sequence[int] | None,
    bias_dtype: str | None,
) -> Problem:
    if len(k_shape) != 4 or k_shape[1] < 1:
        axes = "(num_blocks, block_size, num_kv_heads, dim), block_size at least 1"
        raise InvalidShapeError(f"k_cache_shape = {tuple(k_shape)}: must be {axes}")
    if cu_seqlens_q is None and len(seq_lens) != q_shape[0]:
        raise InvalidValueError(f"seq_lens = {seq_lens}: must be {q_shape[0]} lengths, one per sequence of q")
    block_size = k_shape[1]
    most = max(seq_lens, default=0)
    room = block_size * (-(-most // block_size) if max_blocks is None else max_blocks)
    if cu_seqlens_q is None and len(q_shape) == 3:
        q_shape = (q_shape[0], 1, *q_shape[1:])
    q, k, v = (
        layout_of_shape(name, shape, dtype)
        for name, shape in (("q", q_shape), ("k_cache", k_shape), ("v_cache", v_shape or k_shape))
    )
    bias = None if bias_shape is None else layout_of_shape("bias", bias_shape, bias_dtype or dtype)
    longest = q_shape[1]
    if cu_seqlens_q is not None:
        longest = max((b - a for a, b in pairwise(cu_seqlens_q)), default=0)
    packing = Packing(len(seq_lens), longest, room, cu_seqlens_q is not None, block_size)
    return check.problem(q, k, v, bias, asked, packing)


def _cost(
    problem: Problem,
    plan: ForwardPlan,
    seq_lens: Sequence[int],
    cu_seqlens_q: Sequence[int] | None,
    return_lse: bool,
    bias_elements: int | None,
) -> Cost:
    config = cast(ForwardConfig, plan.forward.config)
    read: Counter[str] = Counter()
    written: Counter[str] = Counter()
    for launch in paged_traffic(problem, plan, seq_lens, cu_seqlens_q=cu_seqlens_q, return_lse=return_lse):
        read.update(launch.read)
        written.update(launch.written)
    partial = sum(written[name] for name in ("o_partial", "lse_partial", "shares"))
    lengths = paged_lengths(problem, seq_lens, cu_seqlens_q)
    # The same sequences side by side: what must be moved and computed does not depend on where keys lie.
    packing = {
        f"cu_seqlens_{side}": [0, *accumulate(x)] for side, x in zip("qk", zip(*lengths, strict=True), strict=True)
    }
    packed = replace(problem, total_q=packing["cu_seqlens_q"][-1], total_k=packing["cu_seqlens_k"][-1], block_size=None)
    once = compulsory_bytes(packed, return_lse=return_lse, bias_elements=bias_elements, **packing)
    chunks = -(-config.head_dim_v // config.block_dv)
    heads = problem.num_heads // (problem.group if config.grouped else 1)
    visits = heads * chunks * sum(tile.key_tiles for pair in lengths for tile in paged_tiles(problem, config, *pair))
    tile = config.block_m * config.block_n
    columns = round_up(config.head_dim, 16) + config.block_dv
    special = tile * special_operations(problem.softcap, problem.dtype) + 4 * config.block_m
    return Cost(
        dtype=config.dtype,
        read=dict(read),
        written=dict(written),
        dram_bytes=once + 2 * partial,
        matmul_flops=2 * product_count(config.dtype) * visits * tile * columns,
        exponentials=0 if problem.dtype == "float64" else visits * special,
        workspace_bytes=workspace_bytes(problem, plan),
        useful_flops=useful_flops(packed, **packing),
    )
