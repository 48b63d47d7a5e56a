"""Expressions of the indices of a score: what a mask is once its function was called with `Expression` in their place.

An expression is a graph of nodes of three kinds: "whole" numbers, "real" ones (float64) and "truth" values. Whole and
real together give a real, a truth in arithmetic counts as 0 or 1, and `/` gives a real.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import numpy as np

from cuflash.errors import TraceError, type_name

Kind = Literal["whole", "real", "truth"]
MAX_SHIFT = 62  # bits
MAX_POWER = 8


@dataclass(frozen=True, eq=False, slots=True)
class Node:
    """An operation on other nodes, or a leaf; a node is equal to itself alone.

    Leaves: "variable" (value: its name), "constant" (a number that is handed over at run time), "literal" (a whole
    number that is part of the code), "truth" (True or False); "table" (value: its `Table`) has indices as arguments.
    """

    operation: str
    kind: Kind
    arguments: tuple[Node, ...] = ()
    value: Any = None


def as_node(value: Any) -> Node:
    """An expression's node, or that of a plain number or truth."""
    if isinstance(value, Expression):
        return value.node
    if isinstance(value, np.generic) or getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, bool):
        return Node("truth", "truth", value=value)
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise TraceError(f"{value} in a mask's function: must fit int64")
        return Node("constant", "whole", value=value)
    if isinstance(value, float):
        return Node("constant", "real", value=value)
    if hasattr(value, "shape"):
        raise TraceError(
            f"an array of shape {tuple(value.shape)} in a mask's function: must be indexed before it is used, as in "
            "ids[q] or grid[q // 64, k // 64], and be captured under a name of its own"
        )
    raise TraceError(f"{value!r}, a {type_name(value)}, in a mask's function: must be an index, a number or a truth")


def whole(node: Node) -> Node:
    """A whole number; a truth counts as 0 or 1."""
    if node.kind == "truth":
        if node.operation == "truth":
            return Node("constant", "whole", value=int(node.value))
        return Node("to_whole", "whole", (node,))
    if node.kind == "real":
        raise TraceError("a real number where a mask's function needs a whole one: //, %, <<, >>, &, |, ^ take those")
    return node


def real(node: Node) -> Node:
    node = node if node.kind == "real" else whole(node)
    if node.operation == "constant":
        return Node("constant", "real", value=float(node.value))
    return node if node.kind == "real" else Node("to_real", "real", (node,))


def truth(node: Node) -> Node:
    if node.kind != "truth":
        raise TraceError(f"a {node.kind} number where a mask's function needs a truth: write != 0")
    return node


def literal(node: Node, what: str, least: int, most: int) -> Node:
    """A divisor or shift count: a constant becomes part of the code, so that the compiler can make it cheap."""
    if node.operation != "constant":
        return node  # Program.check bounds it
    if not least <= node.value <= most:
        raise TraceError(f"{what} {node.value} in a mask's function: must be {least} to {most}")
    return Node("literal", "whole", value=node.value)


def _same_number(*nodes: Node) -> tuple[Node, ...]:
    """Whole numbers, or reals if one is real."""
    return tuple(real(node) if any(n.kind == "real" for n in nodes) else whole(node) for node in nodes)


def _arithmetic(operation: str, *operands: Node) -> Node:
    nodes = _same_number(*operands)
    if operation == "mul" and nodes[0] is nodes[1]:
        # A square: |x|·|x| has the same value and tells interval arithmetic that it is not negative.
        nodes = (_arithmetic("absolute", nodes[0]),) * 2
    return Node(operation, nodes[0].kind, nodes)


def _division(operation: str, a: Node, b: Node) -> Node:
    divisor = literal(whole(b), "divisor", 1, 2**63 - 1)
    return Node(operation, "whole", (whole(a), divisor))


def _quotient(operation: str, a: Node, b: Node) -> Node:
    return Node(operation, "real", (real(a), real(b)))


def _shift(operation: str, a: Node, b: Node) -> Node:
    return Node(operation, "whole", (whole(a), literal(whole(b), "shift count", 0, MAX_SHIFT)))


