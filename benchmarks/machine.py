"""The machine: what it is, and the rates of a matrix product and of a copy, measured in the same run."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cases import DTYPES

LIBRARIES = ("numpy", "cupy-cuda12x", "cupy-cuda13x", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")
GPU_FACTS = ("name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")
CPU_MATRIX, GPU_MATRIX = 2048, 8192
CPU_COPY_BYTES, GPU_COPY_BYTES = 1 << 28, 1 << 30
REPEATS = 20


def describe(device: str, threads: int | None) -> dict[str, Any]:
    """Processor, clocks and versions, to stand beside every figure."""
    facts: dict[str, Any] = {"python": platform.python_version(), "cpu": _cpu_name(), "cores": os.cpu_count()}
    facts["threads"] = threads
    for library in LIBRARIES:
        try:
            facts[library] = version(library)
        except PackageNotFoundError:
            continue
    if device == "cuda":
        query = ["nvidia-smi", f"--query-gpu={','.join(GPU_FACTS)}", "--format=csv,noheader"]
        line = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
        facts.update({f"gpu {key}": value.strip() for key, value in zip(GPU_FACTS, line.split(","), strict=True)})
    return facts


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def rates(device: str, dtype: str) -> dict[str, float]:
    """Operations/s of a square matrix product and bytes/s (read and written) of a copy: the machine's best."""
    matmul, flops, copy, copied = _gpu_work(dtype) if device == "cuda" else _cpu_work(dtype)
    return {"matmul_flops": flops / _least(matmul), "copy_bytes": copied / _least(copy)}


def _least(work: Any) -> float:
    samples = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        work()
        samples.append(time.perf_counter() - begin)
    return min(samples)


def _cpu_work(dtype: str) -> tuple[Any, int, Any, int]:
    # NumPy has no fast product of 16-bit floats: attention on a CPU multiplies them as float32, and so does this.
    wide = np.float64 if dtype == "float64" else np.float32
    rng = np.random.default_rng(2)
    a, b = (rng.standard_normal((CPU_MATRIX, CPU_MATRIX)).astype(wide) for _ in range(2))
    c = np.empty_like(a)
    source = np.ones(CPU_COPY_BYTES, np.uint8)
    target = np.empty_like(source)
    return lambda: np.matmul(a, b, out=c), 2 * CPU_MATRIX**3, lambda: np.copyto(target, source), 2 * CPU_COPY_BYTES


def _gpu_work(dtype: str) -> tuple[Any, int, Any, int]:
    import cupy

    wait = cupy.cuda.Stream.null.synchronize
    source = cupy.ones(GPU_COPY_BYTES, cupy.uint8)
    target = cupy.empty_like(source)

    def copy() -> None:
        cupy.copyto(target, source)
        wait()

    return _gpu_product(dtype), 2 * GPU_MATRIX**3, copy, 2 * GPU_COPY_BYTES


def _gpu_product(dtype: str) -> Any:
    """cuBLAS through torch where it is there (it multiplies bfloat16), else through CuPy."""
    import cupy

    if find_spec("torch"):
        import torch

        if torch.cuda.is_available():
            kind = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
            torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
            x, y = (torch.randn(GPU_MATRIX, GPU_MATRIX, device="cuda", dtype=kind) for _ in range(2))

            def torch_product() -> None:
                torch.matmul(x, y)
                torch.cuda.synchronize()

            return torch_product
    wide = DTYPES["float16" if dtype == "bfloat16" else dtype]  # the same rate on tensor cores
    a, b = (cupy.random.standard_normal((GPU_MATRIX, GPU_MATRIX), cupy.float32).astype(wide) for _ in range(2))

    def product() -> None:
        cupy.matmul(a, b)
        cupy.cuda.Stream.null.synchronize()

    return product
