"""A program as C++: a struct that kernels_cu/attention/mask.cuh evaluates for pairs and for intervals."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cuflash.masks.program import Program
    from cuflash.masks.steps import Step

_TYPES = {"uint8": "u8", "int32": "int", "int64": "i64", "float32": "float", "float64": "double"}


def struct(program: Program, wide: bool) -> str:
    """`struct Mask`, which depends on the program's structure alone."""
    uses = Counter(argument for step in program.steps for argument in step.arguments)
    names: list[str] = []
    lines: list[str] = []
    for i, step in enumerate(program.steps):
        expression = _expression(program, step, [names[a] for a in step.arguments])
        if uses[i] > 1 and step.arguments:
            lines.append(f"        const auto t{len(lines)} = {expression};\n")
            expression = f"t{len(lines) - 1}"
        names.append(expression)
    return (
        "struct Mask {\n"
        f"    static constexpr bool kByBatch = {_bool(program.by_batch)}, kByHead = {_bool(program.by_head)};\n"
        f"    using Whole = {'i64' if wide else 'int'};\n"
        "    template <class At>\n"
        "    static __device__ __forceinline__ auto visible(const At& at) {\n"
        f"{''.join(lines)}"
        f"        return {names[-1]};\n"
        "    }\n"
        "};\n"
    )


def _expression(program: Program, step: Step, arguments: list[str]) -> str:
    match step.operation:
        case "variable":
            return f"at.{step.value}()"
        case "constant":
            return f"at.{step.kind}({step.value})"
        case "literal":
            return f"at.literal({step.value})"
        case "truth":
            return f"at.truth({_bool(step.value)})"
        case "table":
            table = program.tables[step.value]
            function = "ascending_table" if table.ascending else "table"
            dtype = _TYPES[table.array.dtype.name]
            return f"at.template {function}<{step.value}, {dtype}>({', '.join(arguments)})"
    return f"{step.operation}({', '.join(arguments)})"


def _bool(value: bool) -> str:
    return "true" if value else "false"
