"""The instruction table: one handler per opcode.

A handler takes the block builder, the instruction and its modifiers, and writes Python through the builder. To add an
instruction, write

    @instruction("opcode", operands=2)
    def opcode(b, i, m):
        t = m.type()
        b.write(i.operands[0], KINDS[t], f"... {b.read(i.operands[1], KINDS[t])} ...")

in the module of its family. Modifiers that the handler does not ask for are refused when the PTX is loaded.
"""

from cuflash.emulator.instructions import convert, floating, integer, matrix, memory, sync  # noqa: F401  (they fill the table)
from cuflash.emulator.instructions.table import TABLE, Modifiers, operands_of

__all__ = ["TABLE", "Modifiers", "operands_of"]
