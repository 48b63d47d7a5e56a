"""Gradients of hash-sparse and QK-sparse attention against the oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cuflash
from cuflash import sparse
from tests.sparse.cases import Case, check_gradients, make

KINDS = {"hash": Case(buckets=5), "qk": Case()}


@pytest.mark.parametrize("kind", KINDS)
def test_dtypes(device: Any, dtype: str, kind: str) -> None:
    check_gradients(device, KINDS[kind].but(dtype=dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_head_dims(device: Any, kind: str, head_dim: int) -> None:
    check_gradients(device, KINDS[kind].but(head_dim=head_dim, head_dim_v=head_dim, batch=1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 33, 200])
def test_lengths(device: Any, kind: str, length: int) -> None:
    check_gradients(device, KINDS[kind].of_length(length).but(batch=1, num_heads=2, num_kv_heads=1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [(40, 100), (100, 40)])
def test_other_numbers_of_keys_than_queries(device: Any, kind: str, lengths: tuple[int, int]) -> None:
    check_gradients(device, KINDS[kind].but(seqlen_q=lengths[0], seqlen_k=lengths[1], batch=1))


@pytest.mark.parametrize("kind", KINDS)
def test_cotangent_of_lse_and_softcap(device: Any, kind: str) -> None:
    check_gradients(device, KINDS[kind].but(dtype="float32", softcap=2.0), lse_too=True)


@pytest.mark.parametrize("buckets", [1, 16, 64])
def test_buckets_without_self(device: Any, buckets: int) -> None:
    check_gradients(device, Case(buckets=buckets, include_self=False, batch=1).of_length(130))


def test_dropped_tokens_are_never_read(device: Any) -> None:
    """NaN in them and in the cotangents of dropped queries: their gradients are 0, the others do not change."""
    case = Case(dtype="float32")
    inputs = make(case)
    dout = np.random.default_rng(1).standard_normal(inputs.q.shape, dtype=np.float32)

    def gradients(*arrays: Any) -> Any:
        return cuflash.vjp(sparse.qk_sparse_attention, *arrays[:-1])[1](arrays[-1])

    clean = device.run(gradients, *inputs.arrays, np.where(inputs.mark_q[..., None], dout, 0))
    for array, keep in (
        (inputs.q, inputs.mark_q),
        (inputs.k, inputs.mark_k),
        (inputs.v, inputs.mark_k),
        (dout, inputs.mark_q),
    ):
        array[~keep] = np.nan
    got = device.run(gradients, *inputs.arrays, dout)
    for gradient, want, keep in zip(got, clean, (inputs.mark_q, inputs.mark_k, inputs.mark_k), strict=True):
        np.testing.assert_array_equal(gradient, want)
        assert not gradient[~keep].any()


@pytest.mark.parametrize("kind", KINDS)
def test_lower_ranks(device: Any, kind: str) -> None:
    case = KINDS[kind].but(batch=1, num_heads=1, num_kv_heads=1)
    inputs = make(case)

    def gradients(*arrays: Any) -> Any:
        (out, lse), pullback = cuflash.vjp(case.function, *arrays, return_lse=True)
        return pullback((np.ones_like(out), np.ones_like(lse)))

    whole = device.run(gradients, *inputs.arrays)
    for drop in (lambda x: x[0], lambda x: x[0, :, 0]):
        part = device.run(gradients, *map(drop, inputs.arrays))
        for gradient, want in zip(part, whole, strict=True):
            np.testing.assert_array_equal(gradient, drop(want))


def test_a_pullback_gives_the_same_bits_every_time(device: Any) -> None:
    inputs = make(KINDS["hash"].of_length(300).but(batch=1))

    def twice(*arrays: Any) -> Any:
        out, pullback = cuflash.vjp(sparse.hash_sparse_attention, *arrays)
        return pullback(out), pullback(out)

    first, second = device.run(twice, *inputs.arrays)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
