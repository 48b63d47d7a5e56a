"""Limits of the emulated architectures (CUDA C++ Programming Guide, table of technical specifications per compute
capability)."""

from __future__ import annotations

from dataclasses import dataclass

from cuflash.emulator.faults import InvalidLaunch

MAX_THREADS = 1024
MAX_GRID = (2**31 - 1, 65535, 65535)
MAX_BLOCK = (1024, 1024, 64)
NAMED_BARRIERS = 16


@dataclass(frozen=True)
class Arch:
    """One architecture: name, compute capability times ten, shared bytes that one block may have."""

    name: str
    capability: int
    shared_per_block: int


ARCHS = {
    name: Arch(name, int(name.removeprefix("sm_").rstrip("a")), kib * 1024)
    for name, kib in {
        "sm_80": 163,
        "sm_86": 99,
        "sm_87": 163,
        "sm_89": 99,
        "sm_90": 227,
        "sm_90a": 227,
        "sm_100": 227,
        "sm_103": 227,
        "sm_120": 99,
    }.items()
}


def find(name: str) -> Arch:
    """The facts of an architecture by name, such as "sm_80"."""
    if name not in ARCHS:
        raise InvalidLaunch(f"arch = {name!r}: must be one of {', '.join(ARCHS)}")
    return ARCHS[name]
