"""What a configuration of the backward kernel costs: shared memory, registers, occupancy, and a model of its time.

The model ranks configurations by a multiprocessor's clocks per pair of a query and a key; it does not predict times.
"""

from __future__ import annotations

from typing import NamedTuple

from cuflash.plan.arch import Arch
from cuflash.plan.config import ELEMENT_BYTES, BackwardConfig, BiasGradientConfig, round_up
from cuflash.plan.cost import (
    BARRIER_CLOCKS,
    BIAS_OPS,
    COMPILER_REGISTERS,
    EXPONENTIALS,
    FLOAT_OPS,
    FMA_16BIT,
    GLOBAL_BYTES,
    MAX_BLOCKS_PER_SM,
    MAX_REGISTERS,
    REGISTERS_PER_SM,
    RESERVED_SHARED,
    SHARED_BYTES,
    SOFTCAP_OPS,
)

BLOCK_FACTS = 96  # bytes in shared memory that say what the block computes, and
LIST_FACTS = 32  # more where tiles come from lists
TILE_OPS = 200  # instructions of a warp per tile, whatever its size
OPS_PER_PAIR = 8  # of P and dS: fma, difference, product, conversions, their share of the stores
TILE_LATENCY = 1500  # of one visit from barrier to barrier, for a block that runs alone
REST_REGISTERS = 62  # of a thread beside its tiles
SPLIT_REGISTERS = 5  # more for split operands, times the square of 16-query blocks: the assembler loads them early
# What products cost, in multiples of those of 16 bits.
PRODUCT_CLOCKS = {"float16": 1, "bfloat16": 1, "float32": 6, "tf32": 2, "float64": 16}


class Shares(NamedTuple):
    """How the warps of a block share its tiles, in blocks of 16: `BackwardTiles` and `QueryGradient` of the kernel."""

    keys: int  # of a warp's scores
    queries: int
    dk_columns: int  # of a warp's dk
    dv_columns: int
    dq_rows: int  # of a warp's dq
    dq_columns: int
    exchange: bool  # P and dS go through shared memory