def _bitwise(operation: str, a: Node, b: Node) -> Node:
    if a.kind == b.kind == "truth":
        return logical(operation.replace("bit", "logical"), a, b)
    return Node(operation, "whole", (whole(a), whole(b)))


def logical(operation: str, a: Node, b: Node) -> Node:
    """logical_and, logical_or or logical_xor, less what a constant truth decides."""
    a, b = truth(a), truth(b)
    for x, y in ((a, b), (b, a)):
        if x.operation == "truth":
            if operation == "logical_xor":
                return negation(y) if x.value else y
            return y if x.value == (operation == "logical_and") else x
    return Node(operation, "truth", (a, b))


def negation(a: Node) -> Node:
    if truth(a).operation == "truth":
        return Node("truth", "truth", value=not a.value)
    return a.arguments[0] if a.operation == "logical_not" else Node("logical_not", "truth", (a,))


def _invert(_: str, a: Node) -> Node:
    if a.kind == "truth":
        return negation(a)
    return Node("bit_xor", "whole", (whole(a), Node("literal", "whole", value=-1)))


def _comparison(operation: str, a: Node, b: Node) -> Node:
    if a.kind == b.kind == "truth" and operation in ("equal", "not_equal"):
        differ = logical("logical_xor", a, b)
        return differ if operation == "not_equal" else negation(differ)
    if operation.startswith("greater"):
        operation, a, b = operation.replace("greater", "less"), b, a
    return Node(operation, "truth", _same_number(a, b))


def _choose(operation: str, condition: Node, a: Node, b: Node) -> Node:
    if truth(condition).operation == "truth":
        return a if condition.value else b
    if a.kind == b.kind == "truth":
        chosen = logical("logical_and", condition, a)
        return logical("logical_or", chosen, logical("logical_and", negation(condition), b))
    a, b = _same_number(a, b)
    return Node(operation, a.kind, (condition, a, b))


