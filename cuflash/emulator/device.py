"""The emulated device as its user sees it: arrays, modules, kernels, launches."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from math import prod
from typing import Literal

import numpy as np
from numpy.typing import DTypeLike

from cuflash.emulator import arch as archs
from cuflash.emulator.faults import InvalidLaunch, Uninitialized
from cuflash.emulator.ir import Variable
from cuflash.emulator.library import Entry, library
from cuflash.emulator.machine import Launch, Machine
from cuflash.emulator.memory import CONSTANT, GLOBAL_BASE, OWNED, WRITTEN, Allocation, GlobalMemory, Parameters
from cuflash.emulator.report import Counters, LaunchReport
from cuflash.emulator.writers import GlobalWriters

BATCH_THREADS = 16384
POISON = 0xFF


class DeviceArray:
    """An array in the memory of an emulated device.

    Attributes
    ----------
    pointer : address of element [0, ..., 0]
    shape, strides, dtype, name : as given; strides in bytes
    """

    def __init__(
        self,
        device: Device,
        allocation: Allocation,
        offset: int,
        shape: Sequence[int],
        strides: Sequence[int],
        dtype: np.dtype,
        name: str,
    ) -> None:
        self._device, self._allocation, self._offset = device, allocation, offset
        self.shape: tuple[int, ...] = tuple(shape)
        self.strides: tuple[int, ...] = tuple(strides)
        self.dtype = np.dtype(dtype)
        self.name = name

    @property
    def pointer(self) -> int:
        return GLOBAL_BASE + self._offset

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def _bytes(self, of: np.ndarray) -> np.ndarray:
        """The array's elements as bytes (..., itemsize) of an arena-sized byte array."""
        shape, strides = (*self.shape, self.dtype.itemsize), (*self.strides, 1)
        return np.ndarray(shape, np.uint8, of.data, self._offset if self.nbytes else 0, strides)

    def to_host(self) -> np.ndarray:
        """A contiguous copy of the contents.

        Raises Uninitialized when nothing has written some element.
        """
        memory = self._device._memory
        if self.nbytes == 0:
            return np.empty(self.shape, self.dtype)
        written = (self._bytes(memory.state) & WRITTEN).astype(bool).all(-1)
        if not written.all():
            index = tuple(int(i) for i in np.argwhere(~written)[0])
            count = int(np.count_nonzero(~written))
            raise Uninitialized(f"{self.name}{list(index)} was never written ({count} of {written.size} elements)")
        return np.ascontiguousarray(self._bytes(memory.data)).view(self.dtype)[..., 0]

    def __repr__(self) -> str:
        return f"DeviceArray({self.name!r}, shape={self.shape}, dtype={self.dtype})"


