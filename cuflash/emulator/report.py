"""What a launch did, counted exactly."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from cuflash.emulator.lanes import Lanes
    from cuflash.emulator.memory import GlobalMemory
    from cuflash.emulator.translate import Code, Translation

SECTOR_SHIFT = 5
MMA = re.compile(r"mma_m(\d+)n(\d+)k(\d+)_")


@dataclass(frozen=True)
class LaunchReport:
    """Counts of one launch.

    Attributes
    ----------
    global_read, global_written : bytes that instructions asked for (an atomic counts as both; cp.async counts its
        source size)
    read_by_array, written_by_array : the same by name of the array
    sectors_read, sectors_written : 32-byte sectors, per warp instruction
    shared_wavefronts, bank_conflicts : passes through shared memory, and how many of them were beyond the least
        possible
    instructions, warp_instructions : numbers of instructions by class, per thread that reached them (whether or not a
        guard held) and per warp
    mma, mma_flops : matrix instructions (of warps) and their floating-point operations
    barriers : arrivals of warps at block barriers
    async_copies : cp.async instructions of threads (whose guard held)
    """

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    global_read: int
    global_written: int
    read_by_array: Mapping[str, int]
    written_by_array: Mapping[str, int]
    sectors_read: int
    sectors_written: int
    shared_wavefronts: int
    bank_conflicts: int
    instructions: Mapping[str, int]
    warp_instructions: Mapping[str, int]
    mma: int
    mma_flops: int
    barriers: int
    async_copies: int


class Counters:
    """Running counts of a launch."""

    def __init__(self, memory: GlobalMemory, translation: Translation) -> None:
        self.memory, self.translation = memory, translation
        self.code_threads: Counter[int] = Counter()
        self.code_warps: Counter[int] = Counter()
        self.bytes: tuple[Counter[int], Counter[int]] = (
            Counter(),
            Counter(),
        )  # read, written, by start of the allocation
        self.sectors = [0, 0]
        self.wavefronts = self.conflicts = self.copies = 0

    def executed(self, code: Code, lanes: Lanes) -> None:
        """A block of code ran."""
        self.code_threads[code.block.index] += lanes.threads
        self.code_warps[code.block.index] += lanes.warp_count

    def global_access(
        self, lanes: Lanes, offsets: np.ndarray, width: int | np.ndarray, mask: np.ndarray | None, write: bool
    ) -> None:
        """Lanes read or write `width` bytes each (or one number per lane) at offsets picked by mask; without one an
        offset may stand for many lanes."""
        weight = lanes.weight(offsets, mask)
        starts = self.memory.starts
        first, last = (bisect_right(starts, int(x)) - 1 for x in (offsets.min(), offsets.max()))
        if first == last:
            total = width * offsets.size if isinstance(width, int) else int(width.sum())
            self.bytes[write][starts[first]] += total * weight
        else:
            which = np.searchsorted(starts, np.reshape(offsets, -1), "right") - 1
            widths = np.broadcast_to(width, offsets.shape).reshape(-1)
            for number, total in enumerate(np.bincount(which, widths)):
                if total:
                    self.bytes[write][starts[number]] += int(total) * weight
        self.sectors[write] += self._sectors(lanes, offsets >> SECTOR_SHIFT, mask)

    def _sectors(self, lanes: Lanes, sector: np.ndarray, mask: np.ndarray | None) -> int:
        """Distinct sectors per warp, summed over warps."""
        if mask is None and sector.size == lanes.size:
            sector = sector.reshape(-1, 32)
        elif mask is not None:
            whole = np.full(lanes.shape, -1)
            whole[mask] = sector
            sector = whole.reshape(-1, 32)
        elif np.ndim(sector) == 0 or sector.shape[-1] == 1:
            return lanes.warp_count
        steps = sector[..., 1:] - sector[..., :-1]
        if steps.min() < 0:
            sector = np.sort(sector, axis=-1)
            steps = sector[..., 1:] - sector[..., :-1]
        rows = sector.size // 32
        distinct = int(np.count_nonzero(steps)) + rows
        if mask is not None:
            distinct -= int(np.count_nonzero(sector.min(-1) < 0))
        return distinct * (lanes.warp_count // rows)

    def shared_access(self, lanes: Lanes, offsets: np.ndarray, width: int, mask: np.ndarray | None) -> None:
        """Lanes touch `width` bytes each of shared memory: 32, 16 or 8 lanes at a time share the 32 banks."""
        unit = max(width, 4)
        banks = 128 // unit
        units = offsets >> (unit.bit_length() - 1)
        if mask is not None:
            whole = np.full(lanes.shape, -1)
            whole[mask] = units
            units = whole
        elif np.ndim(units) == 0 or units.shape[-1] == 1:
            self.wavefronts += lanes.warp_count * 32 // banks
            return
        self._count_wavefronts(units.reshape(-1, banks), lanes.size // units.size, mask is not None)

    def matrix_access(self, lanes: Lanes, offsets: np.ndarray, number: int) -> None:
        """ldmatrix or stmatrix: every matrix is eight rows of 16 bytes."""
        self._count_wavefronts(offsets.reshape(-1, 8) >> 4, lanes.warp_count * number * 8 // offsets.size, False)

    def _count_wavefronts(self, units: np.ndarray, weight: int, gaps: bool) -> None:
        """units : (phases, banks), the bank-wide piece of memory that each lane touches, or -1."""
        banks = units.shape[1]
        seen = np.bitwise_or.reduce(np.left_shift(1, units & (banks - 1)), axis=1)
        slow = (seen != (1 << banks) - 1) | (units.min(1) < 0) if gaps else seen != (1 << banks) - 1
        passes = len(units) - np.count_nonzero(slow)
        ideal = passes
        if passes < len(units):
            units = np.sort(units[slow], axis=1)
            distinct = np.ones(units.shape, bool)
            distinct[:, 1:] = units[:, 1:] != units[:, :-1]
            distinct &= units >= 0
            place = np.arange(len(units))[:, None] * banks + (units & (banks - 1))
            load = np.bincount(place[distinct], minlength=len(units) * banks).reshape(-1, banks).max(1)
            passes += int(load.sum())
            ideal += int(np.count_nonzero(load))
        self.wavefronts += int(passes) * weight
        self.conflicts += int(passes - ideal) * weight

    def report(
        self, kernel: str, grid: tuple[int, int, int], block: tuple[int, int, int], shared_bytes: int
    ) -> LaunchReport:
        """The counts as they stand."""
        threads: Counter[str] = Counter()
        warps: Counter[str] = Counter()
        for index, count in self.code_threads.items():
            for name, number in self.translation.codes[index].counts.items():
                threads[name] += number * count
                warps[name] += number * self.code_warps[index]
        mma = {name: count for name, count in warps.items() if MMA.match(name)}
        flops = sum(
            2 * int(m[1]) * int(m[2]) * int(m[3]) * count for name, count in mma.items() if (m := MMA.match(name))
        )
        return LaunchReport(
            kernel=kernel,
            grid=grid,
            block=block,
            shared_bytes=shared_bytes,
            global_read=sum(self.bytes[0].values()),
            global_written=sum(self.bytes[1].values()),
            read_by_array=self._by_name(self.bytes[0]),
            written_by_array=self._by_name(self.bytes[1]),
            sectors_read=self.sectors[0],
            sectors_written=self.sectors[1],
            shared_wavefronts=self.wavefronts,
            bank_conflicts=self.conflicts,
            instructions=MappingProxyType(dict(threads)),
            warp_instructions=MappingProxyType(dict(warps)),
            mma=sum(mma.values()),
            mma_flops=flops,
            barriers=warps["barrier"],
            async_copies=self.copies,
        )

    def _by_name(self, counts: Counter[int]) -> Mapping[str, int]:
        names: Counter[str] = Counter()
        for start, count in counts.items():
            names[self.memory.allocations[start].name] += count
        return MappingProxyType(dict(names))
