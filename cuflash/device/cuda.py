"""The real device: CUDA through CuPy. The only module that imports CuPy."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import cupy
import numpy as np

from cuflash.device import Kernel, Workspaces
from cuflash.errors import DeviceError, InvalidTypeError, type_name
from cuflash.jit import compile_cubin
from cuflash.layout import NativeArray
from cuflash.plan.arch import arch_of_capability
from cuflash.plan.kernel import KernelConfig
from cuflash.plan.launch import Launch


class CudaDevice:
    """One GPU. Kernels launch on CuPy's current stream of the GPU, workspaces come from CuPy's memory pool."""

    def __init__(self, device_id: int) -> None:
        self.device = cupy.cuda.Device(device_id)
        capability = self.device.compute_capability  # "90", "120"
        self.arch = arch_of_capability(int(capability[:-1]), int(capability[-1]))
        self.sm_count: int = self.device.attributes["MultiProcessorCount"]
        self.prepared: dict[Any, Any] = {}
        self._functions: dict[KernelConfig, Any] = {}

    def load(self, launch: Launch) -> Kernel:
        function = self._functions.get(launch.config)
        if function is None:
            path = compile_cubin(launch.config, self.arch.name)
            with self.device:
                kernel = cupy.RawModule(path=str(path)).get_function(launch.config.entry)
                kernel.max_dynamic_shared_size_bytes = launch.shared_bytes
                # The bare function: RawKernel would look up the current device again in every launch.
                function = self._functions[launch.config] = kernel.kernel
        grid, block, shared_bytes = launch.grid, launch.block, launch.shared_bytes

        def run(record: np.ndarray) -> None:
            function(grid, block, (record,), shared_bytes)

        return run

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> NativeArray:
        return cupy.empty(shape, dtype)

    def holds(self, array: NativeArray) -> bool:
        return isinstance(array, cupy.ndarray) and array.data.device_id == self.device.id

    def indices(self, array: NativeArray) -> NativeArray:
        if array.dtype == np.int32 and self.holds(array) and array.flags.c_contiguous:
            return array
        return cupy.ascontiguousarray(cupy.asarray(array, dtype=np.int32))

    def constant(self, array: np.ndarray) -> NativeArray:
        with self.device:
            return cupy.asarray(array)

    def keep(self, shape: tuple[int, ...], dtype: np.dtype, name: str) -> _Kept:
        array = cupy.empty(shape, dtype)
        return _Kept(int(array.data.ptr), array)

    def queue(self) -> Hashable | None:
        stream = cupy.cuda.get_current_stream()
        return None if stream.is_capturing() else (self.device.id, stream.ptr)

    def call(self) -> _Call:
        return _Call(self.device)


class _Kept(NamedTuple):
    address: int
    array: Any


class _Call:
    """The GPU is current and workspaces live until the launches are on the stream; then the pool may reuse them."""

    __slots__ = ("_device", "_workspaces")

    def __init__(self, device: Any) -> None:
        self._device = device
        self._workspaces: list[Any] = []

    def __enter__(self) -> _Call:
        self._device.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._device.__exit__(*error)

    def read(self, array: NativeArray, name: str) -> int:
        address: int = array.data.ptr
        return address

    write = update = read

    def workspace(self, shape: tuple[int, ...], dtype: np.dtype, name: str) -> int:
        return self._allocate(math.prod(shape) * dtype.itemsize)

    def workspaces(self, asked: Workspaces) -> Sequence[int]:
        begin = self._allocate(asked.nbytes)
        return [begin + offset for offset in asked.offsets]

    def _allocate(self, nbytes: int) -> int:
        memory = cupy.cuda.alloc(nbytes)  # an array around it costs more than the memory
        self._workspaces.append(memory)
        return int(memory.ptr)


_devices: dict[int, CudaDevice] = {}


def gpu_of(names: Sequence[str], arrays: Sequence[NativeArray | None]) -> CudaDevice:
    """The GPU that all these CuPy arrays lie on."""
    device_id: int = arrays[0].data.device_id  # type: ignore[union-attr]
    for name, array in zip(names, arrays, strict=True):
        if array is not None and array.data.device_id != device_id:
            raise DeviceError(f"{name} is on GPU {array.data.device_id}: must be on GPU {device_id}, as {names[0]} is")
    if device_id not in _devices:
        _devices[device_id] = CudaDevice(device_id)
    return _devices[device_id]


def from_dlpack(value: Any, name: str) -> NativeArray:
    """A CuPy view of an array on a GPU; CuPy's current stream waits for the producer's."""
    try:
        return cupy.from_dlpack(value)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise InvalidTypeError(f"{name} is a {type_name(value)}: must be one that CuPy can take ({error})") from error
