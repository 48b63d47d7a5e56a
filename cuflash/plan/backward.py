"""The backward pass: from a problem and an architecture to kernel configurations, grids and workspaces."""

from __future__ import annotations

from dataclasses import dataclass, fields

from cuflash.errors import InvalidValueError
from cuflash.options import Options
from cuflash.plan.arch import Arch
from cuflash.plan.backward_cost import backward_shared_bytes, column_chunks, dq_tile_floats
from cuflash.plan.config import BackwardConfig, FinishConfig, PrepareConfig, round_up
from cuflash.plan.forward import MAX_BLOCKS, Launch
from cuflash.problem import Problem


@dataclass(frozen=True)
class BackwardPlan:
    """The launches of a pullback in their order, those of no blocks left out, and the workspaces that they share.

    The shapes' first axis is the batch entry, 1 if packed.
    """

    launches: tuple[Launch, ...]
    q_tiles: int  # of one head of one batch entry; packed: of one head in all
    k_tiles: int
    row_shape: tuple[int, ...]  # of row_lse and row_delta, float32 (batch, num_heads, rows of all tiles)
    sum_shape: tuple[int, ...]  # of dq_sum, float32 (batch, num_heads, q_tiles, chunks, floats)
    turn_shape: tuple[int, ...]  # of turns, uint32 (batch, num_heads, q_tiles, chunks)


def plan_backward(
    problem: Problem,
    arch: Arch,
    *,
    load_bytes: int,
    store_bytes: int,
    options: Options | None = None,
) -> BackwardPlan:
    config = BackwardConfig(
        dtype=problem.dtype, bias_dtype=problem.bias_dtype or "none", head_dim=problem.head_dim,
        head_dim_v=problem.head_dim_v, block_m=64, block_n=128, block_d=round_up(problem.head_dim, 16),
        block_dv=round_up(problem.head_dim_v, 16), num_warps=8, key_warps=8, num_stages=2, load_bytes=load_bytes,
        store_bytes=store_bytes, windowed=problem.windowed, softcapped=problem.softcap != 0, varlen=problem.varlen,
        deterministic=True,
    )  # fmt: skip
    return _plan(problem, config)


def _plan(problem: Problem, config: BackwardConfig) -> BackwardPlan:
    q_tiles = _tiles(problem, problem.seqlen_q, problem.total_q, config.block_m)
    k_tiles = _tiles(problem, problem.seqlen_k, problem.total_k, config.block_n)
    batch = 1 if problem.varlen else problem.batch
    dq_chunks = -(-config.head_dim // config.block_d)
    shared = {field.name: getattr(config, field.name) for field in fields(config)}
    heads = batch * problem.num_heads
    blocks = {
        PrepareConfig(**shared): q_tiles * heads,
        config: k_tiles * batch * problem.num_kv_heads * column_chunks(config),
        FinishConfig(**shared): q_tiles * dq_chunks * heads,
    }
    return BackwardPlan(
        tuple(_launch(config, count) for config, count in blocks.items() if count),
        q_tiles,
        k_tiles,
        (batch, problem.num_heads, q_tiles * config.block_m),
        (batch, problem.num_heads, q_tiles, dq_chunks, dq_tile_floats(config)),
        (batch, problem.num_heads, q_tiles, dq_chunks),
    )


def _tiles(problem: Problem, length: int, total: int | None, block: int) -> int:
    """Tiles of one head of one batch entry; packed: slots, as `cuflash.plan.forward.q_tiles` counts them."""
    return -(-length // block) if total is None else total // block + problem.batch + 1


def _launch(config: BackwardConfig, blocks: int) -> Launch:
    if blocks > MAX_BLOCKS:
        raise InvalidValueError(f"grid = {blocks} blocks: must be at most 2**31 - 1; ask for fewer rows in one call")
    shared = backward_shared_bytes(config) if config.family == "backward" else 0
    return Launch(config, (blocks, 1, 1), (config.threads, 1, 1), shared)
