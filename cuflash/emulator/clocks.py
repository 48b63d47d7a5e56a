"""Which accesses are ordered before which: vector clocks per warp.

Every warp counts the intervals between its synchronisations (Clocks.time). seen[b, w, x] is the last interval of warp
x that is ordered before what warp w does now. An access is free of races when every conflicting earlier one lies in
an interval that is seen, or was made by the very same thread. Every kind of synchronisation only has to say which
warps learn what: the lanes of a warp among themselves (order_lanes), a barrier (arrive and leave), or a flag: what a
warp did before a release or fence is published by its next strong access (volatile, relaxed, release or atomic),
heard by strong accesses that follow, and known after their acquire or fence. Flags of a block are not told apart, nor
are the lanes of a warp when it comes to who synchronised.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from cuflash.emulator.lanes import Lanes


class Clocks:
    """Intervals of every warp of a batch, and which of them are ordered before which warp.

    time : (blocks, warps); seen : (blocks, warps, warps); limit : (blocks, 1, 1), every interval below it is seen by
        all warps; lowest: the least of them;
    fenced : what each warp knew at its last release; published : (blocks, warps) what strong accesses carry; heard :
        what each warp will know after its next acquire.
    """

    def __init__(self, blocks: int, warps: int) -> None:
        self.time = np.ones((blocks, warps), np.int32)
        self.seen = np.zeros((blocks, warps, warps), np.int32)
        self.limit, self.lowest = np.ones((blocks, 1, 1), np.int32), 1
        self.fenced, self.heard = np.zeros_like(self.seen), np.zeros_like(self.seen)
        self.published = np.zeros((blocks, warps), np.int32)
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

    # --- barriers

    def join(self) -> None:
        """All warps of every block synchronise."""
        together = np.maximum(self.seen.max(1), self.time)
        self.seen[...] = together[:, None, :]
        self.time += 1
        self.limit = together.min(1)[:, None, None] + 1
        self.lowest = int(self.limit.min())

    def arrive(self, rows: np.ndarray, warps: np.ndarray) -> np.ndarray:
        """Warps end an interval; what each of them then knows, (n, warps). rows, warps : (n,), each warp once."""
        knows = self.seen[rows, warps]
        knows[np.arange(len(warps)), warps] = self.time[rows, warps]
        self.time[rows, warps] += 1
        return knows

    def learn(self, rows: np.ndarray, warps: np.ndarray, known: np.ndarray) -> None:
        """Warps learn; known : (n, warps)."""
        self.seen[rows, warps] = np.maximum(self.seen[rows, warps], known)
        self.limit[rows] = self.seen[rows].min((1, 2))[:, None, None] + 1
        self.lowest = int(self.limit.min())

    # --- flags

    def release(self, lanes: Lanes) -> None:
        """The warps' next strong accesses carry what they know now."""
        rows, warps = _pairs(lanes)
        self.fenced[rows, warps] = self.arrive(rows, warps)
        self.accesses += 1

    def publish(self, lanes: Lanes) -> None:
        """A strong write."""
        rows, warps = _pairs(lanes)
        np.maximum.at(self.published, rows, self.fenced[rows, warps])

    def hear(self, lanes: Lanes) -> None:
        """A strong read."""
        rows, warps = _pairs(lanes)
        self.heard[rows, warps] = np.maximum(self.heard[rows, warps], self.published[rows])

    def acquire(self, lanes: Lanes) -> None:
        """The warps know what they heard."""
        rows, warps = _pairs(lanes)
        self.learn(rows, warps, self.heard[rows, warps])


def _pairs(lanes: Lanes) -> tuple[np.ndarray, np.ndarray]:
    """Block slots and warp numbers of a selection, each (n,)."""
    rows, warps = np.broadcast_arrays(lanes.rows[:, :, 0], lanes.warp[:, :, 0])
    return rows.reshape(-1), warps.reshape(-1)
