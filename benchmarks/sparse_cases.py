"""Sparse cases: masks of blocks and windows, the two sparsities of SCFA, each with its definition in plain NumPy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from benchmarks.cases import Case
from cuflash import masks, sparse

BLOCK = 128  # queries and keys of a random block

Pattern = Literal["random", "window", "butterfly"]


@dataclass(frozen=True)
class MaskedCase(Case):
    """A mask of a pattern.

    `amount` is the number of blocks of 128 a row (random), how many keys a query sees on each side (window), or the
    size of a block (butterfly).
    """

    pattern: Pattern = "random"
    amount: int = 1

    @property
    def mask(self) -> str:
        unit = {"random": "blocks a row", "window": "to each side", "butterfly": "a block"}[self.pattern]
        return f"{self.pattern}, {self.amount} {unit}"

    @property
    def keywords(self) -> dict[str, Any]:
        return super().keywords | {"mask": self.built}

    @property
    def built(self) -> masks.Mask:
        """The same one whenever it is asked for, so that its lists of tiles are kept."""
        return _mask(self.pattern, self.amount, self.seqlen)

    @property
    def density(self) -> float:
        return _density(self.pattern, self.amount, self.seqlen)

    def blocks(self) -> np.ndarray:
        """Of a random mask, which blocks are on."""
        drawn = self.built
        if not isinstance(drawn, masks.RandomBlocks):
            raise TypeError(f"{self.mask}: has no blocks")
        return drawn.matrix

    def visible(self, rows: slice | np.ndarray = slice(None), head: int = 0) -> np.ndarray:
        keys = np.arange(self.seqlen)[None, :]
        queries = np.arange(self.seqlen)[rows, None]
        if self.pattern == "random":
            return self.blocks()[queries // BLOCK, keys // BLOCK]
        if self.pattern == "window":
            return np.abs(queries - keys) <= self.amount
        return np.bitwise_count(queries // self.amount ^ keys // self.amount) < 2


@lru_cache(maxsize=64)
def _mask(pattern: Pattern, amount: int, seqlen: int) -> masks.Mask:
    if pattern == "random":
        return masks.RandomBlocks(seqlen, seqlen, BLOCK, blocks_per_row=amount)
    return masks.SlidingWindow(amount, amount) if pattern == "window" else masks.Butterfly(amount)


@lru_cache(maxsize=256)
def _density(pattern: Pattern, amount: int, seqlen: int) -> float:
    return _mask(pattern, amount, seqlen).density(seqlen)


@dataclass(frozen=True)
class HashCase(Case):
    """Causal attention within buckets of random hashes; sorting, moving and putting back are part of the call."""

    right: int | None = 0
    buckets: int = 16

    @property
    def mask(self) -> str:
        return f"hash, {self.buckets} buckets"

    @property
    def function(self) -> Callable[..., Any]:
        return sparse.hash_sparse_attention

    @property
    def keywords(self) -> dict[str, Any]:
        return {name: value for name, value in super().keywords.items() if name == "options"}

    @property
    def density(self) -> float:
        """Expected."""
        return super().density / self.buckets

    def marks(self) -> tuple[np.ndarray, ...]:
        return _numbers(self.batch, self.seqlen, (self.num_heads, self.num_kv_heads), self.buckets)

    def visible(self, rows: slice | np.ndarray = slice(None), head: int = 0) -> np.ndarray:
        q_hash, k_hash = self.marks()
        of_keys = k_hash[-1, :, head * self.num_kv_heads // self.num_heads]
        return super().visible(rows) & (q_hash[-1, rows, head][:, None] == of_keys)


@dataclass(frozen=True)
class KeptCase(Case):
    """Causal attention of which `dropped` percent of the queries and of the keys, drawn at random, take no part."""

    right: int | None = 0
    dropped: int = 50

    @property
    def mask(self) -> str:
        return f"QK-sparse, {self.dropped} % dropped"

    @property
    def function(self) -> Callable[..., Any]:
        return sparse.qk_sparse_attention

    @property
    def keywords(self) -> dict[str, Any]:
        return {name: value for name, value in super().keywords.items() if name == "options"}

    @property
    def density(self) -> float:
        """Expected."""
        return super().density * (1 - self.dropped / 100) ** 2

    def marks(self) -> tuple[np.ndarray, ...]:
        keep_q, keep_k = _numbers(self.batch, self.seqlen, (self.num_heads, self.num_kv_heads), 100)
        return keep_q >= self.dropped, keep_k >= self.dropped

    def visible(self, rows: slice | np.ndarray = slice(None), head: int = 0) -> np.ndarray:
        keep_q, keep_k = self.marks()
        of_keys = keep_k[-1, :, head * self.num_kv_heads // self.num_heads]
        return super().visible(rows) & keep_q[-1, rows, head][:, None] & of_keys


@lru_cache(maxsize=1)
def _numbers(batch: int, seqlen: int, heads: tuple[int, int], below: int) -> tuple[np.ndarray, ...]:
    """Random whole numbers (batch, seqlen, heads) of queries and of keys."""
    rng = np.random.default_rng(3)
    return tuple(rng.integers(0, below, (batch, seqlen, n), np.int32) for n in heads)
