"""Bytes that sorting tokens and moving rows ask of global memory, exactly: the kernels of `cuflash.plan.tokens`.

Those of the ranges in between depend on the keys, which say how far a bisection goes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from cuflash.plan.tokens import SORT_WARPS, lanes_of_row

PLACE = 4  # bytes of a token's number


class Traffic(NamedTuple):
    """Bytes by array."""

    read: dict[str, int]
    written: dict[str, int]


def sort_traffic(pairs: int, tokens: int, key_bytes: int, digits: int = 1) -> Traffic:
    """Of a sort of the tokens of each of `pairs` (batch, head) by keys that differ in `digits` of their bytes.

    A pass reads the keys twice, to count and to place; the first takes them and their places from the source, each
    later one from where the pass before left them, so that the last leaves them in the results. Keys of more than one
    byte are read once before, when every thread also reads the first one.
    """
    keys, places = pairs * tokens * key_bytes, pairs * tokens * PLACE
    looked_at = 0 if key_bytes == 1 else keys + pairs * 32 * SORT_WARPS * key_bytes
    to_results, to_spare = math.ceil(digits / 2), digits // 2
    from_results, from_spare = (digits - 1) // 2, math.ceil((digits - 1) / 2)
    return Traffic(
        _some(
            source=looked_at + 2 * keys,
            keys=2 * keys * from_results,
            order=places * from_results,
            spare_keys=2 * keys * from_spare,
            spare_order=places * from_spare,
        ),
        _some(
            keys=keys * to_results,
            order=places * to_results,
            inverse=places,
            spare_keys=keys * to_spare,
            spare_order=places * to_spare,
        ),
    )


def gather_traffic(rows: int, kept: int, row_bytes: int, access_bytes: int) -> Traffic:
    """Of a move of `rows` rows in all, of which `kept` are read and the others become zeros."""
    lanes = lanes_of_row(row_bytes // access_bytes)  # each reads the row's place
    return Traffic(
        _some(source=kept * row_bytes, order=rows * PLACE * lanes),
        _some(target=rows * row_bytes),
    )


def _some(**traffic: int) -> dict[str, int]:
    return {name: count for name, count in traffic.items() if count}
