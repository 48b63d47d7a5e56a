"""Costs of the backward pass, from the cotangents of out and lse to the gradients: standard attention and the kernels.

Both take out and lse from the forward pass as they take q, k and v. Standard attention also keeps P.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from cuflash.io_model.cost import Cost, Sizes, list_bytes, product_count, special_operations
from cuflash.io_model.shapes import in_rank_4
from cuflash.plan.backward import BackwardPlan
from cuflash.plan.backward_cost import column_chunks, shares
from cuflash.plan.backward_traffic import TURN, backward_traffic, sums_of_tile, visits
from cuflash.plan.config import BackwardConfig, BiasGradientConfig, round_up
from cuflash.plan.launch import Launch
from cuflash.plan.traffic import INDEX, sum_bytes
from cuflash.problem import Problem


def standard_backward(
    problem: Problem,
    *,
    cu_seqlens_q: Sequence[int] | None = None,
    cu_seqlens_k: Sequence[int] | None = None,
    lse_cotangent: bool = False,
    bias_shape: Sequence[int] | None = None,
) -> Cost:
    """Standard attention, which kept P: five array operations, each operand of each once through memory.

    dV = PᵀdO, dP = dO Vᵀ, dS = P∘(dP − rowsum(P∘dP) + dlse), dQ = τ dS K, dK = τ dSᵀQ. P, dP and dS have the dtype of
    the inputs; under a softcap its tanh was kept too. The gradient of a bias of `bias_shape` is a sum over dS.
    """
    b = Sizes(problem, cu_seqlens_q, cu_seqlens_k)
    scores = b.scores * b.element
    read = {"q": b.q, "k": b.k, "v": b.v, "d_o": 2 * b.o, "weights": 2 * scores, "d_weights": scores}
    read["d_scores"] = (2 if bias_shape is None else 3) * scores
    written = {"dq": b.q, "dk": b.k, "dv": b.v, "d_weights": scores, "d_scores": scores}
    if problem.softcap:
        read["tanh"] = scores
    if lse_cotangent:
        read["d_lse"] = b.lse
    if bias_shape is not None:
        written["dbias"] = math.prod(bias_shape) * b.bias_element
    return b.cost(
        read,
        written,
        columns=2 * (problem.head_dim + problem.head_dim_v),
        exponentials=0,
        workspace_bytes=(4 if problem.softcap else 3) * scores,
        useful_flops=useful_backward_flops(problem, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k),
    )


def flash_backward(
    problem: Problem,
    plan: BackwardPlan,
    *,
    cu_seqlens_q: Sequence[int] | None = None,
    cu_seqlens_k: Sequence[int] | None = None,
    lse_cotangent: bool = False,
    bias_shape: Sequence[int] | None = None,
) -> Cost:
    """The launches of a plan, exactly as the kernels load, add and store, but for how often they ask for their turn."""
    packing = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    read: Counter[str] = Counter()
    written: Counter[str] = Counter()
    shape = None if bias_shape is None else in_rank_4(bias_shape)
    launches = backward_traffic(problem, plan, lse_cotangent=lse_cotangent, bias_shape=shape, **packing)
    for launch in launches:
        read.update(launch.read)
        written.update(launch.written)
    cleared = sum(launches[0].written.values())
    once = compulsory_backward_bytes(problem, lse_cotangent=lse_cotangent, bias_shape=bias_shape, **packing)
    flops, special = 0, 0
    for planned in plan.launches[1::2]:  # backward and, with a bias, its gradient
        of_launch = _operations(problem, planned, visits(problem, _tiled(planned), cu_seqlens_q, cu_seqlens_k).tiles)
        flops, special = flops + of_launch[0], special + of_launch[1]
    return Cost(
        dtype=_main(plan).dtype,
        read=dict(read),
        written=dict(written),
        dram_bytes=once + 2 * cleared,  # the workspaces, written once and read once
        matmul_flops=flops,
        exponentials=special,
        workspace_bytes=workspace_bytes(plan),
        useful_flops=useful_backward_flops(problem, **packing),
    )


def _tiled(launch: Launch) -> BackwardConfig | BiasGradientConfig:
    return cast(BackwardConfig | BiasGradientConfig, launch.config)


def _operations(problem: Problem, launch: Launch, tiles: int) -> tuple[int, int]:
    """Operations of the products and exponentials of the backward kernel or of that for the gradient of a bias."""
    config = _tiled(launch)
    pairs = config.block_m * config.block_n
    columns = round_up(config.head_dim, 16) + round_up(config.head_dim_v, 16)  # of S and dP
    chunks = 1
    if isinstance(config, BackwardConfig):
        own, others = shares(config), config.num_warps // config.key_warps
        chunks, dq_chunks = column_chunks(config), -(-config.head_dim // config.block_d)
        dv_chunks = -(-config.head_dim_v // config.block_dv)
        columns = chunks * columns + 16 * others * (dq_chunks * own.dk_columns + dv_chunks * own.dv_columns)
        columns += dq_chunks * sums_of_tile(config) // config.block_m
    flops = 2 * product_count(config.dtype) * tiles * pairs * columns
    return flops, chunks * tiles * pairs * special_operations(problem.softcap, problem.dtype)


def workspace_bytes(plan: BackwardPlan) -> int:
    """Of lse and delta of each query, the sums of dq and the counters of turns: linear in the number of queries.

    Under a mask also the lists of tiles and what they are made from.
    """
    wide, turns = sum_bytes(_main(plan).dtype), TURN * math.prod(plan.turn_shape)
    if plan.lists is not None:
        turns += list_bytes(plan.lists) + INDEX * math.prod(plan.lists.turn_shape or ())
    return wide * (2 * math.prod(plan.row_shape) + math.prod(plan.sum_shape)) + turns


def _main(plan: BackwardPlan) -> BackwardConfig:
    return cast(BackwardConfig, plan.launches[1].config)


def useful_backward_flops(
    problem: Problem, *, cu_seqlens_q: Sequence[int] | None = None, cu_seqlens_k: Sequence[int] | None = None
) -> int:
    """2·area·(3·head_dim + 2·head_dim_v): five products, S, dQ and dK along head_dim, dP and dV along head_dim_v."""
    area = Sizes(problem, cu_seqlens_q, cu_seqlens_k).area()
    return 2 * area * (3 * problem.head_dim + 2 * problem.head_dim_v)


def compulsory_backward_bytes(
    problem: Problem,
    *,
    cu_seqlens_q: Sequence[int] | None = None,
    cu_seqlens_k: Sequence[int] | None = None,
    lse_cotangent: bool = False,
    bias_shape: Sequence[int] | None = None,
) -> int:
    """Bytes that any algorithm moves that keeps out and lse: visible inputs and cotangents once, gradients once."""
    b = Sizes(problem, cu_seqlens_q, cu_seqlens_k)
    rows = 2 * b.q + 2 * b.o + b.lse * (2 if lse_cotangent else 1)
    total = rows + b.visible_keys_and_values() + b.k + b.v
    if bias_shape is not None:
        elements = math.prod(bias_shape)
        total += b.bias_element * (min(b.area(), elements) + elements)
    return total


def backward_costs(
    problem: Problem, plan: BackwardPlan, *, lse_cotangent: bool = False, bias_shape: Sequence[int] | None = None
) -> dict[str, Cost]:
    """Costs of a dense problem by algorithm: "standard" and "flash", the launches of `plan`; both of its products."""
    same = replace(problem, dtype=_main(plan).dtype)
    return {
        "standard": standard_backward(same, lse_cotangent=lse_cotangent, bias_shape=bias_shape),
        "flash": flash_backward(problem, plan, lse_cotangent=lse_cotangent, bias_shape=bias_shape),
    }
