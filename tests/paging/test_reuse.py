"""What is found again by its tokens, what is forgotten first, and what a cache says about itself."""

from __future__ import annotations

import pytest

from cuflash import BlockPool
from cuflash.paging.report import Stats, Usage
from tests.paging.cases import extend, holds, new_cache, started, table
from tests.paging.state import check_books

PROMPT = list(range(20))


class TestPool:
    def test_blocks_are_forgotten_in_the_order_in_which_they_were_freed(self) -> None:
        pool = BlockPool(4)
        blocks = pool.allocate(4)
        for block, name in zip(blocks, "abcd", strict=True):
            pool.register(block, name)
        for i in (2, 0, 3):
            pool.decref([blocks[i]])
        assert (pool.num_free, pool.num_cached) == (3, 3)
        pool.incref([pool.find("c")])  # used once more, so the last to go
        pool.decref([blocks[2]])
        assert pool.allocate(1) == [blocks[0]]
        assert [pool.find(name) for name in "abcd"] == [None, *blocks[1:]]
        assert pool.allocate(2) == [blocks[3], blocks[2]]
        assert [pool.find(name) for name in "abcd"] == [None, blocks[1], None, None]
        assert pool.evictions == 3

    def test_blocks_of_unknown_contents_go_first(self) -> None:
        pool = BlockPool(3)
        blocks = pool.allocate(3)
        pool.register(blocks[0], "a")
        pool.decref(blocks)
        assert set(pool.allocate(2)) == set(blocks[1:])
        assert (pool.find("a"), pool.evictions) == (blocks[0], 0)

    def test_the_first_block_of_a_hash_is_found(self) -> None:
        pool = BlockPool(2)
        first, second = pool.allocate(2)
        pool.register(first, "a")
        pool.register(second, "a")
        assert pool.find("a") == first
        pool.register(first, "b")
        assert (pool.find("a"), pool.find("b")) == (None, first)
        pool.forget(first)
        pool.forget(second)
        assert pool.find("b") is None
        assert repr(pool) == "BlockPool(2): 0 free, 0 of them with known contents"

    def test_a_pool_of_nothing(self) -> None:
        assert BlockPool(0).allocate(0) == []


