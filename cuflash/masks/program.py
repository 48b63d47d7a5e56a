"""`Program`: a traced mask as a list of steps, and its evaluation for pairs, for intervals and as C++."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from copy import copy
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from cuflash.errors import DeviceError, TraceError
from cuflash.masks import analysis, code, text, tiles
from cuflash.masks.expression import Kind, Node
from cuflash.masks.steps import Indices, Lengths, Place, Step
from cuflash.masks.tables import Axis, Table

MAX_WHOLES = 16
MAX_REALS = 8
MAX_TABLES = 8


class Program:
    """A mask for the machines that evaluate it. Immutable; equal to another of the same `key`.

    Attributes
    ----------
    steps : tuple of Step
        The operations in an order in which each follows its arguments; the last one is the result, a truth.
    wholes, reals : tuple of int, tuple of float
        Constants that are handed over at run time.
    tables : tuple of Table
        Captured arrays, which the program keeps alive.
    structure : hashable
        All that `code` depends on.
    key : hashable
        The structure, the constants and the identities of the tables.
    fits : tuple of (Table, tuple of Axis)
        What lengths tables must have.
    by_batch, by_head : bool
        Whether the mask depends on the batch entry or the head, through tables too.
    """

    def __init__(self, root: Node) -> None:
        self.steps, self.wholes, self.reals, self.tables, self.fits = _linear(root)
        for what, have, most in (
            ("different constant whole numbers", self.wholes, MAX_WHOLES),
            ("different constant reals", self.reals, MAX_REALS),
            ("captured arrays", self.tables, MAX_TABLES),
        ):
            if len(have) > most:
                raise TraceError(f"the mask has {len(have)} {what}: must have at most {most}")
        names = {step.value for step in self.steps if step.operation == "variable"}
        self.by_batch = "batch" in names
        self.by_head = not names.isdisjoint(("head", "kv_head"))
        dtypes = tuple((table.array.dtype.str, table.array.ndim, table.ascending) for table in self.tables)
        self.structure: Hashable = (self.steps, dtypes)
        self._name(self.tables)
        self._wide: dict[Lengths, bool] = {}
        self.kept: dict[Hashable, Any] = {}  # by devices: lists of tiles, tables brought there

    def _name(self, tables: Hashable) -> None:
        self.key: Hashable = (self.structure, self.wholes, tuple(x.hex() for x in self.reals), tables)
        self._hash = hash(self.key)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Program) and self.key == other.key)

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"Program({self.text})"

    @cached_property
    def text(self) -> str:
        """The expression as Python would write it."""
        return text.readable(self)

    @cached_property
    def grain(self) -> tuple[int, int]:
        """Queries and keys of the aligned blocks that the mask speaks of: the largest powers of two that divide all
        numbers by which their indices are divided; 0 where they never are.
        """
        return analysis.common_block(self, "q"), analysis.common_block(self, "k")

    def code(self, wide: bool) -> str:
        """The mask as a C++ struct, of int64 arithmetic if wide."""
        return code.struct(self, wide)

    def check(self, lengths: Lengths) -> None:
        """That every index of a table, divisor and shift count is legal at these lengths, and no number leaves int64.

        Raises InvalidShapeError or InvalidValueError.
        """
        self.wide(lengths)

    def wide(self, lengths: Lengths) -> bool:
        """Whether some number may leave the range of int32, after the same checks as `check`."""
        if lengths not in self._wide:
            if len(self._wide) >= 64:
                self._wide.clear()
            self._wide[lengths] = analysis.is_wide(self, lengths)
        return self._wide[lengths]

    def bind(self, *arrays: Any) -> Program:
        """The same program over other arrays, of the dtypes and numbers of axes of its tables.

        For masks that every call makes anew. `bounds` of tables must hold for any arrays.
        """
        return self._over((replace(t, array=array) for t, array in zip(self.tables, arrays, strict=True)), self.fits)

    @cached_property
    def asked(self) -> Program:
        """What launches are prepared by: the same program over stand-ins that have shapes, dtypes and bounds alone.

        Masks that differ in what their arrays hold ask for the same, and what is prepared keeps no array alive.
        """
        stand_ins = {table: table.stand_in() for table in self.tables}
        fits = tuple((stand_ins.get(table) or table.stand_in(), axes) for table, axes in self.fits)
        other = self._over(stand_ins.values(), fits)
        layouts = tuple((table.array.shape, table.bounds) for table in other.tables)
        other._name(layouts)
        other.__dict__["asked"] = other
        return other

    def _over(self, tables: Iterable[Table], fits: tuple[tuple[Table, tuple[Axis, ...]], ...]) -> Program:
        """A copy with these tables, which has nothing that was made of the others."""
        other = copy(self)
        other.tables, other.fits = tuple(tables), fits
        other._name(other.tables)
        other._wide, other.kept = {}, {}
        for name in ("asked", "text"):
            other.__dict__.pop(name, None)
        return other

    def visible(self, at: Indices) -> np.ndarray:
        """Truths of the pairs at these indices, arrays that broadcast together. The lengths must have been checked."""
        arrays = {name: np.asarray(value, np.int64) for name, value in zip(Indices._fields, at, strict=True)}

        def leaf(step: Step, arguments: list[Any]) -> Any:
            if step.operation == "table":
                return _element(self.host_table(step.value), tuple(arguments))
            return arrays[step.value] if step.operation == "variable" else self.constant(step)

        with np.errstate(all="ignore"):
            result = self.run(leaf, ELEMENTS)
        return np.broadcast_to(result, np.broadcast_shapes(*(array.shape for array in arrays.values())))

    def verdicts(self, at: Place, block_m: int, block_n: int) -> np.ndarray:
        """Verdict of each tile of block_m queries by block_n keys of one head of one sequence.

        uint8 (query tiles, key tiles): EMPTY (no pair visible), FULL (all of them, and all block_n keys exist) or
        PARTIAL, exactly. The lengths must have been checked.
        """
        return tiles.verdicts(self, at, block_m, block_n)

    def visible_pairs(self, at: Place) -> int:
        """How many pairs of one head of one sequence are visible. The lengths must have been checked."""
        return tiles.visible_pairs(self, at)

    def run(self, leaf: Callable[[Step, list[Any]], Any], operations: Mapping[str, Callable[..., Any]]) -> Any:
        """The value of the last step, with `leaf` for leaves and tables."""
        values: list[Any] = []
        for step in self.steps:
            arguments = [values[i] for i in step.arguments]
            operation = operations.get(step.operation)
            values.append(leaf(step, arguments) if operation is None else operation(*arguments))
        return values[-1]

    def constant(self, step: Step) -> Any:
        """The value of a leaf that is no variable, as a NumPy scalar."""
        if step.operation == "truth":
            return np.bool_(step.value)
        if step.operation == "literal":
            return np.int64(step.value)
        return np.int64(self.wholes[step.value]) if step.kind == "whole" else np.float64(self.reals[step.value])

    def host_table(self, index: int) -> Table:
        table = self.tables[index]
        if not table.on_host:
            raise DeviceError(f"captured array {table.name!r} is on a GPU: must be a NumPy array for a mask on the CPU")
        return table


ELEMENTS: Mapping[str, Callable[..., Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "negative": np.negative, "absolute": np.absolute,
    "minimum": np.minimum, "maximum": np.maximum, "floor_div": np.floor_divide, "floor_mod": np.remainder,
    "quotient": np.divide, "bit_and": np.bitwise_and, "bit_or": np.bitwise_or, "bit_xor": np.bitwise_xor,
    "shift_left": np.left_shift, "shift_right": np.right_shift, "less": np.less, "less_equal": np.less_equal,
    "equal": np.equal, "not_equal": np.not_equal, "logical_and": np.logical_and, "logical_or": np.logical_or,
    "logical_xor": np.logical_xor, "logical_not": np.logical_not, "choose": np.where,
    "to_real": lambda x: np.asarray(x, np.float64), "to_whole": lambda x: np.asarray(x, np.int64),
}  # fmt: skip


def _element(table: Table, indices: tuple[Any, ...]) -> Any:
    dtypes: dict[Kind, type] = {"truth": bool, "whole": np.int64, "real": np.float64}
    return np.asarray(table.array[indices], dtypes[table.kind])


class _Linear(NamedTuple):
    steps: tuple[Step, ...]
    wholes: tuple[int, ...]
    reals: tuple[float, ...]
    tables: tuple[Table, ...]
    fits: tuple[tuple[Table, tuple[Axis, ...]], ...]


def _linear(root: Node) -> _Linear:
    """Steps of a graph. Operations that are the same are one step; constants are the same only if their node is."""
    wholes: list[int] = []
    reals: list[float] = []
    tables: list[Table] = []
    fits: dict[tuple[Table, tuple[Axis, ...]], None] = {}
    place: dict[int, int] = {}  # of a node, by its id
    steps: dict[Step, int] = {}
    for node in _after_arguments(root):
        value: Any = node.value
        if node.operation == "constant":
            slots: list[Any] = wholes if node.kind == "whole" else reals
            slots.append(value)
            value = len(slots) - 1
        elif node.operation == "table":
            fits.update(dict.fromkeys((value, axes) for axes in value.fits))
            if value not in tables:
                tables.append(value)
            value = tables.index(value)
        step = Step(node.operation, node.kind, tuple(place[id(a)] for a in node.arguments), value)
        place[id(node)] = steps.setdefault(step, len(steps))
    return _Linear(tuple(steps), tuple(wholes), tuple(reals), tuple(tables), tuple(fits))


def _after_arguments(root: Node) -> Iterator[Node]:
    """Every node once, after its arguments; a stack rather than recursion, for graphs of any depth."""
    seen: set[int] = set()
    stack = [(root, False)]
    while stack:
        node, ready = stack.pop()
        if ready:
            yield node
        elif id(node) not in seen:
            seen.add(id(node))
            stack.append((node, True))
            stack += [(argument, False) for argument in reversed(node.arguments)]
