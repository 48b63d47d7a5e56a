"""What the configurations of all kernels share: a name, a number of threads, and the unit that is compiled."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import fields
from typing import Any, ClassVar

from cuflash.errors import ConfigError


class KernelConfig(ABC):
    """Compile-time constants of a kernel: a frozen dataclass with the fields of a CUDA struct, in its order."""

    family: ClassVar[str]  # the kernel's file and function
    record: ClassVar[str]  # of the CUDA structs, less Config and Params
    resident: ClassVar[int | None] = None  # blocks that must fit a multiprocessor, for the assembler
    num_warps: int

    @property
    def threads(self) -> int:
        return 32 * self.num_warps

    @property
    @abstractmethod
    def entry(self) -> str:
        """Name of the kernel in the cubin."""

    def unit(self) -> str:
        """The CUDA source to compile: an include, the constant, the mask, an entry that calls the kernel."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        mask: str = values.get("mask", "")
        body = "\n".join(
            f"    .{name} = {_literal(bool(mask) if name == 'mask' else values[name])}," for name in values
        )
        arguments = "kConfig, cuflash::Mask" if mask else "kConfig"
        bounds = f"{self.threads}" if self.resident is None else f"{self.threads}, {self.resident}"
        return (
            f'#include "kernels/{self.family}.cu"\n'
            f"constexpr cuflash::{self.record}Config kConfig{{\n{body}\n}};\n"
            + (f"namespace cuflash {{\n{mask}\n}}\n" if mask else "")
            + f'extern "C" __global__ void __launch_bounds__({bounds})\n'
            f"{self.entry}(const __grid_constant__ cuflash::{self.record}Params params) {{\n"
            f"    cuflash::{self.family}<{arguments}>(params);\n}}\n"
        )

    def require(self, condition: bool, field: str, must: str) -> None:
        if not condition:
            raise ConfigError(f"{type(self).__name__}.{field} = {getattr(self, field)!r}: must be {must}")

    def require_one_of(self, field: str, *allowed: object) -> None:
        self.require(getattr(self, field) in allowed, field, f"one of {allowed}")


def _literal(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"cuflash::Element::{value}"
    return str(value)
