"""`python -m cuflash explain`: how a problem would be computed on a GPU, and what that moves and costs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from cuflash import check, io_model, masks
from cuflash.errors import DeviceError, InvalidTypeError, InvalidValueError
from cuflash.jit.compiler import EXTRAS
from cuflash.options import Options
from cuflash.plan import backward_cost, cost
from cuflash.plan.backward import BackwardPlan
from cuflash.plan.config import BackwardConfig, BiasGradientConfig, ForwardConfig
from cuflash.plan.forward import ForwardPlan
from cuflash.plan.gpus import GPUS, Gpu, gpu_named
from cuflash.plan.kernel import KernelConfig
from cuflash.plan.launch import Launch
from cuflash.problem import Problem

if TYPE_CHECKING:
    from rich.table import Table

# Masks by name: what makes one of the numbers behind "=".
MASKS: dict[str, Callable[..., masks.Mask]] = {
    "causal": masks.Causal,
    "window": masks.SlidingWindow,
    "prefix": masks.PrefixLM,
    "dilated": masks.Dilated,
    "global": masks.GlobalTokens,
    "butterfly": masks.Butterfly,
}
BOUNDS = {"memory": "memory", "matmul": "matrix products", "special": "exponentials"}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "explain",
        help="configuration, bytes, operations and roofline time of a problem on a named GPU",
        description="How cuflash.attention would compute arrays of these shapes on a GPU, none of which is needed.",
    )
    parser.add_argument("--shape", required=True, help="of q: batch,seqlen,heads,dim, or without batch, or seqlen,dim")
    parser.add_argument("--kv-shape", help="of k, that of q by default")
    parser.add_argument("--v-shape", help="of v, that of k by default")
    parser.add_argument("--dtype", default="bfloat16", help="float16, bfloat16 (default), float32 or float64")
    parser.add_argument("--precision", help="tf32, of float32 alone")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--window", help="left,right; none on a side for no bound")
    parser.add_argument("--mask", help=f"{', '.join(MASKS)}, with numbers as in window=256,0 or butterfly=128")
    parser.add_argument("--softcap", type=float)
    parser.add_argument("--bias-shape", help="broadcasts to batch,heads,seqlen_q,seqlen_k")
    parser.add_argument("--bias-dtype", help="that of q by default")
    parser.add_argument("--lse", action="store_true", help="return the log-sum-exp too; backward: it has a cotangent")
    parser.add_argument("--num-splits", type=int, help="parts that keys are split into; chosen by default")
    parser.add_argument("--backward", action="store_true", help="the pullback of cuflash.vjp instead")
    parser.add_argument("--gpu", default="H100", help=f"{', '.join(GPUS)}; default H100")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    try:
        from rich.console import Console
    except ImportError:
        raise DeviceError(f"rich is not installed: explain needs {EXTRAS}") from None
    gpu = gpu_named(args.gpu)
    bias_shape = None if args.bias_shape is None else _numbers("--bias-shape", args.bias_shape)
    mask = None if args.mask is None else _mask(args.mask)
    problem = io_model.problem_of_shapes(
        _numbers("--shape", args.shape),
        None if args.kv_shape is None else _numbers("--kv-shape", args.kv_shape),
        None if args.v_shape is None else _numbers("--v-shape", args.v_shape),
        dtype=args.dtype,
        causal=args.causal,
        window=None if args.window is None else _window(args.window),
        mask=mask,
        softcap=args.softcap,
        bias_shape=bias_shape,
        bias_dtype=args.bias_dtype,
    )
    check.check_kernel_limits(problem, gpu.arch)
    options = Options(num_splits=args.num_splits, precision=args.precision)
    check.check_precision(problem, options)
    precision = f" as {args.precision}" if args.precision else ""
    shown = "" if mask is None else f", {mask!r} of density {mask.density(problem.seqlen_q, problem.seqlen_k):.4g}"
    title = f"{_describe(problem)}{shown}{precision} on {gpu.name} ({gpu.arch_name})"
    if args.backward:
        if args.num_splits is not None:
            raise InvalidValueError(f"--num-splits = {args.num_splits}: must be left out with --backward")
        pullback = io_model.plan_backward_contiguous(problem, gpu.arch, options, bias_shape)
        costs = io_model.backward_costs(problem, pullback, lse_cotangent=args.lse, bias_shape=bias_shape)
        parts: list[Any] = [f"{title}, backward", _backward_kernels(pullback, gpu)]
    else:
        plan = io_model.plan_contiguous(problem, gpu.arch, options, gpu.sm_count)
        costs = io_model.costs(problem, plan, return_lse=args.lse, bias_shape=bias_shape)
        parts = [title, _forward_kernels(plan, gpu)]
    Console().print(*parts, _costs(costs, gpu), *_conclusions(costs, gpu), sep="\n", highlight=False)
    return 0


def _numbers(name: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InvalidValueError(f"{name} = {text!r}: must be whole numbers and commas, such as 4,4096,32,128") from None


def _window(text: str) -> tuple[int | None, ...]:
    try:
        return tuple(None if side.strip() == "none" else int(side) for side in text.split(","))
    except ValueError:
        raise InvalidValueError(f"--window = {text!r}: must be left,right, each a whole number or none") from None


def _mask(text: str) -> masks.Mask:
    name, _, listed = text.partition("=")
    if name not in MASKS:
        raise InvalidValueError(f"--mask = {text!r}: must be one of {', '.join(MASKS)}")
    try:
        numbers = [None if part.strip() == "none" else int(part) for part in listed.split(",") if part]
    except ValueError:
        raise InvalidValueError(f"--mask = {text!r}: must have whole numbers or none behind {name}=") from None
    try:
        return MASKS[name](*numbers)
    except InvalidTypeError:
        raise
    except TypeError as error:  # too few numbers or too many
        raise InvalidValueError(
            f"--mask = {text!r}: must have the numbers of {MASKS[name].__name__}: {error}"
        ) from None


def _forward_kernels(plan: ForwardPlan, gpu: Gpu) -> Table:
    lists = () if plan.lists is None else plan.lists.launches
    view = _kernels([*lists, plan.forward, *((plan.combine,) if plan.combine else ())], gpu)
    view.add_row("splits of the keys", str(plan.num_splits))
    return view


def _backward_kernels(plan: BackwardPlan, gpu: Gpu) -> Table:
    view = _kernels([*(() if plan.lists is None else plan.lists.launches), *plan.launches], gpu)
    view.add_row("sums of dq", "in the order of the keys: the same bits every time")
    return view


def _kernels(launches: Iterable[Launch], gpu: Gpu) -> Table:
    """Configuration, resources and occupancy of every launch."""
    from rich.table import Table

    view = Table(show_header=False)
    for launch in launches:
        for name, value in _facts(launch, gpu).items():
            view.add_row(name, value)
        view.add_section()
    return view


def _describe(problem: Problem) -> str:
    p = problem
    sides = ["none" if side is None else str(side) for side in (p.left, p.right)]
    mask = "" if not p.windowed else ", causal" if p.left is None and p.right == 0 else f", window {','.join(sides)}"
    heads = str(p.num_heads) if p.num_heads == p.num_kv_heads else f"{p.num_heads} ({p.num_kv_heads} of keys)"
    dims = str(p.head_dim) if p.head_dim == p.head_dim_v else f"{p.head_dim} ({p.head_dim_v} of values)"
    return f"batch {p.batch}, queries {p.seqlen_q}, keys {p.seqlen_k}, heads {heads}, dim {dims}, {p.dtype}{mask}"


def _facts(launch: Launch, gpu: Gpu) -> dict[str, str]:
    config, arch = launch.config, gpu.arch
    registers = _registers(config, gpu)
    blocks = launch.grid[0]
    facts = {"kernel": config.entry, "threads of a block": f"{config.threads} ({config.num_warps} warps)"}
    resident = None
    if isinstance(config, ForwardConfig):
        place = "registers" if config.q_in_registers else "shared memory"
        facts["tiles"] = f"{config.block_m} queries x {config.block_n} keys, {config.block_dv} output columns"
        facts["pipeline"] = f"{config.num_stages} stage(s) of keys and values, queries in {place}"
        resident = cost.blocks_per_sm(config, arch, registers)
    elif isinstance(config, BiasGradientConfig):
        facts["tiles"] = f"{config.block_m} queries x {config.block_n} keys"
    elif isinstance(config, BackwardConfig) and config.family == "backward":
        columns = f"{config.block_d} columns of dk, {config.block_dv} of dv"
        facts["tiles"] = f"{config.block_n} keys x {config.block_m} queries, {columns}"
        facts["pipeline"] = f"{config.num_stages} stage(s) of queries, {config.key_warps} warps along the keys"
        resident = backward_cost.blocks_per_sm(config, arch, registers)
    if launch.shared_bytes:
        facts["shared memory"] = f"{launch.shared_bytes:,} of {arch.shared_per_block:,} bytes"
    if resident is not None:
        warps, most = resident * config.num_warps, arch.max_warps_per_sm
        facts["occupancy"] = f"{resident} blocks, {warps} of {most} warps a multiprocessor ({warps / most:.0%})"
        facts["waves"] = f"{blocks / max(1, resident * gpu.sm_count):.2f} over {gpu.sm_count} multiprocessors"
    facts["registers"] = "no compiler at hand" if registers is None else f"{registers} a thread"
    facts["grid"] = f"{blocks:,} blocks"
    return facts


def _registers(config: KernelConfig, gpu: Gpu) -> int | None:
    """Registers of a thread, or None where no compiler is installed."""
    from cuflash.jit import resources

    try:
        return resources(config, gpu.arch_name).registers
    except DeviceError:
        return None


def _costs(costs: dict[str, io_model.Cost], gpu: Gpu) -> Table:
    """Bytes, operations and roofline time of every algorithm."""
    from rich.table import Table

    view = Table()
    view.add_column("")
    for name in costs:
        view.add_column(name, justify="right")
    lines = {name: cost.roofline(gpu) for name, cost in costs.items()}
    rows = {
        "asked of global memory, read": [_bytes(cost.bytes_read) for cost in costs.values()],
        "asked of global memory, written": [_bytes(cost.bytes_written) for cost in costs.values()],
        "least through the memory bus": [_bytes(cost.dram_bytes) for cost in costs.values()],
        "workspace": [_bytes(cost.workspace_bytes) for cost in costs.values()],
        "matrix products, Gflop": [f"{cost.matmul_flops * 1e-9:,.2f}" for cost in costs.values()],
        "exponentials, 10^9": [f"{cost.exponentials * 1e-9:,.3f}" for cost in costs.values()],
        "flop per byte asked": [f"{cost.intensity:,.1f}" for cost in costs.values()],
        "memory time, µs": [f"{lines[name].memory * 1e6:,.1f}" for name in costs],
        "matrix product time, µs": [f"{lines[name].matmul * 1e6:,.1f}" for name in costs],
        "exponential time, µs": [f"{lines[name].special * 1e6:,.1f}" for name in costs],
        "least time, µs": [f"{lines[name].seconds * 1e6:,.1f}" for name in costs],
        "bound by": [BOUNDS[lines[name].bound] for name in costs],
    }
    for name, row in rows.items():
        view.add_row(name, *row)
    return view


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count} B"


def _conclusions(costs: dict[str, io_model.Cost], gpu: Gpu) -> list[str]:
    flash, standard = costs["flash"], costs["standard"]
    seconds = flash.roofline(gpu).seconds
    if not flash.bytes or not seconds:
        return ["There is nothing to compute."]
    return [
        f"Standard attention asks global memory for {standard.bytes / flash.bytes:,.2f} times the bytes of flash;",
        f"through the memory bus must go {standard.dram_bytes / flash.dram_bytes:,.1f} times as many.",
        f"In its least time flash would run at {flash.useful_flops / seconds * 1e-12:,.0f} TFLOP/s of visible pairs.",
    ]
