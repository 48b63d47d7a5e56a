"""A batch of blocks in execution: its registers and memory, and the scheduler that decides which lanes run next.

Every lane has a program counter (the number of a basic block of code). Normally the lowest one in the whole batch
runs next, so lanes that parted meet again as early as they can; now and then the lane that has waited longest runs
instead, with those at its side, so that a loop that waits for another lane cannot starve it. With a random order,
single warps run ahead until they must wait.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cuflash.emulator.barriers import Barriers
from cuflash.emulator.clocks import Clocks
from cuflash.emulator.copies import CopyQueue
from cuflash.emulator.faults import BarrierDivergence, Deadlock, EmulatorFault, Site, Trap
from cuflash.emulator.flow import EXIT
from cuflash.emulator.generic import GenericSpace
from cuflash.emulator.ir import Imm, Reg
from cuflash.emulator.lanes import Lanes
from cuflash.emulator.memory import GlobalMemory, LocalMemory, Parameters
from cuflash.emulator.progress import Watch
from cuflash.emulator.races import SharedHistory
from cuflash.emulator.report import Counters
from cuflash.emulator.shared import SharedMemory
from cuflash.emulator.translate import Code, Translation
from cuflash.emulator.writers import GlobalWriters

ABSENT = EXIT + 1  # program counter of lanes past the end of the block
FAIR_EVERY = 16  # turns


@dataclass(frozen=True, slots=True)
class Launch:
    """What all batches of a launch share."""

    translation: Translation
    symbols: dict[str, np.uint64]
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    parameters: Parameters
    memory: GlobalMemory
    writers: GlobalWriters
    counters: Counters
    static_shared: int
    dynamic_shared: int
    local_size: int
    check_races: bool
    late_copies: bool
    warp_order: int | None


class Machine:
    """Blocks [first, first + count) of a launch."""

    def __init__(self, launch: Launch, first: int, count: int) -> None:
        self.launch, self.first_block, self.blocks = launch, first, count
        self.grid, self.block = launch.grid, launch.block
        threads = self.block[0] * self.block[1] * self.block[2]
        self.warps = -(-threads // 32)
        self.translation = launch.translation
        self.memory, self.writers, self.counters, self.parameters = (
            launch.memory,
            launch.writers,
            launch.counters,
            launch.parameters,
        )
        self.dynamic_shared, self.ticks = launch.dynamic_shared, 0
        index = np.arange(first, first + count, dtype=np.uint32)
        x, y, _ = self.grid
        self.ctaid = (index % x, index // x % y, index // (x * y))
        self.clocks = Clocks(count, self.warps)
        self.shared = SharedMemory(launch.static_shared + launch.dynamic_shared, count)
        self.shared.history = SharedHistory(
            self.clocks, count, self.warps, self.shared.stride, launch.translation.shared_granule, launch.check_races
        )
        self.local = LocalMemory(launch.local_size, count * self.warps * 32)
        self.generic = GenericSpace(self)
        self.copies = CopyQueue(self, launch.late_copies)
        self.barriers = Barriers(self)
        zeros = {kind: np.zeros((), "?" if kind == "p" else kind) for kind in set(self.translation.kinds)}
        self.registers: list = [zeros[kind] for kind in self.translation.kinds]
        self.spaces: dict[tuple[int, ...], tuple[np.ndarray, ...]] = {}  # of matrices.py, by shape
        self.owned = [False] * len(self.registers)
        self.present = np.broadcast_to(np.arange(self.warps * 32).reshape(1, -1, 32) < threads, (count, self.warps, 32))
        self.all_present = threads == self.warps * 32
        self.whole = Lanes(self, mask=None if self.all_present else self.present)
        self.uniform: int | None = 0
        self.pc = np.where(self.present, 0, ABSENT)
        self.turns = 0  # codes that have run
        self.last_turn = np.zeros(self.pc.shape, np.int64)  # of each lane
        self.changes = 0  # that memory has seen, as far as a waiting loop could notice
        self.watch = Watch(self)
        self.random = None if launch.warp_order is None else np.random.default_rng((launch.warp_order, first))
        self.priority = np.zeros((count, self.warps))

    def site(self, number: int) -> Site:
        """Where the instruction stands that translated code calls by this number."""
        return Site(*self.translation.sites[number])

    # --- coordinates

    def grid_coordinates(self, linear: int) -> tuple[int, int, int]:
        x, y, _ = self.grid
        return int(linear % x), int(linear // x % y), int(linear // (x * y))

    def block_coordinates(self, slot: int) -> tuple[int, int, int]:
        return self.grid_coordinates(self.first_block + slot)

    def thread_coordinates(self, tid: int) -> tuple[int, int, int]:
        x, y, _ = self.block
        return tid % x, tid // x % y, tid // (x * y)

    # --- running

    def run(self) -> None:
        """Run every thread to its end."""
        with np.errstate(all="ignore"):
            if self.random is not None:
                self._part()
            while True:
                self.turns += 1
                if self.turns >= self.watch.next:
                    self.watch.look()
                if self.uniform is not None:
                    if self.uniform == EXIT:
                        return
                    code, lanes = self.translation.codes[self.uniform], self.whole
                    if isinstance(code.block.gather, (Imm, Reg)):
                        self._short_of(self.uniform, self.present, code.block.gather)
                    self._advance(code, lanes, self._execute(code, lanes))
                elif not self._step():
                    return

    def _execute(self, code: Code, lanes: Lanes) -> tuple:
        registers = self.registers
        if lanes is self.whole:
            result = code.function(lanes, self.parameters, *[registers[k] for k in code.ins])
            if lanes.mask is None:
                for k in code.exposed:
                    self.owned[k] = False
        else:
            result = code.function(lanes, self.parameters, *[lanes.get(registers[k]) for k in code.ins])
        if lanes.mask is None and lanes is self.whole:
            for k, value in zip(code.outs, result, strict=False):
                registers[k], self.owned[k] = value, False
        else:
            for k, value in zip(code.outs, result, strict=False):
                lanes.put(registers, self.owned, k, value)
        self.counters.executed(code, lanes)
        self.watch.ran.add(code.block.index)
        return result[len(code.outs) :]

    def _advance(self, code: Code, lanes: Lanes, extra: tuple) -> None:
        """Move the lanes on to where the block's end sends them."""
        end = code.block.end
        if end.kind == "jump":
            self._goto(lanes, end.targets[0])
        elif end.kind == "exit":
            self._goto(lanes, EXIT)
        elif end.kind == "branch":
            taken = extra[0]
            if np.ndim(taken) == 0 or taken.size == 1:
                self._goto(lanes, end.targets[0 if np.all(taken) else 1])
            elif taken.all() if lanes.mask is None else (taken | ~lanes.mask).all():
                self._goto(lanes, end.targets[0])
            elif not (taken.any() if lanes.mask is None else (taken & lanes.mask).any()):
                self._goto(lanes, end.targets[1])
            else:
                self._goto(lanes, np.where(taken, end.targets[0], end.targets[1]))
        elif end.kind == "switch":
            targets = np.array(end.targets)
            index = np.asarray(extra[0]).astype(np.int64)
            self._goto(lanes, targets[np.minimum(index, len(targets) - 1)])
        elif end.kind == "barrier":
            self._barrier(code, lanes, extra[0])
        else:
            bad = np.ones(lanes.shape, bool) if lanes.mask is None else lanes.mask
            block, thread = lanes.coordinates(int(np.flatnonzero(bad.reshape(-1))[0]))
            raise Trap("the program executed trap", self._end_site(code), block, thread, int(bad.sum()))

    def _barrier(self, code: Code, lanes: Lanes, operands: tuple) -> None:
        site = self._end_site(code)
        modifiers = code.block.end.instruction.modifiers  # type: ignore[union-attr]
        self._goto(lanes, code.block.end.targets[0])
        number, count = operands[0], operands[1] if len(operands) > 1 else None
        if not self.barriers.arrive(lanes, site, number, count, "arrive" not in modifiers):
            self._part()

    def _end_site(self, code: Code) -> Site:
        return code.block.end.instruction.site  # type: ignore[union-attr]

    def _part(self) -> None:
        """From one program counter for all to one per lane."""
        if self.uniform is not None:
            self.pc = self.places()
            self.last_turn[...] = self.turns
            self.uniform = None

    def places(self) -> np.ndarray:
        """The program counter of every lane."""
        return self.pc if self.uniform is None else np.where(self.present, self.uniform, ABSENT)

    def _goto(self, lanes: Lanes, target: int | np.ndarray) -> None:
        if lanes is self.whole and self.uniform is not None:
            if isinstance(target, (int, np.integer)) or target.size == 1:
                self.uniform = int(np.reshape(target, ())) if not isinstance(target, int) else target
                return
            self._part()
        if lanes.blocks is not None:
            where: Any = lanes.blocks
            shape: tuple[int, ...] = lanes.shape
        elif lanes.warps is not None:
            where, shape = lanes.warps, (lanes.shape[0], 32)
            target = np.broadcast_to(target, lanes.shape)[:, 0, :]
        else:
            where, shape = ..., lanes.shape
        if lanes.mask is None:
            self.pc[where] = target
        else:
            self.pc[where] = np.where(lanes.mask.reshape(shape), target, self.pc[where])

    # --- scheduling

    def _step(self) -> bool:
        """Choose lanes, run them for one block of code; False when nobody is left."""
        first = self.pc[0, 0, 0]
        idle = (self.barriers.waiting >= 0)[:, :, None]
        if self.random is None and not idle.any() and ((self.pc == first) | (self.pc == ABSENT)).all():
            self.uniform = int(first)
            return True
        ready = np.where(idle, EXIT, self.pc)
        blocked = np.zeros((self.blocks, self.warps), bool)
        pool = np.ones(blocked.shape, bool) if self.random is None else self._favourites(ready, blocked)
        while True:
            candidates = np.where(pool[:, :, None], ready, EXIT)
            target = self._choose(candidates)
            if target >= EXIT:
                if self.random is not None and not (blocked | (ready >= EXIT).all(-1)).all():
                    pool = self._favourites(ready, blocked)
                    continue
                if (self.pc >= EXIT).all():
                    return False
                raise self._stuck()
            here = candidates == target
            gather = self.translation.codes[target].block.gather
            if gather is not None:
                short = self._short_of(target, here, gather)
                if short.any():
                    self.last_turn[short[:, :, None] & here] = self.turns
                    ready = np.where(short[:, :, None] & here, EXIT, ready)
                    blocked |= short & (ready >= EXIT).all(-1)
                    here &= ~short[:, :, None]
                    if not here.any():
                        continue
            lanes = self._select(here)
            self.last_turn[here] = self.turns
            code = self.translation.codes[target]
            self._advance(code, lanes, self._execute(code, lanes))
            return True

    def _choose(self, candidates: np.ndarray) -> int:
        if self.turns % FAIR_EVERY:
            return int(candidates.min())
        waited = np.where(candidates < EXIT, self.last_turn, np.iinfo(np.int64).max)
        return int(candidates.reshape(-1)[waited.argmin()])

    def _favourites(self, ready: np.ndarray, blocked: np.ndarray) -> np.ndarray:
        """One warp per block: of those that can run, the one whose turn the dice say it is."""
        able = (ready < EXIT).any(-1) & ~blocked
        if self.random is not None and self.turns % 32 == 1:
            self.priority = self.random.random(able.shape)
        best = np.where(able, self.priority, -1).argmax(1)
        pool = np.zeros_like(able)
        pool[np.arange(len(best)), best] = True
        return pool & able

    def _short_of(self, target: int, here: np.ndarray, gather: str | Imm | Reg) -> np.ndarray:
        """Warps (blocks, warps) that have not gathered the lanes which the code at `target` needs."""
        gone = self.places() == EXIT
        needed = self.present if isinstance(gather, str) else self._members(target, here, gather)
        missing = needed & ~here & ~gone
        if gather == "warp":
            lost = (gone & needed).any(-1) & here.any(-1) & ~missing.any(-1)
            if lost.any():
                raise self._diverged(lost, here, target, "needs the whole warp, but some of its lanes have exited")
        return missing.any(-1) & here.any(-1)

    def _members(self, target: int, here: np.ndarray, gather: Imm | Reg) -> np.ndarray:
        """The lanes that the masks of the lanes `here` name."""
        if isinstance(gather, Imm):
            masks = np.array(gather.value % (1 << 32), np.uint32)
        else:
            masks = self.registers[self.translation.names[gather.name]]
        masks = np.broadcast_to(np.asarray(masks).view(np.uint32), here.shape)
        named = ((masks[..., :, None] >> np.arange(32, dtype=np.uint32)) & 1).astype(bool)
        strangers = here & ~np.diagonal(named, axis1=-2, axis2=-1)
        if strangers.any():
            raise self._diverged(strangers.any(-1), strangers, target, "is executed by lanes that its mask leaves out")
        return (named & here[..., :, None]).any(-2) & self.present

    def _select(self, here: np.ndarray) -> Lanes:
        warps = np.asarray(here.any(-1))
        if warps.all():
            if here.all() or (not self.all_present and (here == self.present).all()):
                return self.whole
            return Lanes(self, mask=here)
        rows = warps.any(1)
        if (warps == np.reshape(rows, (-1, 1))).all():
            slots = np.flatnonzero(rows)
            part = here[slots]
            return Lanes(self, blocks=slots, mask=None if part.all() else part)
        slots, numbers = np.nonzero(warps)
        part = here[slots, numbers][:, None, :]
        return Lanes(self, warps=(slots, numbers), mask=None if part.all() else part)

    # --- when nothing can run

    def _diverged(self, warps: np.ndarray, here: np.ndarray, target: int, why: str) -> EmulatorFault:
        slot, warp = (int(x[0]) for x in np.nonzero(warps))
        trace = self.translation.codes[target].trace
        opcode, site = trace[0] if trace else ("the instruction", None)
        lane = int(np.flatnonzero(here[slot, warp])[0])
        return BarrierDivergence(
            f"{opcode} {why}",
            Site(*site) if site else None,
            self.block_coordinates(slot),
            self.thread_coordinates(32 * warp + lane),
            int(here[warps].sum()),
        )

    def _stuck(self) -> EmulatorFault:
        """Why nothing can run: a warp whose lanes wait at different places, a barrier that exited threads will not
        reach, or a deadlock."""
        live = (self.pc < EXIT) & (self.barriers.waiting < 0)[:, :, None]
        for slot, warp in zip(*np.nonzero(live.any(-1)), strict=True):
            places = np.unique(self.pc[slot, warp][self.pc[slot, warp] < EXIT])
            target = int(places[0])
            here = np.zeros_like(live)
            here[slot, warp] = self.pc[slot, warp] == target
            picked = np.zeros(live.shape[:2], bool)
            picked[slot, warp] = True
            return self._diverged(
                picked, here, target, f"needs the whole warp, but its lanes wait at {len(places)} different places"
            )
        waiting = self.barriers.waiting
        slot, warp = (int(x[0]) for x in np.nonzero(waiting >= 0))
        number = int(waiting[slot, warp])
        site = self.barriers.sites[slot, warp]
        arrived, expected = self.barriers.arrived[slot, number], self.barriers.expected[slot, number]
        where = self.block_coordinates(slot), self.thread_coordinates(32 * warp), 32 * int((waiting >= 0).sum())
        if (self.pc[slot] == EXIT).any():
            message = f"barrier {number} waits for {expected} threads, {arrived} arrived, and others have exited"
            return BarrierDivergence(message, site, *where)
        lines: dict[str, list[int]] = {}
        for other in np.flatnonzero(waiting[slot] >= 0):
            lines.setdefault(str(self.barriers.sites[slot, int(other)]), []).append(int(other))
        text = "".join(f"\n    warps {', '.join(map(str, warps))} wait at {place}" for place, warps in lines.items())
        return Deadlock(
            f"no thread can run: barrier {number} waits for {expected} threads, {arrived} arrived:{text}", site, *where
        )
