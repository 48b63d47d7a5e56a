"""What must be the same bits on every device: permutations, parts of a batch, packing, repetition, unused tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cuflash
from tests.attention.cases import Case, Inputs, make
from tests.gradients.cases import cotangent, gradients

CASE = Case(batch=3, num_heads=4, num_kv_heads=2, seqlen_q=40, seqlen_k=70, causal=True)


def assert_same(got: Any, want: Any) -> None:
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_permuted_batch(device: Any) -> None:
    inputs, order = make(CASE), [2, 0, 1]
    given = cotangent(CASE, inputs)
    whole = gradients(device, CASE, inputs, given)
    permuted = Inputs(*(x[order] for x in inputs[:3]), *inputs[3:])
    assert_same(gradients(device, CASE, permuted, tuple(x[order] for x in given)), [x[order] for x in whole])


def test_permuted_heads(device: Any) -> None:
    inputs, order, kv_order = make(CASE), [2, 3, 0, 1], [1, 0]
    dout, dlse = given = cotangent(CASE, inputs)
    dq, dk, dv = gradients(device, CASE, inputs, given)
    q, k, v = inputs.q[:, :, order], inputs.k[:, :, kv_order], inputs.v[:, :, kv_order]
    permuted = gradients(device, CASE, Inputs(q, k, v, *inputs[3:]), (dout[:, :, order], dlse[:, order]))
    assert_same(permuted, (dq[:, :, order], dk[:, :, kv_order], dv[:, :, kv_order]))


def test_parts_of_a_batch(device: Any) -> None:
    inputs = make(CASE)
    given = cotangent(CASE, inputs)
    whole = gradients(device, CASE, inputs, given)
    for part in slice(0, 1), slice(1, 3):
        own = Inputs(*(x[part] for x in inputs[:3]), *inputs[3:])
        got = gradients(device, CASE.but(batch=part.stop - part.start), own, tuple(x[part] for x in given))
        assert_same(got, [x[part] for x in whole])


@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window": (30, 7)}], ids=str)
def test_packed_sequences_are_those_alone(device: Any, mask: dict[str, Any]) -> None:
    lengths = ((40, 70), (5, 0), (33, 17), (1, 64))
    case = CASE.but(sequences=lengths, tail=(5, 3), causal=False).but(**mask)
    inputs = make(case)
    dout, dlse = given = cotangent(case, inputs)
    dq, dk, dv = gradients(device, case, inputs, given)
    for i, (len_q, len_k) in enumerate(lengths):
        rows = slice(inputs.cu_seqlens_q[i], inputs.cu_seqlens_q[i] + len_q)
        keys = slice(inputs.cu_seqlens_k[i], inputs.cu_seqlens_k[i] + len_k)
        alone = case.but(sequences=None, batch=1).of_lengths(len_q, len_k)
        own = Inputs(inputs.q[rows][None], inputs.k[keys][None], inputs.v[keys][None], None, None, None)
        got = gradients(device, alone, own, (dout[rows][None], dlse[None, :, rows]))
        for gradient, packed in zip(got, (dq[rows], dk[keys], dv[keys]), strict=True):
            np.testing.assert_allclose(gradient[0].astype(float), packed.astype(float), atol=2e-3)
    for gradient, edges in ((dq, inputs.cu_seqlens_q), (dk, inputs.cu_seqlens_k), (dv, inputs.cu_seqlens_k)):
        assert not gradient[edges[-1] :].any()  # the inputs there are NaN


@pytest.mark.parametrize("shape", [(2, 50, 80), (1, 80), (50, 1), (3, 1, 50, 77)], ids=str)
def test_a_bias_longer_than_packed_sequences(device: Any, shape: tuple[int, ...]) -> None:
    """What no sequence reaches has the gradient 0, the rest that of the part that is used."""
    case = Case(sequences=((40, 70), (5, 0), (33, 17)), num_kv_heads=2)
    inputs = make(case)
    dout, _ = cotangent(case, inputs)
    bias = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    used = tuple(slice(None) if n == 1 else slice(most) for n, most in zip(shape[-2:], (40, 70), strict=True))

    def pull(q: Any, k: Any, v: Any, edges_q: Any, edges_k: Any, bias: Any, dout: Any) -> Any:
        keywords = {"bias": bias, "max_seqlen_q": 40, "max_seqlen_k": 70}
        return cuflash.vjp(cuflash.attention_varlen, q, k, v, edges_q, edges_k, **keywords)[1](dout)

    *long, dbias = device.run(pull, *inputs[:3], *inputs[4:], bias, dout)
    *short, dcut = device.run(pull, *inputs[:3], *inputs[4:], bias[..., *used], dout)
    assert_same(long, short)
    np.testing.assert_array_equal(dbias[..., *used], dcut)
    assert np.count_nonzero(dbias) == np.count_nonzero(dcut) > 0


def test_a_pullback_again_without_the_forward() -> None:
    inputs = make(CASE.but(bias="h.k", bias_dtype="float16"))
    dout, _ = cotangent(CASE, inputs)
    with cuflash.emulate("sm_80") as device:
        _, pullback = cuflash.vjp(cuflash.attention, *inputs[:3], bias=inputs.bias)
        first, second = pullback(dout), pullback(dout)
    assert_same(first, second)
    once = ["prepare", "backward", "finish", "bias_gradient"]
    kernels = [report.kernel.removeprefix("cuflash_").partition("_d")[0] for report in device.launches]
    assert kernels == ["forward", *once, *once]
