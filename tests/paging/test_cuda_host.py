"""A cache on a GPU from the host, over a stand-in for CuPy: what is launched with what, and what is read back."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

import cuflash
from cuflash.plan.params import MOVE_ROWS_PARAMS
from tests import fake_cupy
from tests.fake_cupy import FakeCupy, ndarray

LAYERS, BLOCKS, SIZE, HEADS, DIM = 3, 8, 4, 2, 16


@pytest.fixture
def cupy() -> Iterator[FakeCupy]:
    with fake_cupy.fake_cupy() as module:
        yield module


def gpu(*shape: int) -> ndarray:
    return ndarray(np.ones(shape, np.float16))


def moved(cupy: FakeCupy) -> list[np.ndarray]:
    """Parameters of every launch, all of which move rows."""
    assert all(launch[1].startswith("cuflash_move_rows_") for launch in cupy.launches)
    return [np.frombuffer(launch[4], MOVE_ROWS_PARAMS)[0] for launch in cupy.launches]


def cache_of(length: int) -> tuple[cuflash.PagedKVCache, int]:
    cache = cuflash.PagedKVCache(
        LAYERS, BLOCKS, SIZE, HEADS, DIM, dtype="float16", like=gpu(1), host_blocks=BLOCKS, prefix_cache=False
    )
    seq_id, _ = cache.add_sequence()
    cache.reserve([seq_id], [length])
    return cache, seq_id


def test_append_is_one_launch_into_the_layer(cupy: FakeCupy) -> None:
    cache, seq_id = cache_of(5)
    slots = cache.reserve([seq_id], [2])
    assert isinstance(slots, ndarray)
    k, v = gpu(2, HEADS, DIM), gpu(2, HEADS, DIM)
    cache.append(1, k, v, slots)
    (record,) = moved(cupy)
    assert record["source"].tolist() == [k.data.ptr, v.data.ptr]
    assert record["target"].tolist() == [cache.k_cache(1).data.ptr, cache.v_cache(1).data.ptr]
    assert [record["sources"], record["targets"]] == [0, slots.data.ptr]
    assert [record["num_rows"], record["num_heads"], record["batch"]] == [2, 1, 1]  # heads lie side by side
    assert record["columns"].tolist() == [HEADS * DIM * 2 // 16] * 2


def test_copies_of_a_step_are_one_launch(cupy: FakeCupy) -> None:
    cache, seq_id = cache_of(6)
    forks = [cache.fork(seq_id) for _ in range(3)]
    cache.reserve([seq_id, *forks])
    (record,) = moved(cupy)
    assert record["source"].tolist() == record["target"].tolist()
    assert record["source"].tolist() == [cache.k_cache(0).data.ptr, cache.v_cache(0).data.ptr]
    assert [record["num_rows"], record["batch"]] == [3 * SIZE, LAYERS]
    assert record["sources"] != record["targets"]


def test_swapped_blocks_alone_are_read_back(cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, seq_id = cache_of(6)
    read: list[tuple[int, ...]] = []
    get = ndarray.get
    monkeypatch.setattr(ndarray, "get", lambda array: read.append(array.shape) or get(array))
    cache.swap_out([seq_id])
    assert read == [(LAYERS, 2, SIZE, HEADS, DIM)] * 2
    cache.swap_in([seq_id])
    assert len(read) == 2
    out, into = moved(cupy)
    assert (out["sources"] != 0, out["targets"]) == (True, 0)
    assert (into["sources"], into["targets"] != 0) == (0, True)
    assert out["source"].tolist() == into["target"].tolist()


def test_gather_reads_nothing_back(cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, seq_id = cache_of(6)
    monkeypatch.delattr(ndarray, "get")
    k, v = cache.gather(2, seq_id)
    assert k.shape == v.shape == (6, HEADS, DIM)
    records = moved(cupy)
    assert [record["target"][0] for record in records] == [k.data.ptr, v.data.ptr]
    assert [record["num_rows"] for record in records] == [6, 6]
