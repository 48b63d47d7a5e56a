"""PTX text to ir.Program. Inline-assembly scopes get names of their own here, so that later stages know no scopes."""

from __future__ import annotations

import re
import struct
from functools import lru_cache

from cuflash.emulator.faults import InvalidPtx, Site
from cuflash.emulator.ir import (
    KINDS,
    Args,
    Function,
    Imm,
    Instruction,
    Mem,
    Operand,
    Pair,
    Program,
    Reg,
    Sym,
    Variable,
    Vec,
    bits,
)

INSTRUCTION = re.compile(r"(?:@(!?)([\w$%]+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.S)
LABEL = re.compile(r"([\w$%]+)\s*:(?!:)")
REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)$", re.S)
VARIABLE = re.compile(
    r"(?:\.(?:visible|weak|extern|common|managed)\s+)*\.(global|const|shared|local|param)\s+(?:\.align\s+(\d+)\s+)?"
    r"(?:\.ptr\s+)?(?:\.attribute\(\w+\)\s+)?\.(\w+)\s+(?:\.ptr\s*(?:\.\w+\s+(?:\d+\s*)?)*)?([\w$%]+)\s*(\[[^=]*\])?\s*(?:=\s*(.*))?$",
    re.S,
)
LOC = re.compile(r"\.loc\s+(\d+)\s+(\d+)\s+(\d+)(?:.*inlined_at\s+(\d+)\s+(\d+)\s+(\d+))?", re.S)
FUNCTION = re.compile(r"\.(entry|func)\s*(?:\((.*?)\)\s*)?([\w$]+)\s*(?:\((.*?)\))?(.*)$", re.S)
INTEGER = re.compile(r"([+-]?)(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?$")
ADDRESS = re.compile(r"\[\s*([\w$%.@]+)?\s*(?:([+-])?\s*([+-]?\w+))?\s*\]$")
LINE_DIRECTIVES = {".loc", ".file", ".version", ".target", ".address_size", ".section"}


def parse(text: str) -> Program:
    """Parse one PTX module.

    Raises InvalidPtx, naming the line, on text that is not PTX.
    """
    return _Parser(text).run()


