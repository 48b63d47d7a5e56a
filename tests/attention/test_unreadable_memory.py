"""NaN in all memory that may not be read, and in keys that nobody sees: results are as if it were not there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cuflash
from tests.attention.cases import Case, Inputs, call, hold_to_oracle, make

CASE = Case(batch=2, num_heads=2, num_kv_heads=2)
UNSEEN = {
    "tiles": CASE.but(seqlen_q=33, seqlen_k=200, window=(40, None)),
    "part_of_a_tile": CASE.but(seqlen_q=20, seqlen_k=50, window=(7, None)),
    "tiles_and_a_part": CASE.but(seqlen_q=70, seqlen_k=190, causal=True, window=(13, None)),
    "one_query": CASE.but(seqlen_q=1, seqlen_k=150, causal=True, window=(5, None)),
    "one_query_split": CASE.but(seqlen_q=1, seqlen_k=150, window=(70, 0), options=cuflash.Options(num_splits=2)),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_keys_that_no_query_sees(device: Any, name: str) -> None:
    """Only the window's left side can hide a key from all queries: the first one sees the furthest to the left."""
    case = UNSEEN[name]
    keys = slice(case.seqlen_k - case.seqlen_q - case.window[0])
    inputs = make(case)
    k, v = inputs.k.copy(), inputs.v.copy()
    k[:, keys] = v[:, keys] = np.nan
    out, lse = call(device, case, inputs._replace(k=k, v=v))
    hold_to_oracle(case, inputs, out, lse)


def _poison(inputs: Inputs, name: str, index: tuple[Any, ...]) -> Inputs:
    array = getattr(inputs, name).copy()
    array[index] = np.nan
    return inputs._replace(**{name: array})


@pytest.mark.parametrize("array", ["q", "k", "v"])
@pytest.mark.parametrize("axis", ["batch", "head"])
def test_nan_of_one_batch_entry_or_head_stays_there(device: Any, array: str, axis: str) -> None:
    inputs = make(CASE)
    index = (1,) if axis == "batch" else (slice(None), slice(None), 0)
    out, lse = call(device, CASE, _poison(inputs, array, index))
    clean, clean_lse = call(device, CASE, inputs)
    here = (0,) if axis == "batch" else (slice(None), slice(None), 1)
    lse_here = (0,) if axis == "batch" else (slice(None), 1)
    np.testing.assert_array_equal(out[here], clean[here])
    np.testing.assert_array_equal(lse[lse_here], clean_lse[lse_here])
    assert np.isnan(out[index].astype(np.float32)).all()


def test_nan_in_one_query_stays_there(device: Any) -> None:
    inputs = make(CASE)
    out, lse = call(device, CASE, _poison(inputs, "q", (0, 7, 1, 3)))
    clean, clean_lse = call(device, CASE, inputs)
    assert np.isnan(out[0, 7, 1].astype(np.float32)).all()
    assert np.isnan(lse[0, 1, 7])
    out[0, 7, 1], lse[0, 1, 7] = clean[0, 7, 1], clean_lse[0, 1, 7]
    hold_to_oracle(CASE, inputs, out, lse)


@pytest.mark.parametrize("array", ["q", "k"])
def test_nan_that_is_seen_is_reported(device: Any, array: str) -> None:
    """NaN is never turned into a number."""
    inputs = make(CASE)
    out, lse = call(device, CASE, _poison(inputs, array, (slice(None), 3)))
    rows = (slice(None), 3) if array == "q" else ...
    assert np.isnan(out[rows].astype(np.float32)).all()
    assert np.isnan(lse[:, :, 3] if array == "q" else lse).all()


def test_nan_in_later_keys_of_a_causal_row(device: Any) -> None:
    """A NaN key poisons the rows that see it, lse of the others is untouched."""
    case = CASE.but(seqlen_q=65, seqlen_k=65, causal=True)
    inputs = make(case)
    _, lse = call(device, case, _poison(inputs, "k", (slice(None), slice(40, None))))
    _, clean_lse = call(device, case, inputs)
    np.testing.assert_allclose(lse[:, :, :40], clean_lse[:, :, :40], rtol=1e-5, atol=1e-6)
    assert np.isnan(lse[:, :, 40:]).all()
