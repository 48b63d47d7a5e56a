"""Compile many kernels at once, one process per core: NVRTC runs one compilation per process at a time."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

from cuflash.jit.build import Resources, Unit, resources

Config = TypeVar("Config", bound=Unit)


def compile_all(jobs: Sequence[tuple[Config, str]]) -> Iterator[tuple[Config, str, Resources]]:
    """Bring every (configuration, architecture) into the cache; yield each with its resources as it is done.

    Raises what `compile_cubin` raises, at the first job that fails; jobs not yet begun are dropped.
    """
    workers = min(len(jobs), os.cpu_count() or 1)
    if workers <= 1:
        yield from ((config, arch, resources(config, arch)) for config, arch in jobs)
        return
    # "spawn": a child forked from a process with threads or a CUDA context would inherit their locks
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(resources, config, arch): (config, arch) for config, arch in jobs}
        try:
            for future in as_completed(futures):
                yield *futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)
