"""Global memory that the launches of a forward plan read and write, exact to the byte, by array.

A byte counts as often as an instruction asks for it: what two blocks read counts twice, in a cache or not. What the
kernels do, and this module therefore counts:

- a block reads its queries once, unless it has no key tile to visit;
- of the keys and values it reads those of `Problem.key_range`, once per chunk of output columns (values: its chunk's
  columns), and of a bias the elements of these keys and its queries, masked or not;
- it writes its rows of o (and, the first chunk, of lse) once; a split of the keys writes a partial state, also
  where its share is empty, and the combine launch reads all of them once;
- of a packed problem each block reads the cu_seqlens that its search passes, and the ends of its sequence;
- under a mask a block reads how many tiles its list has, the entries of its share of them, and of these tiles every key
  that exists. What the expression of a mask looks up, the arrays mask_*, is not counted: it is asked for score by score
  of partial tiles, and differs from mask to mask.

The lists are made once for a mask and its lengths, a packed problem's in every call: `list_traffic` counts that.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, cast

from cuflash.errors import InvalidValueError
from cuflash.masks.program import Program
from cuflash.plan.config import ELEMENT_BYTES, ForwardConfig, TileRowsConfig, state_dtype
from cuflash.plan.forward import ForwardPlan
from cuflash.plan.masked_tiles import groups, visited_tiles
from cuflash.plan.tile_lists import TileListPlan
from cuflash.problem import Problem

INDEX = 4  # bytes of an entry of cu_seqlens, of a list of key tiles and of a count


@dataclass(frozen=True)
class LaunchTraffic:
    """Bytes by array, named as in `FORWARD_PARAMS` and `BACKWARD_PARAMS`; a split's are o_partial and lse_partial."""

    read: dict[str, int]
    written: dict[str, int]


class QueryTile(NamedTuple):
    """What the blocks of one query tile of one head see."""

    rows: int
    keys: int  # visible to at least one of the rows; under a mask, those of the tiles
    key_tiles: int  # that hold them


