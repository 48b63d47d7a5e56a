"""Global memory that attention over a paged cache reads and writes, exact to the byte, by array.

As `cuflash.plan.traffic`, with what differs:

- rows of a tile may be the query heads of a group, whose keys and values are then read once for all of them;
- keys and values are those of tokens that exist, wherever their blocks lie, and of the table a block reads the entries
  that lead to them: those of a tile of keys once, an entry that two tiles share twice, none past the last token;
- every block reads the length of its sequence; of even work three times those of all sequences before that, and blocks
  whose slot no share has read nothing else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, cast

import numpy as np

from cuflash.errors import InvalidValueError
from cuflash.plan.config import ELEMENT_BYTES, CombineConfig, ForwardConfig
from cuflash.plan.forward import ForwardPlan
from cuflash.plan.traffic import INDEX, LaunchTraffic, nonzero, slot_owners, sum_bytes
from cuflash.problem import Problem


class PagedTile(NamedTuple):
    """What the blocks of one query tile of one head, or one group of heads, see."""

    rows: int
    keys: int  # visible to at least one of the rows
    key_tiles: int  # that hold them
    entries: int  # of the table that lead to them, tile by tile


def paged_lengths(
    problem: Problem, seq_lens: Sequence[int], cu_seqlens_q: Sequence[int] | None = None
) -> list[tuple[int, int]]:
    """(queries, keys) of every sequence; raises InvalidValueError where the lists do not fit the problem."""
    if len(seq_lens) != problem.batch:
        raise InvalidValueError(f"seq_lens = {seq_lens}: must be {problem.batch} lengths, one per sequence")
    if problem.mask is not None:
        raise InvalidValueError(f"mask = {problem.mask!r}: must be None, of a paged cache only windows are modelled")
    keys = [min(max(int(length), 0), problem.seqlen_k) for length in seq_lens]
    if not problem.varlen:
        return [(problem.seqlen_q, length) for length in keys]
    if cu_seqlens_q is None or len(cu_seqlens_q) != problem.batch + 1:
        raise InvalidValueError(f"cu_seqlens_q = {cu_seqlens_q}: must list the {problem.batch + 1} ends of sequences")
    queries = [int(end) - int(begin) for begin, end in pairwise(cu_seqlens_q)]
    return list(zip(queries, keys, strict=True))


def paged_tiles(problem: Problem, config: ForwardConfig, len_q: int, len_k: int) -> Iterator[PagedTile]:
    """The query tiles of one sequence and one head, or one group of heads."""
    each, size = problem.group if config.grouped else 1, cast(int, problem.block_size)
    for row in range(0, len_q * each, config.block_m):
        row_end = min(row + config.block_m, len_q * each)
        begin, end = problem.key_range(row // each, (row_end - 1) // each + 1, len_q, len_k)
        if begin >= end:
            yield PagedTile(row_end - row, 0, 0, 0)
            continue
        tiles = np.arange(begin // config.block_n, -(-end // config.block_n))
        first, last = np.maximum(tiles * config.block_n, begin), np.minimum((tiles + 1) * config.block_n, end) - 1
        entries = int((last // size - first // size + 1).sum())
        yield PagedTile(row_end - row, end - begin, len(tiles), entries)


def paged_traffic(
    problem: Problem,
    plan: ForwardPlan,
    seq_lens: Sequence[int],
    *,
    cu_seqlens_q: Sequence[int] | None = None,
    return_lse: bool = False,
) -> tuple[LaunchTraffic, ...]:
    """Traffic of each launch of a plan: forward and, where the keys are split, combine. Lengths are on the host."""
    config = cast(ForwardConfig, plan.forward.config)
    chunks = -(-config.head_dim_v // config.block_dv)
    each = problem.group if config.grouped else 1
    heads = problem.num_heads // each
    element, wide = ELEMENT_BYTES[config.dtype], sum_bytes(config.dtype)
    bias_element = 0 if problem.bias_dtype is None else ELEMENT_BYTES[problem.bias_dtype]
    read: Counter[str] = Counter()
    lengths = paged_lengths(problem, seq_lens, cu_seqlens_q)
    splits = splits_of(problem, plan, lengths)
    for ((len_q, len_k), parts), count in Counter(zip(lengths, splits, strict=True)).items():
        for tile in paged_tiles(problem, config, len_q, len_k):
            blocks = count * heads * chunks
            read["q"] += blocks * min(parts, tile.key_tiles) * tile.rows * config.head_dim * element
            read["k"] += blocks * tile.keys * config.head_dim * element
            read["v"] += count * heads * tile.keys * config.head_dim_v * element
            read["bias"] += blocks * tile.keys * tile.rows * bias_element
            read["block_tables"] += INDEX * blocks * tile.entries
    if problem.total_q is None or cu_seqlens_q is None:
        queries = problem.batch * problem.seqlen_q
        read["seq_lens"] = INDEX * plan.q_tiles * heads * chunks * sum(splits)
        if plan.even is not None:
            passes = 3 + (len(plan.even.sizes(visible_tiles(problem, plan, lengths))) > 1)
            read["seq_lens"] += passes * INDEX * problem.batch * plan.forward.grid[0]
    else:
        queries = problem.total_q
        slots = slot_owners([each * int(start) for start in cu_seqlens_q], config.block_m, plan.q_tiles)
        blocks = plan.num_splits * chunks * heads  # that share a slot
        read["seq_lens"] = INDEX * blocks * slots.owned
        read["cu_seqlens_q"] = INDEX * blocks * (slots.steps + 2 * slots.owned + slots.spare)

    rows = problem.num_heads * queries
    result = {"o": rows * config.head_dim_v * element} | ({"lse": rows * wide} if return_lse else {})
    if plan.combine is None:
        return (LaunchTraffic(nonzero(read), nonzero(result)),)
    states = sum(splits) * rows // problem.batch * wide if plan.even else plan.num_splits * rows * wide
    partial = nonzero({"o_partial": states * config.head_dim_v, "lse_partial": states})
    if plan.even is None:
        return LaunchTraffic(nonzero(read), partial), LaunchTraffic(partial, nonzero(result))
    table = {"shares": 2 * INDEX * problem.batch}
    merge = cast(CombineConfig, plan.combine.config)
    looked_up = {"shares": 2 * INDEX * rows * merge.row_warps}
    return LaunchTraffic(nonzero(read), partial | table), LaunchTraffic(partial | looked_up, nonzero(result))


def splits_of(problem: Problem, plan: ForwardPlan, lengths: Sequence[tuple[int, int]]) -> list[int]:
    """Into how many parts the keys of each sequence are split."""
    if plan.even is None:
        return [plan.num_splits] * len(lengths)
    return plan.even.counts(visible_tiles(problem, plan, lengths))


def visible_tiles(problem: Problem, plan: ForwardPlan, lengths: Sequence[tuple[int, int]]) -> list[int]:
    """Key tiles that the queries of each sequence see."""
    block_n = cast(ForwardConfig, plan.forward.config).block_n
    spans = (problem.key_range(0, len_q, len_q, len_k) for len_q, len_k in lengths)
    return [max(0, -(-end // block_n) - begin // block_n) if begin < end else 0 for begin, end in spans]
