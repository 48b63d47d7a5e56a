"""The few places where array modules differ."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from cuflash.errors import InvalidTypeError

Array = Any  # of NumPy, CuPy, torch, JAX or whatever else has their functions


def namespace(**arrays: Array) -> ModuleType:
    """The module whose functions take these arrays; all must come from one."""
    modules = {name: _module(name, array) for name, array in arrays.items()}
    (first, xp), *others = modules.items()
    for name, other in others:
        if other is not xp:
            raise InvalidTypeError(
                f"{name} is an array of {other.__name__}: must be of {xp.__name__}, the module of {first}"
            )
    return xp


def _module(name: str, array: Array) -> Any:
    if hasattr(array, "__array_namespace__"):
        return array.__array_namespace__()
    module = sys.modules[type(array).__module__.partition(".")[0]]
    if not (hasattr(array, "dtype") and hasattr(module, "matmul")):
        raise InvalidTypeError(f"{name} = {type(array)}: must be an array of NumPy, CuPy, torch or JAX")
    return module


def cast(array: Array, dtype: Any) -> Array:
    return array.astype(dtype) if hasattr(array, "astype") else array.to(dtype)


def zeros(xp: ModuleType, shape: tuple[int, ...], dtype: Any, like: Array) -> Array:
    return xp.zeros(shape, dtype=dtype, **_device(xp, like))


def positions(xp: ModuleType, chunk: slice, like: Array) -> Array:
    """chunk.start, ..., chunk.stop - 1."""
    return xp.arange(chunk.start, chunk.stop, **_device(xp, like))


def _device(xp: ModuleType, like: Array) -> dict[str, Any]:
    return {"device": like.device} if xp.__name__ == "torch" else {}


def put(array: Array, index: tuple, value: Array) -> Array:
    """array[index] = value, in place where the module can; returns the array to go on with."""
    if hasattr(array, "at"):
        return array.at[index].set(value)
    array[index] = value
    return array


def add(array: Array, index: tuple, value: Array) -> Array:
    """array[index] += value, as `put`."""
    if hasattr(array, "at"):
        return array.at[index].add(value)
    array[index] += value
    return array


def row_max(xp: ModuleType, s: Array) -> Array:
    """Maxima along the last axis, kept; -inf for an empty row."""
    if s.shape[-1] == 0:
        return s.sum(-1)[..., None] - xp.inf
    return xp.amax(s, -1)[..., None]


def finite(xp: ModuleType, m: Array) -> Array:
    """m, 0 where it is -inf: the exponent exp(s - finite(m)) of a row that sees nothing is then -inf, not NaN."""
    return xp.where(m == -xp.inf, 0.0, m)
