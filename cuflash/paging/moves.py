"""Where bytes of a cache move: into slots, between blocks, between host and GPU, out into contiguous memory.

Caches are native arrays (..., num_blocks, block_size, num_kv_heads, dim): of one layer, or of all layers at once; in
any strides with a contiguous last axis. Every function is one launch on the device of its arrays, NumPy on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cuflash import tokens
from cuflash.arrays import device_of, kind_of
from cuflash.device import Device
from cuflash.errors import InvalidValueError
from cuflash.layout import NativeArray, layout
from cuflash.plan.tokens import Lists
from cuflash.tokens import Moved

NAMES = ("k_cache", "v_cache")  # in reports of the emulated device


def write_tokens(
    k_cache: NativeArray, v_cache: NativeArray, k: NativeArray, v: NativeArray, slots: NativeArray
) -> None:
    """Token i of k and v (tokens, num_kv_heads, dim) goes to slot slots[i] of one layer; negative ones go nowhere.

    Slots are different from each other.
    """
    device = _device(k_cache)
    if device is None:
        kept = slots >= 0
        block, offset = slots[kept] // k_cache.shape[1], slots[kept] % k_cache.shape[1]
        for cache, rows in ((k_cache, k), (v_cache, v)):
            _bits(cache)[block, offset] = _bits(rows)[kept]
        return
    if slots.dtype not in (np.int32, np.int64) or not slots.flags.c_contiguous:
        slots = slots.astype(np.int64)
    _check_rows(k_cache, v_cache)
    k, v = (array if layout(array).rows_contiguous else array.copy(order="C") for array in (k, v))
    moved = [Moved(k[None], k_cache, ("k", "k_cache")), Moved(v[None], v_cache, ("v", "v_cache"))]
    lists = Lists(slots.dtype.itemsize, k_cache.shape[1])
    tokens.move(device, moved, slots.shape[0], lists, targets=slots)


def copy_blocks(caches: Sequence[NativeArray], pairs: Sequence[tuple[int, int]]) -> None:
    """All layers of block `from` to block `to` of each cache, keys and values, for all pairs; no block is both."""
    device = _device(caches[0])
    ends = _ends(pairs)
    if device is None:
        for bits in map(_bits, caches):
            bits[..., ends[1], :, :, :] = bits[..., ends[0], :, :, :]
        return
    _check_rows(*caches)
    moved = [Moved(cache, cache, (name, name)) for cache, name in zip(caches, NAMES, strict=True)]
    begin, end = device.constant(ends)
    tokens.move(device, moved, *_of_blocks(caches, begin), sources=begin, targets=end)


def move_blocks(
    sources: Sequence[NativeArray], targets: Sequence[NativeArray], pairs: Sequence[tuple[int, int]]
) -> None:
    """All layers of block `from` of each source to block `to` of its target, of which one may be on the host.

    Between host and GPU the blocks go side by side, one copy for keys and one for values; from a GPU the call waits
    for them.
    """
    ends = _ends(pairs)
    to = _device(targets[0])
    blocks = _take_blocks(_device(sources[0]), sources, ends[0])
    if to is not None and type(blocks[0]) is np.ndarray:
        blocks = [to.constant(array) for array in blocks]
    elif to is None and type(blocks[0]) is not np.ndarray:
        blocks = [array.get() for array in blocks]
    _put_blocks(to, blocks, targets, ends[1])


def gather_tokens(cache: NativeArray, blocks: Sequence[int], length: int) -> NativeArray:
    """The first `length` tokens of these blocks of one layer, (length, num_kv_heads, dim), in memory of their own."""
    device, block_size = _device(cache), cache.shape[1]
    used = np.array(blocks[: -(-length // block_size)], np.int32)
    if device is None:
        return cache[used].reshape(-1, *cache.shape[2:])[:length]
    _check_rows(cache)
    out = tokens.empty(device, (1, length, *cache.shape[2:]), cache.dtype)
    moved = [Moved(cache, out, ("cache", "out"), fresh=True)]
    tokens.move(device, moved, length, Lists(4, block_size, True), sources=device.constant(used))
    return out[0]


def _take_blocks(device: Device | None, caches: Sequence[NativeArray], blocks: np.ndarray) -> list[NativeArray]:
    """These blocks of each cache, in memory of their own."""
    if device is None:
        return [cache[..., blocks, :, :, :] for cache in caches]
    _check_rows(*caches)
    shapes = [(*cache.shape[:-4], len(blocks), *cache.shape[-3:]) for cache in caches]
    taken = [tokens.empty(device, shape, cache.dtype) for shape, cache in zip(shapes, caches, strict=True)]
    moved = [
        Moved(cache, _side_by_side(out), (name, f"{name}_blocks"), fresh=True)
        for cache, out, name in zip(caches, taken, NAMES, strict=True)
    ]
    tokens.move(device, moved, *_of_blocks(caches, blocks), sources=device.constant(blocks))
    return taken


def _put_blocks(
    device: Device | None, taken: Sequence[NativeArray], caches: Sequence[NativeArray], blocks: np.ndarray
) -> None:
    """What `_take_blocks` gave, to these blocks of other caches."""
    if device is None:
        for array, cache in zip(taken, caches, strict=True):
            _bits(cache)[..., blocks, :, :, :] = _bits(array)
        return
    _check_rows(*caches)
    moved = [
        Moved(_side_by_side(array), cache, (f"{name}_blocks", name))
        for array, cache, name in zip(taken, caches, NAMES, strict=True)
    ]
    tokens.move(device, moved, *_of_blocks(caches, blocks), targets=device.constant(blocks))


def _ends(pairs: Sequence[tuple[int, int]]) -> np.ndarray:
    """Of each pair its first, then of each its second."""
    return np.ascontiguousarray(np.array(pairs, np.int32).reshape(-1, 2).T)


def _of_blocks(caches: Sequence[NativeArray], blocks: NativeArray) -> tuple[int, Lists]:
    """The rows of these blocks, and what a list of them names."""
    block_size = caches[0].shape[-3]
    return blocks.shape[0] * block_size, Lists(4, block_size, whole_blocks=True)


def _side_by_side(blocks: NativeArray) -> NativeArray:
    """Contiguous blocks as one."""
    shape = blocks.shape
    return blocks.reshape(*shape[:-4], 1, shape[-4] * shape[-3], *shape[-2:])


def _device(array: NativeArray) -> Device | None:
    return device_of(kind_of(array, "cache"), ("cache",), (array,))


def _check_rows(*caches: NativeArray) -> None:
    for cache in caches:
        if not layout(cache).rows_contiguous:
            raise InvalidValueError(f"cache.strides = {cache.strides}: the last axis must be contiguous")


def _bits(array: NativeArray) -> NativeArray:
    """The elements as unsigned integers, so that moving them keeps every bit, of NaN as well."""
    return array.view(f"u{array.dtype.itemsize}")
