"""As much of CuPy as `cuflash.device.cuda` uses, over host memory: launches are recorded, not run.

It lets the host side of the CUDA device be tested without a GPU: which arrays a kernel gets, on which device, and what
happens between two calls. What kernels compute is tested on the emulated device and on real GPUs.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cuflash.plan.params import BACKWARD_PARAMS, FORWARD_PARAMS, TILE_LIST_PARAMS
from cuflash.records import address_words

alive: weakref.WeakSet[Memory] = weakref.WeakSet()  # memory of others may be given out again before a kernel runs


class Memory:
    """A MemoryPointer."""

    def __init__(self, host: np.ndarray, device_id: int) -> None:
        self.host, self.ptr, self.device_id = host, host.__array_interface__["data"][0], device_id
        alive.add(self)


class ndarray:
    """A host array that pretends to lie on a GPU."""

    __module__ = "cupy"
    __cuda_array_interface__ = None

    def __init__(self, host: np.ndarray, device_id: int = 0) -> None:
        self.host, self.device_id = host, device_id
        self.shape, self.strides, self.dtype, self.size, self.ndim = (
            host.shape, host.strides, host.dtype, host.size, host.ndim,
        )
        self.data = Memory(host, device_id)
        self.flags = SimpleNamespace(c_contiguous=host.flags.c_contiguous)

    def copy(self, order: str) -> ndarray:
        return ndarray(self.host.copy(order), self.device_id)

    def transpose(self, *axes: int) -> ndarray:
        return ndarray(self.host.transpose(axes), self.device_id)

    def reshape(self, *shape: int) -> ndarray:
        return ndarray(self.host.reshape(*shape), self.device_id)

    def get(self) -> np.ndarray:
        return self.host.copy()

    def fill(self, value: float) -> None:
        self.host.fill(value)

    def __getitem__(self, index: Any) -> ndarray:
        return ndarray(self.host[index], self.device_id)

    def __dlpack__(self, **_: object) -> object:
        raise AssertionError("a CuPy array goes in as it is")

    def __array__(self, *_: object, **__: object) -> np.ndarray:
        raise AssertionError("a GPU array was read back to the host")


class FakeCupy(ModuleType):
    """The module; `launches` are (device, entry, grid, block, record bytes, shared bytes), `loads` (entry, device)."""

    ndarray = ndarray

    def __init__(self) -> None:
        super().__init__("cupy")
        self.current = 0
        self.launches: list[tuple[Any, ...]] = []
        self.loads: list[tuple[str, int]] = []
        self.stream = SimpleNamespace(ptr=0, is_capturing=lambda: False)
        self.cuda = SimpleNamespace(
            Device=lambda number: _Device(self, number),
            get_current_stream=lambda: self.stream,
            alloc=lambda size: Memory(np.zeros(size, np.uint8), self.current),
        )

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> ndarray:
        return ndarray(np.zeros(shape, dtype), self.current)

    def asarray(self, array: Any, dtype: Any = None) -> ndarray:
        return ndarray(np.array(array.host if isinstance(array, ndarray) else array, dtype), self.current)

    def ascontiguousarray(self, array: ndarray) -> ndarray:
        return ndarray(np.ascontiguousarray(array.host), array.device_id)

    def from_dlpack(self, producer: Any) -> ndarray:
        return producer.on_gpu

    def RawModule(self, *, path: str) -> SimpleNamespace:
        def get_function(entry: str) -> SimpleNamespace:
            self.loads.append((entry, self.current))
            return SimpleNamespace(kernel=lambda *arguments: self._launch(entry, *arguments))

        return SimpleNamespace(get_function=get_function)

    def _launch(self, entry: str, grid: Any, block: Any, arguments: tuple[np.ndarray], shared_bytes: int) -> None:
        (record,) = arguments
        assert record.size == 1
        for params in FORWARD_PARAMS, BACKWARD_PARAMS, TILE_LIST_PARAMS:
            if record.nbytes == params.itemsize:
                values = record.view(params)[0]
                freed = [name for name in address_words(params) if not all(map(_is_held, np.ravel(values[name])))]
                assert freed == []
        self.launches.append((self.current, entry, grid, block, arguments[0].tobytes(), shared_bytes))


def _is_held(address: np.uint64) -> bool:
    return address == 0 or any(0 <= int(address) - memory.ptr < max(memory.host.nbytes, 1) for memory in alive)


class _Device:
    """cupy.cuda.Device: current within a with block."""

    def __init__(self, cupy: FakeCupy, number: int) -> None:
        self.compute_capability, self.attributes = "90", {"MultiProcessorCount": 132}
        self.cupy, self.id, self.before = cupy, number, [0]

    def __enter__(self) -> None:
        self.before.append(self.cupy.current)
        self.cupy.current = self.id

    def __exit__(self, *_: object) -> None:
        self.cupy.current = self.before.pop()


@contextmanager
def without_the_cuda_device() -> Iterator[pytest.MonkeyPatch]:
    """`cuflash.device.cuda` is not imported yet, and is forgotten afterwards."""
    import cuflash.device
    from cuflash import arrays

    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, "cuflash.device.cuda", raising=False)
        patch.delattr(cuflash.device, "cuda", raising=False)
        arrays._import_gpu.cache_clear()
        yield patch
        sys.modules.pop("cuflash.device.cuda", None)
        vars(cuflash.device).pop("cuda", None)
        arrays._import_gpu.cache_clear()


@contextmanager
def fake_cupy() -> Iterator[FakeCupy]:
    """Within the block `import cupy` gives the fake."""
    module = FakeCupy()
    with without_the_cuda_device() as patch:
        patch.setitem(sys.modules, "cupy", module)
        yield module
