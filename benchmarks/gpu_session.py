"""`python -m benchmarks.gpu_session FOLDER`: everything worth doing once a GPU is at hand, written into FOLDER.

Tests on the GPU, memcheck and racecheck of compute-sanitizer on a selection of them, recordings of single instructions
for the emulator's tests, the benchmarks. A step that fails does not stop the others; summary.json says how each ended.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

SANITIZED = tuple(
    f"tests/{name}.py"
    for name in (
        "attention/test_head_dims",
        "attention/test_splits_and_tiles",
        "attention/test_unreadable_memory",
        "attention/test_varlen",
        "kernels/test_cache_moves",
        "paged/test_attention",
        "gradients/test_tiles",
        "gradients/test_mask_objects",
        "sparse/test_gradients",
    )
)

# CuPy's memory pool hides an access past an array that stays within the pool's block: allocate each array by itself.
PYTEST_WITHOUT_POOL = "import sys, cupy, pytest; cupy.cuda.set_allocator(None); sys.exit(pytest.main(sys.argv[1:]))"


def steps(folder: Path) -> dict[str, list[str]]:
    """Commands by name, in order."""
    python = [sys.executable]
    pytest = ["--device=cuda", "-k", "cuda", "-q", "-p", "no:cacheprovider"]  # the others need no GPU
    sanitized = [*python, "-c", PYTEST_WITHOUT_POOL, *pytest, "-x", *SANITIZED]
    sanitizer = ["compute-sanitizer", "--target-processes", "all", "--error-exitcode", "9"]
    return {
        "machine": ["nvidia-smi", "-q", "-d", "CLOCK,MEMORY,POWER,PERFORMANCE"],
        "info": [*python, "-m", "cuflash", "info"],
        "golden": [*python, "-m", "tests.golden.record", str(folder)],
        "tests": [*python, "-m", "pytest", *pytest, "--durations=20", "tests"],
        "benchmark": [*python, "-m", "benchmarks.forward", "--device", "cuda", "--output", str(folder)],
        "sparse": [*python, "-m", "benchmarks.sparse", "--device", "cuda", "--output", str(folder)],
        "decode": [*python, "-m", "benchmarks.decode", "--device", "cuda", "--output", str(folder)],
        "configurations": [*python, "-m", "benchmarks.configurations", "--output", str(folder)],
        "first call": [*python, "-m", "benchmarks.first_call", "--output", str(folder)],
        "memcheck": [*sanitizer, "--tool", "memcheck", *sanitized],
        "racecheck": [*sanitizer, "--tool", "racecheck", *sanitized],
    }


def main(arguments: list[str] | None = None) -> int:
    parse = argparse.ArgumentParser(prog="python -m benchmarks.gpu_session", description=__doc__)
    parse.add_argument("folder", type=Path, help="where logs and results go")
    parse.add_argument("--only", nargs="+", choices=list(steps(Path())), help="steps to run; all by default")
    parse.add_argument("--limit", type=float, default=1800, help="seconds that one step may take")
    args = parse.parse_args(arguments)
    args.folder.mkdir(parents=True, exist_ok=True)
    summary = {}
    for name, command in steps(args.folder).items():
        if args.only and name not in args.only:
            continue
        summary[name] = run(command, args.folder / f"{name}.log", args.limit)
        (args.folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        print(f"{name}: {summary[name]['outcome']} in {summary[name]['seconds']:.0f} s", flush=True)
    return 0 if all(step["outcome"] == "passed" for step in summary.values()) else 1


def run(command: list[str], log: Path, limit: float) -> dict[str, object]:
    """Run one step, its output in `log`; how it ended and how long it took."""
    begin = time.monotonic()
    with log.open("w") as output:
        try:
            done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, timeout=limit, check=False)
            outcome = "passed" if done.returncode == 0 else f"failed with exit code {done.returncode}"
        except subprocess.TimeoutExpired:
            outcome = f"stopped after {limit:.0f} s"
        except FileNotFoundError:
            outcome = f"not run: {command[0]} is not installed"
    return {"outcome": outcome, "seconds": time.monotonic() - begin, "command": command}


if __name__ == "__main__":
    raise SystemExit(main())
