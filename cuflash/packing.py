"""Sequence lengths of packed (varlen) problems: checked where the host can read them, else clamped by the kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from cuflash.arrays import kind_of
from cuflash.check import Packing, whole_number
from cuflash.device import Device, check_placed
from cuflash.errors import InvalidDtypeError, InvalidShapeError, InvalidTypeError, InvalidValueError
from cuflash.layout import NativeArray


class Lengths(NamedTuple):
    """Where each sequence begins and ends: cu_seqlens (batch + 1,), int64 on the host, any integer on a GPU."""

    packing: Packing
    cu_seqlens_q: NativeArray
    cu_seqlens_k: NativeArray


class Side(NamedTuple):
    """Offsets of the sequences of one packed axis."""

    cu_seqlens: NativeArray
    max_seqlen: int  # bound of the lengths


def take_lengths(
    device: Device | None,
    cu_seqlens: tuple[Any, Any],
    max_seqlens: tuple[int | None, int | None],
    totals: tuple[int, int],
    biased: tuple[bool, bool],
) -> Lengths:
    """Checked lengths of the queries and the keys; `totals` are the tokens of q and k, `biased` the axes of a bias."""
    sides = [
        take_side(device, side, *arguments)
        for side, *arguments in zip("qk", cu_seqlens, max_seqlens, totals, biased, strict=True)
    ]
    (cu_q, max_q), (cu_k, max_k) = sides
    if cu_k.shape != cu_q.shape:
        raise InvalidShapeError(f"cu_seqlens_k.shape = {cu_k.shape}: must be {cu_q.shape}, that of cu_seqlens_q")
    return Lengths(Packing(cu_q.shape[0] - 1, max_q, max_k), cu_q, cu_k)


def take_side(device: Device | None, side: str, value: Any, max_seqlen: int | None, total: int, biased: bool) -> Side:
    """Checked offsets of the queries ("q") or keys ("k") of `total` tokens; `biased`: a bias has an axis along them."""
    name = f"cu_seqlens_{side}"
    array = _native(name, value)
    if array.ndim != 1 or array.shape[0] < 1:
        raise InvalidShapeError(f"{name}.shape = {array.shape}: must be (batch + 1,)")
    if array.dtype.kind not in "iu":
        raise InvalidDtypeError(f"{name}.dtype = {array.dtype}: must be an integer dtype")
    bound = None if max_seqlen is None else whole_number(f"max_seqlen_{side}", max_seqlen)
    if type(array) is not np.ndarray:
        check_placed(device, name, array)
        if bound is None and biased:
            raise InvalidValueError(
                f"max_seqlen_{side} = None: must be given, since {name} is on the GPU and bias has an axis along {side}"
            )
        return Side(array, total if bound is None else min(bound, total))
    array = array.astype(np.int64)
    longest = _check_values(name, array, side, total)
    if bound is not None and bound < longest:
        raise InvalidValueError(f"max_seqlen_{side} = {bound}: must be at least {longest}, the longest of {name}")
    return Side(array, longest if bound is None else bound)


def _native(name: str, value: Any) -> NativeArray:
    if not isinstance(value, tuple | list | range):
        return kind_of(value, name).take(value, name)
    try:
        return np.asarray(value) if value else np.zeros(0, np.int64)
    except ValueError as error:
        raise InvalidTypeError(f"{name} = {value}: must be a flat sequence of integers or an array") from error


def _check_values(name: str, cu_seqlens: np.ndarray, side: str, total: int) -> int:
    """The longest sequence of offsets that the host can read."""
    if cu_seqlens[0] != 0:
        raise InvalidValueError(f"{name}[0] = {cu_seqlens[0]}: must be 0")
    lengths = np.diff(cu_seqlens)
    if lengths.size and lengths.min() < 0:
        i = int(np.argmax(lengths < 0)) + 1
        raise InvalidValueError(f"{name}[{i}] = {cu_seqlens[i]}: must be >= {name}[{i - 1}] = {cu_seqlens[i - 1]}")
    if cu_seqlens[-1] > total:
        raise InvalidValueError(f"{name}[-1] = {cu_seqlens[-1]}: must be at most {total}, the tokens of {side}")
    return int(lengths.max(initial=0))
