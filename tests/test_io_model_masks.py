"""The traffic and the operations of masked problems against what the kernels do, to the last byte: lists included.

What the expression of a mask looks up, the arrays mask_*, is not in the model.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cuflash
from cuflash import io_model, masks
from cuflash.emulator import LaunchReport
from cuflash.layout import layout
from cuflash.masks.steps import Place
from cuflash.plan.arch import arch_named
from cuflash.plan.backward_traffic import backward_traffic
from cuflash.plan.masked_tiles import seen
from cuflash.plan.traffic import LaunchTraffic, forward_traffic, list_traffic
from cuflash.problem import Problem
from cuflash.records import bias_shape
from tests.attention import cases
from tests.attention.cases import Case, make
from tests.attention.test_mask_objects import CASE, MASKS, NOTHING, OF_BOTH, OF_HEAD, PACKED, small
from tests.gradients.cases import cotangent, vjp
from tests.gradients.test_mask_objects import small as small_backward
from tests.gradients.test_tiles import tiled
from tests.test_io_model_backward_exact import problem_of
from tests.test_io_model_exact import nonzero

DECIDED = {  # by intervals: also the gradient of a bias visits exactly the tiles that are not empty
    "window": masks.SlidingWindow(20, 3),
    "butterfly": masks.Butterfly(16),
    "heads": OF_HEAD,
    "blocks of heads": masks.where(lambda batch, head, q, k: (q // 16 + k // 16 + batch) % 4 < 2),
    "nothing": NOTHING,
    "everything": ~NOTHING,
}
EVERY = DECIDED | {name: MASKS[name] for name in ("batch and heads", "points", "reals")}


def masked(case: Case) -> tuple[Problem, dict[str, Any]]:
    """The problem of a case, and its cu_seqlens if it is packed."""
    problem, packing = problem_of(case)
    return replace(problem, mask=case.mask.program), packing


def agree(launches: list[LaunchReport], models: tuple[LaunchTraffic, ...]) -> None:
    """Reads of `turns` beyond the least are no disagreement: how often a block asks depends on others."""
    for launch, model in zip(launches, models, strict=True):
        read = {name: count for name, count in launch.read_by_array.items() if not name.startswith("mask_")}
        assert read.get("turns", 0) >= model.read.get("turns", 0)
        assert nonzero(read) == nonzero({**model.read, "turns": read.get("turns", 0)})
        assert nonzero(launch.written_by_array) == model.written


def hold_forward(case: Case) -> None:
    """The lists, the forward kernel and, of split keys, what combines."""
    with cuflash.emulate("sm_80") as device:
        cases.call(_Here(), case, make(case))
    problem, packing = masked(case)
    plan = io_model.plan_contiguous(problem, arch_named("sm_80"), case.options)
    lists = list_traffic(problem, plan.lists, **packing)
    agree(device.launches, (*lists, *forward_traffic(problem, plan, return_lse=True, **packing)))
    cost = io_model.flash_forward(problem, plan, return_lse=True, **packing)
    assert cost.matmul_flops == sum(launch.mma_flops for launch in device.launches)
    assert cost.bytes == sum(
        count
        for launch in device.launches[len(lists) :]
        for counts in (launch.read_by_array, launch.written_by_array)
        for name, count in counts.items()
        if not name.startswith("mask_")
    )


class _Here:
    """The device of the block around."""

    name = "emulated"

    def run(self, function: Any, *arrays: Any, **keywords: Any) -> Any:
        return function(*arrays, **keywords)


def hold_backward(case: Case, dlse: bool = True) -> None:
    """The launches of a pullback: its lists, prepare, backward, finish, the gradient of a bias."""
    inputs = make(case)
    given = cotangent(case, inputs)
    with cuflash.emulate("sm_80") as device:
        _, pullback = vjp(case, inputs, return_lse=dlse, options=case.options)
        before = len(device.launches)
        pullback(given if dlse else given[0])
    problem, packing = masked(case)
    shape = None if inputs.bias is None else bias_shape(layout(inputs.bias))
    plan = io_model.plan_backward_contiguous(problem, arch_named("sm_80"), case.options, shape)
    more = {"lse_cotangent": dlse, "bias_shape": shape, **packing}
    launches, lists = device.launches[before:], list_traffic(problem, plan.lists, **packing)
    agree(launches, (*lists, *backward_traffic(problem, plan, **more)))
    cost = io_model.flash_backward(problem, plan, **more)
    assert cost.matmul_flops == sum(launch.mma_flops for launch in launches)


@pytest.mark.parametrize("name", EVERY)
def test_forward(name: str) -> None:
    case = CASE.but(mask=EVERY[name], batch=2, num_heads=4, num_kv_heads=2, bias="h.k")
    hold_forward(small(case, block_n=32))
    hold_forward(cases.tiled(case, 3, block_m=16, block_n=16, num_warps=1))
    hold_forward(small(case.but(sequences=PACKED, tail=(3, 20), bias="")))


@pytest.mark.parametrize("name", EVERY)
def test_backward(name: str) -> None:
    case = CASE.but(mask=EVERY[name], batch=2, num_heads=4, num_kv_heads=2)
    hold_backward(small_backward(case), dlse=False)
    hold_backward(small_backward(case.but(sequences=PACKED, tail=(3, 20))))


@pytest.mark.parametrize("name", DECIDED)
@pytest.mark.parametrize("bias", ["bhqk", "k", "q."])
def test_gradient_of_a_bias(name: str, bias: str) -> None:
    hold_backward(small_backward(CASE.of_lengths(40, 70).but(mask=DECIDED[name], bias=bias)))


@pytest.mark.parametrize("lengths", [(1, 130), (130, 1), (33, 47)], ids=str)
def test_lengths(lengths: tuple[int, int]) -> None:
    for mask in (DECIDED["window"], OF_BOTH):
        hold_forward(CASE.of_lengths(*lengths).but(mask=mask, options=cuflash.Options(num_splits=1)))
        hold_backward(CASE.of_lengths(*lengths).but(mask=mask))


def test_chunks_of_columns() -> None:
    case = CASE.but(mask=DECIDED["butterfly"], head_dim=32, head_dim_v=48)
    hold_forward(small(case, block_dv=16))
    wide = case.but(head_dim=192, head_dim_v=192)
    hold_backward(small_backward(wide, block_d=64, block_dv=128))


@pytest.mark.parametrize("name", EVERY)
def test_operations_are_those_of_visible_pairs(name: str) -> None:
    case = CASE.but(mask=EVERY[name], batch=2, num_heads=4, num_kv_heads=2)
    shown = np.broadcast_to(cases.seen(case), (2, 4, 70, 90))
    problem, _ = masked(case)
    assert io_model.useful_flops(problem) == 2 * shown.sum() * 32
    keys = shown.reshape(2, 2, 2, 70, 90).any(axis=(2, 3)).sum()
    fixed = 2 * 2 * 2 * 70 * 4 * 16
    assert io_model.compulsory_bytes(problem) == fixed + 2 * int(keys) * 32
    for of_place, axis in zip(seen(problem.mask, Place(70, 90, 1, 3, 1)), (1, 0), strict=True):
        np.testing.assert_array_equal(of_place, shown[1, 3].any(axis=axis))


def butterfly(length: int, head_dim: int, block: int) -> tuple[Problem, io_model.Cost, io_model.Cost, cuflash.Options]:
    """One head of bfloat16 in tiles of 64 by 64: the costs of both passes."""
    mask = masks.Butterfly(block)
    problem = io_model.problem_of_shapes((1, length, 1, head_dim), mask=mask)
    forward = cases.tiled(Case(dtype="bfloat16", head_dim=head_dim, head_dim_v=head_dim, mask=mask), block_n=64)
    backward = tiled(Case(dtype="bfloat16", head_dim=head_dim, head_dim_v=head_dim, mask=mask), block_m=64)
    options = replace(forward.options, backward_config=backward.options.backward_config)
    arch = arch_named("sm_80")
    costs = (
        io_model.flash_forward(problem, io_model.plan_contiguous(problem, arch, options)),
        io_model.flash_backward(problem, io_model.plan_backward_contiguous(problem, arch, options)),
    )
    return problem, *costs, options


def test_traffic_of_block_sparse_attention_is_that_of_the_theorem() -> None:
    """Θ(N·d + N²·d²·s/M) bytes at density s (Dao et al. 2022, proposition 4), here to the byte.

    Forward: queries and outputs once, and per visited pair of tiles the 64 keys and values and an entry of the list;
    backward: K, V and their gradients once, o and its cotangent, and per pair queries, cotangents, lse, Δ, an entry, a
    turn taken and passed, and the sums of dq there and back.
    """
    for length in (2**10, 2**12, 2**14):
        for head_dim, block in ((64, 64), (128, 64), (64, 256)):
            problem, forward, backward, _ = butterfly(length, head_dim, block)
            blocks = length // block
            density = (1 + math.log2(blocks)) / blocks
            assert problem.mask.visible_pairs(Place(length, length)) == density * length**2
            pairs = int(density * (length // 64) ** 2)
            row, tiles = 2 * head_dim, length // 64
            assert forward.bytes == 2 * length * row + 8 * tiles + pairs * (2 * 64 * row + 4)
            prepare = 2 * length * row + 32 * 4 * length + length * (4 * head_dim + 8) + 4 * tiles
            finish = length * (4 * head_dim + row)
            once = 4 * length * row + 4 * tiles
            visit = 64 * (2 * row + 2 * 4 + 2 * 4 * head_dim) + 8 + 8
            assert backward.bytes == prepare + finish + once + pairs * visit
            assert forward.matmul_flops == forward.useful_flops


def test_bytes_of_a_butterfly_are_counted() -> None:
    """The same as the emulated kernels count them."""
    _, forward, backward, options = butterfly(1024, 64, 64)
    q, k, v, dout = np.random.default_rng(0).standard_normal((4, 1, 1024, 1, 64)).astype(ml_dtypes.bfloat16)
    with cuflash.emulate("sm_80") as device:
        _, pullback = cuflash.vjp(cuflash.attention, q, k, v, mask=masks.Butterfly(64), options=options)
        forward_launches = len(device.launches)
        pullback(dout)
    (report,) = device.launches[1:forward_launches]
    lse = report.written_by_array["lse"]  # which a pullback keeps
    assert report.global_read + report.global_written - lse == forward.bytes
    launches = device.launches[forward_launches + 2 :]
    waited = sum(launch.read_by_array.get("turns", 0) for launch in launches) - backward.read["turns"]
    assert sum(launch.global_read + launch.global_written for launch in launches) - waited == backward.bytes
