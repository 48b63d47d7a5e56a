"""Caches of other kinds of arrays, and on a GPU, as far as the host sees it."""

from __future__ import annotations

from array import array

import ml_dtypes
import numpy as np
import pytest

import cuflash
from cuflash import DeviceError, PagedKVCache
from tests.fake_cupy import fake_cupy, ndarray


def test_sizes_and_dtypes() -> None:
    cache = PagedKVCache(3, 5, 2, 4, 8, head_dim_v=6)
    assert (cache.k_cache(0).shape, cache.v_cache(2).shape) == ((5, 2, 4, 8), (5, 2, 4, 6))
    assert cache.k_cache(0).dtype == ml_dtypes.bfloat16
    assert cache.k_cache(1).ctypes.data != cache.k_cache(0).ctypes.data
    assert PagedKVCache(1, 1, 1, 1, 1, dtype=np.float64).dtype == np.float64


def test_tables_of_nothing() -> None:
    cache = PagedKVCache(1, 4, 4, 1, 8, dtype="float32")
    assert cache.block_tables([]).shape == (0, 0)
    assert cache.seq_lens([]).shape == (0,)
    assert cache.reserve([]).shape == (0,)
    empty, _ = cache.add_sequence()
    assert cache.block_tables([empty]).shape == (1, 0)
    assert [array.shape for array in cache.gather(0, empty)] == [(0, 1, 8)] * 2
    arrays = cache.k_cache(0), cache.v_cache(0), cache.block_tables([empty]), cache.seq_lens([empty])
    assert (cuflash.paged_attention(np.ones((1, 2, 8), np.float32), *arrays) == 0).all()


def test_ids_counts_and_tokens_may_be_arrays() -> None:
    cache = PagedKVCache(1, 4, 4, 1, 8)
    ids = np.array([cache.add_sequence()[0] for _ in range(3)])
    assert cache.reserve(ids, np.array([1, 5, 2])).tolist() == [0, 4, 5, 6, 7, 8, 12, 13]
    cache.commit(ids, [[7], array("i", [1, 2, 3, 4, 5]), np.array([8, 9], np.uint8)])
    assert cache.add_sequence([1, 2, 3, 4]) == (3, 4)
    assert cache.add_sequence(array("h", [1, 2, 3, 4])) == (4, 4)
    cache.free(ids[1])
    assert cache.seq_lens(ids[[0, 2]]).tolist() == [1, 2]


def test_strided_tokens() -> None:
    """k and v are slices of one projection, as a model has them."""
    cache = PagedKVCache(1, 4, 4, 2, 8, dtype="float32")
    seq_id, _ = cache.add_sequence()
    qkv = np.random.default_rng(0).standard_normal((6, 3, 2, 8)).astype(np.float32)
    cache.append(0, qkv[:, 1], qkv[:, 2], cache.reserve([seq_id], 6))
    np.testing.assert_array_equal(cache.gather(0, seq_id), (qkv[:, 1], qkv[:, 2]))


def test_every_bit_is_kept() -> None:
    """NaN with a payload, negative zero, subnormal numbers."""
    cache = PagedKVCache(1, 4, 4, 1, 2, dtype="float16", host_blocks=1)
    seq_id, _ = cache.add_sequence()
    bits = np.array([[0x7C01, 0xFE55], [0x8000, 0x0001]], np.uint16)[:, None]
    cache.append(0, bits.view(np.float16), bits.view(np.float16), cache.reserve([seq_id], 2))
    cache.swap_out([seq_id])
    cache.swap_in([seq_id])
    cache.reserve([cache.fork(seq_id)])
    for got in cache.gather(0, seq_id):
        np.testing.assert_array_equal(got.view(np.uint16), bits)


def test_torch() -> None:
    torch = pytest.importorskip("torch")
    cache = PagedKVCache(1, 4, 4, 1, 8, like=torch.zeros(1))  # bfloat16
    seq_id, _ = cache.add_sequence()
    slots = cache.reserve([seq_id], 5)
    assert (type(slots), slots.dtype) == (torch.Tensor, torch.int64)
    k, v = torch.randn(2, 5, 1, 8, dtype=torch.bfloat16)
    cache.append(0, k, v, slots)
    assert torch.equal(cache.k_cache(0).reshape(-1, 1, 8)[slots], k)
    assert torch.equal(cache.gather(0, seq_id)[1], v)
    q = torch.randn(1, 5, 1, 8, dtype=torch.bfloat16)
    tables = cache.block_tables([seq_id]), cache.seq_lens([seq_id])
    got = cuflash.paged_attention(q, cache.k_cache(0), cache.v_cache(0), *tables)
    torch.testing.assert_close(got[0], cuflash.attention(q[0], k, v, causal=True))


def test_on_a_gpu() -> None:
    """Caches, slots, tables and lengths lie where `like` does; what is appended must as well."""
    with fake_cupy():
        cache = PagedKVCache(2, 4, 4, 1, 8, dtype="float16", like=ndarray(np.zeros(1), device_id=1))
        seq_id, _ = cache.add_sequence()
        slots = cache.reserve([seq_id], 5)
        arrays = slots, cache.block_tables([seq_id]), cache.seq_lens([seq_id]), cache.k_cache(1), cache.v_cache(0)
        assert [array.device_id for array in arrays] == [1] * 5
        assert slots.host.tolist() == [0, 1, 2, 3, 4]
        tokens = np.zeros((5, 1, 8), np.float16)
        with pytest.raises(DeviceError, match="k is on the host: must be on a GPU, as the cache is"):
            cache.append(0, tokens, tokens, slots)
        with pytest.raises(DeviceError, match="k is on GPU 0: must be on GPU 1, as the cache is"):
            cache.append(0, ndarray(tokens), ndarray(tokens), slots)
