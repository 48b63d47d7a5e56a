"""The kernels that sort tokens, find what sorted queries see and move rows, against NumPy; and the bytes they move."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cuflash import tokens
from cuflash.device.emulated import EmulatedDevice
from cuflash.emulator import Device
from cuflash.errors import ConfigError
from cuflash.io_model.tokens import gather_traffic, sort_traffic
from cuflash.jit import compile_ptx, resources
from cuflash.layout import Layout
from cuflash.plan.token_config import MoveRowsConfig, SortTokensConfig, VisibleRangesConfig
from cuflash.plan.tokens import MOVE_ROWS, Lists, plan_move, plan_ranges, plan_sort

HASHES = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")


def hashes(dtype: str, shape: tuple[int, ...], buckets: int | None = None, seed: int = 0) -> np.ndarray:
    """Whole numbers around zero, or over all of the dtype's range."""
    rng, kind = np.random.default_rng(seed), np.iinfo(dtype)
    if buckets is None:
        return rng.integers(kind.min, kind.max, shape, dtype=dtype, endpoint=True)
    return (rng.integers(0, buckets, shape) - (buckets // 2 if kind.min else 0)).astype(dtype)


def assert_sorted(got: tokens.Sorted, source: np.ndarray) -> None:
    order = np.argsort(source, axis=1, kind="stable")
    want = tokens.Sorted(
        np.take_along_axis(source, order, axis=1).swapaxes(1, 2),
        order.swapaxes(1, 2),
        np.argsort(order, axis=1, kind="stable").swapaxes(1, 2),
    )
    np.testing.assert_array_equal(got.order, want.order)
    np.testing.assert_array_equal(got.inverse, want.inverse)
    if source.dtype.kind == "i":  # in the order of unsigned numbers
        sign = got.keys.dtype.type(1 << (8 * source.itemsize - 1))
        got = got._replace(keys=(got.keys ^ sign).view(source.dtype))
    np.testing.assert_array_equal(got.keys, want.keys)


@pytest.mark.parametrize("dtype", HASHES)
@pytest.mark.parametrize("buckets", [None, 5])
def test_sort(dtype: str, buckets: int | None) -> None:
    device = EmulatedDevice("sm_80")
    for length in (1, 2, 31, 33, 700, 2100):
        source = hashes(dtype, (2, length, 3), buckets, seed=length)
        assert_sorted(tokens.sort(device, source), source)


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize("warp_order", [None, 1, 2])
def test_sort_in_any_order_of_warps(arch: str, warp_order: int | None) -> None:
    source = hashes("int32", (1, 1300, 2), 40_000)
    assert_sorted(tokens.sort(EmulatedDevice(arch, warp_order=warp_order), source), source)


@pytest.mark.parametrize(
    "source",
    [
        np.full((1, 500, 2), -7, np.int64),
        np.broadcast_to(np.arange(600, dtype=np.int16)[::-1, None], (2, 600, 1)),
        np.repeat([[2**40], [3], [-(2**50)]], 100, axis=0)[None].astype(np.int64),
    ],
    ids=["one key", "falling", "far digits"],
)
def test_sort_of_special_keys(source: np.ndarray) -> None:
    assert_sorted(tokens.sort(EmulatedDevice("sm_80"), source), source)


def test_sort_in_place_of_any_strides() -> None:
    buffer = hashes("int32", (3, 5, 400), 9)
    for view in (
        buffer.transpose(0, 2, 1),
        buffer[::2, ::-1, :300].transpose(0, 2, 1),
        np.broadcast_to(buffer[:, :1], (3, 4, 400)).transpose(0, 2, 1),
        buffer[:, ::2, 1::3].transpose(0, 2, 1),
    ):
        assert_sorted(tokens.sort(EmulatedDevice("sm_80"), view), view)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_sort_by_keep(share: float) -> None:
    keep = np.random.default_rng(0).random((2, 1000, 3)) < share
    got, on_cpu = tokens.sort(EmulatedDevice("sm_80"), keep), tokens.sort(None, keep)
    for array, other in zip(got, on_cpu, strict=True):
        np.testing.assert_array_equal(array, other)
    for batch, head in np.ndindex(2, 3):
        kept = np.flatnonzero(keep[batch, :, head])
        np.testing.assert_array_equal(got.order[batch, head, : len(kept)], kept)
        assert (got.order[batch, head, len(kept) :] == -1).all()
        assert (np.sort(got.inverse[batch, head]) == np.arange(1000)).all()
        np.testing.assert_array_equal(got.inverse[batch, head, kept], np.arange(len(kept)))


@pytest.mark.parametrize(
    ("dtype", "span"), [("bool", 2), ("uint8", 256), ("int16", 256), ("uint64", 60), ("int64", 2**40)]
)
def test_bytes_of_a_sort(dtype: str, span: int) -> None:
    """Digits that all keys share cost no pass: a hash of int64 with few values is read three times and written once."""
    device = EmulatedDevice("sm_80")
    source = np.random.default_rng(0).integers(0, span, (2, 1000, 3)).astype(dtype)
    tokens.sort(device, source)
    digits = max(1, (span - 1).bit_length() // 8)
    want = sort_traffic(6, 1000, source.itemsize, digits)
    report = device.launches[-1]
    assert report.read_by_array == want.read
    assert report.written_by_array == want.written


def brute_ranges(q: np.ndarray, k: np.ndarray, shift: int, keep: bool) -> np.ndarray:
    """Boolean (batch, num_heads, len_q, len_k) of sorted queries and keys."""
    group = q.shape[2] // k.shape[2]
    k = np.repeat(k, group, axis=2)
    orders = [np.argsort(~x if keep else x, axis=1, kind="stable") for x in (q, k)]
    q, k = (np.take_along_axis(x, order, axis=1) for x, order in zip((q, k), orders, strict=True))
    same = (q[:, :, None] & k[:, None]) if keep else q[:, :, None] == k[:, None]
    return (same & (orders[1][:, None] < orders[0][:, :, None] + shift)).transpose(0, 3, 1, 2)


@pytest.mark.parametrize("kind", ["bool", "uint8", "int64"])
@pytest.mark.parametrize("lengths", [(1, 1), (300, 300), (170, 300), (300, 170), (40, 0)])
@pytest.mark.parametrize("shift", [0, 1])
def test_visible_ranges(kind: str, lengths: tuple[int, int], shift: int) -> None:
    keep, heads = kind == "bool", (4, 2)
    arrays = [
        np.random.default_rng(i).random((2, n, h)) < 0.6 if keep else hashes(kind, (2, n, h), 7, seed=i)
        for i, (n, h) in enumerate(zip(lengths, heads, strict=True))
    ]
    shift += lengths[1] - lengths[0]
    want = brute_ranges(*arrays, shift, keep)
    for device in (None, EmulatedDevice("sm_80")):
        begin, end = tokens.visible_ranges(device, *(tokens.sort(device, x) for x in arrays), shift)
        position = np.arange(lengths[1])
        np.testing.assert_array_equal((begin[..., None] <= position) & (position < end[..., None]), want)
        assert begin.dtype == end.dtype == np.int32
        assert (np.diff(begin) >= 0).all()
        assert (np.diff(end) >= 0).all()


ELEMENTS = {1: np.uint8, 2: ml_dtypes.bfloat16, 4: np.float32, 8: np.float64}


@pytest.mark.parametrize("size", ELEMENTS)
@pytest.mark.parametrize("dim", [1, 3, 32, 64, 80, 128, 600])
def test_gather(size: int, dim: int) -> None:
    source = np.random.default_rng(0).integers(0, 100, (2, 70, 3, dim)).astype(ELEMENTS[size])
    order = np.random.default_rng(1).integers(-1, 70, (2, 3, 45)).astype(np.int32)
    want = np.zeros((2, 45, 3, dim), source.dtype)
    for batch, head, i in np.ndindex(2, 3, 45):
        if order[batch, head, i] >= 0:
            want[batch, i, head] = source[batch, order[batch, head, i], head]
    np.testing.assert_array_equal(tokens.gather(None, source, order), want)
    device = EmulatedDevice("sm_80")
    np.testing.assert_array_equal(tokens.gather(device, source, order), want)
    traffic = gather_traffic(order.size, int((order >= 0).sum()), dim * size, int(np.gcd(16, dim * size)))
    assert device.launches[-1].read_by_array == traffic.read
    assert device.launches[-1].written_by_array == traffic.written


@pytest.mark.parametrize(
    ("view", "access"),
    [
        (lambda x: x[..., 1:33], 2),
        (lambda x: x[..., 4:36], 8),
        (lambda x: x[:, ::-2, :, 8:40], 16),
        (lambda x: x.transpose(1, 0, 2, 3), 16),
        (lambda x: x[..., ::2], 16),  # copied
        (lambda x: x[:1, :, 1:2, :5], 2),
    ],
)
def test_gather_of_any_layout(view: Any, access: int) -> None:
    source = view(np.random.default_rng(0).standard_normal((20, 20, 3, 64)).astype(np.float16))
    batch, length, heads, dim = source.shape
    order = np.random.default_rng(1).integers(-1, length, (batch, heads, 30)).astype(np.int32)
    buffer = np.full((heads, 30, batch, dim), np.nan, np.float16)
    out = buffer.transpose(2, 1, 0, 3)
    device = EmulatedDevice("sm_80")
    assert tokens.gather(device, source, order, out) is out
    np.testing.assert_array_equal(out, tokens.gather(None, source, order))
    assert f"rows_{access}x" in device.launches[-1].kernel


def test_gather_reads_no_row_that_is_dropped() -> None:
    """Memory of dropped rows may hold anything; reading it here would fault, since the array ends before it."""
    source = np.ones((1, 3, 1, 8), np.float32)
    order = np.array([[[-1, 2, -1, 0, -1]]], np.int32)
    out = tokens.gather(EmulatedDevice("sm_80"), source, order)
    assert out[0, :, 0, 0].tolist() == [0, 1, 0, 1, 0]


def test_gather_from_offsets_past_32_bits() -> None:
    """Rows 2^35 elements behind the source's address; those before do not exist."""
    start, stride, count = 2**17, 2**18, 5  # 2^32 accesses of 16 bytes
    far, near = ((1, n, 1, 8) for n in (start + count, count))
    dtype = np.dtype(np.float16)
    layouts = Layout(far, (0, 2 * stride, 0, 2), dtype, 0), Layout(near, (0, 16, 0, 2), dtype, 0)
    launch, record = tokens._prepare_gather(*layouts)
    rows = np.random.default_rng(0).standard_normal((count, 8)).astype(dtype)
    buffer = np.empty((count - 1) * stride + 8, dtype)
    spaced = np.lib.stride_tricks.as_strided(buffer, rows.shape, (2 * stride, 2))
    spaced[...] = rows
    device = Device("sm_80")
    held = device.to_device(spaced, name="source"), device.empty(rows.shape, rows.dtype, name="target")
    order = device.to_device(np.arange(start, start + count, dtype=np.int32), name="order")
    record["source"][0] = (held[0].pointer - 2 * start * stride) % 2**64
    record["target"][0], record["sources"] = held[1].pointer, order.pointer
    kernel = device.load(compile_ptx(launch.config, "sm_80")).kernel(launch.config.entry)
    kernel.launch(launch.grid, launch.block, (record,), shared_bytes=0)
    np.testing.assert_array_equal(held[1].to_host(), rows)


def test_many_rows_of_a_thread() -> None:
    order = np.arange(1000, dtype=np.int32)[::-1].reshape(1, 1, 1000).copy()
    device = EmulatedDevice("sm_80")
    source = np.arange(1000, dtype=np.float64).reshape(1, 1000, 1, 1)
    np.testing.assert_array_equal(tokens.gather(device, source, order), source[:, ::-1])
    assert device.launches[-1].grid[0] == -(-1000 // (128 * MOVE_ROWS))


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120"])
def test_no_kernel_spills(arch: str) -> None:
    launches = [
        *(plan_sort(np.dtype(dtype), 1) for dtype in ("bool", "uint8", "int16", "int32", "int64")),
        *(plan_ranges(size, 1, 100) for size in ELEMENTS),
        *(
            plan_move(access, 16, 1, 100, lists)
            for access in (1, 2, 4, 8, 16)
            for lists in (Lists(), Lists(8, 5), Lists(4, 48, True))
        ),
    ]
    for launch in launches:
        used = resources(launch.config, arch)
        assert used.spill_stores == used.spill_loads == used.stack == 0, (launch.config, used)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SortTokensConfig(3, False, False, 16), "SortTokensConfig.key_bytes = 3: must be one of (1, 2, 4, 8)"),
        (lambda: SortTokensConfig(8, False, True, 16), "SortTokensConfig.key_bytes = 8: must be one of (1,)"),
        (lambda: VisibleRangesConfig(4, 5), "VisibleRangesConfig.num_warps = 5: must be one of (1, 2, 4, 8)"),
        (
            lambda: MoveRowsConfig(3, 4, 4, 4, 4, 1, False),
            "MoveRowsConfig.access_bytes = 3: must be one of (1, 2, 4, 8, 16)",
        ),
        (lambda: MoveRowsConfig(2, 4, 4, 4, 4, 0, True), "MoveRowsConfig.block_size = 0: must be >= 1"),
    ],
)
def test_configurations_say_what_they_must_be(make: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        make()
    assert str(error.value) == message
