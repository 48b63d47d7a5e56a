"""`Mask`: which keys each query sees, and how masks combine."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

from cuflash.errors import InvalidTypeError, InvalidValueError, type_name
from cuflash.masks import picture
from cuflash.masks.expression import Expression, Node, logical, negation
from cuflash.masks.program import Program
from cuflash.masks.steps import VARIABLES, Indices, Lengths, Place
from cuflash.masks.tables import is_array

LARGEST = 2**62  # a bound of arguments, so that sums of two fit int64


class Mask:
    """Which keys each query sees. Immutable; `&`, `|` and `~` combine masks, `==` compares what they are made of.

    Query q of a sequence of len_q queries and len_k keys stands at position q + len_k - len_q among the keys, so that
    the last query is at the last key, as everywhere in cuflash. The masks of this module are `Causal`,
    `SlidingWindow`, `Documents`, `PrefixLM`, `Dilated`, `GlobalTokens`, `Butterfly`, `RandomBlocks`, `BigBird`,
    `Blocks`, `Dense`; `where` makes one of a Python function.

    Examples
    --------
    >>> from cuflash import masks
    >>> mask = masks.SlidingWindow(2, 0) | masks.GlobalTokens(1)
    >>> mask
    SlidingWindow(2, 0) | GlobalTokens(1)
    >>> mask.visible(5)[0, 0].astype(int)
    array([[1, 1, 1, 1, 1],
           [1, 1, 0, 0, 0],
           [1, 1, 1, 0, 0],
           [1, 1, 1, 1, 0],
           [1, 0, 1, 1, 1]])
    >>> mask == masks.SlidingWindow(2, 0) | masks.GlobalTokens(1)
    True
    """

    __array_ufunc__ = None  # so that `array & mask` is an error of this class

    def _visible(self, at: Indices) -> Expression:
        """The truth of one pair, of expressions."""
        raise InvalidTypeError(f"{type_name(self)} is abstract: use one of the masks of cuflash.masks")

    @cached_property
    def _node(self) -> Node:
        return self._visible(VARIABLES).node

    @cached_property
    def program(self) -> Program:
        """The traced expression, what kernels and the CPU evaluate."""
        return Program(self._node)

    @cached_property
    def _windowed(self) -> dict[tuple[int | None, int | None], Mask]:
        """This mask within windows that were asked for; see `with_window`."""
        return {}

    def __and__(self, other: Any) -> Mask:
        return _Pair("&", self, _mask("&", other))

    def __or__(self, other: Any) -> Mask:
        return _Pair("|", self, _mask("|", other))

    def __rand__(self, other: Any) -> Mask:
        return _mask("&", other) & self

    def __ror__(self, other: Any) -> Mask:
        return _mask("|", other) | self

    def __invert__(self) -> Mask:
        return _Inverse(self)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Mask) and self.program == other.program)

    def __hash__(self) -> int:
        return hash(self.program)

    def __bool__(self) -> bool:
        raise InvalidTypeError("a mask is neither true nor false: combine masks by &, | and ~, not by and, or, not")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self._shown())})"

    def _shown(self) -> list[str]:
        """The arguments of the constructor, but for defaults; by name after the first that is left out."""
        shown: list[str] = []
        names = False
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            names |= value is field.default or is_array(value)
            if value is not field.default:
                shown.append(f"{field.name}={summary(value)}" if names else summary(value))
        return shown

    def visible(self, seqlen_q: int, seqlen_k: int | None = None, *, batch: int = 1, num_heads: int = 1) -> np.ndarray:
        """The mask as an array, N x N: to look at, not to compute with.

        Parameters
        ----------
        seqlen_q, seqlen_k : int
            Numbers of queries and keys; as many keys as queries by default.
        batch, num_heads : int
            How many entries of the batch and heads.

        Returns
        -------
        array (batch, num_heads, seqlen_q, seqlen_k)
            bool, read-only; axes on which the mask does not depend are broadcast.

        Raises
        ------
        InvalidShapeError, InvalidValueError
            The mask does not fit these lengths.
        """
        lengths = _lengths(seqlen_q, seqlen_k, batch, num_heads)
        self.program.check(lengths)
        b, h, q, k = np.ogrid[:batch, :num_heads, : lengths.seqlen_q, : lengths.seqlen_k]
        place = Place(lengths.seqlen_q, lengths.seqlen_k, b, h, h)
        return self.program.visible(place.indices(q, k))

    def density(self, seqlen_q: int, seqlen_k: int | None = None, *, batch: int = 1, num_heads: int = 1) -> float:
        """The share of pairs that are visible, over all entries of the batch and heads; parameters as in `visible`.

        Takes memory for a few tiles only.

        Examples
        --------
        >>> from cuflash import masks
        >>> round(masks.SlidingWindow(255, 0).density(16384), 4)
        0.0155
        """
        lengths = _lengths(seqlen_q, seqlen_k, batch, num_heads)
        self.program.check(lengths)
        batches = batch if self.program.by_batch else min(batch, 1)
        heads = num_heads if self.program.by_head else min(num_heads, 1)
        places = [Place(lengths.seqlen_q, lengths.seqlen_k, b, h, h) for b in range(batches) for h in range(heads)]
        pairs = len(places) * lengths.seqlen_q * lengths.seqlen_k
        return sum(self.program.visible_pairs(place) for place in places) / pairs if pairs else 0.0

    def plot(self, seqlen_q: int, seqlen_k: int | None = None, *, batch: int = 0, head: int = 0, ax: Any = None) -> Any:
        """Draw the visible pairs; of long sequences which tiles are empty, partial and full.

        Parameters
        ----------
        seqlen_q, seqlen_k : int
            Numbers of queries and keys; as many keys as queries by default.
        batch, head : int
            Which entry of the batch and which head.
        ax : matplotlib.axes.Axes, optional
            Where to draw; by default in a new figure.

        Returns
        -------
        matplotlib.axes.Axes

        Raises
        ------
        InvalidShapeError, InvalidValueError
            The mask does not fit these lengths.
        ImportError
            matplotlib is not installed.
        """
        check_whole("batch", batch)
        check_whole("head", head)
        return picture.draw(self, _lengths(seqlen_q, seqlen_k, 1, 1), batch, head, ax)


@dataclass(frozen=True, eq=False, repr=False)
class _Pair(Mask):
    """Both masks, or either."""

    symbol: str
    left: Mask
    right: Mask

    def _visible(self, at: Indices) -> Expression:
        operation = "logical_and" if self.symbol == "&" else "logical_or"
        return Expression(logical(operation, self.left._node, self.right._node))

    def __repr__(self) -> str:
        return f"{self._side(self.left)} {self.symbol} {self._side(self.right)}"

    def _side(self, mask: Mask) -> str:
        other = isinstance(mask, _Pair) and (mask.symbol != self.symbol or mask is self.right)
        return f"({mask!r})" if other else repr(mask)


@dataclass(frozen=True, eq=False, repr=False)
class _Inverse(Mask):
    """What a mask does not show."""

    mask: Mask

    def _visible(self, at: Indices) -> Expression:
        return Expression(negation(self.mask._node))

    def __repr__(self) -> str:
        return f"~({self.mask!r})" if isinstance(self.mask, _Pair) else f"~{self.mask!r}"


def _mask(symbol: str, value: Any) -> Mask:
    if not isinstance(value, Mask):
        raise InvalidTypeError(
            f"mask {symbol} {summary(value)}: must be a mask; a boolean array is one as masks.Dense(array), a function "
            "of indices as masks.where(function)"
        )
    return value


def summary(value: Any) -> str:
    """How a repr shows an argument: an array by dtype and shape."""
    return f"<{value.dtype} {tuple(value.shape)}>" if is_array(value) else repr(value)


def _lengths(seqlen_q: int, seqlen_k: int | None, batch: int, num_heads: int) -> Lengths:
    lengths = Lengths(batch, num_heads, num_heads, seqlen_q, seqlen_q if seqlen_k is None else seqlen_k)
    for name, value in zip(lengths._fields[:5], lengths[:5], strict=True):
        check_whole(name, value)
    return lengths


def check_whole(name: str, value: object, least: int = 0, alternative: str = "") -> int:
    """The value as a Python int; `alternative` is what an error says that it may be instead."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
        raise InvalidTypeError(f"{name} = {value!r}: must be an integer >= {least}{alternative}")
    if value < least:
        raise InvalidValueError(f"{name} = {value}: must be >= {least}{alternative}")
    if value >= LARGEST:
        raise InvalidValueError(f"{name} = {value}: must be below 2**62{alternative}")
    return int(value)
