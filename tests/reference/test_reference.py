"""Standard and chunked attention: against the oracle, finite differences, each other, and in every array module."""

from __future__ import annotations

import itertools
import tracemalloc
import warnings
from functools import partial
from importlib import import_module

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cuflash import InvalidShapeError, InvalidTypeError, InvalidValueError
from cuflash.reference import (
    chunked_attention,
    chunked_attention_vjp,
    standard_attention,
    standard_attention_vjp,
)
from tests.tolerances import assert_attention

small_chunks = partial(chunked_attention, query_chunk=4, key_chunk=3)
small_chunks_vjp = partial(chunked_attention_vjp, query_chunk=4, key_chunk=3)
FUNCTIONS = pytest.mark.parametrize("function", [standard_attention, small_chunks], ids=["standard", "chunked"])
VJPS = pytest.mark.parametrize("vjp", [standard_attention_vjp, small_chunks_vjp], ids=["standard", "chunked"])

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]
LENGTHS = [(1, 1), (4, 3), (7, 5), (5, 8), (13, 10), (3, 0), (0, 3)]
FEATURES = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (3, 2)},
    "left": {"window": (1, None), "causal": True},
    "softcap": {"softcap": 2.0, "scale": 0.7},
    "bias": {"bias": (2, 4, "q", "k"), "causal": True},
    "bias of heads": {"bias": (4, 1, 1)},
    "bias of keys": {"bias": ("k",)},
    "bias of queries": {"bias": (2, 1, "q", 1), "softcap": 1.5},
}


def make(len_q, len_k, feature, dtype=np.float64, factor=1.0, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (2, len_q, 4, 6), (2, len_k, 2, 6), (2, len_k, 2, 5)
    q, k, v = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
    keywords = dict(FEATURES[feature])
    if "bias" in keywords:
        shape = [{"q": len_q, "k": len_k}.get(n, n) for n in keywords["bias"]]
        keywords["bias"] = rng.standard_normal(shape).astype(dtype)
    return q * dtype(factor), k, v, keywords


@FUNCTIONS
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize(("len_q", "len_k"), LENGTHS)
def test_against_the_oracle(function, feature, len_q, len_k) -> None:
    for dtype, factor in itertools.product(DTYPES, (1, 30)):
        q, k, v, keywords = make(len_q, len_k, feature, dtype, factor)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            out, lse = function(q, k, v, return_lse=True, **keywords)
        assert out.dtype == dtype
        assert_attention(out, lse, q, k, v, **keywords)


@FUNCTIONS
def test_ranks(function) -> None:
    q, k, v, _ = make(5, 7, "plain")
    out, lse = function(q, k, v, return_lse=True)
    for b in range(2):
        out_3, lse_3 = function(q[b], k[b], v[b], return_lse=True)
        np.testing.assert_allclose(out_3, out[b])
        np.testing.assert_allclose(lse_3, lse[b])
    out_2, lse_2 = function(q[0, :, 0], k[0, :, 0], v[0, :, 0], return_lse=True)
    np.testing.assert_allclose(out_2, out[0, :, 0])
    np.testing.assert_allclose(lse_2, lse[0, 0])


def test_ragged_key_chunks_count_every_key_once() -> None:
    """The authors' code clamps the slice of the last chunk, so that keys before it enter twice."""
    q, k, v, _ = make(6, 11, "plain")
    whole = chunked_attention(q, k, v, return_lse=True, key_chunk=11)
    for key_chunk in range(1, 14):
        for got, want in zip(chunked_attention(q, k, v, return_lse=True, key_chunk=key_chunk), whole, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-12, err_msg=f"{key_chunk=}")


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 50), st.integers(1, 50), st.booleans())
def test_chunk_sizes_change_nothing(len_q, len_k, query_chunk, key_chunk, causal) -> None:
    q, k, v, _ = make(len_q, len_k, "plain", seed=len_q * len_k)
    out, lse = chunked_attention(q, k, v, causal=causal, return_lse=True, query_chunk=query_chunk, key_chunk=key_chunk)
    assert_attention(out, lse, q, k, v, causal=causal)


