"""The backward pass: from a problem and an architecture to kernel configurations, grids and workspaces."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

from cuflash.errors import ConfigError, InvalidShapeError, InvalidValueError
from cuflash.options import Options
from cuflash.plan.arch import Arch
from cuflash.plan.backward_cost import (
    clocks_per_pair,
    column_chunks,
    dq_tile_sums,
    fits,
    registers,
    shared_bytes,
)
from cuflash.plan.config import ELEMENT_BYTES, BackwardConfig, BiasGradientConfig, FinishConfig, PrepareConfig, round_up
from cuflash.plan.forward import FEW_ROWS, aligned, required_fields
from cuflash.plan.launch import MAX_BLOCKS, Launch
from cuflash.plan.tile_lists import TileListPlan, plan_backward_lists
from cuflash.problem import Problem

# block_m, block_n, warps of the gradient of a bias: the first that fits
BIAS_TILES = ((64, 64, 4), (32, 64, 4), (16, 64, 4), (16, 32, 2), (16, 16, 1))
# warps, key warps, block_n
WARPS_AND_KEYS = (
    (8, 8, 128), (8, 4, 128), (4, 4, 128), (8, 4, 64), (8, 2, 64), (4, 4, 64), (4, 2, 64), (2, 2, 32), (1, 1, 16)
)  # fmt: skip
NEUTRAL = {"bias_dtype": "none", "windowed": False, "softcapped": False, "deterministic": True, "mask": ""}
TURN_TILES = 4  # query tiles that share a turn, where
SHORT_VISIT = 2**19  # a visit has at most as many products of S and
MAX_LAG = 1 / 32  # waiting for the first turn costs at most this share of a block's time
COLUMNS = (256, 128, 64)  # of dq, dk and dv that a block computes at most, where not all


@dataclass(frozen=True)
class BackwardPlan:
    """The launches of a pullback in their order and the workspaces that they share.

    The first axis of a shape is the batch entry, of one element if packed.
    """

    launches: tuple[Launch, ...]
    q_tiles: int  # of one head of one batch entry; packed: of one head in all
    k_tiles: int
    row_shape: tuple[int, ...]  # of row_lse and row_delta, (batch, num_heads, rows of all tiles)
    sum_shape: tuple[int, ...]  # of dq_sum (batch, num_heads, q_tiles, chunks, sums)
    turn_shape: tuple[int, ...]  # of turns, uint32 (batch, num_heads, q_tiles, chunks)
    turn_tiles: int  # query tiles that share a turn
    lists: TileListPlan | None  # launched before, where a mask is


def plan_backward(
    problem: Problem,
    arch: Arch,
    *,
    load_bytes: int,
    store_bytes: int,
    bias_shape: tuple[int, int, int, int] | None = None,
    options: Options | None = None,
) -> BackwardPlan:
    """The configuration that the cost model finds cheapest. No length, batch or number of heads decides, but for
    whether there are more than FEW_ROWS queries.

    Parameters
    ----------
    problem : Problem
        With at least one query and one key.
    arch : Arch
        What the kernels are compiled for.
    load_bytes, store_bytes : int
        Widest access, 2 to 16, that every row of q, k, v, out and its cotangent, and of dq, dk and dv, is aligned to.
    bias_shape : tuple, optional
        Of the bias in the array's own lengths, (batch, num_heads, seqlen_q, seqlen_k) or 1 where it is broadcast.
    options : Options, optional
        A precision, an explicit configuration, whether the order of additions to dq is fixed.

    Raises
    ------
    ConfigError
        If options.backward_config does not fit the problem, the rows' alignment or the architecture.
    InvalidValueError
        If a grid would exceed 2**31 - 1 blocks.
    """
    options = options or Options()
    required = required_fields(problem, load_bytes, store_bytes, options) | {"deterministic": options.deterministic}
    config = options.backward_config
    if config is None:
        few_rows = problem.seqlen_q <= FEW_ROWS
        config = _best_config(tuple(required.items()), arch, few_rows, problem.mask_grain)
    else:
        config = replace(config, mask=problem.mask_code)
        _validate(config, required, arch)
    return _plan(problem, config, arch, bias_shape)


@cache
def _best_config(
    required: tuple[tuple[str, Any], ...], arch: Arch, few_rows: bool, grain: tuple[int, int]
) -> BackwardConfig:
    configs = list(_candidates(dict(required), few_rows))
    fitting = [config for config in configs if fits(config, arch)]
    if fitting:
        return min(aligned(fitting, grain), key=lambda config: _rank(config, arch, few_rows))
    # The widest heads: whatever has the shared memory, and spills least.
    return min(
        (config for config in configs if shared_bytes(config) <= arch.shared_per_block),
        key=lambda config: registers(config, arch),
    )


@cache
def check_gradient_shape(dtype: str, head_dim: int, head_dim_v: int, arch: Arch) -> None:
    """Raises InvalidShapeError where not even the smallest tiles of the backward kernel fit the shared memory."""
    size = ELEMENT_BYTES[dtype]
    smallest = BackwardConfig(
        dtype=dtype, bias_dtype="none", head_dim=head_dim, head_dim_v=head_dim_v, block_m=16, block_n=16,
        block_d=round_up(head_dim, 16), block_dv=round_up(head_dim_v, 16), num_warps=1, key_warps=1, num_stages=1,
        load_bytes=size, store_bytes=size, windowed=False, softcapped=False, varlen=False, deterministic=True,
    )  # fmt: skip
    needed, most = shared_bytes(smallest), arch.shared_per_block
    if needed > most:
        raise InvalidShapeError(
            f"q.shape[-1] = {head_dim}, v.shape[-1] = {head_dim_v}: gradients of {dtype} take {needed} bytes of shared "
            f"memory, must be at most {most} on {arch.name}; cast to a narrower dtype, or differentiate on the CPU"
        )


def _rank(config: BackwardConfig, arch: Arch, few_rows: bool) -> float:
    return clocks_per_pair(config, arch, min(config.block_m, FEW_ROWS) if few_rows else config.block_m)


def ranked_backward_configs(problem: Problem, arch: Arch, *, load_bytes: int, store_bytes: int) -> list[BackwardConfig]:
    """Every tiling whose tiles fit the shared memory, whether or not its registers do, in the cost model's order."""
    few_rows = problem.seqlen_q <= FEW_ROWS
    required = required_fields(problem, load_bytes, store_bytes) | {"deterministic": True}
    configs = _candidates(required, few_rows)
    fitting = [config for config in configs if shared_bytes(config) <= arch.shared_per_block]
    return sorted(fitting, key=lambda config: _rank(config, arch, few_rows))


