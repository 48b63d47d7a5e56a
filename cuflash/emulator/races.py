"""The last accesses to every piece of shared memory, and the faults they reveal: races and reads of what nothing has
written."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cuflash.emulator.clocks import Clocks
from cuflash.emulator.faults import EmulatorFault, Race, Uninitialized

if TYPE_CHECKING:
    from cuflash.emulator.lanes import Lanes

THREAD_BITS, LANE_BITS = 10, 6
THREAD_MASK, LANE_MASK = (1 << THREAD_BITS) - 1, (1 << LANE_BITS) - 1
NEVER = np.iinfo(np.int32).max
IN_FLIGHT = (NEVER >> THREAD_BITS) - 1  # interval of a write whose copy has not been waited for: seen by nobody
MANY = LANE_MASK  # several lanes read in the same interval
LINE = 16


class SharedHistory:
    """History of shared memory in lines of 16 bytes, and finer where the kernel makes narrower accesses.

    Tiles are written and read 16 bytes at a time, so most of memory never needs a finer one. A line that a narrow
    access touches is kept at that grain from then on. granule: the narrowest access of the kernel, in bytes.
    """

    def __init__(self, clocks: Clocks, blocks: int, warps: int, stride: int, granule: int, check: bool) -> None:
        grains = [g for g in (LINE, 4) if g > granule] + [granule]
        self.levels = [History(clocks, blocks, warps, stride, g, check) for g in grains]
        self.level = np.zeros(blocks * stride // LINE, np.int8)  # of each line

    def read(
        self,
        lanes: Lanes,
        site: int,
        offsets: np.ndarray,
        width: int,
        mask: np.ndarray | None,
        together: bool = False,
        strong: bool = False,
    ) -> None:
        """Check and note a read. offsets are picked by mask; together: the warp reads as one (ldmatrix)."""
        self._history(offsets, width).read(lanes, site, offsets, width, mask, together, strong)

    def write(
        self,
        lanes: Lanes,
        site: int,
        offsets: np.ndarray,
        width: int,
        mask: np.ndarray | None,
        in_flight: bool = False,
        strong: bool = False,
    ) -> None:
        """Check and note a write by all active lanes; offsets is one axis, one element per active lane."""
        self._history(offsets, width).write(lanes, site, offsets, width, mask, in_flight, strong)

    def require(self, lanes: Lanes, site: int, offsets: np.ndarray, width: int, mask: np.ndarray | None) -> None:
        """Raise Uninitialized unless something has written all of it; offsets as in write."""
        self._history(offsets, width).require(lanes, site, offsets, width, mask)

    def land(self, offsets: np.ndarray, width: int, slots: np.ndarray, tid: np.ndarray) -> None:
        """A copy in flight has been waited for by its thread."""
        self._history(offsets, width).land(offsets, width, slots, tid)

    def _history(self, offsets: np.ndarray, width: int) -> History:
        """The history at the grain that an access needs: of its width, or of the finest line it touches. Its lines
        are refined to it."""
        if len(self.levels) == 1:
            return self.levels[0]
        lines = offsets >> 4
        have = self.level.take(lines)
        need = next(k for k, h in enumerate(self.levels) if h.granule <= width or k == len(self.levels) - 1)
        target = max(need, int(have.max()))
        if have.min() < target:
            for level in range(target):
                coarse = np.unique(lines[have == level])
                if coarse.size:
                    self.levels[target].inherit(coarse, self.levels[level])
            self.level[lines] = target
        return self.levels[target]


class History:
    """Last writer and last readers of every granule of shared memory.

    last_write : interval << 10 | thread, or NEVER; last_read : (granules, warps) interval << 6 | lane; write_site,
        read_site : of these accesses;
    strong : whether the last write was, or nothing as long as none was.
    """

    def __init__(self, clocks: Clocks, blocks: int, warps: int, stride: int, granule: int, check: bool) -> None:
        self.clocks, self.warps, self.check = clocks, warps, check
        self.shift = granule.bit_length() - 1
        self.granule, self.stride = granule, stride
        count = blocks * (stride >> self.shift)
        self.last_write = np.full(count, NEVER, np.int32)
        self.last_read = np.zeros((count if check else 0, warps), np.int32)
        self.write_site, self.read_site = np.zeros_like(self.last_write), np.zeros_like(self.last_read)
        self.strong = np.zeros(0, bool)

    def inherit(self, lines: np.ndarray, other: History) -> None:
        """Take over what a coarser history knows of some lines."""
        first = lines[:, None] * (LINE // other.granule) + np.arange(LINE // other.granule)  # its granules
        parts = other.granule // self.granule
        pieces = first[..., None] * parts + np.arange(parts)
        self.last_write[pieces] = other.last_write[first][..., None]
        self.write_site[pieces] = other.write_site[first][..., None]
        if other.strong.size:
            self._keep_strong()
            self.strong[pieces] = other.strong[first][..., None]
        if self.check:
            known = other.last_read[first]
            limit = self.clocks.limit[:, 0, 0][lines // (self.stride // LINE)]
            if not (
                known < limit[:, None, None] << LANE_BITS
            ).all():  # else all warps have seen these reads: no need to keep them
                self.last_read[pieces] = known[..., None, :]
                self.read_site[pieces] = other.read_site[first][..., None, :]

    def _keep_strong(self) -> None:
        """From now on, know of every granule whether its last write was strong (volatile, relaxed, atomic)."""
        if not self.strong.size:
            self.strong = np.zeros(len(self.last_write), bool)

    def _weak(self, pieces: np.ndarray, written: np.ndarray, strong: bool) -> np.ndarray:
        """Last writes, without those that a strong access may meet unordered."""
        return np.where(self.strong[pieces], 0, written) if strong and self.strong.size else written

    def pieces(self, offsets: np.ndarray, width: int) -> np.ndarray:
        """Granules of accesses at byte offsets: a new last axis when an access covers several."""
        first = offsets >> self.shift
        if width <= self.granule:
            return first
        return first[..., None] + np.arange(width >> self.shift)

    def read(
        self,
        lanes: Lanes,
        site: int,
        offsets: np.ndarray,
        width: int,
        mask: np.ndarray | None,
        together: bool = False,
        strong: bool = False,
    ) -> None:
        """Check and note a read. offsets are picked by mask; together: the warp reads as one (ldmatrix).

        A strong read goes unnoted: a strong write that follows is no race, and a plain one will itself be met by what
        is strong.
        """
        pieces = self.pieces(offsets, width)
        wide = pieces.ndim > np.ndim(offsets)
        written = self.last_write.take(pieces)
        if not self.check:
            if written.max() == NEVER:
                raise self._uninitialized(lanes, site, offsets, written == NEVER, wide, mask)
            return
        self.clocks.accesses += 1
        if written.max() >= self.clocks.lowest << THREAD_BITS and not self._seen(lanes, written, wide, mask):
            if written.max() == NEVER:
                raise self._uninitialized(lanes, site, offsets, written == NEVER, wide, mask)
            unseen = self._weak(pieces, written, strong)
            self._check_writes(lanes, site, pieces, offsets, unseen, mask, "read", together)
        if not strong:
            self._note_read(lanes, site, pieces, wide, mask, together)

    def _seen(self, lanes: Lanes, written: np.ndarray, wide: bool, mask: np.ndarray | None) -> bool:
        """Whether all warps of a block have seen all these writes."""
        limit = lanes.pick(lanes.of_blocks(self.clocks.limit), mask) << THREAD_BITS
        return bool((written < (limit[..., None] if wide else limit)).all())

    def _note_read(
        self, lanes: Lanes, site: int, pieces: np.ndarray, wide: bool, mask: np.ndarray | None, together: bool
    ) -> None:
        together = together or (mask is None and np.shape(pieces)[2] == 1)  # one address for the whole warp
        now = lanes.of_warps(self.clocks.time) << LANE_BITS | (MANY if together else lanes.lane)
        warp, now = lanes.pick(lanes.warp, mask), lanes.pick(now, mask)
        if wide:
            warp, now = warp[..., None], now[..., None]
        places = pieces * self.warps + warp
        notes = self.last_read.reshape(-1)
        self.read_site.reshape(-1)[places] = site
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
        self,
        lanes: Lanes,
        site: int,
        offsets: np.ndarray,
        width: int,
        mask: np.ndarray | None,
        in_flight: bool = False,
        strong: bool = False,
    ) -> None:
        """Check and note a write by all active lanes; offsets is one axis, one element per active lane."""
        pieces = self.pieces(offsets, width)
        wide = pieces.ndim > 1
        if not self.check:
            self.last_write[pieces] = 0
            return
        self.clocks.accesses += 1
        limit = lanes.flat(lanes.of_blocks(self.clocks.limit), mask)
        limit = limit[:, None] if wide else limit
        every = mask if mask is not None else np.ones(lanes.shape, bool)
        written = self.last_write.take(pieces)
        if not (written < limit << THREAD_BITS).all():
            unseen = self._weak(pieces, np.where(written == NEVER, 0, written), strong)
            self._check_writes(lanes, site, pieces, offsets, unseen, every, "write")
        read = self.last_read[pieces]
        if not (read < limit[..., None] << LANE_BITS).all():
            self._check_reads(lanes, site, pieces, offsets, read, every)
        tid = lanes.flat(lanes.tid, mask)
        time = lanes.flat(lanes.of_warps(self.clocks.time), mask)
        mine = ((IN_FLIGHT if in_flight else time) << THREAD_BITS | tid).astype(np.int32)
        mine = mine[:, None] if wide else mine
        self.last_write[pieces], self.write_site[pieces] = mine, site
        if strong:
            self._keep_strong()
        if self.strong.size:
            self.strong[pieces] = strong
        if not strong and not (self.last_write.take(pieces) == mine).all():
            other = self.last_write.take(pieces)
            raise self._race(lanes, site, offsets, other != mine, other, every, "write", "this write by")

    def require(self, lanes: Lanes, site: int, offsets: np.ndarray, width: int, mask: np.ndarray | None) -> None:
        """Raise Uninitialized unless something has written all of it; offsets as in write."""
        pieces = self.pieces(offsets, width)
        never = self.last_write.take(pieces) == NEVER
        if never.any():
            every = mask if mask is not None else np.ones(lanes.shape, bool)
            raise self._uninitialized(lanes, site, offsets, never, pieces.ndim > 1, every)

    def land(self, offsets: np.ndarray, width: int, slots: np.ndarray, tid: np.ndarray) -> None:
        """A copy in flight has been waited for by its thread."""
        if not self.check:
            return
        pieces = self.pieces(offsets, width)
        now = (self.clocks.time[slots, tid >> 5] << THREAD_BITS | tid).astype(np.int32)
        self.last_write[pieces] = now[:, None] if pieces.ndim > 1 else now
        self.clocks.accesses += 1

    # --- the precise checks, where the quick one is not enough

    def _check_writes(
        self,
        lanes: Lanes,
        site: int,
        pieces: np.ndarray,
        offsets: np.ndarray,
        written: np.ndarray,
        mask: np.ndarray | None,
        verb: str,
        together: bool = False,
    ) -> None:
        time, writer = written >> THREAD_BITS, written & THREAD_MASK
        row, warp, tid = (lanes.pick(x, mask) for x in (lanes.rows, lanes.warp, lanes.tid))
        if pieces.ndim > np.ndim(offsets):
            row, warp, tid = row[..., None], warp[..., None], tid[..., None]
        bad = (time > self.clocks.seen[row, warp, writer >> 5]) & (together | (writer != tid) | (time == IN_FLIGHT))
        if bad.any():
            flying = bool(((time == IN_FLIGHT) & bad).reshape(-1)[np.flatnonzero(bad.reshape(-1))[0]])
            what = "a copy still in flight (cp.async) by" if flying else "a write by"
            verb = f"{verb} for the whole warp" if together else verb
            raise self._race(lanes, site, offsets, bad, written, mask, verb, what, self.write_site[pieces])

    def _check_reads(
        self,
        lanes: Lanes,
        site: int,
        pieces: np.ndarray,
        offsets: np.ndarray,
        read: np.ndarray,
        mask: np.ndarray | None,
    ) -> None:
        time, lane = read >> LANE_BITS, read & LANE_MASK
        row, warp, tid = (lanes.pick(x, mask) for x in (lanes.rows, lanes.warp, lanes.tid))
        extra = (..., None, None) if pieces.ndim > 1 else (..., None)
        row, warp, tid = row[extra], warp[extra], tid[extra]
        reader = np.arange(self.warps)
        bad = (time > self.clocks.seen[row, warp, reader]) & ((reader != warp) | (lane != (tid & 31)))
        if bad.any():
            who = np.where(bad, reader * 32 + np.minimum(lane, 31), -1).max(-1)
            where = np.take_along_axis(self.read_site[pieces], (who >> 5)[..., None], -1)[..., 0]
            raise self._race(lanes, site, offsets, bad.any(-1), who, mask, "write", "a read by", where)

    def _race(
        self,
        lanes: Lanes,
        site: int,
        offsets: np.ndarray,
        bad: np.ndarray,
        other: np.ndarray,
        mask: np.ndarray | None,
        verb: str,
        what: str,
        where: np.ndarray | None = None,
    ) -> EmulatorFault:
        """other : the threads that made the earlier accesses, where : their sites."""
        bad, other = np.broadcast_arrays(bad, other)
        wide, first = bad.ndim > np.ndim(offsets), np.flatnonzero(bad.reshape(-1))[0]
        thread = lanes.machine.thread_coordinates(int(other.reshape(-1)[first]) & THREAD_MASK)
        at = ""
        if where is not None:
            at = f",\n    which is at {lanes.machine.site(int(np.broadcast_to(where, bad.shape).reshape(-1)[first]))}"
        flat = np.broadcast_to(offsets, bad.shape[:-1] if wide else bad.shape).reshape(-1)
        return lanes.fault(
            Race,
            site,
            np.any(bad, -1) if wide else bad,
            mask,
            lambda k: (
                f"{verb} of shared address {int(flat[k]) % self.stride:#x} races with {what} thread {thread} "
                f"of the same block{at}"
            ),
        )

    def _uninitialized(
        self, lanes: Lanes, site: int, offsets: np.ndarray, bad: np.ndarray, wide: bool, mask: np.ndarray | None
    ) -> EmulatorFault:
        flat = np.reshape(offsets, -1)
        return lanes.fault(
            Uninitialized,
            site,
            np.any(bad, -1) if wide else bad,
            mask,
            lambda k: f"read of shared address {int(flat[k]) % self.stride:#x}: bytes that nothing has written",
        )
