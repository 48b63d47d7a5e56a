"""Arrays as callers have them: NumPy, CuPy, or any producer of DLPack. Nothing is copied on the way in or out.

Inside of cuflash an array is native: a `numpy.ndarray` (host) or a `cupy.ndarray` (GPU). `gather` turns the
arguments of one call into native arrays and tells their kind; `Kind.give` turns a result into the caller's kind.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from cuflash import dlpack
from cuflash.device import Device, current
from cuflash.errors import DeviceError, InvalidTypeError, InvalidValueError, type_name
from cuflash.layout import NativeArray


class Kind(NamedTuple):
    """One kind of array.

    take turns a caller's array (and the name of the argument) into a native one, give a native array into the
    caller's kind; both share memory with what they are given.
    """

    name: str
    take: Callable[[Any, str], NativeArray]
    give: Callable[[NativeArray], Any]


def gather(
    names: Sequence[str], values: Sequence[Any], optional: Sequence[str] = ()
) -> tuple[Kind, list[NativeArray | None]]:
    """The kind that all arrays share and the native arrays, None for those optional ones that are None.

    Raises InvalidTypeError where a value is no array or of another kind than the first, DeviceError where its device
    is out of reach.
    """
    first, kind = type(values[0]), kind_of(values[0], names[0])
    native: list[NativeArray | None] = []
    for name, value in zip(names, values, strict=True):
        if value is None and name in optional:
            native.append(None)
            continue
        if type(value) is not first and kind_of(value, name) is not kind:
            raise InvalidTypeError(
                f"{name} is a {type_name(value)}: must be the same kind of array as {names[0]}, "
                f"a {type_name(values[0])}"
            )
        native.append(kind.take(value, name))
    return kind, native


_kinds: dict[type, Kind] = {}  # by the type of the array
_dlpack_kinds: dict[Any, Kind] = {}  # by the namespace that the type comes from


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
    namespace: Any = sys.modules.get(package)
    if hasattr(value, "__array_namespace__"):
        namespace = value.__array_namespace__()
    if not hasattr(namespace, "from_dlpack"):
        raise InvalidTypeError(
            f"{name} is a {type_name(value)}: must come from a package with from_dlpack, to return the result with"
        )
    if namespace not in _dlpack_kinds:
        give = namespace.from_dlpack
        _dlpack_kinds[namespace] = Kind(package, _take_dlpack, lambda array: give(dlpack.exportable(array)))
    return _dlpack_kinds[namespace]


def _take_dlpack(value: Any, name: str) -> NativeArray:
    if name == "out" and type(value).__module__.startswith("jax"):  # DLPack does not say so for memory on a GPU
        raise InvalidValueError(f"out is a {type_name(value)}: must be writeable, which JAX arrays are not")
    if getattr(value, "requires_grad", False):
        raise InvalidTypeError(f"{name} requires grad: must not, since no gradient flows back; pass {name}.detach()")
    if hasattr(value, "is_neg") and value.is_neg():  # torch negates such a view as it reads; DLPack does not say so
        raise InvalidValueError(f"{name} is a negated view: must be resolved; pass {name}.resolve_neg()")
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
    return _gpu(name).from_dlpack(value, name)


def _same(array: NativeArray) -> NativeArray:
    return array


NUMPY = Kind("numpy", lambda array, name: array if type(array) is np.ndarray else np.asarray(array), _same)
CUPY = Kind("cupy", lambda array, name: array, _same)


def give(kind: Kind, out: Any, result: NativeArray, lse: NativeArray | None) -> Any:
    """What the caller gets. A result in `out` is given all the same: that orders the caller's stream after ours."""
    returned = kind.give(result)
    if out is not None:
        returned = out
    return returned if lse is None else (returned, kind.give(lse))


def device_of(kind: Kind, names: Sequence[str], arrays: Sequence[NativeArray | None]) -> Device | None:
    """The device that takes these native arrays; None is the CPU executor.

    Raises DeviceError where they do not lie on one device.
    """
    emulator = current.get()
    if emulator is not None:
        if kind is not NUMPY:
            raise DeviceError(f"{names[0]} is of kind {kind.name}: must be a NumPy array within cuflash.emulate")
        return emulator
    on_host = type(arrays[0]) is np.ndarray
    for name, array in zip(names, arrays, strict=True):
        if array is not None and (type(array) is np.ndarray) != on_host:
            places = ("a GPU", "the host") if on_host else ("the host", "a GPU")
            raise DeviceError(f"{name} is on {places[0]}: must be on {places[1]}, as {names[0]} is")
    if on_host:
        return None
    device: Device = _gpu(names[0]).gpu_of(names, arrays)
    return device


def _gpu(name: str) -> ModuleType:
    """The module that imports CuPy, once it is needed for an argument."""
    try:
        return _import_gpu()
    except ImportError as error:
        raise DeviceError(
            f"{name} is on a GPU: must be on the CPU, or install the extra for its CUDA version, "
            "cuflash[cu12] or cuflash[cu13]"
        ) from error


@cache
def _import_gpu() -> ModuleType:
    from cuflash.device import cuda

    return cuda