class TestReuse:
    def test_the_end_of_a_prefix_is_forgotten_before_its_beginning(self) -> None:
        """A prefix without its beginning is of no use."""
        cache = new_cache(4)
        cache.free(started(cache, PROMPT[:12]))
        seq_id = started(cache, PROMPT[13:18])  # two blocks, of which one was of the prefix
        assert cache.add_sequence(PROMPT[:12])[1] == 8
        assert cache.stats().evicted_blocks == 1
        cache.free(seq_id)

    @pytest.mark.parametrize(("extra", "cached"), [(None, 0), ("a", 8), (b"a", 0), ("b", 0), ("", 0)])
    def test_only_sequences_of_one_extra_share(self, extra: str | bytes | None, cached: int) -> None:
        cache = new_cache()
        seq_id, _ = cache.add_sequence(PROMPT[:9], "a")
        extend(cache, seq_id, PROMPT[:9])
        assert cache.add_sequence(PROMPT[:9], extra)[1] == cached

    def test_equal_blocks_behind_other_tokens_are_not_found(self) -> None:
        cache = new_cache()
        started(cache, [1, 2, 3, 4, 5, 6, 7, 8])
        assert cache.add_sequence([5, 6, 7, 8])[1] == 0
        assert cache.add_sequence([1, 2, 3, 0, 5, 6, 7, 8])[1] == 0
        assert cache.add_sequence([1, 2, 3, 4, 5, 6, 7, 0])[1] == 4

    def test_what_is_reserved_is_not_found_until_it_is_committed(self) -> None:
        cache = new_cache()
        seq_id, _ = cache.add_sequence(PROMPT[:8])
        extend(cache, seq_id, PROMPT[:8], commit=False)
        assert cache.add_sequence(PROMPT[:8])[1] == 0
        cache.commit([seq_id], [PROMPT[:5]])
        assert cache.add_sequence(PROMPT[:8])[1] == 4
        cache.commit([seq_id], [PROMPT[5:8]])
        assert cache.add_sequence(PROMPT[:8])[1] == 8

    def test_a_truncated_block_is_found_until_it_is_written(self) -> None:
        cache = new_cache()
        seq_id = started(cache, PROMPT[:8])
        cache.truncate(seq_id, 6)
        other, cached = cache.add_sequence(PROMPT[:8])
        assert cached == 8
        cache.free(other)
        extend(cache, seq_id, [*PROMPT[:6], 99])
        assert cache.add_sequence(PROMPT[:8])[1] == 4
        extend(cache, seq_id, [*PROMPT[:6], 99, 98])
        other, cached = cache.add_sequence([*PROMPT[:6], 99, 98])
        assert cached == 8
        holds(cache, other, [*PROMPT[:6], 99, 98])

    def test_a_fork_goes_its_own_way(self) -> None:
        """What the child writes is found as the child's."""
        cache = new_cache()
        seq_id = started(cache, PROMPT[:6])
        child = cache.fork(seq_id)
        for i, tail in ((child, [50, 51]), (seq_id, [60, 61])):
            extend(cache, i, [*PROMPT[:6], *tail])
        for tail in ([50, 51], [60, 61]):
            found, cached = cache.add_sequence([*PROMPT[:6], *tail])
            assert cached == 8
            holds(cache, found, [*PROMPT[:6], *tail])

    def test_what_comes_back_from_the_host_is_found(self) -> None:
        cache = new_cache(4, host_blocks=4)
        seq_id = started(cache, PROMPT[:9])
        cache.swap_out([seq_id])
        cache.free(started(cache, list(range(50, 66))))  # takes every block
        assert cache.add_sequence(PROMPT[:9])[1] == 0
        cache.swap_in([seq_id])
        other, cached = cache.add_sequence(PROMPT[:9])
        assert cached == 8
        assert table(cache, other) == table(cache, seq_id)[:2]
        check_books(cache)

    def test_a_sequence_can_end_on_the_host(self) -> None:
        cache = new_cache(host_blocks=4)
        seq_id = started(cache, PROMPT[:9])
        cache.swap_out([seq_id])
        cache.free(seq_id)
        assert cache._ledger.host_pool.num_free == 4

    def test_without_a_prefix_cache_nothing_is_found(self) -> None:
        cache = new_cache(prefix_cache=False)
        started(cache, PROMPT[:8])
        assert cache.add_sequence(PROMPT[:8]) == (1, 0)


class TestReports:
    def test_usage(self) -> None:
        cache = new_cache(16, host_blocks=2)
        first = started(cache, PROMPT[:7])
        cache.fork(first)
        cache.free(started(cache, PROMPT[10:14]))
        cache.swap_out([started(cache, PROMPT[15:17])])
        usage = cache.usage()
        assert usage == Usage(
            num_blocks=16, block_size=4, in_use=2, shared=2, cached=1, tokens=7, sequences=3, swapped_out=1
        )
        assert (usage.free, usage.waste, usage.share) == (14, 1, 7 / 8)
        assert str(usage) == (
            "2 of 16 blocks in use (2 shared), 14 free (1 cached); 7 tokens in 8 slots (87.5%), 1 wasted; "
            "3 sequences, 1 swapped out"
        )
        assert repr(cache) == f"PagedKVCache(2 layers, 2 heads of 16, float32): {usage}"
        assert new_cache().usage().share == 1

    def test_a_block_that_is_full_for_one_wastes_nothing(self) -> None:
        cache = new_cache()
        seq_id = started(cache, PROMPT[:8])
        child = cache.fork(seq_id)
        cache.truncate(child, 5)
        assert cache.usage().waste == 0
        cache.truncate(seq_id, 6)
        assert cache.usage().waste == 2

    def test_stats(self) -> None:
        cache = new_cache(8, host_blocks=3)
        first = started(cache, PROMPT[:10])
        started(cache, [*PROMPT[:9], 77])
        cache.swap_out([first])
        cache.swap_in([first])
        extend(cache, cache.fork(first), PROMPT[:11])
        assert cache.stats() == Stats(
            prompt_tokens=20,
            cached_tokens=8,
            reserved_tokens=10 + 2 + 1,
            copied_blocks=1,
            evicted_blocks=0,
            swapped_out_blocks=3,
            swapped_in_blocks=3,
        )