def query_tiles(problem: Problem, config: ForwardConfig, seqlen_q: int, seqlen_k: int) -> Iterator[QueryTile]:
    """The query tiles of one sequence and one head, as the forward kernel walks them."""
    for row in range(0, seqlen_q, config.block_m):
        rows = min(config.block_m, seqlen_q - row)
        begin, end = problem.key_range(row, row + rows, seqlen_q, seqlen_k)
        if begin < end:
            yield QueryTile(rows, end - begin, -(-end // config.block_n) - begin // config.block_n)
        else:
            yield QueryTile(rows, 0, 0)


def all_query_tiles(
    problem: Problem,
    config: ForwardConfig,
    cu_seqlens_q: Sequence[int] | None = None,
    cu_seqlens_k: Sequence[int] | None = None,
) -> Iterator[tuple[QueryTile, int]]:
    """Query tiles of all sequences and heads, and how often each occurs."""
    mask = problem.mask
    if mask is None:
        for lengths, count in Counter(sequence_lengths(problem, cu_seqlens_q, cu_seqlens_k)).items():
            for tile in query_tiles(problem, config, *lengths):
                yield tile, count * problem.num_heads
        return
    for group in groups(problem, mask, cu_seqlens_q, cu_seqlens_k):
        for place in group.places:
            tiles = visited_tiles(mask, place, config.block_m, config.block_n)
            keys, counts = tiles.visited @ tiles.keys, tiles.visited.sum(axis=1)
            for row in zip(tiles.rows.tolist(), keys.tolist(), counts.tolist(), strict=True):
                yield QueryTile(*row), group.times * group.heads
    behind = tokens(problem)[0] - sum(length for length, _ in sequence_lengths(problem, cu_seqlens_q, cu_seqlens_k))
    for row_begin in range(0, behind, config.block_m):  # queries of no sequence have lists of nothing
        yield QueryTile(min(config.block_m, behind - row_begin), 0, 0), problem.num_heads


def forward_traffic(
    problem: Problem,
    plan: ForwardPlan,
    *,
    return_lse: bool = False,
    cu_seqlens_q: Sequence[int] | None = None,
    cu_seqlens_k: Sequence[int] | None = None,
) -> tuple[LaunchTraffic, ...]:
    """Traffic of each launch of a plan: forward and, where the keys are split, combine.

    A packed problem takes its cu_seqlens on the host, monotone and within the totals; raises InvalidValueError
    without them.
    """
    config = cast(ForwardConfig, plan.forward.config)
    chunks = -(-config.head_dim_v // config.block_dv)
    element = ELEMENT_BYTES[config.dtype]
    bias_element = 0 if problem.bias_dtype is None else ELEMENT_BYTES[problem.bias_dtype]
    wide = sum_bytes(config.dtype)
    read: Counter[str] = Counter()
    for tile, heads in all_query_tiles(problem, config, cu_seqlens_q, cu_seqlens_k):
        read["q"] += heads * chunks * min(plan.num_splits, tile.key_tiles) * tile.rows * config.head_dim * element
        read["k"] += heads * chunks * tile.keys * config.head_dim * element
        read["v"] += heads * tile.keys * config.head_dim_v * element
        read["bias"] += heads * chunks * tile.keys * tile.rows * bias_element
        if plan.lists is not None:
            read["tile_lists"] += INDEX * heads * chunks * tile.key_tiles
            read["tile_counts"] += 2 * INDEX * heads * chunks * plan.num_splits
    if cu_seqlens_q is not None:
        blocks = plan.num_splits * chunks * problem.num_heads  # that share a slot
        slots = slot_owners(cu_seqlens_q, config.block_m, plan.q_tiles)
        read["cu_seqlens_q"] = INDEX * blocks * (slots.steps + 2 * slots.owned + slots.spare)
        read["cu_seqlens_k"] = INDEX * blocks * (2 * slots.owned + slots.spare)

    rows = problem.num_heads * tokens(problem)[0]
    result = {"o": rows * config.head_dim_v * element}
    if return_lse:
        result["lse"] = rows * wide
    if plan.combine is None:
        return (LaunchTraffic(nonzero(read), nonzero(result)),)
    states = plan.num_splits * rows * wide
    partial = nonzero({"o_partial": states * config.head_dim_v, "lse_partial": states})
    return LaunchTraffic(nonzero(read), partial), LaunchTraffic(partial, nonzero(result))


def list_traffic(
    problem: Problem,
    plan: TileListPlan,
    *,
    cu_seqlens_q: Sequence[int] | None = None,
    cu_seqlens_k: Sequence[int] | None = None,
) -> tuple[LaunchTraffic, ...]:
    """Traffic of the launches that make a mask's lists, of a forward or a backward plan, but for the arrays mask_*."""
    rows = cast(TileRowsConfig, plan.launches[0].config)
    entries, pairs = 0, 0  # tiles that are visited, and all, of the heads and batch entries that have lists
    for group in groups(problem, cast(Program, problem.mask), cu_seqlens_q, cu_seqlens_k):
        for place in group.places:
            visited = visited_tiles(cast(Program, problem.mask), place, rows.block_m, rows.block_n).visited
            entries, pairs = entries + int(visited.sum()), pairs + visited.size
    lists = math.prod(plan.count_shape) * INDEX
    found = LaunchTraffic(
        _search(problem, rows, plan, 0, cu_seqlens_q, cu_seqlens_k),
        nonzero({"tile_turns": INDEX * pairs} if rows.turns else {"tile_lists": INDEX * entries, "tile_counts": lists}),
    )
    if not rows.turns:
        return (found,)
    columns = cast(TileRowsConfig, plan.launches[1].config)
    read = {"tile_turns": INDEX * pairs} | _search(problem, columns, plan, 1, cu_seqlens_q, cu_seqlens_k)
    return found, LaunchTraffic(nonzero(read), nonzero({"tile_lists": 2 * INDEX * entries, "tile_counts": lists}))


def _search(
    problem: Problem,
    config: TileRowsConfig,
    plan: TileListPlan,
    axis: int,
    cu_seqlens_q: Sequence[int] | None,
    cu_seqlens_k: Sequence[int] | None,
) -> dict[str, int]:
    """What the threads of all blocks read of cu_seqlens to find whose slot they have, along queries (0) or keys (1)."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return {}
    own, block = ((cu_seqlens_q, config.block_m), (cu_seqlens_k, config.block_n))[axis]
    slots = slot_owners(own, block, plan.tiles[axis])
    times = INDEX * config.threads * plan.launches[axis].grid[0] // plan.tiles[axis]
    ends = times * (2 * slots.owned + slots.spare)
    searched, other = ("cu_seqlens_q", "cu_seqlens_k") if axis == 0 else ("cu_seqlens_k", "cu_seqlens_q")
    return {searched: times * slots.steps + ends, other: ends}


def nonzero(counts: dict[str, int]) -> dict[str, int]:
    return {name: count for name, count in counts.items() if count}


def sum_bytes(dtype: str) -> int:
    """Of lse, of partial states and of sums in memory."""
    return ELEMENT_BYTES[state_dtype(dtype)]


def tokens(problem: Problem) -> tuple[int, int]:
    """Queries and keys of one head, of all sequences; packed: also those behind the last sequence."""
    if problem.total_q is None or problem.total_k is None:
        return problem.batch * problem.seqlen_q, problem.batch * problem.seqlen_k
    return problem.total_q, problem.total_k


def sequence_lengths(
    problem: Problem, cu_seqlens_q: Sequence[int] | None = None, cu_seqlens_k: Sequence[int] | None = None
) -> list[tuple[int, int]]:
    """(queries, keys) of every sequence: the batch of a dense problem, differences of cu_seqlens of a packed one."""
    if not problem.varlen:
        return [(problem.seqlen_q, problem.seqlen_k)] * problem.batch
    lengths = []
    for name, ends in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if ends is None or len(ends) != problem.batch + 1:
            raise InvalidValueError(f"{name} = {ends}: must list the {problem.batch + 1} ends of packed sequences")
        lengths.append([int(end) - int(begin) for begin, end in pairwise(ends)])
    return list(zip(*lengths, strict=True))


class SlotOwners(NamedTuple):
    """Whose the tile slots of a packed axis are, and how long blocks search for that."""

    steps: int  # of the bisections of one block per slot, each of which reads an entry of cu_seqlens
    owned: int  # slots of the sequences
    spare: int  # of the tokens behind the last sequence


def slot_owners(cu_seqlens: Sequence[int], block: int, slots: int) -> SlotOwners:
    """The slots of tiles of `block` tokens; sequence b owns those from cu_seqlens[b] // block + b on."""
    first = [int(start) // block + b for b, start in enumerate(cu_seqlens)]
    counts = [end - begin for begin, end in pairwise([0, *first[1:], slots])]
    depths = _search_steps(len(cu_seqlens))
    steps = sum(count * depth for count, depth in zip(counts, depths, strict=True))
    return SlotOwners(steps, sum(counts[:-1]), counts[-1])


def _search_steps(count: int) -> list[int]:
    """Steps after which the kernel's bisection of [0, count) ends at each index."""
    steps = [0] * count
    open_ranges = [(0, count, 0)]
    while open_ranges:
        low, high, depth = open_ranges.pop()
        if high - low <= 1:
            steps[low] = depth
        else:
            middle = low + (high - low) // 2
            open_ranges += [(low, middle, depth + 1), (middle, high, depth + 1)]
    return steps
