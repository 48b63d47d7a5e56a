"""What moves bytes of a cache, against loops over tokens: on the CPU and through the kernel, to the byte."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cuflash.jit
from cuflash import tokens
from cuflash.emulator import Device
from cuflash.emulator.faults import EmulatorFault
from cuflash.errors import InvalidValueError
from cuflash.layout import Layout
from cuflash.paging import moves
from cuflash.plan.tokens import Lists

BLOCK_SIZES = (1, 5, 16, 200)
DIMS = ((64, 64), (24, 40), (33, 7), (1, 3))
DTYPES = {2: ml_dtypes.bfloat16, 4: np.float32, 8: np.float64}
VIEWS: dict[str, Callable[..., np.ndarray]] = {
    "NHD": lambda new, blocks, size, heads, dim: new(blocks, size, heads, dim),
    "HND": lambda new, blocks, size, heads, dim: new(blocks, heads, size, dim).transpose(0, 2, 1, 3),
    "of a cache of keys and values": lambda new, blocks, size, heads, dim: new(blocks, 2, size, heads, dim)[:, 1],
    "unaligned": lambda new, blocks, size, heads, dim: new(blocks, size, heads + 1, dim + 3)[:, ::-1, 1:, 1:-2],
    "every other block": lambda new, blocks, size, heads, dim: new(2 * blocks, size, heads, dim)[::-2],
}


def bits(array: Any) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint8)


def any_bits(dtype: Any, seed: int) -> Callable[..., np.ndarray]:
    """Makes arrays of any bits, NaN of every kind among them."""
    rng = np.random.default_rng(seed)
    size = np.dtype(dtype).itemsize

    def make(*shape: int) -> np.ndarray:
        return rng.integers(0, 256, (*shape[:-1], shape[-1] * size), np.uint8).view(dtype)

    return make


def caches(dtype: Any, block_size: int, dims: tuple[int, int], view: str = "NHD", blocks: int = 6) -> list[np.ndarray]:
    return [VIEWS[view](any_bits(dtype, i), blocks, block_size, 2, dim) for i, dim in enumerate(dims)]


def layers(arrays: list[np.ndarray], number: int = 3) -> list[np.ndarray]:
    """Caches of as many layers, whose bits differ."""
    return [np.stack([np.roll(x, i, axis=0) for i in range(number)]) for x in arrays]


def write_by_loop(cache: np.ndarray, rows: np.ndarray, slots: np.ndarray) -> np.ndarray:
    wanted = bits(cache).reshape(*cache.shape[:3], -1)
    for row, slot in zip(rows, slots.tolist(), strict=True):
        if slot >= 0:
            wanted[slot // cache.shape[1], slot % cache.shape[1]] = bits(row).reshape(row.shape[0], -1)
    return wanted


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("size", DTYPES)
def test_write(device: Any, block_size: int, dims: tuple[int, int], size: int) -> None:
    dtype = DTYPES[size]
    k_cache, v_cache = caches(dtype, block_size, dims)
    k, v = (any_bits(dtype, 9)(9, 2, dim) for dim in dims)
    slots = np.random.default_rng(0).permutation(6 * block_size + 3)[:9] - 3  # some are negative
    slots = np.concatenate([slots, np.full(9 - len(slots), -1)])
    wanted = [write_by_loop(*x, slots) for x in ((k_cache, k), (v_cache, v))]
    before = bits(k), bits(v)
    device.run(moves.write_tokens, k_cache, v_cache, k, v, slots)
    for cache, want in zip((k_cache, v_cache), wanted, strict=True):
        np.testing.assert_array_equal(bits(cache), want)
    for array, want in zip((k, v), before, strict=True):
        np.testing.assert_array_equal(bits(array), want)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", ["int32", "int64", "uint16"])
def test_write_in_any_strides(device: Any, view: str, dtype: str) -> None:
    k_cache, v_cache = caches(np.float16, 5, (24, 40), view)
    fused = any_bits(np.float16, 7)(11, 2, 128)[::-1]
    k, v = fused[..., 1:25], fused[..., 40:120:2]
    slots = np.random.default_rng(1).permutation(30).astype(dtype)[:22:2]
    wanted = [write_by_loop(*x, slots) for x in ((k_cache, k), (v_cache, v))]
    device.run(moves.write_tokens, k_cache, v_cache, k, v, slots)
    for cache, want in zip((k_cache, v_cache), wanted, strict=True):
        np.testing.assert_array_equal(bits(cache), want)


def test_write_is_one_launch_of_the_bytes_that_move() -> None:
    k_cache, v_cache = caches(np.float16, 16, (64, 32))
    k, v = (any_bits(np.float16, 2)(10, 2, dim) for dim in (64, 32))
    slots = np.arange(20, 30)
    slots[3] = -1
    with cuflash.emulate("sm_80") as emulated:
        moves.write_tokens(k_cache, v_cache, k, v, slots)
    (launch,) = emulated.launches
    moved = {"k": 9 * 2 * 64 * 2, "v": 9 * 2 * 32 * 2}
    assert {name: launch.read_by_array[name] for name in moved} == moved
    assert launch.written_by_array == {f"{name}_cache": count for name, count in moved.items()}


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("size", DTYPES)
def test_copy(device: Any, block_size: int, dims: tuple[int, int], size: int) -> None:
    """Two pairs share a source; every layer moves."""
    both = layers(caches(DTYPES[size], block_size, dims))
    pairs = [(4, 0), (4, 2), (1, 5)]
    wanted = [bits(x) for x in both]
    for want in wanted:
        for source, target in pairs:
            want[:, target] = want[:, source]
    device.run(moves.copy_blocks, both, pairs)
    for cache, want in zip(both, wanted, strict=True):
        np.testing.assert_array_equal(bits(cache), want)


@pytest.mark.parametrize("view", VIEWS)
def test_copy_in_any_strides(device: Any, view: str) -> None:
    both = caches(np.float16, 5, (24, 40), view)
    wanted = [bits(x) for x in both]
    for want in wanted:
        want[3] = want[0]
    device.run(moves.copy_blocks, both, [(0, 3)])
    for cache, want in zip(both, wanted, strict=True):
        np.testing.assert_array_equal(bits(cache), want)


@pytest.mark.parametrize("warp_order", [None, 1, 2])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
def test_copies_are_one_launch_in_any_order_of_warps(arch: str, warp_order: int | None) -> None:
    both = layers(caches(np.float16, 16, (64, 32)))
    wanted = [bits(x) for x in both]
    for want in wanted:
        want[:, [0, 5, 3]] = want[:, [4, 4, 2]]
    with cuflash.emulate(arch, warp_order=warp_order) as emulated:
        moves.copy_blocks(both, [(4, 0), (4, 5), (2, 3)])
    (launch,) = emulated.launches
    for cache, want, name in zip(both, wanted, moves.NAMES, strict=True):
        np.testing.assert_array_equal(bits(cache), want)
        assert launch.read_by_array[name] == launch.written_by_array[name] == 3 * cache[:, 0].nbytes


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_swap(device: Any, block_size: int, dims: tuple[int, int]) -> None:
    """Between the host and the device there and back, under other numbers."""
    on_device = layers(caches(np.float16, block_size, dims))
    on_host = [np.zeros_like(x[:, :4]) for x in on_device]
    before = [bits(x) for x in on_device]

    def there_and_back(on_device: Any) -> None:
        moves.move_blocks(on_device, on_host, [(5, 0), (2, 3)])
        moves.move_blocks(on_host, on_device, [(0, 1), (3, 4)])

    device.run(there_and_back, on_device)
    for host, array, want in zip(on_host, on_device, before, strict=True):
        np.testing.assert_array_equal(bits(host)[:, [0, 3]], want[:, [5, 2]])
        assert not bits(host)[:, [1, 2]].any()
        want[:, [1, 4]] = want[:, [5, 2]]
        np.testing.assert_array_equal(bits(array), want)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("view", VIEWS)
def test_gather(device: Any, block_size: int, view: str) -> None:
    cache = caches(np.float16, block_size, (33, 1), view)[0]
    blocks = [5, 0, 3, 1]
    for length in dict.fromkeys((0, 1, block_size, 2 * block_size + 1, 4 * block_size)):
        if length > 4 * block_size:
            continue
        got = device.run(moves.gather_tokens, cache, blocks, length)
        want = np.concatenate([cache[block] for block in blocks])[:length]
        assert got.shape == (length, 2, 33)
        np.testing.assert_array_equal(bits(got), bits(want))


def test_gather_reads_the_tokens_alone() -> None:
    """Entries past the last token's block may be anything; slots past it are not read."""
    cache = caches(np.float16, 16, (64, 1))[0]
    with cuflash.emulate("sm_80") as emulated:
        moves.gather_tokens(cache, [4, 2, 10**6], 19)
    (launch,) = emulated.launches
    assert launch.read_by_array["cache"] == launch.written_by_array["out"] == 19 * 2 * 64 * 2


