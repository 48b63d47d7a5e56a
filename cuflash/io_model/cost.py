"""What an algorithm moves and computes, the least time that this takes, and the sizes that costs are made of."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from cuflash.masks.program import Program
from cuflash.plan.config import ELEMENT_BYTES
from cuflash.plan.gpus import Gpu
from cuflash.plan.masked_tiles import Group, groups, seen
from cuflash.plan.tile_lists import TileListPlan
from cuflash.plan.traffic import INDEX, sequence_lengths, sum_bytes
from cuflash.problem import Problem


@dataclass(frozen=True)
class Roofline:
    """Least seconds that each part of a GPU needs for a cost; the slowest part bounds the whole."""

    memory: float
    matmul: float
    special: float

    @property
    def seconds(self) -> float:
        return max(self.memory, self.matmul, self.special)

    @property
    def bound(self) -> str:
        """What the time is bound by: "memory", "matmul" or "special" (exponentials)."""
        return max(("memory", "matmul", "special"), key=lambda part: getattr(self, part))


@dataclass(frozen=True)
class Cost:
    """What an algorithm moves and computes for one problem.

    Parameters
    ----------
    dtype : str
        Of the operands of the matrix products, which decides the rate of a GPU: that of the arrays, or "tf32". A
        product of float32 is computed as three of TF32.
    read, written : mapping of str to int
        Bytes that the kernels ask of global memory, by array.
    dram_bytes : int
        Bytes that must cross the memory bus where the L2 cache serves every repeated access; intermediate arrays of
        Θ(N²) are taken to exceed it.
    matmul_flops : int
        Operations of the matrix products as computed, hidden and padded elements of visited tiles included.
    exponentials : int
        Special-function operations: exponentials, with a softcap also those of its tanh. None in float64, where they
        are made of multiply-adds.
    workspace_bytes : int
        Memory that is live beyond inputs and outputs.
    useful_flops : int
        Operations of the products on the visible (query, key) pairs alone, each product once: the count that published
        rates divide by their time.
    """

    dtype: str
    read: Mapping[str, int]
    written: Mapping[str, int]
    dram_bytes: int
    matmul_flops: int
    exponentials: int
    workspace_bytes: int
    useful_flops: int

    @property
    def bytes_read(self) -> int:
        return sum(self.read.values())

    @property
    def bytes_written(self) -> int:
        return sum(self.written.values())

    @property
    def bytes(self) -> int:
        return self.bytes_read + self.bytes_written

    @property
    def intensity(self) -> float:
        """Useful operations per byte asked of global memory."""
        return self.useful_flops / self.bytes if self.bytes else 0.0

    def roofline(self, gpu: Gpu) -> Roofline:
        """The least time on `gpu`; no kernel of this algorithm can be faster."""
        return Roofline(
            memory=self.dram_bytes / gpu.bandwidth,
            matmul=self.matmul_flops / gpu.product_rate(self.dtype),
            special=self.exponentials / gpu.special_rate,
        )


class Sizes:
    """Bytes of a problem's arrays and counts of its scores, over all sequences and heads."""

    def __init__(
        self, problem: Problem, cu_seqlens_q: Sequence[int] | None, cu_seqlens_k: Sequence[int] | None
    ) -> None:
        self.problem, self.packing = problem, (cu_seqlens_q, cu_seqlens_k)
        self.seqlens = sequence_lengths(problem, cu_seqlens_q, cu_seqlens_k)
        self.element, self.wide = ELEMENT_BYTES[problem.dtype], sum_bytes(problem.dtype)
        tokens_q = sum(n for n, _ in self.seqlens)
        tokens_k = sum(m for _, m in self.seqlens)
        self.rows = tokens_q * problem.num_heads
        self.q = self.rows * problem.head_dim * self.element
        self.o = self.rows * problem.head_dim_v * self.element
        self.k = tokens_k * problem.num_kv_heads * problem.head_dim * self.element
        self.v = tokens_k * problem.num_kv_heads * problem.head_dim_v * self.element
        self.lse = self.rows * self.wide
        self.scores = problem.num_heads * sum(n * m for n, m in self.seqlens)
        self.bias_element = 0 if problem.bias_dtype is None else ELEMENT_BYTES[problem.bias_dtype]

    def area(self) -> int:
        """Visible (query, key) pairs."""
        mask = self.problem.mask
        if mask is not None:
            return sum(
                group.times * group.heads * mask.visible_pairs(place)
                for group in self._groups()
                for place in group.places
            )
        counts = Counter(self.seqlens)
        return self.problem.num_heads * sum(c * self.problem.visible_pairs(*pair) for pair, c in counts.items())

    def visible_keys_and_values(self) -> int:
        """Bytes of the keys, with their values, that at least one query sees."""
        mask = self.problem.mask
        if mask is not None:
            keys = sum(
                group.times * np.logical_or.reduce([seen(mask, place)[1] for place in group.places]).sum()
                for group in self._groups()
            )
        else:
            ranges = (self.problem.key_range(0, n, n, m) for n, m in self.seqlens if n)
            keys = self.problem.num_kv_heads * sum(max(0, end - begin) for begin, end in ranges)
        return int(keys) * (self.problem.head_dim + self.problem.head_dim_v) * self.element

    def _groups(self) -> Iterator[Group]:
        return groups(self.problem, cast(Program, self.problem.mask), *self.packing)

    def cost(
        self,
        read: dict[str, int],
        written: dict[str, int],
        *,
        columns: int,
        exponentials: int,
        workspace_bytes: int,
        useful_flops: int,
    ) -> Cost:
        """The cost of an algorithm that computes every score, hidden or not, and keeps them in memory.

        `columns` is how many columns, of head_dim and head_dim_v, its products have in all.
        """
        return Cost(
            dtype=self.problem.dtype,
            read=read,
            written=written,
            dram_bytes=sum(read.values()) + sum(written.values()),
            matmul_flops=2 * product_count(self.problem.dtype) * self.scores * columns,
            exponentials=0 if self.problem.dtype == "float64" else exponentials,
            workspace_bytes=workspace_bytes,
            useful_flops=useful_flops,
        )


def list_bytes(plan: TileListPlan | None) -> int:
    """Of the lists that a mask keeps."""
    return 0 if plan is None else INDEX * (math.prod(plan.list_shape) + math.prod(plan.count_shape))


def product_count(dtype: str) -> int:
    """Products of the tensor cores for one product of `dtype`: operands of float32 are split in two parts."""
    return 3 if dtype == "float32" else 1


def special_operations(softcap: float, dtype: str) -> int:
    """Of the kernels, for one score: tanh takes an exponential and a reciprocal."""
    return 0 if dtype == "float64" else 3 if softcap else 1
