"""Who may see whose accesses: vector clocks per warp, and the last accesses to every piece of shared memory.

Every warp counts the intervals between its synchronisations (Clocks.time). seen[b, w, x] is the last interval of warp x that is ordered
before what warp w does now. An access is free of races when every conflicting earlier one lies in an interval that is seen, or was made
by the very same thread. Named barriers and later mechanisms only need to say which warps learn what: Clocks.join.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cuflash.emulator.faults import Race, Uninitialized

if TYPE_CHECKING:
    from cuflash.emulator.lanes import Lanes

THREAD_BITS, LANE_BITS = 10, 6
THREAD_MASK, LANE_MASK = (1 << THREAD_BITS) - 1, (1 << LANE_BITS) - 1
NEVER = np.iinfo(np.int32).max
IN_FLIGHT = (NEVER >> THREAD_BITS) - 1  # interval of a write whose copy has not been waited for: seen by nobody
MANY = LANE_MASK  # several lanes read in the same interval


class Clocks:
    """Intervals of every warp of a batch, and which of them are ordered before which warp.

    time : (blocks, warps); seen : (blocks, warps, warps); limit : (blocks, 1, 1), every interval below it is seen by all warps.
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


class SharedHistory:
    """Last writer and last readers of every granule of shared memory (granule: the narrowest access of the kernel, in bytes).

    last_write : interval << 10 | thread, or NEVER; last_read : (granules, warps) interval << 6 | lane.
    """

    def __init__(self, clocks: Clocks, blocks: int, warps: int, stride: int, granule: int, check: bool) -> None:
        self.clocks, self.warps, self.check = clocks, warps, check
        self.shift = granule.bit_length() - 1
        self.granule, self.stride = granule, stride
        count = blocks * (stride >> self.shift)
        self.last_write = np.full(count, NEVER, np.int32)
        self.last_read = np.zeros((count if check else 0, warps), np.int32)
        self.atomic = np.zeros(0, bool)

    def pieces(self, offsets: np.ndarray, width: int) -> np.ndarray:
        """Granules of accesses at byte offsets: a new last axis when an access covers several."""
        first = offsets >> self.shift
        if width <= self.granule:
            return first
        return first[..., None] + np.arange(width >> self.shift)

    def read(self, lanes: Lanes, site: int, offsets: np.ndarray, width: int, mask: np.ndarray | None, together: bool = False) -> None:
        """Check and note a read. offsets are picked by mask; together: the warp reads as one (ldmatrix)."""
        pieces = self.pieces(offsets, width)
        wide = pieces.ndim > np.ndim(offsets)
        written = self.last_write.take(pieces)
        if not self.check:
            if written.max() == NEVER:
                raise self._uninitialized(lanes, site, offsets, written == NEVER, wide, mask)
            return
        self.clocks.accesses += 1
        limit = lanes.pick(self.clocks.limit[lanes.rows[:, 0, 0]], mask)
        if not (written < ((limit[..., None] if wide else limit) << THREAD_BITS)).all():
            if written.max() == NEVER:
                raise self._uninitialized(lanes, site, offsets, written == NEVER, wide, mask)
            self._check_writes(lanes, site, offsets, written, wide, mask, "read")
        self._note_read(lanes, pieces, wide, mask, together)

    def _note_read(self, lanes: Lanes, pieces: np.ndarray, wide: bool, mask: np.ndarray | None, together: bool) -> None:
        together = together or mask is None and np.shape(pieces)[2] == 1  # one address for the whole warp
        warp, lane = lanes.warp, lanes.tid & 31
        now = self.clocks.time[lanes.rows[:, :, 0], lanes.warp[:, :, 0]][:, :, None] << LANE_BITS
        warp, now = lanes.pick(warp, mask), lanes.pick(now | (MANY if together else lane), mask)
        if wide:
            warp, now = warp[..., None], now[..., None]
        places = pieces * self.warps + warp
        notes = self.last_read.reshape(-1)
        if together:
            notes[places] = now
            return
        old = notes.take(places)
        now = np.where((old != now) & (old >> LANE_BITS == now >> LANE_BITS), now | MANY, now)
        notes[places] = now
        mixed = notes.take(places) != now
        if mixed.any():
            notes[places[np.broadcast_to(mixed, places.shape)]] |= MANY

    def write(
        self, lanes: Lanes, site: int, offsets: np.ndarray, width: int, mask: np.ndarray | None, in_flight: bool = False, atomic: bool = False
    ) -> None:
        """Check and note a write by all active lanes; offsets is one axis, one element per active lane."""
        pieces = self.pieces(offsets, width)
        wide = pieces.ndim > 1
        if not self.check:
            self.last_write[pieces] = 0
            return
        self.clocks.accesses += 1
        limit = lanes.flat(self.clocks.limit[lanes.rows[:, 0, 0]], mask)
        limit = limit[:, None] if wide else limit
        every = mask if mask is not None else np.ones(lanes.shape, bool)
        written = self.last_write.take(pieces)
        if not (written < limit << THREAD_BITS).all():
            unseen = np.where(self.atomic[pieces], 0, written) if atomic and self.atomic.size else written
            self._check_writes(lanes, site, offsets, np.where(unseen == NEVER, 0, unseen), wide, every, "write")
        read = self.last_read[pieces]
        if not (read < limit[..., None] << LANE_BITS).all():
            self._check_reads(lanes, site, offsets, read, wide, every)
        tid = lanes.flat(lanes.tid, mask)
        time = lanes.flat(self.clocks.time[lanes.rows[:, :, 0], lanes.warp[:, :, 0]][:, :, None], mask)
        mine = ((IN_FLIGHT if in_flight else time) << THREAD_BITS | tid).astype(np.int32)
        mine = mine[:, None] if wide else mine
        self.last_write[pieces] = mine
        if self.atomic.size:
            self.atomic[pieces] = atomic
        elif atomic:
            self.atomic = np.zeros(len(self.last_write), bool)
            self.atomic[pieces] = True
        if not atomic and not (self.last_write.take(pieces) == mine).all():
            other = self.last_write.take(pieces)
            raise self._race(lanes, site, offsets, other != mine, other, wide, every, "write", "a write of the same instruction by")

    def land(self, offsets: np.ndarray, width: int, slots: np.ndarray, tid: np.ndarray) -> None:
        """A copy in flight has been waited for by its thread."""
        if not self.check:
            return
        pieces = self.pieces(offsets, width)
        now = (self.clocks.time[slots, tid >> 5] << THREAD_BITS | tid).astype(np.int32)
        self.last_write[pieces] = now[:, None] if pieces.ndim > 1 else now
        self.clocks.accesses += 1

    # --- the precise checks, where the quick one is not enough

    def _check_writes(self, lanes, site, offsets, written, wide, mask, verb):  # type: ignore[no-untyped-def]
        time, writer = written >> THREAD_BITS, written & THREAD_MASK
        row, warp, tid = (lanes.pick(x, mask) for x in (lanes.rows, lanes.warp, lanes.tid))
        if wide:
            row, warp, tid = row[..., None], warp[..., None], tid[..., None]
        bad = (time > self.clocks.seen[row, warp, writer >> 5]) & ((writer != tid) | (time == IN_FLIGHT))
        if bad.any():
            flying = bool(((time == IN_FLIGHT) & bad).reshape(-1)[np.flatnonzero(bad.reshape(-1))[0]])
            what = "a copy still in flight (cp.async) by" if flying else "a write by"
            raise self._race(lanes, site, offsets, bad, written, wide, mask, verb, what)

    def _check_reads(self, lanes, site, offsets, read, wide, mask):  # type: ignore[no-untyped-def]
        time, lane = read >> LANE_BITS, read & LANE_MASK
        row, warp, tid = (lanes.pick(x, mask) for x in (lanes.rows, lanes.warp, lanes.tid))
        extra = (..., None, None) if wide else (..., None)
        row, warp, tid = row[extra], warp[extra], tid[extra]
        reader = np.arange(self.warps)
        bad = (time > self.clocks.seen[row, warp, reader]) & ((reader != warp) | (lane != (tid & 31)))
        if bad.any():
            who = np.where(bad, reader * 32 + np.minimum(lane, 31), -1).max(-1)
            raise self._race(lanes, site, offsets, bad.any(-1), who, wide, mask, "write", "a read by")

    def _race(self, lanes, site, offsets, bad, other, wide, mask, verb, what):  # type: ignore[no-untyped-def]
        bad, other = np.broadcast_arrays(bad, other)
        first = int(other.reshape(-1)[np.flatnonzero(bad.reshape(-1))[0]]) & THREAD_MASK
        thread = lanes.machine.thread_coordinates(first)
        flat = np.broadcast_to(offsets, bad.shape[:-1] if wide else bad.shape).reshape(-1)
        return lanes.fault(
            Race,
            site,
            bad.any(-1) if wide else bad,
            mask,
            lambda k: f"{verb} of shared address {int(flat[k]) % self.stride:#x} races with {what} thread {thread} of the same block",
        )

    def _uninitialized(self, lanes, site, offsets, bad, wide, mask):  # type: ignore[no-untyped-def]
        flat = np.reshape(offsets, -1)
        return lanes.fault(
            Uninitialized,
            site,
            bad.any(-1) if wide else bad,
            mask,
            lambda k: f"read of shared address {int(flat[k]) % self.stride:#x}: bytes that nothing has written",
        )


