"""Every built-in mask with the plain formula of what it shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from cuflash import masks

# Numbers of queries and keys.
LENGTHS = [(1, 1), (1, 40), (40, 1), (17, 17), (33, 64), (64, 33), (97, 131), (128, 128), (131, 97)]


class Case(NamedTuple):
    """A mask for given lengths, and its formula of q (seqlen_q, 1), k (1, seqlen_k) and p, the query's position."""

    mask: Callable[[int, int], masks.Mask]
    formula: Callable[..., np.ndarray]


def random(*shape: int) -> np.random.Generator:
    return np.random.default_rng([1, *shape])


def ids(length: int) -> np.ndarray:
    """Documents of a few tokens each, not in the order of their numbers."""
    return np.repeat([3, 1, 4, 0, 2], 41)[:length]


def drawn(seqlen_q: int, seqlen_k: int) -> np.ndarray:
    return random(seqlen_q, seqlen_k).random((seqlen_q, seqlen_k)) < 0.5


def blocks(seqlen_q: int, seqlen_k: int) -> np.ndarray:
    """A matrix of blocks of 32 queries by 16 keys."""
    return drawn(-(-seqlen_q // 32), -(-seqlen_k // 16))


def is_power_of_two(x: np.ndarray) -> np.ndarray:
    return np.isin(x, 2 ** np.arange(20))


CASES = {
    "causal": Case(lambda n, m: masks.Causal(), lambda q, k, p: k <= p),
    "window": Case(lambda n, m: masks.SlidingWindow(20, 5), lambda q, k, p: (k >= p - 20) & (k <= p + 5)),
    "left": Case(lambda n, m: masks.SlidingWindow(7, None), lambda q, k, p: k >= p - 7),
    "right": Case(lambda n, m: masks.SlidingWindow(None, 9), lambda q, k, p: k <= p + 9),
    "diagonal": Case(lambda n, m: masks.SlidingWindow(0, 0), lambda q, k, p: k == p),
    "everything": Case(lambda n, m: masks.SlidingWindow(None, None), lambda q, k, p: (q == q) & (k == k)),
    "nothing": Case(lambda n, m: ~masks.SlidingWindow(None, None), lambda q, k, p: (q != q) & (k != k)),
    "documents": Case(
        lambda n, m: masks.Documents(ids(n), ids(m)), lambda q, k, p: ids(q.size).reshape(q.shape) == ids(k.size)
    ),
    "prefix": Case(lambda n, m: masks.PrefixLM(12), lambda q, k, p: (k < 12) | (k <= p)),
    "dilated": Case(lambda n, m: masks.Dilated(5), lambda q, k, p: (k - p) % 5 == 0),
    "dilated window": Case(
        lambda n, m: masks.Dilated(3, 4, 2), lambda q, k, p: np.isin(k - p, np.arange(-12, 7, 3))
    ),
    "global count": Case(lambda n, m: masks.GlobalTokens(3), lambda q, k, p: (k < 3) | ((p >= 0) & (p < 3))),
    "global positions": Case(
        lambda n, m: masks.GlobalTokens(np.array([90, 2, 2, 31])),
        lambda q, k, p: np.isin(k, [2, 31, 90]) | np.isin(p, [2, 31, 90]),
    ),
    "no global positions": Case(
        lambda n, m: masks.GlobalTokens(np.array([], int)), lambda q, k, p: (q < 0) & (k < 0)
    ),
    "butterfly": Case(
        lambda n, m: masks.Butterfly(16), lambda q, k, p: (q // 16 == k // 16) | is_power_of_two(q // 16 ^ k // 16)
    ),
    "blocks": Case(
        lambda n, m: masks.Blocks(blocks(n, m), (32, 16)), lambda q, k, p: blocks(q.size, k.size)[q // 32, k // 16]
    ),
    "dense": Case(lambda n, m: masks.Dense(drawn(n, m)), lambda q, k, p: drawn(q.size, k.size)),
    "dense column": Case(lambda n, m: masks.Dense(drawn(n, 1)), lambda q, k, p: drawn(q.size, 1) & (k >= 0)),
    "dense row": Case(lambda n, m: masks.Dense(drawn(1, m)), lambda q, k, p: drawn(1, k.size) & (q >= 0)),
    "function": Case(
        lambda n, m: masks.where(lambda batch, head, q, k: (q * 7 + k * 3) % 11 < 4),
        lambda q, k, p: (7 * q + 3 * k) % 11 < 4,
    ),
    "neighbours": Case(
        lambda n, m: masks.where(
            lambda batch, head, q, k: (abs(q // 12 - k // 12) <= 2) & (abs(q % 12 - k % 12) <= 2)
        ),
        lambda q, k, p: np.maximum(abs(q // 12 - k // 12), abs(q % 12 - k % 12)) <= 2,
    ),
    "combined": Case(
        lambda n, m: masks.Causal() & (masks.SlidingWindow(9, 0) | masks.GlobalTokens(4)) & ~masks.Dilated(4),
        lambda q, k, p: (k <= p) & ((k >= p - 9) | (k < 4) | ((p >= 0) & (p < 4))) & ((k - p) % 4 != 0),
    ),
}


def formula(case: Case, seqlen_q: int, seqlen_k: int) -> np.ndarray:
    """bool (seqlen_q, seqlen_k)."""
    q, k = np.ogrid[:seqlen_q, :seqlen_k]
    return case.formula(q, k, q + seqlen_k - seqlen_q)


def reduced(visible: np.ndarray, block_m: int, block_n: int) -> np.ndarray:
    """Verdicts of tiles from all their pairs."""
    rows, columns = (range(0, n, block) for n, block in zip(visible.shape, (block_m, block_n), strict=True))
    tiles = [[visible[i : i + block_m, j : j + block_n] for j in columns] for i in rows]
    return np.array([
        [0 if not tile.any() else 2 if tile.all() and tile.shape[1] == block_n else 1 for tile in row] for row in tiles
    ])
