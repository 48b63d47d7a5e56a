"""Faults that the gradients of other attention kernels are known for, each as a test of its own."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import cuflash
from tests import oracle, tolerances
from tests.attention.cases import Case, make
from tests.devices import ALL_DTYPES
from tests.gradients.cases import check, cotangent, vjp

by_dtype = pytest.mark.parametrize("dtype", ALL_DTYPES)


@by_dtype
@pytest.mark.parametrize("seqlen", [64, 192, 320])
@pytest.mark.parametrize(
    "mask", [{"causal": True}, {"window": (70, 0)}, {"bias": "qk", "bias_values": "inf_elements"}], ids=str
)
def test_nan_dq_with_a_mask_and_scores_under_minus_88(dtype, seqlen, mask) -> None:
    """Lengths of 64 more than a multiple of 128 with lse < -88.7: exp(-lse) overflows in what pads a tile."""
    case = Case(dtype=dtype, batch=1, seqlen_q=seqlen, seqlen_k=seqlen, values="scores_negative", **mask)
    inputs = make(case)
    (_, lse), pullback = vjp(case, inputs)
    assert (lse < -88.7).all()
    assert all(np.isfinite(x.astype(np.float32)).all() for x in pullback(cotangent(case, inputs)))
    check(case)


@by_dtype
@pytest.mark.parametrize("seqlen_k", [1, 64, 150, 500])
def test_nan_dk_and_dv_with_one_query_and_strongly_negative_scores(dtype, seqlen_k) -> None:
    case = Case(dtype=dtype, seqlen_q=1, seqlen_k=seqlen_k, values="scores_negative")
    inputs = make(case)
    assert all(np.isfinite(x.astype(np.float32)).all() for x in vjp(case, inputs)[1](cotangent(case, inputs)))
    check(case)
    check(case.but(values="normal", bias="...k", bias_values="lowest"))


def test_strided_views_are_not_taken_for_dense_arrays() -> None:
    q, k, v, *_ = inputs = make(Case(dtype="float32", num_kv_heads=2))
    dout, _ = cotangent(Case(dtype="float32"), inputs)
    dense = cuflash.vjp(cuflash.attention, q, k, v)[1](dout)
    wide = [np.concatenate([x, x + 1], axis=-1)[..., :64] for x in (q, k, v, dout)]
    for got, want in zip(cuflash.vjp(cuflash.attention, *wide[:3])[1](wide[3]), dense, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("array", ["k", "v"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
def test_keys_that_no_query_sees_may_hold_anything(array, value) -> None:
    """In the tiles that are visited too; their gradients are 0."""
    q, k, v, *_ = inputs = make(Case(dtype="float32", seqlen_q=20, seqlen_k=90))
    given = cotangent(Case(dtype="float32", seqlen_q=20), inputs)
    unseen = slice(0, 90 - 20 - 7)
    {"k": k, "v": v}[array][:, unseen] = value
    _, pullback = cuflash.vjp(cuflash.attention, q, k, v, causal=True, window=(7, None), return_lse=True)
    gradients = pullback(given)
    assert not gradients[1][:, unseen].any()
    assert not gradients[2][:, unseen].any()
    want = oracle.gradients(q, k, v, *given, causal=True, window=(7, None))
    standard = oracle.standard_gradients(q, k, v, *given, causal=True, window=(7, None))
    tolerances.assert_gradients(gradients, want, standard, np.float32)


@pytest.mark.parametrize("array", ["k", "v"])
def test_what_a_query_does_not_see_does_not_poison_it(array) -> None:
    """The last key holds NaN and only the last query sees it: the gradients of the other queries are as without it."""
    q, k, v, *_ = inputs = make(Case(dtype="float32", seqlen_q=90, seqlen_k=90))
    dout, _ = cotangent(Case(dtype="float32", seqlen_q=90), inputs)
    dq, *_ = cuflash.vjp(cuflash.attention, q, k, v, causal=True)[1](dout)
    {"k": k, "v": v}[array][:, -1] = np.nan
    poisoned, *_ = cuflash.vjp(cuflash.attention, q, k, v, causal=True)[1](dout)
    np.testing.assert_allclose(poisoned[:, :-1], dq[:, :-1], atol=5e-6)
    assert np.isnan(poisoned[:, -1]).any()


@by_dtype
def test_rows_that_see_nothing_have_no_gradient_whatever_they_hold(dtype) -> None:
    q, k, v, *_ = inputs = make(Case(dtype=dtype, seqlen_q=40, seqlen_k=15))
    dout, dlse = cotangent(Case(dtype=dtype, seqlen_q=40), inputs)
    want = cuflash.vjp(cuflash.attention, q, k, v, causal=True, return_lse=True)[1]((dout, dlse))
    for array, rows in ((q, (slice(None), slice(25))), (dout, (slice(None), slice(25))), (dlse, (..., slice(25)))):
        array[rows] = np.nan
    got = cuflash.vjp(cuflash.attention, q, k, v, causal=True, return_lse=True)[1]((dout, dlse))
    assert not got[0][:, :25].any()
    for a, b in zip(got, want, strict=True):  # NaN in q keeps the forward from a shortcut: not the same bits
        np.testing.assert_allclose(a.astype(float), b.astype(float), atol=10 * float(ml_dtypes.finfo(a.dtype).eps))


@by_dtype
def test_a_bias_of_minus_infinity_hides_a_row(dtype) -> None:
    check(Case(dtype=dtype, bias="..q.", bias_values="inf_rows"))
    check(Case(dtype=dtype, bias="bhqk", bias_values="inf_all"))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("bias", ["", "qk", "h.."])
def test_zero_lengths(shape, bias) -> None:
    for changes in ({}, {"batch": 0}, {"head_dim": 0}, {"head_dim_v": 0}):
        check(Case(dtype="float32", bias=bias, causal=True, **changes).of_lengths(*shape))
        check(Case(dtype="float32", bias=bias, **changes))


def test_float32_gradients_keep_float32_accuracy() -> None:
    case = Case(dtype="float32", seqlen_q=50, seqlen_k=300, head_dim=128, head_dim_v=128)
    inputs = make(case)
    given = cotangent(case, inputs)
    want = oracle.gradients(*inputs[:3], *given)
    for got, exact in zip(vjp(case, inputs)[1](given), want, strict=False):
        np.testing.assert_allclose(got, exact, atol=5e-6)
