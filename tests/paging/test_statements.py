"""What a faithful paged cache shows (Kwon et al. 2023), statement by statement."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cuflash
from cuflash import BlockPool, OutOfBlocksError
from cuflash.device import emulated
from cuflash.emulator import EmulatorFault
from cuflash.emulator.memory import WRITTEN
from cuflash.paging import moves
from tests.devices import DEVICES
from tests.paging.cases import (
    attend,
    check_attention,
    contents,
    extend,
    holds,
    new_cache,
    queries,
    started,
    table,
    write,
)
from tests.paging.state import check_books, snapshot
from tests.tolerances import assert_attention

PROMPT = list(range(100, 130))


def options_of(device: Any, num_splits: int) -> cuflash.Options | None:
    return None if device.name == "cpu" else cuflash.Options(num_splits=num_splits)


def scattered(seed: int, **keywords: Any) -> cuflash.PagedKVCache:
    """A cache whose free blocks lie in an order of their own."""
    cache = new_cache(40, prefix_cache=False, **keywords)
    ids = []
    for _ in range(40):
        seq_id, _ = cache.add_sequence()
        cache.reserve([seq_id], [cache.block_size])
        ids.append(seq_id)
    for i in np.random.default_rng(seed).permutation(len(ids)):
        cache.free(ids[i])
    return cache


class TestAttention:
    """Statement 1, 12, 14, 15, 16."""

    @pytest.mark.parametrize("num_splits", [1, 3])
    def test_01_equal_for_any_permutation_of_blocks(self, device: Any, num_splits: int) -> None:
        """Against the oracle, and bit for bit those of contiguous keys at the same split."""
        prompts, q = [list(range(300)), PROMPT[:9], list(range(130))], queries(3, 2, np.float16)
        results, tables, options = [], set(), options_of(device, num_splits)
        for seed in range(4):
            cache = scattered(seed, block_size=16, dtype="float16")
            ids = [started(cache, prompt) for prompt in prompts]
            tables.add(str([table(cache, i) for i in ids]))
            results.append(attend(device, cache, ids, q, options=options))
            check_attention(cache, prompts, q, results[-1])
        assert len(tables) == 4
        for i, prompt in enumerate(prompts):
            k, v = (array.astype(np.float16)[None] for array in contents(prompt, 1))
            contiguous = device.run(
                cuflash.attention, q[i : i + 1], k, v, causal=True, return_lse=True, options=options
            )
            for result in results:
                np.testing.assert_array_equal(result[0][i], contiguous[0][0])
                np.testing.assert_array_equal(result[1][i], contiguous[1][0])

    def test_12_recomputation_gives_the_same(self, device: Any) -> None:
        """A sequence that was freed and is written once more, in other blocks."""
        cache, q = new_cache(prefix_cache=False), queries(1)
        seq_id = started(cache, PROMPT)
        before, blocks = attend(device, cache, [seq_id], q), table(cache, seq_id)
        cache.free(seq_id)
        other = started(cache, [1, 2, 3])
        seq_id = started(cache, PROMPT)
        assert table(cache, seq_id) != blocks
        after = attend(device, cache, [seq_id], q)
        for old, new in zip(before, after, strict=True):
            np.testing.assert_allclose(new, old, rtol=1e-6)
        check_attention(cache, [PROMPT], q, after)
        holds(cache, other, [1, 2, 3])

    @pytest.mark.parametrize("length", [1, 3, 5, 8, 30])
    def test_14_nan_in_unused_slots_reaches_no_output(self, device: Any, length: int) -> None:
        """Every slot that nobody wrote is NaN, in the sequence's last block and elsewhere."""
        cache, q = new_cache(), queries(1)
        seq_id = started(cache, PROMPT[:length])
        assert np.isnan(cache.k_cache(1)).any()
        out, lse = attend(device, cache, [seq_id], q)
        assert np.isfinite(out).all()
        check_attention(cache, [PROMPT[:length]], q, (out, lse))

    @pytest.mark.parametrize("wrong", [-1, 10**9, -(2**31), 2**31 - 1])
    def test_15_entries_past_the_length_are_never_used(self, device: Any, wrong: int) -> None:
        """Any of these blocks would be far outside of the memory that the emulated device lets a kernel read."""
        cache, q = new_cache(), queries(2)
        prompts = [PROMPT[:5], PROMPT]
        ids = [started(cache, prompt) for prompt in prompts]
        tables = np.pad(cache.block_tables(ids), ((0, 0), (0, 3)), constant_values=wrong)
        tables[0, 2:] = wrong
        arrays = cache.k_cache(1), cache.v_cache(1), tables, cache.seq_lens(ids)
        check_attention(cache, prompts, q, device.run(cuflash.paged_attention, q, *arrays, return_lse=True))

    def test_15_entries_past_the_length_are_never_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """On the emulated device nothing has written them; had a sequence one token more, the read would be a fault."""
        cache, q = new_cache(dtype="float16"), queries(3, dtype=np.float16)
        prompts = [PROMPT[:8], PROMPT, PROMPT[:1]]
        ids = [started(cache, prompt) for prompt in prompts]
        tables, lengths = cache.block_tables(ids), cache.seq_lens(ids)
        past = np.arange(tables.shape[1]) >= -(-lengths[:, None] // 4)
        read = emulated._Call.read

        def read_none_past(call: Any, array: np.ndarray, name: str) -> int:
            pointer = read(call, array, name)
            if name == "block_tables":
                call._arrays[-1]._bytes(call._device._memory.state)[past] &= ~np.uint8(WRITTEN)
            return pointer

        monkeypatch.setattr(emulated._Call, "read", read_none_past)
        arrays = q, cache.k_cache(1), cache.v_cache(1), tables
        with cuflash.emulate("sm_80"):
            check_attention(cache, prompts, q, cuflash.paged_attention(*arrays, lengths, return_lse=True))
            tables[past] = 0
            with pytest.raises(EmulatorFault, match="block_tables"):
                cuflash.paged_attention(*arrays, lengths + np.array([1, 0, 0], np.int32))

    @pytest.mark.parametrize("device_name", ["cpu", "emulated"])
    def test_16_more_than_2_31_elements(self, device_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Only pages of memory that are written exist; of the cache the emulated device has the last four blocks."""
        num_blocks, block_size, dim = 2**17 + 4, 256, 64
        cache = cuflash.PagedKVCache(1, num_blocks, block_size, 1, dim, dtype="float16", prefix_cache=False)
        assert cache._caches[0].size > 2**31
        cache._ledger.pool.allocate(num_blocks - 4)
        seq_id, _ = cache.add_sequence()
        slots = cache.reserve([seq_id], [300])
        k, v = np.random.default_rng(0).standard_normal((2, 300, 1, dim)).astype(np.float16)
        cache.append(0, k, v, slots)
        assert table(cache, seq_id) == [2**17, 2**17 + 1]
        for got, want in zip(cache.gather(0, seq_id), (k, v), strict=True):
            np.testing.assert_array_equal(got, want)
        read = emulated._Call.read

        def read_end(call: Any, array: np.ndarray, name: str) -> int:
            if len(array) < num_blocks:
                return read(call, array, name)
            return read(call, array[-4:], name) - (num_blocks - 4) * array.strides[0]

        monkeypatch.setattr(emulated._Call, "read", read_end)
        q = np.random.default_rng(1).standard_normal((1, 1, 1, dim)).astype(np.float16)
        out, lse = attend(DEVICES[device_name](), cache, [seq_id], q)
        assert_attention(out[0], lse[0], q[0], k, v, causal=True)


class TestBlocks:
    """Statements 2 to 8 and 13."""

    @pytest.mark.parametrize("block_size", [1, 3, 4, 16])
    def test_02_a_sequence_holds_just_the_blocks_it_takes(self, block_size: int) -> None:
        cache = new_cache(40, block_size)
        seq_id, _ = cache.add_sequence()
        for length in range(1, 36):
            cache.reserve([seq_id])
            usage = cache.usage()
            assert usage.in_use == len(table(cache, seq_id)) == -(-length // block_size)
            assert usage.tokens == length
            assert usage.waste == usage.in_use * block_size - length <= block_size - 1

    def test_03_a_prompt_of_7_in_blocks_of_4(self) -> None:
        cache = new_cache()
        seq_id = started(cache, PROMPT[:7])
        assert cache.usage().in_use == 2
        extend(cache, seq_id, PROMPT[:8])
        assert cache.usage().in_use == 2
        extend(cache, seq_id, PROMPT[:9])
        assert cache.usage().in_use == 3
        holds(cache, seq_id, PROMPT[:9])

    def test_04_fork_allocates_nothing(self) -> None:
        cache = new_cache()
        seq_id = started(cache, PROMPT[:7])
        free, counts = cache.num_free, cache._ledger.pool.counts.copy()
        child = cache.fork(seq_id)
        assert cache.num_free == free
        assert table(cache, child) == table(cache, seq_id)
        assert (cache._ledger.pool.counts - counts)[table(cache, seq_id)].tolist() == [1, 1]
        assert cache.usage().shared == 2
        holds(cache, child, PROMPT[:7])

    def test_05_a_shared_last_block_is_copied_but_by_its_last_holder(self) -> None:
        cache = new_cache()
        seq_id = started(cache, PROMPT[:7])
        child = cache.fork(seq_id)
        first, last = table(cache, seq_id)
        extend(cache, child, [*PROMPT[:7], 8])
        copied = table(cache, child)
        assert copied[0] == first
        assert copied[1] != last
        assert [cache._ledger.pool.count(block) for block in (first, last, copied[1])] == [2, 1, 1]
        assert cache.stats().copied_blocks == 1
        extend(cache, seq_id, [*PROMPT[:7], 9])
        assert table(cache, seq_id) == [first, last]
        assert cache.stats().copied_blocks == 1
        holds(cache, child, [*PROMPT[:7], 8])
        holds(cache, seq_id, [*PROMPT[:7], 9])

    def test_06_behind_a_full_shared_block_nothing_is_copied(self) -> None:
        cache = new_cache()
        seq_id = started(cache, PROMPT[:8])
        child = cache.fork(seq_id)
        extend(cache, child, PROMPT[:9])
        assert table(cache, child)[:2] == table(cache, seq_id)
        assert (cache.usage().in_use, cache.stats().copied_blocks) == (3, 0)
        holds(cache, child, PROMPT[:9])

    def test_07_all_copies_of_a_step_are_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Three sequences of one prompt, two of another: all write, all holders but the last of each block copy."""
        calls = []
        copy_blocks = moves.copy_blocks
        monkeypatch.setattr(moves, "copy_blocks", lambda *given: (calls.append(given), copy_blocks(*given)))
        cache = new_cache()
        prompts = [PROMPT[:7], PROMPT[10:15]]
        parents = [started(cache, prompt) for prompt in prompts]
        ids = [parents[0], cache.fork(parents[0]), cache.fork(parents[0]), parents[1], cache.fork(parents[1])]
        sources = [table(cache, parent)[-1] for parent in parents]
        before = [cache.k_cache(layer)[sources].tobytes() for layer in range(2)]
        slots = cache.reserve(ids)
        ((_, pairs),) = calls
        assert [source for source, _ in pairs] == [sources[0], sources[0], sources[1]]
        assert [cache.k_cache(layer)[sources].tobytes() for layer in range(2)] == before
        assert len(set(slots.tolist())) == 5
        for i, seq_id in enumerate(ids):
            tokens = [*prompts[i // 3], i]
            write(cache, tokens, len(tokens) - 1, slots[i : i + 1])
            cache.commit([seq_id], [[i]])
        for i, seq_id in enumerate(ids):
            holds(cache, seq_id, [*prompts[i // 3], i])
        check_books(cache)

    def test_08_a_block_is_free_when_nobody_holds_it(self) -> None:
        cache = new_cache()
        seq_id = started(cache, PROMPT[:7])
        child = cache.fork(seq_id)
        extend(cache, child, PROMPT[:11])
        before = cache.num_free
        cache.free(seq_id)
        assert cache.num_free == before + 1  # the last one; the first is the child's as well
        check_books(cache)
        cache.free(child)
        assert cache.num_free == 16
        with pytest.raises(cuflash.UnknownSequenceError, match=f"sequence {child}: must be one of this cache"):
            cache.free(child)
        pool = BlockPool(3)
        blocks = pool.allocate(2)
        pool.decref(blocks)
        with pytest.raises(cuflash.InvalidValueError, match=f"block {blocks[0]} is free: must be held"):
            pool.decref(blocks[:1])
        assert pool.num_free == 3

    def test_13_out_of_blocks_changes_nothing(self) -> None:
        """Of the three sequences the last one has too little; a copy on write needs a block as well."""
        cache = new_cache(6)
        ids = [started(cache, PROMPT[:7]), started(cache, PROMPT[8:12])]
        ids.append(cache.fork(ids[0]))
        before = snapshot(cache)
        with pytest.raises(OutOfBlocksError, match="5 blocks are needed: must be at most 3, the free ones"):
            cache.reserve(ids, [1, 9, 5])
        assert snapshot(cache) == before
        assert issubclass(OutOfBlocksError, MemoryError)
        cache.reserve(ids, [1, 1, 5])


class TestSharing:
    """Statements 9 to 11."""

    def test_09_beams_that_are_dropped_free_what_only_they_held(self) -> None:
        """Four beams of one prompt; the next step has two children of beam 1 and two of beam 2."""
        cache = new_cache(32)
        prompt = PROMPT[:6]
        beams = {started(cache, prompt): prompt}
        root = next(iter(beams))
        beams |= {cache.fork(root): prompt for _ in range(3)}
        for step in range(7):
            for i, (seq_id, tokens) in enumerate(beams.items()):
                beams[seq_id] = [*tokens, 10 * step + i]
                extend(cache, seq_id, beams[seq_id])
            chosen = [list(beams.items())[i] for i in (1, 1, 2, 2)]
            children = {cache.fork(seq_id): tokens for seq_id, tokens in chosen}
            held = {block for seq_id in beams for block in table(cache, seq_id)}
            kept = {block for seq_id in children for block in table(cache, seq_id)}
            free = cache.num_free
            for seq_id in beams:
                cache.free(seq_id)
            assert cache.num_free - free == len(held - kept)
            beams = children
            check_books(cache)
            for seq_id, tokens in beams.items():
                holds(cache, seq_id, tokens)

    @pytest.mark.parametrize("prefix", [3, 4, 11, 12])
    def test_10_a_common_prefix_is_there_once(self, prefix: int) -> None:
        cache = new_cache(40)
        common = prefix // 4
        ids = [started(cache, [*PROMPT[:prefix], 1000 + i, *range(4)]) for i in range(5)]
        tables = [table(cache, i) for i in ids]
        assert len({tuple(blocks[:common]) for blocks in tables}) == 1
        assert len({blocks[common] for blocks in tables}) == 5
        assert cache.usage().shared == common
        for i, seq_id in enumerate(ids):
            holds(cache, seq_id, [*PROMPT[:prefix], 1000 + i, *range(4)])
            cache.free(seq_id)
        assert cache.num_free == 40
        seq_id, cached = cache.add_sequence(PROMPT[:prefix])  # found although nobody holds it
        assert cached == 4 * common
        holds(cache, seq_id, PROMPT[:cached])

    def test_11_swapped_out_and_in_every_byte_is_back(self) -> None:
        cache = new_cache(16, host_blocks=8, dtype="bfloat16")
        prompts = [PROMPT[:10], PROMPT[:10], PROMPT[20:25]]
        ids = [started(cache, prompts[0])]
        ids += [cache.fork(ids[0]), started(cache, prompts[2])]
        before = [cache.gather(layer, i) for layer in range(2) for i in ids]
        tables = [table(cache, i) for i in ids]
        cache.swap_out(ids)
        assert cache.usage().in_use == 0
        assert cache.stats().swapped_out_blocks == 5  # those that two hold go once
        for layer in range(2):
            cache.k_cache(layer)[...] = cache.v_cache(layer)[...] = 7
        started(cache, [5, 6])  # takes one of the blocks
        cache.swap_in(ids)
        assert [table(cache, i) for i in ids] != tables
        assert table(cache, ids[0]) == table(cache, ids[1])
        after = [cache.gather(layer, i) for layer in range(2) for i in ids]
        for (old_k, old_v), (k, v) in zip(before, after, strict=True):
            assert (k.tobytes(), v.tobytes()) == (old_k.tobytes(), old_v.tobytes())
        assert cache._ledger.host_pool.num_free == 8
        check_books(cache)

    @pytest.mark.parametrize("direction", ["out", "in"])
    def test_11_a_group_is_swapped_whole_or_not_at_all(self, direction: str) -> None:
        cache = new_cache(6, host_blocks=4 if direction == "in" else 3)
        ids = [started(cache, PROMPT[:7]), started(cache, PROMPT[10:17])]
        if direction == "in":
            cache.swap_out(ids)
            started(cache, PROMPT[20:29])
        before = snapshot(cache)
        with pytest.raises(OutOfBlocksError, match=r"4 (host )?blocks are needed: must be at most 3, the free ones"):
            (cache.swap_in if direction == "in" else cache.swap_out)(ids)
        assert snapshot(cache) == before


class TestWindow:
    """Blocks that no later query sees."""

    @pytest.mark.parametrize("window", [0, 3, 4, 9])
    def test_a_stream_holds_only_its_window(self, device: Any, window: int) -> None:
        cache, q = new_cache(5, window=window), queries(1)
        seq_id, _ = cache.add_sequence()
        tokens: list[int] = []
        for step, count in enumerate([3, 1, 1, 4, 1, 1, 1, 2, 5, 1, 1, 1]):
            tokens += range(100 * step, 100 * step + count)
            extend(cache, seq_id, tokens)
            out_of_sight = max(0, len(tokens) - count - window) // 4
            assert cache.usage().in_use == -(-len(tokens) // 4) - out_of_sight
            check_books(cache)
        result = attend(device, cache, [seq_id], q, window=(window, 0))
        check_attention(cache, [tokens], q, result, window=(window, 0))

    def test_what_is_gone_cannot_come_back(self) -> None:
        cache = new_cache(5, window=3)
        seq_id = started(cache, PROMPT[:9])
        extend(cache, seq_id, PROMPT[:10])
        before = snapshot(cache)
        with pytest.raises(cuflash.InvalidValueError, match=r"length = 6: must be 0 or >= 7, as the first 4 tokens"):
            cache.truncate(seq_id, 6)
        with pytest.raises(cuflash.InvalidValueError, match="lost its first 4 tokens to the window"):
            cache.gather(0, seq_id)
        assert snapshot(cache) == before
        cache.truncate(seq_id, 7)
        k, _ = contents(PROMPT[:7], 0)
        np.testing.assert_array_equal(cache.k_cache(0)[table(cache, seq_id)[1], :3], k[4:])
        cache.truncate(seq_id, 0)
        assert cache.num_free == 5

    def test_what_falls_out_of_the_window_can_be_taken_at_once(self) -> None:
        """A pool of two blocks is enough for a window of a block; of a shared block each holder gives up its part."""
        cache = new_cache(2, window=4)
        seq_id = started(cache, PROMPT[:8])
        for length in range(9, 30):
            extend(cache, seq_id, PROMPT[:length])
        cache = new_cache(3, window=0)
        seq_id = started(cache, PROMPT[:8])
        child = cache.fork(seq_id)
        with pytest.raises(OutOfBlocksError, match="2 blocks are needed: must be at most 1"):
            cache.reserve([child], [5])
        assert cache.reserve([seq_id, child], [9 - 8, 5]).size == 6

    def test_tokens_that_left_the_window_are_not_found(self) -> None:
        """Committed late: their block is another's."""
        cache = new_cache(6, window=4)
        other = started(cache, [50, 51])
        seq_id, _ = cache.add_sequence()
        extend(cache, seq_id, PROMPT[:8], commit=False)
        extend(cache, seq_id, PROMPT[:13], commit=False)
        cache.commit([seq_id], [PROMPT[:13]])
        assert table(cache, other) == [0]
        assert cache.add_sequence(PROMPT[:13])[1] == 0
        check_books(cache)

    def test_the_window_survives_a_swap(self) -> None:
        """What has left it is not found when the rest comes back, in whichever blocks."""
        cache = new_cache(5, window=4, host_blocks=4)
        other = started(cache, [50, 51])
        seq_id = started(cache, PROMPT[:8])
        extend(cache, seq_id, PROMPT[:13])
        cache.swap_out([seq_id])
        cache.free(started(cache, list(range(60, 76))))  # takes every other block
        cache.swap_in([seq_id])
        check_books(cache)
        assert (table(cache, other), cache.add_sequence(PROMPT[:13])[1]) == ([0], 0)
        k, _ = contents(PROMPT[:13], 1)
        held = table(cache, seq_id)
        np.testing.assert_array_equal(cache.k_cache(1)[held[1:3]].reshape(8, 2, 16), k[4:12])
