"""Angular hashes: the definition, every array module, bad input."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

from cuflash.errors import InvalidDtypeError, InvalidShapeError, InvalidTypeError, InvalidValueError
from cuflash.sparse import angular_hash


@pytest.mark.parametrize("num_buckets", [2, 6, 64])
def test_it_is_the_nearest_of_the_directions_and_their_opposites(num_buckets: int) -> None:
    rng = np.random.default_rng(0)
    x, r = rng.standard_normal((2, 50, 3, 24)), rng.standard_normal((24, num_buckets // 2))
    products = np.concatenate((x @ r, -(x @ r)), axis=-1)
    hashes = angular_hash(x, num_buckets, projections=r)
    assert hashes.shape == (2, 50, 3)
    assert hashes.dtype == np.int32
    np.testing.assert_array_equal(hashes, products.argmax(axis=-1))


def test_random_directions_are_unit_vectors_that_a_seed_fixes() -> None:
    x = np.random.default_rng(0).standard_normal((2000, 16))
    first = angular_hash(x, 8)
    np.testing.assert_array_equal(first, angular_hash(x, 8, seed=0))
    assert (first != angular_hash(x, 8, seed=1)).mean() > 0.5
    counts = np.bincount(first, minlength=8)
    assert counts.min() > 0.5 * counts.mean()  # no direction is longer than another


def test_closer_vectors_share_a_hash_more_often() -> None:
    rng = np.random.default_rng(0)
    x, noise = rng.standard_normal((2, 4000, 32))
    shares = [(angular_hash(x, 16) == angular_hash(x + size * noise, 16)).mean() for size in (0, 0.1, 0.5, 2)]
    assert shares[0] == 1
    assert all(a > b + 0.1 for a, b in pairwise(shares))
    np.testing.assert_array_equal(angular_hash(x, 16), angular_hash(3 * x, 16))
    np.testing.assert_array_equal(angular_hash(-x, 16), (angular_hash(x, 16) + 8) % 16)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_narrow_floats_are_hashed_in_float32(dtype: Any) -> None:
    x = np.random.default_rng(0).standard_normal((100, 64)).astype(dtype)
    np.testing.assert_array_equal(angular_hash(x, 8), angular_hash(x.astype(np.float32), 8))


def test_torch_and_jax() -> None:
    x = np.random.default_rng(0).standard_normal((4, 20, 32)).astype(np.float32)
    want = angular_hash(x, 8)
    for hashes, kind, int32 in (
        (angular_hash(torch.tensor(x), 8), torch.Tensor, torch.int32),
        (angular_hash(jnp.asarray(x), 8), jnp.ndarray, np.int32),
    ):
        assert isinstance(hashes, kind)
        assert hashes.dtype == int32
        np.testing.assert_array_equal(np.asarray(hashes), want)


@pytest.mark.parametrize(
    ("x", "keywords", "error", "message"),
    [
        (np.ones((3, 8)), {"num_buckets": 7}, InvalidValueError, "num_buckets = 7: must be even and at least 2"),
        (np.ones((3, 8)), {"num_buckets": 0}, InvalidValueError, "num_buckets = 0: must be even and at least 2"),
        (np.ones((3, 8)), {"num_buckets": 8.0}, InvalidTypeError, "num_buckets = 8.0: must be an integer"),
        (np.ones((3, 8)), {"num_buckets": 8, "seed": -1}, InvalidValueError, "seed = -1: must be >= 0"),
        (
            np.ones((3, 8), int),
            {"num_buckets": 8},
            InvalidDtypeError,
            "x.dtype = int64: must be one of float16, bfloat16, float32, float64",
        ),
        (np.ones((3, 0)), {"num_buckets": 8}, InvalidShapeError, "x.shape = (3, 0): must be (..., head_dim)"),
        (
            np.ones((3, 8)),
            {"num_buckets": 8, "projections": np.ones((8, 8))},
            InvalidShapeError,
            "projections.shape = (8, 8): must be (8, 4)",
        ),
        (
            [1.0],
            {"num_buckets": 8},
            InvalidTypeError,
            "x = <class 'list'>: must be an array of NumPy, CuPy, torch or JAX",
        ),
    ],
)
def test_bad_input(x: Any, keywords: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        angular_hash(x, **keywords)
    assert str(raised.value) == message
