"""Gradients of attention on NumPy arrays: FlashAttention-2's backward over BLAS, in memory linear in the lengths.

A work item is a range of queries of one head. For each tile of keys, and each block of queries that sees it:

    E  = exp(S - c), S = scale Q Kᵀ      P = w E, the probabilities once more: w = exp(c - lse)
    dV += Eᵀ (w dO)
    dS = E ∘ (w dO Vᵀ - w Δ)             Δ = rowsum(dO ∘ O) - dlse
    dQ += scale dS K, dK += scale dSᵀ Q, dbias += dS

-w Δ, and without bias and softcap -c, are one more column of dO and of Q against ones in V and K, so that no pass over
the scores subtracts them. c is 0 where the forward had no maximum either: E is then its own, to the bit, and what
is rounded in S cancels as in a softmax. Otherwise c lies below lse, so that S - c is small, and rounded finely, for
keys of any weight. As lse is rounded, a row of P sums up to not quite 1: dQ and dbias are divided by that sum.
dQ of an item is final. Its dK, dV and dbias are parts of sums (`cuflash.cpu.sums`): the result depends neither on the
number of threads nor on which of them is faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from threading import Lock
from typing import NamedTuple

import numpy as np

from cuflash.cpu.forward import MAX_ITEM_ROWS, MIN_ITEM_ROWS, MIN_ITEMS, SAFE_SCORE, SAFE_VALUES, exp2_is_fast
from cuflash.cpu.sums import BiasSum, KeySum
from cuflash.cpu.threads import num_threads, run_all
from cuflash.cpu.tiles import (
    MAX_ROWS,
    add_bias,
    groups_that_see,
    hide,
    keys_of_a_tile,
    sum_dtype,
)
from cuflash.problem import Problem

MAX_BLOCK_GROUPS = 4  # groups of rows whose scores are made together: P and dS of a block stay in L2
SMALL = 2**15  # scores below which threads cost more than they save


class Arrays(NamedTuple):
    """What a gradient is made of and where it goes, for a whole problem or, without the batch axis, one sequence."""

    q: np.ndarray  # (batch, seqlen_q, num_heads, head_dim), packed (tokens, num_heads, head_dim)
    k: np.ndarray
    v: np.ndarray
    bias: np.ndarray | None  # (batch, num_heads, seqlen_q, seqlen_k), strides 0 where broadcast
    out: np.ndarray
    lse: np.ndarray  # (batch, num_heads, seqlen_q), packed (num_heads, tokens)
    dout: np.ndarray
    dlse: np.ndarray | None
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray

    def sequence(self, i: int, cu_seqlens_q: np.ndarray | None, cu_seqlens_k: np.ndarray | None) -> Arrays:
        """Views of batch entry i, or of packed sequence i."""
        rows: int | slice = i
        keys: int | slice = i
        heads: int | tuple[slice, slice] = i
        if cu_seqlens_q is not None and cu_seqlens_k is not None:
            rows, keys = slice(*cu_seqlens_q[i : i + 2]), slice(*cu_seqlens_k[i : i + 2])
            heads = slice(None), rows
        return Arrays(
            self.q[rows],
            self.k[keys],
            self.v[keys],
            None if self.bias is None else self.bias[i],
            self.out[rows],
            self.lse[heads],
            self.dout[rows],
            None if self.dlse is None else self.dlse[heads],
            self.dq[rows],
            self.dk[keys],
            self.dv[keys],
        )


def backward(
    problem: Problem,
    arrays: Arrays,
    cu_seqlens_q: np.ndarray | None,
    cu_seqlens_k: np.ndarray | None,
    dbias: np.ndarray | None,
) -> None:
    """Compute the gradients of `problem` into dq, dk, dv and dbias.

    Parameters
    ----------
    arrays : Arrays
        out and lse as `cuflash.cpu.forward.forward` left them, their cotangents dout and dlse, any strides; and
        dq, dk, dv, all zeros, which are written where a query sees a key. Sums are in float32, in float64 for float64.
    cu_seqlens_q, cu_seqlens_k : int64 array (batch + 1,)
        Of a packed problem.
    dbias : array of rank 4, optional
        Zeros of the bias's own shape; along an axis of length 1 the gradients are added.
    """
    sequences = [arrays.sequence(i, cu_seqlens_q, cu_seqlens_k) for i in range(problem.batch)]
    scores = problem.num_heads * sum(s.q.shape[0] * s.k.shape[0] for s in sequences)
    bias_sum = None if dbias is None else BiasSum(problem, dbias)
    run_all(_items(problem, sequences, bias_sum), 1 if scores < SMALL else num_threads())
    if bias_sum is not None:
        bias_sum.write()


def _items(problem: Problem, sequences: list[Arrays], bias_sum: BiasSum | None) -> Iterator[Callable[[], None]]:
    """One item per head and range of queries; those that share keys follow each other, longest causal ones first.

    The ranges are the forward's, but with a large sum for a bias: each chooses exp as it did there.
    """
    wanted_rows = problem.num_heads * sum(s.q.shape[0] for s in sequences) // MIN_ITEMS
    if bias_sum is not None and bias_sum.part_is_as_large_as_scores:
        wanted_rows = 0
    for i, sequence in enumerate(sequences):
        len_q, len_k = sequence.q.shape[0], sequence.k.shape[0]
        key_range = problem.key_range(0, len_q, len_q, len_k)
        if len_q == 0 or key_range[0] >= key_range[1]:
            continue
        groups = -(-len_q // MAX_ROWS)
        rows = -(-len_q // groups)
        items = -(-len_q // min(MAX_ITEM_ROWS, max(MIN_ITEM_ROWS, wanted_rows)))
        item_rows = -(-groups // items) * rows
        begins = range(0, len_q, item_rows)
        for kv_head in range(problem.num_kv_heads):
            keys = _Keys(problem, sequence, kv_head, *key_range, rows, problem.group * len(begins))
            turn = 0
            for head in range(kv_head * problem.group, (kv_head + 1) * problem.group):
                for begin in reversed(begins):
                    end = min(begin + item_rows, len_q)
                    yield _Item(problem, sequence, keys, turn, bias_sum, (i, head), begin, end).run
                    turn += 1


class _Tile(NamedTuple):
    """Keys [begin, end)."""

    begin: int
    end: int
    k_t: np.ndarray  # (head_dim + 1, end - begin), ones in the last row
    v_t: np.ndarray  # (head_dim_v + 1, end - begin), ones in the last row; keys that are not finite are zero
    k: np.ndarray  # (end - begin, head_dim); keys that are not finite are zero


class _Keys:
    """Keys [begin, end) of one key/value head, packed by the first item that needs them and shared by all.

    Keys outside of the range are never read. `norm` is the largest Euclidean norm of a key, `v_max` the largest |v|.
    """

    def __init__(
        self, problem: Problem, sequence: Arrays, head: int, begin: int, end: int, rows: int, items: int
    ) -> None:
        self.rows, self.tile = rows, keys_of_a_tile(rows, max(problem.head_dim, problem.head_dim_v) + 1)
        self._begin, self._end, self._dtype = begin, end, sum_dtype(problem)
        self._k, self._v = sequence.k[:, head], sequence.v[:, head]
        self.sum = KeySum(sequence.dk[:, head], sequence.dv[:, head], items, self._dtype)
        self._lock = Lock()
        self._tiles: list[_Tile] = []
        self.norm, self.v_max = 0.0, 0.0

    def pack(self) -> None:
        with self._lock:
            if not self._tiles:
                begins = range(self._begin, self._end, self.tile)
                self._tiles = [self._pack(begin, min(begin + self.tile, self._end)) for begin in begins]

    def _pack(self, begin: int, end: int) -> _Tile:
        k: np.ndarray = self._k[begin:end].astype(self._dtype, order="C")
        v: np.ndarray = self._v[begin:end].astype(self._dtype, order="C")
        k_t, v_t = (np.ones((x.shape[1] + 1, x.shape[0]), self._dtype) for x in (k, v))
        k_t[:-1] = k.T
        self.norm = np.maximum(self.norm, np.sqrt(np.einsum("nd,nd->n", k, k).max()))
        self.v_max = np.maximum(self.v_max, np.maximum(v.max(initial=0), -v.min(initial=0)))
        for x in k, v:  # 0 * NaN is NaN: a pair that is hidden, dS = 0, must add nothing
            x[~np.isfinite(x).all(axis=1)] = 0
        v_t[:-1] = v.T
        return _Tile(begin, end, k_t, v_t, k)

    def tiles(self, begin: int, end: int) -> Iterator[_Tile]:
        """The tiles that hold keys [begin, end), a part of what is packed; the first and the last are cut to it."""
        for tile in self._tiles[(begin - self._begin) // self.tile : -(-(end - self._begin) // self.tile)]:
            first, last = max(begin, tile.begin), min(end, tile.end)
            part = slice(first - tile.begin, last - tile.begin)
            yield _Tile(first, last, tile.k_t[:, part], tile.v_t[:, part], tile.k[part])


class _Item:
    """Queries [begin, end) of one head against all their keys.

    The queries are groups of `rows`, the last padded with zeros: Q | -c (groups, rows, head_dim + 1),
    w dO | -w Δ (groups, rows, head_dim_v + 1), dQ (groups, rows, head_dim), row sums of E (groups, rows, 1).
    """

    def __init__(
        self,
        problem: Problem,
        sequence: Arrays,
        keys: _Keys,
        turn: int,
        bias_sum: BiasSum | None,
        place: tuple[int, int],
        begin: int,
        end: int,
    ) -> None:
        self.problem, self.sequence, self.keys, self.turn, self.bias_sum = problem, sequence, keys, turn, bias_sum
        self.head, self.begin, self.end = place[1], begin, end
        len_q, len_k = sequence.q.shape[0], sequence.k.shape[0]
        # Query `begin` sees keys low to high of an unbounded sequence, each later one one further.
        diagonal = begin + len_k - len_q
        self.low = None if problem.left is None else diagonal - problem.left
        self.high = None if problem.right is None else diagonal + problem.right
        first, last = problem.key_range(begin, end, len_q, len_k)
        self.seen = slice(first, max(first, last))
        self.place = (*place, slice(begin, end), self.seen)
        self.bias_turn = 0 if bias_sum is None else bias_sum.turn()

    def run(self) -> None:
        problem, sequence, seen = self.problem, self.sequence, self.seen
        dtype = sum_dtype(problem)
        self.keys.pack()
        self._begin_state(dtype)
        dk: np.ndarray = np.zeros((seen.stop - seen.start, problem.head_dim), dtype)
        dv: np.ndarray = np.zeros((seen.stop - seen.start, problem.head_dim_v), dtype)
        if self.bias_sum is not None:
            self.dbias = self.bias_sum.part(self.place)
        if seen.start < seen.stop:
            for tile in self.keys.tiles(seen.start, seen.stop):
                own = slice(tile.begin - seen.start, tile.end - seen.start)
                for first in range(0, len(self.q), self.block):
                    self._add(tile, first, min(first + self.block, len(self.q)), dk[own], dv[own])
        total = (self.weight * self.row_sums.reshape(-1))[: self.end - self.begin, None]  # of a row of P
        total = np.where(total > 0, total, 1).astype(dtype)
        dq = self.dq.reshape(self.row_sums.size, problem.head_dim)[: self.end - self.begin]
        dq *= problem.scale / total
        sequence.dq[self.begin : self.end, self.head] = dq
        dk *= (problem.softcap or 1) / self.unit  # of the scale, Q has scale / softcap, and the unit
        self.keys.sum.give(self.turn, seen, (dk, dv))
        if self.bias_sum is not None:
            self.bias_sum.give(self.bias_turn, self.place, self.dbias, total)

    def _begin_state(self, dtype: type) -> None:
        problem, sequence, rows = self.problem, self.sequence, self.keys.rows
        count, own = self.end - self.begin, (slice(self.begin, self.end), self.head)
        size = -(-count // rows) * rows
        q: np.ndarray = np.zeros((size, problem.head_dim + 1), dtype)
        dout: np.ndarray = np.zeros((size, problem.head_dim_v + 1), dtype)
        lse: np.ndarray = np.full(size, np.inf, dtype)  # of the padding: P = 0
        q[:count, :-1] = sequence.q[own]
        q *= problem.scale / (problem.softcap or 1)
        online = self._choose_exp(q)
        dout[:count, :-1] = sequence.dout[own]
        lse[:count] = sequence.lse[self.head, self.begin : self.end]
        empty = np.isneginf(lse)  # rows that see nothing: P = 0, and what they hold is not read
        lse[empty], q[empty], dout[empty] = np.inf, 0, 0
        delta: np.ndarray = np.zeros(size)
        wide = dout[:count, :-1].astype(np.float64)
        delta[:count] = np.einsum("nd,nd->n", wide, sequence.out[own].astype(np.float64))  # Δ = rowsum(dO ∘ O)
        if sequence.dlse is not None:
            delta[:count] -= sequence.dlse[self.head, self.begin : self.end]
        delta[empty] = 0
        c: np.ndarray = np.zeros(size, dtype)
        if online:  # the weights of n keys are from about 1 / n to 1
            c = lse - dtype(math.log(max(1, self.seen.stop - self.seen.start)) / 2)
        q *= self.unit
        self.weight = np.exp(np.where(np.isfinite(c), c - lse.astype(np.float64), 0))
        dout[:, :-1] *= self.weight[:, None]
        dout[:, -1] = -delta * self.weight
        # Softcap comes before c; and S + bias, rounded as in the forward, has no larger part than c to lose.
        self.c_apart = online and (bool(problem.softcap) or sequence.bias is not None)
        if not self.c_apart:
            q[:, -1] = -c
        self.q, self.dout = q.reshape(-1, rows, q.shape[1]), dout.reshape(-1, rows, dout.shape[1])
        self.c = c.reshape(-1, rows, 1)
        self.dq: np.ndarray = np.zeros((*self.q.shape[:2], problem.head_dim), dtype)
        self.row_sums: np.ndarray = np.zeros((*self.q.shape[:2], 1), dtype)
        self.sums_of_tile: np.ndarray = np.empty_like(self.row_sums)
        self.ones: np.ndarray = np.ones((self.keys.tile, 1), dtype)
        widest = max(1, problem.head_dim, problem.head_dim_v)
        self.block = min(MAX_BLOCK_GROUPS, len(self.q))
        queries = self.block * rows
        self.scores: np.ndarray = np.empty((3 if problem.softcap else 2, queries * self.keys.tile), dtype)
        self.products: np.ndarray = np.empty(max(queries, self.block * self.keys.tile) * widest, dtype)

    def _choose_exp(self, q: np.ndarray) -> bool:
        """exp and the unit of Q as the forward has them, so that S rounds as it did there; whether c is not 0."""
        problem, keys = self.problem, self.keys
        bound = problem.softcap or float(np.sqrt(np.einsum("nd,nd->n", q, q).max())) * keys.norm
        safe = bound <= SAFE_SCORE and SAFE_VALUES[0] <= keys.v_max <= SAFE_VALUES[1]
        online = self.sequence.bias is not None or not safe
        in_base_2 = not online and exp2_is_fast()
        self.exp: np.ufunc = np.exp2 if in_base_2 else np.exp
        unit = math.log2(math.e) if in_base_2 else 1.0
        self.softcap, self.unit = problem.softcap * unit, 1.0 if problem.softcap else unit
        return online

    def _add(self, tile: _Tile, first: int, last: int, dk: np.ndarray, dv: np.ndarray) -> None:
        """One tile of keys against groups [first, last): those that see none are left out, those on an edge masked."""
        problem, n, rows = self.problem, tile.end - tile.begin, self.keys.rows
        low = None if self.low is None else self.low - tile.begin
        high = None if self.high is None else self.high - tile.begin
        seeing = groups_that_see(n, len(self.q), rows, low, high)
        first, last = max(first, seeing[0]), min(last, seeing[1])
        if first >= last:
            return
        q, dout, dq = self.q[first:last], self.dout[first:last], self.dq[first:last]
        shape = len(q), rows, n
        p, ds, *slope = (x[: len(q) * rows * n].reshape(shape) for x in self.scores)
        np.matmul(q, tile.k_t, out=p)  # S, less c unless it is apart
        if problem.softcap:
            np.tanh(p, out=slope[0])
            np.multiply(slope[0], self.softcap, out=p)
            np.square(slope[0], out=slope[0])
            np.subtract(1, slope[0], out=slope[0])
        begin = first * rows
        end = min(last * rows, self.end - self.begin)
        if self.sequence.bias is not None:
            queries = slice(self.begin + begin, self.begin + end)
            add_bias(p, self.sequence.bias[self.head, queries, tile.begin : tile.end])
        if self.c_apart:
            p -= self.c[first:last]
        self.exp(p, out=p)  # E = exp(S - c)
        hide(p, low, high, first, 0)
        self.row_sums[first:last] += np.matmul(p, self.ones[:n], out=self.sums_of_tile[first:last])
        self._add_over_queries(dv, p, dout)  # dV += Eᵀ (w dO)
        np.matmul(dout, tile.v_t, out=ds)  # w (dP - Δ)
        ds *= p  # dS = E ∘ (w (dP - Δ))
        hide(ds, low, high, first, 0)
        if self.bias_sum is not None:
            self.bias_sum.add(self.dbias, ds.reshape(-1, n)[: end - begin], begin, tile.begin - self.seen.start)
        if problem.softcap:
            ds *= slope[0]
        product = self.products[: dq.size].reshape(dq.shape)
        dq += np.matmul(ds, tile.k, out=product)  # dQ += dS K
        self._add_over_queries(dk, ds, q)  # dK += dSᵀ Q

    def _add_over_queries(self, total: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
        """total (n, dim) += xᵀ y over all queries, x (groups, rows, n), y (groups, rows, dim + 1) less its last column.

        A product for each group: sums of sums have the smaller error.
        """
        products = self.products[: len(x) * total.size].reshape(len(x), *total.shape)
        np.matmul(x.transpose(0, 2, 1), y[:, :, :-1], out=products)
        for product in products:
            total += product
