"""Which tiles and which tokens of a masked problem see each other, found on the host: what lists hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cuflash.masks.program import Program
from cuflash.masks.steps import Place
from cuflash.masks.tiles import FULL, PARTIAL
from cuflash.problem import Problem

BLOCK = 128  # queries and keys that are looked at together


class Group(NamedTuple):
    """Query heads that share a key/value head; what each of `places` stands for occurs `heads` times in the group."""

    times: int  # groups, of all batch entries, in which all this is the same
    places: tuple[Place, ...]
    heads: int


@dataclass(frozen=True)
class VisitedTiles:
    """Tiles of one head that kernels visit, and how many of their rows and keys exist."""

    visited: np.ndarray  # bool (query tiles, key tiles)
    rows: np.ndarray  # (query tiles,)
    keys: np.ndarray  # (key tiles,)


def groups(
    problem: Problem, mask: Program, cu_seqlens_q: Sequence[int] | None, cu_seqlens_k: Sequence[int] | None
) -> Iterator[Group]:
    """All heads of all sequences; those in which the mask shows the same are one group."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        entries = range(problem.batch if mask.by_batch else min(problem.batch, 1))
        sequences = [(i, problem.seqlen_q, problem.seqlen_k, 0, 0) for i in entries]
        alike = 1 if mask.by_batch else problem.batch
    else:
        starts = zip(cu_seqlens_q[:-1], cu_seqlens_q[1:], cu_seqlens_k[:-1], cu_seqlens_k[1:], strict=True)
        sequences = [(i, int(b - a), int(d - c), int(a), int(c)) for i, (a, b, c, d) in enumerate(starts)]
        alike = 1
    for i, len_q, len_k, q_start, k_start in sequences:
        if not mask.by_head:
            place = Place(len_q, len_k, i, 0, 0, q_start, k_start)
            yield Group(alike * problem.num_kv_heads, (place,), problem.group)
            continue
        for kv_head in range(problem.num_kv_heads):
            heads = range(kv_head * problem.group, (kv_head + 1) * problem.group)
            places = tuple(Place(len_q, len_k, i, head, kv_head, q_start, k_start) for head in heads)
            yield Group(alike, places, 1)


def visited_tiles(mask: Program, place: Place, block_m: int, block_n: int) -> VisitedTiles:
    rows, keys = (
        np.minimum(block, length - np.arange(0, length, block))
        for block, length in ((block_m, place.len_q), (block_n, place.len_k))
    )
    return VisitedTiles(mask.verdicts(place, block_m, block_n) > 0, rows, keys)


def seen(mask: Program, place: Place) -> tuple[np.ndarray, np.ndarray]:
    """Which queries see a key, bool (len_q,), and which keys a query sees, bool (len_k,)."""
    queries, keys = np.zeros(place.len_q, bool), np.zeros(place.len_k, bool)
    verdicts = mask.verdicts(place, BLOCK, BLOCK)
    for kind in (FULL, PARTIAL):
        for i, j in np.argwhere(verdicts == kind):
            rows, columns = slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK)
            if queries[rows].all() and keys[columns].all():
                continue
            q, k = (np.arange(length)[part] for length, part in ((place.len_q, rows), (place.len_k, columns)))
            visible = mask.visible(place.indices(q[:, None], k[None]))
            queries[rows] |= visible.any(axis=1)
            keys[columns] |= visible.any(axis=0)
    return queries, keys
