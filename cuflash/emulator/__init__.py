"""A GPU in software: executes the PTX that the CUDA compiler emits, checks every access, counts every byte.

>>> device = Device("sm_80")
>>> x = device.to_device(array, name="x")
>>> report = device.load(ptx).kernel("scale").launch(grid, block, [x, np.float32(2)])
>>> x.to_host()
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
