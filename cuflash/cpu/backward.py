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

from cuflash.cpu.forward import MIN_ITEMS, SAFE_SCORE, SAFE_VALUES, exp2_is_fast, groups_of_items
from cuflash.cpu.sums import BiasSum, KeySum
from cuflash.cpu.threads import num_threads, run_all
from cuflash.cpu.tiles import add_bias, keys_of_a_tile, sum_dtype
from cuflash.cpu.visibility import Part, Sight, hide, sight_of
from cuflash.masks.steps import Place
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
    places = [Place(s.q.shape[0], s.k.shape[0], i) for i, s in enumerate(sequences)]
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        starts = zip(places, cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), strict=False)
        places = [place._replace(q_start=q_start, k_start=k_start) for place, q_start, k_start in starts]
    scores = problem.num_heads * sum(place.len_q * place.len_k for place in places)
    bias_sum = None if dbias is None else BiasSum(problem, dbias)
    items = _items(problem, list(zip(places, sequences, strict=True)), bias_sum)
    run_all(items, 1 if scores < SMALL else num_threads())
    if bias_sum is not None:
        bias_sum.write()


def _items(
    problem: Problem, sequences: list[tuple[Place, Arrays]], bias_sum: BiasSum | None
) -> Iterator[Callable[[], None]]:
    """One item per head and range of queries; those that share keys follow each other, longest causal ones first.

    The ranges are the forward's, but with a large sum for a bias: each chooses exp as it did there.
    """
    wanted_rows = problem.num_heads * sum(place.len_q for place, _ in sequences) // MIN_ITEMS
    if bias_sum is not None and bias_sum.part_is_as_large_as_scores:
        wanted_rows = 0
    for place, sequence in sequences:
        if place.len_q == 0 or place.len_k == 0:
            continue
        rows, items = groups_of_items(place.len_q, wanted_rows)
        tile = keys_of_a_tile(rows, max(problem.head_dim, problem.head_dim_v) + 1)
        for kv_head in range(problem.num_kv_heads):
            sight = sight_of(problem, place, kv_head, rows, tile)
            keys = _Keys(problem, sequence, kv_head, sight, problem.group * len(items))
            turn = 0
            for head in range(kv_head * problem.group, (kv_head + 1) * problem.group):
                for groups in reversed(items):
                    yield _Item(problem, sequence, keys, turn, bias_sum, (place.batch, head), groups).run
                    turn += 1


class _Tile(NamedTuple):
    """Some keys of the sequence."""

    keys: slice
    k_t: np.ndarray  # (head_dim + 1, keys), ones in the last row
    v_t: np.ndarray  # (head_dim_v + 1, keys), ones in the last row; keys that are not finite are zero
    k: np.ndarray  # (keys, head_dim); keys that are not finite are zero


class _Keys:
    """The keys of one key/value head that are seen, packed by the first item that needs them and shared by all.

    Tiles that no query sees are never read. `norm` is the largest Euclidean norm of a key, `v_max` the largest |v|.
    """

    def __init__(self, problem: Problem, sequence: Arrays, head: int, sight: Sight, items: int) -> None:
        self.sight, self._dtype = sight, sum_dtype(problem)
        self._k, self._v = sequence.k[:, head], sequence.v[:, head]
        self.sum = KeySum(sequence.dk[:, head], sequence.dv[:, head], items, self._dtype)
        self._lock = Lock()
        self._tiles: dict[int, _Tile] = {}
        self._packed = False
        self.norm, self.v_max = 0.0, 0.0

    def pack(self) -> None:
        with self._lock:
            if not self._packed:
                self._tiles = {i: self._pack(keys) for i, keys in self.sight.tiles()}
                self._packed = True

    def _pack(self, keys: slice) -> _Tile:
        k: np.ndarray = self._k[keys].astype(self._dtype, order="C")
        v: np.ndarray = self._v[keys].astype(self._dtype, order="C")
        k_t, v_t = (np.ones((x.shape[1] + 1, x.shape[0]), self._dtype) for x in (k, v))
        k_t[:-1] = k.T
        self.norm = np.maximum(self.norm, np.sqrt(np.einsum("nd,nd->n", k, k).max()))
        self.v_max = np.maximum(self.v_max, np.maximum(v.max(initial=0), -v.min(initial=0)))
        for x in k, v:  # 0 * NaN is NaN: a pair that is hidden, dS = 0, must add nothing
            x[~np.isfinite(x).all(axis=1)] = 0
        v_t[:-1] = v.T
        return _Tile(keys, k_t, v_t, k)

    def of(self, part: Part) -> _Tile:
        """The keys of a part of a tile that is packed."""
        tile = self._tiles[part.tile]
        own = slice(part.keys.start - tile.keys.start, part.keys.stop - tile.keys.start)
        return _Tile(part.keys, tile.k_t[:, own], tile.v_t[:, own], tile.k[own])


