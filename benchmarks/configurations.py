"""`python -m benchmarks.configurations`: the plan's candidates on a GPU, measured, beside the cost model's order.

What the plan would not take for its registers is timed as well, and marked with its spills.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from rich.console import Console

    from benchmarks.cases import Case
    from cuflash.plan.config import ForwardConfig

MAX_ESTIMATE = 300  # registers: far past 255 a kernel only spills
SHAPES, MASKS = ["1,16384,32,64", "1,16384,16,128", "1,16384,8,256"], ["full", "causal"]


def main(arguments: list[str] | None = None) -> int:
    parse = argparse.ArgumentParser(prog="python -m benchmarks.configurations", description=__doc__)
    parse.add_argument("--dtype", choices=("float16", "bfloat16"), default="bfloat16")
    parse.add_argument("--shapes", nargs="+", default=SHAPES, help="batch,seqlen,heads,head_dim[,kv_heads]")
    parse.add_argument("--masks", nargs="+", default=MASKS, help="full, causal or window=left,right")
    parse.add_argument("--repeats", type=int, default=7, help="samples per configuration and case")
    parse.add_argument("--output", type=Path, default=Path("build/benchmarks"), help="folder of the JSON")
    args = parse.parse_args(arguments)
    from rich.console import Console

    from benchmarks.cases import Case, parse_mask, parse_shape
    from benchmarks.machine import describe

    console = Console()
    cases = [Case(*parse_shape(s), args.dtype, *parse_mask(m)) for s in args.shapes for m in args.masks]
    results = [measure(case, args.repeats, console) for case in cases]
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "configurations.json"
    path.write_text(json.dumps({"machine": describe("cuda", None), "results": results}, indent=1) + "\n")
    console.print(f"written: {path}")
    return 0


def measure(case: Case, repeats: int, console: Console) -> dict[str, Any]:
    """Compile and time every candidate of a case, fastest first; print the first twelve and the model's choice."""
    import cupy
    from rich.progress import track
    from rich.table import Table

    from benchmarks.contenders import Run
    from benchmarks.measure import cuda_timer, interleaved
    from benchmarks.passes import PASSES
    from cuflash import Options, attention
    from cuflash.device.cuda import gpu_of
    from cuflash.jit.ahead import compile_all
    from cuflash.plan.cost import registers
    from cuflash.plan.forward import ranked_configs

    arrays = [cupy.asarray(a) for a in case.inputs()]
    arch = gpu_of(("q",), arrays[:1]).arch
    ranked = ranked_configs(case.problem, arch, load_bytes=16, store_bytes=16)
    jobs = [(config, arch.name) for config in ranked if registers(config) <= MAX_ESTIMATE]
    compiled = {config: used for config, _, used in track(compile_all(jobs), f"compile {case.name}", total=len(jobs))}
    keywords: dict[str, Any] = {"causal": case.mask == "causal"}
    keywords |= {} if case.left is None else {"window": (case.left, case.right)}

    def run(config: ForwardConfig) -> Run:
        options = Options(config=config, num_splits=1)
        return Run(
            lambda: attention(*arrays, **keywords, options=options),
            lambda out: cupy.cuda.Stream.null.synchronize(),
            cupy.asnumpy,
            on_null_stream=True,
        )

    runs = {str(index): run(config) for index, (config, _) in enumerate(jobs)}
    times = interleaved(runs, cuda_timer(), repeats)
    flops = PASSES["forward"].flops(case.problem)
    rows: list[dict[str, Any]] = []
    for rank, (config, _) in enumerate(jobs):
        seconds = times[str(rank)].median
        row: dict[str, Any] = {"rank": rank, "config": asdict(config), "resources": asdict(compiled[config])}
        rows.append(row | {"milliseconds": 1e3 * seconds, "tflops": 1e-12 * flops / seconds})
    rows.sort(key=lambda row: row["milliseconds"])
    columns = ("tile", "warps", "stages", "q", "model's rank", "registers", "spills", "ms", "TFLOP/s")
    table = Table(*columns, title=case.name)
    for row in [*rows[:12], *(row for row in rows[12:] if row["rank"] == 0)]:
        c, r = row["config"], row["resources"]
        table.add_row(
            f"{c['block_m']}x{c['block_n']}", str(c["num_warps"]), str(c["num_stages"]),
            "registers" if c["q_in_registers"] else "shared", str(row["rank"]), str(r["registers"]),
            str(r["spill_loads"]), f"{row['milliseconds']:.3f}", f"{row['tflops']:.0f}",
        )  # fmt: skip
    console.print(table)
    ranks = np.array([row["rank"] for row in rows])
    correlation = float(np.corrcoef(np.argsort(np.argsort(ranks)), np.arange(len(rows)))[0, 1])
    console.print(f"rank correlation of model and measurement: {correlation:.2f} over {len(rows)} tilings")
    return {"case": case.name, "rank_correlation": correlation, "rows": rows}


if __name__ == "__main__":
    raise SystemExit(main())
