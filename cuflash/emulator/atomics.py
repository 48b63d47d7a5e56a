"""Atomic read-modify-write over lists of places that may repeat: the outcome is that of one lane after the other."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from cuflash.emulator.conversions import bfloat, bfloats, from_bfloats, from_halves, halves, to_bfloat
from cuflash.emulator.floats import flush


def _wrap_up(old: np.ndarray, limit: np.ndarray) -> np.ndarray:
    return np.where(old >= limit, old.dtype.type(0), old + old.dtype.type(1))


def _wrap_down(old: np.ndarray, limit: np.ndarray) -> np.ndarray:
    return np.where((old == 0) | (old > limit), limit, old - old.dtype.type(1))


def _swap(old: np.ndarray, compare: np.ndarray, value: np.ndarray) -> np.ndarray:
    return np.where(old == compare, value, old)


def _flushed_add(old: np.ndarray, value: np.ndarray) -> np.ndarray:
    return flush(flush(old) + flush(value))


def _bfloat_add(old: np.ndarray, value: np.ndarray) -> np.ndarray:
    return to_bfloat(bfloat(old) + bfloat(value))


def _pair_add(t: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    if t == "f16x2":
        return lambda old, value: from_halves(halves(old) + halves(value))
    return lambda old, value: from_bfloats(bfloats(old) + bfloats(value))


OPERATIONS: dict[str, Callable[..., np.ndarray]] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, value: value,
    "cas": _swap,
    "inc": _wrap_up,
    "dec": _wrap_down,
}


def apply_atomic(view: np.ndarray, index: np.ndarray, operation: str, values: tuple, t: str) -> tuple[np.ndarray, bool]:
    """Apply an operation at view[index[k]] for k = 0, 1, ... in this order.

    Returns what each found there, and whether any of them changed something.

    view : memory as one array of elements; index, values : (n,).
    """
    function = OPERATIONS[operation]
    if t == "bf16":
        function = _bfloat_add
    elif t == "f32.ftz":
        function = _flushed_add
    elif t in ("f16x2", "bf16x2"):
        function = _pair_add(t)
    order = np.argsort(index, kind="stable")
    places = index[order]
    new_place = np.r_[True, places[1:] != places[:-1]]
    starts = np.flatnonzero(new_place)
    rank = np.arange(len(places)) - np.repeat(starts, np.diff(np.r_[starts, len(places)]))
    found, changed = np.empty(len(places), view.dtype), False
    sorted_values = tuple(v[order] for v in values)
    by_rank = np.argsort(rank, kind="stable")
    edges = np.searchsorted(rank[by_rank], np.arange(rank.max() + 2))
    for begin, end in pairwise(edges):  # the k-th lane at every place, all places together
        turn = by_rank[begin:end]
        old = view[places[turn]]
        found[turn] = old
        new = function(old, *(v[turn] for v in sorted_values))
        changed |= bool((new != old).any())
        view[places[turn]] = new
    result = np.empty_like(found)
    result[order] = found
    return result, changed
