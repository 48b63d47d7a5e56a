"""`python -m cuflash compile`: fill the kernel cache ahead of time, with or without a GPU."""

from __future__ import annotations

import argparse

from cuflash.errors import DeviceError
from cuflash.jit.ahead import compile_all
from cuflash.jit.cache import cache_dir
from cuflash.jit.compiler import EXTRAS
from cuflash.plan.arch import ARCHS
from cuflash.plan.config import ARRAY_DTYPES
from cuflash.plan.shipped import DTYPES, HEAD_DIMS, shipped_configs


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "compile",
        help="compile kernels into the cache, for any architecture, without a GPU",
        description="Compile the shipped kernel configurations, or those that the options select, into the cache.",
    )
    parser.add_argument("--arch", nargs="+", required=True, choices=tuple(ARCHS), metavar="ARCH", help=", ".join(ARCHS))
    parser.add_argument(
        "--dtype", nargs="+", choices=ARRAY_DTYPES, default=DTYPES, help="of q, k and v; 16 bits by default"
    )
    sizes = ", ".join(map(str, HEAD_DIMS))
    parser.add_argument(
        "--head-dim", nargs="+", type=_head_dim, default=HEAD_DIMS, metavar="DIM", help=f"1 to 512; by default {sizes}"
    )
    parser.set_defaults(run=run)


def _head_dim(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 512:
        raise argparse.ArgumentTypeError(f"{text}: must be 1 to 512")
    return int(text)


def run(args: argparse.Namespace) -> int:
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        raise DeviceError(f"rich is not installed: compiling needs {EXTRAS}") from None
    archs = dict.fromkeys(args.arch)
    jobs = [(config, arch) for arch in archs for config in shipped_configs(arch, args.dtype, args.head_dim)]
    name = TextColumn("{task.description}")
    with Progress(TextColumn("compiling"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), name) as progress:
        task = progress.add_task("", total=len(jobs))
        for config, arch, _ in compile_all(jobs):
            progress.update(task, advance=1, description=f"{config.entry} {arch}")
        progress.update(task, description="")
    print(f"{len(jobs)} kernels for {', '.join(archs)} in {cache_dir()}")
    return 0
