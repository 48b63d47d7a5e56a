"""`python -m benchmarks.first_call`: seconds of the first call of a process, compiling, and with the kernel on disk.

Each sample is a process of its own. CuPy's import and the CUDA context are there before the clock starts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SHAPE = (1, 256, 2, 64)

CHILD = """
import contextlib, sys, time
import numpy as np
import cuflash
rng = np.random.default_rng(0)
arrays = [rng.standard_normal({shape}).astype(np.float16) for _ in range(3)]
place, wait = contextlib.nullcontext(), lambda: None
if sys.argv[1] == "cuda":
    import cupy
    arrays, wait = [cupy.asarray(array) for array in arrays], cupy.cuda.Device().synchronize
    wait()
else:
    place = cuflash.emulate(sys.argv[1])
with place:
    begin = time.perf_counter()
    cuflash.attention(*arrays, causal=True)
    wait()
    print(time.perf_counter() - begin)
"""


def main(arguments: list[str] | None = None) -> int:
    parse = argparse.ArgumentParser(prog="python -m benchmarks.first_call", description=__doc__)
    parse.add_argument("--device", default="cuda", help='"cuda", or an architecture to emulate, such as sm_80')
    parse.add_argument("--repeats", type=int, default=5, help="processes, each once cold and once from the disk")
    parse.add_argument("--output", type=Path, default=Path("build/benchmarks"), help="folder of the JSON")
    args = parse.parse_args(arguments)
    samples: dict[str, list[float]] = {"cold": [], "from_disk": []}
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as folder:
            for name in samples:
                samples[name].append(first_call(args.device, folder))
    for name, seconds in samples.items():
        print(f"{name}: {statistics.median(seconds):.3f} s ({min(seconds):.3f} to {max(seconds):.3f})")
    args.output.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"device": args.device, "seconds": samples}, indent=1) + "\n"
    (args.output / "first_call.json").write_text(text)
    return 0


def first_call(device: str, cache: str) -> float:
    """Seconds of a first call in a fresh process with this kernel cache."""
    command = [sys.executable, "-c", CHILD.format(shape=SHAPE), device]
    done = subprocess.run(
        command, env=os.environ | {"CUFLASH_CACHE_DIR": cache}, check=True, capture_output=True, text=True
    )
    return float(done.stdout)


if __name__ == "__main__":
    raise SystemExit(main())
