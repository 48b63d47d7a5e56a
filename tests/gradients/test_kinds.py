"""Gradients are of the caller's kind of array, and equal to those of frameworks that differentiate by themselves."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cuflash
from tests import tolerances
from tests.attention.cases import Case
from tests.attention.cases import make as make_case
from tests.gradients.cases import cotangent, gradients


def make(*shapes, dtype=np.float32):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def test_torch() -> None:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    shapes = (2, 50, 4, 16), (2, 70, 2, 16), (2, 70, 2, 16), (4, 50, 70), (2, 50, 4, 16)
    q, k, v, bias, dout = map(torch.from_numpy, make(*shapes))
    out, pullback = cuflash.vjp(cuflash.attention, q, k, v, bias=bias)
    gradients = pullback(dout)
    assert all(type(x) is torch.Tensor for x in (out, *gradients))
    leaves = [x.clone().requires_grad_() for x in (q, k, v, bias)]
    heads = [x.transpose(1, 2) for x in leaves[:3]]
    result = scaled_dot_product_attention(*heads, attn_mask=leaves[3], enable_gqa=True).transpose(1, 2)
    result.backward(dout)
    for got, leaf in zip(gradients, leaves, strict=True):
        torch.testing.assert_close(got, leaf.grad, atol=2e-5, rtol=1e-4)


def test_bfloat16_of_torch() -> None:
    import torch

    q, k, v = (torch.from_numpy(x).to(torch.bfloat16) for x in make(*[(9, 2, 8)] * 3))
    (out, lse), pullback = cuflash.vjp(cuflash.attention, q, k, v, return_lse=True)
    gradients = pullback((out, lse))
    assert [x.dtype for x in gradients] == [torch.bfloat16] * 3
    wide = [x.float().numpy().astype(ml_dtypes.bfloat16) for x in (q, k, v)]
    (out, lse), pullback = cuflash.vjp(cuflash.attention, *wide, return_lse=True)
    for got, want in zip(gradients, pullback((out, lse)), strict=True):
        np.testing.assert_array_equal(got.float().numpy(), want.astype(np.float32))


def test_jax() -> None:
    import jax

    q, k, v, bias, dout = map(jax.numpy.asarray, make(*[(2, 50, 4, 16)] * 3, (1, 4, 1, 50), (2, 50, 4, 16)))

    def attend(q, k, v, bias):
        return jax.nn.dot_product_attention(q, k, v, bias=bias, is_causal=True)

    out, pullback = cuflash.vjp(cuflash.attention, q, k, v, bias=bias, causal=True)
    assert isinstance(out, jax.Array)
    _, reference = jax.vjp(attend, q, k, v, bias)
    for got, want in zip(pullback(dout), reference(dout), strict=True):
        assert isinstance(got, jax.Array)
        np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("container", [list, tuple, np.stack], ids=["list", "tuple", "array"])
def test_merge_states_gives_what_it_was_given(container) -> None:
    outs, lses = make((5, 3), (5, 3)), make((5,), (5,))
    result, pullback = cuflash.vjp(cuflash.merge_states, container(outs), container(lses))
    gradients = pullback(result)
    assert [type(x) for x in gradients] == [type(container(outs))] * 2
    assert [[x.shape for x in gradient] for gradient in gradients] == [[(5, 3)] * 2, [(5,)] * 2]


def test_merge_states_of_16_bits() -> None:
    outs, lses = make((2, 5, 3, 4), (2, 5, 3, 4), dtype=np.float16), make((2, 3, 5), (2, 3, 5))
    (out, lse), pullback = cuflash.vjp(cuflash.merge_states, outs, lses)
    douts, dlses = pullback((out, lse))
    assert [x.dtype for x in (*douts, *dlses)] == [np.float16] * 2 + [np.float32] * 2
    wide = [x.astype(float) for x in outs], [x.astype(float) for x in lses]
    exact = cuflash.vjp(cuflash.merge_states, *wide)[1]((out.astype(float), lse.astype(float)))
    np.testing.assert_allclose(douts, exact[0], atol=1e-3)
    np.testing.assert_allclose(dlses, exact[1], atol=1e-5)


def test_states_that_saw_nothing_may_hold_anything() -> None:
    outs, lses = make((5, 3), (5, 3)), make((5,), (5,))
    outs[0][:2], lses[0][:2] = np.nan, -np.inf
    (out, lse), pullback = cuflash.vjp(cuflash.merge_states, outs, lses)
    douts, dlses = pullback((np.ones_like(out), np.ones_like(lse)))
    assert not douts[0][:2].any()
    assert not dlses[0][:2].any()
    np.testing.assert_array_equal(douts[1][:2], 1)
    assert np.isfinite(dlses[1]).all()


def test_a_pair_of_cotangents_may_be_a_list() -> None:
    q, k, v = make(*[(5, 4)] * 3)
    result, pullback = cuflash.vjp(cuflash.attention, q, k, v, return_lse=True)
    for a, b in zip(pullback(list(result)), pullback(result), strict=True):
        np.testing.assert_array_equal(a, b)


def test_cotangents_at_odd_addresses(device: Any, dtype: str) -> None:
    """On a GPU copied, since a kernel takes elements only where their type may lie; others are used in place."""
    case = Case(dtype=dtype, seqlen_q=20, seqlen_k=40)
    inputs = make_case(case)
    given = cotangent(case, inputs)

    def at_odd_address(array: np.ndarray) -> np.ndarray:
        offset = array.itemsize if device.name == "cuda" else 1  # CuPy itself takes elements only where they may lie
        moved = np.zeros(array.nbytes + offset, np.uint8)[offset:].view(array.dtype).reshape(array.shape)
        moved[...] = array
        return moved

    want = gradients(device, case, inputs, given)
    for got, expected in zip(gradients(device, case, inputs, tuple(map(at_odd_address, given))), want, strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("states", [1, 3])
def test_merge_states_on_every_device(device: Any, dtype: str, states: int) -> None:
    outs, douts = make((states, 2, 5, 3, 8), (2, 5, 3, 8), dtype=dtype)
    lses, dlses = make((states, 2, 3, 5), (2, 3, 5), dtype=tolerances.lse_dtype(dtype))
    lses[0, :, :, :2] = -np.inf

    def pull(*arrays: Any) -> Any:
        result, pullback = cuflash.vjp(cuflash.merge_states, *arrays[:2])
        return (*result, *pullback(arrays[2:]))

    out, lse, *got = device.run(pull, outs, lses, douts, dlses)
    ulps = 4 * float(ml_dtypes.finfo(dtype).eps)
    want = cuflash.merge_states(outs, lses)
    np.testing.assert_allclose(out.astype(float), want[0].astype(float), atol=ulps, rtol=ulps)
    np.testing.assert_allclose(lse, want[1], atol=1e-6, rtol=1e-6)
    exact = [x.astype(float) for x in (outs, lses, douts, dlses)]
    expected = cuflash.vjp(cuflash.merge_states, *exact[:2])[1](tuple(exact[2:]))
    for gradient, exactly in zip(got, expected, strict=True):
        np.testing.assert_allclose(gradient.astype(float), exactly, atol=2e-5 + ulps)
