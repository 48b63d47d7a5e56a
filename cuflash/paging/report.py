"""What a cache says about itself."""

from __future__ import annotations

from dataclasses import dataclass

from cuflash.paging.ledger import Ledger


@dataclass(frozen=True)
class Usage:
    """A cache's blocks and slots at one moment; a block that several sequences hold counts once."""

    num_blocks: int
    block_size: int
    in_use: int  # blocks that sequences hold
    shared: int  # of these, those that more than one holds
    cached: int  # free blocks whose contents can still be found by hash
    tokens: int  # slots in use that have a token
    sequences: int
    swapped_out: int  # of these, those on the host

    @property
    def free(self) -> int:
        """Blocks that can be taken, the cached ones among them."""
        return self.num_blocks - self.in_use

    @property
    def waste(self) -> int:
        """Slots of blocks in use that have no token."""
        return self.in_use * self.block_size - self.tokens

    @property
    def share(self) -> float:
        """Tokens per slot of the blocks in use; 1 if none is."""
        return self.tokens / (self.in_use * self.block_size) if self.in_use else 1.0

    def __str__(self) -> str:
        return (
            f"{self.in_use} of {self.num_blocks} blocks in use ({self.shared} shared), {self.free} free "
            f"({self.cached} cached); {self.tokens} tokens in {self.in_use * self.block_size} slots "
            f"({self.share:.1%}), {self.waste} wasted; {self.sequences} sequences, {self.swapped_out} swapped out"
        )


@dataclass(frozen=True)
class Stats:
    """What a cache has done since it was made."""

    prompt_tokens: int = 0  # given to add_sequence
    cached_tokens: int = 0  # of these, those found in blocks already there
    reserved_tokens: int = 0
    copied_blocks: int = 0  # on write
    evicted_blocks: int = 0  # free ones that were found by hash until they were taken
    swapped_out_blocks: int = 0
    swapped_in_blocks: int = 0


def usage(ledger: Ledger) -> Usage:
    """Looks at every sequence once, and at none of its blocks but the last."""
    pool, size = ledger.pool, ledger.block_size
    in_use = pool.num_blocks - pool.num_free
    fills: dict[int, tuple[int, int]] = {}  # partly filled last blocks: how many end there, and the most slots of one
    swapped_out = 0
    for sequence in ledger.sequences.values():
        fill = sequence.length % size
        if sequence.on_host:
            swapped_out += 1
        elif fill:
            ends, most = fills.get(sequence.blocks[-1], (0, 0))
            fills[sequence.blocks[-1]] = ends + 1, max(most, fill)
    # A block that others hold as well, but not as their last one, is full: one of its holders was truncated.
    waste = sum(size - most for block, (ends, most) in fills.items() if ends == pool.count(block))
    return Usage(
        num_blocks=pool.num_blocks,
        block_size=size,
        in_use=in_use,
        shared=int((pool.counts > 1).sum()),
        cached=pool.num_cached,
        tokens=in_use * size - waste,
        sequences=len(ledger.sequences),
        swapped_out=swapped_out,
    )
