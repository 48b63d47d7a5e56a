"""Even work in decoding: as much for every block, whatever the lengths, which only the device knows.

The key tiles of all sequences are cut into shares of at most C tiles, ceil(tiles / C) even ones of each sequence and at
least one. With C = ceil(sum of tiles / full) there are fewer than full + batch of them: the host makes the grid and the
workspace from this bound, `kernels_cu/attention/shares.cuh` computes C and the rest from the lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MAX_SHARES = 256  # of a sequence, where all are as long: what the combine kernel merges in little time


@dataclass(frozen=True)
class EvenWork:
    """How the device cuts the keys of all sequences into shares."""

    slots: int  # shares that there may be
    full: int  # shares of the largest size that hold all keys
    least: int  # tiles of a share, if its sequence has as many

    def counts(self, tiles: Sequence[int]) -> list[int]:
        """Shares of each sequence, by the key tiles that its queries see."""
        size = max(self.least, -(-sum(tiles) // self.full))
        return [max(1, -(-n // size)) for n in tiles]


def even_work(batch: int, most_tiles: int, least: int, wave: int) -> EvenWork:
    """One wave of blocks where as many sequences as half of it are as long; of more sequences smaller shares.

    Of a wave no block waits for another, and sequences of one length have floor(wave / batch) even shares each. Beyond,
    blocks come one after the other, and two waves of full shares leave little to do for the last ones.

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
    full = wave + 1 - batch if 2 * batch <= wave else 2 * wave
    return EvenWork(min(full + batch - 1, batch * max(1, -(-most_tiles // least))), full, least)