def _power(_: str, a: Node, b: Node) -> Node:
    if b.operation != "constant" or b.kind != "whole" or not 1 <= b.value <= MAX_POWER:
        raise TraceError(f"** in a mask's function: the exponent must be a whole constant, 1 to {MAX_POWER}")
    half = a if b.value < 2 else _power("", a, Node("constant", "whole", value=b.value // 2))
    result = half if b.value < 2 else _arithmetic("mul", half, half)
    return _arithmetic("mul", result, a) if b.value > 1 and b.value % 2 else result


_BUILD: dict[str, Callable[..., Node]] = {
    **dict.fromkeys(("add", "sub", "mul", "negative", "absolute", "minimum", "maximum"), _arithmetic),
    **dict.fromkeys(("floor_div", "floor_mod"), _division),
    **dict.fromkeys(("shift_left", "shift_right"), _shift),
    **dict.fromkeys(("bit_and", "bit_or", "bit_xor"), _bitwise),
    **dict.fromkeys(("logical_and", "logical_or", "logical_xor"), logical),
    **dict.fromkeys(("less", "less_equal", "greater", "greater_equal", "equal", "not_equal"), _comparison),
    "logical_not": lambda _, a: negation(a),
    "quotient": _quotient,
    "invert": _invert,
    "choose": _choose,
    "power": _power,
    "square": lambda _, a: _arithmetic("mul", a, a),
    "positive": lambda _, a: _same_number(a)[0],
}

# NumPy's functions by name; those that are missing have the name of the operation.
_NUMPY_NAMES = {
    "subtract": "sub", "multiply": "mul", "divide": "quotient", "floor_divide": "floor_div", "remainder": "floor_mod",
    "bitwise_and": "bit_and", "bitwise_or": "bit_or", "bitwise_xor": "bit_xor", "left_shift": "shift_left",
    "right_shift": "shift_right",
}  # fmt: skip


def apply(operation: str, *operands: Any) -> Expression:
    """The expression of an operation on expressions, numbers and truths."""
    return Expression(_BUILD[operation](operation, *map(as_node, operands)))


_Operator = Callable[["Expression", Any], "Expression"]


def _binary(operation: str) -> tuple[_Operator, _Operator]:
    """The operator and its reflection."""
    return (lambda self, other: apply(operation, self, other)), (lambda self, other: apply(operation, other, self))


def _unary(operation: str) -> Callable[[Expression], Expression]:
    return lambda self: apply(operation, self)


def _refuse(what: str) -> Callable[..., NoReturn]:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise TraceError(what)

    return refuse


class Expression:
    """An index of a score, or what was computed from such; it stands for all their values at once.

    Operators and NumPy's functions of the same meaning give expressions again. What needs a single value raises
    TraceError.
    """

    __slots__ = ("node",)
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, node: Node) -> None:
        self.node = node

    __add__, __radd__ = _binary("add")
    __sub__, __rsub__ = _binary("sub")
    __mul__, __rmul__ = _binary("mul")
    __truediv__, __rtruediv__ = _binary("quotient")
    __floordiv__, __rfloordiv__ = _binary("floor_div")
    __mod__, __rmod__ = _binary("floor_mod")
    __pow__, __rpow__ = _binary("power")
    __lshift__, __rlshift__ = _binary("shift_left")
    __rshift__, __rrshift__ = _binary("shift_right")
    __and__, __rand__ = _binary("bit_and")
    __or__, __ror__ = _binary("bit_or")
    __xor__, __rxor__ = _binary("bit_xor")
    __lt__, __gt__ = _binary("less")[0], _binary("greater")[0]
    __le__, __ge__ = _binary("less_equal")[0], _binary("greater_equal")[0]
    __eq__, __ne__ = _binary("equal")[0], _binary("not_equal")[0]  # type: ignore[assignment]
    __neg__, __pos__, __abs__, __invert__ = map(_unary, ("negative", "positive", "absolute", "invert"))

    def __divmod__(self, other: Any) -> tuple[Expression, Expression]:
        return self // other, self % other

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **keywords: Any) -> Expression:
        operation = _NUMPY_NAMES.get(ufunc.__name__, ufunc.__name__)
        if operation not in _BUILD or method != "__call__" or keywords:
            name = ufunc.__name__ if method == "__call__" else f"{ufunc.__name__}.{method}"
            raise TraceError(f"np.{name} in a mask's function: must be one of {_known_functions()}, without keywords")
        return apply(operation, *inputs)

    def __array_function__(self, function: Any, types: Any, inputs: Any, keywords: Any) -> Expression:
        if function is not np.where or len(inputs) != 3 or keywords:
            raise TraceError(
                f"np.{function.__name__} in a mask's function: must be one of {_known_functions()}, where with three "
                "arguments"
            )
        return apply("choose", *inputs)

    __bool__ = _refuse(
        "a mask's function cannot branch on an index: instead of if, and, or, not, in, min, max or a chained "
        "comparison write &, |, ~ with each comparison in parentheses, np.where, np.minimum or np.maximum"
    )
    __int__ = __float__ = __complex__ = __round__ = __trunc__ = __floor__ = __ceil__ = _refuse(
        "an index stands for all its values in a mask's function: must not be turned into one Python number; write "
        "// for a whole quotient, and NumPy's functions instead of those of math"
    )
    __index__ = __array__ = _refuse(
        "an index can pick only from an array that the mask's function captures under a name of its own: bind lists "
        "as NumPy arrays, and attributes and results, to a name first, as in `ids = np.asarray(self.ids)`"
    )
    __iter__ = __len__ = __getitem__ = __setitem__ = _refuse(
        "an index of a mask's function is one number: must not be indexed, iterated or assigned to"
    )


def _known_functions() -> str:
    reverse = {operation: name for name, operation in _NUMPY_NAMES.items()}
    return ", ".join(sorted({reverse.get(name, name) for name in _BUILD} - {"choose"} | {"where"}))


def variable(name: str) -> Expression:
    return Expression(Node("variable", "whole", value=name))
