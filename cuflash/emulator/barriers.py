"""Named barriers of the blocks of a batch: who has arrived, who waits, who is let go."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cuflash.emulator.arch import NAMED_BARRIERS
from cuflash.emulator.faults import BarrierDivergence, Site

if TYPE_CHECKING:
    from cuflash.emulator.lanes import Lanes
    from cuflash.emulator.machine import Machine


class Barriers:
    """State of sixteen barriers per block.

    arrived : threads that have arrived; expected : threads to wait for (0: nobody came yet); brought : what the
        warps that arrived knew then, in terms of Clocks;
    waiting : barrier that each warp waits at, or -1; sites : where it waits;
    given : threads whose predicate held, threads that gave one, of a reduction; reduced : the same when the barrier
        last let go.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        shape = (machine.blocks, NAMED_BARRIERS)
        self.arrived = np.zeros(shape, np.int64)
        self.expected = np.zeros(shape, np.int64)
        self.brought = np.zeros((*shape, machine.warps), np.int32)
        self.waiting = np.full((machine.blocks, machine.warps), -1, np.int64)
        self.given = np.zeros((*shape, 2), np.int64)
        self.reduced = np.zeros((*shape, 2), np.int64)
        self.sites: dict[tuple[int, int], Site] = {}

    def arrive(self, lanes: Lanes, site: Site, number: np.ndarray, count: np.ndarray | None, wait: bool) -> bool:
        """Warps arrive at a barrier; True when all of them may go on at once."""
        machine = self.machine
        every = machine.warps * 32
        if (
            count is None
            and wait
            and np.ndim(number) == 0
            and lanes.blocks is None
            and lanes.warps is None
            and not self.arrived.any()
        ):
            self._check_number(site, int(number))
            machine.clocks.join()
            self.reduced[:, int(number)] = self.given[:, int(number)]
            self.given[:, int(number)] = 0
            return True
        shape = lanes.shape[:2]
        rows, warps = (np.broadcast_to(x[:, :, 0], shape).reshape(-1) for x in (lanes.rows, lanes.warp))
        numbers = np.broadcast_to(np.asarray(number).astype(np.int64), lanes.shape)[..., 0].reshape(-1)
        expected = (
            every
            if count is None
            else np.broadcast_to(np.asarray(count).astype(np.int64), lanes.shape)[..., 0].reshape(-1)
        )
        self._check_number(site, int(numbers.max()))
        known = self.expected[rows, numbers]
        wrong = (known != 0) & (known != expected) | (np.asarray(expected) % 32 != 0) | (np.asarray(expected) == 0)
        if wrong.any():
            raise self._wrong(
                lanes, site, wrong, f"barrier {numbers[wrong][0]} is used with different or odd thread counts"
            )
        self.expected[rows, numbers] = expected
        np.add.at(self.arrived, (rows, numbers), 32)
        over = self.arrived[rows, numbers] > expected
        if over.any():
            raise self._wrong(lanes, site, over, f"more threads arrive at barrier {numbers[over][0]} than it counts")
        np.maximum.at(self.brought, (rows, numbers), machine.clocks.arrive(rows, warps))
        if wait:
            self.waiting[rows, warps] = numbers
            for row, warp in zip(rows.tolist(), warps.tolist(), strict=True):
                self.sites[row, warp] = site
        complete = self.arrived[rows, numbers] == expected
        for each in np.unique(numbers[complete]):
            self._release(np.unique(rows[complete & (numbers == each)]), int(each))
        return not (self.waiting >= 0).any()

    def give(self, lanes: Lanes, number: np.ndarray, predicate: np.ndarray) -> None:
        """Warps that are about to arrive add their predicates to the barrier's reduction."""
        here = np.ones(lanes.shape, bool) if lanes.mask is None else lanes.mask
        counts = np.stack([(np.broadcast_to(predicate, lanes.shape) & here).sum(-1), here.sum(-1)], -1)
        rows = np.broadcast_to(lanes.rows[:, :, 0], lanes.shape[:2])
        numbers = np.broadcast_to(number, lanes.shape)[..., 0]
        np.add.at(self.given, (rows, numbers), counts)

    def take(self, lanes: Lanes, number: np.ndarray, operation: str) -> np.ndarray:
        """The reduction of the phase that has just ended."""
        numbers = np.broadcast_to(number, lanes.shape)[..., :1]
        held, all_of_them = np.moveaxis(self.reduced[lanes.rows, numbers], -1, 0)
        if operation == "popc":
            return held.astype(np.uint32)
        return held > 0 if operation == "or" else held == all_of_them

    def _release(self, rows: np.ndarray, number: int) -> None:
        freed, warps = np.nonzero(self.waiting[rows] == number)
        freed = rows[freed]
        self.machine.clocks.learn(freed, warps, self.brought[freed, number])
        self.waiting[freed, warps] = -1
        self.reduced[rows, number] = self.given[rows, number]
        self.given[rows, number] = 0
        self.arrived[rows, number] = 0
        self.expected[rows, number] = 0
        self.brought[rows, number] = 0

    @staticmethod
    def _check_number(site: Site, number: int) -> None:
        if not 0 <= number < NAMED_BARRIERS:
            raise BarrierDivergence(f"barrier {number}: must be below {NAMED_BARRIERS}", site)

    def _wrong(self, lanes: Lanes, site: Site, wrong: np.ndarray, message: str) -> BarrierDivergence:
        warp = int(np.flatnonzero(wrong)[0])
        block, thread = lanes.coordinates(32 * warp)
        return BarrierDivergence(message, site, block, thread, 32 * int(wrong.sum()))
