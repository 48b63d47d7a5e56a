"""The lanes that execute a block of code together, and how they reach the registers of the whole batch.

Registers of a batch are arrays whose shapes broadcast to (blocks, warps, 32). A selection is the whole batch, some of
its blocks, or some of its warps; lanes of selected warps may be masked. Inside a selection arrays have shapes that
broadcast to Lanes.shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from cuflash.emulator.faults import EmulatorFault
from cuflash.emulator.memory import NOBODY
from cuflash.emulator.warp import WarpOperations

if TYPE_CHECKING:
    from cuflash.emulator.machine import Machine

LANE = np.arange(32)[None, None, :]


class Lanes(WarpOperations):
    """A selection of lanes.

    blocks : None, or slots (n,) of the selected blocks when whole blocks are selected
    warps : None, or (slots, warp numbers), each (n,), when single warps are selected
    mask : None, or the active lanes, bool, of shape `shape`
    """

    def __init__(
        self,
        machine: Machine,
        blocks: np.ndarray | None = None,
        warps: tuple[np.ndarray, np.ndarray] | None = None,
        mask: np.ndarray | None = None,
    ) -> None:
        self.machine, self.blocks, self.warps, self.mask = machine, blocks, warps, mask
        if warps is not None:
            self.rows, self.warp = warps[0][:, None, None], warps[1][:, None, None]
            self.shape = (len(warps[0]), 1, 32)
        else:
            self.rows = (np.arange(machine.blocks) if blocks is None else blocks)[:, None, None]
            self.warp = np.arange(machine.warps)[None, :, None]
            self.shape = (self.rows.shape[0], machine.warps, 32)
        self.size = self.shape[0] * self.shape[1] * 32
        self.lane = LANE
        self.copies = machine.copies
        self.threads = self.size if mask is None else int(np.count_nonzero(mask))
        self.warp_count = self.size // 32
        self._tid: np.ndarray | None = None

    @property
    def tid(self) -> np.ndarray:
        """Linear thread numbers within the block."""
        if self._tid is None:
            self._tid = self.warp * 32 + LANE
        return self._tid

    # --- registers

    def get(self, value: np.ndarray) -> np.ndarray:
        """The selected part of a register."""
        if np.ndim(value) == 0 or (self.blocks is None and self.warps is None):
            return value
        if self.blocks is not None:
            return value if value.shape[0] == 1 else value[self.blocks]
        blocks, warps, _ = value.shape
        if blocks == 1 and warps == 1:
            return value
        slots, numbers = self.warps  # type: ignore[misc]
        return value[slots if blocks > 1 else 0, numbers if warps > 1 else 0].reshape(len(slots), 1, -1)

    def put(self, store: list, owned: list[bool], index: int, value: np.ndarray) -> None:
        """Assign to the selected part of register `index`."""
        whole = self.blocks is None and self.warps is None
        if whole and self.mask is None:
            store[index], owned[index] = value, False
            return
        machine, old = self.machine, store[index]
        full = (machine.blocks, machine.warps, 32)
        split = (True,) * 3 if self.mask is not None else (True, self.warps is not None, False)
        have = old.shape or (1, 1, 1)
        new = np.shape(value) or (1, 1, 1)
        if self.warps is not None:
            new = (new[0], 1, new[2])
        shape = tuple(f if s else max(h, n) for f, s, h, n in zip(full, split, have, new, strict=True))
        if not owned[index] or have != shape:
            old = np.broadcast_to(old, shape).copy()
            store[index], owned[index] = old, True
        where = ... if whole else self.blocks if self.warps is None else self.warps
        if self.mask is None:
            old[where] = value if self.warps is None or np.ndim(value) == 0 else value[:, 0, :]
        elif whole:
            np.copyto(old, value, where=self.mask)
        else:
            part = old[where]
            flat = self.warps is not None
            source = value[:, 0, :] if flat and np.ndim(value) else value
            np.copyto(part, source, where=self.mask[:, 0, :] if flat else self.mask)
            old[where] = part

    def of_blocks(self, values: np.ndarray) -> np.ndarray:
        """Of values (blocks, 1, 1) those of the selection, (n, 1, 1)."""
        return values if self.blocks is None and self.warps is None else values[self.rows[:, 0, 0]]

    def of_warps(self, values: np.ndarray) -> np.ndarray:
        """Of values (blocks, warps) those of the selection, (n, warps or 1, 1)."""
        if self.warps is not None:
            return values[self.warps][:, None, None]
        return (values if self.blocks is None else values[self.blocks])[:, :, None]

    # --- masks and faults

    def active(self, guard: np.ndarray | None) -> np.ndarray | None:
        """Lanes that an access touches: None for all of them, NOBODY for none, else a mask of shape `shape`."""
        if guard is None:
            return self.mask
        if np.ndim(guard) == 0 or guard.size == 1:
            return self.mask if np.all(guard) else NOBODY
        mask = self.wide(guard)
        if self.mask is not None:
            mask = mask & self.mask
        if mask.all():
            return None
        return mask if mask.any() else NOBODY

    def pick(self, value: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        """Values of the masked lanes as one axis; without a mask, the value as it is."""
        return value if mask is None else self.wide(value)[mask]

    def wide(self, value: np.ndarray) -> np.ndarray:
        """A value for every lane, of shape `shape`."""
        if value.shape == self.shape:
            return value
        result = np.empty(self.shape, value.dtype)  # np.broadcast_to takes many times as long
        result[...] = value
        return result

    def flat(self, value: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        """Values of all active lanes as one axis."""
        value = self.wide(value)
        return value.reshape(-1) if mask is None else value[mask]

    def spread(self, values: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """The opposite of pick: zero in the other lanes."""
        result = np.zeros(self.shape, values.dtype)
        result[mask] = values
        return result

    def weight(self, value: np.ndarray, mask: np.ndarray | None) -> int:
        """Number of threads that each element of a picked value stands for."""
        return 1 if mask is not None else self.size // max(1, np.size(value))

    def fault(
        self,
        kind: type[EmulatorFault],
        site: int,
        bad: np.ndarray,
        mask: np.ndarray | None,
        message: Callable[[int], str],
    ) -> EmulatorFault:
        """A fault of the lanes where `bad` holds (picked by `mask`). message gets the position of the first in the
        picked array."""
        if mask is None:
            spread = np.broadcast_to(bad, self.shape)
        else:
            spread = self.spread(np.asarray(bad), mask)
        first = int(np.flatnonzero(spread.reshape(-1))[0])
        position = int(np.flatnonzero(np.reshape(bad, -1))[0])
        block, thread = self.coordinates(first)
        return kind(message(position), self.machine.site(site), block, thread, int(np.count_nonzero(spread)))

    def coordinates(self, position: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Block and thread coordinates of a position in the flattened selection."""
        row = int(np.broadcast_to(self.rows, self.shape).reshape(-1)[position])
        tid = int(np.broadcast_to(self.tid, self.shape).reshape(-1)[position])
        return self.machine.block_coordinates(row), self.machine.thread_coordinates(tid)

    # --- special registers

    def special(self, name: str, axis: int) -> np.ndarray:
        """Value of a special register."""
        machine = self.machine
        if name == "tid":
            x, y, _ = machine.block
            tid = (self.tid % x, self.tid // x % y, self.tid // (x * y))[axis]
            return tid.astype(np.uint32)
        if name == "ctaid":
            return machine.ctaid[axis][self.rows]
        if name in ("ntid", "nctaid"):
            return np.array((machine.block if name == "ntid" else machine.grid)[axis], np.uint32)
        if name == "laneid":
            return LANE.astype(np.uint32)
        if name == "warpid":
            return self.warp.astype(np.uint32)
        if name.startswith("lanemask_"):
            bit = np.uint64(1) << LANE.astype(np.uint64)
            below = bit - np.uint64(1)
            masks = {"eq": bit, "lt": below, "le": below | bit, "gt": ~(below | bit), "ge": ~below}
            return masks[name[9:]].astype(np.uint32)
        sizes = {"nwarpid": machine.warps, "nsmid": 1, "dynamic_smem_size": machine.dynamic_shared}
        sizes["total_smem_size"] = sizes["aggr_smem_size"] = machine.shared.size
        if name in ("clock", "clock_hi", "clock64", "globaltimer"):
            machine.ticks += 1
            machine.changes += 1
            return np.array(
                machine.ticks >> (32 if name == "clock_hi" else 0),
                np.uint64 if "64" in name or "timer" in name else np.uint32,
            )
        return np.array(sizes.get(name, 0), np.uint32)

    # --- order

    def order_warps(self) -> None:
        """A warp-wide synchronisation: what lanes of a warp did before is ordered before what they do next."""
        self.machine.clocks.order_lanes(self)

    def release(self, device: bool) -> None:
        """A release or fence, of the block or of the whole device."""
        self.machine.clocks.release(self)
        if device:
            self.machine.writers.release(self)

    def acquire(self, device: bool) -> None:
        """An acquire or fence, of the block or of the whole device."""
        self.machine.clocks.acquire(self)
        if device:
            self.machine.writers.acquire(self)

    def publish(self) -> None:
        """A strong write follows."""
        self.machine.clocks.publish(self)

    def hear(self) -> None:
        """A strong read came before."""
        self.machine.clocks.hear(self)
