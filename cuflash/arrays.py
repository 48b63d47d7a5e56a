"""Arrays as callers have them: NumPy, CuPy, or any producer of DLPack. Nothing is copied on the way in or out.

Inside of cuflash an array is native: a `numpy.ndarray` (host) or a `cupy.ndarray` (GPU). `gather` turns the
arguments of one call into native arrays and tells their kind; `Kind.give` turns a result into the caller's kind.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from cuflash import dlpack
from cuflash.errors import DeviceError, InvalidTypeError, InvalidValueError

NativeArray = Any  # numpy.ndarray or cupy.ndarray
ALIGNMENT = 16  # bytes of the widest access of a kernel
MAX_OVERLAP_WORK: Any = 100_000  # candidates that NumPy tries before it gives up on whether two layouts share elements


class Kind(NamedTuple):
    """One kind of array.

    take turns a caller's array (and the name of the argument) into a native one, give a native array into the
    caller's kind; both share memory with what they are given.
    """

    name: str
    take: Callable[[Any, str], NativeArray]
    give: Callable[[NativeArray], Any]


class Layout(NamedTuple):
    """Where the elements of an array lie, but for its address: what a plan depends on."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]  # bytes
    dtype: np.dtype
    misalignment: int  # address modulo ALIGNMENT

    @property
    def rows_contiguous(self) -> bool:
        """Whether neighbours along the last axis are neighbours in memory."""
        return self.shape[-1] <= 1 or self.strides[-1] == self.dtype.itemsize

    def contiguous(self) -> Layout:
        """The layout of a fresh C-contiguous copy."""
        return Layout(self.shape, contiguous_strides(self.shape, self.dtype.itemsize), self.dtype, 0)


