"""Writes docs/resources.md: registers, shared memory and spills of every shipped kernel on every architecture.

    python docs/make_resources.py [--missing]

Compiles what the cache lacks, one process per core: minutes the first time. With --missing only kernels that the
document lacks: for when the plan has changed and the kernels have not. Exits with 1 where a kernel spills.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.progress import track

from cuflash.jit import Resources
from cuflash.jit.ahead import compile_all
from cuflash.jit.compiler import compiler_version
from cuflash.plan import backward_cost, cost
from cuflash.plan.arch import ARCHS
from cuflash.plan.config import BackwardConfig, BiasGradientConfig, CombineConfig, ForwardConfig
from cuflash.plan.kernel import KernelConfig
from cuflash.plan.shipped import shipped_configs

TARGET = Path(__file__).with_name("resources.md")

Row = tuple[str, ...]  # the cells that do not need a compiler
Place = tuple[str, Row, str]  # of a cell: family, row, architecture

HEADS: dict[str, Row] = {  # by family of kernels
    "forward": ("head_dim", "features", "tile", "warps", "stages", "Q in registers", "shared KiB"),
    "combine": ("head_dim", "states", "warps a row"),
    "backward": ("head_dim", "features", "tile", "columns", "warps (along keys)", "stages", "shared KiB"),
    "prepare": ("head_dim", "features", "queries", "warps"),
    "finish": ("head_dim", "features", "queries", "columns", "warps"),
    "bias_gradient": ("head_dim", "features", "tile", "warps", "shared KiB"),
}

TEXT = """\
# What the kernels use

Written by `python docs/make_resources.py`; a test fails when a shipped kernel is missing here, or spills a single byte.

Every configuration that the plan chooses for the common problems in 16 bits (`cuflash.plan.shipped`), compiled by
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
        return str(config.head_dim_v), states, str(config.row_warps)
    if not isinstance(config, ForwardConfig | BackwardConfig | BiasGradientConfig):
        raise TypeError(f"config = {config}: must be of a family of HEADS")
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


def place(config: KernelConfig, arch: str) -> Place:
    return config.family, row(config), arch


def document(cells: dict[Place, str]) -> str:
    """The text of resources.md, of the cells of all jobs."""
    todo = jobs()
    return TEXT.format(
        version=compiler_version(),
        count=len(todo),
        spills=sum("spills" in cells[place(config, arch)] for config, arch in todo) or "none",
        **{family: table(family, cells) for family in HEADS},
    )


def spills(used: Resources) -> int:
    """Bytes of a thread's local memory: spilled registers, and arrays that did not fit into registers."""
    return used.stack


def table(family: str, cells: dict[Place, str]) -> str:
    head = HEADS[family]
    lines = [(*head, *ARCHS), tuple("---" for _ in (*head, *ARCHS))]
    rows = {row for in_family, row, _ in cells if in_family == family}
    for row in sorted(rows, key=lambda row: (int(row[0]), row)):
        lines.append((*row, *(cells.get((family, row, arch), "–") for arch in ARCHS)))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(used: Resources) -> str:
    return f"{used.registers}, spills {spills(used)} bytes" if spills(used) else str(used.registers)


def cells_in(text: str) -> dict[Place, str]:
    """What `document` made a text of."""
    cells: dict[Place, str] = {}
    families = {head: family for family, head in HEADS.items()}
    for line in text.splitlines():
        values = tuple(line.strip("| ").split(" | "))
        first, last = values[: -len(ARCHS)], values[-len(ARCHS) :]
        if first in families:
            family = families[first]
        elif line.startswith("|") and first[0].isdigit():
            cells |= {(family, first, arch): value for arch, value in zip(ARCHS, last, strict=True) if value != "–"}
    return cells


def main() -> int:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--missing", action="store_true")
    known = cells_in(TARGET.read_text(encoding="utf-8")) if parse.parse_args().missing else {}
    wanted = {place(config, arch) for config, arch in jobs()}
    todo = [(config, arch) for config, arch in jobs() if place(config, arch) not in known]
    worst: dict[Place, Resources] = {}  # of the dtypes
    for config, arch, used in track(compile_all(todo), "compiling", total=len(todo)):
        at = place(config, arch)
        worst[at] = max(worst.get(at, used), used, key=lambda used: (spills(used), used.registers))
    cells = known | {at: cell(used) for at, used in worst.items()}
    cells = {at: text for at, text in cells.items() if at in wanted}
    TARGET.write_text(document(cells), encoding="utf-8")
    spilling = [f"{at}: {text}" for at, text in cells.items() if "spills" in text]
    print("\n".join(spilling) or f"{len(todo)} kernels compiled, none of all spills, in {TARGET}")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
