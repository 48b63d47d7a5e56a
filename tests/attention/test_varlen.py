"""Packed sequences: every sequence by itself, zero lengths, tails, and agreement with the dense call."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cuflash
from tests.attention.cases import Case, Inputs, call, check, hold_to_oracle, make

SEQUENCES = {
    "one": ((40, 70),),
    "equal": ((33, 33),) * 3,
    "edges": ((63, 64), (65, 63), (1, 1), (16, 17)),
    "empty_first": ((0, 9), (20, 30)),
    "empty_queries": ((20, 30), (0, 64), (7, 7)),
    "empty_keys": ((20, 30), (17, 0), (7, 70)),
    "empty_last": ((20, 30), (0, 0)),
    "all_empty": ((0, 0), (0, 0)),
    "no_keys_at_all": ((5, 0), (70, 0)),
    "decode": ((1, 130), (1, 1), (1, 65), (1, 0)),
    "one_long": ((200, 200), (1, 1), (3, 3)),
    "many": tuple((i % 5, 3 * i % 11) for i in range(24)),
    "more_queries": ((130, 3), (64, 1)),
    "primes": ((2, 13), (47, 31), (11, 97)),
}
BIASES = ("bhqk", "b..k", "...k", "b.q.", "qk", ".h..")
CASE = Case(num_heads=4, num_kv_heads=2, sequences=SEQUENCES["edges"])


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window": (20, 5)}], ids=["full", "causal", "window"])
def test_sequences(device: Any, name: str, mask: dict[str, Any]) -> None:
    check(device, CASE.but(sequences=SEQUENCES[name], **mask))


@pytest.mark.parametrize("name", ["edges", "empty_keys", "decode", "more_queries"])
@pytest.mark.parametrize("num_splits", [2, 3])
def test_split_keys(device: Any, name: str, num_splits: int) -> None:
    check(device, CASE.but(sequences=SEQUENCES[name], options=cuflash.Options(num_splits=num_splits)))


@pytest.mark.parametrize("name", ["edges", "empty_first", "decode"])
@pytest.mark.parametrize("bias", BIASES)
def test_bias(device: Any, name: str, bias: str) -> None:
    """Sequence i reads the corner of its lengths of bias[i]."""
    check(device, CASE.but(sequences=SEQUENCES[name], bias=bias))


@pytest.mark.parametrize("name", ["edges", "empty_last", "decode", "all_empty"])
@pytest.mark.parametrize("tail", [(1, 0), (0, 1), (33, 70)], ids=str)
def test_tokens_behind_the_last_sequence_are_not_read(device: Any, name: str, tail: tuple[int, int]) -> None:
    check(device, CASE.but(sequences=SEQUENCES[name], tail=tail))


@pytest.mark.parametrize("layout", ["interleaved", "heads_first", "every_other_token", "page", "reversed_tokens"])
@pytest.mark.parametrize("name", ["edges", "empty_keys"])
def test_layouts(device: Any, name: str, layout: str) -> None:
    check(device, CASE.but(sequences=SEQUENCES[name], layout=layout))


@pytest.mark.parametrize("bounds", [(None, None), (64, None), (None, 80), (1000, 1000)], ids=str)
def test_bounds_on_the_lengths(device: Any, bounds: tuple[int | None, int | None]) -> None:
    """max_seqlen_q and max_seqlen_k may be left out or generous."""
    bounds = (bounds[0] and max(bounds[0], 65), bounds[1])
    inputs = make(CASE)
    out, lse = call(device, CASE, inputs, max_seqlen_q=bounds[0], max_seqlen_k=bounds[1])
    hold_to_oracle(CASE, inputs, out, lse)


@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_nan_in_one_sequence_stays_there(device: Any, index: int) -> None:
    inputs = make(CASE)
    k, v = inputs.k.copy(), inputs.v.copy()
    rows = slice(*inputs.cu_seqlens_q[index : index + 2])
    for array in (k, v):
        array[slice(*inputs.cu_seqlens_k[index : index + 2])] = np.nan
    out, lse = call(device, CASE, inputs._replace(k=k, v=v))
    clean, clean_lse = call(device, CASE, inputs)
    assert np.isnan(out[rows].astype(np.float32)).all()
    assert np.isnan(lse[:, rows]).all()
    others = np.ones(len(out), bool)
    others[rows] = False
    np.testing.assert_array_equal(out[others], clean[others])
    np.testing.assert_array_equal(lse[:, others], clean_lse[:, others])


@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window": (9, 3)}], ids=["full", "causal", "window"])
def test_equal_lengths_give_what_the_dense_call_gives(device: Any, mask: dict[str, Any]) -> None:
    dense = Case(batch=3, seqlen_q=33, seqlen_k=65, **mask)
    inputs = make(dense)
    packed = dense.but(sequences=((33, 65),) * 3)
    edges = [np.arange(4, dtype=np.int32) * n for n in (33, 65)]
    flat = [x.reshape(-1, *x.shape[2:]) for x in inputs[:3]]
    out, lse = call(device, packed, Inputs(*flat, None, *edges))
    want, want_lse = call(device, dense, inputs)
    np.testing.assert_allclose(out.reshape(want.shape).astype(float), want.astype(float), atol=1e-3)
    np.testing.assert_allclose(lse.reshape(-1, 3, 33).swapaxes(0, 1), want_lse, rtol=1e-5, atol=1e-5)
