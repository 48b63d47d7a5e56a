"""From a problem and an architecture to kernel configurations, grids and workspaces."""

from __future__ import annotations

from dataclasses import dataclass

from cuflash.plan.config import CombineConfig, ForwardConfig, KernelConfig


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
