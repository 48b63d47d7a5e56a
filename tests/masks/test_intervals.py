"""Each operation on every interval of a few values: bounds hold, NaN is never lost, and bounds are tight."""

from __future__ import annotations

from itertools import combinations_with_replacement, product
from typing import Any

import numpy as np
import pytest

from cuflash.masks.intervals import INTERVALS, Interval, lookup
from cuflash.masks.program import ELEMENTS
from cuflash.masks.tables import Table

WHOLES = [-9, -8, -3, -1, 0, 1, 2, 5, 7, 8]
POSITIVE = [1, 2, 3, 8]
COUNTS = [0, 1, 3]
REALS = [-np.inf, -2.0, -0.5, -0.0, 0.0, 0.25, 3.0, np.inf]

UNARY = ["negative", "absolute"]
BOTH = ["add", "sub", "mul", "minimum", "maximum"]
BITS = ["bit_and", "bit_or", "bit_xor"]
COMPARISONS = ["less", "less_equal", "equal", "not_equal"]
LOGICAL = ["logical_and", "logical_or", "logical_xor"]
LOOSE = [*BITS, "floor_mod"]  # bounds that values need not reach


def spans(values: list[Any]) -> list[tuple[Any, Any]]:
    return list(combinations_with_replacement(values, 2))


def inside(values: list[Any], span: tuple[Any, Any]) -> np.ndarray:
    """The values of an interval; whole numbers between them too."""
    if isinstance(values[0], int):
        return np.arange(span[0], span[1] + 1)
    return np.array([x for x in values if span[0] <= x <= span[1]])


def interval(span: tuple[Any, Any]) -> Interval:
    return np.array([span[0]]), np.array([span[1]])


def outcomes(name: str, *sets: np.ndarray) -> np.ndarray:
    """The operation on all combinations of elements."""
    with np.errstate(all="ignore"):
        return np.asarray(ELEMENTS[name](*np.meshgrid(*sets, indexing="ij"))).ravel()


def bounds(name: str, *intervals: Interval) -> tuple[Any, Any]:
    with np.errstate(all="ignore"):
        low, high = INTERVALS[name](*intervals)
    return low[0], high[0]


def check(name: str, spans_: tuple[tuple[Any, Any], ...], sets: list[np.ndarray], tight: bool) -> None:
    results = outcomes(name, *sets)
    low, high = bounds(name, *map(interval, spans_))
    if results.dtype == np.float64:
        if np.isnan(results).any():
            assert np.isnan(low), (name, spans_)
            assert np.isnan(high), (name, spans_)
        if np.isnan(low) or np.isnan(high):
            return
    assert low <= results.min(), (name, spans_)
    assert results.max() <= high, (name, spans_)
    if tight:
        assert (low, high) == (results.min(), results.max()), (name, spans_)


@pytest.mark.parametrize("name", [*UNARY, "to_real"])
def test_one_whole_number(name: str) -> None:
    for span in spans(WHOLES):
        check(name, (span,), [inside(WHOLES, span)], tight=True)


@pytest.mark.parametrize(
    ("name", "second"),
    [(name, WHOLES) for name in (*BOTH, *BITS, *COMPARISONS)]
    + [(name, POSITIVE) for name in ("floor_div", "floor_mod")]
    + [(name, COUNTS) for name in ("shift_left", "shift_right")],
)
def test_two_whole_numbers(name: str, second: list[int]) -> None:
    for a, b in product(spans(WHOLES), spans(second)):
        check(name, (a, b), [inside(WHOLES, a), inside(second, b)], tight=name not in LOOSE)


@pytest.mark.parametrize("name", LOOSE)
def test_single_values_stay_single(name: str) -> None:
    for a, b in product(range(-20, 20), range(1, 20)):
        check(name, ((a, a), (b, b)), [np.array([a]), np.array([b])], tight=True)


@pytest.mark.parametrize("name", BITS)
def test_equal_leading_bits_stay(name: str) -> None:
    """Blocks of a power of two, as those of a butterfly, keep the bits above."""
    for a, b in product(range(0, 64, 8), repeat=2):
        low, high = bounds(name, interval((a, a + 7)), interval((b, b + 3)))
        assert low // 8 == high // 8 == ELEMENTS[name](a // 8, b // 8)


@pytest.mark.parametrize("name", BITS)
def test_any_number_of_bits(name: str) -> None:
    for bits in range(62):
        varying = interval((0, 2**bits))
        assert bounds(name, varying, interval((-1, -1) if name == "bit_and" else (0, 0))) == (0, 2 ** (bits + 1) - 1)


@pytest.mark.parametrize("name", UNARY)
def test_one_real(name: str) -> None:
    for span in spans(REALS):
        check(name, (span,), [inside(REALS, span)], tight=False)
    assert np.isnan(bounds(name, interval((np.nan, np.nan)))).all()


