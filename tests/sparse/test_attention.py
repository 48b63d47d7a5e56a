"""Hash-sparse and QK-sparse attention against the oracle, which is told who sees whom."""

from __future__ import annotations

import doctest
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import cuflash
from cuflash import sparse
from tests.devices import ALL_DTYPES, EmulatedDevice
from tests.sparse.cases import Case, check, hold, make

HASH = Case(buckets=5)
QK = Case()
KINDS = {"hash": HASH, "qk": QK}


@pytest.mark.parametrize("kind", KINDS)
def test_dtypes(device: Any, dtype: str, kind: str) -> None:
    check(device, KINDS[kind].but(dtype=dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", [8, 40, 64, 80, 128])
def test_head_dims(device: Any, kind: str, head_dim: int) -> None:
    check(device, KINDS[kind].but(head_dim=head_dim, head_dim_v=head_dim))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 2, 31, 129, 260])
def test_lengths(device: Any, kind: str, length: int) -> None:
    check(device, KINDS[kind].of_length(length).but(num_heads=2, num_kv_heads=1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [(50, 130), (130, 50), (1, 200), (64, 1)])
def test_other_numbers_of_keys_than_queries(device: Any, kind: str, lengths: tuple[int, int]) -> None:
    """The last query stands at the last key, as in `attention`."""
    check(device, KINDS[kind].but(seqlen_q=lengths[0], seqlen_k=lengths[1]))


@pytest.mark.parametrize("buckets", [1, 2, 16, 64])
@pytest.mark.parametrize("include_self", [True, False])
def test_buckets(device: Any, buckets: int, include_self: bool) -> None:
    check(device, HASH.of_length(150).but(buckets=buckets, include_self=include_self, batch=1))


@pytest.mark.parametrize("hash_dtype", ["int8", "uint8", "int16", "uint32", "int64", "uint64"])
def test_dtypes_of_hashes(device: Any, hash_dtype: str) -> None:
    inputs = make(HASH.but(hash_dtype=hash_dtype, batch=1))
    kind = np.iinfo(hash_dtype)
    names = np.random.default_rng(0).integers(kind.min, kind.max, 5, dtype=hash_dtype, endpoint=True)
    inputs.mark_q, inputs.mark_k = names[inputs.mark_q.astype(int)], names[inputs.mark_k.astype(int)]
    out, lse = device.run(sparse.hash_sparse_attention, *inputs.arrays, return_lse=True)
    hold(HASH.but(batch=1), inputs, out, lse)


@pytest.mark.parametrize("shares", [(0.0, 0.5), (0.5, 0.0), (1.0, 1.0), (0.1, 0.9)])
def test_shares_that_are_kept(device: Any, shares: tuple[float, float]) -> None:
    check(device, QK.of_length(100).but(keep_q=shares[0], keep_k=shares[1]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (3, 3), (4, 1)])
def test_heads(device: Any, kind: str, heads: tuple[int, int]) -> None:
    check(device, KINDS[kind].but(num_heads=heads[0], num_kv_heads=heads[1], head_dim=16, head_dim_v=24))


@pytest.mark.parametrize("kind", KINDS)
def test_softcap_and_scale(device: Any, kind: str) -> None:
    check(device, KINDS[kind].but(softcap=3.0, scale=0.5))


@pytest.mark.parametrize("kind", KINDS)
def test_lower_ranks(device: Any, kind: str) -> None:
    """Results are those of the same arrays with all axes."""
    case = KINDS[kind].but(batch=1, num_heads=1, num_kv_heads=1)
    inputs = make(case)
    out, lse = device.run(case.function, *inputs.arrays, return_lse=True)
    hold(case, inputs, out, lse)
    for drop in (lambda x: x[0], lambda x: x[0, :, 0]):
        part, part_lse = device.run(case.function, *map(drop, inputs.arrays), return_lse=True)
        assert part.shape == drop(inputs.q).shape
        np.testing.assert_array_equal(part, drop(out))
        np.testing.assert_array_equal(part_lse, lse[0] if part.ndim == 3 else lse[0, 0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("empty", ["batch", "seqlen_q", "seqlen_k", "num_heads"])
def test_axes_of_length_zero(device: Any, kind: str, empty: str) -> None:
    case = KINDS[kind].but(**{empty: 0} | ({"num_kv_heads": 0} if empty == "num_heads" else {}))
    inputs = make(case)
    out, lse = device.run(case.function, *inputs.arrays, return_lse=True)
    assert out.shape == inputs.q.shape
    assert lse.shape == (case.batch, case.num_heads, case.seqlen_q)
    assert not out.any()
    assert np.isneginf(lse).all()


@pytest.mark.parametrize("kind", KINDS)
def test_out_and_strides(device: Any, kind: str) -> None:
    case = KINDS[kind]
    inputs = make(case)

    def embed(array: np.ndarray, fill: Any) -> np.ndarray:
        """Every other token of a buffer with heads before tokens."""
        buffer = np.full((array.shape[0], array.shape[2], 2 * array.shape[1], *array.shape[3:]), fill, array.dtype)
        view = buffer[:, :, ::2].swapaxes(1, 2)
        view[...] = array
        return view

    inputs.q, inputs.k, inputs.v = (embed(x, np.nan) for x in (inputs.q, inputs.k, inputs.v))
    inputs.mark_q, inputs.mark_k = (embed(x, 1) for x in (inputs.mark_q, inputs.mark_k))
    out = embed(np.zeros(inputs.q.shape, case.dtype), np.nan)
    assert device.run(case.function, *inputs.arrays, out=out) is out
    hold(case, inputs, out, None)


@pytest.mark.parametrize("kind", KINDS)
def test_marks_that_are_shared(device: Any, kind: str) -> None:
    """Marks broadcast over the heads by strides of 0."""
    case = KINDS[kind].but(num_heads=2, num_kv_heads=2)
    inputs = make(case)
    inputs.mark_q = np.broadcast_to(inputs.mark_q[:, :, :1], inputs.mark_q.shape)
    inputs.mark_k = inputs.mark_q
    out, lse = device.run(case.function, *inputs.arrays, return_lse=True)
    hold(case, inputs, out, lse)


def test_dropped_tokens_are_never_read(device: Any) -> None:
    """NaN in them reaches nobody, not even the kept tokens of their tiles."""
    inputs = make(QK)
    poisoned = make(QK)
    for name, keep in (("q", inputs.mark_q), ("k", inputs.mark_k), ("v", inputs.mark_k)):
        getattr(poisoned, name)[~keep] = np.nan
    out, lse = device.run(sparse.qk_sparse_attention, *poisoned.arrays, return_lse=True)
    hold(QK, inputs, out, lse)


def test_one_bucket_is_causal_attention(device: Any) -> None:
    inputs = make(HASH.but(buckets=1))
    out, lse = device.run(sparse.hash_sparse_attention, *inputs.arrays, return_lse=True)
    causal, causal_lse = device.run(cuflash.attention, inputs.q, inputs.k, inputs.v, causal=True, return_lse=True)
    np.testing.assert_allclose(out.astype(float), causal.astype(float), atol=2e-3)
    np.testing.assert_allclose(lse, causal_lse, atol=1e-5)


@pytest.mark.parametrize("function", [sparse.hash_sparse_attention, sparse.qk_sparse_attention])
def test_docstrings_run(function: Any) -> None:
    runner = doctest.DocTestRunner()
    for test in doctest.DocTestFinder().find(function, globs={}):
        runner.run(test)
    assert runner.tries > 0
    assert runner.failures == 0


def test_names_of_buckets_do_not_matter(device: Any) -> None:
    """Nor does their order: each bucket is answered alone."""
    inputs = make(HASH.but(dtype="float32"))
    names = np.array([70, -3, 0, 2**31 - 1, -(2**31)], np.int32)
    out = device.run(sparse.hash_sparse_attention, *inputs.arrays)
    renamed = device.run(sparse.hash_sparse_attention, *inputs.arrays[:3], names[inputs.mark_q], names[inputs.mark_k])
    np.testing.assert_allclose(renamed, out, atol=1e-6)


@pytest.mark.parametrize("seed", range(12))
def test_random_cases(device: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    group, kv_heads = (int(n) for n in rng.integers(1, 4, 2))
    seqlen_q, seqlen_k = (int(n) for n in rng.integers(1, 200, 2))
    case = Case(
        str(rng.choice(ALL_DTYPES)), int(rng.integers(1, 4)), seqlen_q, seqlen_q if seed % 3 else seqlen_k,
        group * kv_heads, kv_heads, int(rng.integers(1, 81)), int(rng.integers(1, 81)),
        int(rng.integers(1, 20)) * (seed % 2), float(rng.random() / 2), "int64", seed % 4 != 1,
        float(rng.random()), float(rng.random()),
    )  # fmt: skip
    check(device, case, seed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", ["sm_90", "sm_120"])
def test_architectures(kind: str, arch: str) -> None:
    check(EmulatedDevice(arch), KINDS[kind].of_length(150))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_splits", [2, 7])
def test_split_keys(kind: str, num_splits: int) -> None:
    case = KINDS[kind].of_length(300).but(batch=1)
    inputs = make(case)
    options = cuflash.Options(num_splits=num_splits)
    out, lse = EmulatedDevice().run(case.function, *inputs.arrays, return_lse=True, options=options)
    hold(case, inputs, out, lse)


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_of_torch_and_jax(kind: str) -> None:
    case = KINDS[kind].but(dtype="float32")
    inputs = make(case)
    want = case.function(*inputs.arrays)
    for module, array in ((torch, torch.tensor), (jnp, jnp.asarray)):
        out = case.function(*map(array, inputs.arrays))
        assert type(out) is type(module.zeros(1))
        np.testing.assert_array_equal(np.asarray(out), want)
