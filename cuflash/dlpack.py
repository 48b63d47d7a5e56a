"""DLPack for host arrays, bfloat16 included, which NumPy does not know: it travels as uint16 and is renamed.

Layout of the structures: https://dmlc.github.io/dlpack/latest/c_api.html (version 1.0 and the one before versions).
"""

from __future__ import annotations

import ctypes
from typing import Any

import ml_dtypes
import numpy as np

CPU = 1  # kDLCPU
GPU = (2, 13)  # kDLCUDA, kDLCUDAManaged
_UINT, _BFLOAT = 1, 4  # DLDataTypeCode
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class _Tensor(ctypes.Structure):
    """DLTensor up to its dtype."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
    )


# In a versioned capsule four words precede the tensor: version, context, deleter, flags.
_TENSOR_OFFSET = {b"dltensor": 0, b"dltensor_versioned": 32}

_capsule_name = ctypes.pythonapi.PyCapsule_GetName
_capsule_name.restype, _capsule_name.argtypes = ctypes.c_char_p, (ctypes.py_object,)
_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype, _capsule_pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)


def _tensor(capsule: object) -> _Tensor:
    name = _capsule_name(capsule)
    return _Tensor.from_address(_capsule_pointer(capsule, name) + _TENSOR_OFFSET[name])


class _Capsule:
    """A producer of one capsule that is already there."""

    def __init__(self, capsule: object) -> None:
        self._capsule = capsule

    def __dlpack__(self, **_: object) -> object:
        return self._capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return CPU, 0


def as_numpy(producer: Any) -> np.ndarray:
    """A view of the host array that `producer` exports; read-only where it says so or cannot say otherwise."""
    try:
        capsule = producer.__dlpack__(max_version=(1, 0))
    except TypeError:  # a producer from before versions
        capsule = producer.__dlpack__()
    tensor = _tensor(capsule)
    is_bfloat16 = (tensor.code, tensor.bits, tensor.lanes) == (_BFLOAT, 16, 1)
    if is_bfloat16:
        tensor.code = _UINT
    carrier: Any = _Capsule(capsule)
    array = np.from_dlpack(carrier)
    return array.view(_BFLOAT16) if is_bfloat16 else array


class _Bfloat16:
    """A host array of bfloat16 as a producer of DLPack."""

    def __init__(self, array: np.ndarray) -> None:
        self._words = array.view(np.uint16)

    def __dlpack__(self, **keywords: Any) -> object:
        capsule = self._words.__dlpack__(**keywords)
        _tensor(capsule).code = _BFLOAT
        return capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return CPU, 0


def exportable(array: Any) -> Any:
    """The native array itself, or what exports it where NumPy cannot."""
    return _Bfloat16(array) if type(array) is np.ndarray and array.dtype == _BFLOAT16 else array
