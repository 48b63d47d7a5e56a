"""The table that handlers register in, and which registers an instruction reads and writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from cuflash.emulator.ir import KINDS, Args, Instruction, Mem, Operand, Pair, Reg, Sym, Vec, bits

if TYPE_CHECKING:
    from cuflash.emulator.translate import BlockBuilder

Handler = Callable[["BlockBuilder", Instruction, "Modifiers"], None]
TABLE: dict[str, tuple[Handler, tuple[int, ...]]] = {}

# Instructions whose first operand is not a destination.
NO_RESULT = {
    "st",
    "red",
    "cp",
    "bar",
    "barrier",
    "membar",
    "fence",
    "prefetch",
    "prefetchu",
    "discard",
    "applypriority",
    "stmatrix",
    "barrier_give",
    "nanosleep",
    "griddepcontrol",
    "pmevent",
}


def instruction(*opcodes: str, operands: int | tuple[int, ...]) -> Callable[[Handler], Handler]:
    """Register a handler for opcodes; operands is the number of operands they take, or several such numbers."""

    def register(handler: Handler) -> Handler:
        for opcode in opcodes:
            TABLE[opcode] = handler, (operands,) if isinstance(operands, int) else operands
        return handler

    return register


def operands_of(item: Instruction, registers: dict[str, str]) -> tuple[list[str], list[str]]:
    """Names of the registers that an instruction writes and reads, apart from its guard."""
    operands = item.operands
    if item.opcode in ("ld", "st") and (slots := call_slots(item, registers)):
        value = list(names_in(operands[0] if item.opcode == "ld" else operands[1], registers))
        return (value, slots) if item.opcode == "ld" else (slots, value)
    results = 0 if item.opcode in NO_RESULT else 1
    written = [name for x in operands[:results] for name in names_in(x, registers)]
    read = [name for x in operands[results:] for name in names_in(x, registers)]
    if operands and results and isinstance(operands[0], Mem):
        written, read = [], [*written, *read]
    if item.opcode in CARRY_READERS:
        read = [*read, CARRY]
    if "cc" in item.modifiers:
        written = [*written, CARRY]
    return written, read


CARRY = "%carry:u4"  # the condition code register of add.cc, addc, ...
CARRY_READERS = {"addc", "subc", "madc"}


def names_in(operand: Operand, registers: dict[str, str]) -> Iterator[str]:
    """Register names inside an operand."""
    if isinstance(operand, (Reg, Sym)):
        if operand.name in registers:
            yield operand.name
    elif isinstance(operand, Mem):
        if operand.base is not None:
            yield from names_in(operand.base, registers)
    elif isinstance(operand, (Vec, Args)):
        for item in operand.items:
            yield from names_in(item, registers)
    elif isinstance(operand, Pair):
        yield from names_in(operand.first, registers)
        yield from names_in(operand.second, registers)


def call_slots(item: Instruction, registers: dict[str, str]) -> list[str]:
    """Registers that stand for the parameters of an inlined call, one per element of a ld.param or st.param; none for
    a kernel's."""
    place = item.operands[1 if item.opcode == "ld" else 0]
    if "param" not in item.modifiers or not isinstance(place, Mem) or not isinstance(place.base, Sym):
        return []
    if place.base.name in registers or not is_call_parameter(place.base.name):
        return []
    kind = next(KINDS[m] for m in item.modifiers if m in KINDS)
    count = next((int(m[1]) for m in item.modifiers if m in ("v2", "v4")), 1)
    start = place.base.offset + place.offset
    return [f"{place.base.name}+{start + k * bits(kind)}:u{bits(kind)}" for k in range(count)]


def is_call_parameter(name: str) -> bool:
    """A .param variable of a call: declared in a scope inside the caller's body, so it carries a scope mark."""
    return "@" in name


class Modifiers:
    """The dotted modifiers of an instruction; whatever no handler asks for is refused afterwards."""

    def __init__(self, item: Instruction) -> None:
        self.rest = list(item.modifiers)

    def flag(self, *names: str) -> bool:
        """True when one of the names is present; it counts as handled."""
        return self.option(*names) is not None

    def option(self, *names: str, default: str | None = None) -> str | None:
        """The one of the names that is present."""
        for name in names:
            if name in self.rest:
                self.rest.remove(name)
                return name
        return default

    def one_of(self, *names: str) -> str:
        """The one of the names that is present; there must be one."""
        found = self.option(*names)
        if found is None:
            raise ValueError(f"one of {', '.join(names)} is needed")
        return found

    def type(self) -> str:
        """The next type name, such as "f32"."""
        for name in self.rest:
            if name in KINDS:
                self.rest.remove(name)
                return name
        raise ValueError("a type is needed")
