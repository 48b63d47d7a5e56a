"""A GPU in software: executes the PTX that the CUDA compiler emits, checks every access, counts every byte.

>>> device = Device("sm_80")
>>> x = device.to_device(array, name="x")
>>> report = device.load(ptx).kernel("scale").launch(grid, block, [x, np.float32(2)])
>>> x.to_host()

To read it, follow a kernel: `device` (what a user sees), `parse` and `ir` (PTX text to instructions), `flow` (basic
blocks), `translate` with `instructions` (each block as a Python function over whole arrays of lanes), `machine` (who
runs next) with `lanes`, `barriers` and `progress`, `memory` and `shared` (every access checked) with `copies`, `clocks`
(what is ordered before what), `races` and `writers`, and `report`. `faults` has the errors.

Arithmetic rounds as the PTX ISA says, a fused multiply-add once; matrix products with float32 sums have the bits that
an H200 gives, on every architecture. Not bit for bit as on a GPU: the approximate functions (exact here to the last bit
or so), the order of float64 matrix products, the payload of a NaN. What PTX leaves undefined is a fault where a program
could come to depend on it: reads of what nothing has written, data races, warp-wide instructions without their warp.
Races are looked for in all accesses to shared memory, and between writes to global memory.
"""

from cuflash.emulator.arch import ARCHS, Arch
from cuflash.emulator.device import Device, DeviceArray, Kernel, Module
from cuflash.emulator.faults import (
    BarrierDivergence,
    Deadlock,
    EmulatorFault,
    InvalidLaunch,
    InvalidPtx,
    Misaligned,
    OutOfBounds,
    Race,
    Site,
    Trap,
    Uninitialized,
    UnsupportedInstruction,
)
from cuflash.emulator.report import LaunchReport

__all__ = [
    "ARCHS",
    "Arch",
    "BarrierDivergence",
    "Deadlock",
    "Device",
    "DeviceArray",
    "EmulatorFault",
    "InvalidLaunch",
    "InvalidPtx",
    "Kernel",
    "LaunchReport",
    "Misaligned",
    "Module",
    "OutOfBounds",
    "Race",
    "Site",
    "Trap",
    "Uninitialized",
    "UnsupportedInstruction",
]