@pytest.mark.parametrize("count", [0, 1, 1000])
def test_any_number_of_tokens(device: Any, count: int) -> None:
    k_cache, v_cache = caches(np.float16, 16, (8, 8), blocks=70)
    k, v = (any_bits(np.float16, i)(count, 2, 8) for i in range(2))
    slots = np.random.default_rng(0).permutation(70 * 16)[:count]
    want = write_by_loop(k_cache, k, slots)
    device.run(moves.write_tokens, k_cache, v_cache, k, v, slots)
    np.testing.assert_array_equal(bits(k_cache), want)


def test_nothing_to_move_is_no_launch() -> None:
    both = layers(caches(np.float16, 16, (8, 8)))
    before = [bits(x) for x in both]
    with cuflash.emulate("sm_80") as emulated:
        moves.copy_blocks(both, [])
        moves.move_blocks(both, [x.copy() for x in both], [])
        moves.write_tokens(both[0][0], both[1][0], both[0][0, 0, :0], both[1][0, 0, :0], np.zeros(0, np.int64))
        assert moves.gather_tokens(both[0][0], [3], 0).shape == (0, 2, 8)
    assert emulated.launches == []
    for array, want in zip(both, before, strict=True):
        np.testing.assert_array_equal(bits(array), want)


def test_a_slot_outside_of_the_cache_is_a_fault_of_the_emulated_device() -> None:
    k_cache, v_cache = caches(np.float16, 16, (8, 8))
    k, v = (any_bits(np.float16, i)(1, 2, 8) for i in range(2))
    before = bits(k_cache)
    with cuflash.emulate("sm_80"), pytest.raises(EmulatorFault):
        moves.write_tokens(k_cache, v_cache, k, v, np.array([6 * 16]))
    np.testing.assert_array_equal(bits(k_cache), before)


