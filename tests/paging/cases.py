"""Caches with sequences in them, and keys and values as a function of the tokens before."""

from __future__ import annotations

from typing import Any
from zlib import crc32

import numpy as np

import cuflash
from cuflash import PagedKVCache
from tests.tolerances import assert_attention

HEADS, KV_HEADS, DIM = 4, 2, 16


def new_cache(num_blocks: int = 16, block_size: int = 4, num_layers: int = 2, **keywords: Any) -> PagedKVCache:
    """A small cache in which every slot that nobody wrote is NaN."""
    keywords = {"dtype": "float32", **keywords}
    cache = PagedKVCache(num_layers, num_blocks, block_size, KV_HEADS, DIM, **keywords)
    for layer in range(num_layers):
        cache.k_cache(layer)[...] = cache.v_cache(layer)[...] = np.nan
    return cache


def contents(tokens: list[int], layer: int, begin: int = 0, extra: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """k and v of tokens[begin:], which depend, as a model's do, on every token up to their own; whole numbers / 8."""
    shape = 2, KV_HEADS, DIM
    rows = [
        np.random.default_rng(crc32(repr((tokens[: i + 1], layer, extra)).encode())).integers(-16, 17, shape) / 8
        for i in range(begin, len(tokens))
    ]
    k, v = np.array(rows, np.float32).reshape(-1, *shape).swapaxes(0, 1)
    return k, v


def extend(cache: PagedKVCache, seq_id: int, tokens: list[int], commit: bool = True) -> None:
    """Write those of `tokens` that the sequence has not yet."""
    begin = int(cache.seq_lens([seq_id])[0])
    slots = cache.reserve([seq_id], [len(tokens) - begin])
    write(cache, tokens, begin, slots)
    if commit:
        cache.commit([seq_id], [tokens[begin:]])


def write(cache: PagedKVCache, tokens: list[int], begin: int, slots: np.ndarray) -> None:
    for layer in range(len(cache._caches[0])):
        k, v = (array.astype(cache.dtype) for array in contents(tokens, layer, begin))
        cache.append(layer, k, v, slots)


def started(cache: PagedKVCache, tokens: list[int]) -> int:
    """A new sequence of these tokens."""
    seq_id, _ = cache.add_sequence(tokens)
    extend(cache, seq_id, tokens)
    return seq_id


def table(cache: PagedKVCache, seq_id: int) -> list[int]:
    return cache.block_tables([seq_id])[0].tolist()


def holds(cache: PagedKVCache, seq_id: int, tokens: list[int]) -> None:
    """The sequence's keys and values are those of `tokens`, in every layer."""
    assert cache.seq_lens([seq_id]).tolist() == [len(tokens)]
    for layer in range(len(cache._caches[0])):
        for got, want in zip(cache.gather(layer, seq_id), contents(tokens, layer), strict=True):
            np.testing.assert_array_equal(got, want)


def attend(device: Any, cache: PagedKVCache, seq_ids: list[int], q: np.ndarray, **keywords: Any) -> Any:
    """out and lse of the last layer for q (sequences, queries, heads, dim)."""
    layer = len(cache._caches[0]) - 1
    arrays = cache.k_cache(layer), cache.v_cache(layer), cache.block_tables(seq_ids), cache.seq_lens(seq_ids)
    return device.run(cuflash.paged_attention, q, *arrays, return_lse=True, **keywords)


def queries(num_sequences: int, seqlen_q: int = 1, dtype: Any = np.float32) -> np.ndarray:
    shape = num_sequences, seqlen_q, HEADS, DIM
    return np.random.default_rng(num_sequences).standard_normal(shape).astype(dtype)


def check_attention(cache: PagedKVCache, prompts: list[list[int]], q: np.ndarray, result: Any, **scores: Any) -> None:
    """Each sequence's out and lse against the oracle on contiguous keys and values."""
    layer = len(cache._caches[0]) - 1
    for i, tokens in enumerate(prompts):
        k, v = (array.astype(cache.dtype) for array in contents(tokens, layer))
        assert_attention(result[0][i], result[1][i], q[i], k, v, **{"causal": True, **scores})
