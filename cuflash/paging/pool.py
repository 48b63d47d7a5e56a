"""`BlockPool`: which blocks are free, how many hold each of the others, and what full ones contain."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Hashable, Iterable

import numpy as np

from cuflash.errors import InvalidValueError, OutOfBlocksError
from cuflash.paging.checks import check_count, take_integers


class BlockPool:
    """Reference counts of blocks 0 to num_blocks - 1, and the hashes by which full ones are found again.

    A block is held (count at least 1) or free. A free one that has a hash keeps it, and its contents, until all
    others are taken; of these the one freed first goes first (LRU). Everything takes O(1) a block, no array is touched
    and no GPU needed. Not for several threads at once.

    Parameters
    ----------
    num_blocks : int
        At least 0.

    Raises
    ------
    InvalidTypeError, InvalidValueError
        An argument is not what this page says; the pool is unchanged, as after every error.

    Examples
    --------
    >>> import cuflash
    >>> pool = cuflash.BlockPool(4)
    >>> blocks = pool.allocate(3)
    >>> pool.incref(blocks[:1])
    >>> pool.decref(blocks)
    >>> pool.num_free
    3
    """

    def __init__(self, num_blocks: int) -> None:
        check_count("num_blocks", num_blocks)
        self.num_blocks = int(num_blocks)
        self.evictions = 0  # hashes lost because their free block was taken
        self._counts = array("i", bytes(4 * self.num_blocks))
        self._blank = list(range(self.num_blocks - 1, -1, -1))  # free ones without a hash; the last goes first
        self._kept: OrderedDict[int, None] = OrderedDict()  # free ones with a hash, the first freed first
        self._hashes: list[Hashable | None] = [None] * self.num_blocks
        self._block_of: dict[Hashable, int] = {}

    def __repr__(self) -> str:
        return f"BlockPool({self.num_blocks}): {self.num_free} free, {self.num_cached} of them with known contents"

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give."""
        return len(self._blank) + len(self._kept)

    @property
    def num_cached(self) -> int:
        """Free blocks that still have a hash."""
        return len(self._kept)

    @property
    def counts(self) -> np.ndarray:
        """Reference counts (num_blocks,), int32, read-only; a view that is as current as the pool."""
        view = np.frombuffer(self._counts, np.int32)
        view.flags.writeable = False
        return view

    def count(self, block: int) -> int:
        """How many hold a block; 0 if it is free."""
        return self._counts[block]

    def allocate(self, n: int) -> list[int]:
        """Take n free blocks, each with count 1 and without a hash.

        Raises OutOfBlocksError, and takes none, if there are fewer.
        """
        check_count("n", n)
        if n > self.num_free:
            raise OutOfBlocksError(f"n = {n}: must be at most {self.num_free}, the free of {self.num_blocks} blocks")
        rest = max(len(self._blank) - n, 0)
        blocks = self._blank[: rest - 1 if rest else None : -1] if n else []
        del self._blank[rest:]
        while len(blocks) < n:
            block, _ = self._kept.popitem(last=False)
            self._drop_hash(block)
            self.evictions += 1
            blocks.append(block)
        for block in blocks:
            self._counts[block] = 1
        return blocks

    def incref(self, blocks: Iterable[int]) -> None:
        """One more holds each of these: held ones, or free ones that `find` knows.

        Raises InvalidValueError, and counts none, if one is free and has no hash.
        """
        counts, ids = self._counts, self._ids(blocks)
        for block in ids:
            if not counts[block] and self._hashes[block] is None:
                raise InvalidValueError(f"block {block} is free: must be held, or have a hash, to be held once more")
        for block in ids:
            if not counts[block]:
                del self._kept[block]
            counts[block] += 1

    def decref(self, blocks: Iterable[int]) -> None:
        """One fewer holds each of these; a block that nobody holds is free.

        Raises InvalidValueError, and counts none, if one is free already.
        """
        counts, ids = self._counts, self._ids(blocks)
        freed = []
        for done, block in enumerate(ids):
            if not counts[block]:
                for earlier in ids[:done]:
                    counts[earlier] += 1
                raise InvalidValueError(f"block {block} is free: must be held, to be freed")
            counts[block] -= 1
            if not counts[block]:
                freed.append(block)
        for block in freed:
            if self._hashes[block] is None:
                self._blank.append(block)
            else:
                self._kept[block] = None

    def register(self, block: int, block_hash: Hashable) -> None:
        """From now on `find` gives this held block for its hash, unless another block came first."""
        self._check_held(block)
        if block_hash not in self._block_of:
            self.forget(block)
            self._hashes[block] = block_hash
            self._block_of[block_hash] = block

    def forget(self, block: int) -> None:
        """A held block is no longer found, since its contents change."""
        self._check_held(block)
        if self._hashes[block] is not None:
            self._drop_hash(block)

    def find(self, block_hash: Hashable) -> int | None:
        """The block that has this hash, held or free, or None; `incref` keeps it."""
        return self._block_of.get(block_hash)

    def _drop_hash(self, block: int) -> None:
        del self._block_of[self._hashes[block]]
        self._hashes[block] = None

    def _ids(self, blocks: Iterable[int]) -> array[int]:
        ids = blocks if isinstance(blocks, array) and blocks.typecode == "i" else take_integers("blocks", blocks)
        if ids and not 0 <= min(ids) <= max(ids) < self.num_blocks:
            wrong = min(ids) if min(ids) < 0 else max(ids)
            raise InvalidValueError(f"block {wrong}: must be 0 to {self.num_blocks - 1}")
        return ids

    def _check_held(self, block: int) -> None:
        if not 0 <= block < self.num_blocks or not self._counts[block]:
            raise InvalidValueError(f"block {block} is not held: must be, to have a hash")
