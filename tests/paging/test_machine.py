"""Random lives of sequences against a model that copies everything: no blocks, no sharing, no window."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cuflash import OutOfBlocksError
from tests.paging.cases import contents, new_cache
from tests.paging.state import check_books, snapshot

LAYERS = 2
TOKENS = st.lists(st.integers(0, 1), max_size=5)
PROMPTS = st.builds(lambda n, more: [*range(100, 100 + n), *more], st.integers(0, 9), TOKENS)  # many begin alike
INDEX = st.integers(0, 10**6)


@dataclass
class Copied:
    """A sequence of the model."""

    tokens: list[int]
    extra: str | None
    kv: np.ndarray  # keys and values (layers, 2, tokens, heads, dim)
    on_host: bool = False
    seen_from: int = 0  # with a window, keys before it are lost

    def longer(self, more: list[int], window: int | None) -> Copied:
        begin, tokens = len(self.tokens), self.tokens + more
        kv = np.concatenate([self.kv, _written(tokens, begin, self.extra)], axis=2)
        lost = begin - window if window is not None and more else 0
        return replace(self, tokens=tokens, kv=kv, seen_from=max(self.seen_from, lost))

    def cut(self, length: int) -> Copied:
        return replace(self, tokens=self.tokens[:length], kv=self.kv[:, :, :length])


def _written(tokens: list[int], begin: int, extra: str | None) -> np.ndarray:
    return np.array([contents(tokens, layer, begin, extra) for layer in range(LAYERS)])


class Lives(RuleBasedStateMachine):
    """A cache of few blocks, so that it is often full."""

    WINDOW: int | None = None

    def __init__(self) -> None:
        super().__init__()
        self.copies: dict[int, Copied] = {}

    @initialize(block_size=st.sampled_from([1, 2, 3, 4]), prefix_cache=st.booleans())
    def make(self, block_size: int, prefix_cache: bool) -> None:
        self.cache = new_cache(
            18, block_size, LAYERS, window=self.WINDOW, host_blocks=6, prefix_cache=prefix_cache, dtype="float32"
        )

    def some(self, on_host: bool = False) -> list[int]:
        return [seq_id for seq_id, copy in self.copies.items() if copy.on_host == on_host]

    def pick(self, index: int, on_host: bool = False) -> int:
        ids = self.some(on_host)
        return ids[index % len(ids)]

    def group(self, which: int, on_host: bool = False) -> list[int]:
        return [seq_id for i, seq_id in enumerate(self.some(on_host)) if which >> (i % 20) & 1]

    def refused(self, function: Any, *arguments: Any) -> bool:
        """Call it; whether there were too few blocks, in which case nothing changed."""
        before = snapshot(self.cache)
        try:
            self.result = function(*arguments)
        except OutOfBlocksError:
            assert snapshot(self.cache) == before
            return True
        return False

    @rule(tokens=PROMPTS, extra=st.sampled_from([None, None, "a"]), whole=st.booleans())
    def add(self, tokens: list[int], extra: str | None, whole: bool) -> None:
        seq_id, cached = self.cache.add_sequence(tokens, extra)
        assert cached <= len(tokens)
        assert cached % self.cache.block_size == 0
        self.copies[seq_id] = Copied(tokens[:cached], extra, _written(tokens[:cached], 0, extra))
        if whole:
            self._extend([seq_id], [tokens[cached:]], committed=True)

    @precondition(lambda self: self.some())
    @rule(which=INDEX, more=st.lists(TOKENS, min_size=1, max_size=4), committed=st.booleans())
    def extend(self, which: int, more: list[list[int]], committed: bool) -> None:
        """A step of a batch: every sequence gets its own number of tokens; some steps are never committed."""
        ids = self.group(which)
        self._extend(ids, [more[i % len(more)] for i in range(len(ids))], committed)

    def _extend(self, ids: list[int], new: list[list[int]], committed: bool) -> None:
        if self.refused(self.cache.reserve, ids, [len(tokens) for tokens in new]):
            return
        slots, done = self.result, [len(self.cache._ledger.sequences[i].tokens) for i in ids]
        for seq_id, tokens in zip(ids, new, strict=True):
            self.copies[seq_id] = self.copies[seq_id].longer(tokens, self.WINDOW)
        if ids:
            parts = [self.copies[i].kv[:, :, -len(n) :] for i, n in zip(ids, new, strict=True) if n]
            kv = np.concatenate([*parts, _written([], 0, None)], axis=2)
            for layer in range(LAYERS):
                self.cache.append(layer, *kv[layer], slots)
        if committed:
            self.cache.commit(ids, [self.copies[i].tokens[n:] for i, n in zip(ids, done, strict=True)])

    @precondition(lambda self: self.some())
    @rule(index=INDEX)
    def fork(self, index: int) -> None:
        seq_id = self.pick(index)
        free = self.cache.num_free
        self.copies[self.cache.fork(seq_id)] = replace(self.copies[seq_id])
        assert self.cache.num_free == free

    @precondition(lambda self: self.some())
    @rule(index=INDEX, length=INDEX)
    def truncate(self, index: int, length: int) -> None:
        seq_id = self.pick(index)
        copy = self.copies[seq_id]
        length %= len(copy.tokens) + 1
        if self.WINDOW is not None and copy.seen_from and length - self.WINDOW < copy.seen_from:
            length = 0
        self.cache.truncate(seq_id, length)
        self.copies[seq_id] = copy.cut(length)
        if length == 0:
            self.copies[seq_id].seen_from = 0

    @precondition(lambda self: self.copies)
    @rule(index=INDEX)
    def free(self, index: int) -> None:
        seq_id = list(self.copies)[index % len(self.copies)]
        self.cache.free(seq_id)
        del self.copies[seq_id]

    @precondition(lambda self: self.some())
    @rule(which=INDEX)
    def swap_out(self, which: int) -> None:
        self._swap(self.group(which), self.cache.swap_out, True)

    @precondition(lambda self: self.some(on_host=True))
    @rule(which=INDEX)
    def swap_in(self, which: int) -> None:
        self._swap(self.group(which, on_host=True), self.cache.swap_in, False)

    def _swap(self, ids: list[int], function: Any, on_host: bool) -> None:
        if not self.refused(function, ids):
            for seq_id in ids:
                self.copies[seq_id].on_host = on_host

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        if not self.copies:
            return
        check_books(self.cache)
        ids, size = self.some(), self.cache.block_size
        tables, lengths = self.cache.block_tables(ids), self.cache.seq_lens(ids)
        assert lengths.tolist() == [len(self.copies[i].tokens) for i in ids]
        for row, length, seq_id in zip(tables, lengths, ids, strict=True):
            assert (row[-(-length // size) :] == -1).all()
            copy = self.copies[seq_id]
            token = np.arange(max(0, copy.seen_from), length)
            for layer in range(LAYERS):
                for cache, want in zip((self.cache.k_cache, self.cache.v_cache), copy.kv[layer], strict=True):
                    got = cache(layer)[row[token // size], token % size]
                    np.testing.assert_array_equal(got, want[token])
                if self.WINDOW is None:
                    np.testing.assert_array_equal(self.cache.gather(layer, seq_id), copy.kv[layer])

    @invariant()
    def counts_itself(self) -> None:
        if not self.copies:
            return
        usage = self.cache.usage()
        held: dict[int, int] = {}  # block: slots that have a token
        holders: dict[int, int] = {}
        for seq_id in self.some():
            sequence = self.cache._ledger.sequences[seq_id]
            for i, block in enumerate(sequence.held, sequence.released):
                fill = min(self.cache.block_size, sequence.length - i * self.cache.block_size)
                held[block] = max(held.get(block, 0), fill)
                holders[block] = holders.get(block, 0) + 1
        shared = sum(n > 1 for n in holders.values())
        assert (usage.in_use, usage.tokens, usage.shared) == (len(held), sum(held.values()), shared)
        assert (usage.sequences, usage.swapped_out) == (len(self.copies), len(self.some(on_host=True)))


class LivesInAWindow(Lives):
    """Blocks that no later query sees are given back."""

    WINDOW = 4


TestLives = Lives.TestCase
TestLives.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
TestLivesInAWindow = LivesInAWindow.TestCase
TestLivesInAWindow.settings = TestLives.settings
