"""Faults that other attention kernels are known for, each as a test of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cuflash
import cuflash.forward
from cuflash.plan.forward import plan_forward
from tests import oracle, tolerances
from tests.attention.cases import Case, call, check, make
from tests.attention.far import check_far


@pytest.mark.parametrize("seqlen", [64, 192, 320])
@pytest.mark.parametrize("mask", [{"causal": True}, {"window": (70, 0)}], ids=["causal", "window"])
def test_nan_with_a_mask_and_scores_under_minus_88(device: Any, seqlen: int, mask: dict[str, Any]) -> None:
    """Lengths of 64 more than a multiple of 128 with lse < -88.7, where e^lse underflows in float32."""
    case = Case(batch=1, seqlen_q=seqlen, seqlen_k=seqlen, values="scores_negative", **mask)
    inputs = make(case)
    out, lse = call(device, case, inputs)
    assert (lse < -88.7).all()
    assert np.isfinite(out.astype(np.float32)).all()
    check(device, case)


@pytest.mark.parametrize("seqlen_k", [1, 64, 150])
def test_one_query_with_strongly_negative_scores(device: Any, seqlen_k: int) -> None:
    check(device, Case(seqlen_q=1, seqlen_k=seqlen_k, values="scores_negative"))
    check(device, Case(seqlen_q=1, seqlen_k=seqlen_k, bias="...k", bias_values="lowest"))


def test_strided_views_are_not_taken_for_dense_arrays(device: Any) -> None:
    """The same view with the same shape, dense and strided, gives the same bits."""
    inputs = make(Case(num_kv_heads=2))
    wide = [np.concatenate([x, x + 1], axis=-1) for x in inputs[:3]]

    def attend(*arrays: Any) -> Any:
        return cuflash.attention(*(x[..., :64] for x in arrays))

    np.testing.assert_array_equal(device.run(attend, *wide), device.run(cuflash.attention, *inputs[:3]))


def test_transposed_heads_and_tokens_of_equal_length(device: Any) -> None:
    """heads == seqlen, so that a swapped stride keeps every shape."""
    check(device, Case(batch=2, seqlen_q=4, seqlen_k=4, num_heads=4, num_kv_heads=4, layout="heads_first"))


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "token", "head"])
def test_offsets_past_32_bits(device: Any, axis: int) -> None:
    """Entry 1 of an axis lies 2^31 + 8 elements behind entry 0, in memory that nothing else touches."""
    if device.name == "emulated":
        check_far()  # by tokens only, in less memory
        return
    shape, step = [1, 1, 1, 8], 2**31 + 8
    shape[axis] = 2
    strides = [16, 16, 16, 2]
    strides[axis] = 2 * step
    rng = np.random.default_rng(0)
    dense = [rng.standard_normal(shape).astype(np.float16) for _ in range(3)]
    far = [np.lib.stride_tricks.as_strided(np.empty(step + 8, np.float16), shape, strides) for _ in range(3)]
    for view, array in zip(far, dense, strict=True):
        view[...] = array
    got, lse = device.run(cuflash.attention, *far, return_lse=True)
    tolerances.assert_attention(got, lse, *dense)


@pytest.mark.parametrize("columns", [63, 64, 65, 127, 129, 200])
def test_keys_of_a_ragged_last_tile_count_once(device: Any, columns: int) -> None:
    """A last tile that is clamped into range instead of cut counts keys twice: lse of equal scores is log n."""
    inputs = make(Case(seqlen_q=3, seqlen_k=columns, values="zeros"))
    _, lse = device.run(lambda *x: cuflash.attention(*x, return_lse=True), *inputs[:3])
    np.testing.assert_allclose(lse, np.log(columns), rtol=1e-6)


@pytest.mark.parametrize("gap", [0.0, 1.0, 80.0, 89.0, 1e3, 1e30, np.inf], ids=str)
def test_merging_states_far_apart_does_not_overflow(device: Any, gap: float) -> None:
    """e^(lse_a - lse_b) overflows in float32 from 88.8 on; its logistic form does not."""
    rng = np.random.default_rng(1)
    outs = [rng.standard_normal((2, 5, 3, 8)).astype(np.float16) for _ in range(2)]
    lses = [np.full((2, 3, 5), sign * gap / 2, np.float32) for sign in (1, -1)]
    if np.isinf(gap):
        lses[0][:] = 0.5
    for order in ((0, 1), (1, 0)):
        out, lse = device.run(
            lambda a, b, x, y: cuflash.merge_states([a, b], [x, y]),
            *(outs[i] for i in order),
            *(lses[i] for i in order),
        )
        weight = 1.0 if np.isinf(gap) else 1 / (1 + np.exp(-np.float64(gap)))
        want = weight * outs[0].astype(float) + (1 - weight) * outs[1].astype(float)
        np.testing.assert_allclose(out.astype(float), want, atol=2e-3)
        np.testing.assert_allclose(lse, np.logaddexp(*(x.astype(float) for x in lses)), rtol=1e-6)


@pytest.mark.parametrize("lengths", [(2, 5), (5, 2), (1, 7)], ids=str)
def test_causal_is_aligned_to_the_bottom_right(device: Any, lengths: tuple[int, int]) -> None:
    """The last query sees every key, whatever the lengths; a top-left mask would hide them."""
    case = Case(batch=1, causal=True).of_lengths(*lengths)
    inputs = make(case)
    out, lse = call(device, case, inputs)
    last = oracle.attention(inputs.q[:, -1:], inputs.k, inputs.v)
    np.testing.assert_allclose(out[:, -1:].astype(float), last.out, atol=2e-3)
    np.testing.assert_allclose(lse[..., -1:], last.lse, atol=1e-5)


def test_nothing_compiles_because_a_length_batch_or_stride_changed(device: Any, monkeypatch: Any) -> None:
    """All these problems have one kernel configuration, so one compilation serves them."""
    case = Case(num_heads=4, num_kv_heads=2, options=cuflash.Options(num_splits=1)).of_lengths(40, 90)
    configs = []

    def planned(*arguments: Any, **keywords: Any) -> Any:
        plan = plan_forward(*arguments, **keywords)
        configs.append(plan.forward.config)
        return plan

    monkeypatch.setattr(cuflash.forward, "plan_forward", planned)
    for lengths in [(40, 90), (40, 91), (41, 90), (97, 211), (130, 64)]:
        check(device, case.of_lengths(*lengths))
    for changes in ({"batch": 5}, {"num_heads": 6}, {"layout": "interleaved"}, {"layout": "page"}, {"scale": 0.7}):
        check(device, case.but(**changes))
    assert len(configs) == (0 if device.name == "cpu" else 10)
    assert len(set(configs)) <= 1


def test_float32_scores_keep_float32_accuracy(device: Any) -> None:
    """Products are not rounded to TF32 or float16 on the way: error near 1e-6, not 1e-3."""
    case = Case(dtype="float32", seqlen_q=50, seqlen_k=300, head_dim=128, head_dim_v=128)
    inputs = make(case)
    out, lse = call(device, case, inputs)
    want = oracle.attention(*inputs[:3])
    np.testing.assert_allclose(out, want.out, atol=2e-6)
    np.testing.assert_allclose(lse, want.lse, atol=5e-6)
