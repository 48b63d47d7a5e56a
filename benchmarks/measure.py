"""Timing: interleaved repeats on one clock for all, so that drift of the machine touches every contender alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks.contenders import Run

WARM_UP_CALLS = 3
PAUSE = 0.1  # seconds before a sample on the host's clock: idle threads of another library spin for some of them
HOST_CALLS = 200


@dataclass(frozen=True)
class Times:
    """Seconds of one call: median, least, and the 10th and 90th percentile of `count` samples."""

    median: float
    least: float
    p10: float
    p90: float
    count: int

    @classmethod
    def of(cls, samples: list[float]) -> Times:
        p10, median, p90 = np.percentile(samples, [10, 50, 90])
        return cls(float(median), min(samples), float(p10), float(p90), len(samples))

    def to_json(self) -> dict[str, float]:
        return asdict(self)


Timer = Callable[[Run], float]


def host_timer(run: Run) -> float:
    """Seconds of one call and its wait, by the host's clock."""
    time.sleep(PAUSE)
    begin = time.perf_counter()
    run.wait(run.call())
    return time.perf_counter() - begin


def cuda_timer() -> Timer:
    """A timer by CUDA events after an eviction of the L2 cache.

    The eviction also keeps the GPU busy while the host enqueues the call, so that the events enclose the kernels
    alone. A run on a stream of its own is timed by the host's clock over as many calls as fill 20 ms.
    """
    import cupy

    cache_bytes = cupy.cuda.Device().attributes["L2CacheSize"]
    eviction = cupy.empty(max(4 * cache_bytes, 1 << 28), cupy.uint8)
    start, stop = cupy.cuda.Event(), cupy.cuda.Event()

    def by_events(run: Run) -> float:
        eviction.fill(1)
        start.record()
        run.call()
        stop.record()
        stop.synchronize()
        return float(cupy.cuda.get_elapsed_time(start, stop)) * 1e-3

    def by_batch(run: Run) -> float:
        calls = max(1, round(0.02 / max(host_timer(run), 1e-6)))
        begin = time.perf_counter()
        for _ in range(calls):
            out = run.call()
        run.wait(out)
        return (time.perf_counter() - begin) / calls

    return lambda run: by_events(run) if run.on_null_stream else by_batch(run)


def interleaved(
    runs: Mapping[str, Run], timer: Timer, repeats: int, advance: Callable[[], Any] = lambda: None
) -> dict[str, Times]:
    """`repeats` rounds in which every run is timed once, each round beginning with another one."""
    for run in runs.values():
        for _ in range(WARM_UP_CALLS):
            run.wait(run.call())
    names = list(runs)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats):
        shift = repeat % max(len(names), 1)
        for name in names[shift:] + names[:shift]:
            samples[name].append(timer(runs[name]))
            advance()
    return {name: Times.of(values) for name, values in samples.items()}


def host_seconds(run: Run) -> Times:
    """Host time of a call that only enqueues work: the caller chooses a case so small that no queue fills."""
    samples = []
    for _ in range(HOST_CALLS):
        begin = time.perf_counter()
        out = run.call()
        samples.append(time.perf_counter() - begin)
        run.wait(out)
    return Times.of(samples)
