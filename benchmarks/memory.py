"""`python -m benchmarks.memory`: peak memory of attention on a CPU beyond its inputs and output.

Every contender runs in a process of its own, whose high-water mark Linux resets just before the call.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

MIB = 1 << 20


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parse.add_argument("--shape", default="1,32768,1,64", help="batch,seqlen,heads,head_dim[,kv_heads]")
    parse.add_argument("--mask", default="full", help="full, causal or window=left,right")
    parse.add_argument("--dtype", choices=("float16", "bfloat16", "float32", "float64"), default="float32")
    parse.add_argument("--contenders", nargs="+", default=["cuflash", "torch flash"])
    parse.add_argument("--threads", type=int, default=2)
    parse.add_argument("--child", help=argparse.SUPPRESS)
    return parse


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    if args.child:
        print(json.dumps(_peak(args)))
        return 0
    from rich.console import Console
    from rich.table import Table

    title = f"{args.shape} {args.dtype} {args.mask}"
    view = Table("contender", "beyond inputs and output, MiB", "seconds", title=title)
    for name in args.contenders:
        result = measure(args, name)
        view.add_row(name, f"{result['bytes'] / MIB:.1f}", f"{result['seconds']:.2f}")
    Console().print(view)
    return 0


def measure(args: argparse.Namespace, contender: str) -> dict[str, float]:
    """Bytes beyond inputs and output, and seconds, of one contender in a fresh process."""
    threads = {name: str(args.threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    command = [sys.executable, "-m", "benchmarks.memory", "--child", contender]
    command += ["--shape", args.shape, "--mask", args.mask, "--dtype", args.dtype, "--threads", str(args.threads)]
    done = subprocess.run(command, env={**os.environ, **threads}, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def _peak(args: argparse.Namespace) -> dict[str, float]:
    import time
    from dataclasses import replace

    from benchmarks.cases import Case, parse_mask, parse_shape
    from benchmarks.contenders import find

    case = Case(*parse_shape(args.shape), args.dtype, *parse_mask(args.mask))
    contender = next(c for c in find("cpu") if c.name == args.child)
    small = replace(case, seqlen=min(case.seqlen, 64))  # imports, thread stacks and BLAS buffers come before the mark
    warm = contender.prepare(small, small.inputs())
    warm.wait(warm.call())
    run = contender.prepare(case, case.inputs())
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM to the present VmRSS
    before = _status("VmRSS")
    begin = time.perf_counter()
    out = run.call()
    run.wait(out)
    seconds = time.perf_counter() - begin
    return {"bytes": _status("VmHWM") - before - run.to_numpy(out).nbytes, "seconds": seconds}


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


if __name__ == "__main__":
    raise SystemExit(main())
