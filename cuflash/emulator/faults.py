"""Typed faults of emulated programs. Every fault says which thread of which block met it, and on which line."""

from __future__ import annotations

from typing import NamedTuple


class Site(NamedTuple):
    """Where in a program something happened.

    Attributes
    ----------
    kernel : name of the kernel
    ptx_line, ptx_text : line number (from 1) and text of the PTX instruction
    source : "file:line" of the CUDA source, or None when the PTX carries no line information
    inlined_at : "file:line" of the calls through which the source line was inlined, innermost first
    """

    kernel: str
    ptx_line: int
    ptx_text: str
    source: str | None = None
    inlined_at: tuple[str, ...] = ()

    def __str__(self) -> str:
        place = f"PTX line {self.ptx_line}: {self.ptx_text}"
        if self.source is None:
            return place
        return f"{self.source}{''.join(f' (inlined at {at})' for at in self.inlined_at)}; {place}"


class EmulatorFault(RuntimeError):
    """Base of everything the emulator raises about a program, a launch or a memory access.

    Attributes
    ----------
    kernel : str or None
    block, thread : (x, y, z) of the first thread that faulted, or None where no thread is to blame
    threads : number of threads that faulted together
    site : Site or None; its fields are repeated as ptx_line, ptx_text, source and inlined_at
    """

    def __init__(
        self,
        message: str,
        site: Site | None = None,
        block: tuple[int, int, int] | None = None,
        thread: tuple[int, int, int] | None = None,
        threads: int = 0,
    ) -> None:
        self.site, self.block, self.thread, self.threads = site, block, thread, threads
        self.kernel = site.kernel if site else None
        self.ptx_line = site.ptx_line if site else None
        self.ptx_text = site.ptx_text if site else None
        self.source = site.source if site else None
        self.inlined_at = site.inlined_at if site else ()
        parts = [message]
        if block is not None and thread is not None:
            more = f" and {threads - 1} more" if threads > 1 else ""
            parts.append(f"kernel {self.kernel}, block {block}, thread {thread}{more}")
        elif self.kernel:
            parts.append(f"kernel {self.kernel}")
        if site is not None:
            parts.append(str(site))
        super().__init__("\n  ".join(parts))


class InvalidPtx(EmulatorFault):
    """The text is not PTX that the emulator can read."""


class UnsupportedInstruction(EmulatorFault):
    """An instruction, modifier or operand form that the emulator does not execute."""


class InvalidLaunch(EmulatorFault, ValueError):
    """A launch that the device would refuse: arguments, block, grid or shared memory."""


class OutOfBounds(EmulatorFault):
    """An access to memory that belongs to no array, or to a gap between the elements of a strided one."""


class Misaligned(EmulatorFault):
    """An access at an address that is not a multiple of its size."""


class Uninitialized(EmulatorFault):
    """A read of memory that nothing has written."""


class Race(EmulatorFault):
    """Two threads touch the same byte, one of them writes, and nothing orders them."""


class BarrierDivergence(EmulatorFault):
    """Threads that must execute a barrier or a warp-wide instruction together cannot."""


class Deadlock(EmulatorFault):
    """No thread can run and some wait."""


class Trap(EmulatorFault):
    """The program executed trap."""
