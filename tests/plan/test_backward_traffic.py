"""Bytes of a backward plan's launches, by hand and by brute force; the emulator's count is in
tests/test_io_model_backward_exact.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cuflash.errors import InvalidValueError
from cuflash.options import Options
from cuflash.plan.arch import arch_named
from cuflash.plan.backward import plan_backward
from cuflash.plan.backward_traffic import KeyTile, backward_traffic, key_tiles
from cuflash.plan.config import BackwardConfig
from cuflash.plan.traffic import LaunchTraffic, slot_owners
from cuflash.problem import Problem

PROBLEM = Problem(2, 100, 70, 4, 2, 32, 48, "float16", 1.0)
CONFIG = BackwardConfig(
    dtype="float16", bias_dtype="none", head_dim=32, head_dim_v=48, block_m=64, block_n=32, block_d=32, block_dv=48,
    num_warps=2, key_warps=2, num_stages=1, load_bytes=16, store_bytes=16, windowed=False, softcapped=False,
    varlen=False, deterministic=True,
)  # fmt: skip


def traffic(
    problem: Problem, config: BackwardConfig = CONFIG, bias_shape: tuple[int, int, int, int] | None = None, **more: Any
) -> tuple[LaunchTraffic, ...]:
    options = Options(backward_config=config, deterministic=config.deterministic)
    plan = plan_backward(
        problem, arch_named("sm_80"), load_bytes=16, store_bytes=16, bias_shape=bias_shape, options=options
    )
    return backward_traffic(problem, plan, bias_shape=bias_shape, **more)


def test_dense() -> None:
    prepare, backward, finish = traffic(PROBLEM, lse_cotangent=True)
    rows, q_tiles, k_tiles = 2 * 4 * 100, 2 * 4 * 2, 3
    assert prepare.read == {
        "o": rows * 48 * 2,
        "d_o": rows * 48 * 2,
        "lse": rows * 32 * 4,
        "d_lse": rows * 32 * 4,
    }
    sums = q_tiles * 64 * 32 * 4
    cleared = {"dq_sum": sums, "turns": q_tiles * 4, "row_lse": q_tiles * 64 * 4, "row_delta": q_tiles * 64 * 4}
    assert prepare.written == cleared
    assert backward.read == {
        "k": 2 * 2 * 70 * 32 * 2,
        "v": 2 * 2 * 70 * 48 * 2,
        "q": k_tiles * rows * 32 * 2,
        "d_o": k_tiles * rows * 48 * 2,
        **{name: k_tiles * count for name, count in cleared.items()},
    }
    assert backward.written == {
        "dq_sum": k_tiles * sums,
        "turns": k_tiles * q_tiles * 4,
        "dk": 2 * 2 * 70 * 32 * 2,
        "dv": 2 * 2 * 70 * 48 * 2,
    }
    assert (finish.read, finish.written) == ({"dq_sum": sums}, {"dq": rows * 32 * 2})


def test_any_order_of_additions_takes_no_turns() -> None:
    _, fixed, _ = traffic(PROBLEM)
    _, free, _ = traffic(PROBLEM, replace(CONFIG, deterministic=False))
    for name in ("read", "written"):
        assert getattr(free, name) == {k: v for k, v in getattr(fixed, name).items() if k != "turns"}


def test_only_what_sees_each_other_is_read() -> None:
    problem = replace(PROBLEM, seqlen_q=64, seqlen_k=200, left=10, right=0)
    _, backward, _ = traffic(problem, replace(CONFIG, windowed=True))
    assert backward.read["k"] == 2 * 2 * (64 + 10) * 32 * 2
    # Query i sees the keys 126 + i to 136 + i.
    seen = [sum(max(126 + i, key) <= min(136 + i, key + 31) for i in range(64)) for key in range(0, 224, 32)]
    assert backward.read["q"] == 8 * sum(seen) * 32 * 2
    assert backward.read["row_lse"] == 8 * sum(map(bool, seen)) * 64 * 4
    assert backward.written["dk"] == 2 * 2 * 200 * 32 * 2  # zeros where no query sees a key
    unseen = replace(PROBLEM, seqlen_k=1, right=0)
    assert traffic(unseen, replace(CONFIG, windowed=True), lse_cotangent=True)[0].read["d_lse"] == 2 * 4 * 32 * 4


def test_each_chunk_of_columns_reads_everything_again() -> None:
    problem, config = replace(PROBLEM, head_dim=200), replace(CONFIG, head_dim=200, block_d=64)
    _, backward, finish = traffic(problem, config)
    assert backward.read["v"] == 4 * 2 * 2 * 70 * 48 * 2
    assert backward.written["dv"] == 2 * 2 * 70 * 48 * 2
    assert finish.read["dq_sum"] == 2 * 4 * 2 * 4 * 64 * 64 * 4
    assert finish.written["dq"] == 2 * 4 * 100 * 200 * 2


@pytest.mark.parametrize(
    ("shape", "keys"), [((2, 4, 100, 70), 2 * 70), ((1, 1, 1, 70), 70), ((1, 4, 100, 1), 2 * 70), ((1, 1, 1, 1), 70)]
)
def test_gradient_of_a_bias_reads_keys_again_for_each_tile_of_its_queries(
    shape: tuple[int, int, int, int], keys: int
) -> None:
    problem, config = replace(PROBLEM, bias_dtype="float32"), replace(CONFIG, bias_dtype="float32")
    *_, gradient = traffic(problem, config, shape)
    assert gradient.read["k"] == 2 * 4 * keys * 32 * 2
    assert gradient.read["bias"] == 2 * 4 * 100 * 70 * 4
    assert gradient.written == {"dbias": shape[0] * shape[1] * shape[2] * shape[3] * 4}


def test_packed_blocks_search_their_sequence() -> None:
    problem = replace(PROBLEM, batch=2, seqlen_q=64, seqlen_k=9, total_q=70, total_k=9)
    config = replace(CONFIG, varlen=True)
    ends = {"cu_seqlens_q": [0, 64, 64], "cu_seqlens_k": [0, 9, 9]}
    prepare, backward, finish = traffic(problem, config, **ends)
    # Slots of queries: 0 and 1 are sequence 0's, 2 sequence 1's, 3 that of the tokens behind.
    assert prepare.read["cu_seqlens_q"] == finish.read["cu_seqlens_q"] == 4 * 64 * 4 * (2 * (1 + 2) + (2 + 2) + (2 + 1))
    assert prepare.written["row_lse"] == 4 * 2 * 64 * 4  # tokens behind the last sequence are a tile too
    assert backward.read["cu_seqlens_k"] == 4 * 2 * ((1 + 3) + (2 + 3) + (2 + 1))
    assert backward.read["cu_seqlens_q"] == 4 * 2 * (2 + 2 + 1)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(InvalidValueError, match="cu_seqlens_q = None: must list the 3 ends"):
        traffic(replace(PROBLEM, total_q=200, total_k=140), replace(CONFIG, varlen=True))
    config = replace(CONFIG, bias_dtype="float32")
    problem = replace(PROBLEM, bias_dtype="float32")
    options = Options(backward_config=config)
    plan = plan_backward(
        problem, arch_named("sm_80"), load_bytes=16, store_bytes=16, bias_shape=(1, 1, 1, 70), options=options
    )
    with pytest.raises(InvalidValueError, match="bias_shape = None: must be the four lengths"):
        backward_traffic(problem, plan)


BOUNDS = st.none() | st.integers(0, 5) | st.integers(0, 150)


@given(
    st.integers(0, 150), st.integers(0, 150), BOUNDS, BOUNDS,
    st.sampled_from([16, 64]), st.sampled_from([16, 48]), st.sampled_from([1, 4]),
)  # fmt: skip
def test_key_tiles_are_those_of_visible_pairs(
    seqlen_q: int, seqlen_k: int, left: int | None, right: int | None, block_m: int, block_n: int, turn_tiles: int
) -> None:
    """What a block reads and visits, from the definition of a window."""
    problem = replace(PROBLEM, left=left, right=right)
    config = replace(CONFIG, block_m=block_m, block_n=block_n, num_warps=1, key_warps=1)

    def visible(i: int, j: int) -> bool:
        at = i + seqlen_k - seqlen_q
        return (left is None or j >= at - left) and (right is None or j <= at + right)

    want = []
    for key in range(0, seqlen_k, block_n):
        tile = range(key, min(key + block_n, seqlen_k))
        pairs = [(i, j) for i in range(seqlen_q) for j in tile if visible(i, j)]
        queries = {i for i, _ in pairs}
        visits = {i // block_m for i in queries}
        turns = {visit // turn_tiles for visit in visits}
        want.append(KeyTile(len(tile), len({j for _, j in pairs}), len(queries), len(visits), len(turns)))
    assert list(key_tiles(problem, config, seqlen_q, seqlen_k, turn_tiles)) == want


@given(st.lists(st.integers(0, 90), min_size=1, max_size=9), st.integers(0, 90), st.sampled_from([16, 64]))
def test_every_slot_finds_its_owner(lengths: list[int], behind: int, block: int) -> None:
    """The bisection of the kernels, slot by slot."""
    ends = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    slots = (ends[-1] + behind) // block + len(lengths) + 1
    steps, owned = 0, 0
    for slot in range(slots):
        low, high = 0, len(lengths) + 1
        while high - low > 1:
            middle = low + (high - low) // 2
            low, high = (middle, high) if ends[middle] // block + middle <= slot else (low, middle)
            steps += 1
        owned += low < len(lengths)
    assert tuple(slot_owners(ends, block, slots)) == (steps, owned, slots - owned)