def _candidates(required: dict[str, Any], few_rows: bool) -> Iterator[BackwardConfig]:
    """Every tiling worth a look for few or many query rows."""
    depth, depth_v = round_up(required["head_dim"], 16), round_up(required["head_dim_v"], 16)
    widest = max(depth, depth_v)
    columns = [widest, *(most for most in COLUMNS if most < widest)]
    size = ELEMENT_BYTES[required["dtype"]]
    for block_m in (16,) if few_rows else (128, 64, 32, 16):
        for num_warps, key_warps, block_n in WARPS_AND_KEYS:
            shares = num_warps // key_warps
            if block_m < 16 * shares or (shares > 1 and size > 2) or (size == 8 and block_m > 64 * num_warps):
                continue
            for most in columns:
                for num_stages in (1, 2):
                    yield BackwardConfig(
                        block_m=block_m, block_n=block_n, block_d=min(depth, most), block_dv=min(depth_v, most),
                        num_warps=num_warps, key_warps=key_warps, num_stages=num_stages, **required,
                    )  # fmt: skip


def _validate(config: BackwardConfig, required: dict[str, Any], arch: Arch) -> None:
    """An explicit configuration against the problem, the alignment and the architecture."""
    for field, value in required.items():
        given = getattr(config, field)
        name = f"options.backward_config.{field}"
        if field in ("load_bytes", "store_bytes"):
            if given > value:
                raise ConfigError(f"{name} = {given}: must be at most {value}, the rows' alignment")
        elif given != value:
            where = "options.deterministic is" if field == "deterministic" else "the problem has it"
            raise ConfigError(f"{name} = {given!r}: must be {value!r}, as {where}")
    shared = shared_bytes(config)
    if shared > arch.shared_per_block:
        raise ConfigError(
            f"options.backward_config = {config}: takes {shared} bytes of shared memory, must be at most "
            f"{arch.shared_per_block} on {arch.name}"
        )


