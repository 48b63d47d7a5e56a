"""Reads the C++ text of a mask: its vocabulary as Python functions, each line as a Python statement."""

from __future__ import annotations

import re
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np

from cuflash.masks.program import Program
from cuflash.masks.steps import Indices

_DTYPES = {"u8": np.uint8, "int": np.int32, "i64": np.int64, "float": np.float32, "double": np.float64}


def _kind(*values: Any) -> str:
    return "".join(sorted({np.asarray(value).dtype.kind for value in values}))


def _numbers(function: Any) -> Any:
    """Of whole numbers or of reals, not of both."""

    def checked(*values: Any) -> Any:
        assert _kind(*values) in ("i", "f"), function
        return function(*values)

    return checked


def _of(kind: str, function: Any) -> Any:
    def checked(*values: Any) -> Any:
        assert _kind(*values) == kind, function
        return function(*values)

    return checked


def _choose(condition: Any, a: Any, b: Any) -> Any:
    assert _kind(condition) == "b"
    assert _kind(a, b) in ("i", "f")
    return np.where(condition, a, b)


def _floor_div(a: Any, b: Any) -> Any:
    assert (np.asarray(b) > 0).all()
    return a // b


VOCABULARY: dict[str, Any] = {
    "add": _numbers(np.add), "sub": _numbers(np.subtract), "mul": _numbers(np.multiply),
    "negative": _numbers(np.negative), "absolute": _numbers(np.abs), "minimum": _numbers(np.minimum),
    "maximum": _numbers(np.maximum), "floor_div": _of("i", _floor_div),
    "floor_mod": _of("i", lambda a, b: a - b * _floor_div(a, b)), "quotient": _of("f", np.divide),
    "bit_and": _of("i", np.bitwise_and), "bit_or": _of("i", np.bitwise_or), "bit_xor": _of("i", np.bitwise_xor),
    "shift_left": _of("i", np.left_shift), "shift_right": _of("i", np.right_shift), "less": _numbers(np.less),
    "less_equal": _numbers(np.less_equal), "equal": _numbers(np.equal), "not_equal": _numbers(np.not_equal),
    "logical_and": _of("b", np.logical_and), "logical_or": _of("b", np.logical_or),
    "logical_xor": _of("b", np.logical_xor), "logical_not": _of("b", np.logical_not), "choose": _choose,
    "to_real": _of("i", np.float64), "to_whole": _of("b", np.int64),
}  # fmt: skip


def evaluate(program: Program, wide: bool, indices: Indices) -> np.ndarray:
    """What the function `visible` of the text returns."""
    text = program.code(wide)
    head, _, body = text.partition("visible(const At& at) {\n")
    for name, value in (("kByBatch", program.by_batch), ("kByHead", program.by_head)):
        assert f"{name} = {'true' if value else 'false'}" in head
    assert f"using Whole = {'i64' if wide else 'int'};" in head

    def table(ascending: bool, number: int, dtype: str) -> Any:
        array = program.tables[number].array
        assert array.dtype == _DTYPES[dtype]
        assert program.tables[number].ascending == ascending
        result = {"u": np.bool_, "i": np.int64, "f": np.float64}[array.dtype.kind]
        return lambda *at: array[at].astype(result)

    at = SimpleNamespace(
        **{name: partial(np.asarray, value, np.int64) for name, value in indices._asdict().items()},
        whole=lambda i: np.int64(program.wholes[i]), real=lambda i: np.float64(program.reals[i]), literal=np.int64,
        truth=np.bool_, table=table,
    )
    body = re.sub(r"at\.template (ascending_)?table<(\d+), (\w+)>", r"at.table(bool('\1'), \2, '\3')", body)
    body = body.replace("(true)", "(True)").replace("(false)", "(False)")
    names: dict[str, Any] = {**VOCABULARY, "at": at}
    *lines, last = [line.strip() for line in body.splitlines() if line.startswith("        ")]
    with np.errstate(all="ignore"):
        for line in lines:
            name, value = re.fullmatch(r"const auto (\w+) = (.*);", line).groups()
            names[name] = eval(value, names)
        return eval(re.fullmatch(r"return (.*);", last)[1], names)
