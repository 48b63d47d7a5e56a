"""Which accesses are ordered before which: vector clocks per warp.

Every warp counts the intervals between its synchronisations (Clocks.time). seen[b, w, x] is the last interval of warp
x that is ordered before what warp w does now. An access is free of races when every conflicting earlier one lies in
an interval that is seen, or was made by the very same thread. Every kind of synchronisation only has to say which
warps learn what: order_lanes and join.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from cuflash.emulator.lanes import Lanes


class Clocks:
    """Intervals of every warp of a batch, and which of them are ordered before which warp.

    time : (blocks, warps); seen : (blocks, warps, warps); limit : (blocks, 1, 1), every interval below it is seen by
        all warps.
    """

    def __init__(self, blocks: int, warps: int) -> None:
        self.time = np.ones((blocks, warps), np.int32)
        self.seen = np.zeros((blocks, warps, warps), np.int32)
        self.limit = np.ones((blocks, 1, 1), np.int32)
        self.accesses = 0
        self._ordered: tuple[Lanes | None, int] = (None, -1)

    def order_lanes(self, lanes: Lanes) -> None:
        """The lanes of each selected warp synchronise among themselves."""
        if self._ordered[0] is lanes and self._ordered[1] == self.accesses:
            return
        self._ordered = lanes, self.accesses
        rows, warps = lanes.rows[:, :, 0], lanes.warp[:, :, 0]
        now = self.time[rows, warps]
        self.seen[rows, warps, warps] = now
        self.time[rows, warps] = now + 1

    def join(self, rows: np.ndarray, members: np.ndarray) -> None:
        """Warps synchronise: each member learns what any member knows or did.

        rows : (n,) block slots; members : (n, warps) bool.
        """
        time = self.time[rows]
        knows = np.maximum(self.seen[rows], time[:, :, None] * np.eye(time.shape[1], dtype=np.int32))
        together = np.where(members[:, :, None], knows, 0).max(1, keepdims=True)
        self.seen[rows] = np.where(members[:, :, None], together, self.seen[rows])
        self.time[rows] = time + members
        self.limit[rows] = self.seen[rows].min((1, 2))[:, None, None] + 1
