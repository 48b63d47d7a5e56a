"""Global memory that the launches of a backward plan read and write, exact to the byte, by array.

Bytes count as in `cuflash.plan.traffic`; an atomic addition counts as a read and a write. What the kernels do, and this
module therefore counts:

- prepare reads o and its cotangent once, and with each of a row's 32 lanes lse and its cotangent, the latter of rows
  that see a key; it writes a row's lse and delta, and zeros to the sums of dq, for whole query tiles;
- a block of the backward kernel reads the keys of its tile that some query sees, and of each query tile that sees one
  of them the queries that do, with their cotangents, lse and delta of the whole tile, and a bias where they meet; its
  additions to dq and its dk and dv are those of its chunk of columns, all else is read once per chunk;
- in a fixed order of additions a block asks at least once whether it is its turn, and passes the turn on, for all that
  it visits of the query tiles which share one;
- finish reads the sums and writes dq;
- a block of the gradient of a bias reads the same as one of the backward kernel, of one query head, and keys again
  where it owns a tile of queries rather than all of them; it writes its part of dbias;
- of a packed problem the threads that locate their block's sequence read its ends and what their search passes;
- under a mask a block of the backward kernel reads the length of its list, the entry of each of its visits and at least
  two of them, and of these tiles every key and query that exists; one of the gradient of a bias leaves out the tiles
  that intervals show to be hidden, which is all that are hidden if the mask looks nothing up. Arrays mask_* and the
  making of lists are apart, as in `cuflash.plan.traffic`.

How often a block asks for its turn beyond the first time depends on when others pass it: the reads of `turns` are the
least.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import numpy as np

from cuflash.errors import InvalidValueError
from cuflash.masks.program import Program
from cuflash.plan.backward import BackwardPlan
from cuflash.plan.backward_cost import column_chunks, shares
from cuflash.plan.config import ELEMENT_BYTES, BackwardConfig, BiasGradientConfig, round_up
from cuflash.plan.launch import Launch
from cuflash.plan.masked_tiles import Group, groups, seen, visited_tiles
from cuflash.plan.traffic import INDEX, LaunchTraffic, nonzero, sequence_lengths, slot_owners, sum_bytes, tokens
from cuflash.problem import Problem

LANES = 32  # of a warp, which prepares one row at a time
TURN = 4  # bytes of a counter in `turns`


class KeyTile(NamedTuple):
    """What the blocks of one key tile of one head see."""

    rows: int  # keys that exist
    keys: int  # of them, those that a query sees
    queries: int  # that see one of them
    visits: int  # query tiles that hold these queries
    turns: int  # groups of query tiles that share a turn which these are of


class Visits(NamedTuple):
    """Sums over the key tiles of all sequences and heads, of tiles that a query sees."""

    keys: int  # of key/value heads
    keys_of_heads: int  # the same, once for each query head that sees one of them
    queries: int
    pairs: int  # rows of the tile times its queries
    tiles: int  # pairs of a key tile and a query tile
    keys_of_tiles: int  # keys, once for each of these pairs
    turns: int  # pairs of a key tile and query tiles that share a turn
    entries: int = 0  # of lists under a mask, that blocks read
    lists: int = 0  # that have a length


def key_tiles(
    problem: Problem, config: BackwardConfig | BiasGradientConfig, seqlen_q: int, seqlen_k: int, turn_tiles: int = 1
) -> Iterator[KeyTile]:
    """The key tiles of one sequence and one head, as the backward kernel walks them."""
    first, last = problem.key_range(0, seqlen_q, seqlen_q, seqlen_k)
    for key in range(0, seqlen_k, config.block_n):
        rows = min(config.block_n, seqlen_k - key)
        begin, end = query_range(problem, key, key + rows, seqlen_q, seqlen_k)
        if begin < end:
            keys = min(key + rows, last) - max(key, first)
            tile, last_tile = begin // config.block_m, (end - 1) // config.block_m
            turns = last_tile // turn_tiles - tile // turn_tiles + 1
            yield KeyTile(rows, keys, end - begin, last_tile - tile + 1, turns)
        else:
            yield KeyTile(rows, 0, 0, 0, 0)


def query_range(problem: Problem, key_begin: int, key_end: int, seqlen_q: int, seqlen_k: int) -> tuple[int, int]:
    """Queries [begin, end) of a sequence that see at least one of the keys [key_begin, key_end)."""
    shift = seqlen_k - seqlen_q
    begin = 0 if problem.right is None else max(0, key_begin - shift - problem.right)
    end = seqlen_q if problem.left is None else min(seqlen_q, key_end - shift + problem.left)
    return begin, end


def visits(
    problem: Problem,
    config: BackwardConfig | BiasGradientConfig,
    cu_seqlens_q: Sequence[int] | None = None,
    cu_seqlens_k: Sequence[int] | None = None,
    turn_tiles: int = 1,
) -> Visits:
    """What the blocks of all key tiles see."""
    total = Visits(*[0] * 7)
    if problem.mask is not None:
        for group in groups(problem, problem.mask, cu_seqlens_q, cu_seqlens_k):
            total = _added(total, _listed(problem.mask, config, group), group.times)
        return total
    for pair, count in Counter(sequence_lengths(problem, cu_seqlens_q, cu_seqlens_k)).items():
        for tile in key_tiles(problem, config, *pair, turn_tiles):
            of_pairs = tile.queries, tile.rows * tile.queries, tile.visits, tile.keys * tile.visits, tile.turns
            of_heads = (problem.group * part for part in (tile.keys, *of_pairs))
            total = _added(total, Visits(tile.keys, *of_heads), count * problem.num_kv_heads)
    return total


def _added(total: Visits, more: Visits, times: int) -> Visits:
    return Visits(*(a + times * b for a, b in zip(total, more, strict=True)))


def _listed(mask: Program, config: BackwardConfig | BiasGradientConfig, group: Group) -> Visits:
    """What the blocks of one key/value head see of a sequence."""
    tiles = [visited_tiles(mask, place, config.block_m, config.block_n) for place in group.places]
    rows, keys, count = tiles[0].rows, tiles[0].keys, group.heads
    visited = np.array([of_head.visited for of_head in tiles])  # (places, query tiles, key tiles)
    of_key_tile = count * visited.sum(axis=(0, 1))
    queries = rows @ visited.sum(axis=0)  # of each key tile
    return Visits(
        int(keys[of_key_tile > 0].sum()),
        count * int((visited.any(axis=1) @ keys).sum()),
        count * int(queries.sum()),
        count * int(queries @ keys),
        int(of_key_tile.sum()),
        int(of_key_tile @ keys),
        int(of_key_tile.sum()),
        int(np.maximum(of_key_tile[of_key_tile > 0], 2).sum()),
        len(keys) if len(rows) else 0,
    )


def _queries_that_see(problem: Problem, cu_seqlens_q: Sequence[int] | None, cu_seqlens_k: Sequence[int] | None) -> int:
    """Queries of all sequences and heads that see a key."""
    if problem.mask is not None:
        return sum(
            group.times * group.heads * sum(int(seen(problem.mask, place)[0].sum()) for place in group.places)
            for group in groups(problem, problem.mask, cu_seqlens_q, cu_seqlens_k)
        )
    lengths = sequence_lengths(problem, cu_seqlens_q, cu_seqlens_k)
    seeing = (query_range(problem, 0, m, n, m) for n, m in lengths if m)
    return problem.num_heads * sum(max(0, end - begin) for begin, end in seeing)


def backward_traffic(
    problem: Problem,
    plan: BackwardPlan,
    *,
    lse_cotangent: bool = False,
    bias_shape: Sequence[int] | None = None,
    cu_seqlens_q: Sequence[int] | None = None,
    cu_seqlens_k: Sequence[int] | None = None,
) -> tuple[LaunchTraffic, ...]:
    """Traffic of each launch of a plan: prepare, backward, finish and, with a bias, its gradient.

    Parameters
    ----------
    lse_cotangent : bool
        Whether lse has a cotangent.
    bias_shape : sequence of int, optional
        As the plan was given it.
    cu_seqlens_q, cu_seqlens_k : sequence of int
        Of a packed problem, monotone and within the totals.

    Raises
    ------
    InvalidValueError
        If a packed problem lacks its cu_seqlens, or a plan with the gradient of a bias its shape.
    """
    config = cast(BackwardConfig, plan.launches[1].config)
    lengths = sequence_lengths(problem, cu_seqlens_q, cu_seqlens_k)
    element, wide = ELEMENT_BYTES[config.dtype], sum_bytes(config.dtype)
    heads, dq_chunks = problem.num_heads, plan.turn_shape[-1]
    tokens_q, tokens_k = tokens(problem)
    behind = tokens_q - sum(length for length, _ in lengths)  # tokens of no sequence
    tiles = heads * sum(-(-length // config.block_m) for length in (behind, *(n for n, _ in lengths)))
    owned = sums_of_tile(config)

    prepare: Counter[str] = Counter(o=heads * tokens_q * config.head_dim_v * element)
    prepare["d_o"] = prepare["o"]
    prepare["lse"] = LANES * heads * tokens_q * wide
    if lse_cotangent:
        prepare["d_lse"] = LANES * _queries_that_see(problem, cu_seqlens_q, cu_seqlens_k) * wide
    finish = Counter(dq_sum=tiles * dq_chunks * owned * wide)
    if cu_seqlens_q is not None:
        slots = slot_owners(cu_seqlens_q, config.block_m, plan.q_tiles)
        reads = INDEX * config.threads * heads * (slots.steps + 2 * slots.owned + slots.spare)
        prepare["cu_seqlens_q"], finish["cu_seqlens_q"] = reads, dq_chunks * reads
    rows = tiles * config.block_m * wide
    cleared = {
        "dq_sum": tiles * math.prod(plan.sum_shape[-2:]) * wide,
        "turns": tiles * dq_chunks * TURN,
        "row_lse": rows,
        "row_delta": rows,
    }
    main = _backward(problem, config, visits(problem, config, cu_seqlens_q, cu_seqlens_k, plan.turn_tiles))
    written = {name: main[name] for name in ("dq_sum", "turns")}
    written["dk"] = problem.num_kv_heads * tokens_k * config.head_dim * element
    written["dv"] = problem.num_kv_heads * tokens_k * config.head_dim_v * element
    if cu_seqlens_k is not None:
        slots = slot_owners(cu_seqlens_k, config.block_n, plan.k_tiles)
        blocks = problem.num_kv_heads * column_chunks(config)
        main["cu_seqlens_k"] = INDEX * blocks * (slots.steps + 3 * slots.owned + slots.spare)
        main["cu_seqlens_q"] = INDEX * blocks * (2 * slots.owned + slots.spare)
    launches = [
        LaunchTraffic(nonzero(prepare), nonzero(cleared)),
        LaunchTraffic(nonzero(main), nonzero(written)),
        LaunchTraffic(nonzero(finish), nonzero({"dq": heads * tokens_q * config.head_dim * element})),
    ]
    if len(plan.launches) > len(launches):
        tiled = cast(BiasGradientConfig, plan.launches[-1].config)
        visited = visits(problem, tiled, cu_seqlens_q, cu_seqlens_k)
        launches.append(_bias_gradient(problem, plan.launches[-1], visited, bias_shape))
    return tuple(launches)


def sums_of_tile(config: BackwardConfig) -> int:
    """Of a query tile's sums of one chunk of dq those that warps add to: a warp past the last column adds nothing."""
    own = shares(config)
    warp_rows = config.block_m // 16 // own.dq_rows
    columns = round_up(min(config.block_d, config.head_dim), 16) // 16
    return warp_rows * -(-columns // own.dq_columns) * own.dq_rows * own.dq_columns * 256


def _backward(problem: Problem, config: BackwardConfig, visited: Visits) -> Counter[str]:
    """Reads of the backward kernel beside cu_seqlens."""
    chunks, dq_chunks = column_chunks(config), -(-config.head_dim // config.block_d)
    read = _inputs(problem, config, visited, chunks * visited.keys, chunks)
    additions = dq_chunks * visited.tiles
    read["dq_sum"] = additions * sums_of_tile(config) * sum_bytes(config.dtype)
    read["turns"] = dq_chunks * visited.turns * TURN if config.deterministic else 0
    read["tile_lists"], read["tile_counts"] = 2 * INDEX * chunks * visited.entries, INDEX * chunks * visited.lists
    return read


def _inputs(
    problem: Problem, config: BackwardConfig | BiasGradientConfig, visited: Visits, keys: int, times: int
) -> Counter[str]:
    """Reads of `keys` keys and, `times` times, of every visit's queries."""
    row, row_v = (size * ELEMENT_BYTES[config.dtype] for size in (config.head_dim, config.head_dim_v))
    read = Counter(k=keys * row, v=keys * row_v, q=times * visited.queries * row, d_o=times * visited.queries * row_v)
    read["row_lse"] = read["row_delta"] = times * visited.tiles * config.block_m * sum_bytes(config.dtype)
    if problem.bias_dtype is not None:
        read["bias"] = times * visited.pairs * ELEMENT_BYTES[problem.bias_dtype]
    return read


def _bias_gradient(problem: Problem, launch: Launch, visited: Visits, shape: Sequence[int] | None) -> LaunchTraffic:
    config = cast(BiasGradientConfig, launch.config)
    if shape is None or len(shape) != 4:
        raise InvalidValueError(f"bias_shape = {shape}: must be the four lengths that the plan was given")
    read = _inputs(problem, config, visited, visited.keys_of_heads if shape[2] == 1 else visited.keys_of_tiles, 1)
    if problem.varlen:
        sequences = launch.grid[0] * (problem.batch if shape[0] == 1 else 1)  # that blocks locate
        read["cu_seqlens_q"] = read["cu_seqlens_k"] = INDEX * config.threads * sequences * 2
    return LaunchTraffic(nonzero(read), nonzero({"dbias": math.prod(shape) * ELEMENT_BYTES[config.bias_dtype]}))
