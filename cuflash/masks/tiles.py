"""Which tiles of scores a mask leaves empty, full or partial: exact, by intervals where they decide."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cuflash.masks.intervals import INTERVALS, Interval, lookup
from cuflash.masks.steps import Indices, Place, Step

if TYPE_CHECKING:
    from cuflash.masks.program import Program

EMPTY, PARTIAL, FULL = 0, 1, 2
SLAB = 2**18  # pairs, or boxes, that are evaluated at a time
PROBES = (8, 32)  # queries, and keys, of a tile that are evaluated to find it partial
SPLIT = 4  # parts of each side of a box that stays unknown
SMALL = 16  # queries and keys of a box that is not split further


class _Boxes(NamedTuple):
    """Rectangles of pairs, each within a tile. Arrays (boxes,); the last index is inclusive."""

    tile: np.ndarray
    q: Interval
    k: Interval

    def where(self, chosen: np.ndarray | slice) -> _Boxes:
        q, k = ((side[0][chosen], side[1][chosen]) for side in (self.q, self.k))
        return _Boxes(self.tile[chosen], q, k)

    @property
    def side(self) -> int:
        """The longest side."""
        return int(max((side[1] - side[0]).max(initial=0) for side in (self.q, self.k))) + 1


class _Findings:
    """Whether a visible and whether a hidden pair was found in each tile; both decide it."""

    def __init__(self, tiles: int) -> None:
        self.seen, self.hidden = np.zeros(tiles, bool), np.zeros(tiles, bool)

    def note(self, boxes: _Boxes, seen: np.ndarray, hidden: np.ndarray) -> None:
        self.seen[boxes.tile[seen]] = True
        self.hidden[boxes.tile[hidden]] = True

    def undecided(self, boxes: _Boxes) -> _Boxes:
        return boxes.where(~(self.seen & self.hidden)[boxes.tile])


def verdicts(program: Program, at: Place, block_m: int, block_n: int) -> np.ndarray:
    """uint8 (query tiles, key tiles) of EMPTY, PARTIAL, FULL; see `Program.verdicts`."""
    q, k = _tiles(at.len_q, block_m), _tiles(at.len_k, block_n)
    shape = (q[0].size, k[0].size)
    if 0 in shape:
        return np.zeros(shape, np.uint8)
    found = _Findings(shape[0] * shape[1])
    sides = bounds(program, at, (q[0][:, None], q[1][:, None]), (k[0][None], k[1][None]))
    surely, possibly = (np.broadcast_to(side, shape).ravel() for side in sides)
    found.seen[surely], found.hidden[~possibly] = True, True
    tile = np.flatnonzero(possibly & ~surely)
    rows, columns = np.divmod(tile, shape[1])
    _search(program, at, _Boxes(tile, (q[0][rows], q[1][rows]), (k[0][columns], k[1][columns])), found)
    result = np.where(found.seen, np.where(found.hidden, PARTIAL, FULL), EMPTY).astype(np.uint8).reshape(shape)
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
    ranges = {name: (np.atleast_1d(a), np.atleast_1d(b)) for name, a, b in zip(Indices._fields, low, high, strict=True)}

    def leaf(step: Step, arguments: list[Interval]) -> Interval:
        if step.operation == "table":
            return lookup(program.host_table(step.value), arguments)
        if step.operation == "variable":
            return ranges[step.value]
        value = np.atleast_1d(program.constant(step))
        return value, value

    with np.errstate(all="ignore"):
        return program.run(leaf, INTERVALS)


def _tiles(length: int, block: int) -> Interval:
    """The first and the last index of each tile."""
    first = np.arange(0, length, block, dtype=np.int64)
    return first, np.minimum(first + block, length) - 1


def _search(program: Program, at: Place, boxes: _Boxes, found: _Findings) -> None:
    """Decide tiles that intervals leave unknown: by a few pairs, by boxes within, and at last pair by pair."""
    for points in PROBES:
        _evaluate(program, at, boxes, found, points)
        boxes = found.undecided(boxes)
    while len(boxes.tile) and boxes.side > SMALL:
        unknown = []
        for begin in range(0, len(boxes.tile), SLAB // SPLIT**2):
            parts = _split(boxes.where(slice(begin, begin + SLAB // SPLIT**2)))
            sides = bounds(program, at, parts.q, parts.k)
            surely, possibly = (np.broadcast_to(side, parts.tile.shape) for side in sides)
            found.note(parts, surely, ~possibly)
            unknown.append(parts.where(possibly & ~surely))
        boxes = found.undecided(_joined(unknown))
    _evaluate(program, at, boxes, found, None)


def _joined(boxes: list[_Boxes]) -> _Boxes:
    tile, q, k = zip(*boxes, strict=True)
    ((q_low, q_high), (k_low, k_high)) = (map(np.concatenate, zip(*sides, strict=True)) for sides in (q, k))
    return _Boxes(np.concatenate(tile), (q_low, q_high), (k_low, k_high))


def _split(boxes: _Boxes) -> _Boxes:
    """The parts of each box, about SPLIT along each side."""
    ((q_low, q_high), (k_low, k_high)) = (_cut(*side) for side in (boxes.q, boxes.k))
    i, j = np.divmod(np.arange(SPLIT * SPLIT), SPLIT)
    parts = (q_low[:, i], q_high[:, i], k_low[:, j], k_high[:, j])
    exists = (parts[0] <= parts[1]) & (parts[2] <= parts[3])
    tile = np.broadcast_to(boxes.tile[:, None], exists.shape)
    return _Boxes(tile[exists], (parts[0][exists], parts[1][exists]), (parts[2][exists], parts[3][exists]))


def _cut(low: np.ndarray, high: np.ndarray) -> Interval:
    """(boxes, SPLIT) first and last indices of the parts of a side; the last ones may be empty."""
    size = -(-(high - low + 1) // SPLIT)
    first = low[:, None] + size[:, None] * np.arange(SPLIT)
    return first, np.minimum(first + size[:, None] - 1, high[:, None])


def _evaluate(program: Program, at: Place, boxes: _Boxes, found: _Findings, points: int | None) -> None:
    """Evaluate pairs of boxes: all of them, or those of so many queries and keys."""
    rows, columns = (_offsets(int((side[1] - side[0]).max(initial=0)) + 1, points) for side in (boxes.q, boxes.k))
    step = max(1, SLAB // (len(rows) * len(columns)))
    for begin in range(0, len(boxes.tile), step):
        part = boxes.where(slice(begin, begin + step))
        # Boxes at the end are shorter: their last query or key is evaluated again.
        queries = np.minimum(part.q[0][:, None] + rows, part.q[1][:, None])
        keys = np.minimum(part.k[0][:, None] + columns, part.k[1][:, None])
        visible = program.visible(at.indices(queries[:, :, None], keys[:, None, :]))
        count = np.count_nonzero(visible, axis=(1, 2))
        found.note(part, count > 0, count < visible[0].size)


def _offsets(size: int, points: int | None) -> np.ndarray:
    """Offsets along a side: all, or the ends and some between at uneven steps, so that few patterns escape."""
    if points is None or size <= points:
        return np.arange(size)
    return np.array([0, *np.random.default_rng(size).integers(1, size - 1, points - 2), size - 1])
