"""Covering arrays: few rows in which every value of every factor meets every value of every other factor."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

Row = dict[str, Any]


def covering(factors: Mapping[str, Sequence[Any]], seed: int = 0, candidates: int = 30) -> list[Row]:
    """Rows of one value per factor that cover all pairs, found greedily; the same rows for the same seed.

    Each row starts from a pair not yet covered; of `candidates` random completions the one that covers most is kept.
    """
    rng = random.Random(seed)
    names = list(factors)
    sizes = [len(factors[name]) for name in names]
    columns = range(len(names))
    missing = {
        (i, a, j, b)
        for i, j in itertools.combinations(columns, 2)
        for a, b in itertools.product(range(sizes[i]), range(sizes[j]))
    }

    def covered(row: list[int]) -> set[tuple[int, int, int, int]]:
        return {(i, row[i], j, row[j]) for i, j in itertools.combinations(columns, 2)} & missing

    rows = []
    while missing:
        i, a, j, b = min(missing)
        best: set[tuple[int, int, int, int]] = set()
        for _ in range(candidates):
            row = [rng.randrange(size) for size in sizes]
            row[i], row[j] = a, b
            gain = covered(row)
            if len(gain) > len(best):
                best, chosen = gain, row
        missing -= best
        rows.append({name: factors[name][index] for name, index in zip(names, chosen, strict=True)})
    return rows


def spread(rows: Sequence[Row], factors: Mapping[str, Sequence[Any]], times: int, seed: int = 0) -> list[Row]:
    """Each row `times` times, completed from further factors so that it meets as many of their values as it can.

    Of one row's repeats no factor repeats a value before it has shown all of them.
    """
    rng = random.Random(seed)
    result = []
    for row in rows:
        orders = {name: rng.sample(list(values), len(values)) for name, values in factors.items()}
        for i in range(times):
            result.append({**row, **{name: order[i % len(order)] for name, order in orders.items()}})
    return result
