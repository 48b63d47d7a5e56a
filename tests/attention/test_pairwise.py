"""The covering arrays that the matrix is built from."""

from __future__ import annotations

import itertools

from tests.attention.pairwise import covering, spread

FACTORS = {"a": [1, 2, 3], "b": "wxyz", "c": [True, False], "d": range(5)}


def test_every_pair_of_values_occurs() -> None:
    rows = covering(FACTORS)
    for left, right in itertools.combinations(FACTORS, 2):
        pairs = {(row[left], row[right]) for row in rows}
        assert pairs == set(itertools.product(FACTORS[left], FACTORS[right]))
    assert len(rows) <= 30  # at least 20; the full product has 120
    assert rows == covering(FACTORS)


def test_spreading_shows_every_value_to_every_row() -> None:
    rows = spread([{"a": 1}, {"a": 2}], {"b": "wxyz", "c": [1, 2]}, times=4)
    assert [row["a"] for row in rows] == [1, 1, 1, 1, 2, 2, 2, 2]
    assert {row["b"] for row in rows[:4]} == {row["b"] for row in rows[4:]} == set("wxyz")
