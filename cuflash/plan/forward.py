"""From a problem and an architecture to kernel configurations, grids and workspaces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import gcd
from typing import TypeVar

from cuflash.errors import ConfigError, InvalidValueError
from cuflash.layout import ALIGNMENT
from cuflash.options import Options
from cuflash.plan.arch import Arch
from cuflash.plan.config import (
    ELEMENT_BYTES,
    MAX_SPLITS,
    BackwardConfig,
    CombineConfig,
    ForwardConfig,
    round_up,
    state_dtype,
)
from cuflash.plan.cost import Work, blocks_per_sm, cycles, fits_registers, shared_bytes
from cuflash.plan.kernel import KernelConfig
from cuflash.plan.launch import MAX_BLOCKS, Launch
from cuflash.plan.shares import EvenWork, even_work
from cuflash.plan.tile_lists import TileListPlan, plan_forward_lists
from cuflash.problem import Problem

MAX_HEAD_DIM = 512
MAX_BLOCK_DV = {"float64": 128}  # else 256
FEW_ROWS = 16  # up to as many queries a sequence, as in decoding, take tiles of their own
LONG = 4096  # keys, and
BUSY_BLOCKS = 64  # blocks a multiprocessor, for which configurations are ranked
MIN_SPLIT_KEYS = 256  # a split of fewer is all overhead
DECODE_TILES = ((16, 1), (32, 2), (64, 4))  # rows and warps, for few queries over a cache
DECODE_WARPS = 6  # of a multiprocessor, which issue what it takes to use the keys and values as fast as they come
MIN_DECODE_SPLIT_KEYS = 64
FEW_KEYS = 128  # of a sequence, not worth a second launch; nor four times as many where the device is full without
COMBINE_WARPS = 4
LEAST_GRAIN = 16  # queries or keys of a mask's blocks by which tiles are chosen, and
LEAST_TILE = 64  # queries and keys of a tile below which it is too slow to gain by that
FEW_STATES = 8  # that one warp merges with all of them under way
MAX_COMBINE_SHARED = 32768  # bytes of a block that merges the parts of its warps

Config = TypeVar("Config", ForwardConfig, BackwardConfig)


@dataclass(frozen=True)
class ForwardPlan:
    """The forward launch and, where the keys are split, the launch that combines the partial states.

    Before it, where a mask is, the launches that list the tiles which the mask shows.
    """

    forward: Launch
    combine: Launch | None
    num_splits: int  # partial states of each query; of even work, of all sequences in all
    q_tiles: int
    lists: TileListPlan | None
    even: EvenWork | None = None


def plan_forward(
    problem: Problem,
    arch: Arch,
    *,
    load_bytes: int,
    store_bytes: int,
    options: Options | None = None,
    sm_count: int | None = None,
) -> ForwardPlan:
    """The configuration that the cost model finds cheapest, and how often the keys are split.

    The configuration follows from everything but the lengths, of which it asks only whether there are more than
    FEW_ROWS queries: a new length, batch or number of heads compiles nothing, except the first problem that is split,
    and the first in more than FEW_STATES parts.

    Parameters
    ----------
    problem : Problem
        With at least one query.
    arch : Arch
        What the kernel is compiled for.
    load_bytes, store_bytes : int
        Widest access, 2 to 16, that every row of q, k and v, and of o, is aligned to.
    options : Options, optional
        A precision, an explicit configuration or number of splits.
    sm_count : int, optional
        Multiprocessors of the device; by default those of the architecture's usual part.

    Raises
    ------
    ConfigError
        If options.config does not fit the problem, the rows' alignment or the architecture.
    InvalidValueError
        If the grid would exceed 2**31 - 1 blocks.
    """
    options = options or Options()
    sms = sm_count or arch.sm_count
    required = required_fields(problem, load_bytes, store_bytes, options)
    paged = problem.block_size is not None
    grouped = paged and problem.group > 1 and problem.seqlen_q <= FEW_ROWS and problem.mask is None
    required |= {"paged": paged, "grouped": grouped}
    if options.config is not None:
        even = options.config.split and options.num_splits is None and _can_be_even(problem)
        config = replace(options.config, mask=problem.mask_code, paged=paged, grouped=grouped, even=even)
        _validate(config, required, options.num_splits, arch)
        if even:
            return _plan_even(problem, config, arch, sms)
        splits = options.num_splits or (_num_splits(problem, config, arch, sms) if config.split else 1)
        return _plan(problem, config, splits)
    rows = problem.seqlen_q * (problem.group if grouped else 1)
    fields = tuple(required.items())

    def best(split: bool) -> ForwardConfig:
        if _is_decode(problem):
            return _decode_config(fields, arch, next((tile for tile in DECODE_TILES if rows <= tile[0]), None), split)
        return _best_config(fields, arch, rows <= FEW_ROWS, split, problem.mask_grain)

    config = best(split=False)
    if options.num_splits is None and _can_be_even(problem) and _is_uneven(problem, config, arch, sms):
        return _plan_even(problem, replace(best(split=True), even=True), arch, sms)
    splits = options.num_splits or _num_splits(problem, config, arch, sms)
    return _plan(problem, best(split=True) if splits > 1 else config, splits)


def _is_decode(problem: Problem) -> bool:
    """Whether every key and value is used by few queries, once: by no more work than it takes to read them."""
    return problem.block_size is not None and problem.seqlen_q <= FEW_ROWS


def _can_be_even(problem: Problem) -> bool:
    """Whether the device can cut the keys of all sequences into shares of the same size."""
    tiles = problem.batch * problem.seqlen_k // 16  # at most, which the device adds up in 32 bits
    return _is_decode(problem) and not problem.varlen and problem.mask is None and tiles < 2**31


def _is_uneven(problem: Problem, config: ForwardConfig, arch: Arch, sms: int) -> bool:
    """Whether lengths may leave the device idle: there are too few blocks, or the last ones may be long."""
    full = _blocks(problem, config) >= sms * blocks_per_sm(config, arch)
    return _most_visible_keys(problem, config.block_m) > (4 * FEW_KEYS if full else FEW_KEYS)


@cache
def _decode_config(
    required: tuple[tuple[str, object], ...], arch: Arch, row_tile: tuple[int, int] | None, split: bool
) -> ForwardConfig:
    """What keeps most bytes under way with warps enough to use them: docs/kernel-decode.md. No length enters.

    `row_tile`: rows and warps that hold all rows of a sequence; None if there are too many for one tile.
    """

    def merit(config: ForwardConfig) -> tuple[float, ...]:
        warps = blocks_per_sm(config, arch) * config.num_warps
        return min(warps, DECODE_WARPS), config.num_stages, config.block_n, -clocks_per_query(config, arch, True)

    configs = []
    if row_tile is not None:
        configs = [config for config in _candidates(dict(required), [row_tile], split) if _fits(config, arch)]
    return max(configs, key=merit) if configs else _best_config(required, arch, False, split)


@cache
def _best_config(
    required: tuple[tuple[str, object], ...], arch: Arch, few_rows: bool, split: bool, grain: tuple[int, int] = (0, 0)
) -> ForwardConfig:
    """The configuration that is cheapest for long sequences. No length enters, so that none asks for a compilation.

    `grain`: of a mask; see `aligned`.
    """
    row_tiles = _row_tiles(dict(required), few_rows)
    configs = [config for config in _candidates(dict(required), row_tiles, split) if _fits(config, arch)]
    return min(aligned(configs, grain), key=lambda config: clocks_per_query(config, arch, few_rows))


def aligned(configs: list[Config], grain: tuple[int, int]) -> list[Config]:
    """Those whose tiles lie within the blocks that a mask is made of, so that none is visible in part, or all.

    `grain`: queries and keys of a block, 0 without. Tiles have at least LEAST_TILE keys where such tiles are.
    """
    most = [max(size, LEAST_TILE) if size >= LEAST_GRAIN else 0 for size in grain]
    if not any(most):
        return configs
    within = [c for c in configs if most[0] % c.block_m == 0 and most[1] % c.block_n == 0]
    return [c for c in within if c.block_n >= LEAST_TILE] or within or configs


def clocks_per_query(config: ForwardConfig, arch: Arch, few_rows: bool) -> float:
    """What the configurations are ranked by: the model's clocks of many long sequences, per query of a tile."""
    tiles = LONG / config.block_n
    rows = min(config.block_m, FEW_ROWS) if few_rows else config.block_m
    return cycles(config, Work(BUSY_BLOCKS * arch.sm_count, tiles, tiles), arch, arch.sm_count) / rows


