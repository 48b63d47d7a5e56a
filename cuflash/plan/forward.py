"""From a problem and an architecture to kernel configurations, grids and workspaces."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from cuflash.errors import ConfigError, InvalidValueError
from cuflash.options import Options
from cuflash.plan.arch import Arch
from cuflash.plan.config import MAX_SPLITS, CombineConfig, ForwardConfig, KernelConfig, round_up
from cuflash.plan.cost import MAX_REGISTERS, Work, blocks_per_sm, cycles, registers, shared_bytes
from cuflash.problem import Problem

MAX_BLOCKS = 2**31 - 1
MAX_BLOCK_DV = 256
MIN_SPLIT_KEYS = 256  # a split of fewer is all overhead
COMBINE_WARPS = 4


@dataclass(frozen=True)
class Launch:
    """One kernel launch: a configuration, its grid and block, and its dynamic shared memory in bytes."""

    config: KernelConfig
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int


@dataclass(frozen=True)
class ForwardPlan:
    """The forward launch and, where the keys are split, the launch that combines the partial states."""

    forward: Launch
    combine: Launch | None
    num_splits: int
    q_tiles: int


def plan_forward(
    problem: Problem,
    arch: Arch,
    *,
    load_bytes: int,
    store_bytes: int,
    options: Options | None = None,
    sm_count: int | None = None,
) -> ForwardPlan:
    """The cheapest configuration and split for a problem, by the cost model.

    Parameters
    ----------
    problem : Problem
        Of dtype float16 or bfloat16, with at least one query.
    arch : Arch
        What the kernel is compiled for.
    load_bytes, store_bytes : int
        Widest access, 2 to 16, that every row of q, k and v, and of o, is aligned to.
    options : Options, optional
        An explicit configuration or number of splits.
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
    required = _required(problem, load_bytes, store_bytes)
    if options.config is None:
        configs = [config for config in _candidates(required, options.num_splits) if _fits(config, arch)]
    else:
        _validate(options.config, required, options.num_splits, arch)
        configs = [options.config]
    best = min(
        ((config, splits) for config in configs for splits in _splits(problem, config, arch, sms, options.num_splits)),
        key=lambda choice: cycles(choice[0], _work(problem, *choice), arch, sms),
    )
    return _plan(problem, *best)


