"""The oracle against hand-computed attention, and the tolerances against planted errors."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from tests import oracle, tolerances

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]


def test_by_hand() -> None:
    q, k, v = np.array([[1.0], [2.0]]), np.array([[0.0], [np.log(3)]]), np.array([[4.0, 0.0], [8.0, 1.0]])
    out, lse = oracle.attention(q, k, v)
    np.testing.assert_allclose(out, [[7, 0.75], [7.6, 0.9]])  # weights 1:3 and 1:9
    np.testing.assert_allclose(lse, np.log([4, 10]))
    out, lse = oracle.attention(q, k, v, causal=True, bias=np.array([0.0, np.log(2)]))
    np.testing.assert_allclose(out, [[4, 0], [4 * 19 / 19 + 4 * 18 / 19, 18 / 19]])
    np.testing.assert_allclose(lse, np.log([1, 19]))


def test_windows_align_to_the_bottom_right() -> None:
    assert oracle.visible(2, 4, causal=True).astype(int).tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert oracle.visible(2, 4, window=(1, 0)).astype(int).tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]
    assert oracle.visible(3, 1, window=(0, None)).astype(int).tolist() == [[1], [1], [1]]
    assert oracle.visible(3, 1, causal=True).astype(int).tolist() == [[0], [0], [1]]


def test_rows_that_see_nothing_and_unseen_nan() -> None:
    q, k, v = np.ones((3, 1)), np.ones((1, 1)), np.full((1, 1), 5.0)
    out, lse = oracle.attention(q, k, v, causal=True)
    assert out.tolist() == [[0], [0], [5]]
    assert lse.tolist() == [-np.inf, -np.inf, 1]
    k, v = np.array([[np.nan], [1.0]]), np.array([[np.nan], [2.0]])
    assert oracle.attention(q[:1], k, v, window=(0, None)).out.tolist() == [[2]]


def test_pairs_that_are_seen() -> None:
    """A boolean array does what a bias of -inf does, head by head, together with a window; gradients too."""
    rng = np.random.default_rng(1)
    q, k, v, dout = (rng.standard_normal((2, n, h, 4)) for n, h in ((5, 4), (7, 2), (7, 2), (5, 4)))
    for shape in ((5, 7), (4, 5, 7), (2, 1, 5, 7), (2, 4, 1, 7), (5, 1)):
        seen = rng.random(shape) < 0.5
        bias = np.where(seen, 0.0, -np.inf)
        for keywords in ({}, {"causal": True}, {"window": (2, 1)}):
            got, want = (
                oracle.attention(q, k, v, seen=seen, **keywords),
                oracle.attention(q, k, v, bias=bias, **keywords),
            )
            for mine, other in zip(got, want, strict=True):
                np.testing.assert_allclose(mine, other, atol=1e-12)
            pair = (oracle.gradients(q, k, v, dout, **keywords, **{name: array}) for name, array in
                    (("seen", seen), ("bias", bias)))  # fmt: skip
            for mine, other in zip(*(gradients[:3] for gradients in pair), strict=True):
                np.testing.assert_allclose(mine, other, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_planted_errors_are_found(dtype) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, n, h, 8)).astype(dtype) for n, h in ((9, 4), (13, 2), (13, 2)))
    want = oracle.attention(q, k, v, causal=True)
    out, lse = want.out.astype(dtype), want.lse.astype(tolerances.lse_dtype(dtype))
    tolerances.assert_attention(out, lse, q, k, v, causal=True)
    with pytest.raises(AssertionError, match="out: at"):
        tolerances.assert_attention(oracle.attention(q, k, v).out.astype(dtype), None, q, k, v, causal=True)
    wrong = out.copy()
    wrong[1, 3, 2, 5] += dtype(0.25)
    with pytest.raises(AssertionError, match=r"out: at \(1, 3, 2, 5\) .* 1 of 576 elements"):
        tolerances.assert_attention(wrong, lse, q, k, v, causal=True)
    wrong = lse.copy()
    wrong[0, 1, 2] += 1e-3
    with pytest.raises(AssertionError, match=r"lse: at \(0, 1, 2\)"):
        tolerances.assert_attention(out, wrong, q, k, v, causal=True)
    wrong[0, 1, 2] = -np.inf
    with pytest.raises(AssertionError, match=r"lse: at \(0, 1, 2\) got -inf"):
        tolerances.assert_attention(out, wrong, q, k, v, causal=True)
    with pytest.raises(AssertionError, match="shape"):
        tolerances.assert_attention(out[:1], lse, q, k, v, causal=True)


def test_packed_sequences() -> None:
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((n, 2, 4)) for n in (7, 9, 9))
    edges = [0, 3, 3, 6], [0, 4, 6, 6]
    out, lse = oracle.over_sequences(oracle.attention, q, k, v, *edges)
    np.testing.assert_array_equal(out[:3], oracle.attention(q[:3], k[:4], v[:4]).out)
    assert not out[3:].any()
    assert np.isneginf(lse[:, 3:]).all()
    tolerances.assert_attention(out, lse, q, k, v, cu_seqlens=edges)