def ranked_configs(problem: Problem, arch: Arch, *, load_bytes: int, store_bytes: int) -> list[ForwardConfig]:
    """Every tiling whose tiles fit the shared memory, whether or not its registers do, in the cost model's order."""
    few_rows = problem.seqlen_q <= FEW_ROWS
    required = required_fields(problem, load_bytes, store_bytes)
    configs = _candidates(required, _row_tiles(required, few_rows), split=False)
    fitting = [config for config in configs if shared_bytes(config) <= arch.shared_per_block]
    return sorted(fitting, key=lambda config: clocks_per_query(config, arch, few_rows))


def plan_combine(
    dtype: str,
    out_dtype: str,
    head_dim_v: int,
    rows: int,
    *,
    num_states: int,
    load_bytes: int,
    kind: type[CombineConfig] = CombineConfig,
) -> Launch:
    """The launch that merges partial states of `rows` rows: of few states a warp each, else a block each.

    Nothing but the number of states decides, so that a row's bits do not depend on how many rows there are.
    `load_bytes` is the widest access that every row of the states is aligned to.
    """
    parts = COMBINE_WARPS * ELEMENT_BYTES[state_dtype(dtype)] * head_dim_v  # bytes of shared memory
    row_warps = 1 if num_states <= FEW_STATES or parts > MAX_COMBINE_SHARED else COMBINE_WARPS
    config = kind(dtype, out_dtype, head_dim_v, load_bytes, row_warps, COMBINE_WARPS)
    return _launch(config, -(-rows * row_warps // COMBINE_WARPS))


def _plan_even(problem: Problem, config: ForwardConfig, arch: Arch, sms: int) -> ForwardPlan:
    blocks = _blocks(problem, config) // problem.batch  # of a share
    most = -(-_most_visible_keys(problem, config.block_m) // config.block_n)
    most += problem.left is not None  # a window may begin within a tile
    least = -(-MIN_DECODE_SPLIT_KEYS // config.block_n)
    even = even_work(problem.batch, most, least, sms * max(1, blocks_per_sm(config, arch)) // blocks)
    return _plan(problem, config, even.slots, even)


def _plan(problem: Problem, config: ForwardConfig, num_splits: int, even: EvenWork | None = None) -> ForwardPlan:
    blocks = _blocks(problem, config)
    forward = _launch(config, (blocks if even is None else blocks // problem.batch) * num_splits)
    combine = None
    if config.split:
        tokens = problem.batch * problem.seqlen_q if problem.total_q is None else problem.total_q
        rows = tokens * problem.num_heads
        sums = state_dtype(config.dtype)
        combine = plan_combine(
            sums, problem.dtype, config.head_dim_v, rows,
            num_states=MAX_SPLITS if even else num_splits,  # of a sequence, which only the device knows
            load_bytes=gcd(ALIGNMENT, ELEMENT_BYTES[sums] * config.head_dim_v),
        )  # fmt: skip
    tiles = q_tiles(problem, config.block_m, problem.group if config.grouped else 1)
    lists = plan_forward_lists(problem, config, tiles) if config.mask else None
    return ForwardPlan(forward, combine, num_splits, tiles, lists, even)


def _launch(config: KernelConfig, blocks: int) -> Launch:
    if blocks > MAX_BLOCKS:
        raise InvalidValueError(f"grid = {blocks} blocks: must be at most 2**31 - 1; ask for fewer rows in one call")
    return Launch(config, (blocks, 1, 1), (config.threads, 1, 1), shared_bytes(config))


def q_tiles(problem: Problem, block_m: int, each: int = 1) -> int:
    """Query tiles of one head of one batch entry; packed: slots for the tiles of one head in all.

    A packed problem's sequences begin tiles of their own. Sequence b owns the slots from start_b // block_m + b on;
    the tokens past the last sequence count as one more. A query has `each` rows.
    """
    if problem.total_q is None:
        return -(-problem.seqlen_q * each // block_m)
    return problem.total_q * each // block_m + problem.batch + 1


def _blocks(problem: Problem, config: ForwardConfig) -> int:
    """Blocks of a launch, of each split."""
    each = problem.group if config.grouped else 1
    heads = problem.num_heads // each
    tiles = q_tiles(problem, config.block_m, each) * heads * -(-problem.head_dim_v // config.block_dv)
    return tiles if problem.varlen else tiles * problem.batch


def _num_splits(problem: Problem, config: ForwardConfig, arch: Arch, sms: int) -> int:
    """1 if the query tiles fill the device or see few keys; else the fewest splits that nearly fill it.

    Decoding fills it with as many blocks as it holds, others with one a multiprocessor.
    """
    blocks, decode = _blocks(problem, config), _is_decode(problem)
    visible = _most_visible_keys(problem, config.block_m)
    slots = sms * blocks_per_sm(config, arch)
    if blocks >= 0.8 * (slots if decode else sms) or visible <= 4 * config.block_n:
        return 1
    efficiency = {}
    least = MIN_DECODE_SPLIT_KEYS if decode else MIN_SPLIT_KEYS
    for splits in range(1, min(MAX_SPLITS, -(-visible // least)) + 1):
        efficiency[splits] = blocks * splits / slots / -(-blocks * splits // slots)
    best = max(efficiency.values())
    return next(splits for splits, value in efficiency.items() if value >= 0.85 * best)


def _most_visible_keys(problem: Problem, block_m: int) -> int:
    """Keys that the last or the middle query tile sees, whichever is more; if packed, of the longest sequence."""
    begin, end = problem.key_range(max(problem.seqlen_q - block_m, 0), problem.seqlen_q)
    half = problem.seqlen_q // 2
    half_begin, half_end = problem.key_range(half, min(half + block_m, problem.seqlen_q))
    return max(end - begin, half_end - half_begin, 0)


def required_fields(
    problem: Problem, load_bytes: int, store_bytes: int, options: Options | None = None
) -> dict[str, object]:
    """Fields of a configuration, of the forward and of the backward pass, that follow from what is asked."""
    precision = options.precision if options is not None else None
    return {
        "dtype": precision or problem.dtype,
        "bias_dtype": problem.bias_dtype or "none",
        "head_dim": problem.head_dim,
        "head_dim_v": problem.head_dim_v,
        "load_bytes": load_bytes,
        "store_bytes": store_bytes,
        "windowed": problem.windowed,
        "softcapped": problem.softcap != 0.0,
        "varlen": problem.varlen,
        "mask": problem.mask_code,
    }


def _row_tiles(required: dict[str, object], few_rows: bool) -> list[tuple[int, int]]:
    """Rows and warps of the tilings for few or many query rows."""
    wide = ELEMENT_BYTES[str(required["dtype"])] > 2
    return [(16, 1)] if few_rows else [(128, 4), (128, 8), (64, 4), (32, 2), *[(16, 1)] * wide]


def _candidates(
    required: dict[str, object], row_tiles: Sequence[tuple[int, int]], split: bool
) -> Iterator[ForwardConfig]:
    """Every tiling worth a look with these rows and warps."""
    dtype: str = required["dtype"]  # type: ignore[assignment]
    head_dim_v: int = required["head_dim_v"]  # type: ignore[assignment]
    if split:
        required["store_bytes"] = partial_store_bytes(dtype, head_dim_v)
    chunks = -(-head_dim_v // MAX_BLOCK_DV.get(dtype, 256))
    block_dv = round_up(-(-head_dim_v // chunks), 16)
    wide = ELEMENT_BYTES[dtype] > 2
    key_tiles = [32, 16] if dtype in ("float32", "float64") else [128, 96, 64, 48, 32, 16]
    if dtype == "tf32":
        key_tiles.remove(128)
    if len(row_tiles) == 1 and not wide:
        key_tiles.remove(16)
    for block_m, num_warps in row_tiles:
        for block_n in key_tiles:
            if dtype == "float32" and block_m > 16 * num_warps and block_n < 32:
                continue  # the assembler spills more than with 32
            for num_stages in (1, 2):
                for q_in_registers in (False, True)[: 1 if dtype == "float32" else 2]:
                    yield ForwardConfig(
                        block_m=block_m, block_n=block_n, block_dv=block_dv, num_warps=num_warps,
                        num_stages=num_stages, q_in_registers=q_in_registers, split=split,
                        **required,  # type: ignore[arg-type]
                    )  # fmt: skip


@cache
def max_head_dim(dtype: str, arch: Arch) -> int:
    """The largest head dimension, in steps of 16, of which tiles fit into shared memory."""

    def smallest(head_dim: int) -> ForwardConfig:
        size = ELEMENT_BYTES[dtype]
        return ForwardConfig(
            dtype=dtype, bias_dtype="none", head_dim=head_dim, head_dim_v=MAX_HEAD_DIM, block_m=16, block_n=16,
            block_dv=MAX_BLOCK_DV.get(dtype, 256), num_warps=1, num_stages=1, q_in_registers=False, load_bytes=size,
            store_bytes=size, windowed=False, softcapped=False, varlen=False, split=False,
        )  # fmt: skip

    return max(dim for dim in range(16, MAX_HEAD_DIM + 1, 16) if shared_bytes(smallest(dim)) <= arch.shared_per_block)


def partial_store_bytes(dtype: str, head_dim_v: int) -> int:
    """Alignment of a row of a contiguous workspace of partial states, as far as the kernel uses it."""
    return ELEMENT_BYTES[state_dtype(dtype)] * (2 if head_dim_v % 2 == 0 else 1)


def _fits(config: ForwardConfig, arch: Arch) -> bool:
    return shared_bytes(config) <= arch.shared_per_block and fits_registers(config, arch)


def _validate(config: ForwardConfig, required: dict[str, object], num_splits: int | None, arch: Arch) -> None:
    """An explicit configuration against the problem, the alignment and the architecture."""
    for field, value in required.items():
        given = getattr(config, field)
        if field == "store_bytes" and config.split:
            value = partial_store_bytes(config.dtype, config.head_dim_v)
        if field in ("load_bytes", "store_bytes"):
            if given > value:
                raise ConfigError(f"options.config.{field} = {given}: must be at most {value}, the rows' alignment")
        elif given != value:
            raise ConfigError(f"options.config.{field} = {given!r}: must be {value!r}, as the problem has it")
    if num_splits is not None and num_splits > 1 and not config.split:
        raise ConfigError(f"options.config.split = False: must be True for options.num_splits = {num_splits}")
    if config.block_dv > round_up(config.head_dim_v, 16):
        raise ConfigError(
            f"options.config.block_dv = {config.block_dv}: must be at most {round_up(config.head_dim_v, 16)}, "
            f"head_dim_v in steps of 16"
        )
    if shared_bytes(config) > arch.shared_per_block:
        raise ConfigError(
            f"options.config = {config}: takes {shared_bytes(config)} bytes of shared memory, must be at most "
            f"{arch.shared_per_block} on {arch.name}"
        )
