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
        self._k_tiles: list[np.ndarray] = []
        squares = [0.0]
        for begin in range(self._begin, self._end, self.tile):
            k: np.ndarray = self._k[begin : min(begin + self.tile, self._end)].astype(self._dtype)
            squares.append(np.einsum("nd,nd->n", k, k).max())
            self._k_tiles.append(np.ascontiguousarray(k.T))
        self.norm = float(np.sqrt(np.max(squares)))
        self._v_rows: np.ndarray = self._v[self._begin : self._end].astype(self._dtype, order="C")
        self.v_max = float(np.maximum(self._v_rows.max(initial=0), -self._v_rows.min(initial=0)))
        self._odd: list[tuple[int, np.ndarray]] = []
        if not np.isfinite(self.v_max):
            odd = np.flatnonzero(~np.isfinite(self._v_rows).all(axis=1))
            self._odd = [(int(i) + self._begin, self._v_rows[i].copy()) for i in odd]
            self._v_rows[odd] = 0

    def tiles(self, begin: int, end: int) -> Iterator[KeyTile]:
        """The tiles that hold keys [begin, end), a part of what is packed."""
        while begin < end:
            index = (begin - self._begin) // self.tile
            first = self._begin + index * self.tile
            last = min(first + self.tile, end)
            k_t = self._k_tiles[index]
            if k_t.shape[1] != last - begin:
                k_t = k_t[:, begin - first : last - first]
            odd = [(i - begin, value) for i, value in self._odd if begin <= i < last]
            yield KeyTile(begin, last, k_t, self._v_rows[begin - self._begin : last - self._begin], odd)
            begin = last
