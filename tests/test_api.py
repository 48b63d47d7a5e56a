"""The public functions as functions: signatures, shapes, `out`, merging, and what `emulate` does around them."""

from __future__ import annotations

import inspect
import threading
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cuflash
from cuflash.emulator import EmulatorFault
from cuflash.plan.config import MAX_SPLITS
from tests.tolerances import assert_attention

KEYWORDS = {
    "causal": False, "window": None, "mask": None, "bias": None, "scale": None, "softcap": None, "return_lse": False,
    "out": None, "options": None,
}


def random(*shape: int, dtype: Any = np.float16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def qkv(batch: int = 2, seqlen_q: int = 7, seqlen_k: int = 9, heads: int = 2, dim: int = 16, dtype: Any = np.float16):
    lengths = (seqlen_q, seqlen_k, seqlen_k)
    return tuple(random(batch, n, heads, dim, dtype=dtype, seed=i) for i, n in enumerate(lengths))


class TestSignatures:
    @pytest.mark.parametrize(
        ("function", "arrays", "more"),
        [
            (cuflash.attention, ["q", "k", "v"], {}),
            (
                cuflash.attention_varlen, ["q", "k", "v", "cu_seqlens_q", "cu_seqlens_k"],
                {"max_seqlen_q": None, "max_seqlen_k": None},
            ),
            (
                cuflash.paged_attention, ["q", "k_cache", "v_cache", "block_tables", "seq_lens"],
                {"cu_seqlens_q": None, "max_seqlen_q": None, "causal": True},
            ),
        ],
    )
    def test_attention(self, function: Any, arrays: list[str], more: dict[str, None]) -> None:
        parameters = inspect.signature(function).parameters
        positional = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert positional == arrays
        keywords = {name: p.default for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
        assert keywords == {**KEYWORDS, **more}

    def test_merge_states(self) -> None:
        assert list(inspect.signature(cuflash.merge_states).parameters) == ["outs", "lses"]

    def test_an_unknown_keyword_is_an_error(self) -> None:
        with pytest.raises(TypeError, match="dropout"):
            cuflash.attention(*qkv(), dropout=0.1)


class TestResults:
    def test_ranks(self, device, dtype) -> None:
        """The result has q's rank, the lse one axis less, and the same bits whatever the rank."""
        q, k, v = qkv(batch=1, heads=1, dtype=np.dtype(dtype))
        full, full_lse = device.run(cuflash.attention, q, k, v, return_lse=True)
        assert (full.dtype, full_lse.dtype) == (q.dtype, np.float64 if dtype == "float64" else np.float32)
        for index in ((0,), (0, slice(None), 0)):
            out, lse = device.run(cuflash.attention, *(x[index] for x in (q, k, v)), return_lse=True)
            np.testing.assert_array_equal(out, full[index])
            np.testing.assert_array_equal(lse, full_lse[(0,) * len(index[::2])])

    def test_lse_is_returned_only_if_asked_for(self, device) -> None:
        out = device.run(cuflash.attention, *qkv())
        assert isinstance(out, np.ndarray)
        pair = device.run(cuflash.attention, *qkv(), return_lse=True)
        assert isinstance(pair, tuple)
        np.testing.assert_array_equal(pair[0], out)

    @pytest.mark.parametrize("axes", [(0, 7, 9, 2), (2, 0, 9, 2), (2, 7, 9, 0), (2, 0, 0, 2)])
    def test_nothing_to_compute(self, device, axes: tuple[int, int, int, int]) -> None:
        batch, seqlen_q, _, heads = axes
        out, lse = device.run(cuflash.attention, *qkv(*axes), return_lse=True)
        assert out.shape == (batch, seqlen_q, heads, 16)
        assert lse.shape == (batch, heads, seqlen_q)

    def test_no_keys(self, device) -> None:
        out, lse = device.run(cuflash.attention, *qkv(seqlen_k=0), return_lse=True)
        assert (out == 0).all()
        assert np.isneginf(lse).all()

    def test_a_window_of_numpy_integers_and_a_scale_of_numpy(self, device) -> None:
        q, k, v = qkv()
        got = device.run(cuflash.attention, q, k, v, window=[np.int64(2), np.uint8(1)], scale=np.float32(0.25))
        np.testing.assert_array_equal(got, device.run(cuflash.attention, q, k, v, window=(2, 1), scale=0.25))


class TestOut:
    def test_strided_out(self, device) -> None:
        """A slice of a packed buffer is written where it is, and nothing beside it."""
        q, k, v = qkv()
        buffer = np.full((2, 7, 3, 2, 24), 5, np.float16)
        out = buffer[:, ::-1, 1, :, 4:20]
        assert device.run(cuflash.attention, q, k, v, out=out) is out
        np.testing.assert_array_equal(out, device.run(cuflash.attention, q, k, v))
        out[...] = 5
        assert (buffer == 5).all()

    def test_varlen_out(self, device) -> None:
        q, k, v = (x.reshape(-1, 2, 16) for x in qkv(seqlen_q=9))
        out = np.full((18, 2, 2, 16), 5, np.float16)[:, 1]
        returned, lse = device.run(
            cuflash.attention_varlen, q, k, v, [0, 4, 11], [0, 9, 18], out=out, return_lse=True, causal=True
        )
        assert returned is out
        assert (out[11:] == 0).all()
        assert np.isneginf(lse[:, 11:]).all()
        alone = device.run(cuflash.attention, q[4:11], k[9:18], v[9:18], causal=True)
        np.testing.assert_allclose(out[4:11].astype(float), alone.astype(float), atol=2e-3)


class TestVarlen:
    def test_bias_of_every_extent(self, device) -> None:
        """Its sequence axes are 1 or long enough; sequence b uses the beginning of bias[b]."""
        q, k, v = (x.reshape(-1, 2, 16) for x in qkv(seqlen_q=9))
        cu_q, cu_k = [0, 3, 18], [0, 10, 18]
        for shape in ((2, 1, 15, 10), (2, 2, 20, 12), (10,), (15, 1), (2, 1, 1, 1)):
            bias = random(*shape, dtype=np.float32)
            got = device.run(cuflash.attention_varlen, q, k, v, cu_q, cu_k, bias=bias)
            every = bias.reshape((1,) * (4 - bias.ndim) + shape)
            every = np.broadcast_to(every, (2, 2, *every.shape[2:]))
            for b in range(2):
                rows, keys = slice(*cu_q[b : b + 2]), slice(*cu_k[b : b + 2])
                own = every[b, :, : rows.stop - rows.start, : keys.stop - keys.start]
                assert_attention(got[rows], None, q[rows], k[keys], v[keys], bias=own)

    def test_offsets_of_every_host_kind(self, device) -> None:
        q, k, v = (x.reshape(-1, 2, 16) for x in qkv(seqlen_q=9))
        want = device.run(cuflash.attention_varlen, q, k, v, [0, 5, 18], [0, 5, 18])
        offsets = np.array([0, 5, 18])
        for other in ((0, 5, 18), offsets, offsets.astype(np.uint8), np.repeat(offsets, 2).astype(np.int32)[::2]):
            got = device.run(cuflash.attention_varlen, q, k, v, other, other, max_seqlen_q=18)
            np.testing.assert_allclose(got.astype(float), want.astype(float), atol=2e-3)
        want, got = (device.run(cuflash.attention_varlen, q, k, v, x, x) for x in ([0, 9, 18], range(0, 19, 9)))
        np.testing.assert_array_equal(got, want)

    def test_no_sequence(self, device) -> None:
        q, k, v = (x.reshape(-1, 2, 16) for x in qkv(seqlen_q=9))
        out, lse = device.run(cuflash.attention_varlen, q, k, v, [0], [0], return_lse=True)
        assert (out == 0).all()
        assert np.isneginf(lse).all()


class TestMergeStates:
    @pytest.mark.parametrize("rank", [2, 3, 4])
    def test_parts_make_the_whole(self, device, dtype, rank: int) -> None:
        index: Any = {4: (), 3: (0,), 2: (0, slice(None), 0)}[rank]
        q, k, v = (x[index] for x in qkv(seqlen_k=31, dtype=np.dtype(dtype)))
        axis = 1 if rank == 4 else 0
        edges = [0, 1, 1, 8, 31]
        parts = [
            device.run(cuflash.attention, q, *(np.take(x, range(a, b), axis) for x in (k, v)), return_lse=True)
            for a, b in pairwise(edges)
        ]
        outs, lses = zip(*parts, strict=True)
        out, lse = device.run(cuflash.merge_states, outs, lses)
        assert (out.dtype, out.shape, lse.dtype) == (q.dtype, q.shape, lses[0].dtype)
        whole, whole_lse = device.run(cuflash.attention, q, k, v, return_lse=True)
        eps = float(ml_dtypes.finfo(q.dtype).eps)
        np.testing.assert_allclose(out.astype(float), whole.astype(float), atol=4 * eps)
        np.testing.assert_allclose(lse, whole_lse, rtol=1e-6, atol=1e-6)

    def test_stacked_states_and_any_strides(self, device) -> None:
        outs, lses = random(3, 7, 2, 16), random(3, 2, 7, dtype=np.float32)
        want = device.run(cuflash.merge_states, list(outs), list(lses))
        heads_first = outs.transpose(0, 2, 1, 3).copy().transpose(0, 2, 1, 3)
        mixed = [outs[0], np.asfortranarray(outs[1]), outs[2][::-1].copy()[::-1]]
        for states, their_lses in ((outs, lses), (heads_first, lses), (mixed, list(lses))):
            got = device.run(cuflash.merge_states, states, their_lses)
            for array, expected in zip(got, want, strict=True):
                np.testing.assert_array_equal(array, expected)

    def test_extremes(self, device) -> None:
        """A state of -inf adds nothing even if it holds NaN; all -inf give 0 and -inf; no lse overflows."""
        outs = np.full((3, 4, 1, 8), np.nan, np.float32)
        outs[0, 1:], outs[1, 2:], outs[2, 3:] = 1, 2, 3
        lses = np.full((3, 1, 4), -np.inf, np.float32)
        lses[0, :, 1:], lses[1, :, 2:], lses[2, :, 3:] = 1e4, 1e4, -1e4
        out, lse = device.run(cuflash.merge_states, outs, lses)
        np.testing.assert_allclose(out[:, 0, 0], [0, 1, 1.5, 1.5])
        np.testing.assert_allclose(lse[0], [-np.inf, 1e4, 1e4 + np.log(2), 1e4 + np.log(2)])

    def test_more_states_than_one_launch_takes(self, device) -> None:
        count = 2 * MAX_SPLITS + 3
        outs, lses = random(count, 5, 1, 8), random(count, 1, 5, dtype=np.float32)
        out, lse = device.run(cuflash.merge_states, outs, lses)
        weights = np.exp(lses.astype(float) - np.logaddexp.reduce(lses.astype(float)))
        np.testing.assert_allclose(lse, np.logaddexp.reduce(lses.astype(float)), rtol=1e-6)
        np.testing.assert_allclose(out[:, 0], np.einsum("nbs,nsbd->sd", weights, outs.astype(float)), atol=1e-3)


class TestEmulate:
    def test_reports(self) -> None:
        q, k, v = qkv()
        with cuflash.emulate("sm_80") as device:
            assert device.launches == []
            cuflash.attention(q, k, v)
            cuflash.attention(q, k, v, options=cuflash.Options(num_splits=2))
        assert len(device.launches) == 3
        first = device.launches[0]
        assert first.read_by_array["q"] == q.nbytes
        assert first.written_by_array["o"] == q.nbytes
        assert first.kernel.startswith("cuflash_forward_d16_16_")

    def test_blocks_nest_and_end(self) -> None:
        q, k, v = qkv()
        with cuflash.emulate("sm_80") as outer:
            with cuflash.emulate("sm_90", warp_order=3, copies="early", check_races=False, sm_count=2) as inner:
                cuflash.attention(q, k, v)
            assert (inner.arch.name, inner.sm_count, outer.arch.name) == ("sm_90", 2, "sm_80")
            cuflash.attention(q, k, v)
        with pytest.raises(KeyError), cuflash.emulate("sm_80"):
            raise KeyError
        cuflash.attention(*qkv(dtype=np.float32))
        assert (len(inner.launches), len(outer.launches)) == (1, 1)

    def test_other_threads_stay_on_the_cpu(self) -> None:
        q, k, v = qkv()
        results: list[np.ndarray] = []
        with cuflash.emulate("sm_80") as device:
            thread = threading.Thread(target=lambda: results.append(cuflash.attention(q, k, v)))
            thread.start()
            thread.join()
        assert results[0].shape == q.shape
        assert device.launches == []

    def test_threads_with_a_device_each(self) -> None:
        q, k, v = qkv()
        counts: list[int] = []

        def run() -> None:
            with cuflash.emulate("sm_80") as device:
                for _ in range(3):
                    cuflash.attention(q, k, v)
                counts.append(len(device.launches))

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert counts == [3, 3, 3, 3]

    def test_a_call_is_prepared_once(self) -> None:
        q, k, v = qkv()
        with cuflash.emulate("sm_80") as device:
            for _ in range(2):
                cuflash.attention(q, k, v, causal=True)
            cuflash.attention(q, k, v, causal=True, return_lse=True)
            assert len(device.prepared) == 1
            cuflash.attention(q, k, v)
            assert len(device.prepared) == 2

    def test_memory_is_given_back(self) -> None:
        with cuflash.emulate("sm_80") as device:
            for _ in range(3):
                cuflash.attention(*qkv(), options=cuflash.Options(num_splits=2))
            assert not device._emulator._memory.allocations

    def test_a_fault_leaves_out_as_it_was(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from cuflash.emulator import Kernel

        def launch(*_: object, **__: object) -> None:
            raise EmulatorFault("broken kernel")

        monkeypatch.setattr(Kernel, "launch", launch)
        out = np.full((2, 7, 2, 16), 5, np.float16)
        with cuflash.emulate("sm_80") as device, pytest.raises(EmulatorFault, match="broken kernel"):
            cuflash.attention(*qkv(), out=out)
        assert (out == 5).all()
        assert not device._emulator._memory.allocations
