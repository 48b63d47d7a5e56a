"""Matrix instructions: ldmatrix, stmatrix, mma.sync, movmatrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cuflash.emulator.instructions.table import Modifiers, instruction
from cuflash.emulator.ir import Instruction

if TYPE_CHECKING:
    from cuflash.emulator.translate import BlockBuilder


@instruction("ldmatrix", operands=2)
def ldmatrix(b: BlockBuilder, i: Instruction, m: Modifiers) -> None:
    m.one_of("sync")
    m.one_of("aligned")
    m.one_of("m8n8")
    number = int(m.one_of("x1", "x2", "x4")[1])
    transposed = m.flag("trans")
    m.flag("shared", "shared::cta")
    m.one_of("b16")
    b.count_class("ldmatrix")
    values = b.temporary(
        f"X.machine.shared.load_matrix(X, {b.site()}, {b.address(i.operands[1], 'u4')}, {number}, {transposed})"
    )
    for k, target in enumerate(b.parts(i.operands[0])):
        b.write(target, "u4", f"{values}[{k}]")


@instruction("stmatrix", operands=2)
def stmatrix(b: BlockBuilder, i: Instruction, m: Modifiers) -> None:
    m.one_of("sync")
    m.one_of("aligned")
    m.one_of("m8n8")
    number = int(m.one_of("x1", "x2", "x4")[1])
    transposed = m.flag("trans")
    m.flag("shared", "shared::cta")
    m.one_of("b16")
    b.count_class("stmatrix")
    values = "".join(f"{b.read(x, 'u4')}, " for x in b.parts(i.operands[1]))
    address = b.address(i.operands[0], "u4")
    b.emit(f"X.machine.shared.store_matrix(X, {b.site()}, {address}, {number}, {transposed}, ({values}))")


@instruction("movmatrix", operands=2)
def movmatrix(b: BlockBuilder, i: Instruction, m: Modifiers) -> None:
    for name in ("sync", "aligned", "m8n8", "trans", "b16"):
        m.one_of(name)
    b.count_class("move")
    b.write(i.operands[0], "u4", f"transpose_matrix(X, {b.read(i.operands[1], 'u4')})")


SHAPES = ("m8n8k4", "m16n8k4", "m16n8k8", "m16n8k16", "m16n8k32")
FORMS = {  # type of A: its shapes, the types of B beside it, the types in which it is summed
    "f16": (("m16n8k8", "m16n8k16"), ("f16",), ("f32", "f16")),
    "bf16": (("m16n8k8", "m16n8k16"), ("bf16",), ("f32",)),
    "tf32": (("m16n8k4", "m16n8k8"), ("tf32",), ("f32",)),
    "f64": (("m8n8k4", "m16n8k4", "m16n8k8", "m16n8k16"), ("f64",), ("f64",)),
    "e4m3": (("m16n8k32",), ("e4m3", "e5m2"), ("f32",)),
    "e5m2": (("m16n8k32",), ("e4m3", "e5m2"), ("f32",)),
}


@instruction("mma", operands=4)
def mma(b: BlockBuilder, i: Instruction, m: Modifiers) -> None:
    """D = A·B + C. Fragments are turned into float32 or float64 matrices once per block of code and reused."""
    m.one_of("sync")
    m.one_of("aligned")
    shape = m.one_of(*SHAPES)
    m.one_of("row")
    m.one_of("col")
    result, a_type, b_type, c_type = m.type(), m.type(), m.type(), m.type()
    shapes, partners, sums = FORMS.get(a_type, ((), (), ()))
    if shape not in shapes or b_type not in partners or result != c_type or result not in sums:
        raise b.unsupported(f"mma.{shape} of {a_type}, {b_type}, {c_type} to {result} is not supported")
    b.count_class(f"mma_{shape}_{a_type}")
    target, x, y, c = i.operands
    kind, keep = ("f8" if a_type == "f64" else "u4"), {"f32": "f4", "f64": "f8", "f16": "u4"}[result]
    left, right = ([b.read(v, kind) for v in b.parts(factor)] for factor in (x, y))
    if a_type == "f64":
        name, side = "multiply_f64", "right_f64" if shape == "m8n8k4" else "left_f64"
        factors = (_fragment(b, side, left), f"{_fragment(b, 'right_f64', right)}.swapaxes(1, 2)")
    else:
        name = {"f16": "multiply_half", "f32": "multiply_float8" if shape == "m16n8k32" else "multiply"}[result]
        factors = (_fragment(b, f"factor_{a_type}", left, True), _fragment(b, f"factor_{b_type}", right, False))
    start = "".join(f"{b.read(v, keep)}, " for v in b.parts(c))
    values = b.temporary(f"{name}(X, {factors[0]}, {factors[1]}, ({start}))")
    for k, v in enumerate(b.parts(target)):
        b.write(v, keep, f"{values}[{k}]")


def _fragment(b: BlockBuilder, function: str, registers: list[str], *more: object) -> str:
    """The factor that a function of matrices.py makes of registers."""
    call = f"{function}(X, ({''.join(r + ', ' for r in registers)}){''.join(f', {x}' for x in more)})"
    if call not in b.fragments:
        b.fragments[call] = b.temporary(call)
    return b.fragments[call]
