"""Small kernels for the tests of the compiler and its cache."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """A kernel that multiplies an array by a constant: what a configuration looks like to the JIT."""

    factor: int
    entry: str = "scale"
    text: str = "x[threadIdx.x] *= {factor};"
    threads: int = 32

    def unit(self) -> str:
        body = self.text.format(factor=self.factor)
        head = f'extern "C" __global__ void __launch_bounds__({self.threads}) {self.entry}(float *x)'
        return f"{head} {{\n    {body}\n}}\n"
