"""Masks of positions: causal, windows, documents, prefixes, dilated windows, global tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from cuflash.errors import InvalidDtypeError, InvalidShapeError, InvalidTypeError, InvalidValueError
from cuflash.masks.expression import Expression, as_node
from cuflash.masks.mask import Mask, check_whole, summary
from cuflash.masks.steps import Indices
from cuflash.masks.tables import Axis, Table, is_array, own_array


@dataclass(frozen=True, eq=False, repr=False)
class Causal(Mask):
    """Each query sees the keys up to its own position.

    Examples
    --------
    >>> from cuflash import masks
    >>> masks.Causal().visible(2, 3)[0, 0].astype(int)
    array([[1, 1, 0],
           [1, 1, 1]])
    """

    def _visible(self, at: Indices) -> Expression:
        return at.distance <= 0


@dataclass(frozen=True, eq=False, repr=False)
class SlidingWindow(Mask):
    """Each query sees the keys from `left` before its position to `right` after it.

    Parameters
    ----------
    left, right : int or None
        At least 0; None is unbounded.

    Examples
    --------
    >>> from cuflash import masks
    >>> masks.SlidingWindow(1, 0).visible(3)[0, 0].astype(int)
    array([[1, 0, 0],
           [1, 1, 0],
           [0, 1, 1]])
    """

    left: int | None
    right: int | None

    def __post_init__(self) -> None:
        for name in ("left", "right"):
            if getattr(self, name) is not None:
                set_whole(self, name, 0, " or None")

    def _visible(self, at: Indices) -> Expression:
        return within(at.distance, self.left, self.right)


def within(distance: Expression, left: int | None, right: int | None) -> Expression:
    """-left <= distance <= right, with sides that may be None."""
    visible = Expression(as_node(True))
    if left is not None:
        visible &= -left <= distance
    if right is not None:
        visible &= distance <= right
    return visible


def with_window(mask: Mask, left: int | None, right: int | None) -> Mask:
    """`mask & SlidingWindow(left, right)`, the same object whenever the same mask is asked for the same window."""
    if left is None and right is None:
        return mask
    kept = mask._windowed.get((left, right))
    if kept is None:
        kept = mask._windowed.setdefault((left, right), mask & SlidingWindow(left, right))  # of two threads one sets it
    return kept


@dataclass(frozen=True, eq=False, repr=False)
class Documents(Mask):
    """Each query sees the keys of its own document.

    Parameters
    ----------
    q_ids : array (seqlen_q,) or (batch, seqlen_q)
        The document of each query; whole numbers in any order.
    k_ids : array (seqlen_k,) or (batch, seqlen_k), optional
        The document of each key; q_ids by default.

    Raises
    ------
    InvalidTypeError, InvalidDtypeError, InvalidShapeError
        An argument is no array, not of whole numbers or has other axes.

    Examples
    --------
    >>> import numpy as np
    >>> from cuflash import masks
    >>> mask = masks.Documents(np.array([0, 0, 1])) & masks.Causal()
    >>> mask
    Documents(q_ids=<int32 (3,)>) & Causal()
    >>> mask.visible(3)[0, 0].astype(int)
    array([[1, 0, 0],
           [1, 1, 0],
           [0, 0, 1]])
    """

    q_ids: Any
    k_ids: Any = None

    def __post_init__(self) -> None:
        for name in ("q_ids", "k_ids"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _ids(name, value))
        self._node  # noqa: B018  (makes the tables now, which reads the arrays' bounds)

    def _visible(self, at: Indices) -> Expression:
        if self.k_ids is None:
            queries = keys = self._table("q_ids", "seqlen_q", "seqlen_k")
        else:
            queries, keys = self._table("q_ids", "seqlen_q"), self._table("k_ids", "seqlen_k")
        return _of_entry(queries, at.batch, at.q) == _of_entry(keys, at.batch, at.k)

    def _table(self, name: str, *lengths: str) -> Table:
        ids = getattr(self, name)
        fits = tuple((Axis("batch"), Axis(length))[-ids.ndim :] for length in lengths)
        return Table(name, ids, fits=fits, owner="Documents")


def _ids(name: str, value: Any) -> Any:
    array = own_array(name, value)
    if array.dtype.kind == "f":
        raise InvalidDtypeError(f"{name}.dtype = {value.dtype}: must be an integer dtype")
    if array.ndim > 2:
        raise InvalidShapeError(f"{name}.shape = {array.shape}: must be (seqlen,) or (batch, seqlen)")
    return array.astype(np.int32) if array.dtype == np.uint8 else array


def _of_entry(table: Table, batch: Expression, position: Expression) -> Expression:
    return table[position] if table.array.ndim == 1 else table[batch, position]


@dataclass(frozen=True, eq=False, repr=False)
class PrefixLM(Mask):
    """Every query sees the first `length` keys, and those up to its own position.

    Parameters
    ----------
    length : int or array (batch,)
        Length of the prefix, of all sequences or of each.

    Examples
    --------
    >>> from cuflash import masks
    >>> masks.PrefixLM(2).visible(4)[0, 0].astype(int)
    array([[1, 1, 0, 0],
           [1, 1, 0, 0],
           [1, 1, 1, 0],
           [1, 1, 1, 1]])
    """

    length: Any

    def __post_init__(self) -> None:
        if not is_array(self.length) or self.length.ndim == 0:
            set_whole(self, "length", 0)
            return
        array = own_array("length", self.length)
        if array.dtype.kind != "i":
            raise InvalidDtypeError(f"length.dtype = {self.length.dtype}: must be an integer dtype")
        if array.ndim != 1:
            raise InvalidShapeError(f"length.shape = {array.shape}: must be (batch,)")
        object.__setattr__(self, "length", array)
        self._node  # noqa: B018  (makes the table now, which reads the array's bounds)

    def _visible(self, at: Indices) -> Expression:
        length = self.length
        if not isinstance(length, int):
            length = Table("length", length, fits=((Axis("batch"),),), owner="PrefixLM")[at.batch]
        return (at.k < length) | (at.distance <= 0)


@dataclass(frozen=True, eq=False, repr=False)
class Dilated(Mask):
    """Each query sees the keys whose distance from it is a multiple of `step` (Beltagy et al. 2020, "Longformer").

    Parameters
    ----------
    step : int
        At least 1.
    left, right : int or None
        How many keys of the pattern before and after the query's own position; None is unbounded.

    Examples
    --------
    >>> from cuflash import masks
    >>> masks.Dilated(2, 1, 0).visible(4)[0, 0].astype(int)
    array([[1, 0, 0, 0],
           [0, 1, 0, 0],
           [1, 0, 1, 0],
           [0, 1, 0, 1]])
    """

    step: int
    left: int | None = None
    right: int | None = None

    def __post_init__(self) -> None:
        set_whole(self, "step", 1)
        for name in ("left", "right"):
            if getattr(self, name) is not None:
                set_whole(self, name, 0, " or None")
                check_whole(f"{name} * step", getattr(self, name) * self.step)

    def _visible(self, at: Indices) -> Expression:
        left, right = (None if side is None else side * self.step for side in (self.left, self.right))
        return within(at.distance, left, right) & (at.distance % self.step == 0)


@dataclass(frozen=True, eq=False, repr=False)
class GlobalTokens(Mask):
    """A pair is visible if its query or its key is a global token (Beltagy et al. 2020, Zaheer et al. 2020).

    Parameters
    ----------
    tokens : int or array (number of tokens,)
        How many tokens at the beginning are global, or their positions among the keys.

    Examples
    --------
    >>> import numpy as np
    >>> from cuflash import masks
    >>> masks.GlobalTokens(np.array([2])).visible(4)[0, 0].astype(int)
    array([[0, 0, 1, 0],
           [0, 0, 1, 0],
           [1, 1, 1, 1],
           [0, 0, 1, 0]])
    """

    tokens: Any

    def __post_init__(self) -> None:
        if not is_array(self.tokens) or self.tokens.ndim == 0:
            set_whole(self, "tokens", 0, " or an array of positions")
            return
        positions = own_array("tokens", self.tokens)
        if positions.dtype.kind != "i" or not isinstance(positions, np.ndarray):
            raise InvalidTypeError(f"tokens = {summary(self.tokens)}: must be a host array of integers, or an integer")
        if positions.ndim != 1 or positions.min(initial=0) < 0:
            raise InvalidValueError(f"tokens = {summary(self.tokens)}: must be (number of tokens,), each >= 0")
        object.__setattr__(self, "tokens", positions)

    def _visible(self, at: Indices) -> Expression:
        return self._is_global(at.k) | (self._is_global(at.position) & (at.position >= 0))

    def _is_global(self, position: Expression) -> Expression:
        if isinstance(self.tokens, int):
            return position < self.tokens
        last = len(self._table.array) - 1
        return self._table[np.minimum(np.maximum(position, 0), last)] & (position <= last)

    @cached_property
    def _table(self) -> Table:
        """Whether each position up to the last global one is global."""
        flags = np.zeros(self.tokens.max(initial=0) + 1, bool)
        flags[self.tokens] = True
        return Table("is_global", own_array("is_global", flags))


def set_whole(mask: Mask, name: str, least: int, alternative: str = "") -> None:
    """Check a field of a mask and make it a Python int."""
    object.__setattr__(mask, name, check_whole(name, getattr(mask, name), least, alternative))
