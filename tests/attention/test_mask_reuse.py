"""What is kept with a mask: lists by lengths, tiles and stream, arrays on a GPU; and what compiles nothing."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import cuflash
from cuflash import masks
from cuflash.errors import DeviceError
from tests.fake_cupy import FakeCupy, fake_cupy, ndarray

LISTS, FORWARD, PULLBACK = ["tile_rows"], ["forward"], ["prepare", "backward", "finish"]
IDS = np.arange(100) // 17


def make(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float16)


@pytest.fixture
def emulated() -> Iterator[Any]:
    with cuflash.emulate("sm_80") as device:
        yield device


class Kept:
    """A device, emulated or a stand-in for CuPy, whose launches are looked at call by call."""

    def __init__(self, device: Any) -> None:
        self.launches = device.launches

    def by(self, call: Callable[[], Any]) -> list[str]:
        """Families of the kernels that a call launches."""
        before = len(self.launches)
        call()
        names = (launch[1] if isinstance(launch, tuple) else launch.kernel for launch in self.launches[before:])
        return [re.match(r"cuflash_(.*?)_d?\d", name)[1] for name in names]


class TestLists:
    def test_later_calls_and_layers_make_none(self, emulated: Any) -> None:
        mask, kept = masks.SlidingWindow(20, 3), Kept(emulated)
        x, y = make(1, 70, 2, 16), make(3, 70, 4, 16)
        assert kept.by(lambda: cuflash.attention(x, x, x, mask=mask)) == LISTS + FORWARD
        assert kept.by(lambda: cuflash.attention(x, x, x, mask=mask)) == FORWARD
        assert kept.by(lambda: cuflash.attention(x * 2, x, x, mask=mask, softcap=3.0)) == FORWARD
        assert kept.by(lambda: cuflash.attention(y, y, y, mask=mask)) == FORWARD  # nor do other batches and heads

    def test_the_oldest_go_where_lengths_grow(self, emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("cuflash.tile_lists.MAX_KEPT", 2)
        mask, kept = masks.SlidingWindow(20, 3), Kept(emulated)
        for length, made in ((50, LISTS), (60, LISTS), (50, []), (70, LISTS), (60, []), (50, LISTS)):
            x = make(1, length, 2, 16)
            assert kept.by(lambda x=x: cuflash.attention(x, x, x, mask=mask)) == made + FORWARD

    def test_pullbacks_keep_theirs(self, emulated: Any) -> None:
        mask, kept, x = masks.Butterfly(16), Kept(emulated), make(1, 70, 2, 16)
        pullbacks: list[Any] = []
        for first in (True, False):
            calls = kept.by(lambda: pullbacks.append(cuflash.vjp(cuflash.attention, x, x, x, mask=mask)[1]))
            assert calls == (LISTS + FORWARD if first else FORWARD)
        assert kept.by(lambda: pullbacks[0](x)) == [*LISTS, "tile_columns", *PULLBACK]
        assert kept.by(lambda: pullbacks[0](x)) == PULLBACK
        assert kept.by(lambda: pullbacks[1](x)) == PULLBACK

    def test_other_lengths_tiles_and_masks_have_their_own(self, emulated: Any) -> None:
        kept, mask = Kept(emulated), masks.where(lambda batch, head, q, k: (q // 15 + head + batch) % 3 > k // 15)
        for shape in ((1, 70, 2, 16), (1, 71, 2, 16), (2, 70, 2, 16), (1, 70, 3, 16)):  # a mask of batch and head
            x = make(*shape)
            assert kept.by(lambda x=x: cuflash.attention(x, x, x, mask=mask)) == LISTS + FORWARD
            assert kept.by(lambda x=x: cuflash.attention(x, x, x, mask=mask)) == FORWARD
        x = make(1, 70, 2, 16)
        wide = make(1, 70, 2, 256)  # in tiles of another size
        assert kept.by(lambda: cuflash.attention(wide, wide, wide, mask=mask)) == LISTS + FORWARD
        assert kept.by(lambda: cuflash.attention(x, x, x, mask=mask, causal=True)) == LISTS + FORWARD
        assert kept.by(lambda: cuflash.attention(x, x, x, mask=mask, causal=True)) == FORWARD
        assert kept.by(lambda: cuflash.attention(x, x, x, mask=~mask)) == LISTS + FORWARD

    def test_packed_problems_make_theirs_in_every_call(self, emulated: Any) -> None:
        mask, kept, x = masks.SlidingWindow(20, 3), Kept(emulated), make(70, 2, 16)
        for ends in ([0, 20, 70], [0, 20, 70], [0, 33, 70]):
            ends = np.array(ends)
            got = kept.by(lambda ends=ends: cuflash.attention_varlen(x, x, x, ends, ends, max_seqlen_q=70,
                                                                     max_seqlen_k=70, mask=mask))  # fmt: skip
            assert got == LISTS + FORWARD

    def test_another_device_has_its_own(self) -> None:
        mask, x = masks.SlidingWindow(20, 3), make(70, 2, 16)
        for _ in range(2):
            with cuflash.emulate("sm_80") as device:
                assert Kept(device).by(lambda: cuflash.attention(x, x, x, mask=mask)) == LISTS + FORWARD

    def test_a_mask_keeps_no_device(self) -> None:
        mask, x = masks.SlidingWindow(20, 3), make(70, 2, 16)
        with cuflash.emulate("sm_80") as device:
            cuflash.attention(x, x, x, mask=mask)
            memory = weakref.ref(device._emulator._memory)
        del device
        gc.collect()
        assert memory() is None

    def test_lists_of_a_mask_go_with_it(self, emulated: Any) -> None:
        x = make(70, 2, 16)
        used = []
        for size in range(5):
            cuflash.attention(x, x, x, mask=masks.SlidingWindow(size, 0))
            emulated.prepared.clear()
            used.append(len(emulated._emulator._memory.allocations))
        assert len(set(used[1:])) == 1


class TestCompilation:
    @pytest.fixture
    def compiled(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        """Configurations that the device asks the compiler for."""
        from cuflash import jit

        asked: list[Any] = []
        compile_ptx = jit.compile_ptx
        monkeypatch.setattr(jit, "compile_ptx", lambda config, arch: asked.append(config) or compile_ptx(config, arch))
        return asked

    def differentiate(self, mask: masks.Mask, length: int = 70) -> None:
        x = make(length, 2, 16)
        cuflash.vjp(cuflash.attention, x, x, x, mask=mask, bias=np.zeros(length, np.float16))[1](x)

    def test_numbers_and_arrays_are_no_code(self, emulated: Any, compiled: list[Any]) -> None:
        self.differentiate(masks.SlidingWindow(20, 3))
        families = [*LISTS, *LISTS, "tile_columns", *FORWARD, *PULLBACK, "bias_gradient"]
        assert sorted(config.family for config in compiled) == sorted(families)
        for mask in (masks.SlidingWindow(20, 3), masks.SlidingWindow(7, 60)):
            self.differentiate(mask)
        self.differentiate(masks.SlidingWindow(20, 3), 93)
        assert len(compiled) == 8
        for ids in (IDS, IDS * 3, IDS[::-1] + 2):
            self.differentiate(masks.Documents(ids[:70]) & masks.Causal())
        assert len(compiled) == 8 + 6  # prepare and finish know no mask

    def test_functions_of_one_structure_are_one_kernel(self, emulated: Any, compiled: list[Any]) -> None:
        def near(width: int, ids: np.ndarray) -> masks.Mask:
            return masks.where(lambda batch, head, q, k: (abs(q - k) < width) & (ids[q] == ids[k]))

        for width, ids in ((5, IDS), (9, IDS), (9, IDS % 3)):
            self.differentiate(near(width, ids))
        assert len(compiled) == 8


@pytest.fixture
def cupy() -> Iterator[FakeCupy]:
    with fake_cupy() as module:
        yield module


def gpu(*shape: int, dtype: Any = np.float16, device_id: int = 0) -> ndarray:
    return ndarray(np.ones(shape, dtype), device_id)


class TestCuda:
    """With a stand-in for CuPy."""

    def test_lists_are_kept_per_stream(self, cupy: FakeCupy) -> None:
        mask, kept, x = masks.SlidingWindow(20, 3), Kept(cupy), gpu(1, 70, 2, 16)
        call = lambda: cuflash.attention(x, x, x, mask=mask)  # noqa: E731
        assert kept.by(call) == LISTS + FORWARD
        assert kept.by(call) == FORWARD
        cupy.stream.ptr = 64
        assert kept.by(call) == LISTS + FORWARD
        assert kept.by(call) == FORWARD
        cupy.stream.ptr = 0
        assert kept.by(call) == FORWARD

    def test_a_captured_call_makes_its_own(self, cupy: FakeCupy) -> None:
        """What a graph replays may come before or after anything: it needs no list that was kept, and keeps none."""
        mask, kept, x = masks.SlidingWindow(20, 3), Kept(cupy), gpu(1, 70, 2, 16)
        call = lambda: cuflash.attention(x, x, x, mask=mask)  # noqa: E731
        cupy.stream.is_capturing = lambda: True
        assert kept.by(call) == LISTS + FORWARD
        assert kept.by(call) == LISTS + FORWARD
        cupy.stream.is_capturing = lambda: False
        assert kept.by(call) == LISTS + FORWARD
        assert kept.by(call) == FORWARD
        cupy.stream.is_capturing = lambda: True
        assert kept.by(call) == LISTS + FORWARD

    def test_arrays_of_the_host_are_brought_there_once(self, cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch) -> None:
        brought: list[Any] = []
        asarray = FakeCupy.asarray
        monkeypatch.setattr(
            FakeCupy, "asarray", lambda self, array, dtype=None: brought.append(array) or asarray(self, array, dtype)
        )
        mask, x = masks.Documents(IDS[:70]), gpu(1, 70, 2, 16)
        for stream in (0, 0, 64):
            cupy.stream.ptr = stream
            cuflash.attention(x, x, x, mask=mask)
            _, pullback = cuflash.vjp(cuflash.attention, x, x, x, mask=mask)
            pullback(x)
        assert len(brought) == 1
        np.testing.assert_array_equal(brought[0], IDS[:70])

    def test_an_array_of_another_gpu(self, cupy: FakeCupy) -> None:
        ids = gpu(70, dtype=np.int32, device_id=1)
        ids.min = ids.max = lambda: 1
        x = gpu(1, 70, 2, 16)
        with pytest.raises(DeviceError, match=r"mask array 'q_ids' is a .*on a GPU: must be on the host or the device"):
            cuflash.attention(x, x, x, mask=masks.Documents(ids))
        assert cupy.launches == []