def test_scores_of_a_hidden_chunk_do_not_set_the_maximum() -> None:
    """A chunk that a row does not see must not weigh the others down by a maximum of its own."""
    q, k, v = np.full((1, 1), 1.0), np.array([[-2000.0], [-2001.0], [0.0], [0.0]]), np.arange(4.0)[:, None]
    bias = np.array([0, 0, -np.inf, -np.inf])
    out, lse = chunked_attention(q, k, v, bias=bias, return_lse=True, key_chunk=2)
    assert_attention(out, lse, q, k, v, bias=bias)
    assert out[0, 0] == pytest.approx(1 / (1 + np.e))


@VJPS
@pytest.mark.parametrize("feature", FEATURES)
def test_gradients_are_finite_differences(vjp, feature) -> None:
    q, k, v, keywords = make(5, 7, feature)
    bias = keywords.pop("bias", None)
    arrays = [q, k, v] if bias is None else [q, k, v, bias]
    rng = np.random.default_rng(1)

    def call(arrays):
        return vjp(*arrays[:3], bias=None if bias is None else arrays[3], return_lse=True, **keywords)

    result, pullback = call(arrays)
    cotangent = tuple(rng.standard_normal(x.shape) for x in result)
    gradients = pullback(cotangent)
    assert len(gradients) == len(arrays)
    for i, (array, gradient) in enumerate(zip(arrays, gradients, strict=True)):
        assert gradient.shape == array.shape
        step = 1e-6 * rng.standard_normal(array.shape)
        values = []
        for sign in (1, -1):
            moved = [*arrays[:i], array + sign * step, *arrays[i + 1 :]]
            values.append(sum((c * r).sum() for c, r in zip(cotangent, call(moved)[0], strict=True)))
        assert (gradient * step).sum() == pytest.approx((values[0] - values[1]) / 2, rel=1e-6, abs=1e-13)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize(("len_q", "len_k"), LENGTHS)
def test_both_gradients_agree(feature, len_q, len_k) -> None:
    q, k, v, keywords = make(len_q, len_k, feature, factor=5)
    (out, lse), pullback = standard_attention_vjp(q, k, v, return_lse=True, **keywords)
    _, chunked = small_chunks_vjp(q, k, v, return_lse=True, **keywords)
    rng = np.random.default_rng(2)
    cotangent = rng.standard_normal(out.shape), rng.standard_normal(lse.shape)
    for got, want in zip(chunked(cotangent), pullback(cotangent), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-12)
    _, chunked = small_chunks_vjp(q, k, v, **keywords)
    for got, want in zip(chunked(cotangent[0]), pullback((cotangent[0], np.zeros_like(lse))), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-12)


@VJPS
def test_rows_that_see_nothing_have_no_gradient(vjp) -> None:
    q, k, v, _ = make(6, 2, "plain")
    (out, lse), pullback = vjp(q, k, v, causal=True, return_lse=True)
    assert not out[:, :4].any()
    assert np.isneginf(lse[:, :, :4]).all()
    dq, dk, dv = pullback((np.ones_like(out), np.ones_like(lse)))
    assert not dq[:, :4].any()
    assert all(np.isfinite(g).all() for g in (dq, dk, dv))


def test_gradients_have_the_inputs_dtypes() -> None:
    q, k, v, keywords = make(5, 7, "bias", np.float16)
    result, pullback = small_chunks_vjp(q, k, v, **{**keywords, "bias": keywords["bias"].astype(np.float32)})
    assert [g.dtype for g in pullback(result)] == [np.float16] * 3 + [np.float32]


