"""Where kernels run: a device loads the launches of a plan and gives them addresses. One is real, one emulated."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import numpy as np

from cuflash.errors import DeviceError, type_name
from cuflash.layout import NativeArray
from cuflash.plan.arch import Arch
from cuflash.plan.launch import Launch

Kernel = Callable[[np.ndarray], None]  # launches with one parameter record, an array of one element


@dataclass(frozen=True, slots=True)
class Workspaces:
    """C-contiguous arrays that a call needs together, and where each begins in one piece of memory, in bytes."""

    arrays: tuple[tuple[str, tuple[int, ...], np.dtype], ...]
    offsets: tuple[int, ...]
    nbytes: int


def workspaces(*arrays: tuple[str, tuple[int, ...], np.dtype]) -> Workspaces:
    """Of these names, shapes and dtypes."""
    sizes = (-(-math.prod(shape) * dtype.itemsize // 256) * 256 for _, shape, dtype in arrays)  # aligned as by CUDA
    *offsets, nbytes = accumulate(sizes, initial=0)
    return Workspaces(arrays, tuple(offsets), nbytes)


class Call(Protocol):
    """One call's arrays as a kernel sees them: addresses, valid until the call ends."""

    def read(self, array: NativeArray, name: str) -> int:
        """Address of an input."""

    def write(self, array: NativeArray, name: str) -> int:
        """Address of an output that the kernels fill."""

    def update(self, array: NativeArray, name: str) -> int:
        """Address of an array that the kernels write in part, and may read."""

    def workspace(self, shape: tuple[int, ...], dtype: np.dtype, name: str) -> int:
        """Address of a fresh C-contiguous array that ends with the call."""

    def workspaces(self, asked: Workspaces) -> Sequence[int]:
        """Addresses of several, which cost the host no more than one."""


class Kept(Protocol):
    """A C-contiguous array on a device, which lasts as long as this object."""

    address: int


class Device(Protocol):
    """What answers a problem with kernels."""

    arch: Arch
    sm_count: int
    prepared: dict[Any, Any]  # what this device has prepared, by what was asked

    def load(self, launch: Launch) -> Kernel:
        """The kernel of a launch, compiled and loaded once per configuration."""

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> NativeArray:
        """A native array for a result."""

    def holds(self, array: NativeArray) -> bool:
        """Whether a native array lies in this device's memory."""

    def indices(self, array: NativeArray) -> NativeArray:
        """A C-contiguous int32 array on this device with the values of one on the host or this device."""

    def constant(self, array: np.ndarray) -> NativeArray:
        """A native array on this device with the values of one on the host."""

    def keep(self, shape: tuple[int, ...], dtype: np.dtype, name: str) -> Kept:
        """A fresh array that outlives the call."""

    def queue(self) -> Hashable | None:
        """What orders the launches of this thread, so that later ones see what earlier ones kept; None if they are only
        captured, not run."""

    def call(self) -> AbstractContextManager[Call]:
        """One call: outputs count only if it ends without an error."""


current: ContextVar[Device | None] = ContextVar("cuflash_emulated_device", default=None)


def check_placed(device: Device | None, name: str, array: NativeArray) -> None:
    """Raises DeviceError where an array on a GPU goes with a call that runs elsewhere."""
    if device is None or not device.holds(array):
        raise DeviceError(f"{name} is a {type_name(array)} on a GPU: must be on the host or the device of q")
