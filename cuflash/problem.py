"""What is asked: one validated, immutable description of an attention problem. No arrays, no GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cuflash.masks.program import Program
from cuflash.masks.steps import Lengths


@dataclass(frozen=True, slots=True)
class Problem:
    """An attention problem, dense or packed (varlen).

    Shapes: q (batch, seqlen_q, num_heads, head_dim), k (batch, seqlen_k, num_kv_heads, head_dim),
    v (batch, seqlen_k, num_kv_heads, head_dim_v). In a packed problem the first two axes are one of
    total_q or total_k tokens, and seqlen_q, seqlen_k are upper bounds of the sequences' lengths.

    Key j is visible to query i iff i + d - left <= j <= i + d + right with d = seqlen_k - seqlen_q
    (of the sequence); None is unbounded. Causal is right = 0.
    """

    batch: int
    seqlen_q: int
    seqlen_k: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    dtype: str
    scale: float
    softcap: float = 0.0  # 0: none
    left: int | None = None
    right: int | None = None
    bias_dtype: str | None = None
    total_q: int | None = None  # packed problems only
    total_k: int | None = None
    block_size: int | None = None  # of the paged cache that holds keys and values
    mask: Program | None = None  # together with it no window: a mask says all

    @property
    def varlen(self) -> bool:
        return self.total_q is not None

    @property
    def lengths_are_data(self) -> bool:
        """Whether only the device knows how long sequences are."""
        return self.varlen or self.block_size is not None

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def lengths(self) -> Lengths:
        return Lengths(
            self.batch, self.num_heads, self.num_kv_heads, self.seqlen_q, self.seqlen_k, self.total_q, self.total_k
        )

    @property
    def mask_code(self) -> str:
        """C++ of the mask for kernels, "" without one."""
        return "" if self.mask is None else self.mask.code(self.mask.wide(self.lengths))

    @property
    def mask_grain(self) -> tuple[int, int]:
        """Queries and keys of the blocks that the mask is made of, powers of two; 0 without any."""
        return (0, 0) if self.mask is None else self.mask.grain

    @property
    def windowed(self) -> bool:
        return self.left is not None or self.right is not None

    def key_range(
        self, row_begin: int, row_end: int, seqlen_q: int | None = None, seqlen_k: int | None = None
    ) -> tuple[int, int]:
        """Keys [begin, end) visible to at least one of the queries [row_begin, row_end); begin >= end if none.

        The lengths are those of one sequence of a packed problem; by default the dense problem's.
        """
        len_q = self.seqlen_q if seqlen_q is None else seqlen_q
        len_k = self.seqlen_k if seqlen_k is None else seqlen_k
        shift = len_k - len_q
        begin = 0 if self.left is None else max(0, row_begin + shift - self.left)
        end = len_k if self.right is None else min(len_k, row_end + shift + self.right)
        return begin, end

    def visible_pairs(self, seqlen_q: int | None = None, seqlen_k: int | None = None) -> int:
        """Number of visible (query, key) pairs of one sequence and one head, the `area` of the FLOP count 4·area·D."""
        len_q = self.seqlen_q if seqlen_q is None else seqlen_q
        if not self.windowed:
            return len_q * (self.seqlen_k if seqlen_k is None else seqlen_k)
        return sum(max(0, e - b) for b, e in (self.key_range(i, i + 1, len_q, seqlen_k) for i in range(len_q)))


def default_scale(head_dim: int) -> float:
    """1/√head_dim, the scale of Vaswani et al. 2017; 1 for an empty head."""
    return 1.0 / math.sqrt(head_dim) if head_dim else 1.0
