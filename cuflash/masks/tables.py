"""Arrays that masks look things up in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from cuflash import dlpack
from cuflash.errors import InvalidDtypeError, InvalidShapeError, InvalidTypeError, TraceError, type_name
from cuflash.layout import address
from cuflash.masks.expression import Expression, Kind, Node, as_node, whole

MAX_AXES = 4


class Axis(NamedTuple):
    """What an axis of a table counts: blocks of a length; `length` names a field of `Lengths`."""

    length: str
    block: int = 1


@dataclass(frozen=True, eq=False)
class Table:
    """A captured array, equal to another one of the same memory.

    array is C-contiguous with 1 to 4 axes, of uint8 (truths, 0 or 1), int32, int64, float32 or float64; a NumPy array
    is read-only, a CuPy array must not change while the mask is in use. `ascending` promises that values do not fall
    along the last axis; `bounds` are those of whole numbers, read from the array if not given. Each of `fits` says what
    length the axes must have, `owner` the mask to which the table belongs.
    """

    name: str
    array: Any
    ascending: bool = False
    bounds: tuple[int, int] | None = None
    fits: tuple[tuple[Axis, ...], ...] = ()
    owner: str = ""

    def __post_init__(self) -> None:
        if self.kind == "whole":
            self.limits  # noqa: B018  (read now: a later call may be captured in a CUDA graph)

    def _identity(self) -> tuple[Any, ...]:
        return (address(self.array), self.array.shape, self.array.dtype, self.ascending)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Table) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    @property
    def kind(self) -> Kind:
        return {"u": "truth", "i": "whole", "f": "real"}[self.array.dtype.kind]  # type: ignore[return-value]

    @property
    def on_host(self) -> bool:
        return isinstance(self.array, np.ndarray)

    @cached_property
    def limits(self) -> tuple[int, int]:
        """Bounds of the values of a table of whole numbers."""
        if self.bounds is not None:
            return self.bounds
        return (int(self.array.min()), int(self.array.max())) if self.array.size else (0, 0)

    def stand_in(self) -> Table:
        """A table of the same shape, dtype and bounds that takes no memory."""
        array = np.broadcast_to(np.zeros((), self.array.dtype), self.array.shape)
        return replace(self, array=array, bounds=self.limits if self.kind == "whole" else None)

    def __getitem__(self, indices: Any) -> Expression:
        """The expression of an element, by as many whole numbers as there are axes."""
        indices = indices if isinstance(indices, tuple) else (indices,)
        nodes = tuple(self._index(axis, index) for axis, index in enumerate(indices))
        return Expression(Node("table", self.kind, nodes, self))

    def _index(self, axis: int, index: Any) -> Node:
        node = as_node(index)
        if node.kind != "whole":
            raise TraceError(f"captured array {self.name!r}: index along axis {axis} must be whole, is a {node.kind}")
        if node.operation == "constant" and not 0 <= node.value < self.array.shape[axis]:
            raise TraceError(
                f"captured array {self.name!r}: index {node.value} along axis {axis} must be 0 to "
                f"{self.array.shape[axis] - 1}"
            )
        return whole(node)


class Captured:
    """What stands for a captured array in a mask's function: `ids[q]`, `grid[q // 64, k // 64]`, `x[q][2]`."""

    __array_ufunc__ = None
    __hash__ = None  # type: ignore[assignment]
    __iter__ = None

    def __init__(self, table: Table, first: tuple[Any, ...] = ()) -> None:
        self._table, self._first = table, first

    @property
    def shape(self) -> tuple[int, ...]:
        return self._table.array.shape[len(self._first) :]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, indices: Any) -> Expression | Captured:
        indices = self._first + (indices if isinstance(indices, tuple) else (indices,))
        for index in indices:
            if isinstance(index, slice) or index is None or index is Ellipsis:
                raise TraceError(f"captured array {self._table.name!r}: index {index!r} must be a whole number")
        if len(indices) > self._table.array.ndim:
            raise TraceError(
                f"captured array {self._table.name!r}: must have {self._table.array.ndim} indices, has {len(indices)}"
            )
        return self._table[indices] if len(indices) == self._table.array.ndim else Captured(self._table, indices)

    def __setitem__(self, *_: Any) -> None:
        raise TraceError(f"captured array {self._table.name!r}: must not be assigned to in a mask's function")

    def _alone(self, *_: Any, **__: Any) -> Any:
        raise TraceError(
            f"captured array {self._table.name!r}: a mask's function must index it down to one element before it is "
            "used, as in ids[q]; what needs the whole array is computed outside of the function"
        )

    __array__ = __array_function__ = __bool__ = __int__ = __float__ = __index__ = _alone
    __neg__ = __abs__ = __invert__ = _alone
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __floordiv__ = _alone
    __rfloordiv__ = __mod__ = __rmod__ = __pow__ = __rpow__ = __and__ = __rand__ = __or__ = __ror__ = __xor__ = _alone
    __rxor__ = __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = __matmul__ = __rmatmul__ = _alone
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = __contains__ = _alone

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._alone()


