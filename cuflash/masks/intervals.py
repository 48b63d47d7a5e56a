"""Operations on intervals [low, high] of values, on arrays of them.

A truth's interval is a pair of truths: low says that it is surely true, high that it is not surely false. A real
whose bounds are NaN may be anything, NaN included; no other interval of reals holds NaN. Certainty takes positive
evidence, so that NaN never decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from itertools import product
from typing import Any

import numpy as np

from cuflash.masks.tables import Table

Interval = tuple[Any, Any]  # arrays that broadcast; whole numbers may be int64 or Python's (dtype object)
MAX_RANGED = 2**22  # elements of a table whose blocks are bounded; a larger one is bounded along one axis only


def _reals(low: Any, high: Any) -> Interval:
    """Bounds as computed, or NaN where they hide a NaN: that of inf - inf, 0·inf, inf / inf."""
    if getattr(low, "dtype", None) != np.float64:
        return low, high
    anything = np.isnan(low) | np.isnan(high) | (np.isneginf(low) & np.isposinf(high))
    return np.where(anything, np.nan, low), np.where(anything, np.nan, high)


def _add(a: Interval, b: Interval) -> Interval:
    return _reals(a[0] + b[0], a[1] + b[1])


def _sub(a: Interval, b: Interval) -> Interval:
    return _reals(a[0] - b[1], a[1] - b[0])


def _corners(function: Callable[[Any, Any], Any]) -> Callable[[Interval, Interval], Interval]:
    """Of a function that is monotone in each argument while the other is fixed."""

    def bounds(a: Interval, b: Interval) -> Interval:
        values = [function(x, y) for x in a for y in b]
        low, high = values[0], values[0]
        for value in values[1:]:
            low, high = np.minimum(low, value), np.maximum(high, value)
        return _reals(low, high)

    return bounds


def _negative(a: Interval) -> Interval:
    return -a[1], -a[0]


def _absolute(a: Interval) -> Interval:
    return np.maximum(np.maximum(a[0], -a[1]), 0), np.maximum(a[1], -a[0])


def _minimum(a: Interval, b: Interval) -> Interval:
    return np.minimum(a[0], b[0]), np.minimum(a[1], b[1])


def _maximum(a: Interval, b: Interval) -> Interval:
    return np.maximum(a[0], b[0]), np.maximum(a[1], b[1])


def _floor_mod(a: Interval, b: Interval) -> Interval:
    """The divisor is positive; a remainder that does not wrap within the interval keeps its bounds."""
    kept = (b[0] == b[1]) & (a[0] // b[1] == a[1] // b[1])
    kept |= (a[0] >= 0) & (a[1] < b[0])
    below = np.where(a[0] >= 0, np.minimum(a[1], b[1] - 1), b[1] - 1)
    return np.where(kept, a[0] % b[1], 0), np.where(kept, a[1] % b[1], below)


def _quotient(a: Interval, b: Interval) -> Interval:
    safe = (b[0] > 0) | (b[1] < 0)
    low, high = _corners(np.divide)(a, b)
    return np.where(safe, low, np.nan), np.where(safe, high, np.nan)


def _filled(x: Any) -> Any:
    """The least 2^n - 1 that is >= x >= 0, -1 of a negative number."""
    for shift in (1, 2, 4, 8, 16, 32):
        x = x | (x >> shift)
    return x


def _bitwise(function: Callable[[Any, Any], Any]) -> Callable[[Interval, Interval], Interval]:
    """From the bits that are the same in all values of an operand, above the highest bit that is not.

    Bounds of operands that may have either sign follow from the number of bits alone.
    """

    def bounds(a: Interval, b: Interval) -> Interval:
        varying = _filled(a[0] ^ a[1]), _filled(b[0] ^ b[1])
        zeros, ones = [x[0] & ~v for x, v in zip((a, b), varying, strict=True)], [a[0] | varying[0], b[0] | varying[1]]
        if function is np.bitwise_xor:
            either = varying[0] | varying[1]
            low, high = (a[0] ^ b[0]) & ~either, (a[0] ^ b[0]) | either
        else:
            low, high = function(*zeros), function(*ones)
        bits = _filled(np.maximum(np.maximum(a[1], ~a[0]), np.maximum(b[1], ~b[0])))
        known = (varying[0] >= 0) & (varying[1] >= 0)
        return np.where(known, low, ~bits), np.where(known, high, bits)

    return bounds


def _less(a: Interval, b: Interval) -> Interval:
    return a[1] < b[0], ~(a[0] >= b[1])


def _less_equal(a: Interval, b: Interval) -> Interval:
    return a[1] <= b[0], ~(a[0] > b[1])


def _equal(a: Interval, b: Interval) -> Interval:
    return (a[0] == a[1]) & (b[0] == b[1]) & (a[0] == b[0]), ~((a[1] < b[0]) | (b[1] < a[0]))


def _logical_not(a: Interval) -> Interval:
    return ~a[1], ~a[0]


def _not_equal(a: Interval, b: Interval) -> Interval:
    return _logical_not(_equal(a, b))


def _logical_and(a: Interval, b: Interval) -> Interval:
    return a[0] & b[0], a[1] & b[1]


def _logical_or(a: Interval, b: Interval) -> Interval:
    return a[0] | b[0], a[1] | b[1]


def _logical_xor(a: Interval, b: Interval) -> Interval:
    known = (a[0] == a[1]) & (b[0] == b[1])
    return known & (a[0] ^ b[0]), ~known | (a[0] ^ b[0])


def _choose(c: Interval, a: Interval, b: Interval) -> Interval:
    low = np.where(c[0], a[0], np.where(c[1], np.minimum(a[0], b[0]), b[0]))
    high = np.where(c[0], a[1], np.where(c[1], np.maximum(a[1], b[1]), b[1]))
    return _reals(low, high)


def _to_real(a: Interval) -> Interval:
    return np.asarray(a[0], np.float64), np.asarray(a[1], np.float64)


def _to_whole(a: Interval) -> Interval:
    return np.asarray(a[0], np.int64), np.asarray(a[1], np.int64)


INTERVALS: Mapping[str, Callable[..., Interval]] = {
    "add": _add, "sub": _sub, "mul": _corners(np.multiply), "negative": _negative, "absolute": _absolute,
    "minimum": _minimum, "maximum": _maximum, "floor_div": _corners(np.floor_divide), "floor_mod": _floor_mod,
    "quotient": _quotient, "shift_left": _corners(np.left_shift), "shift_right": _corners(np.right_shift),
    "bit_and": _bitwise(np.bitwise_and), "bit_or": _bitwise(np.bitwise_or), "bit_xor": _bitwise(np.bitwise_xor),
    "less": _less, "less_equal": _less_equal, "equal": _equal, "not_equal": _not_equal, "logical_and": _logical_and,
    "logical_or": _logical_or, "logical_xor": _logical_xor, "logical_not": _logical_not, "choose": _choose,
    "to_real": _to_real, "to_whole": _to_whole,
}  # fmt: skip


def lookup(table: Table, indices: Sequence[Interval]) -> Interval:
    """Bounds of table[i0, i1, ...] over intervals of indices, which lie within the table."""
    array = table.array
    while indices and indices[0][0].size == 1 and indices[0][0].item() == indices[0][1].item():
        array, indices = array[indices[0][0].item()], indices[1:]
    varying = [bool((low != high).any()) for low, high in indices]
    if table.ascending and not any(varying[:-1]) and indices:
        first = tuple(low for low, _ in indices[:-1])
        bounds = (array[(*first, indices[-1][0])], array[(*first, indices[-1][1])])
    elif sum(varying) > 1 and array.size > MAX_RANGED:
        return _anything(table)
    elif indices:
        bounds = (_extreme(array, indices, np.minimum), _extreme(array, indices, np.maximum))
    else:
        bounds = (array, array)
    if table.kind == "truth":
        return np.asarray(bounds[0], bool), np.asarray(bounds[1], bool)
    low, high = (np.asarray(bound, np.int64 if table.kind == "whole" else np.float64) for bound in bounds)
    return _reals(low, high)


def _anything(table: Table) -> Interval:
    """What bounds every element."""
    if table.kind == "truth":
        return np.zeros(1, bool), np.ones(1, bool)
    if table.kind == "real":
        return np.full(1, np.nan), np.full(1, np.nan)
    low, high = table.limits
    return np.array([low]), np.array([high])


def _extreme(table: np.ndarray, indices: Sequence[Interval], function: np.ufunc) -> np.ndarray:
    """The extreme element of each block of a table.

    A range of n elements is covered by two of 2^j <= n that may overlap; the extremes of all ranges of 2^j follow
    from those of 2^(j - 1). So axis by axis, for each power of two that occurs.
    """
    shape = np.broadcast_shapes(*(low.shape for low, _ in indices))
    lows, highs = ([np.broadcast_to(side, shape) for side in sides] for sides in zip(*indices, strict=True))
    powers = [np.frexp(high - low + 1)[1] - 1 for low, high in zip(lows, highs, strict=True)]
    result: np.ndarray = np.empty(shape, table.dtype)
    for chosen in product(*(np.unique(power).tolist() for power in powers)):
        where = np.logical_and.reduce([power == j for power, j in zip(powers, chosen, strict=True)])
        if where.any():
            ranges = table
            for axis, j in enumerate(chosen):
                ranges = _ranges(ranges, axis, j, function)
            # The first and the last range of 2^j elements, along each axis.
            ends = [
                (low[where], high[where] - 2**j + 1) if j else (low[where],)
                for low, high, j in zip(lows, highs, chosen, strict=True)
            ]
            result[where] = reduce(function, [ranges[corner] for corner in product(*ends)])
    return result


def _ranges(table: np.ndarray, axis: int, j: int, function: np.ufunc) -> np.ndarray:
    """The extremes of all ranges of 2^j elements along an axis."""
    ranges = np.moveaxis(table, axis, 0)
    for half in (2**i for i in range(j)):
        ranges = function(ranges[:-half], ranges[half:])
    return np.moveaxis(ranges, 0, axis)
