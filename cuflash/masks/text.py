"""A program as the Python expression that it came from."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cuflash.masks.program import Program
    from cuflash.masks.steps import Step

LONGEST = 400  # characters of an expression; a longer one is cut

# Operation: symbol and precedence, higher binds tighter.
_INFIX = {
    "mul": ("*", 7), "quotient": ("/", 7), "floor_div": ("//", 7), "floor_mod": ("%", 7), "add": ("+", 6),
    "sub": ("-", 6), "shift_left": ("<<", 5), "shift_right": (">>", 5), "bit_and": ("&", 4), "logical_and": ("&", 4),
    "bit_xor": ("^", 3), "logical_xor": ("^", 3), "bit_or": ("|", 2), "logical_or": ("|", 2), "less": ("<", 1),
    "less_equal": ("<=", 1), "equal": ("==", 1), "not_equal": ("!=", 1),
}  # fmt: skip
_PREFIX = {"negative": "-", "logical_not": "~"}
_FUNCTIONS = {"absolute": "abs", "minimum": "np.minimum", "maximum": "np.maximum", "choose": "np.where"}
_PREFIX_BINDS, _LEAF_BINDS = 8, 9


def readable(program: Program) -> str:
    return texts(program)[-1]


def texts(program: Program) -> list[str]:
    """The text of each step."""
    written: list[tuple[str, int]] = []
    for step in program.steps:
        result = _write(program, step, [written[i] for i in step.arguments])
        written.append(result if len(result[0]) <= LONGEST else ("...", _LEAF_BINDS))
    return [result for result, _ in written]


def _write(program: Program, step: Step, arguments: list[tuple[str, int]]) -> tuple[str, int]:
    """The text and how tightly it binds."""
    operation = step.operation
    if operation in _INFIX:
        symbol, binds = _INFIX[operation]
        # A comparison within a comparison would chain; the right operand of equal rank needs parentheses.
        left = _within(arguments[0], binds + (binds == 1))
        return f"{left} {symbol} {_within(arguments[1], binds + 1)}", binds
    if operation in _PREFIX:
        return _PREFIX[operation] + _within(arguments[0], _PREFIX_BINDS), _PREFIX_BINDS
    inner = ", ".join(argument for argument, _ in arguments)
    if operation in _FUNCTIONS:
        return f"{_FUNCTIONS[operation]}({inner})", _LEAF_BINDS
    if operation in ("to_real", "to_whole"):
        return arguments[0]
    if operation == "table":
        return f"{program.tables[step.value].name}[{inner}]", _LEAF_BINDS
    if operation == "constant":
        value = (program.wholes if step.kind == "whole" else program.reals)[step.value]
        return repr(value), _LEAF_BINDS if value >= 0 else _PREFIX_BINDS
    return str(step.value), _LEAF_BINDS


def _within(argument: tuple[str, int], binds: int) -> str:
    written, rank = argument
    return written if rank >= binds else f"({written})"
