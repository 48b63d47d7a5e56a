"""Where kernels run: a device loads the launches of a plan and gives them addresses. One is real, one emulated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from typing import Any, Protocol

import numpy as np

from cuflash.arrays import NUMPY, Kind, NativeArray, type_name
from cuflash.errors import DeviceError
from cuflash.plan.arch import Arch
from cuflash.plan.forward import Launch

Kernel = Callable[[np.ndarray], None]  # launches with one parameter record, an array of one element


class Call(Protocol):
    """One call's arrays as a kernel sees them: addresses, valid until the call ends."""

    def read(self, array: NativeArray, name: str) -> int:
        """Address of an input."""

    def write(self, array: NativeArray, name: str) -> int:
        """Address of an output that the kernels fill."""

    def workspace(self, shape: tuple[int, ...], dtype: np.dtype, name: str) -> int:
        """Address of a fresh C-contiguous array that ends with the call."""


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

    def call(self) -> AbstractContextManager[Call]:
        """One call: outputs count only if it ends without an error."""


emulated: ContextVar[Device | None] = ContextVar("cuflash_emulated_device", default=None)


def device_of(kind: Kind, names: Sequence[str], arrays: Sequence[NativeArray | None]) -> Device | None:
    """The device that takes these native arrays; None is the CPU executor.

    Raises DeviceError where they do not lie on one device.
    """
    emulator = emulated.get()
    if emulator is not None:
        if kind is not NUMPY:
            raise DeviceError(f"{names[0]} is of kind {kind.name}: must be a NumPy array within cuflash.emulate")
        return emulator
    on_host = type(arrays[0]) is np.ndarray
    for name, array in zip(names, arrays, strict=True):
        if array is not None and (type(array) is np.ndarray) != on_host:
            raise DeviceError(
                f"{name} is a {type_name(array)} in memory: must be on the same device as {names[0]}, "
                f"a {type_name(arrays[0])}"
            )
    if on_host:
        return None
    device: Device = _cuda().gpu_of(names, arrays)
    return device


@cache
def _cuda() -> Any:
    """The module that imports CuPy, once it is needed."""
    return import_module("cuflash.device.cuda")


def check_placed(device: Device | None, name: str, array: NativeArray) -> None:
    """Raises DeviceError where an array on a GPU goes with a call that runs elsewhere."""
    if device is None or not device.holds(array):
        raise DeviceError(f"{name} is a {type_name(array)} on a GPU: must be on the host or the device of q")
