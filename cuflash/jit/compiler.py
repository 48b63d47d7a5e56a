"""The call of NVRTC. The library is loaded at the first compilation, not before."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any, Literal

from cuflash.errors import CompileError, DeviceError
from cuflash.jit.sources import sources

EXTRAS = "pip install 'cuflash[cu12]', 'cuflash[cu13]' or, without a GPU, 'cuflash[emulator]'"

# Neither -ftz nor -use_fast_math: subnormals are kept; the kernels name their approximate functions themselves.
OPTIONS = ("-std=c++20", "-default-device", "-lineinfo")

Kind = Literal["cubin", "ptx"]


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one unit: a cubin or PTX text, and its log."""

    code: bytes
    log: str


def options_for(arch: str, kind: Kind) -> tuple[str, ...]:
    """Compiler options for an architecture such as "sm_80" or "sm_90a"; a cubin's log reports its resources."""
    if kind == "cubin":
        return (*OPTIONS, f"--gpu-architecture={arch}", "--ptxas-options=-v")
    return (*OPTIONS, f"--gpu-architecture={arch.replace('sm_', 'compute_', 1)}")


@cache
def compiler_version() -> str:
    """Version of NVRTC for the cache key, read from the wheel: loading the library takes longer than a cache hit."""
    try:
        major = metadata.version("cuda-bindings").split(".")[0]
    except metadata.PackageNotFoundError:
        raise DeviceError(f"cuda-bindings is not installed: compiling a kernel needs {EXTRAS}") from None
    wheel = "nvidia-cuda-nvrtc-cu12" if major == "12" else "nvidia-cuda-nvrtc"
    try:
        return metadata.version(wheel)
    except metadata.PackageNotFoundError:  # NVRTC of a system toolkit or of conda
        return ".".join(str(part) for part in _call("nvrtcVersion"))


def compile_unit(unit: str, name: str, arch: str, kind: Kind) -> Compiled:
    """Compile the CUDA text `unit`, called `name` in diagnostics, against the project's sources.

    Raises
    ------
    CompileError
        The unit does not compile; the message is the compiler's log.
    DeviceError
        NVRTC or its Python bindings are not installed.
    """
    headers = sources()
    program = _call(
        "nvrtcCreateProgram",
        unit.encode(),
        name.encode(),
        len(headers),
        [text.encode() for text in headers.values()],
        [header.encode() for header in headers],
    )
    try:
        options = [option.encode() for option in options_for(arch, kind)]
        status = _nvrtc().nvrtcCompileProgram(program, len(options), options)[0]
        log = _read(program, "ProgramLog").rstrip(b"\0").decode()
        if status != 0:
            raise CompileError(log.strip() or f"NVRTC: {status.name}")
        code = _read(program, "CUBIN" if kind == "cubin" else "PTX")
    finally:
        _call("nvrtcDestroyProgram", program)
    if kind == "ptx":
        code = _relative_paths(code.rstrip(b"\0").decode(), [name, *headers]).encode()
    return Compiled(code, log)


def _relative_paths(ptx: str, names: list[str]) -> str:
    """Name files as they are included: the compiler prefixes them with the current folder."""

    def relative(match: re.Match[str]) -> str:
        name = next((name for name in names if match[2].endswith(f"/{name}")), match[2])
        return f'{match[1]}"{name}"'

    return re.sub(r'^(\s*\.file\s+\d+\s+)"([^"]*)"', relative, ptx, flags=re.MULTILINE)


@cache
def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()  # loads the shared library
    except (ImportError, RuntimeError) as error:  # pathfinder's errors are RuntimeErrors
        raise DeviceError(f"NVRTC cannot be loaded ({error}): compiling a kernel needs {EXTRAS}") from error
    return nvrtc


def _call(function: str, *arguments: object) -> Any:
    """Call an NVRTC function; its results without the status, which must be success."""
    status, *results = getattr(_nvrtc(), function)(*arguments)
    if status != 0:
        raise CompileError(f"{function}: {status.name}")
    return results[0] if len(results) == 1 else results


def _read(program: object, what: str) -> bytes:
    buffer = bytes(_call(f"nvrtcGet{what}Size", program))  # NVRTC fills it in place
    _call(f"nvrtcGet{what}", program, buffer)
    return buffer
