"""Extreme scores: ±1e4, outliers, strongly negative ones, rows and elements of -inf."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cuflash
from tests.attention.cases import BIAS_VALUES, VALUES, Case, call, check, hold_to_oracle, make

CASE = Case(num_heads=2, num_kv_heads=1)
LONG = CASE.of_lengths(20, 150)


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"softcap": 30.0}], ids=["full", "causal", "softcap"])
def test_scores(device: Any, dtype: str, values: str, mask: dict[str, Any]) -> None:
    check(device, LONG.but(dtype=dtype, values=values, **mask))


@pytest.mark.parametrize("bias_values", BIAS_VALUES)
@pytest.mark.parametrize("bias", ["bhqk", "..qk", "...k", "..q.", "b.q."])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_bias(device: Any, bias_values: str, bias: str, num_splits: int) -> None:
    """-inf in the bias hides a key as a mask does; a row of -inf sees nothing."""
    check(device, LONG.but(bias=bias, bias_values=bias_values, options=cuflash.Options(num_splits=num_splits)))


@pytest.mark.parametrize("bias_values", ["inf_elements", "inf_rows", "inf_all"])
@pytest.mark.parametrize("bias_dtype", ["float16", "bfloat16"])
def test_infinite_bias_of_narrow_dtypes(device: Any, bias_values: str, bias_dtype: str) -> None:
    check(device, LONG.but(bias="bhqk", bias_values=bias_values, bias_dtype=bias_dtype, causal=True))


@pytest.mark.parametrize("bias_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("rows", ["some_keys", "all_keys"])
def test_the_lowest_number_as_a_mask(device: Any, bias_dtype: str, rows: str) -> None:
    """As frameworks spell masks. It is finite: a row that has nothing else weighs its keys equally.

    Kernels keep scores in base 2, where what is below -2.3e38 is -inf; so such a row holds -2e38 here.
    """
    case = LONG.but(bias="..qk", bias_dtype=bias_dtype)
    inputs = make(case)
    lowest = float(ml_dtypes.finfo(bias_dtype).min)
    if rows == "all_keys":
        lowest = max(lowest, -2e38)
    bias = inputs.bias.copy()
    bias[..., :5, : 100 if rows == "some_keys" else None] = lowest
    inputs = inputs._replace(bias=bias)
    out, lse = call(device, case, inputs)
    hold_to_oracle(case, inputs, out, lse)


@pytest.mark.parametrize("tile", [0, 1, 2])
def test_first_visible_key_in_a_later_tile(device: Any, tile: int) -> None:
    """Whole tiles of -inf before, between or behind the visible keys leave no trace."""
    case = Case(batch=1, seqlen_q=20, seqlen_k=400, bias="...k")
    inputs = make(case)
    bias = np.full_like(inputs.bias, -np.inf)
    bias[..., 130 * tile + 3 : 130 * tile + 9] = 0
    inputs = inputs._replace(bias=bias)
    out, lse = call(device, case, inputs)
    hold_to_oracle(case, inputs, out, lse)


@pytest.mark.parametrize("softcap", [1e-3, 0.5, 50.0, 1e4])
def test_softcap(device: Any, softcap: float) -> None:
    check(device, LONG.but(softcap=softcap, values="scores_1e2"))


@pytest.mark.parametrize("scale", [1e-6, 0.01, 1.0, 37.0])
def test_scale(device: Any, scale: float) -> None:
    check(device, LONG.but(scale=scale))


def test_the_same_score_everywhere(device: Any) -> None:
    """Equal weights: the mean of v, and lse = log of the number of keys."""
    case = LONG.but(values="zeros")
    inputs = make(case)
    out, lse = call(device, case, inputs)
    np.testing.assert_allclose(lse, np.log(150), rtol=1e-6)
    mean = inputs.v.astype(np.float64).mean(axis=1, keepdims=True)
    np.testing.assert_allclose(out.astype(float), np.broadcast_to(mean, out.shape), atol=1e-3)


def test_large_values(device: Any) -> None:
    """v near the end of float16: a weighted mean cannot overflow."""
    inputs = make(LONG)
    inputs = inputs._replace(v=np.full_like(inputs.v, 65000))
    out, lse = call(device, LONG, inputs)
    hold_to_oracle(LONG, inputs, out, lse)


def test_subnormal_values(device: Any) -> None:
    """Subnormal float16 inputs are not flushed to zero."""
    inputs = make(LONG)
    inputs = inputs._replace(v=np.full_like(inputs.v, 2.0**-22))
    out, _ = call(device, LONG, inputs)
    np.testing.assert_array_equal(out, inputs.v[:, :20].repeat(2, axis=2))
