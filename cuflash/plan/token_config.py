"""Configurations of the kernels that bring tokens into another order."""

from __future__ import annotations

from dataclasses import dataclass

from cuflash.plan.kernel import KernelConfig


@dataclass(frozen=True)
class SortTokensConfig(KernelConfig):
    """Compile-time constants of the kernel that sorts tokens by a key."""

    key_bytes: int
    is_signed: bool
    keep: bool  # keys are truths: kept tokens first, then dropped ones, which the order names -1
    num_warps: int

    family = "sort_tokens"
    record = "SortTokens"
    resident = 2

    def __post_init__(self) -> None:
        self.require_one_of("key_bytes", *((1,) if self.keep else (1, 2, 4, 8)))
        self.require_one_of("num_warps", 8, 16, 32)

    @property
    def entry(self) -> str:
        return f"cuflash_sort_tokens_{8 * self.key_bytes}"


@dataclass(frozen=True)
class VisibleRangesConfig(KernelConfig):
    """Compile-time constants of the kernel that finds which sorted keys each sorted query sees."""

    key_bytes: int
    num_warps: int

    family = "visible_ranges"
    record = "VisibleRanges"

    def __post_init__(self) -> None:
        self.require_one_of("key_bytes", 1, 2, 4, 8)
        self.require_one_of("num_warps", 1, 2, 4, 8)

    @property
    def entry(self) -> str:
        return f"cuflash_visible_ranges_{8 * self.key_bytes}"


@dataclass(frozen=True)
class MoveRowsConfig(KernelConfig):
    """Compile-time constants of the kernel that moves rows: into an order, and into, within and out of blocks."""

    access_bytes: int
    lanes: int  # threads that share a row
    rows: int  # of a thread
    num_warps: int
    index_bytes: int  # of an entry of the lists
    block_size: int  # rows of a block
    whole_blocks: bool  # lists name blocks, not rows

    family = "move_rows"
    record = "MoveRows"

    def __post_init__(self) -> None:
        self.require_one_of("access_bytes", 1, 2, 4, 8, 16)
        self.require_one_of("lanes", 1, 2, 4, 8, 16, 32)
        self.require_one_of("rows", 1, 2, 4, 8)
        self.require_one_of("num_warps", 1, 2, 4, 8)
        self.require_one_of("index_bytes", 4, 8)
        self.require(self.block_size >= 1, "block_size", ">= 1")

    @property
    def entry(self) -> str:
        return f"cuflash_move_rows_{self.access_bytes}x{self.lanes}"