class _Parser:
    def __init__(self, text: str) -> None:
        self.lines = _without_comments(text).split("\n")
        self.program = Program("", {}, {})
        self.files: dict[str, str] = {}
        self.function: Function | None = None
        self.scopes: list[dict[str, str]] = []
        self.scope_count = 0
        self.operands: dict[str, Operand] = {}  # that stand outside any inner scope
        self.loc: tuple[str, str, str] | None = None
        self.callers: dict[tuple[str, str, str], tuple[str, str, str] | None] = {}
        self.places: dict[tuple[str, str, str], tuple[str, tuple[str, ...]]] = {}

    def run(self) -> Program:
        self._read_files()
        number = 0
        while number < len(self.lines):
            number = self._statement(number)
        if self.function is not None:
            raise InvalidPtx(f"PTX ends inside function {self.function.name}")
        return self.program

    def _statement(self, number: int) -> int:
        """Read the statements that begin on line `number` (from 0); return the first line after them."""
        rest, start = self.lines[number].strip(), number
        while rest:
            if rest[0] == "." and rest.split(None, 1)[0] in LINE_DIRECTIVES:
                return self._line_directive(rest, number)
            if self.function is None and "{" not in rest and ";" not in rest:  # a header: up to its brace
                number += 1
                if number == len(self.lines):
                    raise InvalidPtx(f"PTX line {start + 1}: {rest!r} has no end")
                rest += "\n" + self.lines[number].strip()
                continue
            if rest[0] == "{" and self.function is not None:
                self._open_scope()
                rest = rest[1:].lstrip()
            elif rest[0] == "}":
                self._close_scope()
                rest = rest[1:].lstrip()
            elif self.function is None and (match := FUNCTION.search(rest.partition("{")[0])) and "{" in rest:
                self._open_function(match)
                rest = rest.partition("{")[2].lstrip()
            elif self.function is not None and (match := LABEL.match(rest)):
                self.function.body.append(self._declare_label(match[1]))
                rest = rest[match.end() :].lstrip()
            else:
                end = rest.find(";")
                if end < 0:
                    number += 1
                    if number == len(self.lines):
                        raise InvalidPtx(f"PTX line {start + 1}: {rest!r} has no end")
                    rest += " " + self.lines[number].strip()
                    continue
                self._simple(rest[:end].strip(), start)
                rest, start = rest[end + 1 :].lstrip(), number
        return number + 1

    # --- directives

    def _read_files(self) -> None:
        for line in self.lines:
            if ".file" in line and (match := re.match(r'\s*\.file\s+(\d+)\s+"([^"]*)"', line)):
                self.files[match[1]] = match[2]

    def _line_directive(self, rest: str, number: int) -> int:
        if rest.startswith(".loc"):
            self.loc, caller = _location(rest)
            if self.callers.get(self.loc, self.loc) != caller:
                self.callers[self.loc] = caller
                self.places.clear()  # chains of callers may pass through here
        elif rest.startswith(".target"):
            self.program.target = rest.split()[1].rstrip(",")
        elif rest.startswith(".section"):
            while "}" not in self.lines[number]:
                number += 1
        return number + 1

    def _open_function(self, match: re.Match[str]) -> None:
        kind, results, name, params, tail = match.groups()
        function = Function(name, kind == "entry", self._parameters(params), self._parameters(results))
        for key in ("maxntid", "reqntid"):
            if limit := re.search(rf"\.{key}\s+([\d,\s]+)", tail):
                sizes = [int(x) for x in limit[1].replace(",", " ").split()]
                setattr(function, key, tuple([*sizes, 1, 1][:3]))
        self.function, self.scopes, self.scope_count = function, [{}], 0
        self.operands.clear()
        for variable in function.results + function.params:
            function.variables[variable.name] = variable
        for register in re.findall(r"\.reg\s+\.(\w+)\s+([\w$%]+)", f"{params} {results}"):
            function.registers[register[1]] = KINDS[register[0]]

    def _parameters(self, text: str | None) -> list[Variable]:
        if not text or not text.strip():
            return []
        return [self._variable(part.strip()) for part in text.split(",") if ".param" in part]

    def _open_scope(self) -> None:
        self.scopes.append({})
        self.scope_count += 1

    def _close_scope(self) -> None:
        if self.function is None:
            raise InvalidPtx("PTX has a closing brace too many")
        self.scopes.pop()
        if not self.scopes:
            self.program.functions[self.function.name] = self.function
            self.function = None

    # --- names

    def _declare(self, name: str) -> str:
        unique = name if len(self.scopes) == 1 else f"{name}@{self.scope_count}"
        self.scopes[-1][name] = unique
        return unique

    def _declare_label(self, name: str) -> str:
        """A label belongs to its scope; it may have been used by a branch before it is declared."""
        return self.scopes[-1].get(name) or self._declare(name)

    def _resolve(self, name: str) -> str:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return name

    def _resolve_target(self, name: str) -> str:
        """The label that a branch means. Inside a scope a name not yet seen is a label that the scope declares
        further on, unless it is one of the compiler's own, which begin with $ and belong to the function.
        """
        known = next((scope[name] for scope in reversed(self.scopes) if name in scope), None)
        if known is not None:
            return known
        return name if name.startswith("$") or len(self.scopes) == 1 else self._declare(name)

    # --- statements

    def _simple(self, text: str, number: int) -> None:
        if not text:
            return
        if text[0] != ".":
            self._instruction(text, number)
        elif match := REGISTERS.match(text):
            self._registers(match[1], match[2], number)
        elif text.startswith((".pragma", ".alias", ".minnctapersm", ".noreturn")) or ".func" in text.split("(")[0]:
            return  # hints, and declarations of functions
        elif match := re.match(r"\.(?:branchtargets|calltargets)\s+(.*)$", text, re.S):
            self._table(match[1])
        else:
            variable = self._variable(text)
            if self.function is None:
                self.program.variables[variable.name] = variable
            else:
                self.function.variables[variable.name] = variable

    def _table(self, names: str) -> None:
        function = self.function
        if function is None or not function.body or not isinstance(function.body[-1], str):
            raise InvalidPtx(".branchtargets needs a label before it")
        function.tables[function.body[-1]] = tuple(self._resolve_target(n.strip()) for n in names.split(","))

    def _registers(self, type_name: str, names: str, number: int) -> None:
        if self.function is None or type_name not in KINDS:
            raise InvalidPtx(f"PTX line {number + 1}: register type .{type_name} is unknown")
        self.operands.clear()
        for name in names.split(","):
            name, _, count = name.strip().partition("<")
            for each in [f"{name}{k}" for k in range(int(count.rstrip(">")))] if count else [name]:
                self.function.registers[self._declare(each) if len(self.scopes) > 1 else each] = KINDS[type_name]

    def _variable(self, text: str) -> Variable:
        match = VARIABLE.match(text)
        if match is None:
            raise InvalidPtx(f"PTX declaration {text!r} is not understood")
        space, align, type_name, name, dims, initial = match.groups()
        width = bits(KINDS[type_name])
        count = 1
        dynamic = False
        for dim in re.findall(r"\[\s*(\d*)\s*\]", dims or ""):
            dynamic |= dim == ""
            count *= int(dim or 0)
        data: bytes | None = None
        symbols: tuple[tuple[int, Sym], ...] = ()
        if initial is not None:
            data, symbols = _initial_bytes(initial, KINDS[type_name], count * width)
        local = self._declare(name) if self.function is not None else name
        return Variable(local, space, int(align or width), count * width, data, symbols, dynamic)

    def _instruction(self, text: str, number: int) -> None:
        if self.function is None:
            raise InvalidPtx(f"PTX line {number + 1}: {text!r} stands outside any function")
        match = INSTRUCTION.match(text)
        if match is None:
            raise InvalidPtx(f"PTX line {number + 1}: {text!r} is not understood")
        negated, guard_name, name, rest = match.groups()
        guard = Reg(self._resolve(guard_name), negated == "!") if guard_name else None
        opcode, *modifiers = name.split(".")
        source, inlined_at = self._place()
        site = Site(self.function.name, number + 1, " ".join(text.split()), source, inlined_at)
        try:
            operands = tuple(self._operand(part, opcode) for part in _split(rest)) if rest else ()
        except ValueError as error:
            raise InvalidPtx(f"{error}", site) from None
        modifiers = [m for m in modifiers if m]
        self.function.body.append(Instruction(opcode, tuple(modifiers), operands, guard, site))

    def _place(self) -> tuple[str | None, tuple[str, ...]]:
        if self.loc is None:
            return None, ()
        if self.loc not in self.places:
            chain = []
            at: tuple[str, str, str] | None = self.loc
            while at is not None and at not in chain:
                chain.append(at)
                at = self.callers.get(at)
            names = [f"{self.files.get(file, file)}:{line}" for file, line, _ in chain]
            self.places[self.loc] = names[0], tuple(names[1:])
        return self.places[self.loc]

    def _operand(self, text: str, opcode: str) -> Operand:
        if len(self.scopes) > 1:
            return self._read_operand(text, opcode)
        operand = self.operands.get(text)
        if operand is None:
            operand = self.operands[text] = self._read_operand(text, opcode)
        return operand

    def _read_operand(self, text: str, opcode: str) -> Operand:
        if len(self.scopes) == 1 and text[0] not in "({":
            return _plain_operand(text, self._is_register(text.lstrip("!")))
        if text[0] == "{":
            return Vec(tuple(self._operand(part, opcode) for part in _split(text[1:-1])))
        if text[0] == "(":
            return Args(tuple(self._operand(part, opcode) for part in _split(text[1:-1])))
        return self._scoped_operand(text, opcode)

    def _is_register(self, name: str) -> bool:
        return self.function is not None and name in self.function.registers

    def _scoped_operand(self, text: str, opcode: str) -> Operand:
        """An operand inside an inline-assembly scope, whose names may be local."""
        if text[0] == "[":
            inner = re.sub(r"[A-Za-z_$%][\w$%.]*", lambda m: self._resolve(m[0]), text)
            return _plain_operand(inner, False)
        bare = text.lstrip("!")
        if re.match(r"[A-Za-z_$%][\w$%.]*$", bare) and "|" not in bare:
            name = self._resolve_target(bare) if opcode == "bra" else self._resolve(bare)
            return _plain_operand(text.replace(bare, name), self._is_register(name))
        if "|" in text:
            first, second = (self._scoped_operand(part.strip(), opcode) for part in text.split("|"))
            return Pair(first, second)
        return _plain_operand(text, False)


