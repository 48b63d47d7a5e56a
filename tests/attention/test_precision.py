"""float32 accurate to float32, TF32 on demand, float64 to the last bits; what is not finite."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

import cuflash
from cuflash import Options
from tests import oracle
from tests.attention.cases import Case, Inputs, call, make
from tests.devices import DEVICES

LONG = Case(dtype="float32", batch=1, num_heads=1, num_kv_heads=1, seqlen_q=40, seqlen_k=1500)
KINDS = ("normal", "values_near_one", "values_equal", "one_key_dominates", "large_scores", "equal_weights", "outliers")


def inputs_of(kind: str, seqlen_k: int, head_dim: int, seed: int) -> list[np.ndarray]:
    """q, k and v in float32, whose products or sums are hard in one way or another."""
    rng = np.random.default_rng([seed, seqlen_k, head_dim])
    q, k, v = (rng.standard_normal((1, n, 1, head_dim)) for n in (40, seqlen_k, seqlen_k))
    if kind == "outliers":
        for x in (q, k, v):
            x += 10 * rng.standard_normal(x.shape) * (rng.random(x.shape) < 0.001)
    q *= {"one_key_dominates": 20, "large_scores": 100, "equal_weights": 0.01}.get(kind, 1)
    if kind == "values_near_one":
        v = 1 + 0.1 * v
    if kind == "values_equal":
        v = np.full_like(v, 1.2345679)
    return [x.astype(np.float32) for x in (q, k, v)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("seqlen_k", "head_dim"), [(200, 32), (1500, 64), (700, 128), (200, 256)])
def test_float32_errs_no_more_than_twice_what_standard_attention_does(
    device: Any, kind: str, seqlen_k: int, head_dim: int
) -> None:
    """Root mean square over a few draws of the largest error: that of one draw is luck."""
    draws = [inputs_of(kind, seqlen_k, head_dim, seed) for seed in range(3)]
    q, k, v = map(np.concatenate, zip(*draws, strict=True))
    want = oracle.attention(q, k, v).out
    outs = device.run(cuflash.attention, q, k, v), oracle.standard(q, k, v).out
    of_kernel, of_standard = (np.sqrt((np.abs(out - want).max((1, 2, 3)) ** 2).mean()) for out in outs)
    assert of_kernel <= 2 * of_standard


def test_errors_do_not_grow_with_the_number_of_keys(device: Any) -> None:
    """A mean of values near one: the more keys, the longer the sums."""
    errors = []
    for seqlen_k in (512, 8192):
        q, k, v = inputs_of("values_near_one", seqlen_k, 16, 0)
        out = device.run(cuflash.attention, q[:, :16], k, v)
        errors.append(np.abs(out - oracle.attention(q[:, :16], k, v).out).max())
    assert errors[1] < 6e-7
    assert errors[1] < 3 * errors[0]


@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"bias": "..qk"}, {"sequences": ((20, 300), (13, 5))}], ids=str)
def test_tf32(device: Any, mask: dict[str, Any]) -> None:
    """Rounded to 11 bits, not cut: the error has no sign. lse is float32's own."""
    if device.name == "cpu":
        return
    case = LONG.but(seqlen_k=300, options=Options(precision="tf32"), **mask)
    inputs = make(case)
    out, lse = call(device, case, inputs)
    fine, fine_lse = call(device, case.but(options=None), inputs)
    assert out.dtype == np.float32
    assert 2e-5 < np.abs(out - fine).max() < 2e-3
    assert abs((out - fine).mean()) < 2e-5
    np.testing.assert_allclose(lse, fine_lse, atol=1e-3)


def test_tf32_is_for_float32_on_kernels(device: Any) -> None:
    q = np.zeros((1, 5, 1, 16), np.float32 if device.name == "cpu" else np.float16)
    out = np.full_like(q, 7)
    with pytest.raises(cuflash.InvalidValueError, match=r"precision.*'tf32'.*must be None"):
        device.run(cuflash.attention, q, q, q, out=out, options=Options(precision="tf32"))
    assert (out == 7).all()


def test_float64_of_large_scores(device: Any) -> None:
    """Scores of ±1e4: what standard attention in float64 has, whose exponentials lose the digits before the point."""
    case = LONG.but(dtype="float64", seqlen_k=300, values="scores_1e4")
    inputs = make(case)
    out, lse = call(device, case, inputs)
    want = oracle.attention(*inputs[:3])
    np.testing.assert_allclose(out, want.out, atol=1e-11)
    np.testing.assert_allclose(lse, want.lse, rtol=1e-14)


@cache
def all_finite(device_name: str, dtype: str) -> tuple[Case, Inputs, Any]:
    """A case, its inputs, and what a device makes of them."""
    case = LONG.but(dtype=dtype, seqlen_k=100, causal=True)
    inputs = make(case)
    return case, inputs, call(DEVICES[device_name](), case, inputs)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("array", ["q", "k", "v"])
def test_what_is_not_finite_stays_with_its_rows(device: Any, dtype: str, array: str, value: float) -> None:
    """Rows that see it become NaN or infinite, or pass by a key of score -inf; the others do not change by a bit."""
    if device.name == "cpu":
        return
    case, inputs, (whole, whole_lse) = all_finite(device.name, dtype)
    odd = {name: getattr(inputs, name).copy() for name in "qkv"}
    row = 20 if array == "q" else 80  # key 80 is seen by the queries from 20 on, others visit its tile
    odd[array][0, row, 0, 3] = value
    out, lse = call(device, case, inputs._replace(**odd))
    touched = np.arange(20, 21 if array == "q" else 40)
    rest = np.setdiff1d(np.arange(40 if array == "q" else 20), touched)
    np.testing.assert_array_equal(lse[0, 0, rest], whole_lse[0, 0, rest])
    if array == "v":  # 0 times what is not finite: columns of rows that visit the tile
        np.testing.assert_array_equal(np.delete(out, 3, axis=-1), np.delete(whole, 3, axis=-1))
        assert not np.isfinite(out[0, touched, 0, 3].astype(float)).any()
    else:
        np.testing.assert_array_equal(out[0, rest], whole[0, rest])
        if np.isnan(value):
            assert np.isnan(out[0, touched].astype(float)).all()
