"""Launches that sort tokens by a key, find which sorted keys a sorted query sees, and move rows."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cuflash.errors import InvalidValueError
from cuflash.plan.launch import MAX_BLOCKS, Launch
from cuflash.plan.token_config import MoveRowsConfig, SortTokensConfig, VisibleRangesConfig

SORT_WARPS = 16
RANGE_WARPS = 4
MOVE_WARPS = 4
MOVE_ROWS = 4  # loads of a thread in flight


def plan_sort(dtype: np.dtype, pairs: int) -> Launch:
    """The sort of the tokens of each of `pairs` (batch, head) by keys of a dtype: whole numbers, or bool for keep."""
    config = SortTokensConfig(dtype.itemsize, dtype.kind == "i", dtype.kind == "b", SORT_WARPS)
    return _launch(config, pairs)


def plan_ranges(key_bytes: int, pairs: int, len_q: int) -> Launch:
    """The ranges of keys that `len_q` sorted queries of each (batch, head) see."""
    config = VisibleRangesConfig(key_bytes, RANGE_WARPS)
    return _launch(config, pairs * -(-len_q // config.threads))


class Lists(NamedTuple):
    """What the lists of a move name: rows, of which a block has block_size, or whole blocks."""

    index_bytes: int = 4
    block_size: int = 1
    whole_blocks: bool = False


def plan_move(access_bytes: int, columns: int, parts: int, rows: int, lists: Lists) -> Launch:
    """The move of `rows` rows of each (array, batch, head), of at most `columns` accesses each."""
    config = MoveRowsConfig(access_bytes, lanes_of_row(columns), MOVE_ROWS, MOVE_WARPS, *lists)
    return _launch(config, parts * -(-rows // (config.threads // config.lanes * config.rows)))


def lanes_of_row(columns: int) -> int:
    """Threads that share a row of so many accesses."""
    return min(32, 1 << (columns - 1).bit_length())


def _launch(config: SortTokensConfig | VisibleRangesConfig | MoveRowsConfig, blocks: int) -> Launch:
    if blocks > MAX_BLOCKS:
        raise InvalidValueError(f"batch * num_heads * seqlen takes {blocks} blocks: must be at most {MAX_BLOCKS}")
    return Launch(config, (blocks, 1, 1), (config.threads, 1, 1), 0)
