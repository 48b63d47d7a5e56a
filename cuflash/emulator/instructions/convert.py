"""cvt: between integers, floats of every width and packed pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cuflash.emulator.instructions import floating
from cuflash.emulator.instructions.table import Modifiers, instruction
from cuflash.emulator.ir import KINDS, Instruction, bits

if TYPE_CHECKING:
    from cuflash.emulator.translate import BlockBuilder

FLOATS = ("f16", "bf16", "f32", "f64")
FLOAT8_PAIRS = ("e4m3x2", "e5m2x2")
TO_INTEGER = {"rni": "rint", "rzi": "trunc", "rmi": "floor", "rpi": "ceil"}


@instruction("cvt", operands=(2, 3))
def cvt(b: BlockBuilder, i: Instruction, m: Modifiers) -> None:
    b.count_class("conversion")
    rounding = m.option("rni", "rzi", "rmi", "rpi", "rn", "rz", "rna", "rm", "rp")
    ftz, sat, relu, finite = m.flag("ftz"), m.flag("sat"), m.flag("relu"), m.flag("satfinite")
    to, source = m.type(), m.type()
    if finite != (to in FLOAT8_PAIRS):
        raise b.unsupported(f"cvt.satfinite is needed to float8, and supported nowhere else (here {to})")
    if to in FLOAT8_PAIRS:
        _to_float8(b, i, to, source, rounding, relu)
    elif source in FLOAT8_PAIRS:
        _from_float8(b, i, to, source, rounding, relu)
    elif to in ("f16x2", "bf16x2"):
        _to_pair(b, i, to, source, rounding, relu)
    elif to == "tf32":
        if source != "f32" or rounding not in ("rna", "rn", "rz") or (relu and rounding == "rna"):
            raise b.unsupported(f"cvt.{rounding}{'.relu' * relu}.tf32.{source} is not supported")
        b.write(i.operands[0], "u4", f"to_tf32({_relu(b.read(i.operands[1], 'f4'), relu)}, {rounding!r})")
    elif to in FLOATS and source in FLOATS:
        _float_to_float(b, i, to, source, rounding, (ftz, sat, relu))
    elif to in FLOATS:
        _int_to_float(b, i, to, source, rounding, sat)
    elif source in FLOATS:
        _float_to_int(b, i, to, source, rounding, ftz)
    else:
        _int_to_int(b, i, to, source, sat)


def _relu(expression: str, relu: bool) -> str:
    return f"maximum({expression}, 0)" if relu else expression


def _to_pair(b: BlockBuilder, i: Instruction, to: str, source: str, rounding: str | None, relu: bool) -> None:
    """cvt.rn.f16x2.f32 d, a, b: a becomes the upper half, b the lower."""
    if source != "f32" or rounding not in ("rn", "rz"):
        raise b.unsupported(f"cvt.{rounding}.{to}.{source} is not supported")
    high, low = (_relu(b.read(x, "f4"), relu) for x in i.operands[1:3])
    if rounding == "rn":
        name = "pack_half_pair" if to == "f16x2" else "pack_bfloat_pair"
        b.write(i.operands[0], "u4", f"{name}({low}, {high})")
        return
    convert = "truncate_half({}).view(U2)" if to == "f16x2" else "truncate_bfloat({})"
    b.write(i.operands[0], "u4", f"pack16({convert.format(low)}, {convert.format(high)})")


def _to_float8(b: BlockBuilder, i: Instruction, to: str, source: str, rounding: str | None, relu: bool) -> None:
    """cvt.rn.satfinite.e4m3x2.f32 d, a, b: a becomes the upper half, b the lower; from .f16x2, halves stay in place."""
    if source == "f32" and len(i.operands) == 3:
        high, low = (b.read(x, "f4") for x in i.operands[1:])
    elif source == "f16x2":
        pair = b.temporary(f"halves({b.read(i.operands[1], 'u4')})")
        low, high = f"{pair}[..., 0]", f"{pair}[..., 1]"
    else:
        raise b.unsupported(f"cvt.{to}.{source} of {len(i.operands) - 1} operands is not supported")
    if rounding != "rn":
        raise b.unsupported(f"cvt.{rounding}.{to}.{source} is not supported")
    kind = to.removesuffix("x2")
    b.write(i.operands[0], "u2", f"pack_float8_pair({_relu(low, relu)}, {_relu(high, relu)}, {kind!r})")


def _from_float8(b: BlockBuilder, i: Instruction, to: str, source: str, rounding: str | None, relu: bool) -> None:
    if to != "f16x2" or rounding != "rn" or relu:
        raise b.unsupported(f"cvt.{rounding}{'.relu' * relu}.{to}.{source} is not supported")
    kind = source.removesuffix("x2")
    b.write(i.operands[0], "u4", f"widen_float8_pair({b.read(i.operands[1], 'u2')}, {kind!r})")


def _float_to_float(
    b: BlockBuilder, i: Instruction, to: str, source: str, rounding: str | None, flags: tuple[bool, bool, bool]
) -> None:
    ftz, sat, relu = flags
    x = floating.read(b, i.operands[1], source, ftz)
    if rounding in TO_INTEGER:
        x = f"{TO_INTEGER[rounding]}({x})"
    if sat:
        x = f"saturate({x})"
    x = _relu(x, relu)
    narrowing = bits(KINDS[to]) < bits(KINDS[source])
    if narrowing and rounding not in ("rn", "rz"):
        raise b.unsupported(f"cvt.{rounding}.{to}.{source} is not supported")
    if to == "f32":
        expression = x if source == "bf16" else f"truncate32({x})" if rounding == "rz" else f"{x}.astype(F4)"
        floating.write(b, i.operands[0], "f32", expression, ftz)
    elif to == "f64":
        b.write(i.operands[0], "f8", f"{x}.astype(F8)")
    elif to == "f16":
        wide = f"odd_to_single({x})" if source == "f64" else x
        b.write(i.operands[0], "f2", f"truncate_half({wide})" if rounding == "rz" else f"to_half({x})")
    else:
        if source == "f64":
            x = f"odd_to_single({x})"
        b.write(i.operands[0], "u2", f"truncate_bfloat({x})" if rounding == "rz" else f"to_bfloat({x})")


def _int_to_float(b: BlockBuilder, i: Instruction, to: str, source: str, rounding: str | None, sat: bool) -> None:
    if rounding != "rn":
        if rounding == "rz" and to == "f32" and bits(KINDS[source]) <= 4:
            b.write(i.operands[0], "f4", f"truncate32({b.read(i.operands[1], KINDS[source])})")
            return
        raise b.unsupported(f"cvt.{rounding}.{to}.{source} is not supported")
    x = b.read(i.operands[1], KINDS[source])
    expression = {
        "f64": f"{x}.astype(F8)",
        "f32": f"{x}.astype(F4)",
        "f16": f"to_half({x}.astype(F8))",
        "bf16": f"to_bfloat(odd_to_single({x}.astype(F8)))",
    }[to]
    b.write(i.operands[0], KINDS[to], f"saturate({expression})" if sat else expression)


def _float_to_int(b: BlockBuilder, i: Instruction, to: str, source: str, rounding: str | None, ftz: bool) -> None:
    if rounding not in TO_INTEGER:
        raise b.unsupported(f"cvt.{rounding}.{to}.{source} is not supported")
    x = floating.read(b, i.operands[1], source, ftz)
    b.write(i.operands[0], KINDS[to], f"float_to_int({TO_INTEGER[rounding]}({x}), '{KINDS[to]}')")


def _int_to_int(b: BlockBuilder, i: Instruction, to: str, source: str, sat: bool) -> None:
    x = b.read(i.operands[1], KINDS[source])
    expression = f"saturate_int({x}, '{KINDS[to]}')" if sat else f"{x}.astype({KINDS[to].upper()})"
    b.write(i.operands[0], KINDS[to], expression)
