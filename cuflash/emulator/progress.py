"""Whether a batch will ever end.

A batch hangs for certain when its whole state comes back (program counters, registers, barriers) though in between
nothing in memory changed and every lane that could run has run: then the same happens again, in whatever order. That
finds every loop that only waits. A loop that also counts or writes never repeats a state; a bound ends it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cuflash.emulator.faults import Deadlock, Site
from cuflash.emulator.flow import EXIT

if TYPE_CHECKING:
    from cuflash.emulator.machine import Machine

PATIENCE = 1024  # turns before the first look, and after every change of memory
LIMIT = 1 << 20  # turns of one batch; the largest launches that are emulated take some ten thousand
WAITING = ("ld", "atom", "red")  # instructions that a loop which waits asks memory with


class Watch:
    """Compares the state of a batch with one from earlier (Brent: kept for twice as long each time).

    next : the turn at which `look` wants to be called
    ran : codes that ran since the kept state
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.next = self.since = PATIENCE
        self.lifetime = 1
        self.changes = -1
        self.ran: set[int] = set()
        self.kept: tuple[bytes, list[bytes]] = b"", []
        self.differs = 0  # a register that was seen to differ, to be compared first

    def look(self) -> None:
        """Raise Deadlock if the batch is known to hang."""
        machine = self.machine
        if machine.turns >= LIMIT:
            raise self._endless(f"the block has not ended after {LIMIT} turns")
        if machine.changes != self.changes:
            self._keep()
            self.changes, self.next, self.lifetime = machine.changes, machine.turns + PATIENCE, 1
            return
        self.next = machine.turns + 1
        if self._everyone_ran() and self._places() == self.kept[0] and self._same_values():
            raise self._endless("nothing that they wait for will change")
        if machine.turns - self.since >= self.lifetime:
            self._keep()
            self.lifetime *= 2

    def _keep(self) -> None:
        self.kept = self._places(), [_bits(register) for register in self.machine.registers]
        self.since = self.machine.turns
        self.ran.clear()

    def _places(self) -> bytes:
        machine = self.machine
        return machine.places().tobytes() + machine.barriers.waiting.tobytes() + machine.barriers.arrived.tobytes()

    def _same_values(self) -> bool:
        registers, kept = self.machine.registers, self.kept[1]
        numbers = range(len(registers))
        for k in (*numbers[self.differs :], *numbers[: self.differs]):
            if _bits(registers[k]) != kept[k]:
                self.differs = k
                return False
        return True

    def _everyone_ran(self) -> bool:
        machine = self.machine
        if machine.uniform is not None:
            return bool(self.ran)  # none has if lanes only came together
        live = (machine.pc < EXIT) & (machine.barriers.waiting < 0)[:, :, None]
        return bool((machine.last_turn[live] > self.since).all())

    def _endless(self, why: str) -> Deadlock:
        """The fault names the lines that repeat, first of all one that asks memory."""
        machine = self.machine
        codes = [machine.translation.codes[k] for k in sorted(self.ran)]
        items = [(opcode, Site(*site)) for code in codes for opcode, site in code.trace]
        sites = [site for opcode, site in items if opcode in WAITING] or [site for _, site in items]
        live = np.asarray(machine.places() < EXIT)
        slot, warp, lane = (int(x[0]) for x in np.nonzero(live))
        lines = list(dict.fromkeys(_line(site) for _, site in items))
        shown = ", ".join(lines[:8]) + (", ..." if len(lines) > 8 else "")
        return Deadlock(
            f"threads repeat the same instructions for ever ({why}); in turn: {shown}",
            sites[0] if sites else None,
            machine.block_coordinates(slot),
            machine.thread_coordinates(32 * warp + lane),
            int(live.sum()),
        )


def _bits(register: np.ndarray) -> bytes:
    return np.asarray(register).tobytes()


def _line(site: Site) -> str:
    return site.source or f"PTX line {site.ptx_line}"
