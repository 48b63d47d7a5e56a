"""Integer arithmetic, bits, predicates, comparisons, selections and moves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cuflash.emulator.instructions import floating
from cuflash.emulator.instructions.table import CARRY, Modifiers, instruction
from cuflash.emulator.ir import KINDS, Imm, Instruction, Mem, Pair, Reg, Sym, Vec, bits

if TYPE_CHECKING:
    from cuflash.emulator.translate import BlockBuilder

FLOATS = {"f16", "f16x2", "bf16", "bf16x2", "f32", "f64"}


@instruction("add", "sub", "mul", "div", "addc", "subc", operands=3)
@instruction("min", "max", operands=(3, 4))
@instruction("mad", "fma", "madc", operands=4)
@instruction("abs", "neg", operands=2)
def arithmetic(b: BlockBuilder, i: Instruction, m: Modifiers) -> None:
    part = m.option("lo", "hi", "wide")
    t = m.type()
    if t in FLOATS:
        floating.arithmetic(b, i, m, t)
        return
    if part == "wide":
        _wide(b, i, m, t)
        return
    b.count_class("integer")
    k, saturates = KINDS[t], m.flag("sat")
    if i.opcode in ("add", "sub", "mul", "mad") and part != "hi" and not saturates and "cc" not in m.rest:
        k = f"u{bits(k)}"  # the sign does not matter, and registers hold unsigned words
    values = [b.read(x, k) for x in i.operands[1:]]
    if i.opcode in ("addc", "subc", "madc") or "cc" in m.rest:
        _carry(b, i, m, k, values, part)
        return
    x, y, *rest = [*values, ""]
    product = f"high_product({x}, {y}, '{k}')" if part == "hi" else f"{x} * {y}"
    expression = {
        "add": f"{x} + {y}",
        "sub": f"{x} - {y}",
        "mul": product,
        "mad": f"{product} + {rest[0] if rest else ''}",
        "min": f"minimum({x}, {y})",
        "max": f"maximum({x}, {y})",
        "abs": f"abs({x})",
        "neg": f"-{x}",
        "div": f"divide({x}, {y}, '{k}')",
    }[i.opcode]
    if saturates:
        wide = {"add": f"{x}.astype(I8) + {y}", "sub": f"{x}.astype(I8) - {y}"}[i.opcode]
        expression = f"saturate_int({wide}, '{k}')"
    b.write(i.operands[0], k, expression)


def _wide(b: BlockBuilder, i: Instruction, m: Modifiers, t: str) -> None:
    b.count_class("integer")
    k = KINDS[t]
    w = f"{k[0]}{2 * bits(k)}"
    product = f"{b.read(i.operands[1], k)}.astype({w.upper()}) * {b.read(i.operands[2], k)}"
    if i.opcode == "mad":
        product = f"{product} + {b.read(i.operands[3], w)}"
    b.write(i.operands[0], w, product)


def _carry(b: BlockBuilder, i: Instruction, m: Modifiers, k: str, values: list[str], part: str | None) -> None:
    """Multi-word arithmetic: the carry travels in a register of its own. 32-bit forms only."""
    if bits(k) != 4:
        raise b.unsupported("carries are supported for 32-bit types")
    x, y, *rest = [f"{v}.view(U4)" for v in values]
    carry = b.read_register(CARRY, "u4") if i.opcode in ("addc", "subc", "madc") else None
    if i.opcode in ("mad", "madc"):
        x, y = f"({f'high_product({x}, {y}, {k!r})' if part == 'hi' else f'{x} * {y}'})", rest[0]
    minus = i.opcode in ("sub", "subc")
    total = f"{x}.astype(U8) {'-' if minus else '+'} {y}" + (f" {'-' if minus else '+'} {carry}" if carry else "")
    wide = b.temporary(total)
    if m.flag("cc"):
        b.write(Reg(CARRY), "u4", f"(({wide} >> {b.constant(32, 'u8')}) & {b.constant(1, 'u8')}).astype(U4)")
    b.write(i.operands[0], "u4", f"{wide}.astype(U4)")


@instruction("rem", operands=3)
def rem(b: BlockBuilder, i: Instruction, m: Modifiers) -> None:
    k = KINDS[m.type()]
    b.count_class("integer")
    b.write(i.operands[0], k, f"remainder({b.read(i.operands[1], k)}, {b.read(i.operands[2], k)}, '{k}')")


@instruction("mul24", operands=3)
@instruction("mad24", operands=4)
def mul24(b: BlockBuilder, i: Instruction, m: Modifiers) -> None:
    m.one_of("lo")
    k = KINDS[m.type()]
    b.count_class("integer")
    eight = b.constant(8, k)
    x, y = (f"({b.read(v, k)} << {eight} >> {eight})" for v in i.operands[1:3])
    add = f" + {b.read(i.operands[3], k)}" if i.opcode == "mad24" else ""
    b.write(i.operands[0], k, f"{x} * {y}{add}")


@instruction("sad", operands=4)
def sad(b: BlockBuilder, i: Instruction, m: Modifiers) -> None:
    k = KINDS[m.type()]
    b.count_class("integer")
    x, y, c = (b.read(v, k) for v in i.operands[1:])
    b.write(i.operands[0], k, f"(maximum({x}, {y}) - minimum({x}, {y})) + {c}")


@instruction("and", "or", "xor", operands=3)
@instruction("not", "cnot", operands=2)
def logic(b: BlockBuilder, i: Instruction, m: Modifiers) -> None:
    k = KINDS[m.type()]
    b.count_class("integer")
    x, *y = (b.read(v, k) for v in i.operands[1:])
    sign = {"and": "&", "or": "|", "xor": "^"}.get(i.opcode)
    if sign:
        b.write(i.operands[0], k, f"{x} {sign} {y[0]}")
    else:
        b.write(i.operands[0], k, f"~{x}" if i.opcode == "not" else f"({x} == 0).astype({k.upper()})")


@instruction("shl", "shr", operands=3)
def shift(b: BlockBuilder, i: Instruction, m: Modifiers) -> None:
    k = KINDS[m.type()]
    b.count_class("integer")
    x, count = b.read(i.operands[1], k), i.operands[2]
    if isinstance(count, Imm) and count.value < 8 * bits(k):
        b.write(i.operands[0], k, f"{x} {'<<' if i.opcode == 'shl' else '>>'} {b.constant(count.value, k)}")
    else:
        name = "shift_left" if i.opcode == "shl" else "shift_right"
        b.write(i.operands[0], k, f"{name}({x}, {b.read(count, 'u4')})")


@instruction("shf", operands=4)
def shf(b: BlockBuilder, i: Instruction, m: Modifiers) -> None:
    side = m.one_of("l", "r")
    wrap = m.one_of("wrap", "clamp") == "wrap"
    k = KINDS[m.type()]
    b.count_class("integer")
    low, high, count = (b.read(v, "u4") for v in i.operands[1:])
    b.write(
        i.operands[0],
        k,
        f"funnel_{'left' if side == 'l' else 'right'}({low}, {high}, {count}, {wrap}).view({k.upper()})",
    )


@instruction("lop3", operands=5)
def lop3(b: BlockBuilder, i: Instruction, m: Modifiers) -> None:
    m.type()
    b.count_class("integer")
    x, y, z = (b.read(v, "u4") for v in i.operands[1:4])
    table = i.operands[4]
    if not isinstance(table, Imm):
        raise b.unsupported("lop3 needs a constant table")
    b.write(i.operands[0], "u4", f"lop3({x}, {y}, {z}, {table.value & 255})")


@instruction("bfe", operands=4)
def bfe(b: BlockBuilder, i: Instruction, m: Modifiers) -> None:
    k = KINDS[m.type()]
    b.count_class("integer")
    x, start, length = b.read(i.operands[1], k), b.read(i.operands[2], "u4"), b.read(i.operands[3], "u4")
    b.write(i.operands[0], k, f"bit_field({x}, {start}, {length}, '{k}')")


@instruction("bfi", operands=5)
def bfi(b: BlockBuilder, i: Instruction, m: Modifiers) -> None:
    k = KINDS[m.type()]
    b.count_class("integer")
    x, y, start, length = (
        b.read(i.operands[1], k),
        b.read(i.operands[2], k),
        b.read(i.operands[3], "u4"),
        b.read(i.operands[4], "u4"),
    )
    b.write(i.operands[0], k, f"insert_field({x}, {y}, {start}, {length})")


@instruction("bmsk", operands=3)
def bmsk(b: BlockBuilder, i: Instruction, m: Modifiers) -> None:
    wrap = m.one_of("clamp", "wrap") == "wrap"
    m.type()
    b.count_class("integer")
    start, length = (b.read(v, "u4") for v in i.operands[1:])
    if wrap:
        limit = b.constant(31, "u4")
        start, length = f"({start} & {limit})", f"({length} & {limit})"
    zero, ones = b.constant(0, "u4"), b.constant(0xFFFFFFFF, "u4")
    b.write(i.operands[0], "u4", f"shift_left(~shift_left({ones}, {length}) | {zero}, {start})")


@instruction("popc", "clz", "brev", operands=2)
def bit_count(b: BlockBuilder, i: Instruction, m: Modifiers) -> None:
    k = KINDS[m.type()]
    b.count_class("integer")
    name = {"popc": "population", "clz": "leading_zeros", "brev": "reverse_bits"}[i.opcode]
    b.write(i.operands[0], k if i.opcode == "brev" else "u4", f"{name}({b.read(i.operands[1], k)})")


@instruction("bfind", operands=2)
def bfind(b: BlockBuilder, i: Instruction, m: Modifiers) -> None:
    amount = m.flag("shiftamt")
    k = KINDS[m.type()]
    b.count_class("integer")
    b.write(i.operands[0], "u4", f"find_bit({b.read(i.operands[1], k)}, '{k}', {amount})")


@instruction("prmt", operands=4)
def prmt(b: BlockBuilder, i: Instruction, m: Modifiers) -> None:
    m.type()
    mode = m.option("f4e", "b4e", "rc8", "ecl", "ecr", "rc16")
    b.count_class("integer")
    x, y, selector = (b.read(v, "u4") for v in i.operands[1:])
    b.write(i.operands[0], "u4", f"permute_bytes({x}, {y}, {selector}, {mode!r})")


@instruction("mov", operands=2)
def mov(b: BlockBuilder, i: Instruction, m: Modifiers) -> None:
    t = m.type()
    b.count_class("move")
    k = KINDS[t]
    target, source = i.operands
    if isinstance(target, Vec):
        _unpack(b, target, b.read(source, k), bits(k) // len(target.items))
    elif isinstance(source, Vec):
        part = bits(k) // len(source.items)
        b.write(target, k, _pack(b, [b.read(x, f"u{part}") for x in source.items], part, k))
    else:
        b.write(target, k, b.read(source, k))


def _unpack(b: BlockBuilder, target: Vec, whole: str, part: int) -> None:
    wide = f"u{part * len(target.items)}"
    unsigned = b.temporary(f"{whole}.view({wide.upper()})")
    for number, item in enumerate(target.items):
        shifted = f"({unsigned} >> {b.constant(8 * part * number, wide)})" if number else unsigned
        b.write(item, f"u{part}", f"{shifted}.astype(U{part})")


def _pack(b: BlockBuilder, values: list[str], part: int, k: str) -> str:
    wide = f"u{part * len(values)}"
    terms = [
        f"({v}.astype({wide.upper()}) << {b.constant(8 * part * n, wide)})" if n else f"{v}.astype({wide.upper()})"
        for n, v in enumerate(values)
    ]
    return f"({' | '.join(terms)})" + (f".view({k.upper()})" if k != wide else "")


@instruction("cvta", operands=2)
def cvta(b: BlockBuilder, i: Instruction, m: Modifiers) -> None:
    """Between an address in a space and a generic address: the space's window is added or taken away."""
    to = m.flag("to")
    space = m.one_of("global", "shared", "local", "const", "param")
    m.flag("::cta")
    k = KINDS[m.type()]
    b.count_class("integer")
    source = i.operands[1]
    value = (
        b.address(Mem(source, 0), k)
        if isinstance(source, Sym) and source.name not in b.registers
        else b.read(source, k)
    )
    b.write(
        i.operands[0],
        k,
        f"{value} {'-' if to else '+'} {b.constant(b.windows[space], k)}" if b.windows[space] else value,
    )


