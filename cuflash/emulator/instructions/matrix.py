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


SHAPES = {  # rows, columns, depth
    "m8n8k4": (8, 8, 4), "m16n8k4": (16, 8, 4), "m16n8k8": (16, 8, 8), "m16n8k16": (16, 8, 16), "m16n8k32": (16, 8, 32),
}  # fmt: skip
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
    rows, columns, depth = SHAPES[shape]
    target, x, y, c = i.operands
    kind = "f8" if a_type == "f64" else "u4"
    left = _fragment(b, "left", [b.read(v, kind) for v in b.parts(x)], a_type, rows, depth)
    right = _fragment(b, "right", [b.read(v, kind) for v in b.parts(y)], b_type, columns, depth)
    keep = {"f32": "f4", "f64": "f8", "f16": "u4"}[result]
    start = "".join(f"{b.read(v, keep)}, " for v in b.parts(c))
    name = "multiply_half" if result == "f16" else "multiply_cut" if a_type == "tf32" else "multiply"
    values = b.temporary(f"{name}(X, {left}, {right}, ({start}))")
    for k, v in enumerate(b.parts(target)):
        b.write(v, keep, f"{values}[{k}]")


def _fragment(b: BlockBuilder, side: str, registers: list[str], t: str, rows: int, depth: int) -> str:
    key = (side, t, *registers)
    if key not in b.fragments:
        b.fragments[key] = b.temporary(f"{side}_{t}(X, ({''.join(r + ', ' for r in registers)}), {rows}, {depth})")
    return b.fragments[key]
