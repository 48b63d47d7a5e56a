"""What a program may meet at given lengths: exact interval arithmetic in Python's whole numbers."""

from __future__ import annotations

from math import gcd
from typing import TYPE_CHECKING

import numpy as np

from cuflash.errors import InvalidShapeError, InvalidValueError
from cuflash.masks.expression import MAX_SHIFT
from cuflash.masks.intervals import INTERVALS, Interval
from cuflash.masks.steps import Lengths, Step
from cuflash.masks.tables import Axis, Table
from cuflash.masks.text import texts

if TYPE_CHECKING:
    from cuflash.masks.program import Program

_INT32, _INT64 = 2**31 - 1, 2**63 - 1
_UNKNOWN: Interval = (np.zeros(1, bool), np.ones(1, bool))
_ANY_REAL: Interval = (np.full(1, np.nan), np.full(1, np.nan))


def is_wide(program: Program, lengths: Lengths) -> bool:
    """Whether a whole number may leave ±(2^31 - 1); raises where a step is not legal at these lengths."""
    for table, axes in program.fits:
        _check_fit(table, axes, lengths)
    if not (lengths.batch and lengths.num_heads and lengths.seqlen_q and lengths.seqlen_k):
        return False  # no pair to evaluate
    ranges = _variables(lengths)
    written = texts(program)
    values: list[Interval] = []
    largest = 0
    for i, step in enumerate(program.steps):
        arguments = [values[a] for a in step.arguments]
        _check_step(program, step, arguments, written)
        value = _bound(program, step, arguments, ranges)
        values.append(value)
        if step.kind == "whole":
            magnitude = int(max(-value[0][0], value[1][0]))
            if magnitude > _INT64:
                raise InvalidValueError(
                    f"{written[i]} in the mask reaches {_span(value)} at {_shown(lengths)}: must fit int64"
                )
            largest = max(largest, magnitude)
    return largest > _INT32


def _variables(lengths: Lengths) -> dict[str, tuple[int, int]]:
    """The least and the largest value of each variable."""
    total_q = lengths.seqlen_q if lengths.total_q is None else lengths.total_q
    total_k = lengths.seqlen_k if lengths.total_k is None else lengths.total_k
    shortest = (0, 0) if lengths.packed else (lengths.seqlen_q, lengths.seqlen_k)
    return {
        "batch": (0, lengths.batch - 1),
        "head": (0, lengths.num_heads - 1),
        "kv_head": (0, lengths.num_kv_heads - 1),
        "q": (0, lengths.seqlen_q - 1),
        "k": (0, lengths.seqlen_k - 1),
        "len_q": (shortest[0], lengths.seqlen_q),
        "len_k": (shortest[1], lengths.seqlen_k),
        "q_token": (0, total_q - 1),
        "k_token": (0, total_k - 1),
    }


def _bound(program: Program, step: Step, arguments: list[Interval], ranges: dict[str, tuple[int, int]]) -> Interval:
    if step.kind == "real":
        return _ANY_REAL
    if step.operation == "variable":
        return _exact(*ranges[step.value])
    if step.operation == "table":
        return _exact(*program.tables[step.value].limits) if step.kind == "whole" else _UNKNOWN
    if step.operation in INTERVALS:
        low, high = INTERVALS[step.operation](*arguments)
        return (low, high) if step.kind == "truth" else (low.astype(object), high.astype(object))
    value = program.constant(step).item()
    return _exact(value, value) if step.kind == "whole" else (np.full(1, value), np.full(1, value))


def _exact(low: int, high: int) -> Interval:
    return np.array([low], object), np.array([high], object)


def _check_step(program: Program, step: Step, arguments: list[Interval], written: list[str]) -> None:
    """That indices, divisors and shift counts are legal."""
    if step.operation in ("floor_div", "floor_mod") and arguments[1][0][0] < 1:
        divisor = f"the divisor {written[step.arguments[1]]} in the mask reaches {arguments[1][0][0]}"
        raise InvalidValueError(f"{divisor}: must be >= 1; np.maximum bounds it")
    if step.operation.startswith("shift"):
        low, high = arguments[1][0][0], arguments[1][1][0]
        if low < 0 or high > MAX_SHIFT:
            count = f"the shift count {written[step.arguments[1]]} in the mask reaches {_span(arguments[1])}"
            raise InvalidValueError(f"{count}: must be 0 to {MAX_SHIFT}")
    if step.operation == "table":
        table = program.tables[step.value]
        for axis, (argument, (low, high)) in enumerate(zip(step.arguments, arguments, strict=True)):
            entries = table.array.shape[axis]
            what = f"captured array {table.name!r} has {entries} entries along axis {axis}, {written[argument]} reaches"
            if high[0] >= entries:
                raise InvalidShapeError(f"{what} {high[0]}: must stay below; np.minimum bounds it")
            if low[0] < 0:
                raise InvalidShapeError(f"{what} {low[0]}: must be >= 0, nothing wraps around; np.maximum bounds it")


def _check_fit(table: Table, axes: tuple[Axis, ...], lengths: Lengths) -> None:
    """A table of a built-in mask has exactly the lengths; at least those of the longest sequence if packed."""
    have = tuple(table.array.shape)
    want = tuple(-(-getattr(lengths, axis.length) // axis.block) for axis in axes)
    longer = [lengths.packed and axis.length.startswith("seqlen") for axis in axes]
    if all(h == w or (h > w and may) for h, w, may in zip(have, want, longer, strict=True)):
        return
    parts = [
        f"{axis.length} = {getattr(lengths, axis.length)}" + (f" in blocks of {axis.block}" if axis.block > 1 else "")
        for axis in axes
    ]
    least = "at least " if any(longer) else ""
    raise InvalidShapeError(
        f"{table.owner}: {table.name}.shape = {have}: must be {least}{want}, for {' and '.join(parts)}"
    )


def _span(value: Interval) -> str:
    low, high = value[0][0], value[1][0]
    return str(low) if low == high else f"{low} to {high}"


def _shown(lengths: Lengths) -> str:
    pairs = zip(lengths._fields, lengths, strict=True)
    return ", ".join(f"{name} = {value}" for name, value in pairs if value is not None)


def common_block(program: Program, axis: str) -> int:
    """The largest power of two that divides all numbers by which the index "q" or "k" is divided; 0 without any."""
    divisor = 0
    for step in program.steps:
        if step.operation in ("floor_div", "shift_right"):
            index, by = (program.steps[i] for i in step.arguments)
            if (index.operation, index.value, by.operation) == ("variable", axis, "literal"):
                divisor = gcd(divisor, by.value if step.operation == "floor_div" else 1 << by.value)
    return divisor & -divisor
