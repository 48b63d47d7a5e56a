"""From a function's instructions to basic blocks: calls are inlined, blocks end where threads may part or must wait.

A block that begins with a warp-wide instruction may only run when the warp has gathered (Block.gather). Such
instructions therefore open a block of their own; what follows them stays in it, because nothing inside a block parts
the lanes again. Block-wide barriers and matrix instructions need every lane of the warp; those with a member mask
(shuffles, votes) its lanes that have not exited.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from cuflash.emulator.faults import Site, UnsupportedInstruction
from cuflash.emulator.ir import Args, Function, Imm, Instruction, Mem, Operand, Pair, Program, Reg, Sym, Vec

EXIT = 1 << 30
FULL_MASK = 0xFFFFFFFF
BARRIERS = ("bar", "barrier")
MODIFIERS = {  # of the instructions that end a block
    "bra": {"uni"},
    "brx": {"idx", "uni"},
    "ret": {"uni"},
    "exit": set[str](),
    "trap": set[str](),
    **{name: {"sync", "arrive", "aligned", "cta", "warp"} for name in BARRIERS},
}
WARP_WIDE = ("mma", "ldmatrix", "stmatrix", "movmatrix", "shfl", "vote", "match", "redux", "wmma", "elect")


@dataclass(slots=True)
class Terminator:
    """How a block ends. kind is jump, branch (guard decides between the targets), switch (index decides), exit, trap
    or barrier."""

    kind: str
    targets: tuple[int, ...] = ()
    guard: Reg | None = None
    index: Reg | None = None
    instruction: Instruction | None = None


@dataclass(slots=True)
class Block:
    """A basic block.

    gather : None; "warp", all lanes of the warp must be here and none may have exited; "live", all that have not
        exited; or the operand that holds the mask of those that must be
    """

    index: int
    body: list[Instruction] = field(default_factory=list)
    end: Terminator = field(default_factory=lambda: Terminator("exit"))
    gather: str | Imm | Reg | None = None


@dataclass(slots=True)
class Flow:
    """A kernel as basic blocks in program order, with every register and variable that inlined functions brought
    along."""

    function: Function
    blocks: list[Block]


GATHERED = (("warp", "warp"), ("warp", "live"), ("live", "live"))  # what a block gathers, and thereby also gathers


def build(program: Program, function: Function) -> Flow:
    """Basic blocks of a kernel."""
    whole = _inline(program, function)
    items = list(_expand_guards(whole.body))
    starts: dict[str, int] = {}
    blocks = [Block(0)]
    pending: list[tuple[Block, tuple[str, ...]]] = []
    closed = False  # the last block cannot fall through

    def open_block() -> Block:
        block = Block(len(blocks))
        if not closed and blocks[-1].end.kind == "exit":
            blocks[-1].end = Terminator("jump", (block.index,))
        blocks.append(block)
        return block

    for item in items:
        block = blocks[-1]
        if isinstance(item, str):
            if block.body or closed:
                block = open_block()
            starts[item] = block.index
            closed = False
            continue
        if closed:
            block, closed = open_block(), False
        gather = _gather(item)
        if gather is not None and (block.gather, gather) not in GATHERED:
            if block.body or block.gather is not None:
                block = open_block()
            block.gather = gather
        closed = _place(block, item, pending, whole.tables)
    if not closed:
        blocks[-1].end = Terminator("exit")
    for block, labels in pending:
        for label in labels:
            if label not in starts:
                raise UnsupportedInstruction(f"label {label} is not in this function", _site(block))
        targets = tuple(starts[label] for label in labels)
        if block.end.kind == "branch":
            targets += (block.index + 1,)
        block.end.targets = targets
    return Flow(whole, blocks)


def _place(
    block: Block, item: Instruction, pending: list[tuple[Block, tuple[str, ...]]], tables: dict[str, tuple[str, ...]]
) -> bool:
    """Append an instruction, or end the block with it; True when the block is over."""
    if item.opcode in MODIFIERS and not MODIFIERS[item.opcode].issuperset(item.modifiers):
        raise UnsupportedInstruction(f"this form of {item.opcode} is not supported", item.site)
    if item.opcode == "bra":
        label = item.operands[0]
        block.end = Terminator("branch" if item.guard else "jump", guard=item.guard, instruction=item)
        pending.append((block, (label.name if isinstance(label, (Sym, Reg)) else "?",)))
        return True
    if item.opcode == "brx":
        table = item.operands[1]
        index = item.operands[0]
        if not isinstance(index, Reg) or not isinstance(table, Sym):
            raise UnsupportedInstruction("brx needs a register and a table of labels", item.site)
        block.end = Terminator("switch", index=index, instruction=item)
        pending.append((block, tables.get(table.name, ())))
        return True
    if item.opcode in ("ret", "exit", "trap"):
        block.end = Terminator("trap" if item.opcode == "trap" else "exit", instruction=item)
        return True
    if item.opcode in BARRIERS and "warp" not in item.modifiers:
        block.end = Terminator("barrier", (block.index + 1,), instruction=item)
        return True
    block.body.append(item)
    return False


def _site(block: Block) -> Site | None:
    return block.end.instruction.site if block.end.instruction else None


def _gather(item: Instruction) -> str | Imm | Reg | None:
    """What an instruction needs of its warp, as in Block.gather."""
    if item.opcode in BARRIERS:
        if "warp" not in item.modifiers:
            return "warp"
        return _mask(item, item.operands[0])
    if item.opcode == "barrier_give":
        return "warp"
    if item.opcode not in WARP_WIDE or "sync" not in item.modifiers:
        return None
    return _mask(item, item.operands[-1]) if item.opcode in ("shfl", "vote", "match", "redux", "elect") else "warp"


def _mask(item: Instruction, operand: Operand) -> str | Imm | Reg:
    if isinstance(operand, Imm):
        return "live" if operand.value % (1 << 32) == FULL_MASK else operand
    if not isinstance(operand, Reg):
        raise UnsupportedInstruction(f"member mask {operand} is not supported", item.site)
    return operand


def _expand_guards(body: list[Instruction | str]) -> Iterator[Instruction | str]:
    """Guards on instructions that end a block or gather a warp become branches around them."""
    for number, item in enumerate(body):
        ends = not isinstance(item, str) and (
            item.opcode in ("ret", "exit", "trap", "brx") or _gather(item) is not None
        )
        if isinstance(item, str):
            yield item
            continue
        if item.guard is None or not ends:
            yield from _expand_reduction(item)
            continue
        skip = f"@skip{number}"
        guard = Reg(item.guard.name, not item.guard.negated)
        yield Instruction("bra", (), (Sym(skip),), guard, item.site)
        yield from _expand_reduction(replace(item, guard=None))
        yield skip


def _expand_reduction(item: Instruction) -> Iterator[Instruction]:
    """A barrier that reduces a predicate: every warp gives its part, waits, and takes the result."""
    if item.opcode not in BARRIERS or "red" not in item.modifiers:
        yield item
        return
    operation = next((m for m in item.modifiers if m in ("popc", "and", "or")), "?")
    result, number, *count, predicate = item.operands
    yield replace(item, opcode="barrier_give", modifiers=(), operands=(number, predicate))
    yield replace(item, modifiers=("sync",), operands=(number, *count))
    yield replace(item, opcode="barrier_take", modifiers=(operation,), operands=(result, number))


# --- calls


def _inline(program: Program, function: Function) -> Function:
    """The function with every call replaced by the body of what it calls."""
    whole = replace(
        function,
        body=[],
        registers=dict(function.registers),
        variables=dict(function.variables),
        tables=dict(function.tables),
    )
    counter = iter(range(1 << 30))
    whole.body = list(_inlined_body(program, function, whole, lambda name: name, None, (function.name,), counter))
    return whole


def _inlined_body(
    program: Program,
    function: Function,
    whole: Function,
    rename: Callable[[str], str],
    leave: str | None,
    stack: tuple[str, ...],
    counter: Iterator[int],
) -> Iterator[Instruction | str]:
    for item in function.body:
        if isinstance(item, str):
            yield rename(item)
            continue
        item = _renamed(item, rename) if leave is not None else item
        if leave is not None and item.opcode == "ret":
            yield Instruction("bra", (), (Sym(leave),), item.guard, item.site)
        elif item.opcode == "call":
            yield from _call(program, item, whole, stack, counter)
        else:
            yield item
    if leave is not None:
        yield leave


def _call(
    program: Program, item: Instruction, whole: Function, stack: tuple[str, ...], counter: Iterator[int]
) -> Iterator[Instruction | str]:
    operands = list(item.operands)
    results = operands.pop(0) if isinstance(operands[0], Args) else Args(())
    name = operands.pop(0)
    arguments = operands.pop(0) if operands else Args(())
    callee = program.functions.get(name.name) if isinstance(name, Sym) else None
    if callee is None or callee.name in stack or not isinstance(results, Args) or not isinstance(arguments, Args):
        reason = "is recursive" if callee is not None else "has no body in this module"
        raise UnsupportedInstruction(f"call of {getattr(name, 'name', name)}, which {reason}", item.site)
    prefix = f"{callee.name}#{next(counter)}."
    bound = {v.name: _name(r, item) for v, r in zip(callee.results, results.items, strict=True)}
    bound |= {v.name: _name(a, item) for v, a in zip(callee.params, arguments.items, strict=True)}
    own = callee.registers.keys() | callee.variables.keys()
    own |= {label for label in callee.body if isinstance(label, str)}

    def rename(name: str) -> str:
        return bound.get(name) or (prefix + name if name in own else name)

    for register, kind in callee.registers.items():
        whole.registers.setdefault(rename(register), kind)
    for variable in callee.variables.values():
        if variable.name not in bound:
            whole.variables[rename(variable.name)] = replace(variable, name=rename(variable.name))
    for label, targets in callee.tables.items():
        whole.tables[rename(label)] = tuple(rename(target) for target in targets)
    skip = prefix + "skip"
    if item.guard is not None:
        yield Instruction("bra", (), (Sym(skip),), Reg(item.guard.name, not item.guard.negated), item.site)
    yield from _inlined_body(program, callee, whole, rename, prefix + "leave", (*stack, callee.name), counter)
    if item.guard is not None:
        yield skip


def _name(operand: Operand, item: Instruction) -> str:
    if not isinstance(operand, (Reg, Sym)):
        raise UnsupportedInstruction(f"argument {operand} of a call must be a parameter variable", item.site)
    return operand.name


def _renamed(item: Instruction, rename: Callable[[str], str]) -> Instruction:
    def operand(x: Operand) -> Operand:
        if isinstance(x, (Reg, Sym)):
            return replace(x, name=rename(x.name))
        if isinstance(x, Mem) and x.base is not None:
            return Mem(replace(x.base, name=rename(x.base.name)), x.offset)
        if isinstance(x, (Vec, Args)):
            return type(x)(tuple(operand(y) for y in x.items))
        if isinstance(x, Pair):
            return Pair(operand(x.first), operand(x.second))
        return x

    guard = replace(item.guard, name=rename(item.guard.name)) if item.guard else None
    return replace(item, operands=tuple(operand(x) for x in item.operands), guard=guard)
