"""Writes docs/resources.md: registers, shared memory and spills of every shipped kernel on every architecture.

    python docs/make_resources.py

Compiles what the cache lacks, one process per core: minutes the first time. Exits with 1 where a kernel spills beyond
its budget.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from rich.progress import track

from cuflash.jit import Resources
from cuflash.jit.ahead import compile_all
from cuflash.jit.compiler import compiler_version
from cuflash.plan import backward_cost, cost
from cuflash.plan.arch import ARCHS
from cuflash.plan.config import BackwardConfig, BiasGradientConfig, CombineConfig, ForwardConfig, KernelConfig
from cuflash.plan.shipped import shipped_configs

TARGET = Path(__file__).with_name("resources.md")

# Bytes a thread, by family and architecture: tilings that were measured to be the fastest although they spill, beside
# hundreds of products a tile (docs/kernel-forward.md, docs/kernel-backward.md).
SPILL_BUDGETS = {("forward", "sm_90"): 8, ("backward", "sm_90"): 256}

Row = tuple[str, ...]  # the cells that do not need a compiler
Measured = dict[Row, dict[str, Resources]]  # by architecture

HEADS: dict[str, Row] = {  # by family of kernels
    "forward": ("head_dim", "features", "tile", "warps", "stages", "Q in registers", "shared KiB"),
    "combine": ("head_dim", "states", "warps"),
    "backward": ("head_dim", "features", "tile", "columns", "warps (along keys)", "stages", "shared KiB"),
    "prepare": ("head_dim", "features", "queries", "warps"),
    "finish": ("head_dim", "features", "queries", "columns", "warps"),
    "bias_gradient": ("head_dim", "features", "tile", "warps", "shared KiB"),
}

TEXT = """\
# What the kernels use

Written by `python docs/make_resources.py`; a test fails when a shipped kernel is missing here, or spills beyond its
budget: {budgets} bytes a thread, where such tilings were measured to be the fastest, none elsewhere.

Every configuration that the plan chooses for the common problems (`cuflash.plan.shipped`), compiled by
NVRTC {version}: {count} kernels, {spills} of them spilling.

The numbers under the architectures are registers of a thread, the larger of float16 and bfloat16; a dash says that the
plan chooses another tile there. Tiles are queries x keys x output columns; shared memory is dynamic, per block.

## Forward

{forward}

## Combine

{combine}

## Backward

Tiles are queries x keys; columns are those of dq, dk and dv that a block computes.

{backward}

## Before and after it

{prepare}

{finish}

## Gradient of the bias

{bias_gradient}
"""


def row(config: KernelConfig) -> Row:
    """What identifies a kernel in the table of its family; both dtypes share a row."""
    if isinstance(config, CombineConfig):
        states = "float32" if config.state_dtype == "float32" else "as the output"
        return str(config.head_dim_v), states, str(config.num_warps)
    first, warps = (str(config.head_dim), features(config)), str(config.num_warps)
    tile, shared = f"{config.block_m} x {config.block_n}", f"{shared_bytes(config) / 1024:.1f}"
    if isinstance(config, ForwardConfig):
        in_registers = "yes" if config.q_in_registers else "no"
        return *first, f"{tile} x {config.block_dv}", warps, str(config.num_stages), in_registers, shared
    if isinstance(config, BiasGradientConfig):
        return *first, tile, warps, shared
    if config.family == "prepare":
        return *first, str(config.block_m), warps
    if config.family == "finish":
        return *first, str(config.block_m), str(config.block_d), warps
    return *first, tile, str(config.block_d), f"{warps} ({config.key_warps})", str(config.num_stages), shared


def features(config: ForwardConfig | BackwardConfig | BiasGradientConfig) -> str:
    present = {
        "bias": config.bias_dtype != "none",
        "window": config.windowed,
        "softcap": config.softcapped,
        "varlen": config.varlen,
        "split": getattr(config, "split", False),
    }
    return ", ".join(name for name, is_present in present.items() if is_present) or "plain"


def shared_bytes(config: KernelConfig) -> int:
    """Dynamic shared memory of a block."""
    if isinstance(config, BackwardConfig | BiasGradientConfig):
        return backward_cost.shared_bytes(config)
    return cost.shared_bytes(config)


def jobs() -> list[tuple[KernelConfig, str]]:
    return [(config, arch) for arch in ARCHS for config in shipped_configs(arch)]


def document(done: list[tuple[KernelConfig, str, Resources]]) -> str:
    """The text of resources.md."""
    tables: dict[str, Measured] = {family: {} for family in HEADS}
    for config, arch, used in done:
        by_arch = tables[config.family].setdefault(row(config), {})
        by_arch[arch] = max(by_arch.get(arch, used), used, key=lambda cell: (spills(cell), cell.registers))
    return TEXT.format(
        version=compiler_version(),
        count=len(done),
        spills=sum(spills(used) > 0 for _, _, used in done) or "none",
        budgets=", ".join(f"{family} on {arch} {most}" for (family, arch), most in SPILL_BUDGETS.items()),
        **{family: table(head, tables[family]) for family, head in HEADS.items()},
    )


def spills(used: Resources) -> int:
    """Bytes of a thread's local memory: spilled registers, and arrays that did not fit into registers."""
    return used.stack


def spill_budget(config: KernelConfig, arch: str) -> int:
    return SPILL_BUDGETS.get((config.family, arch), 0)


def table(head: Row, measured: Measured) -> str:
    lines = [(*head, *ARCHS), tuple("---" for _ in (*head, *ARCHS))]
    for cells, by_arch in sorted(measured.items(), key=lambda item: (int(item[0][0]), item[0])):
        lines.append((*cells, *(cell(by_arch.get(arch)) for arch in ARCHS)))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(used: Resources | None) -> str:
    if used is None:
        return "–"
    return f"{used.registers}, spills {spills(used)} bytes" if spills(used) else str(used.registers)


def rows_in(text: str) -> Iterator[Row]:
    """The rows of the tables in a document, without the architectures' cells."""
    for line in text.splitlines():
        cells = tuple(line.strip("| ").split(" | "))
        if line.startswith("|") and cells[0].isdigit():
            yield cells[: -len(ARCHS)]


def main() -> int:
    todo = jobs()
    order = {job: index for index, job in enumerate(todo)}
    done = list(track(compile_all(todo), "compiling", total=len(todo)))
    done.sort(key=lambda item: order[item[0], item[1]])
    TARGET.write_text(document(done), encoding="utf-8")
    spilling = [f"{arch} {config}: {used}" for config, arch, used in done if spills(used) > spill_budget(config, arch)]
    print("\n".join(spilling) or f"{len(done)} kernels, none beyond its budget, in {TARGET}")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
