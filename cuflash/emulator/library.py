"""Translated PTX modules, kept by their text: what does not depend on a device."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from cuflash.emulator.flow import build
from cuflash.emulator.ir import Args, Function, Imm, Mem, Operand, Sym, Variable, Vec
from cuflash.emulator.parse import parse
from cuflash.emulator.translate import Translation, translate

KEPT = 256


@dataclass(frozen=True, slots=True)
class Entry:
    """A kernel ready to run.

    function : without its body; static_shared : bytes of declared shared memory; dynamic_start : where extern shared
        memory begins; local_size : bytes per thread
    """

    function: Function
    translation: Translation
    static_shared: int
    dynamic_start: int
    local_size: int


@dataclass(frozen=True, slots=True)
class Library:
    """The kernels of a module and the variables in global memory that they use."""

    entries: dict[str, Entry]
    variables: tuple[Variable, ...]


_libraries: OrderedDict[str, Library] = OrderedDict()


def library(ptx: str) -> Library:
    """The translation of a PTX text; the same text is translated once."""
    if ptx not in _libraries:
        _libraries[ptx] = _translate(ptx)
        if len(_libraries) > KEPT:
            _libraries.popitem(last=False)
    _libraries.move_to_end(ptx)
    return _libraries[ptx]


def _translate(ptx: str) -> Library:
    program = parse(ptx)
    outside = {v.name: v for v in program.variables.values() if v.space in ("global", "const")}
    entries = {}
    used: set[str] = set()
    for function in program.functions.values():
        if not function.is_entry:
            continue
        flow = build(program, function)
        mentioned = {name for block in flow.blocks for item in block.body for name in _symbols(item.operands)}
        everything = (*program.variables.values(), *flow.function.variables.values())
        shared = [v for v in everything if v.space == "shared" and v.name in mentioned]
        static = [v for v in shared if not v.dynamic]
        places, size = _layout(static)
        start = max((v.align for v in shared if v.dynamic), default=16)
        dynamic_start = -(-size // max(start, 16)) * max(start, 16)
        places |= {v.name: dynamic_start for v in shared if v.dynamic}
        local, local_size = _layout([v for v in flow.function.variables.values() if v.space == "local"])
        params, _ = _layout(function.params)
        inner = {v.name: v for v in flow.function.variables.values() if v.space in ("global", "const")}
        translation = translate(flow, places | local | params, outside.keys() | inner.keys())
        head = replace(function, body=[], registers={}, variables={}, tables={})
        entries[function.name] = Entry(head, translation, size, dynamic_start, local_size)
        used |= translation.globals_used
        outside |= inner
    variables, queue = {}, sorted(used)
    while queue:
        name = queue.pop()
        if name in outside and name not in variables:
            variables[name] = outside[name]
            queue += [symbol.name for _, symbol in outside[name].symbols]
    return Library(entries, tuple(variables.values()))


def _symbols(operands: Iterable[Operand]) -> Iterator[str]:
    """Names of variables in operands (and of scoped registers, which do no harm here)."""
    for operand in operands:
        if isinstance(operand, Mem):
            operand = operand.base or Imm(0)
        if isinstance(operand, Sym):
            yield operand.name
        elif isinstance(operand, (Vec, Args)):
            yield from _symbols(operand.items)


def _layout(variables: list[Variable]) -> tuple[dict[str, int], int]:
    """Offsets of variables placed one after another, and their total size."""
    places, size = {}, 0
    for variable in variables:
        size = -(-size // variable.align) * variable.align
        places[variable.name] = size
        size += variable.size
    return places, size