class Device:
    """An emulated GPU.

    Parameters
    ----------
    arch : such as "sm_80"; decides how much shared memory a block may have
    warp_order : None runs warps in step where they can be; an integer seeds a random order in which warps run far ahead
    copies : "late" lets asynchronous copies appear at the wait that covers them, "early" at once
    check_races : look for unordered accesses to shared memory and unordered writes to global memory
    """

    def __init__(
        self,
        arch: str = "sm_80",
        warp_order: int | None = None,
        copies: Literal["late", "early"] = "late",
        check_races: bool = True,
    ) -> None:
        if copies not in ("late", "early"):
            raise InvalidLaunch(f"copies = {copies!r}: must be 'late' or 'early'")
        self.arch = archs.find(arch)
        self.warp_order, self.copies, self.check_races = warp_order, copies, check_races
        self._memory = GlobalMemory()
        self._unnamed = 0
        self._modules: weakref.WeakValueDictionary[str, Module] = weakref.WeakValueDictionary()  # they keep the device

    def to_device(self, array: np.ndarray, name: str | None = None) -> DeviceArray:
        """Copy an array, keeping its strides; bytes between its elements belong to nobody.

        The address keeps its distance from the start of the array's own buffer modulo 256, so an unaligned view stays
        unaligned.
        """
        array = np.asarray(array)
        result = self.empty_like(array, name)
        if result.nbytes:
            data = np.ascontiguousarray(array).reshape(array.shape)
            result._bytes(self._memory.data)[...] = data[..., None].view(np.uint8)
            result._bytes(self._memory.state)[...] |= WRITTEN
        return result

    def empty(self, shape: int | Sequence[int], dtype: DTypeLike, name: str | None = None) -> DeviceArray:
        """A contiguous array that nothing has written: reading it before writing it is a fault."""
        shape = (shape,) if isinstance(shape, (int, np.integer)) else tuple(shape)
        template = np.lib.stride_tricks.as_strided(
            np.empty(1, dtype), shape, _contiguous(shape, np.dtype(dtype).itemsize)
        )
        return self._allocate(shape, template.strides, template.dtype, name, 0)

    def empty_like(self, array: np.ndarray, name: str | None = None) -> DeviceArray:
        """An array with the strides and alignment of a host array, as to_device gives it, that nothing has written."""
        return self._allocate(array.shape, array.strides, array.dtype, name, _phase(array))

    def free(self, array: DeviceArray) -> None:
        """Give an array's memory back."""
        self._memory.free(array._allocation)

    def release(self, array: DeviceArray) -> Callable[[], None]:
        """What gives an array's memory back if the device is still there, and keeps neither."""
        memory, allocation = weakref.ref(self._memory), array._allocation

        def free() -> None:
            alive = memory()
            if alive is not None:
                alive.free(allocation)

        return free

    def load(self, ptx: str) -> Module:
        """Load a PTX module: parse and translate it, place its variables.

        Raises InvalidPtx or UnsupportedInstruction, naming the line.
        """
        module = self._modules.get(ptx)
        if module is None:
            module = self._modules[ptx] = Module(self, ptx)
        return module

    def _place(self, variable: Variable) -> int:
        """Put a .global or .const variable into memory; returns its address."""
        allocation = self._memory.allocate(variable.size, variable.name)
        part = slice(allocation.start, allocation.start + variable.size)
        self._memory.data[part] = np.frombuffer(variable.data or bytes(variable.size), np.uint8)
        self._memory.state[part] = OWNED | WRITTEN | (CONSTANT if variable.space == "const" else 0)
        return GLOBAL_BASE + allocation.start

    def _link(self, variable: Variable, symbols: dict[str, int]) -> None:
        """Fill in the addresses that a variable's initialiser names."""
        start = symbols[variable.name] - GLOBAL_BASE
        for offset, symbol in variable.symbols:
            address = np.uint64(symbols[symbol.name] + symbol.offset)
            self._memory.data[start + offset : start + offset + 8] = np.frombuffer(address.tobytes(), np.uint8)

    def _allocate(
        self, shape: Sequence[int], strides: Sequence[int], dtype: np.dtype, name: str | None, phase: int
    ) -> DeviceArray:
        dtype = np.dtype(dtype)
        if dtype.hasobject:
            raise InvalidLaunch(f"dtype = {dtype}: must not hold Python objects")
        if name is None:
            self._unnamed += 1
            name = f"array {self._unnamed}"
        reach = [(n - 1) * s for n, s in zip(shape, strides, strict=True)]
        low = sum(min(r, 0) for r in reach)
        high = sum(max(r, 0) for r in reach) + dtype.itemsize
        empty = 0 in shape
        allocation = self._memory.allocate(0 if empty else high - low, name, 0 if empty else (phase + low) % 256)
        array = DeviceArray(self, allocation, allocation.start - (0 if empty else low), shape, strides, dtype, name)
        if not empty:
            self._memory.data[allocation.start : allocation.start + allocation.size] = POISON
            array._bytes(self._memory.state)[...] = OWNED
        return array


class Module:
    """A PTX module loaded on a device.

    Attributes
    ----------
    kernels : names of the kernels
    """

    def __init__(self, device: Device, ptx: str) -> None:
        self.device = device
        self._library = library(ptx)
        self.kernels = tuple(self._library.entries)
        self._symbols = {v.name: device._place(v) for v in self._library.variables}
        for variable in self._library.variables:
            device._link(variable, self._symbols)

    def kernel(self, name: str) -> Kernel:
        """A kernel by its name in the PTX."""
        if name not in self._library.entries:
            raise InvalidLaunch(
                f"kernel = {name!r}: must be one of {', '.join(self.kernels) or '(this module has none)'}"
            )
        return Kernel(self, self._library.entries[name])