@pytest.mark.parametrize("name", [*BOTH, "quotient", *COMPARISONS])
def test_two_reals(name: str) -> None:
    for a, b in product(spans(REALS), spans(REALS)):
        check(name, (a, b), [inside(REALS, a), inside(REALS, b)], tight=False)


@pytest.mark.parametrize("name", [*BOTH, "quotient"])
def test_finite_reals_have_tight_bounds(name: str) -> None:
    finite = [x for x in REALS if np.isfinite(x) and (x or name != "quotient")]
    for a, b in product(spans(finite), spans(finite)):
        if name != "quotient" or b[0] * b[1] > 0:
            check(name, (a, b), [np.array(a), np.array(b)], tight=True)


@pytest.mark.parametrize("name", [*BOTH, "quotient"])
def test_what_may_be_nan_stays_so(name: str) -> None:
    for span in spans(REALS):
        for pair in ((span, (np.nan, np.nan)), ((np.nan, np.nan), span)):
            assert np.isnan(bounds(name, *map(interval, pair))).all()


@pytest.mark.parametrize("name", COMPARISONS)
def test_nan_decides_nothing(name: str) -> None:
    for span in spans(REALS):
        for pair in ((span, (np.nan, np.nan)), ((np.nan, np.nan), span)):
            assert bounds(name, *map(interval, pair)) == (False, True)


@pytest.mark.parametrize("name", LOGICAL)
def test_truths(name: str) -> None:
    both = [False, True]
    for a, b in product(spans(both), repeat=2):
        check(name, (a, b), [inside(both, a), inside(both, b)], tight=True)
    for a in spans(both):
        check("logical_not", (a,), [inside(both, a)], tight=True)
        check("to_whole", (a,), [inside(both, a)], tight=True)


@pytest.mark.parametrize("values", [WHOLES, REALS])
def test_choose(values: list[Any]) -> None:
    both = [False, True]
    for c, a, b in product(spans(both), spans(values), spans(values)):
        check("choose", (c, a, b), [inside(both, c), inside(values, a), inside(values, b)], tight=False)
    unknown = interval((np.nan, np.nan))
    for c in spans(both):
        results = INTERVALS["choose"](interval(c), unknown, interval((1.0, 2.0)))
        assert np.isnan(results).all() == c[1]


class TestLookup:
    TABLES = (
        np.random.default_rng(0).integers(-9, 9, 50).astype(np.int32),
        np.random.default_rng(1).random(50) < 0.5,
        np.where(np.random.default_rng(2).random(50) < 0.1, np.nan, np.random.default_rng(2).normal(size=50)),
        np.random.default_rng(3).random((30, 40)) < 0.9,
        np.random.default_rng(4).integers(0, 9, (6, 7, 8)),
    )

    @staticmethod
    def table(array: np.ndarray, **more: Any) -> Table:
        return Table("array", array.view(np.uint8) if array.dtype == bool else array, **more)

    @pytest.mark.parametrize("array", TABLES, ids=lambda array: f"{array.dtype}{array.shape}")
    def test_blocks(self, array: np.ndarray) -> None:
        """The extremes of any block, or NaN where it holds one."""
        rng = np.random.default_rng(5)
        ends = [np.sort(rng.integers(0, n, (2, 200)), axis=0) for n in array.shape]
        low, high = lookup(self.table(array), [(low, high) for low, high in ends])
        for i in range(200):
            block = array[tuple(slice(side[0, i], side[1, i] + 1) for side in ends)]
            np.testing.assert_array_equal((low[i], high[i]), (block.min(), block.max()))

    def test_ascending(self) -> None:
        array = np.sort(np.random.default_rng(0).integers(0, 99, (3, 50)), axis=1)
        low, high = lookup(self.table(array, ascending=True), [interval((2, 2)), interval((7, 31))])
        assert (low[0], high[0]) == (array[2, 7], array[2, 31])
        low, high = lookup(self.table(array, ascending=True), [interval((1, 2)), interval((7, 31))])
        assert (low[0], high[0]) == (array[1:3, 7:32].min(), array[1:3, 7:32].max())

    def test_a_table_that_is_too_large_for_its_blocks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Bounds of the whole table, or none; along one axis they stay."""
        monkeypatch.setattr("cuflash.masks.intervals.MAX_RANGED", 10)
        wholes = np.arange(100).reshape(10, 10)
        for array, want in ((wholes, (0, 99)), (wholes > 5, (False, True)), (wholes * 0.5, (np.nan, np.nan))):
            low, high = lookup(self.table(array), [interval((1, 2)), interval((3, 4))])
            np.testing.assert_array_equal((low[0], high[0]), want)
        low, high = lookup(self.table(wholes), [interval((1, 1)), interval((3, 4))])
        assert (low[0], high[0]) == (13, 14)

    def test_constant_indices(self) -> None:
        low, high = lookup(self.table(self.TABLES[4]), [interval((3, 3))] * 3)
        assert low == high == self.TABLES[4][3, 3, 3]
