"""cuflash: exact, IO-aware attention for NumPy, CuPy and DLPack arrays, with no deep-learning framework.

Public: `attention`, `attention_varlen`, `paged_attention`, `PagedKVCache`, `BlockPool`, `merge_states`, `vjp`,
`emulate`, `Options`, the errors, and the modules `masks`, `sparse`, `reference`, `io_model` and `emulator`, which load
when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cuflash.attention import attention, attention_varlen
from cuflash.device.emulated import EmulatedDevice, emulate
from cuflash.errors import (
    CompileError,
    ConfigError,
    CuflashError,
    DeviceError,
    InvalidDtypeError,
    InvalidShapeError,
    InvalidTypeError,
    InvalidValueError,
    OutOfBlocksError,
    TraceError,
    UnknownSequenceError,
)
from cuflash.merge import merge_states
from cuflash.options import Options
from cuflash.paged import paged_attention
from cuflash.paging.cache import PagedKVCache
from cuflash.paging.pool import BlockPool
from cuflash.vjp import vjp

if TYPE_CHECKING:
    from cuflash import emulator, io_model, masks, reference, sparse

__version__ = "0.1.0"

__all__ = [
    "BlockPool",
    "CompileError",
    "ConfigError",
    "CuflashError",
    "DeviceError",
    "EmulatedDevice",
    "InvalidDtypeError",
    "InvalidShapeError",
    "InvalidTypeError",
    "InvalidValueError",
    "Options",
    "OutOfBlocksError",
    "PagedKVCache",
    "TraceError",
    "UnknownSequenceError",
    "attention",
    "attention_varlen",
    "emulate",
    "emulator",
    "io_model",
    "masks",
    "merge_states",
    "paged_attention",
    "reference",
    "sparse",
    "vjp",
]

_MODULES = ("emulator", "io_model", "masks", "reference", "sparse")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"cuflash.{name}")
    raise AttributeError(f"module 'cuflash' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
