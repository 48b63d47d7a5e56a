"""What a configuration of the forward kernel costs: shared memory, registers, occupancy, and a model of its time.

The model ranks configurations; it does not predict times. Its constants are of the sm_80 class of tensor cores and come
from published facts, but for TILE_OPS: that was fitted to the times of all tilings on an H200 (docs/kernel-forward.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from cuflash.plan.arch import Arch
from cuflash.plan.config import ELEMENT_BYTES, ForwardConfig, round_up
from cuflash.plan.kernel import KernelConfig

MAX_REGISTERS = 255  # of a thread
COMPILER_REGISTERS = {"sm_100": 14}  # that the assembler was seen to need beyond the estimate, and
SPLIT_COMPILER_REGISTERS = {"sm_100": 40, "sm_120": 60}  # for float32, with two row blocks a warp
SPARED_REGISTERS = {"sm_90": 5}  # that it was seen to do without, for 16 bits, where a thread holds at most
FEW_OUTPUTS = 96  # registers of O
REGISTERS_PER_SM = 65536
RESERVED_SHARED = 1024  # bytes of shared memory that the driver takes per block
MAX_BLOCKS_PER_SM = 32
BLOCK_FACTS = 96  # bytes in shared memory that say what the block computes, and
LIST_FACTS = 16  # more where tiles come from lists

# Rates of one multiprocessor, per clock.
FMA_16BIT = 1024  # of the tensor cores through mma.sync
PRODUCTS = {"float16": FMA_16BIT, "bfloat16": FMA_16BIT, "tf32": FMA_16BIT / 2, "float32": FMA_16BIT / 6}
PRODUCTS_64 = {"sm_80": 64, "sm_90": 128, "sm_100": 64}  # the same of float64, and
FEW_PRODUCTS_64 = 2  # where they are there for compatibility alone
SHARED_BYTES = 128
PARTITIONS = 4  # of a multiprocessor; a warp runs in one of them
EXPONENTIALS = 16
FLOAT_OPS = 128
GLOBAL_BYTES = 40  # keys and values come from L2 for all but the first query tile of a head

OPS_PER_SCORE = 6  # maximum, fma, sum, half a conversion, loads and stores of its share
FLOAT64_OPS_PER_SCORE = 26  # two steps of a product each: the exponential is one of polynomials
CONVERSION_OPS = {"tf32": 3, "float32": 4}  # to round or split an element of an operand
BIAS_OPS = 8
SOFTCAP_OPS = 14
TILE_OPS = 400  # instructions of a warp per tile, whatever its size: addresses, copies, maxima over lanes
BARRIER_CLOCKS = 40
TILE_LATENCY = 700  # of one visit from barrier to barrier, however small the tile, for a block that runs alone
BLOCK_CLOCKS = 1500  # start, first loads, epilogue
COMBINE_CLOCKS = 6000  # a second launch


@dataclass(frozen=True)
class Work:
    """A launch in the large: its blocks, and the key tiles that one of them visits at most and on average."""

    blocks: int
    max_tiles: float
    mean_tiles: float


def shared_bytes(config: KernelConfig) -> int:
    """Dynamic shared memory of a block: `sizeof(ForwardShared)` of the kernel."""
    if not isinstance(config, ForwardConfig):
        return 0
    size = ELEMENT_BYTES[config.dtype]
    depth = round_up(config.head_dim, 16)
    columns = round_up(config.block_dv, 32 if size == 4 else 16)  # of a tile of values
    inputs = config.block_m * depth + config.num_stages * config.block_n * (depth + columns)
    outputs = config.block_m * config.block_dv if size == 2 and not config.split else 0  # wider ones are not staged
    facts = BLOCK_FACTS + (LIST_FACTS if config.mask else 0) + (16 * (config.block_n + 3) if config.paged else 0)
    return size * max(inputs, outputs) + facts


def registers(config: ForwardConfig) -> int:
    """Estimate of a thread's registers: the tiles it holds, and what the rest of the kernel was seen to need."""
    rows = config.block_m // (16 * config.num_warps)
    scores, outputs = rows * config.block_n // 2, rows * config.block_dv // 2
    if config.dtype == "float32":
        return outputs + _split_registers(config, rows)
    bytes_of_row = ELEMENT_BYTES[config.dtype] * round_up(config.head_dim, 16)
    queries = rows * bytes_of_row // 8 if config.q_in_registers else 4 * rows
    rest = 50 + 4 * rows
    if config.dtype == "float64":
        scores, outputs, rest = 5 * scores, 2 * outputs, rest - 3
    if config.bias_dtype != "none":
        rest += 12
    if config.split:
        rest += 2
    if bytes_of_row % 64 == 32:
        rest += 16  # a row of such a tile takes more copies of a thread
    if config.num_stages == 1:
        rest += 10  # copies start while the scores are held
    if config.softcapped:
        rest += 8
    return scores + outputs + queries + rest


