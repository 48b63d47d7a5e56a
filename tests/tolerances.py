"""The one table of tolerances, and the comparison that uses it.

The rule (that of the FlashAttention papers' tests): the largest error against the float64 oracle may be at most FACTOR
times that of standard attention computed in the input dtype, plus a small absolute term. lse is in float32 whatever the
inputs are, so it is held to standard attention in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from ml_dtypes import finfo

from tests import oracle

FACTOR = 2.0
GRADIENT_FACTOR = 3.0  # what a gradient is made of, P and dP, is rounded as well


class Tolerance(NamedTuple):
    """Absolute terms in units of the dtype's epsilon (lse: the lse dtype's), times the largest expected magnitude."""

    out_ulps: float
    lse_ulps: float
    lse_ulps_per_dim: float = 0.0

    def of_lse(self, head_dim: int) -> float:
        return self.lse_ulps + self.lse_ulps_per_dim * head_dim


TOLERANCES = {
    # out: one rounding of the result; standard attention may happen to be exact where a tiled sum is not (one key,
    # say).
    # lse: a score is a chain of tensor core instructions of depth 16. Each cuts 16 products and their sum toward zero
    # (docs/float32-on-tensor-cores.md): where all have one sign, 2.5 ulps of the sum so far in the mean, which over the
    # chain, while the sum grows, come to 0.9 of the score's epsilon an instruction, measured 0.7.
    "float16": Tolerance(1.0, 8.0, 1 / 16),
    "bfloat16": Tolerance(1.0, 8.0, 1 / 16),
    # A sum of D products and N weights in another order, and exp within 2 ulp: a few units at test sizes.
    "float32": Tolerance(16.0, 16.0),
    "float64": Tolerance(16.0, 16.0),
}


def lse_dtype(dtype) -> np.dtype:
    """float64 for float64, float32 for every other dtype."""
    return np.dtype(np.float64 if np.dtype(dtype) == np.float64 else np.float32)


def assert_within(name: str, got, want, standard, dtype, ulps: float, factor: float = FACTOR) -> None:
    """max |got - want| <= factor * max |standard - want| + ulps * eps(dtype) * max(1, max |want|), infinities equal."""
    got, want, standard = (np.asarray(x).astype(np.float64) for x in (got, want, standard))
    if got.shape != want.shape:
        raise AssertionError(f"{name}: shape {got.shape}, expected {want.shape}")
    if got.size == 0:
        return
    finite = np.isfinite(want)
    odd = np.where(finite, ~np.isfinite(got), (got != want) & ~(np.isnan(got) & np.isnan(want)))
    if odd.any():
        raise AssertionError(f"{name}: {_where(odd, got, want)}; {odd.sum()} of {odd.size} wrongly (not) finite")
    error = np.where(finite, np.abs(np.where(finite, got, 0) - np.where(finite, want, 0)), 0)
    both = finite & np.isfinite(standard)
    allowed = np.abs(np.where(both, standard, 0) - np.where(both, want, 0)).max()
    magnitude = max(1.0, np.abs(want[finite]).max(initial=0.0))
    limit = factor * allowed + ulps * float(finfo(np.dtype(dtype)).eps) * magnitude
    if error.max() > limit:
        raise AssertionError(
            f"{name}: {_where(error == error.max(), got, want)}; error {error.max():.3e} > {limit:.3e} allowed "
            f"(standard attention's {allowed:.3e}); {(error > limit).sum()} of {error.size} elements beyond it"
        )


def assert_attention(out, lse, q, k, v, cu_seqlens=None, **keywords) -> None:
    """Holds a result against the oracle on the same inputs; `cu_seqlens` is (cu_seqlens_q, cu_seqlens_k) if packed."""

    def run(function, **more):
        if cu_seqlens is None:
            return function(q, k, v, **keywords, **more)
        return oracle.over_sequences(function, q, k, v, *cu_seqlens, **keywords, **more)

    want = run(oracle.attention)
    in_dtype = run(oracle.standard)
    in_lse_dtype = in_dtype if lse_dtype(q.dtype) == q.dtype else run(oracle.standard, dtype=lse_dtype(q.dtype))
    tolerance = TOLERANCES[np.dtype(q.dtype).name]
    assert_within("out", out, want.out, in_dtype.out, q.dtype, tolerance.out_ulps)
    if lse is not None:
        assert_within("lse", lse, want.lse, in_lse_dtype.lse, lse_dtype(q.dtype), tolerance.of_lse(q.shape[-1]))


def assert_gradients(got, want: oracle.Gradients, standard: oracle.Gradients, dtype, more_ulps: float = 0.0) -> None:
    """Gradients of inputs of `dtype`, each relative to its largest element; dbias may be of a coarser dtype.

    `more_ulps` are allowed whatever the gradient's size, for terms of it that cancel.
    """
    expected = [gradient for gradient in want if gradient is not None]
    in_dtype = [gradient for gradient in standard if gradient is not None]
    if len(got) != len(expected):
        raise AssertionError(f"{len(got)} gradients, expected {len(expected)}")
    for name, *arrays in zip(("dq", "dk", "dv", "dbias"), got, expected, in_dtype, strict=False):
        coarser = max(np.dtype(dtype), arrays[0].dtype, key=lambda dtype: finfo(dtype).eps)
        largest = float(np.abs(arrays[1]).max(initial=0.0)) or 1.0
        scaled = (np.asarray(array).astype(np.float64) / largest for array in arrays)
        ulps = TOLERANCES[coarser.name].out_ulps + more_ulps / min(1.0, largest)
        assert_within(name, *scaled, coarser, ulps, GRADIENT_FACTOR)


def _where(chosen: np.ndarray, got: np.ndarray, want: np.ndarray) -> str:
    at = tuple(int(i) for i in np.argwhere(chosen)[0])
    return f"at {at} got {got[at]:.9g}, expected {want[at]:.9g}"
