"""Unordered writes to global memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cuflash.emulator.faults import EmulatorFault, Race
from cuflash.emulator.races import THREAD_BITS, THREAD_MASK

if TYPE_CHECKING:
    from cuflash.emulator.lanes import Lanes


class GlobalWriters:
    """Last writer of every granule of global memory in one launch: two threads that write the same bytes unordered
    are a race.

    Between blocks a fence or release after the first write and a fence or acquire before the second count as order.
    """

    def __init__(self, granule: int, size: int, check: bool, blocks: int) -> None:
        self.check, self.now = check, 1
        self.releases, self.acquires = np.zeros(blocks, np.int64), np.zeros(blocks, np.int64)
        self.shift = granule.bit_length() - 1
        self.granule = granule
        self.thread = np.zeros(size >> self.shift if check else 0, np.int64)
        self.moment = np.zeros_like(self.thread)
        self.site = np.zeros(len(self.thread), np.int32)

    def write(self, lanes: Lanes, site: int, offsets: np.ndarray, width: int, mask: np.ndarray | None) -> None:
        """Check and note a write; offsets is one axis, one element per active lane."""
        if not self.check:
            return
        machine, clocks = lanes.machine, lanes.machine.clocks
        pieces = offsets >> self.shift
        if width > self.granule:
            pieces = pieces[:, None] + np.arange(width >> self.shift)
        row, warp, tid = (lanes.flat(x, mask) for x in (lanes.rows, lanes.warp, lanes.tid))
        time = clocks.time[row, warp].astype(np.int64)
        mine = (machine.first_block + row + 1) << 34 | time << THREAD_BITS | tid
        extra = (slice(None), None) if pieces.ndim > 1 else slice(None)
        before = self.thread.take(pieces)
        if before.any():
            self._check(lanes, site, offsets, pieces, before, (row[extra], warp[extra], tid[extra]), mask)
        self.thread[pieces] = mine[extra]
        self.moment[pieces], self.site[pieces] = self.now, site
        after = self.thread.take(pieces)
        if not (after == mine[extra]).all():
            raise self._race(lanes, site, offsets, pieces, after != mine[extra], after, mask)

    def _check(
        self,
        lanes: Lanes,
        site: int,
        offsets: np.ndarray,
        pieces: np.ndarray,
        before: np.ndarray,
        who: tuple,
        mask: np.ndarray | None,
    ) -> None:
        row, warp, tid = who
        moment = self.moment.take(pieces)
        machine, clocks = lanes.machine, lanes.machine.clocks
        mine = machine.first_block + row
        block = np.maximum((before >> 34) - 1, 0)
        writer, time = before & THREAD_MASK, (before >> THREAD_BITS) & ((1 << 24) - 1)
        same = block == mine
        inside = (writer == tid) | (time <= clocks.seen[row, warp, np.where(same, writer >> 5, 0)])
        between = (self.releases[block] > moment) & (self.acquires[mine] > moment)
        bad = (before != 0) & ~np.where(same, inside, between)
        if bad.any():
            raise self._race(lanes, site, offsets, pieces, bad, before, mask)

    def release(self, lanes: Lanes) -> None:
        """The blocks make what they wrote visible to others."""
        self.now += 1
        self.releases[lanes.machine.first_block + lanes.rows] = self.now

    def acquire(self, lanes: Lanes) -> None:
        """The blocks see what others released before."""
        self.now += 1
        self.acquires[lanes.machine.first_block + lanes.rows] = self.now

    def _race(
        self,
        lanes: Lanes,
        site: int,
        offsets: np.ndarray,
        pieces: np.ndarray,
        bad: np.ndarray,
        other: np.ndarray,
        mask: np.ndarray | None,
    ) -> EmulatorFault:
        machine = lanes.machine
        position = np.flatnonzero(np.broadcast_to(bad, other.shape).reshape(-1))[0]
        first = int(other.reshape(-1)[position])
        block = machine.grid_coordinates((first >> 34) - 1)
        thread = machine.thread_coordinates(first & THREAD_MASK)
        at = machine.site(int(self.site[pieces.reshape(-1)[position]]))
        shaped = np.any(bad, -1) if bad.ndim > 1 else bad
        every = mask if mask is not None else np.ones(lanes.shape, bool)
        return lanes.fault(
            Race,
            site,
            shaped,
            every,
            lambda k: (
                f"write at {machine.memory.describe(int(offsets[k]))} races with a write by thread {thread} "
                f"of block {block},\n    which is at {at}"
            ),
        )
