"""Costs of the forward pass: standard and chunked attention, and the kernels of this package."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from cuflash.errors import InvalidValueError
from cuflash.io_model.cost import Cost, Sizes, list_bytes, product_count, special_operations
from cuflash.plan.config import ForwardConfig, round_up
from cuflash.plan.forward import ForwardPlan
from cuflash.plan.traffic import all_query_tiles, forward_traffic
from cuflash.problem import Problem


def standard(
    problem: Problem,
    *,
    cu_seqlens_q: Sequence[int] | None = None,
    cu_seqlens_k: Sequence[int] | None = None,
    return_lse: bool = False,
) -> Cost:
    """Standard attention: S = τQKᵀ, P = softmax(S), O = PV, each operand of each operation once through memory.

    S and P have the dtype of the inputs; masks come from indices and cost nothing; a bias is read once per score.
    """
    b = Sizes(problem, cu_seqlens_q, cu_seqlens_k)
    read = {"q": b.q, "k": b.k, "v": b.v, "scores": b.scores * b.element, "weights": b.scores * b.element}
    written = {"scores": b.scores * b.element, "weights": b.scores * b.element, "o": b.o}
    return _in_memory(b, read, written, return_lse, 2 * b.scores * b.element)


def chunked(
    problem: Problem,
    query_chunk: int = 1024,
    key_chunk: int = 4096,
    *,
    cu_seqlens_q: Sequence[int] | None = None,
    cu_seqlens_k: Sequence[int] | None = None,
    return_lse: bool = False,
) -> Cost:
    """Rabe & Staats 2021, "Self-attention does not need O(n²) memory", as array operations on chunks.

    Every chunk of queries meets every chunk of keys; a meeting leaves a summary (P·V, Σ P, max) in float32 (float64 of
    float64), and the summaries of a query chunk are merged once all are there. Scores of a chunk go through memory as
    in `standard`.
    """
    for name, chunk in (("query_chunk", query_chunk), ("key_chunk", key_chunk)):
        if chunk < 1:
            raise InvalidValueError(f"{name} = {chunk}: must be >= 1")
    b = Sizes(problem, cu_seqlens_q, cu_seqlens_k)
    state = (problem.head_dim_v + 2) * b.wide
    q_passes = sum(n * -(-m // key_chunk) for n, m in b.seqlens)  # query rows times the key chunks that they meet
    k_passes = sum(m * -(-n // query_chunk) for n, m in b.seqlens)
    summaries = problem.num_heads * q_passes * state
    read = {
        "q": problem.num_heads * q_passes * problem.head_dim * b.element,
        "k": problem.num_kv_heads * k_passes * problem.head_dim * b.element,
        "v": problem.num_kv_heads * k_passes * problem.head_dim_v * b.element,
        "scores": b.scores * b.element,
        "weights": b.scores * b.element,
        "summaries": summaries,
    }
    written = {"scores": b.scores * b.element, "weights": b.scores * b.element, "summaries": summaries, "o": b.o}
    live = sum(
        2 * min(n, query_chunk) * min(m, key_chunk) * b.element + min(n, query_chunk) * -(-m // key_chunk) * state
        for n, m in b.seqlens
    )
    return _in_memory(b, read, written, return_lse, problem.num_heads * live)


def _in_memory(b: Sizes, read: dict[str, int], written: dict[str, int], return_lse: bool, workspace_bytes: int) -> Cost:
    """The cost of an algorithm that keeps scores in memory; bias and lse are added to what it moves."""
    if b.bias_element:
        read["bias"] = b.scores * b.bias_element
    if return_lse:
        written["lse"] = b.lse
    columns = b.problem.head_dim + b.problem.head_dim_v
    return b.cost(
        read,
        written,
        columns=columns,
        exponentials=b.scores * (2 if b.problem.softcap else 1),
        workspace_bytes=workspace_bytes,
        useful_flops=2 * b.area() * columns,
    )


def flash_forward(
    problem: Problem,
    plan: ForwardPlan,
    *,
    cu_seqlens_q: Sequence[int] | None = None,
    cu_seqlens_k: Sequence[int] | None = None,
    return_lse: bool = False,
    bias_elements: int | None = None,
) -> Cost:
    """The launches of a plan, exactly as the kernels load and store; tiles that the mask hides are not visited.

    Under a mask lists of tiles are read. What makes them (`cuflash.plan.traffic.list_traffic`) and what the expression
    of a mask looks up are not counted.

    `bias_elements` is the number of elements that the bias has, which `dram_bytes` counts once; by default one per
    visible (query, key) pair.
    """
    packing = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    read: Counter[str] = Counter()
    written: Counter[str] = Counter()
    for launch in forward_traffic(problem, plan, return_lse=return_lse, **packing):
        read.update(launch.read)
        written.update(launch.written)
    partial = sum(written[name] for name in ("o_partial", "lse_partial"))
    once = compulsory_bytes(problem, return_lse=return_lse, bias_elements=bias_elements, **packing)
    config = cast(ForwardConfig, plan.forward.config)
    tiles = all_query_tiles(problem, config, **packing)
    visits = sum(heads * tile.key_tiles for tile, heads in tiles) * -(-config.head_dim_v // config.block_dv)
    tile = config.block_m * config.block_n
    # The four lanes of a row each compute its rescaling factor.
    special = tile * special_operations(problem.softcap, problem.dtype) + 4 * config.block_m
    return Cost(
        dtype=config.dtype,
        read=dict(read),
        written=dict(written),
        dram_bytes=once + 2 * partial,
        matmul_flops=2
        * product_count(config.dtype)
        * visits
        * tile
        * (round_up(config.head_dim, 16) + config.block_dv),
        exponentials=0 if problem.dtype == "float64" else visits * special,
        workspace_bytes=partial + list_bytes(plan.lists),
        useful_flops=useful_flops(problem, **packing),
    )


def useful_flops(
    problem: Problem, *, cu_seqlens_q: Sequence[int] | None = None, cu_seqlens_k: Sequence[int] | None = None
) -> int:
    """2·area·(head_dim + head_dim_v), area the visible (query, key) pairs over batch and heads."""
    area = Sizes(problem, cu_seqlens_q, cu_seqlens_k).area()
    return 2 * area * (problem.head_dim + problem.head_dim_v)


def compulsory_bytes(
    problem: Problem,
    *,
    cu_seqlens_q: Sequence[int] | None = None,
    cu_seqlens_k: Sequence[int] | None = None,
    return_lse: bool = False,
    bias_elements: int | None = None,
) -> int:
    """Bytes that any algorithm moves: every visible key, value and query read once, every output written once.

    `bias_elements` is the number of elements that the bias has; by default one per visible (query, key) pair.
    """
    b = Sizes(problem, cu_seqlens_q, cu_seqlens_k)
    total = b.q + b.o + b.visible_keys_and_values() + (b.lse if return_lse else 0)
    if problem.bias_dtype:
        area = b.area()
        total += b.bias_element * (area if bias_elements is None else min(area, bias_elements))
    return total


def costs(
    problem: Problem, plan: ForwardPlan, *, return_lse: bool = False, bias_shape: Sequence[int] | None = None
) -> dict[str, Cost]:
    """Costs of a dense problem by algorithm: "standard", "chunked" and "flash", the launches of `plan`.

    All have the plan's kind of products.
    """
    elements = None if bias_shape is None else math.prod(bias_shape)
    same = replace(problem, dtype=cast(ForwardConfig, plan.forward.config).dtype)
    return {
        "standard": standard(same, return_lse=return_lse),
        "chunked": chunked(same, return_lse=return_lse),
        "flash": flash_forward(problem, plan, return_lse=return_lse, bias_elements=elements),
    }
