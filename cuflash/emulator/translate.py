"""Basic blocks to Python functions.

Each block becomes one function `block(X, P, in0, in1, ...) -> (out0, ..., [condition])`. A register is an array whose
shape broadcasts to (blocks, warps, 32), or a scalar; what is the same in all lanes, warps or blocks is kept and
computed once. X is the set of lanes that execute (lanes.Lanes), P the parameter bytes. Registers that cross no block
boundary are plain local variables.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Set
from dataclasses import dataclass, field, replace

import numpy as np

from cuflash.emulator import conversions, dtypes, floats, generic, integers, matrices
from cuflash.emulator.faults import InvalidPtx, UnsupportedInstruction
from cuflash.emulator.flow import Block, Flow
from cuflash.emulator.instructions import TABLE, Modifiers
from cuflash.emulator.ir import Imm, Instruction, Mem, Operand, Reg, Sym, Vec, bits
from cuflash.emulator.liveness import live_out, uses_and_defines
from cuflash.emulator.memory import WINDOWS

SPECIAL = {
    "tid",
    "ntid",
    "ctaid",
    "nctaid",
    "laneid",
    "warpid",
    "nwarpid",
    "clock",
    "clock64",
    "clock_hi",
    "globaltimer",
    "smid",
    "nsmid",
    "gridid",
    "dynamic_smem_size",
    "total_smem_size",
    "aggr_smem_size",
    "lanemask_eq",
    "lanemask_lt",
    "lanemask_le",
    "lanemask_gt",
    "lanemask_ge",
}
WIDE_SPECIAL = {"clock64", "globaltimer"}
VOCABULARY = {
    **vars(dtypes),
    **vars(integers),
    **vars(conversions),
    **vars(floats),
    **vars(matrices),
    "in_space": generic.in_space,
}
SHARING = (("shared", "generic"), ("global", "generic"))  # spaces whose accesses may touch shared, global memory


@dataclass(slots=True)
class Code:
    """One translated block. Its function is compiled when it first runs: many never do.

    source, scope : the text of the function and the names it uses
    ins, outs : indices of the registers that the function takes and returns
    exposed : incoming registers that an outgoing one may alias
    trace : opcode and Site of every instruction, in plain tuples: the garbage collector need not follow those
    block : without its instructions
    counts : instruction classes to numbers of instructions in the block
    """

    source: str
    scope: dict[str, object]
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    exposed: tuple[int, ...]
    trace: tuple[tuple[str, tuple], ...]
    block: Block
    counts: dict[str, int]
    compiled: Callable[..., tuple] | None = None

    @property
    def function(self) -> Callable[..., tuple]:
        if self.compiled is None:
            made: dict[str, Callable[..., tuple]] = {}
            exec(compile(self.source, f"<block {self.block.index}>", "exec"), self.scope, made)
            self.compiled = made["block"]
        return self.compiled


@dataclass(slots=True)
class Translation:
    """A translated kernel: its blocks, the kind of every register that crosses a block boundary, and the sites of
    instructions as plain tuples."""

    codes: list[Code]
    kinds: list[str]
    names: dict[str, int]
    sites: list[tuple]
    shared_granule: int
    global_granule: int
    globals_used: frozenset[str]


def translate(flow: Flow, symbols: dict[str, int], outside: Set[str]) -> Translation:
    """Translate a kernel.

    symbols : addresses of variables in their own space; outside : names of variables in global memory.

    Raises UnsupportedInstruction, naming the PTX line, for anything that has no entry in the instruction table.
    """
    uses, defines = zip(*(uses_and_defines(block, flow.function.registers) for block in flow.blocks), strict=True)
    live = live_out(flow.blocks, uses, defines)
    crossing = sorted(set().union(*uses))
    number = {name: k for k, name in enumerate(crossing)}
    shelf = Shelf(symbols, outside)
    codes = []
    for block, use, define, out in zip(flow.blocks, uses, defines, live, strict=True):
        builder = BlockBuilder(flow, shelf)
        ins = sorted(use)
        outs = sorted(define & out)
        source = builder.build(block, ins, outs)
        exposed = tuple(number[name] for name in ins if name in builder.exposed)
        places = tuple(number[name] for name in ins), tuple(number[name] for name in outs)
        trace = tuple((x.opcode, tuple(x.site)) for x in (*block.body, block.end.instruction) if x is not None)
        bare = replace(block, body=[])
        codes.append(Code(source, shelf.scope, *places, exposed, trace, bare, builder.counts))
    kinds = [_storage(flow, name) for name in crossing]
    shared, outer = (min((w for space, w in shelf.widths if space in names), default=16) for names in SHARING)
    return Translation(codes, kinds, number, shelf.sites, shared, outer, frozenset(shelf.globals_used))


def _storage(flow: Flow, name: str) -> str:
    return flow.function.registers.get(name) or pseudo_kind(name)


def pseudo_kind(name: str) -> str:
    """Kind of a register that stands for a call parameter ("variable+offset:kind") or for emulator state."""
    return name.rpartition(":")[2]


@dataclass(slots=True)
class Shelf:
    """What the blocks of a kernel share while they are translated."""

    symbols: dict[str, int]
    outside: Set[str]
    scope: dict[str, object] = field(default_factory=lambda: dict(VOCABULARY))
    sites: list[tuple] = field(default_factory=list)
    widths: set[tuple[str, int]] = field(default_factory=set)
    globals_used: set[str] = field(default_factory=set)


class BlockBuilder:
    """Writes the Python function of one block. Instruction handlers call read, write, emit and the helpers below."""

    windows = WINDOWS

    def __init__(self, flow: Flow, shelf: Shelf) -> None:
        self.registers = flow.function.registers
        self.shelf, self.symbols, self.sites = shelf, shelf.symbols, shelf.sites
        self.lines: list[str] = []
        self.values: dict[str, dict[str, str]] = {}  # register -> kind -> Python variable
        self.storage: dict[str, str] = {}  # register -> kind it was last written as
        self.origin: dict[str, str] = {}  # Python variable -> incoming register it may alias
        self.exposed: set[str] = set()
        self.counts: dict[str, int] = {}
        self.fragments: dict[str, str] = {}
        self.count = 0
        self.guard: str | None = None
        self.current: Instruction | None = None

    def build(self, block: Block, ins: list[str], outs: list[str]) -> str:
        """The text of the function."""
        names = []
        for name in ins:
            variable = self._new()
            kind = self.kind_of(name)
            self.values[name] = {kind: variable}
            self.storage[name] = kind
            self.origin[variable] = name
            names.append(variable)
        for item in block.body:
            self._instruction(item)
        self.current = block.end.instruction
        results = []
        for name in outs:
            variable = self.read_register(name, self.kind_of(name))
            if variable in self.origin:
                self.exposed.add(self.origin[variable])
            results.append(variable)
        end = block.end
        if end.guard is not None:
            results.append(self.predicate(end.guard))
        elif end.index is not None:
            results.append(self.read(end.index, "u4"))
        elif end.kind == "barrier" and end.instruction is not None:
            self.count_class("barrier")
            results.append(self.barrier_operands(end.instruction))
        if end.kind in ("branch", "jump", "switch") and end.instruction is not None:
            self.count_class("control")
        head = f"def block({', '.join(['X', 'P', *names])}):"
        tail = f"return ({''.join(r + ', ' for r in results)})"
        return "\n ".join([head, *self.lines, tail])

    def _instruction(self, item: Instruction) -> None:
        if item.opcode not in TABLE:
            raise UnsupportedInstruction(f"instruction {item.opcode} is not supported", item.site)
        handler, counts = TABLE[item.opcode]
        if len(item.operands) not in counts:
            raise UnsupportedInstruction(
                f"{item.opcode} with {len(item.operands)} operands is not supported", item.site
            )
        self.current = item
        self.guard = self.predicate(item.guard) if item.guard is not None else None
        modifiers = Modifiers(item)
        try:
            handler(self, item, modifiers)
        except (KeyError, IndexError, ValueError) as error:
            raise UnsupportedInstruction(f"this form of {item.opcode} is not supported ({error})", item.site) from error
        if modifiers.rest:
            raise UnsupportedInstruction(f"modifier .{modifiers.rest[0]} of {item.opcode} is not supported", item.site)

    # --- for the handlers

    def emit(self, line: str) -> None:
        self.lines.append(line)

    def temporary(self, expression: str) -> str:
        """A new variable that holds an expression."""
        variable = self._new()
        self.lines.append(f"{variable} = {expression}")
        return variable

    def site(self) -> int:
        """Number of the present instruction, to be named by faults."""
        if self.current is None:
            raise InvalidPtx("no instruction is being translated")
        self.sites.append(tuple(self.current.site))
        return len(self.sites) - 1

    def count_class(self, name: str) -> None:
        self.counts[name] = self.counts.get(name, 0) + 1

    def unsupported(self, message: str) -> UnsupportedInstruction:
        return UnsupportedInstruction(message, self.current.site if self.current else None)

    def kind_of(self, name: str) -> str:
        """Kind in which a register is kept."""
        return self.registers.get(name) or pseudo_kind(name)

    def predicate(self, register: Reg) -> str:
        value = self.read_register(register.name, "p")
        return self.temporary(f"~{value}") if register.negated else value

    def constant(self, value: object, kind: str) -> str:
        """A NumPy scalar constant of a kind, from Python number or raw bits (bytes)."""
        dtype = np.dtype("?" if kind == "p" else kind)
        scalar = np.frombuffer(value, dtype)[0] if isinstance(value, bytes) else np.array(value).astype(dtype)[()]
        name = f"c_{kind}_{scalar.tobytes().hex()}"
        self.shelf.scope.setdefault(name, np.array(scalar))
        return name

    def read(self, operand: Operand, kind: str) -> str:
        """Python variable that holds an operand as an array of a kind."""
        if isinstance(operand, Imm):
            return self._immediate(operand, kind)
        if isinstance(operand, Sym):
            if operand.name in self.registers:
                return self.read_register(operand.name, kind)
            return self.address_of(operand, kind)
        if not isinstance(operand, Reg):
            raise self.unsupported(f"operand {operand} is not supported here")
        if operand.negated:
            return self.predicate(operand)
        if operand.name not in self.registers and operand.name not in self.values:
            return self._special(operand.name, kind)
        return self.read_register(operand.name, kind)

    def address_of(self, symbol: Sym, kind: str) -> str:
        """Address of a variable in its own space."""
        if symbol.name in self.symbols:
            return self.constant(self.symbols[symbol.name] + symbol.offset, kind)
        if symbol.name not in self.shelf.outside:
            raise self.unsupported(f"{symbol.name} is not a variable of this module")
        self.shelf.globals_used.add(symbol.name)
        offset = self.constant(symbol.offset, "u8")
        return self.temporary(f"X.machine.launch.symbols[{symbol.name!r}] + {offset}")

    def access(self, space: str, width: int) -> None:
        """Note how wide an access to a space is; the narrowest decides how finely races are looked for."""
        self.shelf.widths.add((space, width))

    def read_register(self, name: str, kind: str) -> str:
        if name not in self.values:  # never written: undefined in PTX, zero here
            self.values[name] = {self.kind_of(name): self.constant(0, self.kind_of(name))}
            self.storage[name] = self.kind_of(name)
        kinds = self.values[name]
        if kind in kinds:
            return kinds[kind]
        have = self.storage[name]
        source = kinds[have]
        if bits(have) == bits(kind):
            variable = self.temporary(f"{source}.view({kind.upper()})")
            if source in self.origin:
                self.origin[variable] = self.origin[source]
        elif bits(have) > bits(kind):  # the low bytes
            variable = self.temporary(f"{self._as_bits(name)}.astype(U{bits(kind)})")
            if not kind.startswith("u"):
                variable = self.temporary(f"{variable}.view({kind.upper()})")
        else:
            raise self.unsupported(f"register {name} is narrower than .{kind}")
        kinds[kind] = variable
        return variable

    def write(self, operand: Operand, kind: str, expression: str) -> None:
        """Assign to a register; a guard keeps the old value where it does not hold. Wider registers are extended."""
        if not isinstance(operand, (Reg, Sym)):
            raise self.unsupported(f"destination {operand} is not supported")
        if operand.name == "_":
            return
        keep = self.kind_of(operand.name)
        if bits(kind) < bits(keep) and kind != "p":
            wide = f"{'i' if kind[0] == 'i' else 'u'}{bits(keep)}"
            value = expression if kind[0] != "f" else f"{expression}.view(U{bits(kind)})"
            expression, kind = f"({value}).astype({wide.upper()})", wide
        if self.guard is not None:
            old = self.read_register(operand.name, kind)
            expression = f"choose({self.guard}, {expression}, {old})"
        variable = expression if expression.isidentifier() else self.temporary(expression)
        self.values[operand.name] = {kind: variable}
        self.storage[operand.name] = kind

    def parts(self, operand: Operand) -> tuple[Operand, ...]:
        return operand.items if isinstance(operand, Vec) else (operand,)

    def address(self, operand: Operand, width: str = "u8") -> str:
        """Variable that holds the address of a memory operand, 64 or 32 bits wide."""
        if not isinstance(operand, Mem):
            raise self.unsupported(f"operand {operand} must be an address")
        base = operand.base
        if base is None:
            return self.constant(operand.offset, width)
        if isinstance(base, Sym) and base.name not in self.registers:
            return self.address_of(Sym(base.name, base.offset + operand.offset), width)
        own = self.kind_of(base.name)
        if bits(own) < bits(width):
            value = f"{self.read_register(base.name, f'u{bits(own)}')}.astype({width.upper()})"
        else:
            value = self.read_register(base.name, width)
        if operand.offset == 0:
            return self.temporary(value) if "." in value else value
        return self.temporary(f"{value} + {self.constant(operand.offset % (1 << 8 * bits(width)), width)}")

    def mask(self) -> str:
        """The guard as an argument of memory functions."""
        return self.guard or "None"

    # --- inside

    def barrier_operands(self, item: Instruction) -> str:
        numbers = [self.read(x, "u4") for x in item.operands if not isinstance(x, Imm)]
        values = iter(numbers)
        parts = [str(x.value) if isinstance(x, Imm) else next(values) for x in item.operands]
        return f"({''.join(p + ', ' for p in parts)})"

    def _new(self) -> str:
        self.count += 1
        return f"v{self.count}"

    def _as_bits(self, name: str) -> str:
        kind = f"u{bits(self.storage[name])}"
        return self.read_register(name, kind) if self.storage[name] != kind else self.values[name][kind]

    def _immediate(self, operand: Imm, kind: str) -> str:
        if operand.float_width and kind[0] == "f":
            wide = "<f" if operand.float_width == 4 else "<d"
            number = struct.unpack(wide, operand.value.to_bytes(operand.float_width, "little"))[0]
            if bits(kind) == operand.float_width:
                return self.constant(operand.value.to_bytes(operand.float_width, "little"), kind)
            return self.constant(np.array(number, kind).tobytes(), kind)
        if kind == "p":
            return self.constant(bool(operand.value), kind)
        return self.constant((operand.value % (1 << 8 * bits(kind))).to_bytes(bits(kind), "little"), kind)

    def _special(self, name: str, kind: str) -> str:
        base, _, axis = name.removeprefix("%").partition(".")
        if name == "WARP_SZ":
            return self.constant(32, kind)
        if not name.startswith("%") or base not in SPECIAL or axis not in ("", "x", "y", "z"):
            raise self.unsupported(f"{name} is neither a register nor a supported special register")
        have = "u8" if base in WIDE_SPECIAL else "u4"
        attribute = f"X.special('{base}', {'xyz'.index(axis) if axis else 0})"
        pseudo = f"{name}:{have}"
        if pseudo not in self.values or base.startswith("clock"):
            self.values[pseudo] = {have: self.temporary(attribute)}
            self.storage[pseudo] = have
        return self.read_register(pseudo, kind)