def is_array(value: object) -> bool:
    return hasattr(type(value), "__dlpack__") and hasattr(value, "shape")


def own_array(name: str, value: Any) -> Any:
    """The array as a table keeps it: of a table's dtype and C-contiguous, a read-only copy if on the host.

    Raises InvalidTypeError, InvalidDtypeError or InvalidShapeError where it cannot be one.
    """
    array = _native(name, value)
    if not 1 <= array.ndim <= MAX_AXES:
        raise InvalidShapeError(f"{name}.shape = {tuple(array.shape)}: must have 1 to {MAX_AXES} axes")
    dtype = _table_dtype(name, array)
    if not isinstance(array, np.ndarray):
        if array.dtype == np.bool_:
            array = array.view(np.uint8) if array.flags.c_contiguous else array.astype(np.uint8, order="C")
        return array if array.dtype == dtype and array.flags.c_contiguous else array.astype(dtype, order="C")
    if array.dtype == dtype and array.flags.c_contiguous and not array.flags.writeable and array.base is None:
        return array  # nobody can change it
    own: np.ndarray = np.array(array, dtype, order="C")
    own.flags.writeable = False
    return own


def _native(name: str, value: Any) -> Any:
    """A NumPy or a CuPy array."""
    if isinstance(value, np.ma.MaskedArray | np.matrix):
        raise InvalidTypeError(f"{name} is a {type_name(value)}: must be a plain array")
    if isinstance(value, np.ndarray):
        return np.asarray(value)
    if type(value).__module__.partition(".")[0] == "cupy":
        return value
    if not is_array(value):
        raise InvalidTypeError(f"{name} is a {type_name(value)}: must be an array")
    if value.__dlpack_device__()[0] != dlpack.CPU:
        here = f"{name} is a {type_name(value)} on a GPU"
        raise InvalidTypeError(f"{here}: must be a CuPy array, which cupy.from_dlpack makes of it")
    try:
        return dlpack.as_numpy(value)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise InvalidTypeError(f"{name} is a {type_name(value)}: must be a concrete array ({error})") from error


def _table_dtype(name: str, array: Any) -> np.dtype:
    """bool becomes uint8, whole numbers int32 if they fit and int64 otherwise, float16 and bfloat16 float32."""
    kind, size = array.dtype.kind, array.dtype.itemsize
    if kind == "b":
        return np.dtype(np.uint8)
    if kind == "f" and size in (4, 8):
        return np.dtype(f"f{size}")
    if (kind == "f" and size == 2) or array.dtype == ml_dtypes.bfloat16:
        return np.dtype(np.float32)
    if kind not in "iu":
        raise InvalidDtypeError(f"{name}.dtype = {array.dtype}: must be bool, an integer or a float")
    if np.can_cast(array.dtype, np.int32) or not array.size:
        return np.dtype(np.int32)
    low, high = int(array.min()), int(array.max())
    if high >= 2**63:
        raise InvalidDtypeError(f"{name}.dtype = {array.dtype}: its values must fit int64")
    return np.dtype(np.int32 if low >= -(2**31) and high < 2**31 else np.int64)
