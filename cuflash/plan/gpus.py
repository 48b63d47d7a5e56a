"""Datasheet facts of named GPUs, for rooflines.

Bandwidth and rates are those that the vendor states, without structured sparsity. A test recomputes each rate from
multiprocessors, clock and the matrix operations per clock of the architecture.
"""

from __future__ import annotations

from dataclasses import dataclass

from cuflash.errors import InvalidValueError
from cuflash.plan.arch import Arch, arch_named

# Base-2 exponentials, logarithms, reciprocals and tanh per clock and multiprocessor: CUDA C++ Programming Guide, table
# "Throughput of Native Arithmetic Instructions"; 16 on every architecture of ARCHS.
SPECIAL_PER_CLOCK = 16


@dataclass(frozen=True)
class Gpu:
    """One product. Bandwidth in bytes/s, clock (the one of the stated rate) in Hz.

    matmul_rate is dense float16 or bfloat16 matrix products summed in float32, double_rate those of float64, in
    operations/s.
    """

    name: str
    arch_name: str
    sm_count: int
    bandwidth: float
    matmul_rate: float
    double_rate: float
    clock: float

    @property
    def arch(self) -> Arch:
        return arch_named(self.arch_name)

    def product_rate(self, dtype: str) -> float:
        """Of matrix products by the dtype of their operands; float32 is made of TF32, at half the rate of 16 bits."""
        if dtype == "float64":
            return self.double_rate
        return self.matmul_rate / 2 if dtype in ("float32", "tf32") else self.matmul_rate

    @property
    def special_rate(self) -> float:
        """Exponentials (or other special functions) per second."""
        return SPECIAL_PER_CLOCK * self.sm_count * self.clock


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        # NVIDIA A100 Tensor Core GPU datasheet, 80 GB SXM; clock and multiprocessors: A100 architecture whitepaper.
        Gpu("A100", "sm_80", 108, 2.039e12, 312e12, 19.5e12, 1.410e9),
        # NVIDIA H100 Tensor Core GPU datasheet, SXM (1,979 with sparsity); H100 architecture whitepaper.
        Gpu("H100", "sm_90", 132, 3.35e12, 989.4e12, 66.9e12, 1.830e9),
        # NVIDIA H200 Tensor Core GPU datasheet, SXM: the processor of the H100.
        Gpu("H200", "sm_90", 132, 4.8e12, 989.4e12, 66.9e12, 1.830e9),
        # NVIDIA HGX B200 datasheet (per GPU, 4,500 with sparsity, up to 8 TB/s); clock: that of the stated rate.
        Gpu("B200", "sm_100", 148, 8.0e12, 2250e12, 37e12, 1.856e9),
        # NVIDIA Ampere GA102 GPU architecture whitepaper, appendix GeForce RTX 3090 (float32 accumulation).
        Gpu("RTX3090", "sm_86", 82, 0.936e12, 71e12, 0.556e12, 1.695e9),
        # NVIDIA Ada GPU architecture whitepaper, appendix GeForce RTX 4090 (float32 accumulation).
        Gpu("RTX4090", "sm_89", 128, 1.008e12, 165.2e12, 1.29e12, 2.520e9),
        # NVIDIA RTX Blackwell GPU architecture whitepaper, appendix GeForce RTX 5090 (float32 accumulation).
        Gpu("RTX5090", "sm_120", 170, 1.792e12, 209.5e12, 1.637e12, 2.407e9),
    )
}


def gpu_named(name: str) -> Gpu:
    """The GPU called `name`, whatever its case, spaces or hyphens; raises InvalidValueError for an unknown one."""
    key = name.upper().replace(" ", "").replace("-", "")
    try:
        return GPUS[key]
    except KeyError:
        raise InvalidValueError(f"gpu = {name!r}: must be one of {', '.join(GPUS)}") from None
