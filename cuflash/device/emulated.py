"""The emulated device: NumPy arrays through the real kernels, instruction by instruction, without a GPU."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from threading import RLock
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cuflash.device import Kernel, Workspaces, current
from cuflash.errors import InvalidTypeError, InvalidValueError
from cuflash.layout import NativeArray
from cuflash.plan.arch import arch_named
from cuflash.plan.kernel import KernelConfig
from cuflash.plan.launch import Launch

if TYPE_CHECKING:
    from cuflash import emulator


@contextmanager
def emulate(
    arch: str,
    *,
    warp_order: int | None = None,
    copies: Literal["late", "early"] = "late",
    check_races: bool = True,
    sm_count: int | None = None,
) -> Iterator[EmulatedDevice]:
    """Run every cuflash call on NumPy arrays within the block through the compiled kernels on an emulated GPU.

    The kernels are compiled to PTX, which needs the extra `emulator` but no GPU and no driver, and executed by
    `cuflash.emulator`. The block applies to the thread (the `contextvars` context) that enters it; blocks nest.

    Parameters
    ----------
    arch : str
        "sm_80", "sm_86", "sm_89", "sm_90", "sm_100" or "sm_120".
    warp_order : int, optional
        Seed of a random order in which warps advance; by default they advance in turn.
    copies : "late" or "early"
        When asynchronous copies land: as late as the program allows, or at once.
    check_races : bool
        Detect races on shared memory.
    sm_count : int, optional
        Multiprocessors that a plan counts on; by default those of the architecture's usual part.

    Yields
    ------
    EmulatedDevice
        Its `launches` lists a report per launch: kernel, grid, block, bytes read and written in global memory, bank
        conflicts, instruction counts.

    Raises
    ------
    InvalidValueError, InvalidTypeError
        An argument is not what this page says.
    emulator.EmulatorFault
        From a call within: a kernel races, hangs, or reads or writes what it must not; names kernel, thread and line.

    Examples
    --------
    >>> import numpy as np, cuflash
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 40, 2, 32)).astype(np.float16)
    >>> with cuflash.emulate("sm_80") as device:
    ...     out = cuflash.attention(q, k, v, causal=True)
    >>> len(device.launches)
    1
    """
    token = current.set(EmulatedDevice(arch, warp_order, copies, check_races, sm_count))
    try:
        yield current.get()  # type: ignore[misc]
    finally:
        current.reset(token)


class EmulatedDevice:
    """An emulated GPU as `cuflash.emulate` yields it.

    Attributes
    ----------
    launches : list
        A report per launch since the device was made, in order.
    arch : Arch
        What is emulated.
    sm_count : int
        Multiprocessors that plans count on.
    """

    def __init__(
        self,
        arch: str,
        warp_order: int | None = None,
        copies: Literal["late", "early"] = "late",
        check_races: bool = True,
        sm_count: int | None = None,
    ) -> None:
        self.arch = arch_named(arch)
        _check(warp_order, copies, check_races, sm_count)
        from cuflash.emulator import Device

        self.sm_count = sm_count or self.arch.sm_count
        self.launches: list[Any] = []
        self.prepared: dict[Any, Any] = {}
        self._emulator = Device(arch, warp_order=warp_order, copies=copies, check_races=check_races)
        self._kernels: dict[KernelConfig, Any] = {}
        self._lock = RLock()
        self._queue = object()  # unlike the id of this one, never that of a later device

    def load(self, launch: Launch) -> Kernel:
        kernel = self._kernels.get(launch.config)
        if kernel is None:
            from cuflash.jit import compile_ptx

            module = self._emulator.load(compile_ptx(launch.config, self.arch.name))
            kernel = self._kernels[launch.config] = module.kernel(launch.config.entry)

        reports = self.launches  # not the device, which keeps what it has prepared: its memory goes with its last user

        def run(record: np.ndarray) -> None:
            reports.append(kernel.launch(launch.grid, launch.block, (record[0],), shared_bytes=launch.shared_bytes))

        return run

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        return np.empty(shape, dtype)

    def holds(self, array: NativeArray) -> bool:
        return isinstance(array, np.ndarray)

    def indices(self, array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(array, np.int32)

    def constant(self, array: np.ndarray) -> np.ndarray:
        return array

    def keep(self, shape: tuple[int, ...], dtype: np.dtype, name: str) -> _Kept:
        return _Kept(self._emulator, shape, dtype, name)

    def queue(self) -> Hashable | None:
        return self._queue

    @contextmanager
    def call(self) -> Iterator[_Call]:
        with self._lock:
            call = _Call(self._emulator)
            try:
                yield call
                call.copy_back()
            finally:
                call.free()


class _Kept:
    """An array in the emulated memory, given back with this object; a mask that keeps it keeps no device."""

    def __init__(self, device: emulator.Device, shape: tuple[int, ...], dtype: np.dtype, name: str) -> None:
        array = device.empty(shape, dtype, name=name)
        self.address = int(array.pointer)
        weakref.finalize(self, device.release(array))


class _Call:
    """Device copies of one call's arrays, in their strides and alignment; gaps between elements belong to nobody."""

    def __init__(self, device: emulator.Device) -> None:
        self._device = device
        self._arrays: list[Any] = []
        self._outputs: list[tuple[np.ndarray, Any]] = []

    def read(self, array: np.ndarray, name: str) -> int:
        return self._keep(self._device.to_device(array, name=name))

    def write(self, array: np.ndarray, name: str) -> int:
        return self._output(array, self._device.empty_like(array, name=name))

    def update(self, array: np.ndarray, name: str) -> int:
        return self._output(array, self._device.to_device(array, name=name))

    def workspace(self, shape: tuple[int, ...], dtype: np.dtype, name: str) -> int:
        return self._keep(self._device.empty(shape, dtype, name=name))

    def workspaces(self, asked: Workspaces) -> Sequence[int]:
        # Apart, so that what lies past the end of one is nobody's.
        return [self.workspace(shape, dtype, name) for name, shape, dtype in asked.arrays]

    def _output(self, array: np.ndarray, copy: Any) -> int:
        self._outputs.append((array, copy))
        return self._keep(copy)

    def _keep(self, array: Any) -> int:
        self._arrays.append(array)
        return int(array.pointer)

    def copy_back(self) -> None:
        for host, copy in self._outputs:
            host[...] = copy.to_host()

    def free(self) -> None:
        for array in self._arrays:
            self._device.free(array)


def _check(warp_order: object, copies: object, check_races: object, sm_count: object) -> None:
    for name, value, least in (("warp_order", warp_order, 0), ("sm_count", sm_count, 1)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise InvalidTypeError(f"{name} = {value!r}: must be an int or None")
        if value < least:
            raise InvalidValueError(f"{name} = {value}: must be >= {least} or None")
    if copies not in ("late", "early"):
        raise InvalidValueError(f"copies = {copies!r}: must be 'late' or 'early'")
    if not isinstance(check_races, bool):
        raise InvalidTypeError(f"check_races = {check_races!r}: must be True or False")
