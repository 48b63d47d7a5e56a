"""`python -m benchmarks.decode`: attention of one query a sequence over a paged cache, as a share of read bandwidth.

Pages lie in random order, and calls go round over as many copies of a case as exceed the L2 cache three times, so that
keys and values come from memory. Rates count the keys and values of live tokens, queries and outputs once, in units of
10^9 bytes; the bandwidth beside them is that of a kernel of the same run that only reads.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import driver

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from benchmarks.decode_cases import DecodeCase, Decoder

SETTINGS: dict[str, list[str]] = {
    "lengths": [f"{batch},{length},8,4,16" for batch in (1, 8, 32, 64) for length in (1024, 4096, 16384, 32768)],
    "block sizes": [f"8,16384,8,4,{size}" for size in (1, 5, 16, 64, 256, 0)],
    "groups": [f"8,16384,8,{group},16" for group in (1, 2, 3, 4, 5, 8, 16)],
    "heads": [f"16,16384,{heads},{32 // heads},16" for heads in (1, 2, 4, 8, 16, 32)],
    "skew": [f"{batch},{length},8,4,16{skew}" for batch, length in ((32, 4096), (64, 4096), (16, 16384))
             for skew in ("", ",skewed")],
}  # fmt: skip
CPU_CASES = ["2,300,2,4,16", "3,200,2,1,5,skewed"]
READ_BYTES = {"cpu": 1 << 27, "cuda": 4 << 30}
CACHES = {"cpu": 1, "cuda": 3}  # times the L2 cache that the copies of a case exceed
HOST_CALLS = 200
HOST_CALLS_QUEUED = 20  # at most: a call that finds the queue full waits for the GPU

READ_KERNEL = r"""
extern "C" __global__ void read(const uint4* x, size_t n, unsigned* out) {
    unsigned bits = 0;
    const size_t step = size_t(gridDim.x) * blockDim.x;
#pragma unroll 8
    for (size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) {
        const uint4 v = x[i];
        bits |= v.x | v.y | v.z | v.w;
    }
    if (bits != 0) *out = bits;  // of zeros never
}
"""


def main(arguments: list[str] | None = None) -> int:
    parse = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__)
    parse.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parse.add_argument("--settings", nargs="+", choices=list(SETTINGS), help="all by default, on a GPU")
    parse.add_argument(
        "--cases", nargs="+", help="batch,length,kv_heads,group,block_size[,skewed]; block_size 0: contiguous"
    )
    parse.add_argument("--head-dim", type=int, default=128)
    parse.add_argument("--dtype", choices=("float16", "bfloat16", "float32", "float64"))
    parse.add_argument("--contenders", nargs="+", help="names to run; all by default")
    parse.add_argument("--repeats", type=int, help="samples per contender and case")
    parse.add_argument("--output", type=Path, default=Path("build/benchmarks"), help="folder of the JSON")
    args = parse.parse_args(arguments)
    from rich.console import Console

    console = Console()
    report = run(args, console)
    console.print(table(report))
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "decode.json").write_text(json.dumps(report, indent=2) + "\n")
    console.print(f"wrote {args.output / 'decode.json'}")
    return 1 if any("failure" in row and row["contender"] == "cuflash" for row in report["results"]) else 0


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Every case and contender that `args` asks for, as the content of the JSON file."""
    from rich.progress import track

    from benchmarks import decode_cases, machine

    device = driver.device_of(args.device)
    texts = [text for name in args.settings or SETTINGS for text in SETTINGS[name]]
    texts = args.cases or (texts if device == "cuda" or args.settings else CPU_CASES)
    dtype = args.dtype or ("bfloat16" if device == "cuda" else "float32")
    cases = [
        replace(decode_cases.parse_case(text), head_dim=args.head_dim, dtype=dtype) for text in dict.fromkeys(texts)
    ]
    decoders = [d for d in decode_cases.find(device) if args.contenders is None or d.name in args.contenders]
    rate = read_bandwidth(device)
    results = []
    for case in track(cases, "decoding", console=console):
        results += measure(case, decoders, device, args.repeats or (20 if device == "cuda" else 3), rate)
    return {
        "device": device,
        "machine": machine.describe(device, None),
        "versions": {decoder.name: decoder.version for decoder in decoders},
        "read_bytes_per_second": rate,
        "results": results,
    }