def test_rows_that_are_not_contiguous_are_refused() -> None:
    both = [x[..., ::2] for x in caches(np.float16, 16, (8, 8))]
    with cuflash.emulate("sm_80"), pytest.raises(InvalidValueError, match="the last axis must be contiguous"):
        moves.copy_blocks(both, [(0, 1)])


@pytest.mark.parametrize("whole_blocks", [False, True])
def test_offsets_past_32_bits(whole_blocks: bool) -> None:
    """A pool of 2^36 elements, of which the last blocks exist: those before lie behind the address that is given."""
    blocks, block_size, count, dim = 2**17, 16, 3, 8
    stride = 2**19  # bytes of 2^18 elements from token to token
    dtype = np.dtype(np.float16)
    far = Layout((1, blocks + count, block_size, 1, dim), (0, block_size * stride, stride, 0, 2), dtype, 0)
    rows = count * block_size if whole_blocks else count
    near = Layout((1, 1, rows, 1, dim), (0, 0, 2 * dim, 0, 2), dtype, 0)
    lists = Lists(4, block_size, True) if whole_blocks else Lists(8, block_size, False)
    named = np.arange(blocks, blocks + count) if whole_blocks else blocks * block_size + np.array([17, 3, 40])
    wanted = any_bits(dtype, 0)(rows, dim)
    emulator = Device("sm_80")
    pool = np.zeros((count * block_size, stride // 2), dtype)[:, :dim]
    held = emulator.to_device(pool, name="pool"), emulator.to_device(wanted, name="rows")
    entries = emulator.to_device(named.astype(f"i{lists.index_bytes}"), name="list")
    launch, record = tokens._prepare_move([(near, far)], rows, lists)
    record["source"][0], record["targets"] = held[1].pointer, entries.pointer
    record["target"][0] = (held[0].pointer - blocks * block_size * stride) % 2**64
    kernel = emulator.load(cuflash.jit.compile_ptx(launch.config, "sm_80")).kernel(launch.config.entry)
    kernel.launch(launch.grid, launch.block, (record,), shared_bytes=0)
    places = np.arange(rows) if whole_blocks else named - blocks * block_size
    np.testing.assert_array_equal(bits(held[0].to_host()[places]), bits(wanted))


def test_a_cache_moves_its_bytes_by_the_kernel(device: Any) -> None:
    """Appended, copied when shared, swapped out and in: what sequences hold is what was appended to them."""

    def life() -> list[tuple[np.ndarray, np.ndarray]]:
        cache = cuflash.PagedKVCache(2, 12, 4, 2, 24, head_dim_v=40, dtype="float16", host_blocks=6)
        first, _ = cache.add_sequence()
        slots = cache.reserve([first], [6])
        for layer in range(2):
            cache.append(layer, *(x[layer, :6] for x in (keys, values)), slots)
        forks = [cache.fork(first) for _ in range(2)]
        slots = cache.reserve([first, *forks])
        for layer in range(2):
            cache.append(layer, *(x[layer, 6:9] for x in (keys, values)), slots)
        cache.swap_out(forks)
        cache.swap_in(forks)
        return [cache.gather(layer, sequence) for layer in range(2) for sequence in (first, *forks)]

    keys, values = (any_bits(np.float16, i)(2, 9, 2, dim) for i, dim in enumerate((24, 40)))
    got = device.run(life)
    for i, (k, v) in enumerate(got):
        layer, own = divmod(i, 3)
        rows = [*range(6), 6 + own]
        np.testing.assert_array_equal(bits(k), bits(keys[layer][rows]))
        np.testing.assert_array_equal(bits(v), bits(values[layer][rows]))
    if device.name == "emulated":
        assert all(launch.kernel.startswith("cuflash_move_rows") for launch in device.launches)
        assert len(device.launches) == 4 + 1 + 4 + 12  # appended, copied, swapped there and back, gathered
