"""Gradients against central differences in float64, for every feature and function that has a pullback."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

import cuflash

FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (3, 2)},
    "left": {"window": (1, None), "causal": True},
    "scale": {"scale": 0.7},
    "softcap": {"softcap": 0.8, "causal": True},
    "bias of scores": {"bias": (2, 4, "q", "k"), "causal": True},
    "bias of heads": {"bias": (4, 1, 1), "softcap": 2.0},
    "bias of keys": {"bias": ("k",), "window": (4, 4)},
    "bias of queries": {"bias": (2, 1, "q", 1)},
    "bias of all": {"bias": ()},
    "bias of pairs": {"bias": ("q", "k"), "softcap": 1.5},
    "bias of batches": {"bias": (2, 1, 1, 1)},
}
LENGTHS = [(5, 7), (7, 5), (1, 9), (6, 1), (70, 75)]


def assert_derivative(function: Callable[..., Any], arrays: list[Any], gradients: Any, cotangent: Any) -> None:
    """Σ gradient · step is the change of Σ cotangent · result, for a random step of each array alone."""
    rng = np.random.default_rng(1)
    for i, (array, gradient) in enumerate(zip(arrays, gradients, strict=True)):
        assert gradient.shape == array.shape
        step = 1e-6 * rng.standard_normal(array.shape)
        values = []
        for sign in (1, -1):
            result = function(*arrays[:i], np.asarray(array + sign * step), *arrays[i + 1 :])
            values.append(sum((c * r)[np.isfinite(r)].sum() for c, r in zip(cotangent, result, strict=True)))
        assert (gradient * step).sum() == pytest.approx((values[0] - values[1]) / 2, rel=1e-5, abs=1e-13), i


def make(rng: np.random.Generator, len_q: int, len_k: int, feature: str) -> tuple[list[np.ndarray], dict[str, Any]]:
    """q, k, v and, where the feature has one, bias; and the keywords."""
    shapes = (2, len_q, 4, 6), (2, len_k, 2, 6), (2, len_k, 2, 5)
    arrays = [rng.standard_normal(shape) for shape in shapes]
    keywords = dict(FEATURES[feature])
    if "bias" in keywords:
        shape = [{"q": len_q, "k": len_k}.get(n, n) for n in keywords.pop("bias")]
        arrays.append(np.asarray(rng.standard_normal(shape)))
    return arrays, keywords


def with_bias(function: Callable[..., Any], **keywords: Any) -> Callable[..., Any]:
    """`function` with the bias by position."""
    return lambda q, k, v, bias=None: function(q, k, v, bias=bias, return_lse=True, **keywords)


@pytest.mark.parametrize(
    "function",
    [
        cuflash.attention,
        cuflash.reference.standard_attention,
        cuflash.reference.chunked_attention,
    ],
    ids=lambda function: function.__name__,
)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize(("len_q", "len_k"), LENGTHS)
def test_dense(function, feature, len_q, len_k) -> None:
    rng = np.random.default_rng(0)
    arrays, keywords = make(rng, len_q, len_k, feature)
    result, pullback = with_bias(partial(cuflash.vjp, function), **keywords)(*arrays)
    cotangent = tuple(rng.standard_normal(x.shape) for x in result)
    assert_derivative(with_bias(function, **keywords), arrays, pullback(cotangent), cotangent)


@pytest.mark.parametrize("feature", FEATURES)
def test_varlen(feature) -> None:
    """Five sequences, two of them empty on a side, and tokens that belong to none."""
    rng = np.random.default_rng(0)
    q_edges, k_edges = [0, 5, 6, 6, 9, 22], [0, 7, 7, 10, 12, 25]
    arrays = [rng.standard_normal(shape) for shape in ((24, 4, 6), (26, 2, 6), (26, 2, 5))]
    keywords = dict(FEATURES[feature])
    if "bias" in keywords:
        shape = [{"q": 13, "k": 13, 2: 5}.get(n, n) for n in keywords.pop("bias")]
        arrays.append(np.asarray(rng.standard_normal(shape)))

    def call(function, q, k, v, bias=None):
        return function(q, k, v, q_edges, k_edges, bias=bias, return_lse=True, **keywords)

    result, pullback = call(partial(cuflash.vjp, cuflash.attention_varlen), *arrays)
    cotangent = tuple(rng.standard_normal(x.shape) for x in result)
    gradients = pullback(cotangent)
    assert_derivative(partial(call, cuflash.attention_varlen), arrays, gradients, cotangent)
    assert not gradients[0][22:].any()
    assert not gradients[1][25:].any()
    assert not gradients[2][25:].any()


@pytest.mark.parametrize("shape", [(7, 3), (7, 2, 3), (2, 7, 2, 3)], ids=str)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_merge_states(shape, count) -> None:
    rng = np.random.default_rng(0)
    lse_shape = (*shape[:-3], *shape[-3:-1][::-1])
    outs, lses = rng.standard_normal((count, *shape)), 3 * rng.standard_normal((count, *lse_shape))
    lses[0].reshape(-1)[0] = -np.inf
    lses[(slice(None), *[-1] * len(lse_shape))] = -np.inf  # a row that no state saw
    outs[0].reshape(-1, shape[-1])[0] = 1e9  # what it holds does not count
    result, pullback = cuflash.vjp(cuflash.merge_states, outs, lses)
    cotangent = tuple(rng.standard_normal(x.shape) for x in result)
    gradients = pullback(cotangent)
    outs[0].reshape(-1, shape[-1])[0] = 0
    assert_derivative(cuflash.merge_states, [outs, lses], gradients, cotangent)


def test_lower_ranks_of_arrays() -> None:
    rng = np.random.default_rng(0)
    for shape in [(5, 4), (5, 2, 4)]:
        arrays = [rng.standard_normal(shape) for _ in range(3)]
        result, pullback = cuflash.vjp(cuflash.attention, *arrays, causal=True, return_lse=True)
        cotangent = tuple(rng.standard_normal(x.shape) for x in result)
        function = partial(cuflash.attention, causal=True, return_lse=True)
        assert_derivative(function, arrays, pullback(cotangent), cotangent)
