"""`python docs/make_traffic_figure.py [FILE]`: bytes and memory against sequence length, from cuflash.io_model.

Writes docs/images/traffic.svg unless told otherwise.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from cuflash import Options, io_model
from cuflash.plan.arch import arch_named

LENGTHS = [2**n for n in range(8, 19)]
HEAD_DIM = 64
STYLES = {
    "standard": ("tab:red", "standard"),
    "chunked": ("tab:orange", "chunked (Rabe & Staats)"),
    "flash": ("tab:blue", "flash"),
}


def costs_at(length: int, backward: bool) -> dict[str, io_model.Cost]:
    """Costs of one head by algorithm, flash with the tiles of the longest sequence at every length."""
    arch = arch_named("sm_80")
    longest = io_model.problem_of_shapes((LENGTHS[-1], HEAD_DIM))
    if backward:
        options = Options(backward_config=io_model.plan_backward_contiguous(longest, arch).launches[1].config)
    else:
        options = Options(num_splits=1)
        options = replace(options, config=io_model.plan_contiguous(longest, arch, options).forward.config)
    return io_model.compare((length, HEAD_DIM), arch="sm_80", options=options, backward=backward)


def draw(traffic: Axes, memory: Axes, backward: bool) -> None:
    """One pass: bytes asked of global memory, and bytes beyond what goes in and comes out."""
    costs = [costs_at(length, backward) for length in LENGTHS]
    for name in costs[0]:
        color, label = STYLES[name]
        traffic.plot(LENGTHS, [cost[name].bytes for cost in costs], "o-", ms=3, color=color, label=label)
        extra = [cost[name].workspace_bytes or float("nan") for cost in costs]
        memory.plot(LENGTHS, extra, "o-", ms=3, color=color, label=label if extra[0] > 0 else f"{label}: none")
    once = [cost["flash"].dram_bytes for cost in costs]
    asked = [cost["flash"].bytes for cost in costs]
    traffic.plot(LENGTHS, once, ":", color="tab:blue", label="every array once")
    traffic.fill_between(LENGTHS, once, asked, color="tab:blue", alpha=0.12, label="flash: served by L2 or memory")
    name = "backward" if backward else "forward"
    traffic.set_ylabel(f"{name}: bytes asked of global memory")
    memory.set_ylabel(f"{name}: bytes beyond inputs and results")
    if not backward:
        memory.plot(LENGTHS, once, ":", color="tab:blue", label="inputs and output themselves")
    for axes in (traffic, memory):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("sequence length N")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "images" / "traffic.svg"
    plt.rcParams.update({"svg.hashsalt": "cuflash", "svg.fonttype": "none"})  # the same small file whenever it is made
    figure, rows = plt.subplots(2, 2, figsize=(10, 8), layout="constrained")
    for (traffic, memory), backward in zip(rows, (False, True), strict=True):
        draw(traffic, memory, backward)
    figure.suptitle(f"Attention, one head, d = {HEAD_DIM}, bfloat16")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=120)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
