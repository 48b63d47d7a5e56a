"""Sequences in the blocks of a cache, and what attention to them must give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from tests import tolerances

NOWHERE = 10**6  # of entries that must not be read


@dataclass
class Paged:
    """Arguments of `paged_attention` and, of each sequence, contiguous keys and values."""

    k_cache: np.ndarray
    v_cache: np.ndarray
    block_tables: np.ndarray
    seq_lens: np.ndarray
    keys: list[np.ndarray]  # (length, num_kv_heads, head_dim)
    values: list[np.ndarray]

    @property
    def arguments(self) -> tuple[np.ndarray, ...]:
        return self.k_cache, self.v_cache, self.block_tables, self.seq_lens


def paged(
    rng: np.random.Generator,
    lengths: Sequence[int],
    block_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: Any = np.float16,
    head_dim_v: int | None = None,
    head_first: bool = False,
) -> Paged:
    """Sequences in blocks in random order; slots that hold no token are NaN, table entries past the last block wrong.

    `head_first`: the memory of a cache is (num_blocks, num_kv_heads, block_size, dim).
    """
    counts = [-(-n // block_size) for n in lengths]
    num_blocks = sum(counts) + 3
    caches = []
    for dim in (head_dim, head_dim_v or head_dim):
        shape = (num_blocks, block_size, num_kv_heads, dim)
        if head_first:
            shape = (num_blocks, num_kv_heads, block_size, dim)
        cache = np.full(shape, np.nan, dtype)
        caches.append(cache.transpose(0, 2, 1, 3) if head_first else cache)
    tables = np.full((len(lengths), max(counts, default=0) + 2), NOWHERE, np.int32)
    order = iter(rng.permutation(num_blocks))
    keys, values = [], []
    for b, length in enumerate(lengths):
        tables[b, : counts[b]] = blocks = [next(order) for _ in range(counts[b])]
        for cache, rows in zip(caches, (keys, values), strict=True):
            tokens = rng.standard_normal((length, *cache.shape[2:])).astype(dtype)
            rows.append(tokens)
            for i, block in enumerate(blocks):
                part = tokens[i * block_size : (i + 1) * block_size]
                cache[block, : len(part)] = part
    return Paged(*caches, tables, np.array(lengths, np.int32), keys, values)


def check_paged(
    case: Paged, queries: Sequence[np.ndarray], out: Any, lse: Any, bias: Any = None, **scores: Any
) -> None:
    """out and lse, packed like `queries` (length, num_heads, head_dim) one after another, against the oracle."""
    ends = np.cumsum([0, *(len(q) for q in queries)])
    for b, (begin, end) in enumerate(pairwise(ends)):
        if begin == end:
            continue
        own = {} if bias is None else {"bias": bias[b, :, : end - begin, : len(case.keys[b])]}
        result = out[begin:end], lse[:, begin:end]
        tolerances.assert_attention(*result, queries[b], case.keys[b], case.values[b], **own, **scores)