class GlobalWriters:
    """Last writer of every granule of global memory in one launch: two threads that write the same bytes unordered are a race.

    Between blocks a fence or release after the first write and a fence or acquire before the second count as order.
    """

    def __init__(self, granule: int, size: int, check: bool, blocks: int) -> None:
        self.check, self.now = check, 1
        self.releases, self.acquires = np.zeros(blocks, np.int64), np.zeros(blocks, np.int64)
        self.shift = granule.bit_length() - 1
        self.granule = granule
        self.thread = np.zeros(size >> self.shift if check else 0, np.int64)
        self.moment = np.zeros(size >> self.shift if check else 0, np.int64)

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
            self._check(lanes, site, offsets, before, self.moment.take(pieces), (row[extra], warp[extra], tid[extra]), mask)
        self.thread[pieces] = mine[extra]
        self.moment[pieces] = self.now
        after = self.thread.take(pieces)
        if not (after == mine[extra]).all():
            raise self._race(lanes, site, offsets, after != mine[extra], after, mask)

    def _check(self, lanes, site, offsets, before, moment, who, mask):  # type: ignore[no-untyped-def]
        row, warp, tid = who
        machine, clocks = lanes.machine, lanes.machine.clocks
        mine = machine.first_block + row
        block = np.maximum((before >> 34) - 1, 0)
        writer, time = before & THREAD_MASK, (before >> THREAD_BITS) & ((1 << 24) - 1)
        same = block == mine
        inside = (writer == tid) | (time <= clocks.seen[row, warp, np.where(same, writer >> 5, 0)])
        between = (self.releases[block] > moment) & (self.acquires[mine] > moment)
        bad = (before != 0) & ~np.where(same, inside, between)
        if bad.any():
            raise self._race(lanes, site, offsets, bad, before, mask)

    def release(self, lanes: Lanes) -> None:
        """The blocks make what they wrote visible to others."""
        self.now += 1
        self.releases[lanes.machine.first_block + lanes.rows] = self.now

    def acquire(self, lanes: Lanes) -> None:
        """The blocks see what others released before."""
        self.now += 1
        self.acquires[lanes.machine.first_block + lanes.rows] = self.now

    def _race(self, lanes, site, offsets, bad, other, mask):  # type: ignore[no-untyped-def]
        machine = lanes.machine
        first = int(other.reshape(-1)[np.flatnonzero(np.broadcast_to(bad, other.shape).reshape(-1))[0]])
        block = machine.grid_coordinates((first >> 34) - 1)
        thread = machine.thread_coordinates(first & THREAD_MASK)
        shaped = bad.any(-1) if bad.ndim > 1 else bad
        every = mask if mask is not None else np.ones(lanes.shape, bool)
        return lanes.fault(
            Race,
            site,
            shaped,
            every,
            lambda k: f"write at {machine.memory.describe(int(offsets[k]))} races with a write by thread {thread} of block {block}",
        )
