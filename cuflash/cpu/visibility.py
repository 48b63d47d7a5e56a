"""What groups of queries see of tiles of keys: what a window or a mask shows of one sequence.

Both classes count groups of `rows` queries over the sequence and answer the same three questions: which tiles of keys
are seen (`tiles`), which groups see some of each (`parts`), and which scores of such a part are hidden (`hidden`).
Only parts are computed, and only where something is hidden are they masked.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterator
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from cuflash.masks.program import Program
from cuflash.masks.steps import Place
from cuflash.masks.tiles import PARTIAL
from cuflash.problem import Problem

MAX_KEPT = 2**27  # bytes that are kept with a mask before it begins anew
HIDDEN_BYTES = 256  # of those, most bytes per query and key of one head that say which scores are hidden: linear memory

Hidden = list[tuple[slice, np.ndarray]]  # groups, and bool (groups, rows, keys): true where a score is hidden


class Part(NamedTuple):
    """Groups [first, last), each of which sees some of `keys`, which are of one tile."""

    tile: int  # its number
    keys: slice
    first: int
    last: int


class Window:
    """Query i sees keys i + low to i + high, of every head; None is unbounded."""

    def __init__(self, problem: Problem, len_q: int, len_k: int, rows: int, tile: int) -> None:
        self.rows, self.tile, self._len_q, self._len_k = rows, tile, len_q, len_k
        self._low = None if problem.left is None else len_k - len_q - problem.left
        self._high = None if problem.right is None else len_k - len_q + problem.right
        self._begin = max(0, self._low or 0)  # tiles are counted from the first key that is seen

    def tiles(self) -> list[tuple[int, slice]]:
        """Number and keys of each tile that is seen, by whatever group and head."""
        return list(self._tiles(0, self._len_q))

    def _tiles(self, begin: int, end: int) -> Iterator[tuple[int, slice]]:
        """Those that queries [begin, end) see, less the keys at the ends that none of them does."""
        low = 0 if self._low is None else max(0, begin + self._low)
        high = self._len_k if self._high is None else min(self._len_k, end + self._high)
        for i in range((low - self._begin) // self.tile, -(-(high - self._begin) // self.tile)):
            first = self._begin + i * self.tile
            yield i, slice(max(first, low), min(first + self.tile, high))

    def parts(self, head: int, first: int, last: int) -> Iterator[Part]:
        """What of each tile, in order, the groups [first, last) see."""
        for i, keys in self._tiles(first * self.rows, min(last * self.rows, self._len_q)):
            begin = first if self._high is None else max(first, (keys.start - self._high) // self.rows)
            end = last if self._low is None else min(last, (keys.stop - 1 - self._low) // self.rows + 1)
            if begin < end:
                yield Part(i, keys, begin, end)

    def hidden(self, head: int, part: Part) -> Hidden:
        """Which scores of a part, or of some of its groups, are hidden; groups count from the part's first."""
        rows, n, groups = self.rows, part.keys.stop - part.keys.start, part.last - part.first
        shift = part.first * rows - part.keys.start
        found: Hidden = []
        if self._high is not None:
            high = self._high + shift
            end = min(groups, -(-(n - 1 - high) // rows))  # rows from n - 1 - high on see every column
            if end > 0:
                found.append((slice(end), _by_diagonal(np.arange(1 - end * rows, n) > high, (end, rows, n))))
        if self._low is not None:
            low = self._low + shift
            begin = max(0, (1 - low) // rows)  # rows up to -low see every column
            if begin < groups:
                shape = (groups - begin, rows, n)
                beyond = np.arange(1 - shape[0] * rows, n) < low + begin * rows
                found.append((slice(begin, None), _by_diagonal(beyond, shape)))
        return found


class Masked:
    """A mask of the heads at `places`: all heads alike, or those that share keys.

    The verdicts of their tiles are made when first needed. Of tiles that are seen in part, bits that say what is
    hidden are kept as long as these are few; beyond that they are made again whenever they are needed.
    """

    def __init__(self, program: Program, places: tuple[Place, ...], rows: int, tile: int) -> None:
        self.rows, self.tile = rows, tile
        self._program: Program = weakref.proxy(program)  # which keeps this: no ring, all goes when the mask goes
        self._places = places
        len_q, len_k = places[0][:2]
        self._room = HIDDEN_BYTES * len(places) * (len_q + len_k)
        self.nbytes = len(places) * -(-len_q // rows) * -(-len_k // tile)
        self._lock = Lock()
        self._found: np.ndarray | None = None
        self._kept: dict[tuple[int, int, int, int], tuple[list[slice], np.ndarray]] = {}

    @property
    def verdicts(self) -> np.ndarray:
        """uint8 (places, groups, tiles)."""
        with self._lock:
            if self._found is None:
                self._found = np.stack([self._program.verdicts(place, self.rows, self.tile) for place in self._places])
        return self._found

    def tiles(self) -> list[tuple[int, slice]]:
        """As of a window."""
        return [(i, self._keys(i)) for i in np.flatnonzero(self.verdicts.any(axis=(0, 1))).tolist()]

    def parts(self, head: int, first: int, last: int) -> Iterator[Part]:
        """As of a window, but that a tile has as many parts as there are ranges of groups that see it."""
        for i, begin, end in _ranges(self.verdicts[self._index(head), first:last].T):
            yield Part(i, self._keys(i), first + begin, first + end)

    def hidden(self, head: int, part: Part) -> Hidden:
        """As of a window."""
        index = self._index(head)
        partial = self.verdicts[index, part.first : part.last, part.tile] == PARTIAL
        if not partial.any():
            return []
        at = index, part.tile, part.first, part.last
        kept = self._kept.get(at)
        if kept is not None:
            ranges, bits = kept
            hidden = np.unpackbits(bits, axis=2, count=part.keys.stop - part.keys.start).view(bool)
        else:
            ranges = [slice(begin, end) for _, begin, end in _ranges(partial[None])]
            hidden = self._evaluate(index, part.first + np.flatnonzero(partial), part.keys)
            self._keep(at, ranges, np.packbits(hidden, axis=2))
        found: Hidden = []
        for groups in ranges:
            count = groups.stop - groups.start
            found.append((groups, hidden[:count]))
            hidden = hidden[count:]
        return found

    def _evaluate(self, index: int, groups: np.ndarray, keys: slice) -> np.ndarray:
        """bool (groups, rows, keys): what is hidden from some groups of the sequence."""
        place = self._places[index]
        queries = groups[:, None] * self.rows + np.arange(self.rows)
        queries = np.minimum(queries, place.len_q - 1)  # the padding sees what the last query sees
        return ~self._program.visible(place.indices(queries[:, :, None], np.arange(keys.start, keys.stop)))

    def _keep(self, at: tuple[int, int, int, int], ranges: list[slice], bits: np.ndarray) -> None:
        with self._lock:
            if bits.nbytes <= self._room and at not in self._kept:
                self._kept[at] = ranges, bits
                self._room -= bits.nbytes
                self.nbytes += bits.nbytes

    def _index(self, head: int) -> int:
        return head % len(self._places)

    def _keys(self, i: int) -> slice:
        """Of tile i."""
        return slice(i * self.tile, min((i + 1) * self.tile, self._places[0].len_k))


Sight = Window | Masked


def sight_of(problem: Problem, place: Place, kv_head: int, rows: int, tile: int) -> Sight:
    """What the heads of a key/value head see of the sequence at `place`, in groups of `rows` and tiles of `tile` keys.

    A mask's is kept with the mask: later calls, and heads and sequences that see the same, share its verdicts.
    """
    mask = problem.mask
    if mask is None:
        return Window(problem, place.len_q, place.len_k, rows, tile)
    if not mask.by_batch:
        place = place._replace(batch=0)
    if not any(step.value in ("q_token", "k_token") for step in mask.steps if step.operation == "variable"):
        place = place._replace(q_start=0, k_start=0)
    heads = range(kv_head * problem.group, (kv_head + 1) * problem.group) if mask.by_head else range(1)
    places = tuple(place._replace(head=head, kv_head=head // problem.group) for head in heads)
    kept: dict[Hashable, Any] = mask.kept.setdefault("cpu", {})
    sight = kept.get((places, rows, tile))
    if sight is None:
        sight = Masked(mask, places, rows, tile)
        if sight.nbytes + sum(other.nbytes for other in list(kept.values())) > MAX_KEPT:
            kept.clear()
        kept[places, rows, tile] = sight
    return sight


def hide(s: np.ndarray, hidden: Hidden, value: float) -> None:
    """Replace hidden scores s (groups, rows, keys); NaN goes, too."""
    for groups, where in hidden:
        np.copyto(s[groups], value, where=where)


def _ranges(flags: np.ndarray) -> list[list[int]]:
    """[row, begin, end] of each range of elements (rows, n) that are not 0, row by row."""
    inside: np.ndarray = np.zeros((flags.shape[0], flags.shape[1] + 2), bool)
    inside[:, 1:-1] = flags
    rows, edges = np.nonzero(inside[:, 1:] != inside[:, :-1])
    return np.stack((rows[::2], edges[::2], edges[1::2]), axis=1).tolist()


def _by_diagonal(diagonals: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """A Toeplitz view (groups, rows, n): row i, counted over the groups, and column j have the element of j - i."""
    groups, rows, _ = shape
    return np.ndarray(shape, bool, diagonals, groups * rows - 1, (-rows, -1, 1))
