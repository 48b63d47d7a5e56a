"""What the references share: checked arguments, chunks of them by head, and the scores of a chunk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

from cuflash import check
from cuflash.layout import Layout
from cuflash.problem import Problem
from cuflash.reference.arrays import Array, cast, namespace, positions

EVERYTHING = slice(None)


@dataclass(frozen=True)
class Inputs:
    """Arrays of rank 4 as given, and the problem they pose.

    Inside of the references arrays are of the sums' dtype with the axes (batch, kv_head, group, query, key or dim):
    query head h is member h % group of key/value head h // group.
    """

    xp: ModuleType
    problem: Problem
    q: Array  # (batch, seqlen_q, num_heads, head_dim)
    k: Array  # (batch, seqlen_k, num_kv_heads, head_dim)
    v: Array  # (batch, seqlen_k, num_kv_heads, head_dim_v)
    bias: Array | None  # rank 4, each axis full or 1
    rank: int
    dtype: Any  # of the sums

    @property
    def heads(self) -> tuple[int, int, int]:
        """(batch, num_kv_heads, group)."""
        kv_heads = self.problem.num_kv_heads
        return self.problem.batch, kv_heads, self.problem.group if kv_heads else 1

    def by_head(self, x: Array, chunk: slice) -> Array:
        """(batch, seqlen, num_heads, dim)[:, chunk] as (batch, kv_head, group, chunk, dim)."""
        x = cast(x[:, chunk], self.dtype).swapaxes(1, 2)
        return x.reshape(*self.heads, *x.shape[2:])

    def keys(self, x: Array, chunk: slice) -> Array:
        """k or v [:, chunk] as (batch, kv_head, 1, chunk, dim)."""
        return cast(x[:, chunk], self.dtype).swapaxes(1, 2)[:, :, None]

    def by_token(self, x: Array) -> Array:
        """(batch, kv_head, group, chunk, dim) as (batch, chunk, num_heads, dim)."""
        return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:]).swapaxes(1, 2)

    def scores(self, q: Array, k: Array, rows: slice, columns: slice) -> tuple[Array, Array | float]:
        """softcap(scale q kᵀ) + bias of a chunk, -inf where hidden, and the slope of softcap there."""
        xp, problem = self.xp, self.problem
        s = problem.scale * xp.matmul(q, k.swapaxes(-1, -2))
        slope: Array | float = 1.0
        if problem.softcap:
            t = xp.tanh(s / problem.softcap)
            s, slope = problem.softcap * t, 1 - t * t
        if self.bias is not None:
            b = cast(self.bias[self.bias_index(rows, columns)], self.dtype)
            if b.shape[1] > 1:
                b = b.reshape(b.shape[0], *self.heads[1:], *b.shape[2:])
            else:
                b = b[:, :, None]
            s = s + b
        if problem.windowed:
            # Which diagonal a pair lies on: 0 ends at the last query and the last key.
            diagonal = positions(xp, columns, s) - positions(xp, rows, s)[:, None] + problem.seqlen_q - problem.seqlen_k
            if problem.left is not None:
                s = xp.where(diagonal >= -problem.left, s, -xp.inf)
            if problem.right is not None:
                s = xp.where(diagonal <= problem.right, s, -xp.inf)
        return s, slope

    def bias_index(self, rows: slice, columns: slice) -> tuple[slice, ...]:
        """Where the bias of a chunk is; an axis of length 1 serves every chunk."""
        _, _, along_q, along_k = self.bias.shape  # type: ignore[union-attr]
        return EVERYTHING, EVERYTHING, EVERYTHING if along_q == 1 else rows, EVERYTHING if along_k == 1 else columns

    def give(self, out: Array, lse: Array, return_lse: bool) -> Any:
        """out (batch, seqlen_q, num_heads, head_dim_v), lse (batch, num_heads, seqlen_q) as the caller wants them."""
        out, lse = self.drop_axes(cast(out, self.q.dtype)), lse if self.rank == 4 else lse[0]
        if self.rank == 2:
            lse = lse[0]
        return (out, lse) if return_lse else out

    def take(self, cotangent: Any, return_lse: bool) -> tuple[Array, Array | None]:
        """A cotangent of what `give` gave, in rank 4."""
        dout, dlse = cotangent if return_lse else (cotangent, None)
        shape = (*self.q.shape[:3], self.problem.head_dim_v)
        if dlse is not None:
            dlse = cast(dlse, self.dtype).reshape(shape[0], shape[2], shape[1])
        return cast(dout, self.dtype).reshape(shape), dlse

    def drop_axes(self, x: Array) -> Array:
        """Rank 4 to the caller's rank."""
        if self.rank == 4:
            return x
        return x[0] if self.rank == 3 else x[0][:, 0]


def prepare(
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None,
    *,
    causal: bool = False,
    window: Any = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Inputs:
    """Check the arguments of a reference function."""
    asked = check.scores(causal, window, scale, softcap)
    xp = namespace(q=q, k=k, v=v) if bias is None else namespace(q=q, k=k, v=v, bias=bias)
    problem = check.problem(_layout(q), _layout(k), _layout(v), None if bias is None else _layout(bias), asked, None)
    rank = len(q.shape)
    if rank < 4:
        q, k, v = ((x[:, None] if rank == 2 else x)[None] for x in (q, k, v))
    if bias is not None:
        bias = bias[(None,) * (4 - len(bias.shape)) + (...,)]
    return Inputs(xp, problem, q, k, v, bias, rank, xp.float64 if problem.dtype == "float64" else xp.float32)


def _layout(array: Array) -> Layout:
    """What `check` looks at: shape and dtype, in NumPy's terms."""
    name = str(array.dtype).rpartition(".")[2]
    return Layout(tuple(array.shape), (), np.dtype(getattr(ml_dtypes, name, name)), 0)


def chunks(begin: int, end: int, size: int) -> Iterator[slice]:
    """[begin, end) in pieces of `size`; the last is what remains."""
    return (slice(i, min(i + size, end)) for i in range(begin, end, size))
