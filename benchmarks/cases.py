"""What is benchmarked: a case, its inputs, and the float64 answer on a sample of its rows."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np

from cuflash.problem import Problem, default_scale

DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "tf32": np.dtype(np.float32),  # float32 arrays, TF32 products
    "float64": np.dtype(np.float64),
}

# Largest accepted error relative to the largest |o|: a few roundings of the weights and of the output (unit roundoff
# 2^-11, 2^-8, 2^-24, 2^-11, 2^-53), sums of thousands of terms included.
ERROR_LIMITS = {"float16": 4e-3, "bfloat16": 3e-2, "float32": 2e-5, "tf32": 4e-3, "float64": 1e-12}


@dataclass(frozen=True)
class Case:
    """Self-attention of q (batch, seqlen, num_heads, head_dim) with k, v (batch, seqlen, num_kv_heads, head_dim)."""

    batch: int
    seqlen: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    left: int | None = None
    right: int | None = None

    @property
    def mask(self) -> str:
        if self.left is None:
            return "full" if self.right is None else "causal"
        return f"window {self.left},{self.right}"

    @property
    def shape(self) -> str:
        heads = f"H{self.num_heads}" + (f"/{self.num_kv_heads}" if self.num_kv_heads != self.num_heads else "")
        return f"B{self.batch} S{self.seqlen} {heads} D{self.head_dim} {self.dtype}"

    @property
    def name(self) -> str:
        return f"{self.shape} {self.mask}"

    @property
    def function(self) -> Callable[..., Any]:
        """The function of cuflash that answers, given q, k, v, `marks` and `keywords`."""
        from cuflash import attention

        return attention

    @property
    def keywords(self) -> dict[str, Any]:
        from cuflash import Options

        keywords: dict[str, Any] = {"causal": self.left is None and self.right == 0}
        if self.left is not None:
            keywords["window"] = self.left, self.right
        if self.dtype == "tf32":
            keywords["options"] = Options(precision="tf32")
        return keywords

    def marks(self) -> tuple[np.ndarray, ...]:
        """Arrays that say who sees whom."""
        return ()

    @property
    def problem(self) -> Problem:
        return Problem(
            batch=self.batch,
            seqlen_q=self.seqlen,
            seqlen_k=self.seqlen,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            head_dim_v=self.head_dim,
            dtype="float32" if self.dtype == "tf32" else self.dtype,
            scale=default_scale(self.head_dim),
            left=self.left,
            right=self.right,
        )

    @property
    def density(self) -> float:
        """Share of the pairs that are visible."""
        return self.problem.visible_pairs(self.seqlen, self.seqlen) / self.seqlen**2

    def visible(self, rows: slice | np.ndarray = slice(None), head: int = 0) -> np.ndarray:
        """(queries, seqlen) boolean, True where key j is visible to query i of `rows` in the last batch entry."""
        offset = np.arange(self.seqlen)[None, :] - np.arange(self.seqlen)[rows, None]
        left = self.seqlen if self.left is None else self.left
        right = self.seqlen if self.right is None else self.right
        return (offset >= -left) & (offset <= right)

    def inputs(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Standard normal q, k, v: zeros would let a chip draw less power and run faster than on real data."""
        return _inputs(
            self.batch, self.seqlen, self.num_heads, self.num_kv_heads, self.head_dim, DTYPES[self.dtype], seed
        )


@lru_cache(maxsize=1)  # the same for every mask and contender
def _inputs(
    batch: int, seqlen: int, heads: int, kv_heads: int, head_dim: int, dtype: np.dtype, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = ((batch, seqlen, n, head_dim) for n in (heads, kv_heads, kv_heads))
    q, k, v = (rng.standard_normal(shape, np.float32).astype(dtype) for shape in shapes)
    return q, k, v


def sample_error(case: Case, inputs: tuple[np.ndarray, np.ndarray, np.ndarray], out: np.ndarray) -> float:
    """Largest |out - exact| over a sample of rows and heads, relative to the largest exact |o|."""
    rng = np.random.default_rng(1)
    rows = np.unique(np.concatenate([[0, case.seqlen - 1], rng.integers(0, case.seqlen, 30)]))
    worst, largest = 0.0, 0.0
    for head in {0, case.num_heads - 1}:
        kv_head = head // (case.num_heads // case.num_kv_heads)
        q, k, v = (
            a[case.batch - 1, :, h].astype(np.float64) for a, h in zip(inputs, (head, kv_head, kv_head), strict=True)
        )
        exact = softmax(case.problem.scale * (q[rows] @ k.T), case.visible(rows, head)) @ v
        worst = max(worst, float(np.abs(out[case.batch - 1, rows, head].astype(np.float64) - exact).max()))
        largest = max(largest, float(np.abs(exact).max()))
    return worst / largest


def softmax(scores: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Of the visible scores of each row; all 0 where there is none."""
    scores = np.where(visible, scores, -np.inf)
    weights = np.exp(scores - np.maximum(scores.max(axis=1, keepdims=True), np.finfo(scores.dtype).min))
    return weights / np.maximum(weights.sum(axis=1, keepdims=True), 1)


def parse_shape(text: str) -> tuple[int, int, int, int, int]:
    """batch,seqlen,heads,head_dim[,kv_heads] as (batch, seqlen, num_heads, num_kv_heads, head_dim)."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (4, 5) or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be batch,seqlen,heads,head_dim[,kv_heads], each >= 1")
    batch, seqlen, heads, head_dim, *rest = numbers
    kv_heads = rest[0] if rest else heads
    if heads % kv_heads:
        raise argparse.ArgumentTypeError(f"{text!r}: heads must be a multiple of kv_heads")
    return batch, seqlen, heads, kv_heads, head_dim


def parse_mask(text: str) -> tuple[int | None, int | None]:
    """full, causal or window=left,right as (left, right)."""
    if text in ("full", "causal"):
        return None, (None if text == "full" else 0)
    name, _, bounds = text.partition("=")
    try:
        left, right = (int(part) for part in bounds.split(","))
    except ValueError:
        left = right = -1
    if name != "window" or left < 0 or right < 0:
        raise argparse.ArgumentTypeError(f"{text!r}: must be full, causal or window=left,right")
    return left, right