class Kernel:
    """A kernel that can be launched.

    Attributes
    ----------
    name : as in the PTX
    static_shared_bytes : shared memory that the kernel declares itself
    maxntid : the largest block (x, y, z) it was compiled for, or None
    param_sizes : bytes of each parameter
    """

    def __init__(self, module: Module, entry: Entry) -> None:
        self._module, self._entry = module, entry
        function = entry.function
        self.name, self.maxntid = function.name, function.maxntid or function.reqntid
        self.static_shared_bytes = entry.static_shared
        self.param_sizes = tuple(p.size for p in function.params)

    def launch(
        self, grid: int | Sequence[int], block: int | Sequence[int], args: Sequence[object], shared_bytes: int = 0
    ) -> LaunchReport:
        """Run the kernel to its end.

        Parameters
        ----------
        grid, block : int or up to three ints
        args : one per parameter: a DeviceArray, or a NumPy scalar or record of the parameter's size
        shared_bytes : dynamic shared memory of a block

        Raises
        ------
        InvalidLaunch for what a device would refuse; any other EmulatorFault for what the program does.
        """
        device = self._module.device
        grid, block = _triple("grid", grid, archs.MAX_GRID), _triple("block", block, archs.MAX_BLOCK)
        self._check_limits(block, shared_bytes)
        parameters = Parameters(self._pack(args))
        entry, threads = self._entry, block[0] * block[1] * block[2]
        counters = Counters(device._memory, entry.translation)
        launch = Launch(
            translation=entry.translation,
            symbols={name: np.uint64(address) for name, address in self._module._symbols.items()},
            grid=grid,
            block=block,
            parameters=parameters,
            memory=device._memory,
            writers=GlobalWriters(
                entry.translation.global_granule, len(device._memory.data), device.check_races, prod(grid)
            ),
            counters=counters,
            static_shared=entry.dynamic_start if shared_bytes else entry.static_shared,
            dynamic_shared=shared_bytes,
            local_size=entry.local_size,
            check_races=device.check_races,
            late_copies=device.copies == "late",
            warp_order=device.warp_order,
        )
        batch = max(1, BATCH_THREADS // (-(-threads // 32) * 32))
        for first in range(0, prod(grid), batch):
            Machine(launch, first, min(batch, prod(grid) - first)).run()
        return counters.report(self.name, grid, block, launch.static_shared + shared_bytes)

    def _check_limits(self, block: tuple[int, int, int], shared_bytes: int) -> None:
        if prod(block) > archs.MAX_THREADS:
            raise InvalidLaunch(f"block = {block}: must have at most {archs.MAX_THREADS} threads")
        if self.maxntid is not None and prod(block) > prod(self.maxntid):
            raise InvalidLaunch(
                f"block = {block}: kernel {self.name} was compiled for at most {prod(self.maxntid)} threads"
            )
        required = self._entry.function.reqntid
        if required is not None and block != required:
            raise InvalidLaunch(f"block = {block}: kernel {self.name} requires {required}")
        arch, static = self._module.device.arch, self.static_shared_bytes
        if shared_bytes < 0:
            raise InvalidLaunch(f"shared_bytes = {shared_bytes}: must be >= 0")
        if self._entry.dynamic_start + shared_bytes > arch.shared_per_block:
            raise InvalidLaunch(
                f"shared_bytes = {shared_bytes}: with {static} static bytes must be at most {arch.shared_per_block} "
                f"on {arch.name}"
            )

    def _pack(self, args: Sequence[object]) -> bytes:
        params = self._entry.function.params
        if len(args) != len(params):
            raise InvalidLaunch(f"args has {len(args)} values: kernel {self.name} takes {len(params)}")
        data = bytearray()
        for number, (arg, param) in enumerate(zip(args, params, strict=True)):
            if isinstance(arg, DeviceArray):
                if arg._device is not self._module.device:
                    raise InvalidLaunch(f"args[{number}] = {arg}: lives on another device")
                value = arg.pointer.to_bytes(8, "little")
            elif isinstance(arg, (np.generic, np.ndarray)) and np.size(arg) == 1:
                value = np.asarray(arg).tobytes()
            else:
                raise InvalidLaunch(f"args[{number}] = {arg!r}: must be a DeviceArray or a NumPy scalar or record")
            if len(value) != param.size:
                raise InvalidLaunch(
                    f"args[{number}] has {len(value)} bytes: parameter {number} of {self.name} has {param.size}"
                )
            data += bytes(-len(data) % param.align) + value
        return bytes(data)


def _triple(name: str, value: int | Sequence[int], limits: tuple[int, int, int]) -> tuple[int, int, int]:
    parts = (value,) if isinstance(value, (int, np.integer)) else tuple(value)
    parts = tuple(int(x) for x in parts) + (1,) * (3 - len(parts))
    if len(parts) != 3 or any(not 1 <= p <= most for p, most in zip(parts, limits, strict=True)):
        raise InvalidLaunch(f"{name} = {value}: must be up to three numbers from 1 to {limits}")
    return parts[0], parts[1], parts[2]


def _contiguous(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    strides, step = [], itemsize
    for n in reversed(tuple(shape)):
        strides.append(step)
        step *= max(1, n)
    return tuple(reversed(strides))


def _phase(array: np.ndarray) -> int:
    """Distance of an array's first element from the start of the buffer it is a view of."""
    owner = array
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    return array.__array_interface__["data"][0] - owner.__array_interface__["data"][0]