def _plan(
    problem: Problem, config: BackwardConfig, arch: Arch, bias_shape: tuple[int, int, int, int] | None
) -> BackwardPlan:
    q_tiles = _tiles(problem, problem.seqlen_q, problem.total_q, config.block_m)
    k_tiles = _tiles(problem, problem.seqlen_k, problem.total_k, config.block_n)
    batch = 1 if problem.varlen else problem.batch
    dq_chunks = -(-config.head_dim // config.block_d)
    same = {field.name: getattr(config, field.name) for field in fields(config)} | NEUTRAL
    query_tiles = q_tiles * batch * problem.num_heads
    launches = [
        _launch(PrepareConfig(**same), query_tiles),
        _launch(config, k_tiles * batch * problem.num_kv_heads * column_chunks(config)),
        _launch(FinishConfig(**same), query_tiles * dq_chunks),
    ]
    if bias_shape is not None:
        launches.append(_bias_launch(config, arch, bias_shape))
    return BackwardPlan(
        tuple(launches),
        q_tiles,
        k_tiles,
        (batch, problem.num_heads, q_tiles * config.block_m),
        (batch, problem.num_heads, q_tiles, dq_chunks, dq_tile_sums(config)),
        (batch, problem.num_heads, q_tiles, dq_chunks),
        _turn_tiles(problem, config, launches[1].grid[0], arch),
        plan_backward_lists(problem, config, q_tiles, k_tiles) if config.mask else None,
    )


def _turn_tiles(problem: Problem, config: BackwardConfig, blocks: int, arch: Arch) -> int:
    """Query tiles that share a turn. Asking for it and passing it on take time, which counts where visits are short;
    but blocks of one head that run together begin a turn apart, and read the more from memory the further they are.
    """
    if config.mask or config.block_m * config.block_n * config.head_dim > SHORT_VISIT:
        return 1
    heads = problem.num_kv_heads * problem.batch * column_chunks(config)  # blocks of one key tile
    together = -(-min(blocks, arch.sm_count) // heads)
    visits = problem.group * -(-problem.seqlen_q // config.block_m) * max(1, blocks // arch.sm_count)
    return TURN_TILES if (together - 1) * TURN_TILES <= MAX_LAG * visits else 1


def _tiles(problem: Problem, length: int, total: int | None, block: int) -> int:
    """Tiles of one head of one batch entry; packed: slots, as `cuflash.plan.forward.q_tiles` counts them."""
    return -(-length // block) if total is None else total // block + problem.batch + 1


def _bias_launch(config: BackwardConfig, arch: Arch, shape: tuple[int, int, int, int]) -> Launch:
    """The gradient of a bias, with the largest tiles whose inputs fit the shared memory."""
    for block_m, block_n, num_warps in BIAS_TILES:
        tiled = BiasGradientConfig(
            dtype=config.dtype, bias_dtype=config.bias_dtype, head_dim=config.head_dim, head_dim_v=config.head_dim_v,
            block_m=min(block_m, config.block_m), block_n=block_n, row_block=config.block_m, num_warps=num_warps,
            load_bytes=config.load_bytes, windowed=config.windowed, softcapped=config.softcapped, varlen=config.varlen,
            mask=config.mask,
        )  # fmt: skip
        if shared_bytes(tiled) <= arch.shared_per_block:
            break
    batch, heads, rows, columns = shape
    return _launch(tiled, batch * heads * -(-rows // tiled.block_m) * -(-columns // tiled.block_n))


def _launch(config: BackwardConfig | BiasGradientConfig, blocks: int) -> Launch:
    if blocks > MAX_BLOCKS:
        raise InvalidValueError(f"grid = {blocks} blocks: must be at most 2**31 - 1; ask for fewer rows in one call")
    return Launch(config, (blocks, 1, 1), (config.threads, 1, 1), shared_bytes(config))