def fits_registers(config: ForwardConfig, arch: Arch) -> bool:
    """Whether the kernel is expected to fit into a thread's registers."""
    if config.dtype == "float32":
        beyond = SPLIT_COMPILER_REGISTERS.get(arch.name, 0) if config.block_m > 16 * config.num_warps else 0
        return registers(config) + beyond <= MAX_REGISTERS
    beyond = COMPILER_REGISTERS.get(arch.name, 0) if config.dtype != "float64" else 0
    outputs = config.block_m * config.block_dv // (32 * config.num_warps)
    if ELEMENT_BYTES[config.dtype] == 2 and outputs <= FEW_OUTPUTS:
        beyond -= SPARED_REGISTERS.get(arch.name, 0)
    return registers(config) + beyond <= MAX_REGISTERS


def _split_registers(config: ForwardConfig, rows: int) -> int:
    """The same of split products, but for the outputs: the assembler takes what there is, and splits well ahead."""
    rest = 3 * config.block_n + (70 if rows == 1 else 25)
    if rows > 1:
        rest += 40 if config.bias_dtype != "none" else 0
        rest += 72 if config.softcapped else 0
        rest += 48 if config.split else 0
        rest += 56 if round_up(config.head_dim, 16) % 32 == 16 else 0
    return rest


def blocks_per_sm(config: ForwardConfig, arch: Arch, register_count: int | None = None) -> int:
    """Blocks resident on one multiprocessor; registers as compiled where known."""
    per_thread = round_up(register_count or min(registers(config), MAX_REGISTERS), 8)
    return min(
        MAX_BLOCKS_PER_SM,
        arch.max_warps_per_sm // config.num_warps,
        arch.shared_per_sm // (shared_bytes(config) + RESERVED_SHARED),
        REGISTERS_PER_SM // (per_thread * config.threads),
    )


def cycles(config: ForwardConfig, work: Work, arch: Arch, sm_count: int) -> float:
    """Modelled clocks of the launch (and of the combine launch)."""
    resident = max(1, blocks_per_sm(config, arch))
    busy = min(resident, -(-work.blocks // sm_count))  # blocks that share a multiprocessor
    warps = busy * config.num_warps
    tile = max(_tile_clocks(config, busy, arch) * (1 + 2 / warps), TILE_LATENCY / busy)  # few warps hide little latency
    slots = resident * sm_count
    waves = -(-work.blocks // slots) if work.blocks <= 4 * slots else work.blocks / slots
    tiles = work.max_tiles if waves <= 1 else work.mean_tiles
    return waves * busy * (tiles * tile + BLOCK_CLOCKS / busy) + (COMBINE_CLOCKS if config.split else 0)


def _tile_clocks(config: ForwardConfig, busy: int, arch: Arch) -> float:
    """Clocks that one block's visit of one key tile takes of a multiprocessor."""
    depth, size = round_up(config.head_dim, 16), ELEMENT_BYTES[config.dtype]
    scores = config.block_m * config.block_n
    columns = depth + config.block_dv
    rate = products_per_clock(config.dtype, arch)
    products = scores * columns / rate * max(1, PARTITIONS / (busy * config.num_warps))
    elements = config.num_warps * config.block_n * columns  # of operands that warps read
    if not config.q_in_registers:
        elements += config.block_m * depth
    loads = size * config.block_n * columns
    conversions = CONVERSION_OPS.get(config.dtype, 0) * (elements + scores) / FLOAT_OPS
    ops = OPS_PER_SCORE + (BIAS_OPS if config.bias_dtype != "none" else 0) + (SOFTCAP_OPS if config.softcapped else 0)
    softmax = scores * ((2 if config.softcapped else 1) / EXPONENTIALS + ops / FLOAT_OPS)
    if config.dtype == "float64":
        softmax += scores * FLOAT64_OPS_PER_SCORE * (3 if config.softcapped else 1) * 2 / rate
    rescale = config.block_m * config.block_dv / FLOAT_OPS
    fixed = 32 * config.num_warps * TILE_OPS / FLOAT_OPS + BARRIER_CLOCKS * (2 if config.num_stages == 1 else 1)
    overlap = min(busy, 2)  # one block's softmax runs under another's products
    tensor = max(products, (size * elements + loads) / SHARED_BYTES, loads / GLOBAL_BYTES)
    return tensor + (softmax + rescale + fixed + conversions) / overlap


def products_per_clock(dtype: str, arch: Arch) -> float:
    """Multiply-adds of a multiprocessor's tensor cores."""
    return PRODUCTS_64.get(arch.name, FEW_PRODUCTS_64) if dtype == "float64" else PRODUCTS[dtype]
