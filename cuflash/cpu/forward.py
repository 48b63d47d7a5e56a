"""Attention on NumPy arrays: FlashAttention-2's loop over BLAS (Dao 2023), in memory linear in the sequence length.

A work item is a tile of queries of one head. For each tile of keys that it sees:

    S = Q Kᵀ           (BLAS)
    P = exp(S - m)     (NumPy)
    l += P 1, O += P V (BLAS)

and O / l is written once. Each product is a stack of products small enough that OpenBLAS runs it on the calling
thread; the items run on several threads, and what an item computes does not depend on their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from cuflash.cpu.keys import Keys, KeyTile
from cuflash.cpu.threads import num_threads, run_all
from cuflash.problem import Problem

# OpenBLAS keeps a matrix product of up to 2 * 4 * 65536 multiply-adds and a matrix-vector product of fewer than
# 4 * 2304 on the calling thread.
MAX_PRODUCT = 2 * 4 * 65536 - 1
MAX_MATVEC = 4 * 2304 - 1

MAX_ROWS = 48  # queries of one product
MAX_TILE_ROWS = 528  # queries of an item: its scores stay in a core's L2 cache
MAX_KEYS = 512
SMALL = 2**16  # scores below which threads cost more than they save

# If |score| <= SAFE_SCORE for every score and |v| <= SAFE_VALUE, exp(S) V neither overflows nor vanishes in float32
# and m = 0 is as exact as the running maximum.
SAFE_SCORE = 32.0
SAFE_VALUE = 2.0**40


@dataclass(frozen=True, slots=True)
class _Sequence:
    """Views of one batch entry or one packed sequence."""

    q: np.ndarray  # (len_q, num_heads, head_dim)
    k: np.ndarray  # (len_k, num_kv_heads, head_dim)
    v: np.ndarray  # (len_k, num_kv_heads, head_dim_v)
    bias: np.ndarray | None  # (num_heads, >= len_q, >= len_k)
    out: np.ndarray  # (len_q, num_heads, head_dim_v)
    lse: np.ndarray | None  # (num_heads, len_q)


def forward(
    problem: Problem,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    bias: np.ndarray | None,
    cu_seqlens_q: np.ndarray | None,
    cu_seqlens_k: np.ndarray | None,
    out: np.ndarray,
    lse: np.ndarray | None,
) -> None:
    """Compute `problem` into out and lse.

    Parameters
    ----------
    q, k, v, out : array (batch, seqlen, heads, dim); packed (tokens, heads, dim)
        Any strides; float16, bfloat16, float32 or float64, all alike. The sums are in float32, in float64 for float64.
    bias : array (batch, num_heads, seqlen_q, seqlen_k), optional
        Any strides (0 where broadcast), any float dtype.
    cu_seqlens_q, cu_seqlens_k : int64 array (batch + 1,)
        Of a packed problem. Query tokens outside of every sequence give 0 and -inf.
    lse : array (batch, num_heads, seqlen_q), packed (num_heads, tokens), optional
        float32, float64 for float64.
    """
    sequences = list(_sequences(problem, q, k, v, bias, cu_seqlens_q, cu_seqlens_k, out, lse))
    scores = problem.num_heads * sum(s.q.shape[0] * s.k.shape[0] for s in sequences)
    run_all(_items(problem, sequences), 1 if scores < SMALL else num_threads())


def _sequences(problem, q, k, v, bias, cu_seqlens_q, cu_seqlens_k, out, lse) -> Iterator[_Sequence]:
    if not problem.varlen:
        for b in range(problem.batch):
            own = None if bias is None else bias[b]
            yield _Sequence(q[b], k[b], v[b], own, out[b], None if lse is None else lse[b])
        return
    for tail in (slice(0, cu_seqlens_q[0]), slice(cu_seqlens_q[-1], None)):
        out[tail] = 0
        if lse is not None:
            lse[:, tail] = -np.inf
    for b in range(problem.batch):
        rows, keys = slice(*cu_seqlens_q[b : b + 2]), slice(*cu_seqlens_k[b : b + 2])
        own = None if bias is None else bias[b]
        yield _Sequence(q[rows], k[keys], v[keys], own, out[rows], None if lse is None else lse[:, rows])


def _items(problem: Problem, sequences: list[_Sequence]) -> Iterator[Callable[[], None]]:
    """One item per tile of queries and head; those that share keys follow each other, the longest causal ones first."""
    dtype = np.float64 if problem.dtype == "float64" else np.float32
    for sequence in sequences:
        len_q, len_k = sequence.q.shape[0], sequence.k.shape[0]
        if len_q == 0:
            continue
        rows = -(-len_q // -(-len_q // MAX_ROWS))
        most = min(MAX_MATVEC, MAX_PRODUCT // max(1, problem.head_dim, problem.head_dim_v)) // rows
        tile = max(8, min(MAX_KEYS, most) // 8 * 8)
        tile_rows = MAX_TILE_ROWS // rows * rows
        begin, end = problem.key_range(0, len_q, len_q, len_k)
        for kv_head in range(problem.num_kv_heads):
            keys = Keys(sequence.k[:, kv_head], sequence.v[:, kv_head], begin, end, tile, dtype)
            for head in range(kv_head * problem.group, (kv_head + 1) * problem.group):
                for first in reversed(range(0, len_q, tile_rows)):
                    yield partial(_attend, problem, sequence, keys, head, first, min(first + tile_rows, len_q), rows, tile)


def _attend(
    problem: Problem, sequence: _Sequence, keys: Keys, head: int, begin: int, end: int, rows: int, tile: int
) -> None:
    """Queries [begin, end) of one head, as groups of `rows`; the last group is padded with zeros."""
    keys.pack()
    dtype = np.float64 if problem.dtype == "float64" else np.float32
    groups = -(-(end - begin) // rows)
    q = np.zeros((groups * rows, problem.head_dim), dtype)
    q[: end - begin] = sequence.q[begin:end, head]
    q *= problem.scale / problem.softcap if problem.softcap else problem.scale
    bound = float(np.sqrt(np.einsum("nd,nd->n", q, q).max())) * keys.norm
    if problem.softcap:
        bound = problem.softcap
    state = _State(
        q.reshape(groups, rows, -1),
        problem.head_dim_v,
        tile,
        online=not (sequence.bias is None and bound <= SAFE_SCORE and keys.v_max <= SAFE_VALUE),
    )
    len_q, len_k = sequence.q.shape[0], sequence.k.shape[0]
    for key_tile in keys.tiles(*problem.key_range(begin, end, len_q, len_k)):
        state.add(problem, sequence, head, begin, key_tile)
    out, lse = state.finish()
    sequence.out[begin:end, head] = out[: end - begin]
    if sequence.lse is not None:
        sequence.lse[head, begin:end] = lse[: end - begin]


class _State:
    """Unnormalised output O, row sums l and, if online, row maxima m of a tile of queries (groups, rows, head_dim)."""

    def __init__(self, q: np.ndarray, head_dim_v: int, tile: int, online: bool) -> None:
        groups, rows, _ = q.shape
        self.q, self.online = q, online
        self.o = np.zeros((groups, rows, head_dim_v), q.dtype)
        self.l = np.zeros((groups, rows), q.dtype)
        self.m = np.full((groups, rows), -np.inf if online else 0, q.dtype)
        self._s = np.empty(groups * rows * tile, q.dtype)
        self._pv = np.empty_like(self.o)
        self._ones = np.ones(tile, q.dtype)

    def add(self, problem: Problem, sequence: _Sequence, head: int, begin: int, tile: KeyTile) -> None:
        """One tile of keys. Groups that see none of them are left out; only those on an edge are masked."""
        groups, rows, _ = self.q.shape
        n = tile.end - tile.begin
        # Row i of group 0 sees keys of this tile from column i + low to i + high.
        diagonal = begin + sequence.k.shape[0] - sequence.q.shape[0] - tile.begin
        low = None if problem.left is None else diagonal - problem.left
        high = None if problem.right is None else diagonal + problem.right
        first = 0 if high is None else max(0, -high // rows)
        last = groups if low is None else min(groups, (n - 1 - low) // rows + 1)
        if first >= last:
            return
        s = self._s[: (last - first) * rows * n].reshape(last - first, rows, n)
        np.matmul(self.q[first:last], tile.k_t, out=s)  # S = scale Q Kᵀ
        if problem.softcap:
            np.tanh(s, out=s)
            s *= problem.softcap
        if sequence.bias is not None:
            _add_bias(s, sequence.bias[head, begin + first * rows : sequence.q.shape[0], tile.begin : tile.end])
        if self.online:
            _hide(s, low, high, first, -np.inf)
            self._shift(s, slice(first, last))
        np.exp(s, out=s)
        if not self.online:
            _hide(s, low, high, first, 0)
        o, pv = self.o[first:last], self._pv[first:last]
        self.l[first:last] += np.matmul(s, self._ones[:n])  # l += P 1
        o += np.matmul(s, tile.v, out=pv)  # O += P V
        for j, value in tile.odd_rows:  # 0 * NaN is NaN: only rows that see the key take part
            weight = s[:, :, j]
            o[weight > 0] += weight[weight > 0, None] * value

    def _shift(self, s: np.ndarray, part: slice) -> None:
        """S -= m for the running row maxima m, which rescales l and O where they grow."""
        m = np.maximum(self.m[part], s.max(axis=2))
        finite = np.where(np.isneginf(m), 0, m)
        factor = np.exp(self.m[part] - finite)
        self.m[part] = m
        s -= finite[:, :, None]
        if (factor != 1).any():
            self.l[part] *= factor
            self.o[part] *= factor[:, :, None]

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """O / l (rows, head_dim_v) and lse = m + log l (rows,); 0 and -inf for rows that see nothing."""
        lse = self.m + np.log(self.l)
        self.o /= np.where(self.l == 0, 1, self.l)[:, :, None]
        return self.o.reshape(self.l.size, -1), lse.reshape(-1)


def _add_bias(s: np.ndarray, bias: np.ndarray) -> None:
    """S += bias (queries from the first row of s on, keys); broadcast axes are read once."""
    flat = s.reshape(-1, s.shape[2])
    bias = bias[: flat.shape[0]]
    count = bias.shape[0]
    bias = bias[tuple(slice(1) if stride == 0 else slice(None) for stride in bias.strides)]
    flat[:count] += bias.astype(s.dtype, copy=False)


def _hide(s: np.ndarray, low: int | None, high: int | None, first: int, value: float) -> None:
    """Set what lies outside of the window in s (groups, rows, n), whose first group is the tile's group `first`."""
    groups, rows, n = s.shape
    if high is not None:
        edge = high + first * rows  # row i sees columns j <= i + edge: rows from n - 1 - edge on see all
        partial_groups = min(groups, -(-(n - 1 - edge) // rows))
        if partial_groups > 0:
            part = s[:partial_groups]
            np.copyto(part, value, where=_by_diagonal(part.shape, np.arange(1 - partial_groups * rows, n) > edge))
    if low is not None:
        edge = low + first * rows  # row i sees columns j >= i + edge: rows up to -edge see all
        begin = max(0, (1 - edge) // rows)
        if begin < groups:
            part = s[begin:]
            edge += begin * rows
            np.copyto(part, value, where=_by_diagonal(part.shape, np.arange(1 - len(part) * rows, n) < edge))


def _by_diagonal(shape: tuple[int, ...], diagonals: np.ndarray) -> np.ndarray:
    """A Toeplitz view (groups, rows, n): element (i, j), i counted over all groups, is that of diagonal j - i."""
    groups, rows, _ = shape
    return np.ndarray(shape, bool, diagonals, groups * rows - 1, (-rows, -1, 1))