def read_bandwidth(device: str) -> float:
    """Bytes a second of a pass that only reads, the best of several."""
    count = READ_BYTES[device]
    if device == "cpu":
        import numpy as np

        source = np.zeros(count // 8, np.uint64)
        return count / min(_seconds(lambda: source.max()) for _ in range(5))
    import cupy

    source = cupy.zeros(count, cupy.uint8)
    out = cupy.zeros(1, cupy.uint32)
    kernel = cupy.RawKernel(READ_KERNEL, "read")
    blocks = 16 * cupy.cuda.Device().attributes["MultiProcessorCount"]
    arguments = (source, cupy.uint64(count // 16), out)
    return count / min(_event_seconds(lambda: kernel((blocks,), (512,), arguments)) for _ in range(20))


def measure(
    case: DecodeCase, decoders: Sequence[Decoder], device: str, repeats: int, rate: float
) -> list[dict[str, Any]]:
    """A row for every contender: right answers are timed."""
    import numpy as np

    from benchmarks import decode_cases
    from benchmarks.cases import ERROR_LIMITS
    from benchmarks.measure import Times

    xp, l2 = np, 1 << 20
    if device == "cuda":
        import cupy

        xp, l2 = cupy, cupy.cuda.Device().attributes["L2CacheSize"]
    copies = 1 + CACHES[device] * l2 // case.bytes
    given = [decode_cases.arrays(case, xp, seed) for seed in range(copies)]
    rows = []
    for decoder in decoders:
        row: dict[str, Any] = {"case": case.name, "contender": decoder.name, "bytes": case.bytes, "copies": copies}
        rows.append(row)
        try:
            calls = [decoder.prepare(case, arrays) for arrays in given]
            out = decode_cases.to_numpy(decoder, calls[-1]())
        except Exception as error:  # a peer's refusal is a result: it stands in the table beside the figures
            row["failure"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:120]
            continue
        row["error"] = decode_cases.error(case, given[-1], out)
        if row["error"] > ERROR_LIMITS[case.dtype]:
            row["failure"] = f"wrong: error {row['error']:.1e} > {ERROR_LIMITS[case.dtype]:.0e}"
            continue
        seconds, row["host_seconds"] = times(calls, decoder, device, repeats)
        row["seconds"] = Times.of(seconds).to_json()
        row["share_of_read"] = case.bytes / row["seconds"]["median"] / rate
    return rows


def times(
    calls: Sequence[Callable[[], Any]], decoder: Decoder, device: str, repeats: int
) -> tuple[list[float], float | None]:
    """Seconds of one call, on a GPU as replayed in a CUDA graph of all copies; host seconds of a call outside of it."""
    if device == "cpu":
        return [_seconds(lambda: [call() for call in calls]) / len(calls) for _ in range(repeats)], None
    host = host_seconds(calls[0])
    replay = (_torch_graph if decoder.torch else _cupy_graph)(calls)
    replay()
    return [_event_seconds(replay) / len(calls) for _ in range(repeats)], host


def host_seconds(call: Callable[[], Any]) -> float:
    """Median of a call that starts work on the GPU and does not wait for it."""
    import cupy

    samples = []
    for i in range(HOST_CALLS):
        if i % HOST_CALLS_QUEUED == 0:
            cupy.cuda.Device().synchronize()
        samples.append(_seconds(call))
    return sorted(samples)[HOST_CALLS // 2]


def _cupy_graph(calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    import cupy

    stream, pool = cupy.cuda.Stream(non_blocking=True), cupy.cuda.MemoryPool()  # of the graph alone
    with cupy.cuda.using_allocator(pool.malloc), stream:
        held = [call() for call in calls]
        stream.begin_capture()
        held += [call() for call in calls]
        graph = stream.end_capture()

    def replay() -> Any:
        graph.launch(cupy.cuda.Stream.null)
        return held, pool  # memory that the graph uses, kept as long as it is

    stream.synchronize()
    return replay


def _torch_graph(calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    import torch

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = [call() for call in calls]

    def replay() -> Any:
        graph.replay()
        return held

    return replay


def _seconds(function: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def _event_seconds(function: Callable[[], Any]) -> float:
    """By events on the null stream; a fill before keeps the GPU busy while the host enqueues, and evicts the cache."""
    import cupy

    cache = cupy.cuda.Device().attributes["L2CacheSize"]
    start, stop = cupy.cuda.Event(), cupy.cuda.Event()
    cupy.empty(max(4 * cache, 1 << 28), cupy.uint8).fill(1)
    start.record()
    function()
    stop.record()
    stop.synchronize()
    return float(cupy.cuda.get_elapsed_time(start, stop)) * 1e-3


def table(report: dict[str, Any]) -> Table:
    """One row per case and contender; who could not run says why below."""
    from rich.table import Table

    refused = "\n".join(f"{r['case']}, {r['contender']}: {r['failure']}" for r in report["results"] if "failure" in r)
    title = f"Decoding; reading alone: {report['read_bytes_per_second'] * 1e-9:,.0f} GB/s"
    view = Table(title=title, caption=refused or None, caption_justify="left")
    view.add_column("case")
    view.add_column("contender")
    for heading in ("MB", "us", "GB/s", "/read", "host us", "error"):
        view.add_column(heading, justify="right", no_wrap=True)
    for row in report["results"]:
        if "failure" in row:
            continue
        seconds, host = row["seconds"]["median"], row["host_seconds"]
        view.add_row(
            row["case"], row["contender"], f"{row['bytes'] * 1e-6:,.1f}", f"{seconds * 1e6:,.1f}",
            f"{row['bytes'] / seconds * 1e-9:,.0f}", f"{row['share_of_read']:.1%}",
            "" if host is None else f"{host * 1e6:.1f}", f"{row['error']:.1e}",
        )  # fmt: skip
    return view


if __name__ == "__main__":
    raise SystemExit(main())
