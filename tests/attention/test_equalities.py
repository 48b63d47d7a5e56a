"""What must be equal whatever the numbers are: permutations, parts and the whole, groups and their repetition."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

import cuflash
from tests.attention.cases import Case, Inputs, call, hold_to_oracle, make

CASE = Case(batch=3, num_heads=4, num_kv_heads=2, seqlen_q=33, seqlen_k=130)
MASKS: dict[str, dict[str, Any]] = {"full": {}, "causal": {"causal": True}, "window": {"window": (50, 20)}}


def _take(inputs: Inputs, **changes: Any) -> Inputs:
    return inputs._replace(**{name: np.ascontiguousarray(array) for name, array in changes.items()})


@pytest.mark.parametrize("mask", MASKS)
def test_batch_entries_are_independent(device: Any, mask: str) -> None:
    """A permuted batch gives the permuted result, bit for bit."""
    case, order = CASE.but(**MASKS[mask]), [2, 0, 1]
    inputs = make(case)
    out, lse = call(device, case, inputs)
    permuted = _take(inputs, q=inputs.q[order], k=inputs.k[order], v=inputs.v[order])
    out_permuted, lse_permuted = call(device, case, permuted)
    np.testing.assert_array_equal(out_permuted, out[order])
    np.testing.assert_array_equal(lse_permuted, lse[order])


@pytest.mark.parametrize("mask", MASKS)
def test_heads_are_independent(device: Any, mask: str) -> None:
    case, order, kv_order = CASE.but(**MASKS[mask]), [3, 2, 1, 0], [1, 0]
    inputs = make(case)
    out, lse = call(device, case, inputs)
    permuted = _take(inputs, q=inputs.q[:, :, order], k=inputs.k[:, :, kv_order], v=inputs.v[:, :, kv_order])
    out_permuted, lse_permuted = call(device, case, permuted)
    np.testing.assert_array_equal(out_permuted, out[:, :, order])
    np.testing.assert_array_equal(lse_permuted, lse[:, order])


@pytest.mark.parametrize("num_splits", [1, 2])
def test_one_entry_of_a_batch_alone(device: Any, num_splits: int) -> None:
    """With a fixed number of splits a query's bits do not depend on what else is in the batch."""
    case = CASE.but(options=cuflash.Options(num_splits=num_splits))
    inputs = make(case)
    out, lse = call(device, case, inputs)
    alone, lse_alone = call(device, case.but(batch=1), _take(inputs, q=inputs.q[1:2], k=inputs.k[1:2], v=inputs.v[1:2]))
    np.testing.assert_array_equal(alone, out[1:2])
    np.testing.assert_array_equal(lse_alone, lse[1:2])


@pytest.mark.parametrize("heads", [(4, 2), (4, 1), (6, 3)], ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_grouped_heads_equal_repeated_ones(device: Any, heads: tuple[int, int], mask: str) -> None:
    case = CASE.but(num_heads=heads[0], num_kv_heads=heads[1], **MASKS[mask])
    inputs = make(case)
    out, lse = call(device, case, inputs)
    k, v = (x.repeat(heads[0] // heads[1], axis=2) for x in (inputs.k, inputs.v))
    repeated, lse_repeated = call(device, case.but(num_kv_heads=heads[0]), inputs._replace(k=k, v=v))
    np.testing.assert_allclose(repeated.astype(float), out.astype(float), atol=1e-3)
    np.testing.assert_allclose(lse_repeated, lse, atol=1e-5)


def test_keys_in_another_order(device: Any) -> None:
    order = np.random.default_rng(0).permutation(CASE.seqlen_k)
    inputs = make(CASE)
    permuted = _take(inputs, k=inputs.k[:, order], v=inputs.v[:, order])
    out, lse = call(device, CASE, permuted)
    hold_to_oracle(CASE, inputs, out, lse)


def test_scores_shifted_by_a_bias(device: Any) -> None:
    """A constant added to all scores of a row moves lse by it and leaves out."""
    case = CASE.but(bias="..q.")
    inputs = make(case)
    out, lse = call(device, case, inputs)
    zero, lse_zero = call(device, case, inputs._replace(bias=np.zeros_like(inputs.bias)))
    np.testing.assert_allclose(out.astype(float), zero.astype(float), atol=2e-3)
    np.testing.assert_allclose(lse - inputs.bias[..., 0], lse_zero, atol=1e-5)


@pytest.mark.parametrize("edges", [(0, 65, 130), (0, 1, 130), (0, 40, 40, 130), (0, 16, 33, 64, 97, 130)], ids=str)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_merged_parts_of_the_keys_equal_the_whole(device: Any, edges: tuple[int, ...], dtype: str) -> None:
    case = CASE.but(dtype=dtype)
    inputs = make(case)

    def attend(q: Any, k: Any, v: Any) -> Any:
        parts = [slice(*pair) for pair in pairwise(edges)]
        states = [cuflash.attention(q, k[:, part], v[:, part], return_lse=True) for part in parts]
        return cuflash.merge_states([out for out, _ in states], [lse for _, lse in states])

    out, lse = device.run(attend, *inputs[:3])
    whole, lse_whole = call(device, case, inputs)
    np.testing.assert_allclose(out.astype(float), whole.astype(float), atol=4e-3 if dtype == "float16" else 3e-2)
    np.testing.assert_allclose(lse, lse_whole, atol=1e-5)


def test_merging_with_states_that_saw_nothing(device: Any) -> None:
    """(0, -inf) is the neutral element; two of them merge to it."""
    inputs = make(CASE)

    def attend(q: Any, k: Any, v: Any) -> Any:
        some = cuflash.attention(q, k, v, return_lse=True)
        none = cuflash.attention(q, k[:, :0], v[:, :0], return_lse=True)
        both = [cuflash.merge_states([a[0], b[0]], [a[1], b[1]]) for a, b in ((some, none), (none, some), (none, none))]
        return some, *both

    some, right, left, none = device.run(attend, *inputs[:3])
    for got in (right, left):
        np.testing.assert_array_equal(got[0], some[0])
        np.testing.assert_allclose(got[1], some[1], rtol=1e-6)
    assert not none[0].any()
    assert np.isneginf(none[1]).all()


@pytest.mark.parametrize("return_lse", [False, True])
def test_the_result_without_lse_is_the_same(device: Any, return_lse: bool) -> None:
    inputs = make(CASE)
    first = device.run(lambda *x: cuflash.attention(*x, return_lse=return_lse), *inputs[:3])
    out = first[0] if return_lse else first
    again, _ = call(device, CASE, inputs)
    np.testing.assert_array_equal(out, again)


@pytest.mark.parametrize("num_splits", [None, 1, 3])
@pytest.mark.parametrize("mask", MASKS)
def test_repeated_calls_give_the_same_bits(device: Any, num_splits: int | None, mask: str) -> None:
    case = CASE.but(options=cuflash.Options(num_splits=num_splits), **MASKS[mask])
    inputs = make(case)
    for first, second in zip(call(device, case, inputs), call(device, case, inputs), strict=True):
        np.testing.assert_array_equal(first, second)
