"""`where`: a mask from a Python function of the indices, traced with what the function captures."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import CellType, CodeType, FunctionType
from typing import Any

import numpy as np

from cuflash.errors import InvalidTypeError, TraceError, type_name
from cuflash.masks.expression import Expression, as_node
from cuflash.masks.mask import Mask
from cuflash.masks.steps import Indices
from cuflash.masks.tables import Captured, Table, is_array, own_array

PARAMETERS = ("batch", "head", "q", "k")


@dataclass(frozen=True, eq=False, repr=False)
class _Where(Mask):
    """A traced function."""

    function: Callable[..., Any]

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise InvalidTypeError(
                f"function is a {type_name(self.function)}: must be a function of (batch, head, q, k); a boolean array "
                "is a mask as masks.Dense(array)"
            )
        self.program  # noqa: B018  (traces now, so that an error names the line that made the mask)

    def _visible(self, at: Indices) -> Expression:
        return trace(self.function, at)

    def __repr__(self) -> str:
        return f"where(lambda {', '.join(PARAMETERS)}: {self.program.text})"


def where(function: Callable[..., Any]) -> Mask:
    """The mask of a Python function of indices, which is called once, with expressions in their place.

    The function computes a truth by Python's operators and NumPy's functions of the same meaning, `np.where`,
    `np.minimum` and `np.maximum`. It cannot branch on an index: `&`, `|`, `~` and parentheses stand for `and`, `or`,
    `not` and chained comparisons. It may look things up in arrays that it captures under a name of their own, in its
    closure, among its globals or defaults, and so may plain functions that it calls: `ids[q]`, `ids[batch, k]`,
    `grid[q // 64, k // 64]`. An index must not be negative: nothing wraps around.

    Whole numbers are exact (a mask that could leave int64 is an error), `/` and floats are float64. Other numbers
    that the function captures become constants; one that changes later, and arrays on the host, which are copied, are
    those of the time of this call. Arrays on a GPU are taken as they are and must not change while the mask is in use;
    making the mask reads their least and largest element.

    Parameters
    ----------
    function : callable
        Of four indices: batch (in a packed problem the sequence), head, q and k, counted within their sequence.

    Returns
    -------
    Mask
        Visible where the function is true.

    Raises
    ------
    TraceError
        The function does what cannot be traced; the message says what to write.
    InvalidTypeError, InvalidDtypeError, InvalidShapeError
        `function` is none, or an array that it captures is not of truths, integers or floats or has more than 4 axes.

    Examples
    --------
    >>> import numpy as np
    >>> from cuflash import masks
    >>> masks.where(lambda batch, head, q, k: abs(q - k) < 128)
    where(lambda batch, head, q, k: abs(q - k) < 128)

    Queries see the keys of their own document that are near in space:

    >>> ids, x = np.array([0, 0, 0, 1]), np.array([0.0, 1.0, 5.0, 5.5])
    >>> near = masks.where(lambda batch, head, q, k: (ids[q] == ids[k]) & (abs(x[q] - x[k]) < 2.5))
    >>> near
    where(lambda batch, head, q, k: (ids[q] == ids[k]) & (abs(x[q] - x[k]) < 2.5))
    >>> near.visible(4)[0, 0].astype(int)
    array([[1, 1, 0, 0],
           [1, 1, 0, 0],
           [0, 0, 1, 0],
           [0, 0, 0, 1]])
    """
    return _Where(function)


def trace(function: Callable[..., Any], at: Indices) -> Expression:
    """The truth that the function computes from expressions."""
    name = getattr(function, "__name__", type_name(function))
    try:
        inspect.signature(function).bind(*PARAMETERS)
    except TypeError as error:
        raise TraceError(f"function {name}: must take ({', '.join(PARAMETERS)}): {error}") from None
    except ValueError:  # a callable without a signature
        pass
    traceable = _Captures().replace(function, name)
    try:
        result = traceable(at.batch, at.head, at.q, at.k)
    except (TraceError, InvalidTypeError):
        raise
    except TypeError as error:
        raise TraceError(f"function {name} cannot be traced into an expression of its indices: {error}") from error
    return _truth(name, result)


def _truth(name: str, result: Any) -> Expression:
    if isinstance(result, bool | np.bool_):
        return Expression(as_node(bool(result)))
    if isinstance(result, Mask):
        raise TraceError(f"function {name} gives a mask: must give a truth; masks combine by &, | and ~ outside of it")
    if isinstance(result, Captured) or is_array(result):
        raise TraceError(f"function {name} gives an array: must give a truth of one pair, as array[q, k] is")
    if not isinstance(result, Expression):
        raise TraceError(f"function {name} gives {result!r}: must return a truth, as `return q >= k` does")
    if result.node.kind == "real":
        raise TraceError(f"function {name} gives a real number: must give a truth; scores are added by bias=")
    if result.node.kind == "whole":
        raise TraceError(f"function {name} gives a whole number: must give a truth; write != 0")
    return result


class _Captures:
    """What stands for the arrays that a function captures, and for the functions that capture any."""

    def __init__(self) -> None:
        self._done: dict[int, Any] = {}

    def replace(self, value: Any, name: str) -> Any:
        """The value itself unless it is an array, or a function that captures one."""
        if id(value) not in self._done:
            self._done[id(value)] = value  # met again within itself
            if isinstance(value, FunctionType):
                self._done[id(value)] = self._function(value)
            elif is_array(value) and not isinstance(value, np.generic) and len(value.shape):
                self._done[id(value)] = Captured(Table(name, own_array(name, value)))
        return self._done[id(value)]

    def _function(self, function: FunctionType) -> FunctionType:
        code, scope = function.__code__, function.__globals__
        globals_ = scope | {name: self.replace(scope[name], name) for name in _names(code) if name in scope}
        cells = tuple(map(self._cell, function.__closure__ or (), code.co_freevars))
        values = function.__defaults__ or ()
        defaults = tuple(map(self.replace, values, code.co_varnames[code.co_argcount - len(values) :]))
        new = FunctionType(code, globals_, function.__name__, defaults, cells)
        keywords = function.__kwdefaults__ or {}
        new.__kwdefaults__ = {name: self.replace(value, name) for name, value in keywords.items()}
        return new

    def _cell(self, cell: CellType, name: str) -> CellType:
        try:
            value = cell.cell_contents
        except ValueError:  # empty: a name that is bound later
            return cell
        return CellType(self.replace(value, name))


def _names(code: CodeType) -> set[str]:
    """Names that the code looks up among its globals, inner functions included."""
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names, inner))
