"""Where bytes of a cache move: into slots, between blocks, between host and GPU, out into contiguous memory.

Caches are native arrays (..., num_blocks, block_size, num_kv_heads, dim): of one layer, or of all layers at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cuflash.layout import NativeArray


def write_tokens(
    k_cache: NativeArray, v_cache: NativeArray, k: NativeArray, v: NativeArray, slots: NativeArray
) -> None:
    """Token i of k and v (tokens, num_kv_heads, dim) goes to slot slots[i] of one layer."""
    for cache, tokens in ((k_cache, k), (v_cache, v)):
        block, offset = slots // cache.shape[1], slots % cache.shape[1]
        _bits(cache)[block, offset] = _bits(tokens)


def copy_blocks(caches: Sequence[NativeArray], pairs: Sequence[tuple[int, int]]) -> None:
    """All layers of block `from` to block `to` of each cache, for all pairs; no block is both."""
    source, target = np.asarray(pairs, np.int64).T
    for cache in caches:
        bits = _bits(cache)
        bits[:, target] = bits[:, source]


def move_blocks(
    sources: Sequence[NativeArray], targets: Sequence[NativeArray], pairs: Sequence[tuple[int, int]]
) -> None:
    """All layers of block `from` of each source to block `to` of its target, of which one may be on the host."""
    begin, end = np.asarray(pairs, np.int64).T
    for source, target in zip(sources, targets, strict=True):
        blocks = _bits(source)[:, begin]
        if type(target) is np.ndarray and type(source) is not np.ndarray:
            blocks = blocks.get()
        _bits(target)[:, end] = blocks


def gather_tokens(cache: NativeArray, blocks: Sequence[int], length: int) -> NativeArray:
    """The first `length` tokens of these blocks of one layer, (length, num_kv_heads, dim), in memory of their own."""
    tokens = cache[np.asarray(blocks, np.int64)]
    return tokens.reshape(-1, *cache.shape[2:])[:length]


def _bits(array: NativeArray) -> NativeArray:
    """The elements as unsigned integers, so that moving them keeps every bit, of NaN as well."""
    return array.view(f"u{array.dtype.itemsize}")
