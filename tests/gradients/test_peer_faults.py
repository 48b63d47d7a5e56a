"""Faults that the gradients of other attention kernels are known for, each as a test of its own."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cuflash
from tests import oracle, tolerances
from tests.attention.cases import Case, make
from tests.gradients.cases import check, cotangent, gradients, hold_to_oracle, vjp


@pytest.mark.parametrize("seqlen", [64, 192])
@pytest.mark.parametrize(
    "mask", [{"causal": True}, {"window": (70, 0)}, {"bias": "qk", "bias_values": "inf_elements"}], ids=str
)
def test_nan_dq_with_a_mask_and_scores_under_minus_88(device: Any, dtype: str, seqlen: int, mask: Any) -> None:
    """Lengths of 64 more than a multiple of 128 with lse < -88.7: exp(-lse) overflows in what pads a tile."""
    case = Case(dtype=dtype, batch=1, seqlen_q=seqlen, seqlen_k=seqlen, values="scores_negative", **mask)
    inputs = make(case)
    given = cotangent(case, inputs)
    assert (vjp(case, inputs)[0][1] < -88.7).all()
    got = gradients(device, case, inputs, given)
    assert all(np.isfinite(x.astype(np.float32)).all() for x in got)
    hold_to_oracle(case, inputs, given, got)


@pytest.mark.parametrize("seqlen_k", [1, 64, 150])
def test_nan_dk_and_dv_with_one_query_and_strongly_negative_scores(device: Any, dtype: str, seqlen_k: int) -> None:
    case = Case(dtype=dtype, seqlen_q=1, seqlen_k=seqlen_k, values="scores_negative")
    check(case, device)
    check(case.but(values="normal", bias="...k", bias_values="lowest"), device)


def test_strided_views_are_not_taken_for_dense_arrays(device: Any, dtype: str) -> None:
    case = Case(dtype=dtype, num_kv_heads=2)
    q, k, v, *_ = inputs = make(case)
    dout, _ = cotangent(case, inputs)

    def pull(cut: slice, *arrays: Any) -> Any:
        q, k, v, dout = (x[..., cut] for x in arrays)
        return cuflash.vjp(cuflash.attention, q, k, v)[1](dout)

    wide = [np.concatenate([x, x + 1], axis=-1) for x in (q, k, v, dout)]
    dense = device.run(pull, slice(None), q, k, v, dout)
    for got, want in zip(device.run(pull, slice(64), *wide), dense, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("array", ["k", "v"])
@pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
def test_keys_that_no_query_sees_may_hold_anything(device: Any, dtype: str, array: str, value: float) -> None:
    """In the tiles that are visited too; their gradients are 0."""
    case = Case(dtype=dtype, seqlen_q=20, seqlen_k=90, causal=True, window=(7, None))
    q, k, v, *_ = inputs = make(case)
    given = cotangent(case, inputs)
    unseen = slice(0, 90 - 20 - 7)
    want = oracle.gradients(q, k, v, *given, causal=True, window=(7, None))
    standard = oracle.standard_gradients(q, k, v, *given, causal=True, window=(7, None))
    {"k": k, "v": v}[array][:, unseen] = value
    got = gradients(device, case, inputs, given)
    assert not got[1][:, unseen].any()
    assert not got[2][:, unseen].any()
    tolerances.assert_gradients(got, want, standard, dtype)


@pytest.mark.parametrize("array", ["k", "v"])
def test_what_a_query_does_not_see_does_not_poison_it(array: str) -> None:
    """On the CPU: the last key holds NaN and only the last query sees it, the others' gradients are as without it."""
    q, k, v, *_ = inputs = make(Case(dtype="float32", seqlen_q=90, seqlen_k=90))
    dout, _ = cotangent(Case(dtype="float32", seqlen_q=90), inputs)
    dq, *_ = cuflash.vjp(cuflash.attention, q, k, v, causal=True)[1](dout)
    {"k": k, "v": v}[array][:, -1] = np.nan
    poisoned, *_ = cuflash.vjp(cuflash.attention, q, k, v, causal=True)[1](dout)
    np.testing.assert_allclose(poisoned[:, :-1], dq[:, :-1], atol=5e-6)
    assert np.isnan(poisoned[:, -1]).any()


def test_rows_that_see_nothing_have_no_gradient_whatever_they_hold(device: Any, dtype: str) -> None:
    case = Case(dtype=dtype, seqlen_q=40, seqlen_k=15, causal=True)
    inputs = make(case)
    dout, dlse = given = cotangent(case, inputs)
    want = gradients(device, case, inputs, given)
    for rows in inputs.q[:, :25], dout[:, :25], dlse[..., :25]:
        rows[...] = np.nan
    got = gradients(device, case, inputs, given)
    assert not got[0][:, :25].any()
    for a, b in zip(got, want, strict=True):  # NaN in q keeps the CPU from a shortcut: not the same bits
        np.testing.assert_allclose(a.astype(float), b.astype(float), atol=20 * float(ml_dtypes.finfo(a.dtype).eps))


def test_a_bias_of_minus_infinity_hides_a_row(device: Any, dtype: str) -> None:
    check(Case(dtype=dtype, bias="..q.", bias_values="inf_rows"), device)
    check(Case(dtype=dtype, bias="bhqk", bias_values="inf_all"), device)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("bias", ["", "qk", "h.."])
def test_zero_lengths(device: Any, dtype: str, shape: tuple[int, int], bias: str) -> None:
    for changes in ({}, {"batch": 0}):
        check(Case(dtype=dtype, bias=bias, causal=True, **changes).of_lengths(*shape), device)
        check(Case(dtype=dtype, bias=bias, **changes), device)


@pytest.mark.parametrize("bias", ["", "qk", "h.."])
def test_zero_lengths_of_rows(bias: str) -> None:
    for changes in ({"head_dim": 0}, {"head_dim_v": 0}):
        check(Case(dtype="float32", bias=bias, **changes))
        check(Case(dtype="float32", bias=bias, causal=True, **changes).of_lengths(0, 5))


def test_no_query_heads(device: Any) -> None:
    q, k = np.zeros((2, 5, 0, 64), np.float16), np.ones((2, 7, 3, 64), np.float16)

    def pull(q: Any, k: Any, dout: Any) -> Any:
        return cuflash.vjp(cuflash.attention, q, k, k)[1](dout)

    dq, dk, dv = device.run(pull, q, k, q)
    assert (dq.shape, dk.shape, dv.shape) == (q.shape, k.shape, k.shape)
    assert not dk.any()
    assert not dv.any()


def test_float32_gradients_keep_float32_accuracy() -> None:
    case = Case(dtype="float32", seqlen_q=50, seqlen_k=300, head_dim=128, head_dim_v=128)
    inputs = make(case)
    given = cotangent(case, inputs)
    want = oracle.gradients(*inputs[:3], *given)
    for got, exact in zip(vjp(case, inputs)[1](given), want, strict=False):
        np.testing.assert_allclose(got, exact, atol=5e-6)
