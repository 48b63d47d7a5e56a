"""The keys and values of one head, laid out for BLAS in the precision of the sums."""

from __future__ import annotations

from threading import Lock
from typing import NamedTuple

import numpy as np

from cuflash.cpu.visibility import Part, Sight


class KeyTile(NamedTuple):
    """Some keys of the sequence."""

    keys: slice
    k_t: np.ndarray  # (head_dim, keys)
    v: np.ndarray  # (keys, head_dim_v); rows that are not finite are zero
    odd_rows: list[tuple[int, np.ndarray]]  # those rows: place in the tile, value


class Keys:
    """The keys of one head that are seen, packed by the first call of `pack` and shared by all work items.

    k (seqlen_k, head_dim) and v (seqlen_k, head_dim_v) have any strides and dtype. Tiles that no query sees are
    never read. `norm` is the largest Euclidean norm of a key, `v_max` the largest |v|; NaN and inf show in both.
    """

    def __init__(self, k: np.ndarray, v: np.ndarray, sight: Sight, dtype: type) -> None:
        self._k, self._v, self._sight, self._dtype = k, v, sight, dtype
        self._lock = Lock()
        self._tiles: dict[int, KeyTile] = {}
        self._packed = False

    def pack(self) -> None:
        with self._lock:
            if not self._packed:
                self.norm = self.v_max = 0.0
                self._tiles = {i: self._pack(keys) for i, keys in self._sight.tiles()}
                self._packed = True

    def _pack(self, keys: slice) -> KeyTile:
        k: np.ndarray = self._k[keys].astype(self._dtype)
        v: np.ndarray = self._v[keys].astype(self._dtype, order="C")
        self.norm = np.maximum(self.norm, np.sqrt(np.einsum("nd,nd->n", k, k).max()))
        self.v_max = np.maximum(self.v_max, np.maximum(v.max(initial=0), -v.min(initial=0)))
        odd_rows = []
        if not np.isfinite(self.v_max):
            odd_rows = [(i, v[i].copy()) for i in np.flatnonzero(~np.isfinite(v).all(axis=1)).tolist()]
            for i, _ in odd_rows:
                v[i] = 0
        return KeyTile(keys, np.ascontiguousarray(k.T), v, odd_rows)

    def of(self, part: Part) -> KeyTile:
        """The keys of a part of a tile that is packed."""
        tile = self._tiles[part.tile]
        return tile if tile.keys == part.keys else _cut(tile, part.keys)


def _cut(tile: KeyTile, keys: slice) -> KeyTile:
    part = slice(keys.start - tile.keys.start, keys.stop - tile.keys.start)
    odd_rows = [(i - part.start, value) for i, value in tile.odd_rows if part.start <= i < part.stop]
    return KeyTile(keys, tile.k_t[:, part], tile.v[part], odd_rows)
