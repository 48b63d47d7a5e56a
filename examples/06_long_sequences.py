"""Time and memory of dense and sparse attention against the length of the sequence, and from where on sparse is faster.

Dense causal attention computes N²/2 scores. What computes fewer:

- window: each token sees the 256 before it, masks.SlidingWindow(255, 0): Θ(N)
- butterfly: blocks of 128, 1 + log2(N / 128) of them a row (FlashAttention 1), causal: Θ(N log N)
- hash: tokens see the earlier ones in their bucket of 16 (SCFA); the hashes are sorted in every call: N²/32
- kept: half of the queries and half of the keys, drawn at random, take part (SCFA): N²/8

Memory is what a first call needs beyond its inputs and its result, lists of tiles and sorted copies included.

    python examples/06_long_sequences.py                        # to 16,384 tokens on a CPU, 131,072 on a GPU
    python examples/06_long_sequences.py --lengths 1024 4096 16384
"""

from __future__ import annotations

import argparse
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import matplotlib

matplotlib.use("Agg")
import ml_dtypes
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from rich.console import Console
from rich.progress import track

import cuflash
from cuflash import masks, sparse

WINDOW, BLOCK, BUCKETS, KEPT = 256, 128, 16, 0.5
HEADS = {"cpu": (2, 64), "cuda": (16, 128)}  # heads, head_dim
LENGTHS = {"cpu": [2**n for n in range(8, 15)], "cuda": [2**n for n in range(10, 18)]}
REPEATS = 3  # the fastest counts

Call = Callable[[], Any]


def main() -> None:
    args = parse_arguments()
    device = pick_device(args.device)
    lengths = sorted(args.lengths or LENGTHS[device])
    heads, dim = HEADS[device]
    print(f"{heads} heads of {dim}, {'float32' if device == 'cpu' else 'bfloat16'}, forward, on {device}")

    warm_up = calls_at(min(lengths), device)  # kernels are compiled, threads started
    for call in warm_up.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in warm_up}
    memory: dict[str, list[float]] = {name: [] for name in warm_up}
    for length in track(lengths, "lengths", transient=True, console=Console(stderr=True)):
        for name, call in calls_at(length, device).items():
            memory[name].append(memory_of(call, device))
            seconds[name].append(seconds_of(call, device))

    print_table("milliseconds", lengths, seconds, 1e3)
    print_table("MB beyond inputs and result", lengths, memory, 1e-6)
    print()
    for name in list(seconds)[1:]:
        print(f"{'crossover, ' + name:36}{crossover(lengths, seconds['dense'], seconds[name])}")
        print(f"{'speedup at the longest, ' + name:36}{seconds['dense'][-1] / seconds[name][-1]:8.2f}")
    write_plot(args.output, lengths, seconds, memory)
    print(f"wrote {args.output}")


def calls_at(length: int, device: str) -> dict[str, Call]:
    """Every kind of attention on sequences of a length, with masks and tokens of its own."""
    heads, dim = HEADS[device]
    rng = np.random.default_rng(length)
    q, k, v = (rng.standard_normal((1, length, heads, dim), dtype=np.float32) for _ in range(3))
    keep = rng.random((2, 1, length, heads)) < KEPT
    hashes = [sparse.angular_hash(x, BUCKETS) for x in (q, k)]
    if device == "cuda":
        import cupy

        q, k, v = (cupy.asarray(x.astype(ml_dtypes.bfloat16)) for x in (q, k, v))
        keep, hashes = cupy.asarray(keep), [cupy.asarray(x) for x in hashes]
    window = masks.SlidingWindow(WINDOW - 1, 0)
    butterfly = masks.Butterfly(BLOCK) & masks.Causal()
    return {
        "dense": lambda: cuflash.attention(q, k, v, causal=True),
        "window": lambda: cuflash.attention(q, k, v, mask=window),
        "butterfly": lambda: cuflash.attention(q, k, v, mask=butterfly),
        "hash": lambda: sparse.hash_sparse_attention(q, k, v, *hashes),
        "kept": lambda: sparse.qk_sparse_attention(q, k, v, *keep),
    }


def seconds_of(call: Call, device: str) -> float:
    """Of the fastest of a few calls."""
    samples = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        call()
        if device == "cuda":
            import cupy

            cupy.cuda.Device().synchronize()
        samples.append(time.perf_counter() - begin)
    return min(samples)


def memory_of(call: Call, device: str) -> float:
    """Bytes that a call needs at once, beyond inputs and result."""
    if device == "cpu":
        tracemalloc.start()
        out = call()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return float(peak - out.nbytes)
    import cupy

    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    before = pool.used_bytes()
    out = call()
    return float(pool.total_bytes() - before - out.nbytes)


def crossover(lengths: list[int], dense: list[float], other: list[float]) -> str:
    """From which length on the other one is faster than dense; between two of them on a line of logarithms."""
    gain = np.log(dense) - np.log(other)
    slower = np.flatnonzero(gain <= 0)
    if not len(slower):
        return f"below {lengths[0]:,} tokens"
    last = slower[-1]
    if last == len(lengths) - 1:
        return f"above {lengths[-1]:,} tokens"
    length = np.exp(np.interp(0, gain[last : last + 2], np.log(lengths[last : last + 2])))
    return f"{length:8,.0f} tokens"


def print_table(title: str, lengths: list[int], values: dict[str, list[float]], unit: float) -> None:
    print(f"\n{title:>12}" if len(title) <= 12 else f"\n{title}\n{'tokens':>12}", end="")
    print("".join(f"{name:>12}" for name in values))
    for i, length in enumerate(lengths):
        print(f"{length:12,}" + "".join(f"{unit * column[i]:12.3f}" for column in values.values()))


def write_plot(path: str, lengths: list[int], seconds: dict[str, list[float]], memory: dict[str, list[float]]) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for axes, values, unit, label in ((left, seconds, 1e3, "milliseconds"), (right, memory, 1e-6, "MB")):
        draw(axes, lengths, values, unit)
        axes.set_ylabel(label)
    left.set_title("time of a call")
    right.set_title("memory beyond inputs and result")
    figure.savefig(path, dpi=110)


def draw(axes: Axes, lengths: list[int], values: dict[str, list[float]], unit: float) -> None:
    for name, column in values.items():
        axes.loglog(lengths, [unit * value for value in column], "o-", ms=4, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens")
    axes.grid(alpha=0.3)
    axes.legend()


def pick_device(name: str) -> str:
    """`name`, or for "auto" whether CuPy finds a GPU that the kernels run on (compute capability 8.0 or newer)."""
    if name != "auto":
        return name
    try:
        import cupy
    except ImportError:
        return "cpu"
    return "cuda" if cupy.cuda.is_available() and int(cupy.cuda.Device().compute_capability) >= 80 else "cpu"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time and memory of dense and sparse attention against the length.")
    parser.add_argument("--lengths", type=int, nargs="+", help="numbers of tokens")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--output", default="long_sequences.png", help="plot to write")
    args = parser.parse_args()
    if args.lengths and min(args.lengths) < 1:
        parser.error(f"--lengths {min(args.lengths)}: must be at least 1")
    return args


if __name__ == "__main__":
    main()
