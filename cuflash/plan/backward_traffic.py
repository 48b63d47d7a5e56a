"""Global memory that the launches of a backward plan read and write, exact to the byte, by array.

Bytes count as in `cuflash.plan.traffic`; an atomic addition counts as a read and a write. What the kernels do, and this
module therefore counts:

- prepare reads o and its cotangent once, and with each of a row's 32 lanes lse and its cotangent, the latter of rows
  that see a key; it writes a row's lse and delta, and zeros to the sums of dq, for whole query tiles;
- a block of the backward kernel reads the keys of its tile that some query sees, and of each query tile that sees one
  of them the queries that do, with their cotangents, lse and delta of the whole tile, and a bias where they meet; its
  additions to dq and its dk and dv are those of its chunk of columns, all else is read once per chunk;
- in a fixed order of additions a block asks at least once a visit whether it is its turn, and passes the turn on;
- finish reads the sums and writes dq;
- a block of the gradient of a bias reads the same as one of the backward kernel, of one query head, and keys again
  where it owns a tile of queries rather than all of them; it writes its part of dbias;
- of a packed problem the threads that locate their block's sequence read its ends and what their search passes.

How often a block asks for its turn beyond the first time depends on when others pass it: the reads of `turns` are the
least.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

from cuflash.errors import InvalidValueError
from cuflash.plan.backward import BackwardPlan
from cuflash.plan.backward_cost import column_chunks, shares
from cuflash.plan.config import ELEMENT_BYTES, BackwardConfig, BiasGradientConfig, round_up
from cuflash.plan.launch import Launch
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


class Visits(NamedTuple):
    """Sums over the key tiles of all sequences and one head, of tiles that a query sees."""

    keys: int
    queries: int
    pairs: int  # rows of the tile times its queries
    tiles: int  # pairs of a key tile and a query tile
    keys_of_tiles: int  # keys, once for each of these pairs


def key_tiles(
    problem: Problem, config: BackwardConfig | BiasGradientConfig, seqlen_q: int, seqlen_k: int
) -> Iterator[KeyTile]:
    """The key tiles of one sequence and one head, as the backward kernel walks them."""
    first, last = problem.key_range(0, seqlen_q, seqlen_q, seqlen_k)
    for key in range(0, seqlen_k, config.block_n):
        rows = min(config.block_n, seqlen_k - key)
        begin, end = query_range(problem, key, key + rows, seqlen_q, seqlen_k)
        if begin < end:
            keys = min(key + rows, last) - max(key, first)
            yield KeyTile(rows, keys, end - begin, -(-end // config.block_m) - begin // config.block_m)
        else:
            yield KeyTile(rows, 0, 0, 0)


def query_range(problem: Problem, key_begin: int, key_end: int, seqlen_q: int, seqlen_k: int) -> tuple[int, int]:
    """Queries [begin, end) of a sequence that see at least one of the keys [key_begin, key_end)."""
    shift = seqlen_k - seqlen_q
    begin = 0 if problem.right is None else max(0, key_begin - shift - problem.right)
    end = seqlen_q if problem.left is None else min(seqlen_q, key_end - shift + problem.left)
    return begin, end


def visits(problem: Problem, config: BackwardConfig | BiasGradientConfig, lengths: Sequence[tuple[int, int]]) -> Visits:
    """What the blocks of all key tiles of one head see; `lengths` of every sequence."""
    total = [0] * len(Visits._fields)
    for pair, count in Counter(lengths).items():
        for tile in key_tiles(problem, config, *pair):
            parts = tile.keys, tile.queries, tile.rows * tile.queries, tile.visits, tile.keys * tile.visits
            for i, part in enumerate(parts):
                total[i] += count * part
    return Visits(*total)


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
        seeing = (query_range(problem, 0, m, n, m) for n, m in lengths if m)
        prepare["d_lse"] = LANES * heads * sum(max(0, end - begin) for begin, end in seeing) * wide
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
    main = _backward(problem, config, visits(problem, config, lengths))
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
        launches.append(_bias_gradient(problem, plan.launches[-1], lengths, bias_shape))
    return tuple(launches)


def sums_of_tile(config: BackwardConfig) -> int:
    """Of a query tile's sums of one chunk of dq those that warps add to: a warp past the last column adds nothing."""
    own = shares(config)
    warp_rows = config.block_m // 16 // own.dq_rows
    columns = round_up(min(config.block_d, config.head_dim), 16) // 16
    return warp_rows * -(-columns // own.dq_columns) * own.dq_rows * own.dq_columns * 256


def _backward(problem: Problem, config: BackwardConfig, seen: Visits) -> Counter[str]:
    """Reads of the backward kernel beside cu_seqlens."""
    chunks, dq_chunks = column_chunks(config), -(-config.head_dim // config.block_d)
    read = _inputs(problem, config, seen, chunks * problem.num_kv_heads * seen.keys, chunks)
    additions = problem.num_heads * dq_chunks * seen.tiles
    read["dq_sum"] = additions * sums_of_tile(config) * sum_bytes(config.dtype)
    read["turns"] = additions * TURN if config.deterministic else 0
    return read


def _inputs(
    problem: Problem, config: BackwardConfig | BiasGradientConfig, seen: Visits, keys: int, times: int
) -> Counter[str]:
    """Reads of `keys` keys and of every visit's queries, `times` times for each head."""
    times *= problem.num_heads
    row, row_v = (size * ELEMENT_BYTES[config.dtype] for size in (config.head_dim, config.head_dim_v))
    read = Counter(k=keys * row, v=keys * row_v, q=times * seen.queries * row, d_o=times * seen.queries * row_v)
    read["row_lse"] = read["row_delta"] = times * seen.tiles * config.block_m * sum_bytes(config.dtype)
    if problem.bias_dtype is not None:
        read["bias"] = times * seen.pairs * ELEMENT_BYTES[problem.bias_dtype]
    return read


def _bias_gradient(
    problem: Problem, launch: Launch, lengths: Sequence[tuple[int, int]], shape: Sequence[int] | None
) -> LaunchTraffic:
    config = cast(BiasGradientConfig, launch.config)
    if shape is None or len(shape) != 4:
        raise InvalidValueError(f"bias_shape = {shape}: must be the four lengths that the plan was given")
    seen = visits(problem, config, lengths)
    keys = problem.num_heads * (seen.keys if shape[2] == 1 else seen.keys_of_tiles)
    read = _inputs(problem, config, seen, keys, 1)
    if problem.varlen:
        sequences = launch.grid[0] * (problem.batch if shape[0] == 1 else 1)  # that blocks locate
        read["cu_seqlens_q"] = read["cu_seqlens_k"] = INDEX * config.threads * sequences * 2
    return LaunchTraffic(nonzero(read), nonzero({"dbias": math.prod(shape) * ELEMENT_BYTES[config.bias_dtype]}))
