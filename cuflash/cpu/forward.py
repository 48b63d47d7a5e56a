"""Attention on NumPy arrays: FlashAttention-2's loop over BLAS (Dao 2023), in memory linear in the sequence length.

A work item is a tile of queries of one head. For each tile of keys that it sees:

    S = Q Kᵀ           (BLAS)
    P = exp(S - m)     (NumPy)
    l += P 1, O += P V (BLAS)

and O / l is written once. Each product is a stack of products small enough that OpenBLAS runs it on the calling
thread; the items run on several threads, and what an item computes does not depend on their number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np

from cuflash.cpu.keys import Keys, KeyTile
from cuflash.cpu.threads import num_threads, run_all
from cuflash.cpu.tiles import MAX_ROWS, add_bias, keys_of_a_tile, sum_dtype
from cuflash.cpu.visibility import Part, Sight, hide, sight_of
from cuflash.masks.steps import Place
from cuflash.problem import Problem

MIN_ITEM_ROWS, MAX_ITEM_ROWS = 240, 528  # queries of an item: its scores stay in L2
MIN_ITEMS = 32  # items are made small to have that many
SMALL = 2**16  # scores below which threads cost more than they save

# If every |score| <= SAFE_SCORE and the largest |v| is in SAFE_VALUES, exp(S) V does not overflow in float32 and loses
# less than 1e-31 to underflow, so m = 0 serves as well as the running maximum.
SAFE_SCORE = 32.0
SAFE_VALUES = 2.0**-40, 2.0**40


@cache
def exp2_is_fast() -> bool:
    """Whether NumPy's exp2 is vectorised on this machine; then it is faster than exp where no result is subnormal."""
    targets = np.lib.introspect.opt_func_info("^exp2$", "float32")["exp2"].values()
    return not any(target["current"].startswith("baseline") for target in targets)


@dataclass(frozen=True, slots=True)
class _Sequence:
    """Views of one batch entry or one packed sequence."""

    place: Place
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


