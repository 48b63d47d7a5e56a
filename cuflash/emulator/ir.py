"""What the parser makes of PTX text: modules, functions, instructions, operands."""

from __future__ import annotations

from dataclasses import dataclass, field

from cuflash.emulator.faults import Site

# Register and operand kinds are NumPy type codes: u = unsigned, i = signed, f = IEEE floating, then bytes; "p" =
# predicate.
# bfloat16, float8 and packed types travel as unsigned bits.
KINDS = {
    "b8": "u1", "u8": "u1", "s8": "i1",
    "b16": "u2", "u16": "u2", "s16": "i2", "f16": "f2", "bf16": "u2",
    "b32": "u4", "u32": "u4", "s32": "i4", "f32": "f4", "f16x2": "u4", "bf16x2": "u4", "tf32": "u4",
    "b64": "u8", "u64": "u8", "s64": "i8", "f64": "f8",
    "e4m3": "u1", "e5m2": "u1", "e4m3x2": "u2", "e5m2x2": "u2",
    "pred": "p",
}  # fmt: skip


def bits(kind: str) -> int:
    """Width of a kind in bytes (a predicate counts one)."""
    return 1 if kind == "p" else int(kind[1])


@dataclass(frozen=True, slots=True)
class Reg:
    """A register, or a special register when the name starts with % and is not declared."""

    name: str
    negated: bool = False


@dataclass(frozen=True, slots=True)
class Imm:
    """A constant: an integer, or the bits of a floating constant with its width in bytes."""

    value: int
    float_width: int = 0


@dataclass(frozen=True, slots=True)
class Sym:
    """A name that is no register: variable, label, function or parameter, with a constant offset."""

    name: str
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Mem:
    """[base + offset]; base is a register, a symbol, or None for an absolute address."""

    base: Reg | Sym | None
    offset: int


@dataclass(frozen=True, slots=True)
class Vec:
    """{a, b, ...}: the parts of a vector operand."""

    items: tuple[Operand, ...]


@dataclass(frozen=True, slots=True)
class Pair:
    """p|q: two destinations."""

    first: Operand
    second: Operand


@dataclass(frozen=True, slots=True)
class Args:
    """(a, b, ...): the parameter list of a call."""

    items: tuple[Operand, ...]


Operand = Reg | Imm | Sym | Mem | Vec | Pair | Args


@dataclass(slots=True)
class Instruction:
    """One instruction: guard @p or @!p, opcode, modifiers after the dots, operands, and where it stands."""

    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Reg | None
    site: Site


@dataclass(frozen=True, slots=True)
class Variable:
    """A .global, .const, .shared, .local or .param variable. data holds initial bytes, symbols (offset, name)
    addresses."""

    name: str
    space: str
    align: int
    size: int
    data: bytes | None = None
    symbols: tuple[tuple[int, Sym], ...] = ()
    dynamic: bool = False


@dataclass(slots=True)
class Function:
    """A kernel (.entry) or a device function (.func): its body is a list of instructions and label names."""

    name: str
    is_entry: bool
    params: list[Variable]
    results: list[Variable]
    body: list[Instruction | str] = field(default_factory=list)
    registers: dict[str, str] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)
    tables: dict[str, tuple[str, ...]] = field(default_factory=dict)
    maxntid: tuple[int, int, int] | None = None
    reqntid: tuple[int, int, int] | None = None


@dataclass(slots=True)
class Program:
    """One PTX module."""

    target: str
    functions: dict[str, Function]
    variables: dict[str, Variable]
