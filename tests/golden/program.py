"""A program of one instruction, and what its outputs must be."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

LANES = 32
FLOAT32 = np.dtype(np.float32)


def digest(words: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(words).tobytes()).hexdigest()


@dataclass(frozen=True)
class Expected:
    """What outputs must be: exact words, or numbers of `dtype` within `error` (absolute, by element) of `value`."""

    words: np.ndarray | None = None  # uint32 (threads, outputs)
    value: np.ndarray | None = None  # float64 (threads, outputs, or half as many where dtype has two words)
    error: np.ndarray | None = None
    dtype: np.dtype = FLOAT32

    def numbers(self, out: np.ndarray) -> np.ndarray:
        """float64 values of outputs, uint32 (threads, outputs)."""
        return np.ascontiguousarray(out).view(self.dtype).astype(np.float64)

    def check(self, out: np.ndarray, slack: float = 1.0) -> None:
        """Raises AssertionError where `out`, uint32 (threads, outputs), is not as expected."""
        if self.words is not None:
            np.testing.assert_array_equal(out, self.words)
            return
        got = self.numbers(out)
        special = ~np.isfinite(self.value)
        np.testing.assert_array_equal(got[special], self.value[special])
        got, value, allowed = got[~special], self.value[~special], slack * self.error[~special]
        error = np.abs(got - value)
        worst = int(np.argmax(error - allowed))
        assert np.all(error <= allowed), f"{got[worst]} against {value[worst]}"


@dataclass(frozen=True)
class Program:
    """A unit for `cuflash.jit`: body of one instruction, its inputs (seeded), its model.

    capability : compute capability, times ten, of the first architecture that has the instruction
    same_bits : the emulator computes the bits of a GPU although the model has only bounds
    """

    name: str
    header: str
    body: str
    outputs: int
    make_inputs: Callable[[np.random.Generator], np.ndarray]  # uint32 (threads, inputs), whole warps
    model: Callable[[np.ndarray], Expected]
    capability: int = 80
    same_bits: bool = False

    @property
    def arch(self) -> str:
        return f"sm_{self.capability}"

    @property
    def entry(self) -> str:
        return f"golden_{self.name}"

    def inputs(self) -> np.ndarray:
        words = self.make_inputs(np.random.default_rng(7))
        return np.ascontiguousarray(words[: len(words) // LANES * LANES], np.uint32)

    def unit(self) -> str:
        count = self.inputs().shape[1]
        return (
            f'#include "ptx/{self.header}.cuh"\n'
            "using namespace cuflash;\n"
            f'extern "C" __global__ void __launch_bounds__({LANES}) {self.entry}(const u32* in, u32* out) {{\n'
            f"    const int thread = {LANES} * blockIdx.x + threadIdx.x, lane = threadIdx.x;\n"
            f"    u32 a[{count}], d[{self.outputs}];\n"
            f"    for (int i = 0; i < {count}; ++i) a[i] = in[{count} * thread + i];\n"
            f"    {self.body}\n"
            f"    for (int i = 0; i < {self.outputs}; ++i) out[{self.outputs} * thread + i] = d[i];\n"
            "}\n"
        )