@instruction("isspacep", operands=2)
def isspacep(b: BlockBuilder, i: Instruction, m: Modifiers) -> None:
    space = m.one_of("global", "shared", "local", "const", "param")
    b.count_class("integer")
    b.write(i.operands[0], "p", f"in_space({b.read(i.operands[1], 'u8')}, {space!r})")


COMPARISONS = {
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "lo": "<",
    "ls": "<=",
    "hi": ">",
    "hs": ">=",
}


def _compare(b: BlockBuilder, i: Instruction, m: Modifiers, t: str, how: str) -> str:
    """Expression of a comparison; the unordered forms (equ, ...) also hold when an operand is NaN."""
    if t in FLOATS:
        ftz = m.flag("ftz")
        x, y = (floating.read(b, v, t, ftz) for v in i.operands[1:3])
        if how in ("num", "nan"):
            either = f"(isnan({x}) | isnan({y}))"
            return f"~{either}" if how == "num" else either
        unordered = len(how) == 3
        plain = f"({x} {COMPARISONS[how[:2]]} {y})"
        if unordered:
            return f"({plain} | isnan({x}) | isnan({y}))"
        return f"({plain} & ~isnan({x}) & ~isnan({y}))" if how == "ne" else plain
    k = KINDS[t]
    if how in ("lo", "ls", "hi", "hs"):
        k = f"u{bits(k)}"
    return f"({b.read(i.operands[1], k)} {COMPARISONS[how]} {b.read(i.operands[2], k)})"


