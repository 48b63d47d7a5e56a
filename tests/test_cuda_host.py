"""The host side of the CUDA device, with a stand-in for CuPy: what reaches the GPU, and what does not."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import cuflash
from cuflash.errors import DeviceError, InvalidShapeError, InvalidValueError
from cuflash.plan.params import BACKWARD_PARAMS, COMBINE_PARAMS, FORWARD_PARAMS, MERGE_PARAMS
from tests.fake_cupy import FakeCupy, fake_cupy, ndarray


@pytest.fixture
def cupy() -> Iterator[FakeCupy]:
    with fake_cupy() as module:
        yield module


def gpu(*shape: int, dtype: Any = np.float16, device_id: int = 0) -> ndarray:
    return ndarray(np.ones(shape, dtype), device_id)


def record(launch: tuple[Any, ...]) -> np.ndarray:
    data = launch[4]
    records = {params.itemsize: params for params in (FORWARD_PARAMS, BACKWARD_PARAMS, COMBINE_PARAMS, MERGE_PARAMS)}
    return np.frombuffer(data, records[len(data)])[0]


def test_a_call_is_one_launch_in_place(cupy: FakeCupy) -> None:
    q, k, v = gpu(2, 300, 8, 64), gpu(2, 300, 2, 64), gpu(2, 300, 2, 64)
    out, lse = cuflash.attention(q, k, v, causal=True, return_lse=True, options=cuflash.Options(num_splits=1))
    assert type(out) is ndarray
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == ((2, 300, 8, 64), np.float16, (2, 8, 300), np.float32)
    ((device, entry, grid, block, _, shared_bytes),) = cupy.launches
    assert (device, grid[1:], block[1:]) == (0, (1, 1), (1, 1))
    assert entry.startswith("cuflash_forward_d64_64_")
    assert shared_bytes > 0
    params = record(cupy.launches[0])
    assert [params[name] for name in ("q", "k", "v", "o", "lse")] == [x.data.ptr for x in (q, k, v, out, lse)]
    assert params["q_strides"].tolist() == [300 * 8 * 64, 8 * 64, 64]
    assert params["lse_strides"].tolist() == [8 * 300, 300, 1]
    assert (params["group"], params["right"], params["left"]) == (4, 0, 2**31 - 1)


def test_a_later_call_prepares_and_loads_nothing(cupy: FakeCupy) -> None:
    q, k, v = gpu(64, 4, 32), gpu(64, 4, 32), gpu(64, 4, 32)
    first = cuflash.attention(q, k, v)
    loads = list(cupy.loads)
    again = cuflash.attention(gpu(64, 4, 32), k, v)
    assert cupy.loads == loads
    assert first.data.ptr != again.data.ptr
    a, b = (record(launch) for launch in cupy.launches[:2])
    assert a["q"] != b["q"]
    assert a["k"] == b["k"]


def test_a_configuration_loads_once(cupy: FakeCupy) -> None:
    """Batch, strides and lengths are parameters, not constants, of a kernel."""
    for batch, length in ((1, 2048), (3, 2048), (2, 2049), (1, 2111)):
        q = gpu(batch, length, 16, 64)
        cuflash.attention(q, q, q, options=cuflash.Options(num_splits=1))
        cuflash.attention(q, q[:, ::-1], q[:, ::-1], options=cuflash.Options(num_splits=1))
    assert len(cupy.launches) == 8
    assert len(set(cupy.loads)) == len(cupy.loads)


def test_split_keys_combine_in_workspaces(cupy: FakeCupy) -> None:
    q, k = gpu(1, 4, 1, 64), gpu(1, 4096, 1, 64)
    out = cuflash.attention(q, k, k, options=cuflash.Options(num_splits=3))
    forward, combine = map(record, cupy.launches)
    assert forward["num_splits"] == combine["num_states"] == 3
    assert combine["o"] == out.data.ptr
    assert combine["lse"] == 0
    assert (combine["states"], combine["state_stride"]) == (forward["o"], 4 * 64)
    assert (combine["lses"], combine["state_lse_stride"]) == (forward["lse"], 4)
    assert combine["rows"] == 4


def gpu_tables(batch: int, room: int) -> tuple[ndarray, ndarray]:
    return ndarray(np.zeros((batch, room), np.int32)), ndarray(np.ones(batch, np.int32))


@pytest.mark.parametrize("num_splits", [1, 3])
def test_decoding_goes_in_place_and_makes_no_view(
    cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch, num_splits: int
) -> None:
    """A view costs the host as much as all it knows of an array."""
    q, out, cache, tables = gpu(3, 16, 64)[:, ::2], gpu(3, 24, 64)[:, ::3], gpu(9, 16, 2, 64), gpu_tables(3, 100)
    monkeypatch.delattr(ndarray, "__getitem__")
    options = cuflash.Options(num_splits=num_splits)
    new, lse = cuflash.paged_attention(q, cache, cache, *tables, return_lse=True, options=options)
    assert (new.shape, lse.shape) == ((3, 8, 64), (3, 8))
    for result in (new, out):
        if result is out:
            given = cuflash.paged_attention(q, cache, cache, *tables, return_lse=True, options=options, out=out)
            assert given[0] is out
            lse = given[1]
        forward, *combine = map(record, cupy.launches[-1 if num_splits == 1 else -2 :])
        last = combine[0] if combine else forward
        assert len(combine) == (num_splits > 1)
        assert [forward[name] for name in ("q", "k", "v")] == [q.data.ptr, cache.data.ptr, cache.data.ptr]
        assert [forward["block_tables"], forward["seq_lens"]] == [table.data.ptr for table in tables]
        assert [last["o"], last["lse"]] == [result.data.ptr, lse.data.ptr]
        assert forward["q_strides"].tolist() == [16 * 64, 0, 2 * 64]
        assert last["o_strides"][[0, 2]].tolist() == ([24 * 64, 3 * 64] if result is out else [8 * 64, 64])
        assert last["lse_strides"][:2].tolist() == [8, 1]
        assert (forward["batch"], forward["seqlen_q"], forward["seqlen_k"]) == (3, 1, 1600)


def test_tables_that_the_gpu_cannot_read_in_place_are_cast_there(cupy: FakeCupy) -> None:
    q, cache, (tables, lengths) = gpu(3, 8, 64), gpu(9, 16, 2, 64), gpu_tables(3, 100)
    wide, strided = ndarray(np.ones(3, np.int64)), ndarray(np.zeros((3, 200), np.int32))[:, ::2]
    for given in ((tables, wide), (strided, lengths), (tables, np.ones(3, np.int64)), (tables, lengths)):
        cuflash.paged_attention(q, cache, cache, *given, options=cuflash.Options(num_splits=1))
        params = record(cupy.launches[-1])
        assert (params["block_tables"] == tables.data.ptr) == (given[0] is tables)
        assert (params["seq_lens"] == lengths.data.ptr) == (given[1] is lengths)
    with pytest.raises(DeviceError, match=r"seq_lens is a cupy\.ndarray on a GPU: must be on the host"):
        cuflash.paged_attention(q, cache, cache, tables, ndarray(np.ones(3, np.int32), 1))


def test_the_arrays_device_is_used(cupy: FakeCupy) -> None:
    arrays = [gpu(16, 2, 32, device_id=3) for _ in range(3)]
    out = cuflash.attention(*arrays)
    assert out.device_id == 3
    assert {launch[0] for launch in cupy.launches} == {3}
    assert cupy.current == 0


def test_arrays_on_two_devices(cupy: FakeCupy) -> None:
    with pytest.raises(DeviceError, match="v is on GPU 1: must be on GPU 0, as q is"):
        cuflash.attention(gpu(16, 2, 32), gpu(16, 2, 32), gpu(16, 2, 32, device_id=1))
    assert cupy.launches == []


def test_offsets_on_the_device_are_not_read(cupy: FakeCupy) -> None:
    q = gpu(40, 2, 32)
    offsets = ndarray(np.array([0, 10, 40], np.int32))
    cuflash.attention_varlen(q, q, q, offsets, offsets, options=cuflash.Options(num_splits=1))
    params = record(cupy.launches[-1])
    assert params["cu_seqlens_q"] == params["cu_seqlens_k"] == offsets.data.ptr
    assert (params["batch"], params["seqlen_q"], params["total_q"]) == (2, 40, 40)
    wide = ndarray(np.array([0, 10, 40], np.int64))
    cuflash.attention_varlen(q, q, q, wide, [0, 10, 40], max_seqlen_q=30, max_seqlen_k=64)
    params = record(cupy.launches[-1])
    assert params["cu_seqlens_q"] != wide.data.ptr
    assert (params["seqlen_q"], params["seqlen_k"]) == (30, 64)


def test_offsets_on_the_device_need_a_bound_for_a_biased_axis(cupy: FakeCupy) -> None:
    q, offsets = gpu(40, 2, 32), ndarray(np.array([0, 10, 40], np.int32))
    with pytest.raises(InvalidValueError, match="max_seqlen_k = None: must be given, since cu_seqlens_k is on the GPU"):
        cuflash.attention_varlen(q, q, q, offsets, offsets, bias=gpu(2, 1, 40))
    with pytest.raises(InvalidShapeError, match=r"cu_seqlens_q.shape = \(1, 3\): must be \(batch \+ 1,\)"):
        cuflash.attention_varlen(q, q, q, ndarray(np.zeros((1, 3), np.int32)), offsets)
    with pytest.raises(DeviceError, match=r"cu_seqlens_k is a cupy.ndarray on a GPU: must be on the host or"):
        cuflash.attention_varlen(q, q, q, offsets, ndarray(np.zeros(3, np.int32), 1))
    host = np.ones((40, 2, 32), np.float32)
    with pytest.raises(DeviceError, match=r"cu_seqlens_q is a cupy.ndarray on a GPU"):
        cuflash.attention_varlen(host, host, host, offsets, [0, 10, 40])
    assert cupy.launches == []


class Tensor:
    """An array of a framework, on a GPU unless it is given a host array."""

    def __init__(self, array: ndarray | np.ndarray) -> None:
        self.on_gpu = array

    def __dlpack__(self, **keywords: Any) -> object:
        return self.on_gpu.__dlpack__(**keywords)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0) if isinstance(self.on_gpu, np.ndarray) else (2, 0)

    def __array_namespace__(self) -> Any:
        return FRAMEWORK


FRAMEWORK = ModuleType("framework")
FRAMEWORK.from_dlpack = Tensor


def test_tensors_of_a_framework(cupy: FakeCupy) -> None:
    q, out = Tensor(gpu(16, 2, 32)), Tensor(gpu(16, 2, 32))
    result = cuflash.attention(q, q, q)
    assert isinstance(result, Tensor)
    assert record(cupy.launches[0])["o"] == result.on_gpu.data.ptr
    assert cuflash.attention(q, q, q, out=out) is out
    assert record(cupy.launches[1])["o"] == out.on_gpu.data.ptr
    with pytest.raises(DeviceError, match="v is on the host: must be on a GPU, as q is"):
        cuflash.attention(q, q, Tensor(np.ones((16, 2, 32), np.float16)))


def test_out_that_overlaps_on_the_gpu(cupy: FakeCupy) -> None:
    """Addresses decide, without a look at the memory."""
    buffer = gpu(16, 4, 2, 32)
    q, k, v, out = (buffer[:, i] for i in range(4))
    assert cuflash.attention(q, k, v, out=out) is out
    with pytest.raises(InvalidValueError, match="out overlaps v: must not share memory with it"):
        cuflash.attention(q, k, v, out=v)
    assert len(cupy.launches) == 1


def test_nothing_to_compute_launches_nothing(cupy: FakeCupy) -> None:
    assert cuflash.attention(gpu(0, 2, 32), gpu(5, 2, 32), gpu(5, 2, 32)).shape == (0, 2, 32)
    assert cupy.launches == []


def test_merge_of_many_states_is_a_tree(cupy: FakeCupy) -> None:
    states, lses = gpu(300, 7, 2, 16), gpu(300, 2, 7, dtype=np.float32)
    out, lse = cuflash.merge_states(states, lses)
    assert (out.shape, lse.shape) == ((7, 2, 16), (2, 7))
    merges = [record(launch) for launch in cupy.launches]
    assert [int(merge["rows"]["num_states"]) for merge in merges] == [128, 128, 44, 3]
    assert merges[0]["states"][1] - merges[0]["states"][0] == 7 * 2 * 16 * 2
    assert merges[3]["states"][:3].tolist() == [merge["rows"]["o"] for merge in merges[:3]]
    assert merges[3]["rows"]["o"] == out.data.ptr
    assert len(cupy.loads) == 2  # float16 states, float32 states


def families(launches: list[tuple[Any, ...]]) -> list[str]:
    return [launch[1].removeprefix("cuflash_").partition("_d")[0] for launch in launches]


def test_a_pullback_is_three_launches_of_one_record(cupy: FakeCupy) -> None:
    q, k, v = gpu(2, 300, 8, 64), gpu(2, 400, 2, 64), gpu(2, 400, 2, 64)
    (out, lse), pullback = cuflash.vjp(cuflash.attention, q, k, v, causal=True, return_lse=True)
    forward = len(cupy.launches)
    dout, dlse = gpu(2, 300, 8, 64), gpu(2, 8, 300, dtype=np.float32)
    dq, dk, dv = pullback((dout, dlse))
    assert [(x.shape, x.dtype) for x in (dq, dk, dv)] == [(x.shape, x.dtype) for x in (q, k, v)]
    launches = cupy.launches[forward:]
    assert families(launches) == ["prepare", "backward", "finish"]
    assert len({launch[4] for launch in launches}) == 1
    params = record(launches[0])
    names = ("q", "k", "v", "o", "lse", "d_o", "d_lse", "dq", "dk", "dv")
    assert [params[name] for name in names] == [x.data.ptr for x in (q, k, v, out, lse, dout, dlse, dq, dk, dv)]
    assert params["bias"] == params["dbias"] == params["cu_seqlens_q"] == 0
    assert len({int(params[name]) for name in ("row_lse", "row_delta", "dq_sum", "turns")} - {0}) == 4
    assert params["d_lse_strides"].tolist() == [8 * 300, 300, 1]
    assert (params["group"], params["right"], params["scale"]) == (4, 0, np.float32(0.125))


def test_a_later_pullback_prepares_and_loads_nothing(cupy: FakeCupy) -> None:
    q, k = gpu(64, 4, 32), gpu(64, 4, 32)
    dout = gpu(64, 4, 32)
    cuflash.vjp(cuflash.attention, q, k, k)[1](dout)
    loads = list(cupy.loads)
    _, pullback = cuflash.vjp(cuflash.attention, gpu(64, 4, 32), k, k)
    first, second = pullback(dout), pullback(dout)
    assert cupy.loads == loads
    assert first[0].data.ptr != second[0].data.ptr


def test_lengths_and_strides_compile_no_gradient_again(cupy: FakeCupy) -> None:
    for batch, length in ((1, 2048), (3, 2049), (2, 100)):
        q = gpu(batch, length, 16, 64)
        _, pullback = cuflash.vjp(cuflash.attention, q, q[:, ::-1], q, options=cuflash.Options(num_splits=1))
        pullback(q[:, ::-1])
    assert len(set(cupy.loads)) == len(cupy.loads) == 4


def test_a_gradient_of_a_bias_is_one_more_launch(cupy: FakeCupy) -> None:
    q, bias = gpu(2, 70, 4, 64), gpu(4, 1, 70, dtype=np.float32)
    _, pullback = cuflash.vjp(cuflash.attention, q, q, q, bias=bias)
    before = len(cupy.launches)
    *_, dbias = pullback(gpu(2, 70, 4, 64))
    assert families(cupy.launches[before:]) == ["prepare", "backward", "finish", "bias_gradient"]
    params = record(cupy.launches[-1])
    assert params["dbias"] == dbias.data.ptr
    assert (dbias.shape, dbias.dtype) == (bias.shape, bias.dtype)
    assert params["dbias_shape"].tolist() == [1, 4, 1, 70]
    assert params["dbias_strides"].tolist() == params["bias_strides"].tolist() == [0, 70, 0, 1]


def test_cotangents_are_used_in_place_unless_a_kernel_cannot(cupy: FakeCupy) -> None:
    q = gpu(40, 2, 32)
    _, pullback = cuflash.vjp(cuflash.attention, q, q, q)
    for cotangent, in_place in (
        (ndarray(np.ones((2, 40, 32), np.float16).transpose(1, 0, 2)), True),
        (gpu(80, 2, 64)[::2, :, 32:], True),
        (gpu(40, 2, 33)[..., 1:], False),  # loads of two bytes
        (gpu(40, 2, 64)[..., ::2], False),
    ):
        pullback(cotangent)
        assert (record(cupy.launches[-1])["d_o"] == cotangent.data.ptr) == in_place


def test_a_pullback_of_packed_sequences_reads_no_offsets(cupy: FakeCupy) -> None:
    q = gpu(40, 2, 32)
    offsets = ndarray(np.array([0, 10, 40], np.int64))
    _, pullback = cuflash.vjp(cuflash.attention_varlen, q, q, q, offsets, [0, 10, 40])
    pullback(gpu(40, 2, 32))
    params = record(cupy.launches[-1])
    assert 0 not in (params["cu_seqlens_q"], params["cu_seqlens_k"])
    assert (params["batch"], params["total_q"]) == (2, 40)


def test_the_gradient_of_nothing_is_filled_with_zeros(cupy: FakeCupy) -> None:
    _, pullback = cuflash.vjp(cuflash.attention, gpu(0, 2, 32), gpu(5, 2, 32), gpu(5, 2, 32))
    dq, dk, dv = pullback(gpu(0, 2, 32))
    assert dq.shape == (0, 2, 32)
    assert not dk.host.any()
    assert not dv.host.any()
    assert cupy.launches == []
