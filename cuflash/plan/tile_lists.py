"""Lists of the tiles that a mask shows: how large they are, and the kernels that find them.

A forward pass wants of each query tile its key tiles: `lists` (batch, heads, q_tiles, key tiles of a sequence) has the
partial ones from the front and the full ones from the back, `counts` (batch, heads, q_tiles, 2) how many of each. A
backward pass wants of each key tile its query tiles, each with its turn in the order of additions to dq: `lists`
(batch, kv_heads, k_tiles, query tiles of a sequence, 2) and `counts` (batch, kv_heads, k_tiles), made from `turns`
(batch, heads, q_tiles, key tiles of a sequence). The axes batch and heads are 1 where the mask does not depend on them;
in a packed problem a tile's slot says whose it is.
"""

from __future__ import annotations

from dataclasses import dataclass

from cuflash.errors import InvalidValueError
from cuflash.plan.config import BackwardConfig, ForwardConfig, TileColumnsConfig, TileRowsConfig
from cuflash.plan.launch import MAX_BLOCKS, Launch
from cuflash.problem import Problem

ROW_WARPS, COLUMN_WARPS = 8, 4


@dataclass(frozen=True)
class TileListPlan:
    """The launches that make lists, in their order, and the shapes of int32 arrays."""

    launches: tuple[Launch, ...]
    sizes: tuple[int, int, int]  # what else lists depend on: seqlen_q, seqlen_k and, if on heads, num_kv_heads
    tiles: tuple[int, int]  # of queries and of keys, of one head of one batch entry; packed: of one head in all
    list_shape: tuple[int, ...]
    count_shape: tuple[int, ...]
    turn_shape: tuple[int, ...] | None  # of the backward pass


def plan_forward_lists(problem: Problem, config: ForwardConfig, q_tiles: int) -> TileListPlan:
    """Key tiles by query tile, for a forward kernel."""
    batch, heads = _axes(problem)
    rows = (batch, heads, q_tiles)
    row_config = TileRowsConfig(
        config.block_m, config.block_n, ROW_WARPS, problem.varlen, False, config.mask, config.paged
    )
    pitch = max(1, -(-problem.seqlen_k // config.block_n))
    launch = _launch(row_config, rows)
    return TileListPlan((launch,), _sizes(problem), (q_tiles, 0), (*rows, pitch), (*rows, 2), None)


def plan_backward_lists(problem: Problem, config: BackwardConfig, q_tiles: int, k_tiles: int) -> TileListPlan:
    """Query tiles by key tile, for a backward kernel."""
    batch, heads = _axes(problem)
    by_head = heads > 1
    rows, columns = (batch, heads, q_tiles), (batch, problem.num_kv_heads if by_head else 1, k_tiles)
    fields = config.block_m, config.block_n
    launches = (
        _launch(TileRowsConfig(*fields, ROW_WARPS, problem.varlen, True, config.mask), rows),
        _launch(TileColumnsConfig(*fields, COLUMN_WARPS, problem.varlen, True, config.mask), columns),
    )
    pitch = -(-problem.seqlen_q // config.block_m) * (problem.group if by_head else 1)
    return TileListPlan(
        launches,
        _sizes(problem),
        (q_tiles, k_tiles),
        (*columns, pitch, 2),
        columns,
        (*rows, -(-problem.seqlen_k // config.block_n)),
    )


def _sizes(problem: Problem) -> tuple[int, int, int]:
    by_head = problem.mask is not None and problem.mask.by_head
    return problem.seqlen_q, problem.seqlen_k, problem.num_kv_heads if by_head else 0


def _axes(problem: Problem) -> tuple[int, int]:
    """Batch entries and heads that have lists of their own."""
    mask = problem.mask
    if mask is None:
        raise InvalidValueError(f"problem = {problem}: must have a mask")
    # Over a paged cache sequences have lengths of their own.
    by_batch = (mask.by_batch or problem.block_size is not None) and not problem.varlen
    return problem.batch if by_batch else 1, problem.num_heads if mask.by_head else 1


def _launch(config: TileRowsConfig, tiles: tuple[int, int, int]) -> Launch:
    blocks = tiles[0] * tiles[1] * tiles[2]
    if blocks > MAX_BLOCKS:
        raise InvalidValueError(f"grid = {blocks} blocks: must be at most 2**31 - 1; ask for fewer rows in one call")
    return Launch(config, (blocks, 1, 1), (config.threads, 1, 1), 0)
