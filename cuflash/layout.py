"""Where the elements of native arrays lie, NumPy on the host and CuPy on a GPU: strides, alignment, overlap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from cuflash.errors import InvalidValueError

NativeArray = Any  # numpy.ndarray or cupy.ndarray
ALIGNMENT = 16  # bytes of the widest access of a kernel
MAX_OVERLAP_WORK: Any = 100_000  # candidates that NumPy tries before it gives up on whether two layouts share elements


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

    def with_token_axis(self) -> Layout:
        """The layout of the view [:, None]."""
        (batch, *shape), (stride, *strides) = self.shape, self.strides
        return self._replace(shape=(batch, 1, *shape), strides=(stride, 0, *strides))

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
    address: int = array.data.ptr
    return address


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
