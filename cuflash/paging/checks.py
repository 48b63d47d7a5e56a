"""Checks of what callers give a pool or a cache."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np

from cuflash.errors import InvalidTypeError, InvalidValueError

_INTEGERS = (int, np.integer)


def check_count(name: str, value: Any, least: int = 0) -> None:
    if isinstance(value, bool) or not isinstance(value, _INTEGERS):
        raise InvalidTypeError(f"{name} = {value!r}: must be an integer")
    if value < least:
        raise InvalidValueError(f"{name} = {value}: must be >= {least}")


def take_counts(name: str, value: Any, length: int) -> Sequence[int]:
    """One whole number for each of `length` sequences, from one for all or a sequence of them."""
    if isinstance(value, _INTEGERS):
        check_count(name, value)
        return [int(value)] * length
    numbers = take_integers(name, value)
    if len(numbers) != length:
        raise InvalidValueError(f"{name} has {len(numbers)} entries: must have {length}, as seq_ids has")
    if numbers and min(numbers) < 0:
        raise InvalidValueError(f"{name}[{list(numbers).index(min(numbers))}] = {min(numbers)}: must be >= 0")
    return numbers


def take_integers(name: str, value: Any) -> array[int]:
    """Whole numbers of 64 bits, from any iterable of them."""
    try:
        if isinstance(value, (bytes, bytearray)):  # which an array takes for its memory
            raise TypeError("bytes are none")
        return array("q", value)
    except (TypeError, OverflowError, ValueError) as error:
        raise InvalidTypeError(f"{name} = {value!r}: must be a sequence of integers of 64 bits ({error})") from error