def contiguous_strides(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Strides in bytes of a C-contiguous array; those of itemsize 1 are in elements."""
    strides = []
    for size in reversed(shape):
        strides.append(itemsize)
        itemsize *= max(size, 1)
    return tuple(reversed(strides))


def address(array: NativeArray) -> int:
    """Address of the first element."""
    if type(array) is np.ndarray:
        return int(array.__array_interface__["data"][0])
    return int(array.data.ptr)


def layout(array: NativeArray) -> Layout:
    return Layout(array.shape, array.strides, array.dtype, address(array) % ALIGNMENT)


def check_separate(out: NativeArray, names: Sequence[str], inputs: Sequence[NativeArray | None]) -> None:
    """`out` must be writeable and share no element with an input; slices of one buffer may interleave."""
    if type(out) is np.ndarray and not out.flags.writeable:
        raise InvalidValueError("out is read-only: must be writeable")
    first, last = _span(out)
    for name, array in zip(names, inputs, strict=True):
        if array is None:
            continue
        begin, end = _span(array)
        if begin < last and first < end and _share_elements(out, array):
            raise InvalidValueError(f"out overlaps {name}: must not share memory with it")


def _span(array: NativeArray) -> tuple[int, int]:
    """Addresses [begin, end) that the elements lie in; empty for an array without elements."""
    begin = end = address(array)
    if array.size:
        for size, stride in zip(array.shape, array.strides, strict=True):
            if stride < 0:
                begin += (size - 1) * stride
            else:
                end += (size - 1) * stride
        end += array.dtype.itemsize
    return begin, end


class _Addresses:
    """The addresses of an array as an object from which NumPy makes an array that nobody reads: GPU memory too."""

    def __init__(self, array: NativeArray) -> None:
        self.__array_interface__ = {
            "version": 3,
            "data": (address(array), True),
            "shape": array.shape,
            "strides": array.strides,
            "typestr": f"|V{array.dtype.itemsize}",
        }


def _share_elements(a: NativeArray, b: NativeArray) -> bool:
    """Exact for every layout that occurs; one whose answer is too hard to find counts as sharing."""
    try:
        return np.shares_memory(np.asarray(_Addresses(a)), np.asarray(_Addresses(b)), max_work=MAX_OVERLAP_WORK)
    except np.exceptions.TooHardError:
        return True


def gather(names: Sequence[str], values: Sequence[Any]) -> tuple[Kind, list[NativeArray]]:
    """The kind that all arrays share and the native arrays, None where an argument is None. The first is required.

    Raises InvalidTypeError where a value is no array or of another kind than the first, DeviceError where its device
    is out of reach.
    """
    kind = kind_of(values[0], names[0])
    native: list[NativeArray] = []
    for name, value in zip(names, values, strict=True):
        if value is None:
            native.append(None)
            continue
        if kind_of(value, name) is not kind:
            raise InvalidTypeError(
                f"{name} is a {type_name(value)}: must be the same kind of array as {names[0]}, "
                f"a {type_name(values[0])}"
            )
        native.append(kind.take(value, name))
    return kind, native


def type_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


_kinds: dict[type, Kind] = {}  # by the type of the array
_dlpack_kinds: dict[str, Kind] = {}  # by the package that the type comes from


def kind_of(value: object, name: str) -> Kind:
    """The kind of an array; `name` is the argument that an error names."""
    kind = _kinds.get(type(value))
    if kind is None:
        kind = _kinds[type(value)] = _new_kind(value, name)
    return kind


def _new_kind(value: object, name: str) -> Kind:
    package = type(value).__module__.partition(".")[0]
    if isinstance(value, np.ma.MaskedArray | np.matrix):
        raise InvalidTypeError(f"{name} is a {type_name(value)}: must be a plain array")
    if isinstance(value, np.ndarray):
        return NUMPY
    if package == "cupy" and hasattr(type(value), "__cuda_array_interface__"):
        return CUPY
    if not hasattr(type(value), "__dlpack__"):
        raise InvalidTypeError(
            f"{name} is a {type_name(value)}: must be a NumPy or CuPy array or one that implements __dlpack__"
        )
    if package not in _dlpack_kinds:
        _dlpack_kinds[package] = Kind(package, _take_dlpack, _importer(value, package, name))
    return _dlpack_kinds[package]


def _importer(value: Any, package: str, name: str) -> Callable[[NativeArray], Any]:
    """How a native array becomes one of the framework of `value`: its namespace's or its package's from_dlpack."""
    namespace: Any = sys.modules.get(package)
    if hasattr(value, "__array_namespace__"):
        namespace = value.__array_namespace__()
    if not hasattr(namespace, "from_dlpack"):
        raise InvalidTypeError(
            f"{name} is a {type_name(value)}: must come from a package with from_dlpack, to return the result with"
        )
    return lambda array: namespace.from_dlpack(dlpack.exportable(array))


def _take_dlpack(value: Any, name: str) -> NativeArray:
    if getattr(value, "requires_grad", False):
        raise InvalidTypeError(f"{name} requires grad: must not, since no gradient flows back; pass {name}.detach()")
    try:
        device_type, device_id = value.__dlpack_device__()
        if device_type == dlpack.CPU:
            return dlpack.as_numpy(value)
    except (AttributeError, BufferError, RuntimeError, TypeError, ValueError) as error:
        raise InvalidTypeError(
            f"{name} is a {type_name(value)}: must be a concrete array that DLPack can export ({error})"
        ) from error
    if device_type not in dlpack.GPU:
        raise DeviceError(f"{name} is on DLPack device {(int(device_type), device_id)}: must be on a CPU or a CUDA GPU")
    try:
        from cuflash.device.cuda import from_dlpack
    except ImportError as error:
        raise DeviceError(
            f"{name} is on a GPU: must be on the CPU, or install the extra for its CUDA version, "
            "cuflash[cu12] or cuflash[cu13]"
        ) from error
    return from_dlpack(value, name)


def _same(array: NativeArray) -> NativeArray:
    return array


NUMPY = Kind("numpy", lambda array, name: array if type(array) is np.ndarray else np.asarray(array), _same)
CUPY = Kind("cupy", lambda array, name: array, _same)
