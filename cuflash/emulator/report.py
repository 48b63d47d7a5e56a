"""What a launch did, counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from cuflash.emulator.lanes import Lanes
    from cuflash.emulator.memory import GlobalMemory
    from cuflash.emulator.translate import Code, Translation


@dataclass(frozen=True)
class LaunchReport:
    """Counts of one launch.

    Attributes
    ----------
    global_read, global_written : bytes that instructions asked for (an atomic counts as both; cp.async counts its source size)
    read_by_array, written_by_array : the same by name of the array
    sectors_read, sectors_written : 32-byte sectors, per warp instruction
    shared_wavefronts, bank_conflicts : passes through shared memory, and how many of them were beyond the least possible
    instructions, warp_instructions : thread-level and warp-level numbers of instructions by class
    mma, mma_flops : matrix instructions (of warps) and their floating-point operations
    barriers : arrivals of warps at block barriers
    async_copies : cp.async instructions of threads
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
    mma: int = 0
    mma_flops: int = 0
    barriers: int = 0
    async_copies: int = field(default=0)


class Counters:
    """Running counts of a launch."""

    def __init__(self, memory: GlobalMemory, translation: Translation) -> None:
        self.memory, self.translation = memory, translation
        self.code_threads: dict[int, int] = {}
        self.code_warps: dict[int, int] = {}

    def executed(self, code: Code, lanes: Lanes) -> None:
        key = code.block.index
        self.code_threads[key] = self.code_threads.get(key, 0) + lanes.threads
        self.code_warps[key] = self.code_warps.get(key, 0) + lanes.warp_count

    def global_access(self, lanes: Lanes, offsets: np.ndarray, width: int, mask: np.ndarray | None, write: bool) -> None:
        pass

    def shared_access(self, lanes: Lanes, offsets: np.ndarray, width: int, mask: np.ndarray | None, verb: str) -> None:
        pass

    def matrix_access(self, lanes: Lanes, offsets: np.ndarray, number: int, verb: str) -> None:
        pass

    def report(self, kernel: str, grid: tuple[int, int, int], block: tuple[int, int, int], shared_bytes: int) -> LaunchReport:
        return LaunchReport(kernel, grid, block, shared_bytes, 0, 0, {}, {}, 0, 0, 0, 0, {}, {})