def plan_combine(state_dtype: str, out_dtype: str, head_dim_v: int, rows: int) -> Launch:
    """The launch that merges partial states of `rows` rows, a warp each."""
    config = CombineConfig(state_dtype, out_dtype, head_dim_v, COMBINE_WARPS)
    return _launch(config, -(-rows // config.num_warps))


def _plan(problem: Problem, config: ForwardConfig, num_splits: int) -> ForwardPlan:
    forward = _launch(config, _work(problem, config, num_splits).blocks)
    combine = None
    if config.split:
        tokens = problem.batch * problem.seqlen_q if problem.total_q is None else problem.total_q
        combine = plan_combine("float32", config.dtype, config.head_dim_v, tokens * problem.num_heads)
    return ForwardPlan(forward, combine, num_splits, q_tiles(problem, config.block_m))


def _launch(config: KernelConfig, blocks: int) -> Launch:
    if blocks > MAX_BLOCKS:
        raise InvalidValueError(f"grid = {blocks} blocks: must be at most 2**31 - 1; ask for fewer rows in one call")
    return Launch(config, (blocks, 1, 1), (config.threads, 1, 1), shared_bytes(config))


def q_tiles(problem: Problem, block_m: int) -> int:
    """Query tiles of one head of one batch entry; packed: slots for the tiles of one head in all.

    A packed problem's sequences begin tiles of their own. Sequence b owns the slots from start_b // block_m + b on;
    the tokens past the last sequence count as one more.
    """
    if problem.total_q is None:
        return -(-problem.seqlen_q // block_m)
    return problem.total_q // block_m + problem.batch + 1


def _work(problem: Problem, config: ForwardConfig, num_splits: int) -> Work:
    """Blocks of the launch and the key tiles that the longest of them visits."""
    tiles = q_tiles(problem, config.block_m)
    blocks = tiles * problem.num_heads * -(-problem.head_dim_v // config.block_dv) * num_splits
    if not problem.varlen:
        blocks *= problem.batch
    key_tiles = _key_tiles(problem, config.block_m, config.block_n)
    return Work(blocks, max(key_tiles) / num_splits, sum(key_tiles) / len(key_tiles) / num_splits)


def _key_tiles(problem: Problem, block_m: int, block_n: int) -> list[int]:
    """Key tiles visited by some query tiles, evenly spread; a packed problem is taken as one of its longest sequences."""
    rows = problem.seqlen_q
    count = -(-rows // block_m)
    sample = range(0, max(count, 1), max(1, count // 16))
    counts = []
    for tile in sample:
        begin, end = problem.key_range(tile * block_m, min((tile + 1) * block_m, rows))
        counts.append(-(-end // block_n) - begin // block_n if begin < end else 0)
    return counts


def _splits(problem: Problem, config: ForwardConfig, arch: Arch, sms: int, asked: int | None) -> list[int]:
    """Numbers of key splits worth trying: 1 if the query tiles fill the device; else the fewest that nearly do."""
    if asked is not None:
        return [asked]
    if not config.split:
        return [1]
    key_tiles = max(_key_tiles(problem, config.block_m, config.block_n))
    blocks = _work(problem, config, 1).blocks
    if blocks >= 0.8 * sms or key_tiles <= 4:
        return [1]
    slots = sms * blocks_per_sm(config, arch)
    efficiency = {}
    for splits in range(1, min(MAX_SPLITS, -(-key_tiles * config.block_n // MIN_SPLIT_KEYS)) + 1):
        waves = blocks * splits / slots
        efficiency[splits] = waves / -(-blocks * splits // slots)
    best = max(efficiency.values())
    return [next(splits for splits, value in efficiency.items() if value >= 0.85 * best)]


def _required(problem: Problem, load_bytes: int, store_bytes: int) -> dict[str, object]:
    """Fields of a configuration that follow from the problem."""
    return {
        "dtype": problem.dtype,
        "bias_dtype": problem.bias_dtype or "none",
        "head_dim": problem.head_dim,
        "head_dim_v": problem.head_dim_v,
        "load_bytes": load_bytes,
        "store_bytes": store_bytes,
        "windowed": problem.windowed,
        "softcapped": problem.softcap != 0.0,
        "varlen": problem.varlen,
    }


def _candidates(required: dict[str, object], num_splits: int | None) -> Iterator[ForwardConfig]:
    """Every tiling worth a look, with and without split keys unless their number is given."""
    head_dim_v: int = required["head_dim_v"]  # type: ignore[assignment]
    chunks = -(-head_dim_v // MAX_BLOCK_DV)
    block_dv = round_up(-(-head_dim_v // chunks), 16)
    for block_m, num_warps in ((128, 4), (128, 8), (64, 4), (32, 2), (16, 1)):
        for block_n in (128, 96, 64, 48, 32, 16):
            for num_stages in (1, 2):
                for q_in_registers in (False, True):
                    config = ForwardConfig(
                        block_m=block_m, block_n=block_n, block_dv=block_dv, num_warps=num_warps,
                        num_stages=num_stages, q_in_registers=q_in_registers, split=False,
                        **required,  # type: ignore[arg-type]
                    )  # fmt: skip
                    if num_splits is None or num_splits == 1:
                        yield config
                    if num_splits is None or num_splits > 1:
                        yield replace(config, split=True, store_bytes=partial_store_bytes(head_dim_v))


def partial_store_bytes(head_dim_v: int) -> int:
    """Alignment of a row of a contiguous float32 workspace, as far as the kernel uses it."""
    return 8 if head_dim_v % 2 == 0 else 4


def _fits(config: ForwardConfig, arch: Arch) -> bool:
    return shared_bytes(config) <= arch.shared_per_block and registers(config) <= MAX_REGISTERS


def _validate(config: ForwardConfig, required: dict[str, object], num_splits: int | None, arch: Arch) -> None:
    """An explicit configuration against the problem, the alignment and the architecture."""
    for field, value in required.items():
        given = getattr(config, field)
        if field == "store_bytes" and config.split:
            value = partial_store_bytes(config.head_dim_v)
        if field in ("load_bytes", "store_bytes"):
            if given > value:  # type: ignore[operator]
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
