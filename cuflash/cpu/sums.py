"""Sums of gradients whose parts several work items compute: added in the order of the items, whenever those end."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from threading import Lock

import numpy as np

from cuflash.cpu.tiles import sum_dtype
from cuflash.problem import Problem


class _InOrder:
    """Actions in the order of their turns 0, 1, ...: one that comes early is kept until those before it are done."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._next = 0
        self._early: dict[int, Callable[[], object]] = {}

    def do(self, turn: int, action: Callable[[], object]) -> None:
        with self._lock:
            self._early[turn] = action
            while self._next in self._early:
                self._early.pop(self._next)()
                self._next += 1


class KeySum:
    """dk (keys, head_dim) and dv (keys, head_dim_v) of one key/value head, the sums of what `items` items give."""

    def __init__(self, dk: np.ndarray, dv: np.ndarray, items: int, dtype: type) -> None:
        self._gradients, self._items, self._dtype = (dk, dv), items, dtype
        self._order = _InOrder()

    def give(self, turn: int, parts: list[tuple[slice, np.ndarray, np.ndarray]]) -> None:
        """The parts of one item: of each tile that it sees keys, dk, dv."""
        self._order.do(turn, lambda: self._add(turn, parts))

    def _add(self, turn: int, parts: list[tuple[slice, np.ndarray, np.ndarray]]) -> None:
        if self._items == 1:
            for keys, *own in parts:
                for gradient, part in zip(self._gradients, own, strict=True):
                    gradient[keys] = part
            return
        if turn == 0:
            self._totals: list[np.ndarray] = [np.zeros(x.shape, self._dtype) for x in self._gradients]
        for keys, *own in parts:
            for total, part in zip(self._totals, own, strict=True):
                total[keys] += part
        if turn == self._items - 1:
            for gradient, total in zip(self._gradients, self._totals, strict=True):
                gradient[...] = total
            del self._totals


class BiasSum:
    """The gradient of a bias, zeros of rank 4: written in place if each score has an element of its own, else summed.

    Along an axis of length 1 the gradients of all scores are added.
    """

    def __init__(self, problem: Problem, dbias: np.ndarray) -> None:
        self._dbias = dbias
        self._per_batch, self._per_head, self._along_q, self._along_k = (size != 1 for size in dbias.shape)
        alone = dbias.shape[:2] == (problem.batch, problem.num_heads)
        self._in_place = alone and self._along_q and self._along_k
        self.part_is_as_large_as_scores = not alone and self._along_q and self._along_k
        self._total = dbias if self._in_place else np.zeros(dbias.shape, sum_dtype(problem))
        self._order, self._turns = _InOrder(), count()

    def turn(self) -> int:
        """The turn of the next item."""
        return next(self._turns)

    def part(self, place: tuple[int, int, slice, slice]) -> np.ndarray:
        """Where an item adds its dS: zeros (queries or 1, keys or 1). place: batch, head, queries, keys."""
        own = self._at(place)
        return own if self._in_place else np.zeros_like(own)

    def add(self, part: np.ndarray, ds: np.ndarray, query: int, key: int) -> None:
        """part += dS (queries, keys), which begins at `query` and `key` of those of the part."""
        if self._in_place:
            part[query : query + ds.shape[0], key : key + ds.shape[1]] = ds
            return
        if not self._along_q:
            ds, query = ds.sum(axis=0, keepdims=True), 0
        if not self._along_k:
            ds, key = ds.sum(axis=1, keepdims=True), 0
        part[query : query + ds.shape[0], key : key + ds.shape[1]] += ds

    def give(self, turn: int, place: tuple[int, int, slice, slice], part: np.ndarray, total: np.ndarray) -> None:
        """What an item has added to its part, of rows of P whose sums are `total` (queries, 1)."""
        if self._along_q and np.can_cast(total.dtype, part.dtype):  # 16 bits would not show it
            part /= total
        if not self._in_place:
            self._order.do(turn, lambda: np.add(self._at(place), part, out=self._at(place)))

    def _at(self, place: tuple[int, int, slice, slice]) -> np.ndarray:
        batch, head, queries, keys = place
        own = self._total[batch if self._per_batch else 0, head if self._per_head else 0]
        return own[queries if self._along_q else slice(1), keys if self._along_k else slice(1)]

    def write(self) -> None:
        if not self._in_place:
            self._dbias[...] = self._total
