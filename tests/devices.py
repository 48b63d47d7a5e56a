"""The devices a test runs on: one call on NumPy arrays, executed there, with NumPy results."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

import cuflash

ALL_DTYPES = ("float16", "bfloat16", "float32", "float64")


class CpuDevice:
    """NumPy arrays as they are: the CPU executor."""

    name = "cpu"

    def run(self, function: Callable[..., Any], *arrays: Any, **keywords: Any) -> Any:
        """function(*arrays, **keywords) on this device; an `out` array is written in place."""
        return function(*arrays, **keywords)


class EmulatedDevice:
    """NumPy arrays through the real kernels on an emulated GPU; `launches` are those of the latest run."""

    name = "emulated"

    def __init__(self, arch: str = "sm_80") -> None:
        self.arch = arch
        self.launches: list[Any] = []

    def run(self, function: Callable[..., Any], *arrays: Any, **keywords: Any) -> Any:
        with cuflash.emulate(self.arch) as device:
            result = function(*arrays, **keywords)
        self.launches = list(device.launches)
        return result


class CudaDevice:
    """CuPy arrays with the strides, alignment, sharing and surrounding memory of the NumPy arrays."""

    name = "cuda"

    def run(self, function: Callable[..., Any], *arrays: Any, **keywords: Any) -> Any:
        memory = _Memory()
        result = function(*map(memory.to_device, arrays), **{k: memory.to_device(v) for k, v in keywords.items()})
        memory.copy_back()
        out = keywords.get("out")
        return _to_host(result) if out is None else _replace_first(_to_host(result), out)


class _Memory:
    """Device copies of the whole blocks of host memory that arrays are views of, one copy a block."""

    def __init__(self) -> None:
        self.blocks: dict[int, tuple[np.ndarray, Any]] = {}  # address: host bytes, device bytes

    def to_device(self, value: Any) -> Any:
        import cupy

        if isinstance(value, (tuple, list)):
            return type(value)(map(self.to_device, value))
        if not isinstance(value, np.ndarray):
            return value
        if value.size == 0:
            return cupy.empty(value.shape, value.dtype)
        root = value
        while isinstance(root.base, np.ndarray):
            root = root.base
        low, high = np.lib.array_utils.byte_bounds(root)
        if low not in self.blocks:
            host = np.frombuffer((ctypes.c_byte * (high - low)).from_address(low), np.uint8)
            self.blocks[low] = host, cupy.asarray(host)
        pointer = self.blocks[low][1].data + (value.__array_interface__["data"][0] - low)
        return cupy.ndarray(value.shape, value.dtype, pointer, strides=value.strides)

    def copy_back(self) -> None:
        for host, device in self.blocks.values():
            now = device.get()
            if not np.array_equal(now, host):  # inputs may be read-only; what changed was `out`
                host[...] = now


def _to_host(value: Any) -> Any:
    if isinstance(value, tuple):
        return type(value)(*map(_to_host, value)) if hasattr(value, "_fields") else tuple(map(_to_host, value))
    if isinstance(value, list):
        return [_to_host(item) for item in value]
    return value.get() if hasattr(value, "get") and hasattr(value, "__cuda_array_interface__") else value


def _replace_first(result: Any, out: np.ndarray) -> Any:
    """The result with the caller's own `out` in place of its copy."""
    return (out, *result[1:]) if isinstance(result, tuple) else out


DEVICES: dict[str, type[CpuDevice] | type[EmulatedDevice] | type[CudaDevice]] = {
    "cpu": CpuDevice,
    "emulated": EmulatedDevice,
    "cuda": CudaDevice,
}
