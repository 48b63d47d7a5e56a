"""Plans of few queries over a paged cache: what is under way, how the device is filled, what they depend on."""

from __future__ import annotations

import math

import pytest

from cuflash import Options
from cuflash.plan.arch import ARCHS, arch_named
from cuflash.plan.config import ELEMENT_BYTES, ForwardConfig
from cuflash.plan.cost import blocks_per_sm
from cuflash.plan.forward import MIN_DECODE_SPLIT_KEYS, ForwardPlan, max_head_dim, plan_forward
from cuflash.plan.shares import MAX_SHARES
from cuflash.problem import Problem

H200 = 132  # multiprocessors
LITTLE = 30 * 1024  # bytes a multiprocessor that 4.8 TB/s over 800 ns take


def decode(batch: int = 8, room: int = 4096, heads: int = 32, kv_heads: int = 8, **changed: object) -> Problem:
    fields = {"head_dim": 128, "head_dim_v": 128, "dtype": "bfloat16", "seqlen_q": 1, "right": 0, "block_size": 16}
    fields |= {"scale": 1.0} | changed
    return Problem(batch=batch, seqlen_k=room, num_heads=heads, num_kv_heads=kv_heads, **fields)  # type: ignore[arg-type]


def plan(problem: Problem, arch: str = "sm_90", options: Options | None = None) -> ForwardPlan:
    return plan_forward(problem, arch_named(arch), load_bytes=16, store_bytes=16, options=options, sm_count=H200)


def config(problem: Problem, arch: str = "sm_90") -> ForwardConfig:
    found = plan(problem, arch).forward.config
    assert isinstance(found, ForwardConfig)
    return found


def tile_bytes(config: ForwardConfig) -> int:
    """Keys and values of a stage."""
    return ELEMENT_BYTES[config.dtype] * config.block_n * (config.head_dim + config.head_dim_v)


@pytest.mark.parametrize("batch", [1, 2, 8, 32, 64, 256])
@pytest.mark.parametrize("room", [1024, 4096, 16384, 32768])
@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 8), (8, 8), (32, 32), (32, 1), (16, 1)])
def test_bytes_under_way_on_an_h200(batch: int, room: int, heads: int, kv_heads: int) -> None:
    """Enough for all of the bandwidth, but where keys are too few for more splits; at least half of it from 32 MB."""
    problem = decode(batch, room, heads, kv_heads)
    found = plan(problem)
    chosen = config(problem)
    assert chosen.num_stages == 2
    blocks = found.forward.grid[0]
    resident = min(blocks / H200, blocks_per_sm(chosen, arch_named("sm_90")))
    under_way = resident * tile_bytes(chosen)
    most_splits = found.num_splits >= 0.85 * batch * min(room // MIN_DECODE_SPLIT_KEYS, MAX_SHARES)
    assert under_way >= LITTLE or most_splits
    if problem.batch * room * kv_heads * 512 >= 2**25:
        assert under_way >= LITTLE / 2


@pytest.mark.parametrize("seqlen_q", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("group", [1, 2, 4, 7, 16, 32, 64])
def test_all_rows_of_a_sequence_are_one_tile_as_far_as_64(seqlen_q: int, group: int) -> None:
    chosen, rows = config(decode(heads=2 * group, kv_heads=2, seqlen_q=seqlen_q)), seqlen_q * group
    if rows <= 64:
        assert rows <= chosen.block_m < max(32, 2 * rows)
    assert chosen.grouped == (group > 1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_no_length_changes_the_configuration(dtype: str) -> None:
    problems = [decode(batch, room, dtype=dtype) for batch in (1, 3, 200) for room in (16, 1600, 128000)]
    found = {config(problem) for problem in problems}
    assert len({chosen.split for chosen in found}) == len(found) <= 2
    assert all(chosen.even == chosen.split for chosen in found)
    combines = [launch for launch in (plan(problem).combine for problem in problems) if launch is not None]
    assert len({launch.config for launch in combines}) == 1


def test_splits_follow_from_what_the_host_knows() -> None:
    """Room of the table, not lengths: one wave of blocks; of more sequences waves with two shares for each."""
    slots = H200 * blocks_per_sm(config(decode()), arch_named("sm_90"))
    for batch in (1, 8, 32):
        found = plan(decode(batch, 16384))
        assert 0.95 * slots < found.forward.grid[0] <= slots
    for batch in (64, 256):
        found = plan(decode(batch))
        wave = slots // 8
        assert found.forward.grid[0] == 8 * wave * -(-2 * batch // wave)
    assert plan(decode(), options=Options(num_splits=5)).num_splits == 5
    assert plan(decode(), options=Options(num_splits=5)).even is None


def test_what_is_not_worth_a_second_launch_is_not_split() -> None:
    """128 keys; or 512, if there is a block for every place without."""
    for problem in (decode(1, 64), decode(1, 128), decode(256, 512), decode(256, left=300)):
        assert (plan(problem).num_splits, plan(problem).even) == (1, None)
    for problem in (decode(1, 144), decode(64, 512), decode(256, 528)):
        assert plan(problem).even is not None


def test_packed_queries_and_masks_have_splits_of_their_own() -> None:
    packed = plan(decode(8, total_q=8, total_k=0))
    assert packed.even is None
    assert packed.num_splits > 1


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("group", [1, 4, 32, 64])
def test_every_head_dim_that_fits_has_a_plan(arch: str, dtype: str, group: int) -> None:
    for head_dim in {16, 80, 128, max_head_dim(dtype, arch_named(arch))}:
        access = math.gcd(16, head_dim * ELEMENT_BYTES[dtype])
        problem = decode(heads=group, kv_heads=1, dtype=dtype, head_dim=head_dim, head_dim_v=head_dim)
        found = plan_forward(problem, arch_named(arch), load_bytes=access, store_bytes=access)
        assert found.forward.shared_bytes <= arch_named(arch).shared_per_block
