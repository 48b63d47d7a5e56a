"""Loads, stores, atomics and asynchronous copies."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from cuflash.emulator.instructions.table import Modifiers, call_slots, instruction
from cuflash.emulator.ir import KINDS, Imm, Instruction, Mem, Operand, Reg, Sym, bits

if TYPE_CHECKING:
    from cuflash.emulator.translate import BlockBuilder

SCOPES = ("cta", "cluster", "gpu", "sys")
MEMORY = {  # where translated code finds each space
    "global": "X.machine.memory",
    "const": "X.machine.memory",
    "shared": "X.machine.shared",
    "local": "X.machine.local",
    "param": "X.machine.parameters",
    "generic": "X.machine.generic",
}
HINTS = ("ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc")


def _space(b: BlockBuilder, m: Modifiers) -> str:
    for name in ("global", "shared", "shared::cta", "param", "param::entry", "param::func", "local", "const"):
        if m.flag(name):
            return name.partition("::")[0]
    return "generic"


class Order(NamedTuple):
    """How an access is ordered: strong ones (all but weak) may meet each other in one place without being a race."""

    strong: bool
    acquires: bool
    releases: bool
    device: bool  # beyond the block
    policy: bool  # a cache policy follows the operands


def _order(m: Modifiers) -> Order:
    """Take ordering, scope and cache hints away."""
    semantics = m.option("acquire", "release", "acq_rel", "volatile", "relaxed", "mmio", "weak", default="weak")
    scope = m.option(*SCOPES)
    policy = False
    for name in list(m.rest):
        if name in HINTS or name.startswith(("L1::", "L2::")):
            m.rest.remove(name)
            policy |= name == "L2::cache_hint"
    acquires, releases = semantics in ("acquire", "acq_rel"), semantics in ("release", "acq_rel")
    return Order(semantics != "weak", acquires, releases, scope != "cta", policy)


def _address(b: BlockBuilder, place: Operand, space: str) -> str:
    return b.address(place, "u4" if space in ("shared", "param", "local") else "u8")


@instruction("ld", "ldu", operands=(2, 3))
def ld(b: BlockBuilder, i: Instruction, m: Modifiers) -> None:
    space = _space(b, m)
    order = _order(m)
    count = int((m.option("v2", "v4", "v8") or "v1")[1])
    kind = KINDS[m.type()]
    targets = b.parts(i.operands[0])
    place = i.operands[1]
    if slots := call_slots(i, b.registers):
        for target, slot in zip(targets, slots, strict=True):
            b.write(target, kind, b.read_register(slot, kind))
        return
    b.count_class(f"load_{space}")
    if space == "param" and isinstance(place, Mem) and isinstance(place.base, Sym) and place.base.name in b.symbols:
        start = b.symbols[place.base.name] + place.base.offset + place.offset
        for k, target in enumerate(targets):
            b.write(target, kind, f"P.value({start + k * bits(kind)}, {kind.upper()})")
        return
    address = _address(b, place, space)
    b.access(space, bits(kind) * count)
    strong = ", True" if order.strong else ""
    values = b.temporary(f"{MEMORY[space]}.load(X, {b.site()}, {address}, {b.mask()}, {kind.upper()}, {count}{strong})")
    if order.strong:
        b.emit("X.hear()")
    if order.acquires:
        b.emit(f"X.acquire({order.device})")
    for k, target in enumerate(targets):
        b.write(target, kind, f"{values}[{k}]")


@instruction("st", operands=(2, 3))
def st(b: BlockBuilder, i: Instruction, m: Modifiers) -> None:
    space = _space(b, m)
    order = _order(m)
    count = int((m.option("v2", "v4", "v8") or "v1")[1])
    kind = KINDS[m.type()]
    sources = b.parts(i.operands[1])
    if slots := call_slots(i, b.registers):
        for source, slot in zip(sources, slots, strict=True):
            b.write(Reg(slot), f"u{bits(kind)}", b.read(source, f"u{bits(kind)}"))
        return
    if len(sources) != count:
        raise ValueError(f"{count} values are needed")
    b.count_class(f"store_{space}")
    address = _address(b, i.operands[0], space)
    b.access(space, bits(kind) * count)
    values = "".join(f"{b.read(x, kind)}, " for x in sources)
    if order.releases:
        b.emit(f"X.release({order.device})")
    if order.strong:
        b.emit("X.publish()")
    strong = ", True" if order.strong else ""
    b.emit(f"{MEMORY[space]}.store(X, {b.site()}, {address}, {b.mask()}, {kind.upper()}, ({values}){strong})")


@instruction("atom", operands=(3, 4, 5))
@instruction("red", operands=(2, 3))
def atom(b: BlockBuilder, i: Instruction, m: Modifiers) -> None:
    """Atomic read-modify-write; red is atom without a result."""
    space = _space(b, m)
    order = _order(m)
    m.flag("noftz")
    operation = m.one_of("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")
    count = int((m.option("v2", "v4") or "v1")[1])
    t = m.type()
    if t in ("f16", "bf16", "bf16x2", "f16x2") and operation != "add":
        raise b.unsupported(f"{i.opcode}.{operation}.{t} is not supported")
    if count != 1 and (i.opcode, operation, space, t) != ("red", "add", "global", "f32"):
        raise b.unsupported(f"{i.opcode}.{operation}.{space}.v{count}.{t} is not supported")
    b.count_class(f"atomic_{space}")
    operands = list(i.operands)
    target = operands.pop(0) if i.opcode == "atom" else None
    kind = KINDS[t]
    address = _address(b, operands[0], space)
    b.access(space, bits(kind) * count)
    sources = operands[1:3] if operation == "cas" else b.parts(operands[1])
    values = "".join(f"{b.read(x, kind)}, " for x in sources)
    if order.releases:
        b.emit(f"X.release({order.device})")
    b.emit("X.publish()")
    result = b.temporary(
        f"{MEMORY[space]}.atomic(X, {b.site()}, {address}, {b.mask()}, {kind.upper()}, {operation!r}, ({values}), "
        f"{t!r})"
    )
    b.emit("X.hear()")
    if order.acquires:
        b.emit(f"X.acquire({order.device})")
    if target is not None:
        b.write(target, kind, result)


@instruction("cp", operands=(0, 1, 3, 4, 5))
def cp(b: BlockBuilder, i: Instruction, m: Modifiers) -> None:
    """cp.async and its groups."""
    m.one_of("async")
    if m.flag("commit_group"):
        b.count_class("async_group")
        b.emit(f"X.copies.commit(X, {b.mask()})")
        return
    if m.flag("wait_group"):
        b.count_class("async_group")
        if not isinstance(i.operands[0], Imm):
            raise b.unsupported("cp.async.wait_group needs a constant")
        b.emit(f"X.copies.wait(X, {i.operands[0].value}, {b.mask()})")
        return
    if m.flag("wait_all"):
        b.count_class("async_group")
        b.emit(f"X.copies.wait(X, None, {b.mask()})")
        return
    cached = m.one_of("ca", "cg")
    m.one_of("shared", "shared::cta")
    m.one_of("global")
    policy = _order(m).policy
    b.count_class("async_copy")
    target, source, size, *rest = i.operands
    if not isinstance(size, Imm) or size.value not in ((4, 8, 16) if cached == "ca" else (16,)):
        raise b.unsupported("cp.async copies 4, 8 or 16 bytes, with .cg 16")
    if policy:
        rest.pop()
    length = str(size.value)
    if rest and isinstance(rest[0], Reg) and b.registers.get(rest[0].name) == "p":
        length = b.temporary(f"choose({b.predicate(rest[0])}, {b.constant(0, 'u4')}, {b.constant(size.value, 'u4')})")
    elif rest:
        length = str(rest[0].value) if isinstance(rest[0], Imm) else b.read(rest[0], "u4")
    b.access("shared", size.value)
    shared, outside = b.address(target, "u4"), b.address(source, "u8")
    b.emit(f"X.copies.issue(X, {b.site()}, {shared}, {outside}, {size.value}, {length}, {b.mask()})")


@instruction("createpolicy", operands=(1, 2, 3, 4, 5))
def createpolicy(b: BlockBuilder, i: Instruction, m: Modifiers) -> None:
    """A cache policy has no effect here; its value stands for nothing."""
    m.rest.clear()
    b.count_class("hint")
    b.write(i.operands[0], "u8", b.constant(0, "u8"))


@instruction("prefetch", "prefetchu", "applypriority", "discard", operands=(1, 2, 3))
def prefetch(b: BlockBuilder, i: Instruction, m: Modifiers) -> None:
    """Hints to the caches have no effect here."""
    m.rest.clear()
    b.count_class("hint")
