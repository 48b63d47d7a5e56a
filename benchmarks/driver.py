"""What the benchmarks of the passes share: arguments, checks, interleaved measurements, figures.

Each contender is checked against float64 on a sample before it is timed; samples are interleaved; rates of a matrix
product and of a copy come from the same run.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from benchmarks.cases import Case
    from benchmarks.contenders import Contender, Run
    from benchmarks.passes import Pass

CPU_SHAPES, GPU_SHAPES = ["1,4096,4,64"], ["1,16384,32,64", "1,16384,16,128", "1,16384,8,256"]
CPU_MASKS, GPU_MASKS = ["full", "causal", "window=512,0"], ["full", "causal"]
HOST_SHAPE = (1, 64, 1, 1, 64)  # so small that a call costs the host alone


def parser(name: str, description: str, masks: bool = True) -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parse.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parse.add_argument("--dtype", nargs="+", choices=("float16", "bfloat16", "float32", "tf32", "float64"))
    parse.add_argument("--shapes", nargs="+", help="batch,seqlen,heads,head_dim[,kv_heads]")
    if masks:
        parse.add_argument("--masks", nargs="+", help="full, causal or window=left,right")
    parse.add_argument("--contenders", nargs="+", help="names to run; all by default")
    parse.add_argument("--repeats", type=int, help="samples per contender and case")
    parse.add_argument("--threads", type=int, help="CPU threads of every contender")
    parse.add_argument("--output", type=Path, default=Path("build/benchmarks"), help="folder of the JSON and the plot")
    return parse


def main(args: argparse.Namespace, name: str) -> int:
    """Measure the pass `name` of `benchmarks.passes`; the exit code says whether cuflash answered every case."""
    set_threads(args.threads)
    from rich.console import Console

    from benchmarks import report
    from benchmarks.passes import PASSES

    console = Console()
    results = run(args, PASSES[name], console)
    console.print(*report.tables(results["results"]), sep="\n")
    report.write(results, name, args.output, console)
    return 1 if any("failure" in row and row["contender"] == "cuflash" for row in results["results"]) else 0


def set_threads(threads: int | None) -> None:
    """Before NumPy loads its BLAS."""
    if threads is not None:
        for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ[variable] = str(threads)


def run(args: argparse.Namespace, what: Pass, console: Console) -> dict[str, Any]:
    """Every case and contender that `args` asks for, as the content of the JSON file."""
    from benchmarks import machine
    from benchmarks.cases import Case, parse_mask, parse_shape

    device = device_of(args.device)
    cuda = device == "cuda"
    dtypes = args.dtype or ["bfloat16" if cuda else "float32"]
    shapes = [parse_shape(s) for s in args.shapes or (GPU_SHAPES if cuda else CPU_SHAPES)]
    masks = [parse_mask(m) for m in args.masks or (GPU_MASKS if cuda else CPU_MASKS)]
    contenders = [c for c in what.find(device) if args.contenders is None or c.name in args.contenders]
    if args.threads is not None and any(c.name.startswith("torch") for c in contenders):
        import torch

        torch.set_num_threads(args.threads)
    rates = {dtype: machine.rates(device, dtype) for dtype in dtypes}
    cases = [Case(*shape, dtype, *mask) for dtype in dtypes for shape in shapes for mask in masks]
    results = _measure(what, cases, contenders, device, args.repeats or (50 if cuda else 15), rates, console)
    return {
        "device": device,
        "machine": machine.describe(device, args.threads),
        "versions": {c.name: c.version for c in contenders},
        "rates": rates,
        "results": results,
        "host_seconds": _host_times(what, contenders, dtypes[0]) if cuda else {},
    }


def device_of(name: str) -> str:
    """ "auto" as "cuda" where CuPy finds a GPU, else "cpu"."""
    if name != "auto":
        return name
    try:
        import cupy
    except ImportError:
        return "cpu"
    return "cuda" if cupy.cuda.is_available() else "cpu"


def _measure(
    what: Pass,
    cases: list[Case],
    contenders: list[Contender],
    device: str,
    repeats: int,
    rates: dict[str, dict[str, float]],
    console: Console,
) -> list[dict[str, Any]]:
    from rich.progress import Progress

    from benchmarks.measure import cuda_timer, host_timer, interleaved

    timer = cuda_timer() if device == "cuda" else host_timer
    results = []
    with Progress(console=console) as progress:
        task = progress.add_task(f"attention {what.name}", total=len(cases) * len(contenders) * repeats)
        for case in cases:
            rows, runs = checked(what, case, contenders)
            progress.advance(task, (len(contenders) - len(runs)) * repeats)
            times = interleaved(runs, timer, repeats, lambda: progress.advance(task))
            for row in rows:
                if "failure" not in row:
                    row.update(_figures(what, case, times[row["contender"]].median, rates[case.dtype]))
                    row["seconds"] = times[row["contender"]].to_json()
                results.append(row)
    return results


def checked(what: Pass, case: Case, contenders: list[Contender]) -> tuple[list[dict[str, Any]], dict[str, Run]]:
    """A row for every contender, and the runs of those whose answer is right."""
    inputs = case.inputs()
    rows, runs = [], {}
    for contender in contenders:
        row: dict[str, Any] = {"case": case.name, "contender": contender.name}
        rows.append(row)
        try:
            run = contender.prepare(case, inputs)
            out = run.to_numpy(run.call())
        except Exception as error:  # a peer's refusal is a result: it stands in the table beside the figures
            row["failure"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:120]
            continue
        row["error"] = what.error(case, inputs, out)
        if row["error"] <= what.limits[case.dtype]:
            runs[contender.name] = run
        else:
            row["failure"] = f"wrong: error {row['error']:.1e} > {what.limits[case.dtype]:.0e}"
    return rows, runs


def _figures(what: Pass, case: Case, seconds: float, rates: dict[str, float]) -> dict[str, float]:
    """TFLOP/s of visible pairs, and shares of the measured rates: of operations, and of each array's bytes once."""
    flops = what.flops(case.problem) / seconds
    return {
        "tflops": flops * 1e-12,
        "share_of_matmul": flops / rates["matmul_flops"],
        "share_of_copy": what.bytes(case.problem) / seconds / rates["copy_bytes"],
    }


def _host_times(what: Pass, contenders: list[Contender], dtype: str) -> dict[str, Any]:
    """Host seconds of an asynchronous call, by contender."""
    from benchmarks.cases import Case
    from benchmarks.measure import host_seconds

    case = Case(*HOST_SHAPE, dtype)
    _, runs = checked(what, case, contenders)
    return {name: host_seconds(run).to_json() for name, run in runs.items()}
