"""What must be equal whatever the numbers are: permutations, parts and the whole, packing, repetition, threads."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise
from unittest import mock

import numpy as np
import pytest

import cuflash
from cuflash.cpu import backward as executor
from cuflash.cpu import threads
from cuflash.cpu.tiles import MAX_MATVEC, MAX_PRODUCT
from tests.attention.cases import Case, make
from tests.gradients.cases import cotangent, scores_of, vjp

CASE = Case(dtype="float32", batch=3, num_heads=4, num_kv_heads=2, seqlen_q=70, seqlen_k=130)
MASKS = pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window": (50, 20)}], ids=str)


def attention_vjp(case, q, k, v, bias=None, **keywords):
    return cuflash.vjp(cuflash.attention, q, k, v, bias=bias, return_lse=True, **scores_of(case), **keywords)


def assert_equal(got, want) -> None:
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


def assert_close(got, want, atol=2e-5) -> None:
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=atol)


@MASKS
def test_a_permuted_batch_gives_permuted_gradients(mask) -> None:
    case, order = CASE.but(**mask), [2, 0, 1]
    q, k, v, *_ = inputs = make(case)
    dout, dlse = cotangent(case, inputs)
    whole = vjp(case, inputs)[1]((dout, dlse))
    permuted = attention_vjp(case, q[order], k[order], v[order])[1]((dout[order], dlse[order]))
    assert_equal(permuted, [x[order] for x in whole])


@MASKS
def test_permuted_heads_give_permuted_gradients(mask) -> None:
    case, order, kv_order = CASE.but(**mask), [2, 3, 0, 1], [1, 0]
    q, k, v, *_ = inputs = make(case)
    dout, dlse = cotangent(case, inputs)
    dq, dk, dv = vjp(case, inputs)[1]((dout, dlse))
    permuted = attention_vjp(case, q[:, :, order], k[:, :, kv_order], v[:, :, kv_order])[1](
        (dout[:, :, order], dlse[:, order])
    )
    assert_equal(permuted, (dq[:, :, order], dk[:, :, kv_order], dv[:, :, kv_order]))


@MASKS
def test_parts_of_a_batch(mask) -> None:
    """Gradients of the arrays are those of the parts; that of a bias that the parts share is their sum."""
    case = CASE.but(bias="hqk", **mask)
    q, k, v, bias, *_ = inputs = make(case)
    dout, dlse = cotangent(case, inputs)
    dq, dk, dv, dbias = vjp(case, inputs)[1]((dout, dlse))
    total = np.zeros_like(dbias)
    for part in slice(0, 1), slice(1, 3):
        *gradients, more = attention_vjp(case, q[part], k[part], v[part], bias)[1]((dout[part], dlse[part]))
        assert_close(gradients, (dq[part], dk[part], dv[part]))
        total += more
    np.testing.assert_allclose(total, dbias, atol=2e-5)


@MASKS
def test_grouped_heads_sum_the_gradients_of_repeated_ones(mask) -> None:
    case = CASE.but(**mask)
    q, k, v, *_ = inputs = make(case)
    given = cotangent(case, inputs)
    dq, dk, dv = vjp(case, inputs)[1](given)
    repeated = attention_vjp(case, q, k.repeat(2, axis=2), v.repeat(2, axis=2))[1](given)
    np.testing.assert_allclose(repeated[0], dq, atol=2e-5)
    assert_close([x.reshape(3, 130, 2, 2, 64).sum(3) for x in repeated[1:]], (dk, dv))


@pytest.mark.parametrize("causal", [False, True])
def test_padding_turned_into_varlen(causal) -> None:
    """A padded batch whose padding a bias of -inf hides, and the same sequences packed."""
    lengths = [70, 1, 33]
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal((3, 70, 2, 16), dtype=np.float32) for _ in range(4))
    kept = np.arange(70) < np.array(lengths)[:, None]
    bias = np.where(kept, 0, -np.inf).astype(np.float32)[:, None, None, :]
    edges = np.cumsum([0, *lengths])
    padded_dout = dout * kept[:, :, None, None]
    padded = cuflash.vjp(cuflash.attention, q, k, v, bias=bias, causal=causal)[1](padded_dout)[:3]
    packed = cuflash.vjp(cuflash.attention_varlen, *(x[kept] for x in (q, k, v)), edges, edges, causal=causal)
    assert_close(packed[1](dout[kept]), [x[kept] for x in padded])
    for gradient in padded:
        assert not gradient[~kept].any()


@pytest.mark.parametrize("edges", [(0, 130), (0, 65, 130), (0, 1, 130), (0, 40, 40, 130)], ids=str)
def test_merged_parts_of_the_keys_have_the_gradients_of_the_whole(edges) -> None:
    """Through merge_states and attention: the gradients of its outs and lses are the cotangents of the parts."""
    q, k, v, *_ = inputs = make(CASE)
    given = cotangent(CASE, inputs)
    whole = vjp(CASE, inputs)[1](given)
    states, pullbacks = zip(
        *(attention_vjp(CASE, q, k[:, slice(*ends)], v[:, slice(*ends)]) for ends in pairwise(edges)), strict=True
    )
    _, merge_pullback = cuflash.vjp(cuflash.merge_states, *zip(*states, strict=True))
    cotangents = zip(*merge_pullback(given), strict=True)
    parts = [pullback(part) for pullback, part in zip(pullbacks, cotangents, strict=True)]
    dq = sum(part[0] for part in parts)
    dk, dv = (np.concatenate([part[i] for part in parts], axis=1) for i in (1, 2))
    assert_close((dq, dk, dv), whole)


def test_the_result_is_that_of_the_function() -> None:
    q, k, v, *_ = make(CASE)
    out, lse = cuflash.attention(q, k, v, causal=True, return_lse=True)
    result, _ = cuflash.vjp(cuflash.attention, q, k, v, causal=True)
    np.testing.assert_array_equal(result, out)
    result, _ = cuflash.vjp(cuflash.attention, q, k, v, causal=True, return_lse=True)
    assert_equal(result, (out, lse))
    np.testing.assert_array_equal(cuflash.vjp(cuflash.reference.standard_attention, q, k, v)[0],
                                  cuflash.reference.standard_attention(q, k, v))  # fmt: skip


def test_a_cotangent_of_lse_alone_and_of_out_alone_add_up() -> None:
    inputs = make(CASE.but(causal=True))
    dout, dlse = cotangent(CASE, inputs)
    pullback = vjp(CASE, inputs)[1]
    of_out, of_lse = pullback((dout, dlse * 0)), pullback((dout * 0, dlse))
    assert_close([a + b for a, b in zip(of_out, of_lse, strict=True)], pullback((dout, dlse)))
    assert_equal(cuflash.vjp(cuflash.attention, *inputs[:3])[1](dout), of_out)


@pytest.mark.parametrize("bias", ["", "qk", "bhqk", "k"])
def test_repeated_calls_give_the_same_bits_and_change_nothing(bias) -> None:
    inputs = make(CASE.but(bias=bias, causal=True))
    given = cotangent(CASE, inputs)
    arrays = [x for x in (*inputs, *given) if x is not None]
    before = [x.copy() for x in arrays]
    pullback = vjp(CASE.but(bias=bias, causal=True), inputs)[1]
    first, second = pullback(given), pullback(given)
    assert_equal(first, second)
    assert not any(np.shares_memory(a, b) for a, b in zip(first, second, strict=True))
    assert_equal(arrays, before)


@pytest.mark.parametrize("bias", ["", "qk", "k", ".hq."])
def test_the_number_of_threads_changes_no_bit(bias, monkeypatch) -> None:
    case = CASE.but(bias=bias, seqlen_q=600, seqlen_k=300, causal=True)
    inputs = make(case)
    given = cotangent(case, inputs)
    results = []
    for number in (1, 2, 5):
        monkeypatch.setenv("OMP_NUM_THREADS", str(number))
        assert threads.num_threads() == number
        results.append(vjp(case, inputs)[1](given))
    for result in results[1:]:
        assert_equal(result, results[0])


@pytest.mark.parametrize("bias", ["", "qk", "k"])
def test_the_order_in_which_items_end_changes_no_bit(bias) -> None:
    """Items run backwards: each part of a sum comes before those that are to be added first."""
    case = CASE.but(bias=bias, batch=2, seqlen_q=600, causal=True)
    inputs = make(case)
    given = cotangent(case, inputs)
    want = vjp(case, inputs)[1](given)

    def backwards(items, number) -> None:
        threads.run_all(iter(list(items)[::-1]), 1)

    with mock.patch.object(executor, "run_all", backwards):
        assert_equal(vjp(case, inputs)[1](given), want)


def test_an_error_in_an_item_is_raised() -> None:
    case = CASE.but(seqlen_q=600)
    inputs = make(case)
    pullback = vjp(case, inputs)[1]
    with mock.patch.object(executor, "hide", side_effect=MemoryError("no")), pytest.raises(MemoryError, match="no"):
        pullback(cotangent(case, inputs))


def peak(seqlen: int, **keywords) -> int:
    """Bytes that a pullback allocates at its peak, results included."""
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal((seqlen, 1, 16), dtype=np.float32) for _ in range(4))
    _, pullback = cuflash.vjp(cuflash.attention, q, k, v, causal=True, **keywords)
    tracemalloc.start()
    pullback(dout)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most


def test_memory_is_linear_in_the_length() -> None:
    peaks = [peak(seqlen) for seqlen in (2048, 8192)]
    assert peaks[1] < 4.5 * peaks[0]
    assert peaks[1] < 8192 * 8192 * 4 / 20


def test_memory_of_a_bias_gradient_is_that_of_the_bias() -> None:
    assert peak(4096, bias=np.zeros(4096, np.float32)) < 1.2 * peak(4096)
    scores = 2048 * 2048 * 4
    assert peak(2048, bias=np.zeros((1, 2048, 2048), np.float32)) < 1.2 * scores + peak(2048)


@pytest.mark.parametrize("dims", [(1, 1), (8, 40), (64, 64), (65, 128), (256, 256), (512, 1)], ids=str)
@pytest.mark.parametrize("lengths", [(300, 400), (70, 130), (33, 700)], ids=str)
def test_products_stay_on_their_thread(dims, lengths) -> None:
    """None is so large that OpenBLAS would start threads of its own: see `cuflash.cpu.tiles`."""
    sizes, vectors = [], []
    matmul = np.matmul

    def measured(a, b, out):
        m, k, n = *a.shape[-2:], b.shape[-1]
        (vectors if 1 in (m, n) else sizes).append(m * k * n)
        return matmul(a, b, out=out)

    case = Case(dtype="float32", batch=1, head_dim=dims[0], head_dim_v=dims[1], softcap=2.0).of_lengths(*lengths)
    inputs = make(case)
    pullback = vjp(case, inputs)[1]
    with mock.patch.object(np, "matmul", measured):
        pullback(cotangent(case, inputs))
    assert max(sizes, default=0) <= MAX_PRODUCT
    assert max(vectors + sizes) > 0
    assert max(vectors, default=0) <= MAX_MATVEC
