"""A life of a few sequences, the same on every device: blocks, tables, and every byte of the cache."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest

import cuflash
from cuflash import PagedKVCache

LAYERS = 2
TOKENS = list(range(40))


class Place:
    """Where a cache lies and its calls run; arrays go in and out as NumPy's."""

    def __init__(self, device: Any) -> None:
        self.xp: Any = np
        self.context = cuflash.emulate(device.arch) if device.name == "emulated" else nullcontext()
        if device.name == "cuda":
            import cupy

            self.xp = cupy

    def put(self, array: np.ndarray) -> Any:
        return self.xp.asarray(array)

    def get(self, array: Any) -> np.ndarray:
        return array if isinstance(array, np.ndarray) else array.get()


def live(place: Place, dtype: str) -> list[Any]:
    """All that can be seen on the way."""
    seen: list[Any] = []
    rng = np.random.default_rng(0)

    def random(*shape: int) -> Any:
        return place.put(rng.standard_normal(shape).astype(dtype))

    def step(ids: list[int], count: int) -> None:
        slots = cache.reserve(ids, count)
        for layer in range(LAYERS):
            cache.append(layer, random(len(ids) * count, 2, 16), random(len(ids) * count, 2, 24), slots)
        cache.commit(ids, [TOKENS[:count]] * len(ids))
        see(slots, ids)

    def see(*more: Any) -> None:
        *arrays, ids = more
        arrays += [cache.block_tables(ids), cache.seq_lens(ids)]
        arrays += [side(layer) for layer in range(LAYERS) for side in (cache.k_cache, cache.v_cache)]
        arrays += [array for i in ids for array in cache.gather(1, i)]
        seen.extend((array.shape, array.dtype, array.tobytes()) for array in map(place.get, arrays))

    like = None if place.xp is np else place.xp.zeros(1)
    cache = PagedKVCache(LAYERS, 12, 4, 2, 16, head_dim_v=24, dtype=dtype, like=like, host_blocks=6)
    first, _ = cache.add_sequence(TOKENS[:9])
    step([first], 9)
    second, third = cache.fork(first), cache.fork(first)
    step([first, second, third], 1)  # two copies
    cache.swap_out([second, third])
    see([first])
    step([first], 6)
    cache.swap_in([third, second])
    cache.truncate(first, 7)
    step([first, second], 2)
    fourth, cached = cache.add_sequence(TOKENS[:9])
    step([fourth], 1)
    seen.append((cached, cache.usage(), cache.stats()))
    return seen


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_life_is_the_same_everywhere(device: Any, dtype: str) -> None:
    place = Place(device)
    with place.context:
        got = live(place, dtype)
    want = live(Place(_Host), dtype)
    assert len(got) == len(want)
    for i, (have, expected) in enumerate(zip(got, want, strict=True)):
        assert have == expected, i


class _Host:
    name = "cpu"


def test_copies_are_one_launch() -> None:
    """Of all layers, keys and values, whatever their number."""
    cache = PagedKVCache(3, 12, 4, 2, 16, dtype="float16")
    first, _ = cache.add_sequence()
    cache.reserve([first], 5)
    ids = [first, *(cache.fork(first) for _ in range(4))]
    with cuflash.emulate("sm_80") as device:
        cache.reserve(ids)
        assert len(device.launches) == 1
        assert cache.stats().copied_blocks == 4
        cache.reserve(ids)
    assert len(device.launches) == 1
