"""What a configuration of the backward kernel costs: shared memory, registers, and a model of its time."""

from __future__ import annotations

from cuflash.plan.config import BackwardConfig, round_up

BLOCK_FACTS = 96  # bytes in shared memory that say what the block computes
FLOAT = 4


def column_chunks(config: BackwardConfig) -> int:
    """Blocks that share a key tile of a head, each with columns of its own."""
    return max(-(-config.head_dim // config.block_d), -(-config.head_dim_v // config.block_dv))


def dq_tile_floats(config: BackwardConfig) -> int:
    """Floats of a query tile's sums of one chunk of dq: `QueryGradient::kTileFloats` of the kernels."""
    row_blocks, column_blocks = config.block_m // 16, -(-min(config.block_d, config.head_dim) // 16)
    pairs = row_blocks % 2 == 0 and 2 * config.num_warps <= row_blocks * column_blocks
    rows = max(2 if pairs else 1, row_blocks // config.num_warps)  # 16-row blocks of a warp
    columns = -(-column_blocks // (config.num_warps // (row_blocks // rows)))
    return config.num_warps * rows * columns * 256


def backward_shared_bytes(config: BackwardConfig) -> int:
    """Dynamic shared memory of a block: `sizeof(BackwardShared)` of the kernel."""
    shares = config.num_warps // config.key_warps
    depth = round_up(config.head_dim, 16) + round_up(config.head_dim_v, 16)
    inputs = (config.block_n + config.num_stages * config.block_m) * depth
    columns = sum(  # of one share of dk and dv
        round_up(min(block, round_up(head_dim, 16)), 16 * shares) // shares
        for block, head_dim in ((config.block_d, config.head_dim), (config.block_dv, config.head_dim_v))
    )
    outputs = shares * config.block_n * columns
    scores = config.block_n * config.block_m
    exchanged = scores if shares > 1 else 8  # P, beside dS
    tiles = max(inputs, outputs) + scores + exchanged
    return 2 * tiles + 2 * config.num_stages * config.block_m * FLOAT + BLOCK_FACTS
