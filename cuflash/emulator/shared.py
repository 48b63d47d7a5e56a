"""Shared memory of the blocks of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from cuflash.emulator.atomics import apply_atomic
from cuflash.emulator.faults import EmulatorFault
from cuflash.emulator.memory import NOBODY, FlatSpace, gather, scatter
from cuflash.emulator.races import SharedHistory

if TYPE_CHECKING:
    from cuflash.emulator.lanes import Lanes

U2, U4 = np.dtype("u2"), np.dtype("u4")
ROW = np.dtype("c16")  # any type of 16 bytes, to move matrix rows in one piece


class SharedMemory(FlatSpace):
    """Every block's shared memory, with its history of accesses."""

    def __init__(self, size: int, blocks: int) -> None:
        super().__init__("shared", size, blocks)
        self.history: SharedHistory

    def _locate(self, lanes: Lanes, site: int, address: np.ndarray, width: int, mask: np.ndarray | None) -> np.ndarray:
        """Checked offsets within the block, int64."""
        offsets = np.asarray(address).astype(np.int64)
        self.check(lanes, site, offsets, width, mask)
        return offsets

    def load(
        self,
        lanes: Lanes,
        site: int,
        address: np.ndarray,
        guard: np.ndarray | None,
        dtype: np.dtype,
        count: int,
        strong: bool = False,
    ) -> tuple:
        """Read `count` elements per lane; lanes without access get zero."""
        mask = lanes.active(guard)
        if mask is NOBODY:
            return (np.zeros((), dtype),) * count
        width = dtype.itemsize * count
        offsets = self._locate(lanes, site, lanes.pick(address, mask), width, mask)
        lanes.machine.counters.shared_access(lanes, offsets, width, mask)
        offsets = offsets + lanes.pick(lanes.rows, mask) * self.stride
        self.history.read(lanes, site, offsets, width, mask, strong=strong)
        values = gather(self.data, offsets, dtype, count)
        return values if mask is None else tuple(lanes.spread(v, mask) for v in values)

    def store(
        self,
        lanes: Lanes,
        site: int,
        address: np.ndarray,
        guard: np.ndarray | None,
        dtype: np.dtype,
        values: tuple,
        strong: bool = False,
    ) -> None:
        """Write elements per lane."""
        mask = lanes.active(guard)
        if mask is NOBODY:
            return
        width = dtype.itemsize * len(values)
        picked = self._locate(lanes, site, lanes.pick(address, mask), width, mask)
        lanes.machine.counters.shared_access(lanes, picked, width, mask)
        offsets = self.everyone(lanes, picked, mask)
        self.history.write(lanes, site, offsets, width, mask, strong=strong)
        lanes.machine.changes += 1
        scatter(self.data, offsets, dtype, tuple(lanes.flat(v, mask) for v in values))

    def everyone(self, lanes: Lanes, picked: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        """Offsets into the batch's array, one per active lane."""
        if mask is not None:
            return picked + lanes.pick(lanes.rows, mask) * self.stride
        return lanes.wide(picked + lanes.rows * self.stride).reshape(-1)

    def atomic(
        self,
        lanes: Lanes,
        site: int,
        address: np.ndarray,
        guard: np.ndarray | None,
        dtype: np.dtype,
        operation: str,
        values: tuple,
        t: str,
    ) -> np.ndarray:
        """Read-modify-write one element per lane, lane after lane; returns the old values."""
        mask = lanes.active(guard)
        if mask is NOBODY:
            return np.zeros((), dtype)
        picked = self._locate(lanes, site, lanes.pick(address, mask), dtype.itemsize, mask)
        lanes.machine.counters.shared_access(lanes, picked, dtype.itemsize, mask)
        offsets = self.everyone(lanes, picked, mask)
        if operation != "exch":
            self.history.require(lanes, site, offsets, dtype.itemsize, mask)
        self.history.write(lanes, site, offsets, dtype.itemsize, mask, strong=True)
        index = offsets >> (dtype.itemsize.bit_length() - 1)
        flat = tuple(lanes.flat(v, mask) for v in values)
        old, changed = apply_atomic(self.data.view(dtype), index, operation, flat, t)
        lanes.machine.changes += changed
        return old.reshape(lanes.shape) if mask is None else lanes.spread(old, mask)

    def load_matrix(self, lanes: Lanes, site: int, address: np.ndarray, number: int, transposed: bool) -> tuple:
        """ldmatrix: lanes 8 j to 8 j + 7 give the rows of matrix j; registers hold two elements of a row, or of a
        column."""
        offsets = self._matrix_rows(lanes, site, address, number)
        offsets = offsets + lanes.rows * self.stride
        self.history.read(RowLanes(lanes, 8 * number), site, offsets, 16, None, together=True)  # type: ignore[arg-type]
        rows = self.data.view(ROW)
        shape = (*offsets.shape[:-1], 32)
        index = offsets >> 4
        matrices = [rows.take(index[..., 8 * k : 8 * k + 8]) for k in range(number)]
        if transposed:
            matrices = [np.ascontiguousarray(m.view(U2).reshape(-1, 8, 8).swapaxes(1, 2)) for m in matrices]
        return tuple(m.view(U4).reshape(shape) for m in matrices)

    def store_matrix(
        self, lanes: Lanes, site: int, address: np.ndarray, number: int, transposed: bool, values: tuple
    ) -> None:
        """stmatrix, the opposite of ldmatrix."""
        offsets = self._matrix_rows(lanes, site, address, number)
        offsets = np.broadcast_to(offsets + lanes.rows * self.stride, (*lanes.shape[:2], 8 * number))
        mask = np.broadcast_to(np.arange(32) < 8 * number, lanes.shape)
        self.history.write(lanes, site, offsets.reshape(-1), 16, None if number == 4 else mask)
        lanes.machine.changes += 1
        rows = np.stack([np.broadcast_to(v, lanes.shape) for v in values], axis=-2)
        if transposed:
            matrices = rows.view(U2).reshape(*lanes.shape[:2], number, 8, 8).swapaxes(-1, -2)
            rows = np.ascontiguousarray(matrices).view(U4)
        self.data.view(U4).reshape(-1, 4)[offsets >> 4] = rows.reshape(*lanes.shape[:2], 8 * number, 4)

    def _matrix_rows(self, lanes: Lanes, site: int, address: np.ndarray, number: int) -> np.ndarray:
        if address.ndim == 0 or address.shape[-1] == 1:
            address = np.broadcast_to(address, np.broadcast_shapes(address.shape, (1, 1, 32)))
        offsets = address[..., : 8 * number].astype(np.int64)
        self.check(RowLanes(lanes, 8 * number), site, offsets, 16, None)  # type: ignore[arg-type]
        lanes.machine.counters.matrix_access(lanes, offsets, number)
        return offsets


class RowLanes:
    """A selection seen as the first `count` lanes of each warp: those whose addresses a matrix instruction uses."""

    def __init__(self, lanes: Lanes, count: int) -> None:
        self.lanes, self.count, self.machine = lanes, count, lanes.machine
        self.rows, self.warp = lanes.rows, lanes.warp
        self.tid, self.lane = lanes.tid[..., :count], lanes.lane[..., :count]
        self.of_blocks, self.of_warps = lanes.of_blocks, lanes.of_warps

    def pick(self, value: np.ndarray, mask: None) -> np.ndarray:
        return value

    def fault(
        self, kind: type[EmulatorFault], site: int, bad: np.ndarray, mask: None, message: Callable[[int], str]
    ) -> EmulatorFault:
        whole = np.zeros(self.lanes.shape, bool)
        whole[..., : self.count] = bad
        return self.lanes.fault(kind, site, whole, None, lambda k: message(int(np.flatnonzero(np.reshape(bad, -1))[0])))
