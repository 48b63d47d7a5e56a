"""Compile a configuration once: per process by memo, per machine by the disk cache."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Hashable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from cuflash.errors import InvalidValueError
from cuflash.jit import compiler, sources
from cuflash.jit.cache import Entry, cache_dir, temporary_dir


class Unit(Hashable, Protocol):
    """What can be compiled; every kernel configuration of `cuflash.plan.config` is one."""

    @property
    def entry(self) -> str:
        """Name of the kernel."""

    def unit(self) -> str:
        """CUDA source; includes are named by their path below kernels_cu."""


@dataclass(frozen=True)
class Resources:
    """What one kernel uses, as the assembler reports it: registers of a thread, the rest in bytes."""

    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    static_shared: int


def compile_cubin(config: Unit, arch: str) -> Path:
    """Path of the cubin of a kernel for one architecture, compiled or taken from the cache.

    Parameters
    ----------
    config : Unit
        Kernel configuration, for example a `ForwardConfig`.
    arch : str
        "sm_80", "sm_90a", ...

    Raises
    ------
    CompileError
        The kernel does not compile; the message has the log and the path of the saved source.
    DeviceError
        A package that compiling needs is missing.
    """
    return _build(config, arch, "cubin")[0]


@cache
def compile_ptx(config: Unit, arch: str) -> str:
    """PTX text of a kernel for one architecture, with source lines; parameters and errors as `compile_cubin`."""
    return _build(config, arch, "ptx")[0].read_text(encoding="utf-8")


@cache
def resources(config: Unit, arch: str) -> Resources:
    """Registers, spills and shared memory of the cubin; parameters and errors as `compile_cubin`."""
    return Resources(**_build(config, arch, "cubin")[1]["resources"])


@cache
def _build(config: Unit, arch: str, kind: compiler.Kind) -> tuple[Path, dict[str, Any]]:
    """Path of the code and record of its cache entry."""
    if not re.fullmatch(r"sm_\d+[af]?", arch):
        raise InvalidValueError(f"arch = {arch!r}: must be an architecture such as 'sm_80' or 'sm_90a'")
    unit = config.unit()
    parts = (sources.fingerprint(), compiler.compiler_version(), *compiler.options_for(arch, kind), unit)
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    entry = Entry(cache_dir(), f"{config.entry}-{arch}-{key[:24]}", f".{kind}", key)
    record = entry.record()
    if record is not None:
        return entry.code_path, record

    def compile_unit() -> compiler.Compiled:
        return compiler.compile_unit(unit, f"{config.entry}.cu", arch, kind)

    def facts(log: str) -> dict[str, Any]:
        return {"resources": asdict(_resources(log))} if kind == "cubin" else {}

    try:
        record = entry.fill(unit, compile_unit, facts)
    except OSError as error:
        entry = replace(entry, folder=temporary_dir(entry.folder, error.strerror))
        record = entry.fill(unit, compile_unit, facts)
    return entry.code_path, record


def _resources(log: str) -> Resources:
    """From the lines that --ptxas-options=-v adds; functions that are not inlined count as well."""

    def total(pattern: str) -> int:
        return sum(int(number) for number in re.findall(pattern, log))

    return Resources(
        registers=max((int(number) for number in re.findall(r"Used (\d+) registers", log)), default=0),
        spill_stores=total(r"(\d+) bytes spill stores"),
        spill_loads=total(r"(\d+) bytes spill loads"),
        stack=total(r"(\d+) bytes stack frame"),
        static_shared=total(r"(\d+) bytes smem"),
    )
