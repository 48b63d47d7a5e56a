"""One kernel launch, as plans list them."""

from __future__ import annotations

from dataclasses import dataclass

from cuflash.plan.kernel import KernelConfig

MAX_BLOCKS = 2**31 - 1


@dataclass(frozen=True)
class Launch:
    """One kernel launch: a configuration, its grid and block, and its dynamic shared memory in bytes."""

    config: KernelConfig
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
