"""Work items on a few threads. NumPy and BLAS release the interpreter lock, so items overlap."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import numpy as np


def num_threads() -> int:
    """OMP_NUM_THREADS where it is set to a number, as BLAS reads it, else the cores this process may run on."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_all(items: Iterator[Callable[[], None]], threads: int) -> None:
    """Call every item once, the calling thread included; the first error stops what has not begun and is raised.

    Floating-point warnings are off inside: an item writes inf and NaN where the arithmetic gives them.
    """
    lock = Lock()
    stopped = False

    def work() -> None:
        nonlocal stopped
        with np.errstate(all="ignore"):
            while True:
                with lock:
                    item = None if stopped else next(items, None)
                if item is None:
                    return
                try:
                    item()
                except BaseException:
                    stopped = True
                    raise

    if threads == 1:
        work()
        return
    with ThreadPoolExecutor(threads - 1) as pool:
        others = [pool.submit(work) for _ in range(threads - 1)]
        work()
    for other in others:
        other.result()
