"""Even work: shares of the same size of all sequences' keys, whatever the lengths, which only the device knows."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cuflash
from cuflash import Options
from cuflash.device import emulated
from cuflash.plan.params import FORWARD_PARAMS
from cuflash.plan.shares import EvenWork, even_work
from tests.paged.cases import Paged, check_paged, paged

LONG_AMONG_SHORT = (3, 17, 1, 900, 2, 40, 5)
SKEWED = (700, 350, 233, 175, 0, 140, 117)
MANY = (*(3 * i % 41 for i in range(39)), 600)  # more sequences than a warp has lanes


def call(case: Paged, queries: np.ndarray, sm_count: int = 4, arch: str = "sm_80", **keywords: Any) -> Any:
    with cuflash.emulate(arch, sm_count=sm_count) as device:
        out, lse = cuflash.paged_attention(queries, *case.arguments, return_lse=True, **keywords)
    return out, lse, device


def check(case: Paged, queries: np.ndarray, out: np.ndarray, lse: np.ndarray, **scores: Any) -> None:
    """Results (batch, seqlen_q, heads, dim) and (batch, heads, seqlen_q) against the oracle."""
    packed = out.reshape(-1, *out.shape[2:]), lse.swapaxes(0, 1).reshape(lse.shape[1], -1)
    check_paged(case, list(queries), *packed, **({"causal": True} | scores))


def was_even(device: Any) -> bool:
    return any(launch.written_by_array.get("shares") for launch in device.launches)


@pytest.mark.parametrize("lengths", [LONG_AMONG_SHORT, SKEWED, MANY, (0, 0, 0), (300,), (0, 513)], ids=len)
@pytest.mark.parametrize("block_size", [1, 5, 16])
@pytest.mark.parametrize("sm_count", [1, 4, 200])
def test_lengths(lengths, block_size, sm_count):
    """Few places and many; of one multiprocessor there are more sequences than places."""
    rng = np.random.default_rng(len(lengths))
    case = paged(rng, lengths, block_size, 2, 32)
    if case.block_tables.shape[1] * block_size < 200:  # room for more than a share
        wider = np.full((len(lengths), 200), 10**6, np.int32)
        case = replace(case, block_tables=np.concatenate([case.block_tables, wider], axis=1))
    queries = rng.standard_normal((len(lengths), 1, 4, 32)).astype(np.float16)
    out, lse, device = call(case, queries, sm_count)
    assert was_even(device)
    check(case, queries, out, lse)


@pytest.mark.parametrize("scores", [{"window": (300, 0)}, {"window": (200, None)}, {"causal": False}, {"softcap": 3.0}])
@pytest.mark.parametrize("seqlen_q", [1, 3])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (8, 2), (16, 1), (80, 2)])
def test_scores_queries_and_groups(scores, seqlen_q, heads, kv_heads):
    """The rows of the last group are more than one tile."""
    rng = np.random.default_rng(seqlen_q)
    case = paged(rng, SKEWED, 16, kv_heads, 32)
    queries = rng.standard_normal((len(SKEWED), seqlen_q, heads, 32)).astype(np.float16)
    out, lse, device = call(case, queries, sm_count=30, **scores)
    assert was_even(device)
    check(case, queries, out, lse, **scores)


@pytest.mark.parametrize("arch", ["sm_86", "sm_90", "sm_100", "sm_120"])
def test_architectures(arch):
    rng = np.random.default_rng(1)
    case = paged(rng, LONG_AMONG_SHORT, 16, 2, 128)
    queries = rng.standard_normal((len(LONG_AMONG_SHORT), 1, 8, 128)).astype(np.float16)
    out, lse, device = call(case, queries, arch=arch)
    assert was_even(device)
    check(case, queries, out, lse)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_wide_dtypes_and_odd_dims(dtype):
    rng = np.random.default_rng(2)
    case = paged(rng, SKEWED, 16, 2, 33, np.dtype(dtype), head_dim_v=7)
    queries = rng.standard_normal((len(SKEWED), 1, 4, 33)).astype(dtype)
    out, lse, device = call(case, queries)
    assert was_even(device)
    check(case, queries, out, lse)


def test_one_prepared_launch_answers_for_all_lengths():
    """As a CUDA graph that is replayed: nothing but what the arrays hold changes."""
    rng = np.random.default_rng(3)
    queries = rng.standard_normal((5, 1, 4, 32)).astype(np.float16)
    with cuflash.emulate("sm_80", sm_count=3) as device:
        for lengths in ((500, 3, 0, 77, 1), (1, 2, 3, 4, 500), (100, 500, 100, 100, 100), (0, 0, 0, 0, 0)):
            case = paged(rng, lengths, 16, 2, 32)
            tables = np.zeros((5, 40), np.int32)
            tables[:, : case.block_tables.shape[1]] = case.block_tables
            caches = [np.zeros((80, *cache.shape[1:]), np.float16) for cache in (case.k_cache, case.v_cache)]
            for room, cache in zip(caches, (case.k_cache, case.v_cache), strict=True):
                room[: len(cache)] = cache
            out, lse = cuflash.paged_attention(queries, *caches, tables, case.seq_lens, return_lse=True)
            check(case, queries, out, lse)
    assert len(device.prepared) == 1
    assert was_even(device)


class Watched(emulated._Call):
    """A call that keeps what its workspaces hold at the end, slots past the last share included."""

    found: dict[str, np.ndarray]

    def copy_back(self) -> None:
        super().copy_back()
        for array in self._arrays:
            self.found[array.name] = array._bytes(array._device._memory.data).copy().view(array.dtype)[..., 0]


@pytest.mark.parametrize("lengths", [LONG_AMONG_SHORT, SKEWED, MANY, (533, 533, 533, 533)], ids=len)
@pytest.mark.parametrize("left", [None, 520])
@pytest.mark.parametrize("sm_count", [1, 5])
def test_every_key_is_in_one_share_and_no_share_is_longer(lengths, left, sm_count, monkeypatch):
    """Of a query of zeros the lse of a share is the logarithm of how many keys its block visited."""
    case = paged(np.random.default_rng(4), lengths, 16, 2, 32)
    queries = np.zeros((len(lengths), 1, 2, 32), np.float16)
    monkeypatch.setattr(emulated, "_Call", Watched)
    Watched.found = {}
    _, _, device = call(case, queries, sm_count, window=(left, 0))
    launches = next(iter(device.prepared.values())).launches
    record = launches.words.view(FORWARD_PARAMS)[0]
    firsts, counts = Watched.found["shares"].T
    assert firsts[0] == 0
    assert (np.diff(firsts) == counts[:-1]).all()
    lse = Watched.found["lse_partial"][:, 0, :, 0]
    block_n = int(device.launches[0].kernel.rpartition("x")[2])
    seen = [min(n, n if left is None else left + 1) for n in lengths]
    tiles = [0 if not n else -(-n // block_n) - (n - s) // block_n for n, s in zip(lengths, seen, strict=True)]
    work = EvenWork(0, int(record["most_shares"]), int(record["least_tiles"]))
    wanted = work.counts(tiles)
    most = max(-(-n // count) for n, count in zip(tiles, wanted, strict=True))
    for b, (first, count) in enumerate(zip(firsts, counts, strict=True)):
        own = np.rint(np.exp(lse[first : first + count].astype(np.float64)))
        assert (own.sum(axis=0) == seen[b]).all()
        assert own.max() <= most * block_n
        assert count == wanted[b]


@given(st.lists(st.integers(0, 300), min_size=1, max_size=60), st.integers(1, 200), st.integers(1, 9))
def test_shares_never_outnumber_the_slots(tiles: list[int], wave: int, least: int) -> None:
    """For any lengths up to the table's room."""
    for room in (max(tiles), 300):
        work = even_work(len(tiles), room, least, wave)
        counts = work.counts(tiles)
        assert sum(counts) <= work.slots
        assert work.slots <= 2 * len(tiles) + wave
        longest = max(-(-n // count) for n, count in zip(tiles, counts, strict=True))
        assert longest <= max(least, -(-sum(tiles) // (work.most + 1 - len(tiles))))
        assert longest <= max(least, -(-2 * sum(tiles) // work.most))  # at most twice the mean of a full device


@pytest.mark.parametrize(("batch", "tiles"), [(n, 10**4) for n in [*range(1, 50), 64, 100, 300]] + [(32, 32)])
def test_sequences_of_one_length_fill_waves(batch: int, tiles: int) -> None:
    """With as many even shares as fit."""
    most = 99 * -(-2 * batch // 99)
    counts = even_work(batch, tiles, 1, 99).counts([tiles] * batch)
    assert Counter(counts) == {most // batch: batch}


def test_a_fixed_number_of_splits_is_kept() -> None:
    case = paged(np.random.default_rng(5), SKEWED, 16, 2, 32)
    queries = np.random.default_rng(6).standard_normal((len(SKEWED), 1, 4, 32)).astype(np.float16)
    out, lse, device = call(case, queries, options=Options(num_splits=3))
    assert not was_even(device)
    assert device.launches[0].grid[0] == 3 * 2 * len(SKEWED)
    check(case, queries, out, lse)


def test_bits_are_the_same_in_every_order_of_warps() -> None:
    case = paged(np.random.default_rng(7), (4500, 3, 700), 16, 1, 32)
    queries = np.random.default_rng(8).standard_normal((3, 1, 4, 32)).astype(np.float16)
    results = []
    for order in (None, 1, 2):
        with cuflash.emulate("sm_80", warp_order=order) as device:
            results.append(cuflash.paged_attention(queries, *case.arguments))
        assert was_even(device)
    for one, other in pairwise(results):
        assert np.array_equal(one, other)


def test_the_workspace_does_not_grow_with_the_table() -> None:
    assert even_work(8, 10**6, 4, 99) == even_work(8, 10**4, 4, 99) == EvenWork(99, 99, 4)
