"""Global memory that the launches of a plan read and write, exact to the byte, by array.

A byte counts as often as an instruction asks for it: what two blocks read counts twice, in a cache or not. What the
kernels do, and this module therefore counts:

- a block reads its queries once, unless it has no key tile to visit;
- of the keys and values it reads those of `Problem.key_range`, once per chunk of output columns (values: its chunk's
  columns), and of a bias the elements of these keys and its queries, masked or not;
- it writes its rows of o (and, the first chunk, of lse) once; a split of the keys writes a float32 partial state, also
  where its share is empty, and the combine launch reads all of them once;
- of a packed problem each block reads the cu_seqlens that its search passes, and the ends of its sequence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, cast

from cuflash.errors import InvalidValueError
from cuflash.plan.config import ForwardConfig
from cuflash.plan.forward import ForwardPlan
from cuflash.problem import Problem

DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
FLOAT = 4  # lse and partial states
INDEX = 4  # an entry of cu_seqlens


@dataclass(frozen=True)
class LaunchTraffic:
    """Bytes by array name: q, k, v, bias, cu_seqlens_q, cu_seqlens_k, o, lse, o_partial, lse_partial."""

    read: dict[str, int]
    written: dict[str, int]


class QueryTile(NamedTuple):
    """What the blocks of one query tile of one head see."""

    rows: int
    keys: int  # visible to at least one of the rows
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
    element = DTYPE_BYTES[config.dtype]
    bias_element = 0 if problem.bias_dtype is None else DTYPE_BYTES[problem.bias_dtype]
    read: Counter[str] = Counter()
    for (len_q, len_k), count in Counter(_lengths(problem, cu_seqlens_q, cu_seqlens_k)).items():
        heads = count * problem.num_heads
        for tile in query_tiles(problem, config, len_q, len_k):
            read["q"] += heads * chunks * min(plan.num_splits, tile.key_tiles) * tile.rows * config.head_dim * element
            read["k"] += heads * chunks * tile.keys * config.head_dim * element
            read["v"] += heads * tile.keys * config.head_dim_v * element
            read["bias"] += heads * chunks * tile.keys * tile.rows * bias_element
    if cu_seqlens_q is not None:
        blocks = plan.num_splits * chunks * problem.num_heads  # that share a slot
        for name, count in _index_reads(cu_seqlens_q, config.block_m, plan.q_tiles).items():
            read[name] = INDEX * blocks * count

    rows = problem.num_heads * (problem.batch * problem.seqlen_q if problem.total_q is None else problem.total_q)
    result = {"o": rows * config.head_dim_v * element}
    if return_lse:
        result["lse"] = rows * FLOAT
    if plan.combine is None:
        return (LaunchTraffic(_nonzero(read), _nonzero(result)),)
    states = plan.num_splits * rows * FLOAT
    partial = _nonzero({"o_partial": states * config.head_dim_v, "lse_partial": states})
    return LaunchTraffic(_nonzero(read), partial), LaunchTraffic(partial, _nonzero(result))


def _nonzero(counts: dict[str, int]) -> dict[str, int]:
    return {name: count for name, count in counts.items() if count}


def _lengths(
    problem: Problem, cu_seqlens_q: Sequence[int] | None, cu_seqlens_k: Sequence[int] | None
) -> list[tuple[int, int]]:
    """(len_q, len_k) of every sequence."""
    if not problem.varlen:
        return [(problem.seqlen_q, problem.seqlen_k)] * problem.batch
    if cu_seqlens_q is None or cu_seqlens_k is None:
        raise InvalidValueError("cu_seqlens_q = None: must be given, with cu_seqlens_k, for a packed problem")
    lengths = ([b - a for a, b in pairwise(ends)] for ends in (cu_seqlens_q, cu_seqlens_k))
    return list(zip(*lengths, strict=True))


def _index_reads(cu_seqlens_q: Sequence[int], block_m: int, slots: int) -> dict[str, int]:
    """Entries of cu_seqlens that one block per slot reads: the steps of its search and the ends of its sequence."""
    batch = len(cu_seqlens_q) - 1
    first = [start // block_m + b for b, start in enumerate(cu_seqlens_q)] + [slots]  # slot of each sequence
    depth = _search_steps(batch + 1)
    counts = {"cu_seqlens_q": 0, "cu_seqlens_k": 0}
    for b in range(batch + 1):
        owned = first[b + 1] - (0 if b == 0 else first[b])
        ends = 2 if b < batch else 0
        counts["cu_seqlens_q"] += owned * (depth[b] + max(ends, 1))
        counts["cu_seqlens_k"] += owned * ends
    return counts


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