@lru_cache(maxsize=65536)
def _location(text: str) -> tuple[tuple[str, str, str], tuple[str, str, str] | None]:
    """(file, line, column) of a .loc directive, and of the call through which it was inlined."""
    match = LOC.match(text)
    if match is None:
        raise InvalidPtx(f"PTX directive {text!r} is not understood")
    return (match[1], match[2], match[3]), (match[4], match[5], match[6]) if match[4] else None


@lru_cache(maxsize=65536)
def _plain_operand(text: str, is_register: bool) -> Operand:
    if text[0] == "!":
        return Reg(text[1:].strip(), True)
    if is_register or (text[0] == "%" and "|" not in text):
        return Reg(text)
    if text == "_":
        return Reg("_")
    if text[0] == "[":
        match = ADDRESS.match(text)
        if match is None:
            raise ValueError(f"address {text!r} is not understood")
        name, sign, number = match.groups()
        offset = int(number.rstrip("U"), 0) * (-1 if sign == "-" else 1) if number else 0
        if name is None or INTEGER.match(name):
            return Mem(None, int(name or "0", 0) + offset)
        return Mem(Reg(name) if name[0] == "%" else Sym(name), offset)
    if "|" in text:
        first, second = (part.strip() for part in text.split("|"))
        return Pair(_plain_operand(first, first[0] == "%"), _plain_operand(second, second[0] == "%"))
    if match := INTEGER.match(text):
        return Imm(int(match[1] + match[2], 0))
    if text[:2] in ("0f", "0F"):
        return Imm(int(text[2:], 16), 4)
    if text[:2] in ("0d", "0D"):
        return Imm(int(text[2:], 16), 8)
    if re.match(r"[+-]?\d*\.?\d+([eE][+-]?\d+)?$", text):
        return Imm(struct.unpack("<Q", struct.pack("<d", float(text)))[0], 8)
    if match := re.match(r"([\w$%.@]+)\s*([+-]\s*\w+)?$", text):
        return Sym(match[1], int(match[2].replace(" ", ""), 0) if match[2] else 0)
    raise ValueError(f"operand {text!r} is not understood")


