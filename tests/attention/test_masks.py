"""Windows and causality, aligned to the bottom right, whatever the lengths."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.attention.cases import Case, call, check, make

BOUNDS = (None, 0, 1, 7, 32, 63, 64, 65, 500)
WINDOWS = [(left, right) for i, left in enumerate(BOUNDS) for j, right in enumerate(BOUNDS) if (i + 2 * j) % 3 == 0]
LENGTHS = [(65, 129), (129, 65), (70, 70)]
CASE = Case(batch=1)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda p: f"{p[0]}x{p[1]}")
def test_window(device: Any, window: tuple[int | None, int | None], lengths: tuple[int, int]) -> None:
    check(device, CASE.of_lengths(*lengths).but(window=window, causal=window == (None, None)))


@pytest.mark.parametrize("window", [(9, None), (9, 9), (0, 0), (40, 3), (None, 2), (None, 0)], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda p: f"{p[0]}x{p[1]}")
def test_causal_and_window_together(
    device: Any, window: tuple[int | None, int | None], lengths: tuple[int, int]
) -> None:
    check(device, CASE.of_lengths(*lengths).but(window=window, causal=True))


def test_causal_is_a_window_without_right_side(device: Any) -> None:
    case = CASE.of_lengths(45, 80)
    inputs = make(case)
    for got, want in zip(
        call(device, case.but(causal=True), inputs), call(device, case.but(window=(None, 0)), inputs), strict=True
    ):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("window", [(500, 500), (200, None), (None, None)], ids=str)
def test_a_window_that_hides_nothing(device: Any, window: tuple[int | None, int | None]) -> None:
    case = CASE.of_lengths(45, 80)
    inputs = make(case)
    for got, want in zip(call(device, case.but(window=window), inputs), call(device, case, inputs), strict=True):
        np.testing.assert_allclose(got.astype(float), want.astype(float), atol=1e-3)


def test_bounds_near_the_largest_integer(device: Any) -> None:
    """i + shift + right must not wrap in 32 bits."""
    for window in [(2**31 - 1, 3), (3, 2**31 - 1), (2**31 - 2, 2**31 - 2), (2**40, 2**40)]:
        check(device, CASE.of_lengths(33, 65).but(window=window))


@pytest.mark.parametrize("causal_key", ["causal", "window"])
def test_rows_that_see_nothing(device: Any, causal_key: str) -> None:
    """With more queries than keys the first ones see nothing: out 0, lse -inf."""
    case = CASE.of_lengths(150, 20).but(**{"causal": {"causal": True}, "window": {"window": (3, 0)}}[causal_key])
    inputs = make(case)
    out, lse = call(device, case, inputs)
    assert not out[:, :130].any()
    assert np.isneginf(lse[..., :130]).all()
    assert np.isfinite(lse[..., 130:]).all()
    check(device, case)
