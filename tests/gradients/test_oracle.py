"""Gradients in every dtype against the oracle's: at most three times as far from it as standard attention's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cuflash
from tests.attention.cases import BIAS_VALUES, LAYOUTS, VALUES, Case, make
from tests.devices import ALL_DTYPES
from tests.gradients.cases import check, cotangent, hold_to_oracle, scores_of
from tests.strategies import cases, layouts

CASE = Case(seqlen_q=150, seqlen_k=270, num_heads=4, num_kv_heads=2)
FEATURES = [
    {},
    {"causal": True},
    {"window": (20, 9)},
    {"window": (None, 30), "scale": 0.5},
    {"softcap": 1.5, "causal": True},
    {"num_kv_heads": 1},
    {"batch": 4, "num_heads": 16, "num_kv_heads": 8, "seqlen_q": 300, "seqlen_k": 130, "window": (90, 20)},
    {"head_dim": 8, "head_dim_v": 40},
    {"head_dim": 200, "head_dim_v": 1},
    {"sequences": ((40, 70), (5, 0), (0, 3), (170, 90)), "tail": (3, 3), "causal": True},
    {"sequences": ((40, 70), (5, 9)), "bias": "h.k"},
    {"sequences": ((40, 70), (5, 9)), "bias": "qk", "bias_dtype": "float16"},
]
by_dtype = pytest.mark.parametrize("dtype", ALL_DTYPES)


@by_dtype
@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: str(CASE.but(**feature)))
def test_features(dtype, feature) -> None:
    check(CASE.but(dtype=dtype, **feature))


@by_dtype
@pytest.mark.parametrize("bias", ["bhqk", "b.qk", "hqk", "qk", "..k", "k", "..q.", "b..k", "h..", "b...", "."])
def test_bias(dtype, bias) -> None:
    check(CASE.but(dtype=dtype, bias=bias, bias_dtype="float64" if dtype == "float64" else "float32"))


@by_dtype
@pytest.mark.parametrize("values", VALUES)
def test_values(dtype, values) -> None:
    check(CASE.but(dtype=dtype, values=values))


@by_dtype
@pytest.mark.parametrize("values", BIAS_VALUES)
def test_bias_values(dtype, values) -> None:
    check(CASE.but(dtype=dtype, bias="qk", bias_values=values, causal=True))


@pytest.mark.parametrize("lengths", [(n, 150) for n in (1, 63, 64, 65, 256, 257, 600)] + [(70, n) for n in (1, 2, 121)])
@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window": (40, 0)}, {"window": (0, 40)}], ids=str)
def test_edges_of_tiles(lengths, mask) -> None:
    check(CASE.but(dtype="float32", batch=1, num_heads=1, num_kv_heads=1, **mask).of_lengths(*lengths))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout) -> None:
    check(CASE.but(dtype="float32", layout=layout, causal=True))


@given(cases(ALL_DTYPES, (0, 1, 16, 33)))
def test_any_dense_case(case) -> None:
    check(case)


@given(cases(ALL_DTYPES, (16, 33), packed=True))
def test_any_packed_case(case) -> None:
    check(case)


@given(layouts(), layouts(), st.permutations(range(3)))
def test_any_strides(layout, of_cotangent, lse_order) -> None:
    """Inputs and cotangents of any order of axes, steps of either sign, gaps that hold NaN."""
    case = CASE.but(dtype="float32", seqlen_q=40, seqlen_k=50, causal=True)
    inputs = make(case)
    dout, dlse = cotangent(case, inputs)

    def strided(array, layout):
        buffer = np.full(layout.shape(*array.shape), np.nan, array.dtype)
        layout.view(buffer)[...] = array
        return layout.view(buffer)

    arrays = [strided(x, layout) for x in inputs[:3]]
    _, pullback = cuflash.vjp(cuflash.attention, *arrays, return_lse=True, **scores_of(case))
    back = np.argsort(lse_order)
    given_lse = np.ascontiguousarray(dlse.transpose(lse_order)).transpose(back)
    hold_to_oracle(case, inputs, (dout, dlse), pullback((strided(dout, of_cotangent), given_lse)))


def test_a_bias_with_strides() -> None:
    """Views that are reversed, cut and broadcast by hand: a gradient for each element of the view."""
    case = CASE.but(dtype="float32", bias="hqk")
    inputs = make(case)
    view = np.broadcast_to(inputs.bias[::-1, ::-1, ::2][:, :, :1], inputs.bias.shape)
    changed = inputs._replace(bias=view)
    given = cotangent(case, inputs)
    _, pullback = cuflash.vjp(cuflash.attention, *inputs[:3], bias=view, return_lse=True)
    hold_to_oracle(case, changed, given, pullback(given))
