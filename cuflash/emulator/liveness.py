"""Which registers blocks read, write, and leave for later blocks."""

from __future__ import annotations

from cuflash.emulator.flow import Block
from cuflash.emulator.instructions import operands_of
from cuflash.emulator.ir import Reg


def uses_and_defines(block: Block, registers: dict[str, str]) -> tuple[set[str], set[str]]:
    """Registers read before they are written in the block, and registers written."""
    use: set[str] = set()
    define: set[str] = set()
    for item in block.body:
        written, read = operands_of(item, registers)
        if item.guard is not None:
            read = [*read, item.guard.name, *written]
        use.update(name for name in read if name not in define)
        define.update(written)
    end = block.end
    ending = [r.name for r in (end.guard, end.index) if r is not None]
    if end.kind == "barrier" and end.instruction is not None:
        ending += [x.name for x in end.instruction.operands if isinstance(x, Reg)]
    if isinstance(block.gather, Reg):
        use.add(block.gather.name)
    use.update(name for name in ending if name not in define)
    return use, define


def live_out(blocks: list[Block], uses: tuple[set[str], ...], defines: tuple[set[str], ...]) -> list[set[str]]:
    """Registers that are read after each block before they are written again."""
    live_in = [set(use) for use in uses]
    live_out: list[set[str]] = [set() for _ in blocks]
    changed = True
    while changed:
        changed = False
        for k in range(len(blocks) - 1, -1, -1):
            out = set().union(*(live_in[t] for t in blocks[k].end.targets))
            if out != live_out[k]:
                live_out[k] = out
                live_in[k] = uses[k] | (out - defines[k])
                changed = True
    return live_out