@pytest.mark.parametrize("module", ["torch", "jax.numpy"])
@pytest.mark.parametrize("feature", ["left", "softcap", "bias"])
@VJPS
def test_array_modules(module, feature, vjp) -> None:
    xp = import_module(module)
    q, k, v, keywords = make(6, 8, feature, np.float32)
    convert = xp.asarray
    (out, lse), pullback = vjp(q, k, v, return_lse=True, **keywords)
    others = {name: convert(x) if isinstance(x, np.ndarray) else x for name, x in keywords.items()}
    (other_out, other_lse), other_pullback = vjp(*map(convert, (q, k, v)), return_lse=True, **others)
    assert type(other_out) is type(convert(out))
    pairs = [(other_out, out), (other_lse, lse)]
    pairs += zip(other_pullback((convert(out), convert(lse))), pullback((out, lse)), strict=True)
    for got, want in pairs:
        np.testing.assert_allclose(np.asarray(got), want, rtol=1e-4, atol=2e-5)


@VJPS
@pytest.mark.parametrize("feature", ["causal", "softcap", "bias"])
def test_arrays_of_the_device(device, feature, vjp) -> None:
    """CuPy's with --device=cuda; elsewhere NumPy's."""
    q, k, v, keywords = make(7, 5, feature)

    def out_and_gradients(q, k, v, **keywords):
        out, pullback = vjp(q, k, v, **keywords)
        return (out, *pullback(out))

    want = out_and_gradients(q, k, v, **keywords)
    for got, wanted in zip(device.run(out_and_gradients, q, k, v, **keywords), want, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-10, atol=1e-12)


def test_bfloat16_of_torch() -> None:
    import torch

    q, k, v = (torch.randn(9, 2, 8, dtype=torch.bfloat16) for _ in range(3))
    out = small_chunks(q, k, v)
    assert out.dtype == torch.bfloat16
    assert (out.float() - standard_attention(q.float(), k.float(), v.float())).abs().max() < 0.02


def peak_beyond(function, *arrays, **keywords) -> int:
    """Bytes that a call allocates at its peak beyond what it returns."""
    tracemalloc.start()
    result = function(*arrays, **keywords)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del result
    return peak - held


def test_memory_is_far_below_that_of_standard_attention() -> None:
    """At n = 2¹⁴ with one head of 64: the paper has 59 times less (32 with gradient) than n² scores need."""
    n = 2**14
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((n, 64), dtype=np.float32) for _ in range(3))
    standard = 2 * 4 * n * n  # S and P in float32
    assert peak_beyond(chunked_attention, q, k, v, query_chunk=1024) < standard / 59
    assert peak_beyond(lambda: chunked_attention_vjp(q, k, v)[1](q)) < standard / 32


def test_memory_grows_with_the_root() -> None:
    rng = np.random.default_rng(0)
    peaks = []
    for n in (2**10, 2**14):
        q, k = rng.standard_normal((16, 1), dtype=np.float32), rng.standard_normal((n, 1), dtype=np.float32)
        peaks.append(peak_beyond(chunked_attention, q, k, k))
    assert peaks[1] < 5 * peaks[0]


@FUNCTIONS
def test_bad_arguments(function) -> None:
    q, k, v, _ = make(4, 5, "plain")
    with pytest.raises(InvalidShapeError, match=r"k\.shape = \(2, 5, 2, 5\): head_dim 5 must be 6"):
        function(q, v, v)
    with pytest.raises(InvalidShapeError, match=r"bias\.shape = \(3,\)"):
        function(q, k, v, bias=np.zeros(3))
    with pytest.raises(InvalidTypeError, match="k = <class 'list'>: must be an array"):
        function(q, k.tolist(), v)
    with pytest.raises(InvalidValueError, match=r"window\[0\] = -1: must be >= 0 or None"):
        function(q, k, v, window=(-1, 0))


def test_arrays_of_two_modules() -> None:
    import torch

    q, k, v, _ = make(4, 5, "plain")
    with pytest.raises(InvalidTypeError, match="k is an array of torch: must be of numpy, the module of q"):
        standard_attention(q, torch.asarray(k), v)


def test_bad_chunks() -> None:
    q, k, v, _ = make(4, 5, "plain")
    with pytest.raises(InvalidValueError, match="query_chunk = 0: must be >= 1"):
        chunked_attention(q, k, v, query_chunk=0)
    with pytest.raises(InvalidTypeError, match=r"key_chunk = 2\.5: must be an integer"):
        chunked_attention(q, k, v, key_chunk=2.5)
