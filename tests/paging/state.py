"""All that a cache holds, to compare before and after; and what must hold at any time."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuflash import PagedKVCache
from cuflash.paging.pool import BlockPool


def snapshot(cache: PagedKVCache) -> tuple[Any, ...]:
    """Every byte of the arrays and every bit of bookkeeping, as values that nothing changes."""
    arrays = [array.tobytes() for array in (*cache._caches, *cache._host)]
    ledger = cache._ledger
    sequences = {
        seq_id: tuple(_frozen(getattr(held, name)) for name in held.__slots__)
        for seq_id, held in ledger.sequences.items()
    }
    pools = _pool(ledger.pool), _pool(ledger.host_pool)
    return arrays, sequences, list(ledger.sequences), pools, ledger._next_id, dict(cache._stats), str(cache.usage())


def _pool(pool: BlockPool) -> tuple[Any, ...]:
    lists = list(pool._counts), list(pool._blank), list(pool._kept), list(pool._hashes)
    return *lists, dict(pool._block_of), pool.evictions


def _frozen(value: Any) -> Any:
    return tuple(value) if hasattr(value, "__iter__") else value


def check_books(cache: PagedKVCache) -> None:
    """Counts are those of the sequences; held and free blocks are all blocks; hashes lead to their blocks."""
    ledger = cache._ledger
    for pool, on_host in ((ledger.pool, False), (ledger.host_pool, True)):
        held = [held for held in ledger.sequences.values() if held.on_host == on_host]
        blocks = [block for sequence in held for block in sequence.held]
        np.testing.assert_array_equal(pool.counts, np.bincount(blocks, minlength=pool.num_blocks))
        free = [*pool._blank, *pool._kept]
        assert sorted([*set(blocks), *free]) == list(range(pool.num_blocks))
        assert all(pool._hashes[block] is None for block in pool._blank)
        assert all(pool._hashes[block] is not None for block in pool._kept)
        hashed = {block: block_hash for block, block_hash in enumerate(pool._hashes) if block_hash is not None}
        assert hashed == {block: block_hash for block_hash, block in pool._block_of.items()}
    for sequence in ledger.sequences.values():
        assert len(sequence.blocks) == -(-sequence.length // cache.block_size)
        assert len(sequence.tokens) <= sequence.length
