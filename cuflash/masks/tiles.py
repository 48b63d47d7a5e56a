"""Which tiles of scores a mask leaves empty, full or partial: exact, by intervals where they decide."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cuflash.masks.intervals import INTERVALS, Interval, lookup
from cuflash.masks.steps import Indices, Place, Step

if TYPE_CHECKING:
    from cuflash.masks.program import Program

EMPTY, PARTIAL, FULL = 0, 1, 2
SLAB = 2**20  # pairs that are evaluated at a time
PROBES = 8  # queries, and keys, of a tile that are evaluated first


def verdicts(program: Program, at: Place, block_m: int, block_n: int) -> np.ndarray:
    """uint8 (query tiles, key tiles) of EMPTY, PARTIAL, FULL; see `Program.verdicts`."""
    q, k = _tiles(at.len_q, block_m), _tiles(at.len_k, block_n)
    if not (q[0].size and k[0].size):
        return np.zeros((q[0].size, k[0].size), np.uint8)
    surely, possibly = bounds(program, at, (q[0][:, None], q[1][:, None]), k)
    shape = (q[0].size, k[0].size)
    result = np.where(np.broadcast_to(surely, shape), FULL, PARTIAL).astype(np.uint8)
    result[~np.broadcast_to(possibly, shape)] = EMPTY
    rows, columns = np.nonzero(np.broadcast_to(possibly & ~surely, shape))
    for points in (PROBES, None):
        seen, hidden = _pairs(program, at, (q[0][rows], q[1][rows]), (k[0][columns], k[1][columns]), points)
        open_ = ~(seen & hidden)
        if points is None:
            result[rows[open_], columns[open_]] = np.where(seen[open_], FULL, EMPTY)
        rows, columns = rows[open_], columns[open_]
    if at.len_k % block_n:
        result[:, -1] = np.minimum(result[:, -1], PARTIAL)  # keys are missing
    return result


def visible_pairs(program: Program, at: Place, block: int = 128) -> int:
    """How many pairs are visible."""
    q, k = _tiles(at.len_q, block), _tiles(at.len_k, block)
    found = verdicts(program, at, block, block)
    areas = (q[1] - q[0] + 1)[:, None] * (k[1] - k[0] + 1)
    total = int(areas[found == FULL].sum())
    rows, columns = np.nonzero(found == PARTIAL)
    offsets = np.arange(block)
    for begin in range(0, len(rows), SLAB // block**2):
        part = slice(begin, begin + SLAB // block**2)
        queries, keys = q[0][rows[part], None] + offsets, k[0][columns[part], None] + offsets
        exists = (queries < at.len_q)[:, :, None] & (keys < at.len_k)[:, None, :]
        queries, keys = np.minimum(queries, at.len_q - 1), np.minimum(keys, at.len_k - 1)
        total += int((program.visible(at.indices(queries[:, :, None], keys[:, None, :])) & exists).sum())
    return total


def bounds(program: Program, at: Place, q: Interval, k: Interval) -> Interval:
    """Whether the pairs of queries q and keys k are surely all visible, and whether some are possibly."""
    low, high = (at.indices(*pair) for pair in zip(q, k, strict=True))
    ranges = {
        name: (np.atleast_2d(a), np.atleast_2d(b)) for name, a, b in zip(Indices._fields, low, high, strict=True)
    }

    def leaf(step: Step, arguments: list[Interval]) -> Interval:
        if step.operation == "table":
            table = program.host_table(step.value)
            return lookup(table.array, arguments, table.ascending)
        if step.operation == "variable":
            return ranges[step.value]
        value = np.atleast_2d(program.constant(step))
        return value, value

    with np.errstate(all="ignore"):
        return program.run(leaf, INTERVALS)


def _tiles(length: int, block: int) -> Interval:
    """The first and the last index of each tile."""
    first = np.arange(0, length, block, dtype=np.int64)
    return first, np.minimum(first + block, length) - 1


def _pairs(
    program: Program, at: Place, q: Interval, k: Interval, points: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Whether a visible and whether a hidden pair was found in each tile, among all pairs or some of them."""
    seen, hidden = np.zeros(len(q[0]), bool), np.zeros(len(q[0]), bool)
    rows, columns = _offsets(q, points), _offsets(k, points)
    step = max(1, SLAB // max(1, len(rows) * len(columns)))
    for begin in range(0, len(seen), step):
        part = slice(begin, begin + step)
        # Tiles at the end are shorter: their last query or key is evaluated again.
        queries = np.minimum(q[0][part, None] + rows, q[1][part, None])
        keys = np.minimum(k[0][part, None] + columns, k[1][part, None])
        visible = program.visible(at.indices(queries[:, :, None], keys[:, None, :]))
        seen[part], hidden[part] = visible.any(axis=(1, 2)), ~visible.all(axis=(1, 2))
    return seen, hidden


def _offsets(tiles: Interval, points: int | None) -> np.ndarray:
    """Offsets within a tile: all, or the ends and some between at uneven steps, so that few patterns escape."""
    block = int((tiles[1] - tiles[0]).max(initial=0)) + 1
    if points is None or block <= points:
        return np.arange(block)
    between = np.random.default_rng(block).integers(1, block - 1, points - 2)
    return np.array([0, *between, block - 1])