def _sequences(
    problem: Problem,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    bias: np.ndarray | None,
    cu_seqlens_q: np.ndarray | None,
    cu_seqlens_k: np.ndarray | None,
    out: np.ndarray,
    lse: np.ndarray | None,
) -> Iterator[_Sequence]:
    """One per batch entry, or per sequence; what belongs to none is written here."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        for b in range(problem.batch):
            own = None if bias is None else bias[b]
            place = Place(problem.seqlen_q, problem.seqlen_k, b)
            yield _Sequence(place, q[b], k[b], v[b], own, out[b], None if lse is None else lse[b])
        return
    for tail in (slice(0, cu_seqlens_q[0]), slice(cu_seqlens_q[-1], None)):
        out[tail] = 0
        if lse is not None:
            lse[:, tail] = -np.inf
    for b in range(problem.batch):
        rows, keys = slice(*cu_seqlens_q[b : b + 2].tolist()), slice(*cu_seqlens_k[b : b + 2].tolist())
        own = None if bias is None else bias[b]
        place = Place(rows.stop - rows.start, keys.stop - keys.start, b, q_start=rows.start, k_start=keys.start)
        yield _Sequence(place, q[rows], k[keys], v[keys], own, out[rows], None if lse is None else lse[:, rows])


def _items(problem: Problem, sequences: list[_Sequence]) -> Iterator[Callable[[], None]]:
    """One item per tile of queries and head; those that share keys follow each other, the longest causal ones first."""
    wanted_rows = problem.num_heads * sum(s.q.shape[0] for s in sequences) // MIN_ITEMS
    for sequence in sequences:
        len_q = sequence.place.len_q
        if len_q == 0:
            continue
        rows, items = groups_of_items(len_q, wanted_rows)
        tile = keys_of_a_tile(rows, max(problem.head_dim, problem.head_dim_v))
        for kv_head in range(problem.num_kv_heads):
            sight = sight_of(problem, sequence.place, kv_head, rows, tile)
            keys = Keys(sequence.k[:, kv_head], sequence.v[:, kv_head], sight, sum_dtype(problem))
            for head in range(kv_head * problem.group, (kv_head + 1) * problem.group):
                for groups in reversed(items):
                    yield _Item(problem, sequence, keys, sight, head, groups).run


def groups_of_items(len_q: int, wanted_rows: int) -> tuple[int, list[range]]:
    """Rows of a group of queries, and the groups of each item, of about `wanted_rows`."""
    groups = -(-len_q // MAX_ROWS)
    items = -(-len_q // min(MAX_ITEM_ROWS, max(MIN_ITEM_ROWS, wanted_rows)))
    item_groups = -(-groups // items)
    ranges = [range(groups)[first : first + item_groups] for first in range(0, groups, item_groups)]
    return -(-len_q // groups), ranges


class _Item:
    """Some groups of queries of one head against all their keys.

    The last group is padded with zeros: Q (groups, rows, head_dim), unnormalised output
    O (groups, rows, head_dim_v), row sums l and maxima m (groups, rows).
    """

    def __init__(
        self, problem: Problem, sequence: _Sequence, keys: Keys, sight: Sight, head: int, groups: range
    ) -> None:
        self.problem, self.sequence, self.keys, self.sight, self.head = problem, sequence, keys, sight, head
        self.first, self.last, self.rows = groups.start, groups.stop, sight.rows
        self.begin, self.end = self.first * self.rows, min(self.last * self.rows, sequence.place.len_q)

    def run(self) -> None:
        problem, sequence = self.problem, self.sequence
        self.keys.pack()
        self._begin_state()
        for part in self.sight.parts(self.head, self.first, self.last):
            self._add(self.keys.of(part), part)
        count = self.end - self.begin
        if sequence.lse is not None:
            sequence.lse[self.head, self.begin : self.end] = (self.m + np.log(self.l)).reshape(-1)[:count]
        self.o /= np.where(self.l == 0, 1, self.l)[:, :, None]  # a row that sees nothing: O = 0, lse = -inf
        sequence.out[self.begin : self.end, self.head] = self.o.reshape(self.l.size, problem.head_dim_v)[:count]

    def _begin_state(self) -> None:
        problem, dtype = self.problem, sum_dtype(self.problem)
        groups = self.last - self.first
        q: np.ndarray = np.zeros((groups * self.rows, problem.head_dim), dtype)
        q[: self.end - self.begin] = self.sequence.q[self.begin : self.end, self.head]
        q *= problem.scale / (problem.softcap or 1)
        bound = problem.softcap or float(np.sqrt(np.einsum("nd,nd->n", q, q).max())) * self.keys.norm
        safe = bound <= SAFE_SCORE and SAFE_VALUES[0] <= self.keys.v_max <= SAFE_VALUES[1]
        self.online = self.sequence.bias is not None or not safe
        in_base_2 = not self.online and exp2_is_fast()
        self.exp: np.ufunc = np.exp2 if in_base_2 else np.exp
        unit = math.log2(math.e) if in_base_2 else 1.0
        self.softcap = problem.softcap * unit
        if not self.softcap:
            q *= unit
        self.q = q.reshape(groups, self.rows, -1)
        self.o: np.ndarray = np.zeros((*self.q.shape[:2], problem.head_dim_v), dtype)
        self.l: np.ndarray = np.zeros(self.q.shape[:2], dtype)
        self.m: np.ndarray = np.full(self.q.shape[:2], -np.inf if self.online else 0, dtype)
        self.scores: np.ndarray = np.empty(groups * self.rows * self.sight.tile, dtype)
        self.pv, self.row_sums = np.empty_like(self.o), np.empty_like(self.l)
        self.ones: np.ndarray = np.ones(self.sight.tile, dtype)

    def _add(self, tile: KeyTile, part: Part) -> None:
        """One tile of keys against the groups that see some of them; only where something is hidden is it masked."""
        n, rows, hidden = len(tile.v), self.rows, self.sight.hidden(self.head, part)
        q, o, l_i, m_i, pv, row_sums = self.q, self.o, self.l, self.m, self.pv, self.row_sums
        if part.last - part.first < len(q):
            own = slice(part.first - self.first, part.last - self.first)
            q, o, l_i, m_i, pv, row_sums = (x[own] for x in (q, o, l_i, m_i, pv, row_sums))
        s = self.scores[: len(q) * rows * n].reshape(len(q), rows, n)
        np.matmul(q, tile.k_t, out=s)  # S = scale Q Kᵀ
        if self.softcap:
            np.tanh(s, out=s)
            s *= self.softcap
        if self.sequence.bias is not None:
            queries = slice(part.first * rows, min(part.last * rows, self.end))
            add_bias(s, self.sequence.bias[self.head, queries, part.keys])
        if self.online:
            hide(s, hidden, -np.inf)
            _subtract_maxima(s, m_i, l_i, o)
        self.exp(s, out=s)
        if not self.online:
            hide(s, hidden, 0)
        l_i += np.matmul(s, self.ones[:n], out=row_sums)  # l_i += P 1
        o += np.matmul(s, tile.v, out=pv)  # O += P V
        for j, value in tile.odd_rows:  # 0 * NaN is NaN: only rows that see the key take part
            weight = s[:, :, j]
            o[weight > 0] += weight[weight > 0, None] * value


def _subtract_maxima(s: np.ndarray, m_i: np.ndarray, l_i: np.ndarray, o: np.ndarray) -> None:
    """Update the running row maxima m_i, S -= m_i, and rescale l_i and O where m_i grew."""
    before = m_i.copy()
    np.maximum(m_i, s.max(axis=2), out=m_i)
    finite = np.where(np.isneginf(m_i), 0, m_i)
    s -= finite[:, :, None]
    factor = np.exp(before - finite)
    if (factor != 1).any():
        l_i *= factor
        o *= factor[:, :, None]
