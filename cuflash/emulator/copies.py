"""Asynchronous copies from global to shared memory: a queue of what has been issued and not yet waited for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cuflash.emulator.memory import GLOBAL_BASE, NOBODY, OWNED, WRITTEN, check_alignment

if TYPE_CHECKING:
    from cuflash.emulator.lanes import Lanes
    from cuflash.emulator.machine import Machine


@dataclass(slots=True)
class Pending:
    """Copies of one instruction. thread: linear over the batch; group: number of commits before them (scalar or per
    copy)."""

    thread: np.ndarray
    offsets: np.ndarray
    data: np.ndarray
    size: int
    group: np.ndarray

    def part(self, chosen: np.ndarray, group: np.ndarray) -> Pending:
        """Some of the copies; group: one number per copy."""
        return Pending(self.thread[chosen], self.offsets[chosen], self.data[chosen], self.size, group[chosen])


class CopyQueue:
    """cp.async of a batch. Data is read when a copy is issued and appears in shared memory at the wait that covers it
    ("late") or at once ("early"). Either way nobody may touch the destination in between.
    """

    def __init__(self, machine: Machine, late: bool) -> None:
        self.machine, self.late = machine, late
        self.pending: list[Pending] = []
        self.commits: list = [np.array(0)]
        self._owned = [False]

    def commit(self, lanes: Lanes, guard: np.ndarray | None) -> None:
        """cp.async.commit_group"""
        step = 1 if guard is None else np.where(guard, 1, 0)
        lanes.put(self.commits, self._owned, 0, np.asarray(lanes.get(self.commits[0]) + step))

    def issue(
        self,
        lanes: Lanes,
        site: int,
        shared: np.ndarray,
        source: np.ndarray,
        size: int,
        length: np.ndarray | int,
        guard: np.ndarray | None,
    ) -> None:
        """cp.async: `length` bytes are read, the rest of `size` is zero."""
        mask = lanes.active(guard)
        if mask is NOBODY:
            return
        machine = self.machine
        picked = lanes.pick(np.asarray(shared).astype(np.int64), mask)
        machine.shared.check(lanes, site, picked, size, mask)
        machine.counters.shared_access(lanes, picked, size, mask)
        machine.counters.copies += np.size(picked) * lanes.weight(picked, mask)
        offsets = machine.shared.everyone(lanes, picked, mask)
        machine.shared.history.write(lanes, site, offsets, size, mask, in_flight=True)
        data = self._read(lanes, site, source, size, length, mask)
        group = lanes.get(self.commits[0])
        if group.size > 1:
            group = lanes.flat(group, mask)
        thread = lanes.flat(lanes.rows * (machine.warps * 32) + lanes.tid, mask)
        record = Pending(thread, offsets, data, size, np.array(group).reshape(-1))  # commits go on counting in place
        if not self.late:
            self._write(record)
        self.pending.append(record)

    def _read(
        self, lanes: Lanes, site: int, source: np.ndarray, size: int, length: np.ndarray | int, mask: np.ndarray | None
    ) -> np.ndarray:
        """The bytes to copy, (n, words)."""
        memory, counters = self.machine.memory, self.machine.counters
        every = mask if mask is not None else np.ones(lanes.shape, bool)
        address = lanes.flat(source, mask)
        lengths = np.minimum(lanes.flat(np.asarray(length), mask), size)
        word = min(size, 8)
        data = np.zeros((len(address), size // word), f"u{word}")
        offsets, reads = address.view(np.int64) - GLOBAL_BASE, lengths > 0
        for count in np.unique(lengths):
            if count == 0:
                continue
            chosen = lengths == count
            part = every.copy()
            part[every] = chosen
            if chosen.all():
                part, chosen = every, slice(None)
            width = size if count == size else 1
            check_alignment(lanes, site, offsets[chosen], size, part, memory.describe)
            starts = memory.locate(lanes, site, address[chosen], width, part, OWNED | WRITTEN, "read", flat=True)
            if width == size:
                view = memory.data.view(f"u{word}").reshape(-1)
                index = starts >> (word.bit_length() - 1)
                for k in range(size // word):
                    data[chosen, k] = view.take(index + k)
                continue
            target = np.zeros((len(starts), size), np.uint8)
            for k in range(int(count)):
                memory.locate(lanes, site, address[chosen] + np.uint64(k), 1, part, OWNED | WRITTEN, "read", flat=True)
                target[:, k] = memory.data[starts + k]
            data[chosen] = target.view(f"u{word}")
        if reads.any():
            readers = every.copy()
            readers[every] = reads
            counters.global_access(lanes, offsets[reads], lengths[reads], readers, False)
        return data

    def wait(self, lanes: Lanes, newest: int | None, guard: np.ndarray | None) -> None:
        """cp.async.wait_group: all but the `newest` last groups of each thread are complete; None: everything it
        issued."""
        mask = lanes.active(guard)
        if mask is NOBODY or not self.pending:
            return
        commits = lanes.get(self.commits[0])
        limit = np.asarray(commits - newest) if newest is not None else np.asarray(1 << 40)
        everyone = mask is None and lanes.blocks is None and lanes.warps is None
        if not everyone or limit.size > 1:
            bound = np.full(self.machine.blocks * self.machine.warps * 32, -1, np.int64)
            thread = lanes.flat(lanes.rows * (self.machine.warps * 32) + lanes.tid, mask)
            bound[thread] = lanes.flat(limit, mask)
        waiting = []
        for record in self.pending:
            done = record.group < (limit.reshape(-1) if everyone and limit.size == 1 else bound[record.thread])
            if done.all():
                self._complete(record)
            elif not done.any():
                waiting.append(record)
            else:
                group = np.broadcast_to(record.group, record.thread.shape)
                self._complete(record.part(done, group))
                waiting.append(record.part(~done, group))
        self.pending = waiting

    def _complete(self, record: Pending) -> None:
        if self.late:
            self._write(record)
        machine = self.machine
        slots, tid = np.divmod(record.thread, machine.warps * 32)
        machine.shared.history.land(record.offsets, record.size, slots, tid)

    def _write(self, record: Pending) -> None:
        self.machine.changes += 1
        word = record.data.dtype.itemsize
        view = self.machine.shared.data.view(record.data.dtype)
        index = record.offsets >> (word.bit_length() - 1)
        for k in range(record.size // word):
            view[index + k] = record.data[:, k]
