"""`python -m benchmarks.paging`: microseconds of bookkeeping per sequence, with many sequences in one cache.

CPU time of the process, so that a busy machine changes little. Arrays have one head of one element: what is measured is
the bookkeeping, and of slots and tables the arrays that go to the device.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cuflash

BLOCK_SIZE, PROMPT, SHARED = 16, 40, 4  # tokens of a block, tokens of a prompt, blocks of a prefix that all share


def main(arguments: list[str] | None = None) -> int:
    parse = argparse.ArgumentParser(prog="python -m benchmarks.paging", description=__doc__)
    parse.add_argument("--sequences", type=int, default=100_000)
    parse.add_argument("--repeats", type=int, default=3, help="times that all is done, each in a cache of its own")
    parse.add_argument("--output", type=Path, default=Path("build/benchmarks"), help="folder of the JSON")
    args = parse.parse_args(arguments)
    runs = [dict(measure(args.sequences)) for _ in range(args.repeats)]
    result = {name: [run[name] for run in runs] for name in runs[0]}
    for name, microseconds in result.items():
        print(f"{name:48} {statistics.median(microseconds):6.2f} us")
    args.output.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"sequences": args.sequences, "microseconds": result}, indent=1) + "\n"
    (args.output / "paging.json").write_text(text)
    return 0


def measure(count: int) -> Iterator[tuple[str, float]]:
    """Operations by name and what one sequence of them takes."""

    def timed(name: str, function: Callable[[], Any]) -> tuple[str, float]:
        nonlocal result
        begin = time.process_time()
        result = function()
        return name, (time.process_time() - begin) / count * 1e6

    result: Any = None
    cache = cuflash.PagedKVCache(1, 4 * count + SHARED, BLOCK_SIZE, 1, 1, dtype="float16")
    yield timed("add_sequence", lambda: [cache.add_sequence()[0] for _ in range(count)])
    ids: list[int] = result
    yield timed("reserve a prompt of 40 (3 blocks), all at once", lambda: cache.reserve(ids, PROMPT))
    tokens = [list(range(PROMPT))] * count
    yield timed("commit a prompt of 40 (2 hashes), all at once", lambda: cache.commit(ids, tokens))
    yield timed("reserve a token, all at once", lambda: cache.reserve(ids))
    yield timed("reserve a token, one by one", lambda: [cache.reserve([i]) for i in ids])
    yield timed("commit a token, all at once", lambda: cache.commit(ids, [[1]] * count))
    yield timed("block_tables", lambda: cache.block_tables(ids))
    yield timed("seq_lens", lambda: cache.seq_lens(ids))
    yield timed("fork (3 blocks)", lambda: [cache.fork(i) for i in ids])
    forks: list[int] = result
    yield timed("reserve with a copied block, all at once", lambda: cache.reserve(forks))
    yield timed("truncate by a block", lambda: [cache.truncate(i, 2 * BLOCK_SIZE) for i in forks])
    yield timed("usage", cache.usage)
    yield timed("free (2 shared blocks)", lambda: [cache.free(i) for i in forks])
    yield timed("free (3 blocks)", lambda: [cache.free(i) for i in ids])
    prompt = list(range(1000, 1000 + SHARED * BLOCK_SIZE))
    first, _ = cache.add_sequence()
    cache.reserve([first], len(prompt))
    cache.commit([first], [prompt])
    yield timed("add_sequence that finds 4 blocks", lambda: [cache.add_sequence(prompt) for _ in range(count)])


if __name__ == "__main__":
    raise SystemExit(main())
