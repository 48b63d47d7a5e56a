"""The keys and values of one head, laid out for BLAS in the precision of the sums."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Lock
from typing import NamedTuple

import numpy as np


class KeyTile(NamedTuple):
    """Keys [begin, end)."""

    begin: int
    end: int
    k_t: np.ndarray  # (head_dim, end - begin)
    v: np.ndarray  # (end - begin, head_dim_v); rows that are not finite are zero
    odd_rows: list[tuple[int, np.ndarray]]  # those rows: key - begin, value


class Keys:
    """Keys [begin, end) of one head, packed by the first work item that needs them and shared by all.

    k (seqlen_k, head_dim) and v (seqlen_k, head_dim_v) have any strides and dtype. Keys outside of the range are
    never read. `tile` is the number of keys of a tile, `norm` the largest Euclidean norm of a key, `v_max` the largest
    |v|; NaN and inf show in both.
    """

    def __init__(self, k: np.ndarray, v: np.ndarray, begin: int, end: int, tile: int, dtype: type) -> None:
        self.tile = tile
        self._k, self._v, self._begin, self._end, self._dtype = k, v, begin, end, dtype
        self._lock = Lock()
        self._packed = False

    def pack(self) -> None:
        with self._lock:
            if not self._packed:
                self._pack()
                self._packed = True

    def _pack(self) -> None:
        v: np.ndarray = self._v[self._begin : self._end].astype(self._dtype, order="C")
        self.v_max = float(np.maximum(v.max(initial=0), -v.min(initial=0)))
        odd: list[int] = [] if np.isfinite(self.v_max) else np.flatnonzero(~np.isfinite(v).all(axis=1)).tolist()
        odd_values = v[odd]
        v[odd] = 0
        self._tiles: list[KeyTile] = []
        square = 0.0
        for begin in range(0, len(v), self.tile):
            end = min(begin + self.tile, len(v))
            k: np.ndarray = self._k[self._begin + begin : self._begin + end].astype(self._dtype)
            square = np.maximum(square, np.einsum("nd,nd->n", k, k).max())
            odd_rows = [(i - begin, value) for i, value in zip(odd, odd_values, strict=True) if begin <= i < end]
            first, last = begin + self._begin, end + self._begin
            self._tiles.append(KeyTile(first, last, np.ascontiguousarray(k.T), v[begin:end], odd_rows))
        self.norm = float(np.sqrt(square))

    def tiles(self, begin: int, end: int) -> Iterator[KeyTile]:
        """The tiles that hold keys [begin, end), a part of what is packed; the first and the last are cut to it."""
        if begin >= end:
            return
        for tile in self._tiles[(begin - self._begin) // self.tile : -(-(end - self._begin) // self.tile)]:
            yield tile if begin <= tile.begin and tile.end <= end else _cut(tile, begin, end)


def _cut(tile: KeyTile, begin: int, end: int) -> KeyTile:
    begin, end = max(begin, tile.begin), min(end, tile.end)
    part = slice(begin - tile.begin, end - tile.begin)
    odd_rows = [(i - part.start, value) for i, value in tile.odd_rows if part.start <= i < part.stop]
    return KeyTile(begin, end, tile.k_t[:, part], tile.v[part], odd_rows)
