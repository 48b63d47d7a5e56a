"""Masks of blocks: tiles lie within the blocks."""

from __future__ import annotations

import numpy as np
import pytest

from cuflash import masks
from cuflash.plan.arch import ARCHS, arch_named
from cuflash.plan.backward import plan_backward
from cuflash.plan.forward import plan_forward
from cuflash.problem import Problem

GRAINS = {
    masks.Butterfly(64): (64, 64),
    masks.Butterfly(128): (128, 128),
    masks.Blocks(np.ones((16, 64), bool), (256, 64)): (256, 64),
    masks.RandomBlocks(4096, 4096, 96, blocks_per_row=2): (32, 32),
    masks.Causal() & masks.Butterfly(128): (128, 128),
    masks.Butterfly(64) | masks.Butterfly(256): (64, 64),
    masks.where(lambda batch, head, q, k: q >> 7 >= k // 5): (128, 1),
    masks.where(lambda batch, head, q, k: (q + 3) // 64 == k % 64): (0, 0),
    masks.SlidingWindow(100, 0): (0, 0),
}


@pytest.mark.parametrize("mask", GRAINS, ids=repr)
def test_grain(mask: masks.Mask) -> None:
    assert mask.program.grain == GRAINS[mask]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("mask", [mask for mask, grain in GRAINS.items() if min(grain) >= 16], ids=repr)
def test_no_tile_reaches_over_a_block(mask: masks.Mask, head_dim: int, arch: str) -> None:
    problem = Problem(1, 4096, 4096, 2, 2, head_dim, head_dim, "bfloat16", 1.0, mask=mask.program)
    alignment = {"load_bytes": 16, "store_bytes": 16}
    configs = [
        plan_forward(problem, arch_named(arch), **alignment).forward.config,
        plan_backward(problem, arch_named(arch), **alignment).launches[1].config,
    ]
    for config in configs:
        tile = config.block_m, config.block_n
        assert all(max(size, 64) % n == 0 for size, n in zip(mask.program.grain, tile, strict=True))


def test_other_masks_take_the_tiles_of_none() -> None:
    def tile(mask: masks.Mask | None) -> tuple[int, int, int]:
        program = None if mask is None else mask.program
        problem = Problem(1, 4096, 4096, 2, 2, 128, 128, "bfloat16", 1.0, mask=program)
        config = plan_forward(problem, arch_named("sm_90"), load_bytes=16, store_bytes=16).forward.config
        return config.block_m, config.block_n, config.num_warps

    assert tile(masks.SlidingWindow(100, 0)) == tile(None)
    assert tile(masks.where(lambda batch, head, q, k: q // 5 % 3 == k // 5 % 3)) == tile(None)
