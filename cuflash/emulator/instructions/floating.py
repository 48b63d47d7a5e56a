"""Floating-point arithmetic in f32, f64, f16, bf16 and the packed pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cuflash.emulator.instructions.table import Modifiers, instruction
from cuflash.emulator.ir import KINDS, Instruction, Operand

if TYPE_CHECKING:
    from cuflash.emulator.translate import BlockBuilder


def read(b: BlockBuilder, operand: Operand, t: str, ftz: bool = False) -> str:
    """An operand in the type in which NumPy computes: bf16 as float32, packed types as a last axis of two."""
    value = b.read(operand, KINDS[t])
    if t == "f32" and ftz:
        return f"flush({value})"
    return {"f16x2": f"halves({value})", "bf16": f"bfloat({value})", "bf16x2": f"bfloats({value})"}.get(t, value)


def write(b: BlockBuilder, operand: Operand, t: str, expression: str, ftz: bool = False) -> None:
    """Assign a result in the computing type, rounding to the short types."""
    if t == "f32" and ftz:
        expression = f"flush({expression})"
    convert = {"f16x2": "from_halves", "bf16": "to_bfloat", "bf16x2": "from_bfloats"}.get(t)
    b.write(operand, KINDS[t], f"{convert}({expression})" if convert else expression)


SIGNS = {"add": "+", "sub": "-", "mul": "*", "div": "/"}


def arithmetic(b: BlockBuilder, i: Instruction, m: Modifiers, t: str) -> None:
    """add, sub, mul, min, max, abs, neg, div, fma and mad of floating types."""
    b.count_class("floating")
    ftz, sat, relu = m.flag("ftz"), m.flag("sat"), m.flag("relu")
    direction = m.option("rz", "rm", "rp")
    if direction and (t != "f32" or i.opcode not in ("add", "sub", "mul", "fma")):
        raise b.unsupported(f"{i.opcode}.{direction}.{t} is not supported")
    m.flag("rn", "approx", "full")
    if i.opcode in ("abs", "neg") and not ftz:
        _sign(b, i, t)
        return
    values = [read(b, x, t, ftz) for x in i.operands[1:]]
    expression = _expression(b, i.opcode, values, t, m)
    if direction:
        x, y, *z = (f"{v}.astype(F8)" for v in values)
        first, second = {"add": (x, y), "sub": (x, f"-{y}"), "mul": (f"{x} * {y}", "-F8.type(0)")}.get(
            i.opcode, (f"{x} * {y}", *z)
        )
        expression = f"directed({first}, {second}, {direction!r})"
    if sat:
        expression = f"saturate({expression})"
    if relu:
        expression = f"maximum({expression}, 0)"
    write(b, i.operands[0], t, expression, ftz)


def _expression(b: BlockBuilder, opcode: str, values: list[str], t: str, m: Modifiers) -> str:
    x, y, *rest = [*values, "0"]
    if opcode in ("add", "sub", "mul", "div"):
        return f"{x} {SIGNS[opcode]} {y}"
    if opcode in ("fma", "mad"):
        name = {
            "f32": "multiply_add",
            "f64": "multiply_add64",
            "f16": "multiply_add_half",
            "f16x2": "multiply_add_half",
        }
        return f"{name.get(t, 'multiply_add_bfloat')}({x}, {y}, {rest[0]})"
    if opcode in ("min", "max"):
        nan, magnitude = m.flag("NaN"), m.flag("xorsign")
        if magnitude:
            raise b.unsupported(f"{opcode}.xorsign is not supported")
        result = f"order_{opcode}({x}, {y}, {nan})"
        return result if len(values) == 2 else f"order_{opcode}({result}, {rest[0]}, {nan})"
    return {"abs": f"abs({x})", "neg": f"-{x}"}[opcode]


def _sign(b: BlockBuilder, i: Instruction, t: str) -> None:
    """abs and neg touch the sign bit alone, also of NaN."""
    width = {"f64": 8, "f32": 4, "f16": 2, "bf16": 2, "f16x2": 4, "bf16x2": 4}[t]
    sign = {"f64": 1 << 63, "f32": 1 << 31, "f16": 1 << 15, "bf16": 1 << 15}.get(t, 0x80008000)
    k = f"u{width}"
    value = b.read(i.operands[1], k)
    change = f"{value} & ~{b.constant(sign, k)}" if i.opcode == "abs" else f"{value} ^ {b.constant(sign, k)}"
    b.write(i.operands[0], k, change)


APPROXIMATE = {
    "ex2": "exp2({x})",
    "lg2": "log2({x})",
    "sin": "sin({x})",
    "cos": "cos({x})",
    "tanh": "tanh({x})",
    "sqrt": "sqrt({x})",
    "rsqrt": "reciprocal_root({x})",
    "rcp": "1 / {x}",
}


@instruction(*APPROXIMATE, operands=2)
def function(b: BlockBuilder, i: Instruction, m: Modifiers) -> None:
    """The functions of the special function unit, exact here to the last bit or so of float32 instead of
    approximate."""
    approx, ftz = m.flag("approx", "rn"), m.flag("ftz")
    t = m.type()
    if not approx:
        raise b.unsupported(f"{i.opcode} is supported with .approx or .rn")
    b.count_class("special")
    x = read(b, i.operands[1], t, ftz)
    if t in ("f16", "f16x2") and i.opcode not in ("sqrt",):
        expression = f"to_half({APPROXIMATE[i.opcode].format(x=f'{x}.astype(F4)')})"
    else:
        expression = APPROXIMATE[i.opcode].format(x=x)
    write(b, i.operands[0], t, expression, ftz)


@instruction("copysign", operands=3)
def copy_sign(b: BlockBuilder, i: Instruction, m: Modifiers) -> None:
    t = m.type()
    b.count_class("floating")
    b.write(i.operands[0], KINDS[t], f"copysign({read(b, i.operands[2], t)}, {read(b, i.operands[1], t)})")


@instruction("testp", operands=2)
def testp(b: BlockBuilder, i: Instruction, m: Modifiers) -> None:
    what = m.one_of("finite", "infinite", "number", "notanumber", "normal", "subnormal")
    t = m.type()
    b.count_class("comparison")
    x = read(b, i.operands[1], t)
    tiny = b.constant(2.0**-126 if t == "f32" else 2.0**-1022, KINDS[t])
    expression = {
        "finite": f"isfinite({x})",
        "infinite": f"isinf({x})",
        "number": f"~isnan({x})",
        "notanumber": f"isnan({x})",
        "normal": f"(isfinite({x}) & (abs({x}) >= {tiny}))",
        "subnormal": f"((abs({x}) < {tiny}) & ({x} != 0))",
    }[what]
    b.write(i.operands[0], "p", expression)
