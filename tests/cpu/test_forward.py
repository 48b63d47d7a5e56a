"""The CPU executor by itself: tiles and edges, both softmax paths, what may not be read, threads, memory."""

from __future__ import annotations

import subprocess
import sys
import warnings

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cuflash.cpu import forward as executor
from cuflash.cpu import threads
from cuflash.cpu.forward import MAX_ITEM_ROWS, MAX_ROWS, MIN_ITEM_ROWS
from cuflash.problem import Problem, default_scale
from tests import oracle
from tests.tolerances import assert_attention, lse_dtype

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]
by_dtype = pytest.mark.parametrize("dtype", DTYPES)


def attention(q, k, v, *, cu_seqlens=None, causal=False, window=None, bias=None, scale=None, softcap=None):
    """Runs the executor into poisoned results; warnings are errors."""
    left, right = window or (None, None)
    dense = cu_seqlens is None
    edges = None if dense else [np.asarray(edge, np.int64) for edge in cu_seqlens]
    batch = q.shape[0] if dense else len(edges[0]) - 1
    lengths = (q.shape[1], k.shape[1]) if dense else [int(np.diff(edge).max(initial=0)) for edge in edges]
    problem = Problem(
        batch, *lengths, q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1], q.dtype.name,
        default_scale(q.shape[-1]) if scale is None else scale, softcap or 0.0, left, 0 if causal else right,
        None if bias is None else bias.dtype.name,
        None if dense else q.shape[0], None if dense else k.shape[0],
    )  # fmt: skip
    if bias is not None:
        bias = np.broadcast_to(bias, (batch, q.shape[-2], *lengths))
    out = np.full((*q.shape[:-1], v.shape[-1]), np.nan, q.dtype)
    lse_shape = (batch, q.shape[2], q.shape[1]) if dense else (q.shape[1], q.shape[0])
    lse = np.full(lse_shape, np.nan, lse_dtype(q.dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        executor.forward(problem, q, k, v, bias, *(edges or (None, None)), out, lse)
    return out, lse


def random(rng, *shape, dtype=np.float64):
    return rng.standard_normal(shape).astype(dtype)


def qkv(rng, len_q, len_k, heads=2, kv_heads=1, dim=8, dim_v=8, dtype=np.float64, batch=1):
    shapes = (batch, len_q, heads, dim), (batch, len_k, kv_heads, dim), (batch, len_k, kv_heads, dim_v)
    return [random(rng, *shape, dtype=dtype) for shape in shapes]


@by_dtype
@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"causal": True},
        {"window": (30, None)},
        {"window": (0, 0)},
        {"window": (None, 17)},
        {"window": (600, 40)},
        {"causal": True, "softcap": 3.0, "scale": 0.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("factor", [1, 30], ids=["bounded", "online"])
def test_tile_edges(dtype, keywords, factor) -> None:
    rng = np.random.default_rng(0)
    edges = 1, MAX_ROWS, MAX_ROWS + 1, MIN_ITEM_ROWS, MIN_ITEM_ROWS + 1, MAX_ITEM_ROWS + 1
    for len_q, len_k in [(n, 170) for n in edges] + [(50, n) for n in (1, 183, 184, 185, 1100)]:
        q, k, v = qkv(rng, len_q, len_k, dim=24, dim_v=17, dtype=dtype)
        q *= dtype(factor)
        assert_attention(*attention(q, k, v, **keywords), q, k, v, **keywords)


@by_dtype
@pytest.mark.parametrize("shape", [(2, 400, 500), (1, 1, 500), (2, 400, 1)])
def test_bias_where_tiles_are_cut(dtype, shape) -> None:
    """A window on both sides leaves groups of queries out at both ends of an item."""
    rng = np.random.default_rng(10)
    q, k, v = qkv(rng, 400, 500, dim=64, dtype=dtype)
    keywords = {"window": (20, 10), "bias": random(rng, *shape, dtype=np.float32)}
    assert_attention(*attention(q, k, v, **keywords), q, k, v, **keywords)


@given(
    st.tuples(*[st.integers(0, 70)] * 2),
    st.sampled_from([(1, 1), (4, 2), (6, 1), (3, 3)]),
    st.tuples(*[st.integers(1, 70)] * 2),
    st.tuples(*[st.none() | st.integers(0, 80)] * 2),
    st.none() | st.sampled_from([(1, 1), (1, 0), (0, 1), (0, 0)]),
    st.integers(1, 20),
)
def test_shapes(lengths, heads, dims, window, bias_axes, factor) -> None:
    rng = np.random.default_rng(sum(lengths) + sum(dims))
    q, k, v = qkv(rng, *lengths, *heads, *dims, dtype=np.float32, batch=2)
    keywords = {"window": window}
    if bias_axes is not None:
        shape = [n if axis else 1 for n, axis in zip(lengths, bias_axes, strict=True)]
        keywords["bias"] = random(rng, heads[0], *shape, dtype=np.float32)
    q *= np.float32(factor)
    assert_attention(*attention(q, k, v, **keywords), q, k, v, **keywords)


@given(st.permutations(range(4)), st.permutations(range(4)), st.tuples(*[st.sampled_from([-2, -1, 1, 3])] * 4))
def test_strides(order_q, order_k, steps) -> None:
    """Any order of the axes in memory, gaps and negative strides."""
    rng = np.random.default_rng(0)

    def strided(array, order):
        gapped = tuple(slice(None, None, step) for step in steps)
        shape = [n * abs(step) for n, step in zip(array.shape, steps, strict=True)]
        memory = np.full([shape[axis] for axis in order], np.nan, array.dtype)
        view = memory.transpose(np.argsort(order))[gapped]
        view[...] = array
        return view

    q, k, v = qkv(rng, 20, 30, 4, 2, dtype=np.float32, batch=2)
    out, lse = attention(strided(q, order_q), strided(k, order_k), strided(v, order_q), causal=True)
    assert_attention(out, lse, q, k, v, causal=True)


@by_dtype
def test_packed_sequences(dtype) -> None:
    rng = np.random.default_rng(1)
    shapes = (300, 4, 8), (400, 2, 8), (400, 2, 5)
    q, k, v = (random(rng, *shape, dtype=dtype) for shape in shapes)
    k[390:], v[390:] = np.nan, np.nan  # after the last sequence
    cu_seqlens = [0, 0, 100, 101, 290, 290], [0, 7, 7, 200, 390, 390]
    bias = random(rng, 5, 1, 189, 193, dtype=dtype)
    out, lse = attention(q, k, v, cu_seqlens=cu_seqlens, causal=True)
    assert_attention(out, lse, q, k, v, cu_seqlens=cu_seqlens, causal=True)
    assert not out[290:].any()
    assert np.isneginf(lse[:, 290:]).all()
    out, lse = attention(q, k, v, cu_seqlens=cu_seqlens, bias=bias)
    for b, (q_begin, q_end, k_begin, k_end) in enumerate(
        zip(cu_seqlens[0], cu_seqlens[0][1:], cu_seqlens[1], cu_seqlens[1][1:], strict=False)
    ):
        rows, keys = slice(q_begin, q_end), slice(k_begin, k_end)
        own = bias[b, :, : q_end - q_begin, : k_end - k_begin]
        assert_attention(out[rows], lse[:, rows], q[rows], k[keys], v[keys], bias=own)


@by_dtype
@pytest.mark.parametrize("window", [(0, None), (7, 3)])
def test_unseen_keys_may_be_nan(dtype, window) -> None:
    """20 queries of a window in 50 keys leave the first ones unseen: among those of a tile that is visited, too."""
    rng = np.random.default_rng(2)
    for spoilt in (np.nan, np.inf, -np.inf):
        q, k, v = qkv(rng, 20, 50, dtype=dtype)
        first = 50 - 20 - window[0]
        k[:, :first], v[:, :first] = spoilt, spoilt
        out, lse = attention(q, k, v, window=window)
        assert_attention(out, lse, q, k[:, first:], v[:, first:], window=window)


@by_dtype
@pytest.mark.parametrize("spoilt", ["k", "v"])
def test_nan_reaches_only_the_rows_that_see_it(dtype, spoilt) -> None:
    rng = np.random.default_rng(3)
    arrays = dict(zip("qkv", qkv(rng, 300, 300, dtype=dtype), strict=True))
    arrays[spoilt][:, 100] = np.nan
    out, lse = attention(**arrays, causal=True)
    assert_attention(out[:, :100], lse[:, :, :100], *(x[:, :100] for x in arrays.values()), causal=True)
    assert np.isnan(out[:, 100:].astype(np.float64)).all()
    np.testing.assert_array_equal(np.isnan(lse[:, :, 100:]), spoilt == "k")


def test_infinite_values_are_averaged() -> None:
    rng = np.random.default_rng(4)
    q, k, v = qkv(rng, 5, 6, heads=1, dtype=np.float32)
    v[0, 2, 0, 3] = np.inf
    out, _ = attention(q, k, v)
    assert np.isposinf(out[..., 3]).all()
    assert np.isfinite(np.delete(out, 3, axis=-1)).all()


@by_dtype
@pytest.mark.parametrize("magnitude", [1e4, -1e4])
def test_extreme_scores(dtype, magnitude) -> None:
    rng = np.random.default_rng(5)
    q, k, v = qkv(rng, 70, 200, dim=4, dtype=dtype)
    bias = random(rng, 70, 200, dtype=np.float64) * 10 + magnitude
    bias[3], bias[:, 5] = -np.inf, -np.inf
    out, lse = attention(q, k, v, bias=bias)
    assert_attention(out, lse, q, k, v, bias=bias)
    assert not out[:, 3].any()
    assert np.isneginf(lse[..., 3]).all()
    q[..., 0], k[..., 0] = 100, np.sign(magnitude) * 100
    assert_attention(*attention(q, k, v, scale=1.0), q, k, v, scale=1.0)


@pytest.mark.parametrize("magnitude", [1e-30, 1e11, 1e13, 1e30])
@pytest.mark.parametrize("sign", [1, -1])
def test_values_of_any_magnitude(magnitude, sign) -> None:
    """Scores near the bound up to which no maximum is subtracted, times values that are large or small."""
    rng = np.random.default_rng(6)
    q, k, v = qkv(rng, 60, 200, dim=1, dtype=np.float32)
    q, k = 0 * q + np.float32(5.5), sign * (np.abs(0.05 * k) + np.float32(5.5))
    out, lse = attention(q, k, v * np.float32(magnitude), scale=1.0)
    want = oracle.attention(q, k, v, scale=1.0)
    np.testing.assert_allclose(out / magnitude, want.out, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(lse, want.lse, rtol=1e-6)


def test_both_exponentials_agree(monkeypatch) -> None:
    rng = np.random.default_rng(7)
    q, k, v = qkv(rng, 100, 400, dtype=np.float32)
    for fast in (True, False):
        monkeypatch.setattr(executor, "exp2_is_fast", lambda fast=fast: fast)
        for keywords in ({}, {"softcap": 2.0}):
            assert_attention(*attention(q, k, v, causal=True, **keywords), q, k, v, causal=True, **keywords)


@by_dtype
def test_results_do_not_depend_on_the_number_of_threads(dtype, monkeypatch) -> None:
    rng = np.random.default_rng(8)
    q, k, v = qkv(rng, 700, 600, 4, 2, dtype=dtype, batch=2)
    results = []
    for count in ("1", "2", "7"):
        monkeypatch.setenv("OMP_NUM_THREADS", count)
        results.append(attention(q, k, v, causal=True))
    for out, lse in results[1:]:
        np.testing.assert_array_equal(out, results[0][0])
        np.testing.assert_array_equal(lse, results[0][1])


def test_tails_without_lse() -> None:
    rng = np.random.default_rng(9)
    q = random(rng, 10, 1, 4)
    out = np.full_like(q, np.nan)
    edges = np.array([2, 6], np.int64)
    problem = Problem(1, 4, 4, 1, 1, 4, 4, "float64", 0.5, total_q=10, total_k=10)
    executor.forward(problem, q, q, q, None, edges, edges, out, None)
    np.testing.assert_allclose(out[2:6], oracle.attention(q[2:6], q[2:6], q[2:6]).out)
    assert not out[:2].any()
    assert not out[6:].any()


def test_number_of_threads(monkeypatch) -> None:
    for value, want in (("3", 3), ("5,2", 5), (" 2 ", 2)):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        assert threads.num_threads() == want
    monkeypatch.delenv("OMP_NUM_THREADS")
    cores = threads.num_threads()
    assert cores >= 1
    for value in ("0", "-1", "many", ""):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        assert threads.num_threads() == cores


@pytest.mark.parametrize("count", [1, 3])
def test_the_first_error_stops_the_rest(count) -> None:
    done = []

    def fail() -> None:
        raise KeyError("planted")

    def items():
        yield fail
        for i in range(1000):
            yield lambda i=i: done.append(i)

    with pytest.raises(KeyError, match="planted"):
        threads.run_all(items(), count)
    assert len(done) < 1000


MEMORY = """
import resource
import numpy as np
from cuflash.cpu.forward import forward
from cuflash.problem import Problem

length, heads, dim = 32768, 4, 64
rng = np.random.default_rng(0)
q = rng.standard_normal((1, 64, heads, dim), dtype=np.float32)
k, v = (rng.standard_normal((1, length, heads, dim), dtype=np.float32) for _ in range(2))
q = np.ascontiguousarray(np.broadcast_to(q, (length // 64, 64, heads, dim))).reshape(1, length, heads, dim)
out, lse = np.zeros_like(q), np.zeros((1, heads, length), np.float32)
np.matmul(q[0, :64, 0], k[0, :64, 0].T)  # BLAS takes its own buffers when it is first used
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
problem = Problem(1, length, length, heads, heads, dim, dim, "float32", 0.125, left=1024, right=0)
forward(problem, q, k, v, None, None, None, out, lse)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_memory_is_linear() -> None:
    """Beyond inputs and outputs under 64 MB at 32768 tokens, 4 heads of 64 and 2 threads."""
    command = [sys.executable, "-c", MEMORY]
    environment = {"OMP_NUM_THREADS": "2", "PYTHONPATH": ":".join(sys.path)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert float(result.stdout) < 64
