"""The host side of hash-sparse and QK-sparse attention on a GPU, with a stand-in for CuPy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import cuflash
from cuflash import sparse
from cuflash.plan.params import MOVE_ROWS_PARAMS, SORT_TOKENS_PARAMS, VISIBLE_RANGES_PARAMS
from tests.fake_cupy import FakeCupy, fake_cupy, ndarray

PARAMS = {
    "sort_tokens": SORT_TOKENS_PARAMS,
    "visible_ranges": VISIBLE_RANGES_PARAMS,
    "move_rows": MOVE_ROWS_PARAMS,
}


@pytest.fixture
def cupy() -> Iterator[FakeCupy]:
    with fake_cupy() as module:
        yield module


def gpu(*shape: int, dtype: Any = np.float16) -> ndarray:
    return ndarray(np.ones(shape, dtype))


def arguments(dtype: Any) -> tuple[ndarray, ...]:
    """q, k, v and the marks of a problem of grouped heads; an array is read back nowhere, or the stand-in raises."""
    kv = (2, 300, 2)
    return gpu(2, 200, 8, 64), gpu(*kv, 64), gpu(*kv, 32), gpu(2, 200, 8, dtype=dtype), gpu(*kv, dtype=dtype)


def steps(cupy: FakeCupy) -> list[tuple[str, Any]]:
    """The launches of this room's kernels in their order, with their parameters."""
    found = []
    for _, entry, _, _, data, _ in cupy.launches:
        for name, params in PARAMS.items():
            if name in entry:
                found.append((name, np.frombuffer(data, params)[0]))
    return found


@pytest.mark.parametrize(
    ("function", "dtype"), [(sparse.hash_sparse_attention, np.int64), (sparse.qk_sparse_attention, np.bool_)]
)
def test_a_call_reads_nothing_back(cupy: FakeCupy, function: Any, dtype: Any) -> None:
    q, k, v, mark_q, mark_k = arguments(dtype)
    out, lse = function(q, k, v, mark_q, mark_k, return_lse=True)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == ((2, 200, 8, 32), np.float16, (2, 8, 200), np.float32)
    assert out.strides == np.empty(out.shape, out.dtype).strides
    found = steps(cupy)
    assert [name for name, _ in found] == ["sort_tokens"] * 2 + ["visible_ranges"] + ["move_rows"] * 5
    sort_q, sort_k, ranges, *gathers = (record for _, record in found)
    assert [sort_q["source"], sort_k["source"]] == [mark_q.data.ptr, mark_k.data.ptr]
    assert [sort_q["tokens"], sort_k["tokens"], sort_k["num_heads"]] == [200, 300, 2]
    assert (sort_q["spare_keys"] == 0) == (dtype == np.bool_)
    assert [ranges["group"], ranges["shift"], ranges["len_q"], ranges["len_k"]] == [4, 101, 200, 300]
    assert [ranges["q_order"], ranges["k_order"]] == [sort_q["order"], sort_k["order"]]
    assert [record["source"][0] for record in gathers[:3]] == [x.data.ptr for x in (q, k, v)]
    by = [sort_q["order"], sort_k["order"], sort_k["order"], sort_q["inverse"], sort_q["inverse"]]
    assert [record["sources"] for record in gathers] == by
    assert [record["target"][0] for record in gathers[3:]] == [out.data.ptr, lse.data.ptr]
    in_accesses = gathers[0]["target_strides"][:4]  # of 16 bytes; rows side by side
    assert in_accesses.tolist() == [8 * 200 * 8, 0, 8, 200 * 8]


@pytest.mark.parametrize("dtype", [np.int32, np.bool_])
def test_a_pullback_reads_nothing_back(cupy: FakeCupy, dtype: Any) -> None:
    function = sparse.qk_sparse_attention if dtype == np.bool_ else sparse.hash_sparse_attention
    arrays = arguments(dtype)
    (out, lse), pullback = cuflash.vjp(function, *arrays, return_lse=True)
    before = len(steps(cupy))
    dout, dlse = gpu(*out.shape), gpu(*lse.shape, dtype=np.float32)
    gradients = pullback((dout, dlse))
    assert [(x.shape, x.dtype) for x in gradients] == [(x.shape, x.dtype) for x in arrays[:3]]
    gathers = [record for _, record in steps(cupy)[before:]]
    assert [record["source"][0] for record in gathers[:2]] == [dout.data.ptr, dlse.data.ptr]
    assert [record["target"][0] for record in gathers[2:]] == [x.data.ptr for x in gradients]


def test_later_calls_prepare_and_load_nothing(cupy: FakeCupy) -> None:
    """Other hashes, and other arrays of the same layouts; other lengths load no kernel either."""
    options = cuflash.Options(num_splits=1)
    sparse.hash_sparse_attention(*arguments(np.int32), options=options)
    loads = list(cupy.loads)
    sparse.hash_sparse_attention(*arguments(np.int32), options=options)
    assert cupy.loads == loads
    longer = [gpu(x.shape[0], 2 * x.shape[1], *x.shape[2:], dtype=x.dtype) for x in arguments(np.int32)]
    sparse.hash_sparse_attention(*longer, options=options)
    assert len(set(cupy.loads)) == len(cupy.loads)


def test_out_is_written_in_place(cupy: FakeCupy) -> None:
    out = gpu(2, 200, 8, 40)[..., :32]
    assert sparse.hash_sparse_attention(*arguments(np.int32), out=out) is out
    assert steps(cupy)[-1][1]["target"][0] == out.data.ptr
