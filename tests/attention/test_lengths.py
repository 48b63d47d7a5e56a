"""Sequence lengths around tile edges, primes, one, zero and far apart. One configuration, or two with causal."""

from __future__ import annotations

from typing import Any

import pytest

from tests.attention.cases import Case, check
from tests.devices import CpuDevice

EDGES = (1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)
PRIMES = (2, 13, 47, 97, 131, 251)
FEW = (1, 17, 64, 130)
PAIRS = sorted({p for n in (*EDGES, *PRIMES) for m in FEW for p in ((n, m), (m, n))} | {(n, n) for n in EDGES})
FAR_APART = [(1, 1000), (1000, 1), (3, 700), (700, 3), (16, 515), (515, 16)]
EMPTY = [(0, 0), (0, 1), (1, 0), (0, 33), (33, 0), (130, 0)]

NARROW = Case(batch=1, num_heads=2, num_kv_heads=1)


@pytest.mark.parametrize("lengths", PAIRS, ids=lambda p: f"{p[0]}x{p[1]}")
def test_tile_edges(device: Any, lengths: tuple[int, int]) -> None:
    check(device, NARROW.of_lengths(*lengths).but(causal=sum(lengths) % 2 == 0))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("lengths", FAR_APART, ids=lambda p: f"{p[0]}x{p[1]}")
def test_lengths_far_apart(device: Any, lengths: tuple[int, int], causal: bool) -> None:
    check(device, NARROW.of_lengths(*lengths).but(causal=causal, num_heads=1))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("lengths", EMPTY, ids=lambda p: f"{p[0]}x{p[1]}")
def test_empty_sequences(device: Any, lengths: tuple[int, int], causal: bool) -> None:
    check(device, NARROW.of_lengths(*lengths).but(causal=causal))


@pytest.mark.parametrize(
    "changes",
    [{"batch": 0}, {"num_heads": 0, "num_kv_heads": 0}, {"num_heads": 0, "num_kv_heads": 1}],
    ids=["batch", "heads", "query_heads"],
)
def test_other_empty_axes(device: Any, changes: dict[str, int]) -> None:
    check(device, NARROW.of_lengths(5, 9).but(**changes))


@pytest.mark.parametrize("changes", [{"head_dim": 0}, {"head_dim_v": 0}, {"head_dim": 0, "head_dim_v": 0}], ids=str)
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_empty_heads(changes: dict[str, int], dtype: str) -> None:
    """Scores of no terms are 0, values of no columns are empty."""
    check(CpuDevice(), NARROW.of_lengths(5, 9).but(dtype=dtype, **changes))
