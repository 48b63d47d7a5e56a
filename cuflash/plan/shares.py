"""Even work in decoding: as much for every block, whatever the lengths, which only the device knows.

The key tiles of all sequences are cut into shares of at most C tiles, ceil(tiles / C) even ones of each sequence and
at least one. C is the smallest of a few sizes that give at most `most` shares in all; the largest of the sizes,
ceil(sum of tiles / (most + 1 - batch)), always does. `kernels_cu/attention/shares.cuh` finds it from the lengths; the
host makes the grid and the workspace.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MAX_SHARES = 256  # of a sequence, where all are as long: what the combine kernel merges in little time
SIZES = 8  # that are tried; kSizes of shares.cuh


@dataclass(frozen=True)
class EvenWork:
    """How the device cuts the keys of all sequences into shares."""

    slots: int  # shares that there may be
    most: int  # shares that are wanted, if every sequence had one of more than `least` tiles
    least: int  # tiles of a share, if its sequence has as many

    def sizes(self, tiles: Sequence[int]) -> list[int]:
        """What C is chosen from."""
        low, high = (max(self.least, -(-sum(tiles) // n)) for n in (self.most, self.most + 1 - len(tiles)))
        return [low + (high - low) * i // (SIZES - 1) for i in range(SIZES)] if low < high else [high]

    def counts(self, tiles: Sequence[int]) -> list[int]:
        """Shares of each sequence, by the key tiles that its queries see."""
        for size in self.sizes(tiles):
            counts = [max(1, -(-n // size)) for n in tiles]
            if sum(counts) <= self.most:
                break
        return counts


def even_work(batch: int, most_tiles: int, least: int, wave: int) -> EvenWork:
    """As few whole waves of blocks as give every sequence two shares in the mean.

    Sequences of one length have floor(most / batch) even shares each; of a single wave no block waits for another.

    Parameters
    ----------
    batch : int
        Sequences.
    most_tiles : int
        Key tiles that the queries of the longest sequence see which the table has room for.
    least : int
        Tiles of a share that is not to be cut further.
    wave : int
        Shares whose blocks, of all heads, the device holds at once.
    """
    wave = max(1, min(wave, MAX_SHARES * batch))
    most = wave * -(-2 * batch // wave)
    return EvenWork(min(most, batch * max(1, -(-most_tiles // least))), most, least)