class _Item:
    """Some groups of queries of one head against all their keys.

    The last group is padded with zeros: Q | -c (groups, rows, head_dim + 1),
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
        groups: range,
    ) -> None:
        self.problem, self.sequence, self.keys, self.turn, self.bias_sum = problem, sequence, keys, turn, bias_sum
        self.sight, self.batch, self.head = keys.sight, *place
        self.first, self.last, self.rows = groups.start, groups.stop, keys.sight.rows
        self.begin, self.end = self.first * self.rows, min(self.last * self.rows, sequence.q.shape[0])
        self.bias_turn = 0 if bias_sum is None else bias_sum.turn()

    def run(self) -> None:
        problem, sequence = self.problem, self.sequence
        dtype = sum_dtype(problem)
        self.keys.pack()
        parts = list(self.sight.parts(self.head, self.first, self.last))
        self.seen = slice(parts[0].keys.start, parts[-1].keys.stop) if parts else slice(0, 0)
        self._begin_state(dtype)
        place = self.batch, self.head, slice(self.begin, self.end), self.seen
        if self.bias_sum is not None:
            self.dbias = self.bias_sum.part(place)
        gradients: dict[int, tuple[slice, np.ndarray, np.ndarray]] = {}  # of the keys of a tile
        for part in parts:
            if part.tile not in gradients:
                n = part.keys.stop - part.keys.start
                dk, dv = (np.zeros((n, dim), dtype) for dim in (problem.head_dim, problem.head_dim_v))
                gradients[part.tile] = part.keys, dk, dv
            self._add_blocks(part, *gradients[part.tile][1:])
        total = (self.weight * self.row_sums.reshape(-1))[: self.end - self.begin, None]  # of a row of P
        total = np.where(total > 0, total, 1).astype(dtype)
        dq = self.dq.reshape(self.row_sums.size, problem.head_dim)[: self.end - self.begin]
        dq *= problem.scale / total
        sequence.dq[self.begin : self.end, self.head] = dq
        for _, dk, _ in gradients.values():
            dk *= (problem.softcap or 1) / self.unit  # of the scale, Q has scale / softcap, and the unit
        self.keys.sum.give(self.turn, list(gradients.values()))
        if self.bias_sum is not None:
            self.bias_sum.give(self.bias_turn, place, self.dbias, total)

    def _begin_state(self, dtype: type) -> None:
        problem, sequence, rows = self.problem, self.sequence, self.rows
        count, own = self.end - self.begin, (slice(self.begin, self.end), self.head)
        size = (self.last - self.first) * rows
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
        self.ones: np.ndarray = np.ones((self.sight.tile, 1), dtype)
        widest = max(1, problem.head_dim, problem.head_dim_v)
        self.block = min(MAX_BLOCK_GROUPS, len(self.q))
        queries = self.block * rows
        self.scores: np.ndarray = np.empty((3 if problem.softcap else 2, queries * self.sight.tile), dtype)
        self.products: np.ndarray = np.empty(max(queries, self.block * self.sight.tile) * widest, dtype)

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

    def _add_blocks(self, part: Part, dk: np.ndarray, dv: np.ndarray) -> None:
        """One tile of keys against the groups that see some of them, a block of groups at a time."""
        tile = self.keys.of(part)
        for begin in range(part.first - (part.first - self.first) % self.block, part.last, self.block):
            first, last = max(begin, part.first), min(begin + self.block, part.last)
            self._add(tile, part._replace(first=first, last=last), dk, dv)

    def _add(self, tile: _Tile, part: Part, dk: np.ndarray, dv: np.ndarray) -> None:
        """One tile of keys against a block of groups; only where something is hidden is it masked."""
        problem, n, hidden = self.problem, len(tile.k), self.sight.hidden(self.head, part)
        own = slice(part.first - self.first, part.last - self.first)
        q, dout, dq = self.q[own], self.dout[own], self.dq[own]
        shape = len(q), self.rows, n
        p, ds, *slope = (x[: len(q) * self.rows * n].reshape(shape) for x in self.scores)
        np.matmul(q, tile.k_t, out=p)  # S, less c unless it is apart
        if problem.softcap:
            np.tanh(p, out=slope[0])
            np.multiply(slope[0], self.softcap, out=p)
            np.square(slope[0], out=slope[0])
            np.subtract(1, slope[0], out=slope[0])
        queries = slice(part.first * self.rows, min(part.last * self.rows, self.end))
        if self.sequence.bias is not None:
            add_bias(p, self.sequence.bias[self.head, queries, part.keys])
        if self.c_apart:
            p -= self.c[own]
        self.exp(p, out=p)  # E = exp(S - c)
        hide(p, hidden, 0)
        self.row_sums[own] += np.matmul(p, self.ones[:n], out=self.sums_of_tile[own])
        self._add_over_queries(dv, p, dout)  # dV += Eᵀ (w dO)
        np.matmul(dout, tile.v_t, out=ds)  # w (dP - Δ)
        ds *= p  # dS = E ∘ (w (dP - Δ))
        hide(ds, hidden, 0)
        if self.bias_sum is not None:
            at = queries.start - self.begin, part.keys.start - self.seen.start
            self.bias_sum.add(self.dbias, ds.reshape(-1, n)[: queries.stop - queries.start], *at)
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
