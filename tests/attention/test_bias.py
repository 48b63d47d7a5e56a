"""Additive bias of every broadcastable shape, dtype and stride."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

import cuflash
from tests.attention.cases import Case, call, check, hold_to_oracle, make
from tests.devices import ALL_DTYPES

FOUR_AXES = ["".join(axes) for axes in itertools.product(*(f".{axis}" for axis in "bhqk"))]
FEWER_AXES = ["hqk", "h.k", "hq.", "h..", ".qk", "...", "qk", "q.", ".k", "..", "k", "."]
CASE = Case(batch=2, num_heads=4, num_kv_heads=2, seqlen_q=33, seqlen_k=70)


@pytest.mark.parametrize("bias", FOUR_AXES + FEWER_AXES)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_broadcasting(device: Any, bias: str, causal: bool) -> None:
    check(device, CASE.but(bias=bias, causal=causal))


@pytest.mark.parametrize("bias_dtype", ALL_DTYPES)
@pytest.mark.parametrize("bias", ["bhqk", "k", "q."])
def test_dtypes(device: Any, dtype: str, bias: str, bias_dtype: str) -> None:
    """A bias need not have the dtype of q."""
    check(device, CASE.but(dtype=dtype, bias=bias, bias_dtype=bias_dtype))


@pytest.mark.parametrize("bias", ["bhqk", "..qk", "...k", "..q."])
@pytest.mark.parametrize(
    "lengths", [(1, 129), (129, 1), (64, 64), (17, 31), (0, 5), (5, 0)], ids=lambda p: f"{p[0]}x{p[1]}"
)
def test_lengths(device: Any, bias: str, lengths: tuple[int, int]) -> None:
    check(device, CASE.of_lengths(*lengths).but(bias=bias))


@pytest.mark.parametrize("bias", ["bhqk", "k", ".hqk"])
def test_bias_is_added_after_the_softcap(device: Any, bias: str) -> None:
    check(device, CASE.but(bias=bias, softcap=0.7, values="scores_1e2"))


STRIDED = {
    "keys_before_queries": lambda x: (x.swapaxes(2, 3).copy(), lambda y: y.swapaxes(2, 3)),
    "every_other_key": lambda x: (np.repeat(x, 2, axis=3), lambda y: y[..., ::2]),
    "reversed_keys": lambda x: (x[..., ::-1].copy(), lambda y: y[..., ::-1]),
    "reversed_queries": lambda x: (x[:, :, ::-1].copy(), lambda y: y[:, :, ::-1]),
    "odd_offset": lambda x: (np.pad(x, [(0, 0)] * 3 + [(1, 2)], constant_values=np.nan), lambda y: y[..., 1:-2]),
    "heads_last": lambda x: (np.moveaxis(x, 1, 3).copy(), lambda y: y.transpose(0, 3, 1, 2)),
    "stride_zero": lambda x: (x, lambda y: np.broadcast_to(y[:1, :1], y.shape)),
}


@pytest.mark.parametrize("name", STRIDED)
@pytest.mark.parametrize("bias_dtype", ["float16", "float32"])
def test_strided_bias(device: Any, name: str, bias_dtype: str) -> None:
    """A bias is read by its strides, the key axis included."""
    case = CASE.but(bias="bhqk", bias_dtype=bias_dtype)
    inputs = make(case)
    buffer, view = STRIDED[name](inputs.bias)

    def attend(q: Any, k: Any, v: Any, bias: Any) -> Any:
        return cuflash.attention(q, k, v, bias=view(bias), return_lse=True)

    out, lse = device.run(attend, inputs.q, inputs.k, inputs.v, buffer)
    hold_to_oracle(case, inputs._replace(bias=view(buffer)), out, lse)


@pytest.mark.parametrize("window", [(None, 0), (5, 5), (None, None)], ids=str)
def test_bias_at_hidden_keys_is_not_used(device: Any, window: tuple[int | None, int | None]) -> None:
    """NaN where the window hides a key stays there."""
    case = CASE.but(bias="..qk", window=window, seqlen_q=65)
    inputs = make(case)
    row, column = np.ogrid[: case.seqlen_q, : case.seqlen_k]
    right = np.inf if window[1] is None else window[1]
    left = np.inf if window[0] is None else window[0]
    offset = column - row - (case.seqlen_k - case.seqlen_q)
    poisoned = np.where((offset > right) | (offset < -left), np.nan, inputs.bias).astype(inputs.bias.dtype)
    out, lse = call(device, case, inputs._replace(bias=poisoned))
    hold_to_oracle(case, inputs, out, lse)