def shares(config: BackwardConfig) -> Shares:
    others = config.num_warps // config.key_warps
    column_blocks, value_blocks = (
        min(block, round_up(head_dim, 16)) // 16
        for block, head_dim in ((config.block_d, config.head_dim), (config.block_dv, config.head_dim_v))
    )
    row_blocks = config.block_m // 16
    pairs = row_blocks % 2 == 0 and 2 * config.num_warps <= row_blocks * column_blocks
    dq_rows = max(2 if pairs else 1, row_blocks // config.num_warps)
    return Shares(
        keys=config.block_n // (16 * config.key_warps),
        queries=row_blocks // others,
        dk_columns=-(-column_blocks // others),
        dv_columns=-(-value_blocks // others),
        dq_rows=dq_rows,
        dq_columns=-(-column_blocks // (config.num_warps // (row_blocks // dq_rows))),
        exchange=others > 1,
    )


def column_chunks(config: BackwardConfig) -> int:
    """Blocks that share a key tile of a head, each with columns of its own."""
    return max(-(-config.head_dim // config.block_d), -(-config.head_dim_v // config.block_dv))


def sum_bytes(config: BackwardConfig | BiasGradientConfig) -> int:
    """Of a number in which products are summed: float64 for float64, else float32."""
    return 8 if config.dtype == "float64" else 4


def dq_tile_sums(config: BackwardConfig) -> int:
    """Numbers in a query tile's sums of one chunk of dq: `QueryGradient::kTileSums` of the kernels."""
    own = shares(config)
    return config.num_warps * own.dq_rows * own.dq_columns * 256


def shared_bytes(config: BackwardConfig | BiasGradientConfig) -> int:
    """Dynamic shared memory of a block: `sizeof(BackwardShared)` or `sizeof(BiasGradientShared)` of the kernels."""
    size, wide = ELEMENT_BYTES[config.dtype], sum_bytes(config)
    if isinstance(config, BiasGradientConfig):
        inputs = size * (config.block_m + config.block_n) * _depth(config, 16)
        sums = wide * config.block_n * (config.block_m + 1)
        return max(inputs, sums) + 2 * wide * config.block_m
    if config.family != "backward":
        return 0
    own = shares(config)
    tiles = (config.block_n + config.num_stages * config.block_m) * _depth(config, 32 if size == 4 else 16)
    outputs = config.num_warps * own.keys * (own.dk_columns + own.dv_columns) * 256 if size == 2 else 0
    scores = config.block_n * config.block_m
    elements = max(tiles, outputs) + scores + (scores if own.exchange else 8)
    facts = BLOCK_FACTS + (LIST_FACTS if config.mask else 0)
    return size * elements + 2 * config.num_stages * config.block_m * wide + facts


def _depth(config: BackwardConfig | BiasGradientConfig, unit: int) -> int:
    """Columns of the tiles of q and do, or k and v, together, each in steps of `unit`."""
    return round_up(config.head_dim, unit) + round_up(config.head_dim_v, unit)


def registers(config: BackwardConfig, arch: Arch) -> int:
    """Estimate of a thread's registers: the tiles that it holds at once, and what the rest was seen to need."""
    own = shares(config)
    sums = 8 * own.keys * (own.dk_columns + own.dv_columns)
    scores = 8 * own.keys * own.queries * (3 if config.softcapped else 2)
    dq = 8 * own.dq_rows * own.dq_columns
    words = sum_bytes(config) // 4
    split = SPLIT_REGISTERS * own.keys * own.queries**2 if config.dtype == "float32" else 0
    rest = REST_REGISTERS + split + COMPILER_REGISTERS.get(arch.name, 0) + max(0, own.queries - 4) + 2 * config.varlen
    if config.num_stages == 1 and (config.windowed or (own.exchange and own.queries > 1)):
        rest += 2
    return words * (sums + max(scores, dq)) + rest


def fits(config: BackwardConfig, arch: Arch) -> bool:
    """Whether a block has the shared memory and its threads the registers that it needs."""
    return shared_bytes(config) <= arch.shared_per_block and registers(config, arch) <= MAX_REGISTERS


def blocks_per_sm(config: BackwardConfig, arch: Arch, register_count: int | None = None) -> int:
    """Blocks resident on one multiprocessor; registers as compiled where known."""
    per_thread = round_up(register_count or min(registers(config, arch), MAX_REGISTERS), 8)
    return min(
        MAX_BLOCKS_PER_SM,
        arch.max_warps_per_sm // config.num_warps,
        arch.shared_per_sm // (shared_bytes(config) + RESERVED_SHARED),
        REGISTERS_PER_SM // (per_thread * config.threads),
    )


def clocks_per_pair(config: BackwardConfig, arch: Arch, rows: int) -> float:
    """What configurations are ranked by: modelled clocks of many blocks, per query and key of a head.

    `rows` of the queries of a tile exist.
    """
    resident = max(1, blocks_per_sm(config, arch))
    warps = resident * config.num_warps
    tile = max(_tile_clocks(config, resident) * (1 + 2 / warps), TILE_LATENCY / resident)
    if ELEMENT_BYTES[config.dtype] == 4 and config.block_m < 32:
        tile *= 1.2  # rows of dS of 16 words: lanes that read them meet in banks
    return column_chunks(config) * tile / (rows * config.block_n)


def _tile_clocks(config: BackwardConfig, busy: int) -> float:
    """Clocks that one block's visit of one query tile takes of a multiprocessor that `busy` blocks share."""
    own, depth, pairs = shares(config), _depth(config, 16), config.block_m * config.block_n
    sum_columns = config.block_d + config.block_dv
    products = PRODUCT_CLOCKS[config.dtype] * pairs * (depth + sum_columns + config.block_d) / FMA_16BIT
    fragments = 16 * (own.keys + own.queries) * depth + 16 * config.block_n * (own.dq_rows + own.dq_columns)
    if own.exchange:
        fragments += config.block_m * 16 * (2 * own.keys + own.dk_columns + own.dv_columns)
    else:
        fragments += config.block_m * sum_columns
    loads = config.block_m * depth
    stores = pairs * (2 if own.exchange else 1)
    size = ELEMENT_BYTES[config.dtype]
    shared = size * (config.num_warps * fragments + loads + stores) / SHARED_BYTES
    additions = 2 * config.block_m * config.block_d  # read and written
    memory = (size * loads + sum_bytes(config) * additions) / GLOBAL_BYTES
    ops = OPS_PER_PAIR + (BIAS_OPS if config.bias_dtype != "none" else 0) + (SOFTCAP_OPS if config.softcapped else 0)
    scores = pairs * ((2 if config.softcapped else 1) / EXPONENTIALS + ops / FLOAT_OPS)
    barriers = 2 if config.num_stages == 2 or not own.exchange else 3
    fixed = 32 * config.num_warps * TILE_OPS / FLOAT_OPS + BARRIER_CLOCKS * barriers
    if config.num_stages == 1:
        fixed += TILE_LATENCY / 2  # nothing runs under the last part of a copy
    return max(products, shared, memory) + (scores + fixed) / min(busy, 2)
