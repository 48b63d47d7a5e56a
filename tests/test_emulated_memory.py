"""An emulated device, and its memory with it, goes with its last user: no garbage collector is needed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import cuflash
from cuflash import masks, sparse

X = np.random.default_rng(0).standard_normal((1, 40, 2, 16)).astype(np.float16)
MASK = masks.Butterfly(16)
HASHES = np.zeros((1, 40, 2), np.int32)


def gradients() -> None:
    out, pullback = cuflash.vjp(cuflash.attention, X, X, X, mask=MASK)
    pullback(out)


def paged() -> Any:
    caches = np.zeros((2, 4, 16, 2, 16), np.float16)
    return cuflash.paged_attention(X[:, 0], *caches, np.array([[0, 1]]), np.array([20]))


CALLS: dict[str, Callable[[], Any]] = {
    "attention": lambda: cuflash.attention(X, X, X),
    "splits": lambda: cuflash.attention(X[:, :1], X, X, options=cuflash.Options(num_splits=2)),
    "gradients": gradients,
    "hashes": lambda: sparse.hash_sparse_attention(X, X, X, HASHES, HASHES),
    "paged": paged,
}


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("name", CALLS)
def test_nothing_keeps_the_device(name: str) -> None:
    with cuflash.emulate("sm_80") as device:
        CALLS[name]()
    reference = weakref.ref(device)
    del device
    assert reference() is None
