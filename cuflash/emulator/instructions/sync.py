"""Barriers, fences, and what lanes of a warp tell each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cuflash.emulator.instructions.table import Modifiers, instruction
from cuflash.emulator.ir import KINDS, Instruction, Pair, Reg

if TYPE_CHECKING:
    from cuflash.emulator.translate import BlockBuilder


@instruction("bar", "barrier", operands=1)
def warp_barrier(b: BlockBuilder, i: Instruction, m: Modifiers) -> None:
    """bar.warp.sync; the other barriers end a block and belong to the scheduler."""
    m.one_of("warp")
    m.one_of("sync")
    b.count_class("warp_barrier")
    b.emit("X.order_warps()")


@instruction("barrier_give", operands=2)
def barrier_give(b: BlockBuilder, i: Instruction, m: Modifiers) -> None:
    """First part of bar.red: the warp adds its predicates."""
    number, predicate = i.operands
    b.emit(f"X.machine.barriers.give(X, {b.read(number, 'u4')}, {b.read(predicate, 'p')})")


@instruction("barrier_take", operands=2)
def barrier_take(b: BlockBuilder, i: Instruction, m: Modifiers) -> None:
    """Last part of bar.red: the reduction over all threads of the barrier."""
    operation = m.one_of("popc", "and", "or")
    result, number = i.operands
    b.write(
        result,
        "u4" if operation == "popc" else "p",
        f"X.machine.barriers.take(X, {b.read(number, 'u4')}, {operation!r})",
    )


@instruction("membar", "fence", operands=0)
def fence(b: BlockBuilder, i: Instruction, m: Modifiers) -> None:
    if m.flag("proxy"):
        raise b.unsupported("fence.proxy is not supported")
    scope = m.option("cta", "gl", "gpu", "sys", "cluster", default="gpu")
    m.flag("sc", "acq_rel", "acquire", "release")
    b.count_class("fence")
    b.emit(f"X.acquire({scope != 'cta'})")
    b.emit(f"X.release({scope != 'cta'})")


@instruction("shfl", operands=5)
def shfl(b: BlockBuilder, i: Instruction, m: Modifiers) -> None:
    m.one_of("sync")
    mode = m.one_of("up", "down", "bfly", "idx")
    m.one_of("b32")
    b.count_class("shuffle")
    value, lane, clamp = (b.read(x, "u4") for x in i.operands[1:4])
    target = i.operands[0]
    result = b.temporary(f"X.shuffle({b.site()}, {mode!r}, {value}, {lane}, {clamp})")
    if isinstance(target, Pair):
        b.write(target.second, "p", f"{result}[1]")
        target = target.first
    b.write(target, "u4", f"{result}[0]")


@instruction("vote", operands=3)
def vote(b: BlockBuilder, i: Instruction, m: Modifiers) -> None:
    m.one_of("sync")
    mode = m.one_of("all", "any", "uni", "ballot")
    kind = KINDS[m.type()]
    b.count_class("vote")
    source = i.operands[1]
    predicate = b.predicate(source) if isinstance(source, Reg) else b.read(source, "p")
    b.write(i.operands[0], kind, f"X.vote({mode!r}, {predicate})")


@instruction("match", operands=3)
def match(b: BlockBuilder, i: Instruction, m: Modifiers) -> None:
    mode = m.one_of("any", "all")
    m.one_of("sync")
    kind = KINDS[m.type()]
    b.count_class("vote")
    result = b.temporary(f"X.match({mode!r}, {b.read(i.operands[1], kind)})")
    target = i.operands[0]
    if isinstance(target, Pair):
        b.write(target.second, "p", f"{result}[1]")
        target = target.first
    b.write(target, "u4", f"{result}[0]")


@instruction("redux", operands=3)
def redux(b: BlockBuilder, i: Instruction, m: Modifiers) -> None:
    m.one_of("sync")
    mode = m.one_of("add", "min", "max", "and", "or", "xor")
    kind = KINDS[m.type()]
    b.count_class("shuffle")
    b.write(i.operands[0], kind, f"X.reduce({mode!r}, {b.read(i.operands[1], kind)})")


@instruction("activemask", operands=1)
def activemask(b: BlockBuilder, i: Instruction, m: Modifiers) -> None:
    m.one_of("b32")
    b.count_class("vote")
    b.write(i.operands[0], "u4", "X.active_mask()")


@instruction("elect", operands=2)
def elect(b: BlockBuilder, i: Instruction, m: Modifiers) -> None:
    m.one_of("sync")
    b.count_class("vote")
    target = i.operands[0]
    if not isinstance(target, Pair):
        raise ValueError("two destinations are needed")
    b.write(target.second, "p", "X.elect()")
    b.write(target.first, "u4", "X.elected()")


@instruction("nanosleep", "griddepcontrol", "pmevent", operands=(0, 1))
def nothing(b: BlockBuilder, i: Instruction, m: Modifiers) -> None:
    """Instructions that only affect timing."""
    m.rest.clear()
    b.count_class("hint")