HOW = (
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "lo",
    "ls",
    "hi",
    "hs",
    "equ",
    "neu",
    "ltu",
    "leu",
    "gtu",
    "geu",
    "num",
    "nan",
)


@instruction("setp", operands=(3, 4))
def setp(b: BlockBuilder, i: Instruction, m: Modifiers) -> None:
    how = m.one_of(*HOW)
    join = m.option("and", "or", "xor")
    t = m.type()
    b.count_class("comparison")
    value = b.temporary(_compare(b, i, m, t, how))
    results = (i.operands[0].first, i.operands[0].second) if isinstance(i.operands[0], Pair) else (i.operands[0],)
    other = b.read(i.operands[3], "p") if join else None
    sign = {"and": "&", "or": "|", "xor": "^", None: ""}[join]
    if t in ("f16x2", "bf16x2"):
        _packed_setp(b, results, value, other, sign)
        return
    for target, each in zip(results, (value, f"~{value}"), strict=False):
        b.write(target, "p", f"{each} {sign} {other}" if other else each)


def _packed_setp(b: BlockBuilder, results: tuple, value: str, other: str | None, sign: str) -> None:
    for number, target in enumerate(results):
        each = f"{value}[..., {number}]"
        b.write(target, "p", f"{each} {sign} {other}" if other else each)