def _split(text: str) -> list[str]:
    """Split at commas outside brackets and braces."""
    if "{" not in text and "(" not in text and "[" not in text:
        return [part.strip() for part in text.split(",") if part.strip()]
    parts, depth, start = [], 0, 0
    for at, char in enumerate(text):
        if char in "{[(":
            depth += 1
        elif char in "}])":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(text[start:at].strip())
            start = at + 1
    parts.append(text[start:].strip())
    return [part for part in parts if part]


def _without_comments(text: str) -> str:
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text, flags=re.S)
    return re.sub(r"//[^\n]*", "", text)


def _initial_bytes(text: str, kind: str, size: int) -> tuple[bytes, tuple[tuple[int, Sym], ...]]:
    """Bytes of an initialiser, and the places that hold addresses of symbols."""
    width, data, symbols = bits(kind), bytearray(), []
    for part in re.findall(r"[^{},\s]+(?:\s*\+\s*\d+)?", text):
        try:
            operand = _plain_operand(part, False)
        except ValueError:
            operand = None
        if isinstance(operand, Imm):
            value = operand.value
            if kind[0] == "f" and operand.float_width == 8 and width == 4:
                value = struct.unpack("<I", struct.pack("<f", struct.unpack("<d", struct.pack("<Q", value))[0]))[0]
            data += (value % (1 << 8 * width)).to_bytes(width, "little")
        elif match := re.match(r"(?:generic\(|mask\(0xFF\)\s*)?([\w$]+)\)?(?:\s*\+\s*(\d+))?$", part):
            symbols.append((len(data), Sym(match[1], int(match[2] or 0))))
            data += bytes(width)
        else:
            raise InvalidPtx(f"initial value {part!r} is not understood")
    return bytes(data.ljust(size, b"\0")), tuple(symbols)