@instruction("set", operands=(3, 4))
def set_(b: BlockBuilder, i: Instruction, m: Modifiers) -> None:
    how = m.one_of(*HOW)
    join = m.option("and", "or", "xor")
    result, t = m.type(), m.type()
    b.count_class("comparison")
    value = _compare(b, i, m, t, how)
    if join:
        value = f"({value} {dict(zip(('and', 'or', 'xor'), '&|^', strict=True))[join]} {b.read(i.operands[3], 'p')})"
    if t in ("f16x2", "bf16x2") or result not in ("u32", "s32", "f32"):
        raise b.unsupported(f"set to .{result} from .{t} is not supported")
    yes = b.constant(1.0, "f4") if result == "f32" else b.constant(-1 if result == "s32" else 0xFFFFFFFF, KINDS[result])
    no = b.constant(0, KINDS[result])
    b.write(i.operands[0], KINDS[result], f"choose({value}, {yes}, {no})")


@instruction("selp", operands=4)
def selp(b: BlockBuilder, i: Instruction, m: Modifiers) -> None:
    k = KINDS[m.type()]
    b.count_class("move")
    b.write(
        i.operands[0],
        k,
        f"choose({b.read(i.operands[3], 'p')}, {b.read(i.operands[1], k)}, {b.read(i.operands[2], k)})",
    )


@instruction("slct", operands=4)
def slct(b: BlockBuilder, i: Instruction, m: Modifiers) -> None:
    ftz = m.flag("ftz")
    k, by = KINDS[m.type()], m.type()
    b.count_class("move")
    control = floating.read(b, i.operands[3], by, ftz) if by == "f32" else b.read(i.operands[3], KINDS[by])
    b.write(i.operands[0], k, f"choose({control} >= 0, {b.read(i.operands[1], k)}, {b.read(i.operands[2], k)})")
