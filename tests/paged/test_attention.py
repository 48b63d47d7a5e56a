"""`paged_attention` against the float64 oracle on contiguous keys and values."""

from __future__ import annotations

import numpy as np
import pytest

import cuflash
from cuflash import masks
from tests import tolerances
from tests.paged.cases import check_paged, paged

LENGTHS = (37, 5, 130, 0, 64)


def queries_of(rng, lengths, heads, dim, dtype):
    return [rng.standard_normal((n, heads, dim)).astype(dtype) for n in lengths]


def decode(device, case, queries, **keywords):
    """One query a sequence; out and lse as of packed queries."""
    out, lse = device.run(
        cuflash.paged_attention, np.concatenate(queries), *case.arguments, return_lse=True, **keywords
    )  # fmt: skip
    assert out.shape == (len(queries), *queries[0].shape[1:2], case.v_cache.shape[-1])
    return out, lse.T


@pytest.mark.parametrize(
    ("heads", "kv_heads", "block_size"),
    [(8, 2, 16), (4, 4, 16), (6, 1, 1), (8, 2, 5), (32, 1, 48), (3, 3, 200), (20, 1, 16)],
)
def test_decode(device, heads, kv_heads, block_size):
    rng = np.random.default_rng(heads * block_size)
    case = paged(rng, LENGTHS, block_size, kv_heads, 64)
    queries = queries_of(rng, [1] * len(LENGTHS), heads, 64, np.float16)
    check_paged(case, queries, *decode(device, case, queries), causal=True)


def test_dtypes(device, dtype):
    rng = np.random.default_rng(1)
    case = paged(rng, LENGTHS, 16, 2, 48, np.dtype(dtype), head_dim_v=80)
    queries = queries_of(rng, [1] * len(LENGTHS), 6, 48, dtype)
    check_paged(case, queries, *decode(device, case, queries), causal=True)


@pytest.mark.parametrize(
    "scores",
    [
        {"window": (20, None)},
        {"softcap": 3.0},
        {"scale": 0.3},
        {"window": (30, None), "softcap": 5.0},
        {"causal": False},
    ],
    ids=str,
)
def test_scores(device, scores):
    rng = np.random.default_rng(2)
    case = paged(rng, LENGTHS, 16, 2, 64)
    queries = queries_of(rng, [1] * len(LENGTHS), 8, 64, np.float16)
    check_paged(case, queries, *decode(device, case, queries, **scores), **({"causal": True} | scores))


@pytest.mark.parametrize("per_head", [False, True])
def test_bias(device, per_head):
    rng = np.random.default_rng(3)
    case = paged(rng, LENGTHS, 16, 2, 64)
    queries = queries_of(rng, [1] * len(LENGTHS), 8, 64, np.float16)
    room = case.block_tables.shape[1] * 16
    bias = rng.standard_normal((len(LENGTHS), 8 if per_head else 1, 1, room)).astype(np.float32)
    full = np.broadcast_to(bias, (len(LENGTHS), 8, 1, room))
    check_paged(case, queries, *decode(device, case, queries, bias=bias), bias=full, causal=True)


@pytest.mark.parametrize("num_splits", [1, 3, 7])
@pytest.mark.parametrize("kv_heads", [2, 8])
def test_splits(device, num_splits, kv_heads):
    if device.name == "cpu":
        options = None
    else:
        options = cuflash.Options(num_splits=num_splits)
    rng = np.random.default_rng(4)
    case = paged(rng, (700, 1, 0, 333), 16, kv_heads, 64)
    queries = queries_of(rng, [1] * 4, 8, 64, np.float16)
    check_paged(case, queries, *decode(device, case, queries, options=options), causal=True)


@pytest.mark.parametrize(("seqlen_q", "heads", "kv_heads"), [(4, 4, 2), (3, 8, 1), (40, 4, 2), (17, 2, 2)])
def test_several_queries(device, seqlen_q, heads, kv_heads):
    """As many new tokens for each sequence; some have fewer keys, so that their first queries see nothing."""
    rng = np.random.default_rng(seqlen_q)
    case = paged(rng, (50, 41, 130, 2), 16, kv_heads, 64)
    queries = queries_of(rng, [seqlen_q] * 4, heads, 64, np.float16)
    out, lse = device.run(cuflash.paged_attention, np.stack(queries), *case.arguments, return_lse=True)
    assert out.shape == (4, seqlen_q, heads, 64)
    assert lse.shape == (4, heads, seqlen_q)
    check_paged(case, queries, np.concatenate(list(out)), np.concatenate(list(lse), axis=1), causal=True)


@pytest.mark.parametrize("lengths_q", [(3, 1, 70, 0, 5), (1, 1, 1, 0, 1), (2, 5, 16, 0, 3)])
@pytest.mark.parametrize("block_size", [7, 16])
def test_packed_queries(device, lengths_q, block_size):
    """Chunked prefill beside decoding."""
    rng = np.random.default_rng(5)
    case = paged(rng, LENGTHS, block_size, 2, 80)
    queries = queries_of(rng, lengths_q, 8, 80, np.float16)
    out, lse = device.run(
        cuflash.paged_attention, np.concatenate(queries), *case.arguments,
        cu_seqlens_q=np.cumsum([0, *lengths_q]), return_lse=True,
    )  # fmt: skip
    check_paged(case, queries, out, lse, causal=True)


@pytest.mark.parametrize("mask", [masks.SlidingWindow(9, 0) | masks.GlobalTokens(4), masks.Dilated(3)], ids=repr)
def test_masks(device, mask):
    rng = np.random.default_rng(6)
    lengths_q = (3, 1, 70, 0, 5)
    case = paged(rng, LENGTHS, 16, 2, 64)
    queries = queries_of(rng, lengths_q, 4, 64, np.float16)
    out, lse = device.run(
        cuflash.paged_attention, np.concatenate(queries), *case.arguments,
        cu_seqlens_q=np.cumsum([0, *lengths_q]), return_lse=True, mask=mask,
    )  # fmt: skip
    at = 0
    for b, q in enumerate(queries):
        if len(q):
            seen = mask.visible(len(q), LENGTHS[b])
            result = out[at : at + len(q)], lse[:, at : at + len(q)]
            tolerances.assert_attention(*result, q, case.keys[b], case.values[b], seen=seen, causal=True)
        at += len(q)


def test_head_first_caches_are_used_in_place(device):
    rng = np.random.default_rng(7)
    case = paged(rng, LENGTHS, 16, 2, 64, head_first=True)
    queries = queries_of(rng, [1] * len(LENGTHS), 8, 64, np.float16)
    check_paged(case, queries, *decode(device, case, queries), causal=True)


def test_out_is_written(device):
    rng = np.random.default_rng(8)
    case = paged(rng, LENGTHS, 16, 2, 64)
    q = np.concatenate(queries_of(rng, [1] * len(LENGTHS), 8, 64, np.float16))
    out = np.empty((len(LENGTHS), 2 * 8, 64), np.float16)[:, ::2]
    assert device.run(cuflash.paged_attention, q, *case.arguments, out=out) is out
    want = device.run(cuflash.paged_attention, q, *case.arguments)
    assert np.array_equal(out, want)


@pytest.mark.parametrize("kv_heads", [2, 8])
def test_bits_do_not_depend_on_where_blocks_lie(kv_heads, device):
    """Nor on what else is in the batch, at a fixed number of splits."""
    options = None if device.name == "cpu" else cuflash.Options(num_splits=2)
    rng = np.random.default_rng(9)
    case = paged(rng, (300, 77), 16, kv_heads, 64)
    q = np.concatenate(queries_of(rng, [1, 1], 8, 64, np.float16))
    want = device.run(cuflash.paged_attention, q, *case.arguments, options=options)
    order = rng.permutation(len(case.k_cache))
    moved = np.where(case.block_tables < len(order), np.argsort(order)[case.block_tables % len(order)], 10**6)
    k, v = case.k_cache[order], case.v_cache[order]
    got = device.run(cuflash.paged_attention, q, k, v, moved.astype(np.int32), case.seq_lens, options=options)
    assert np.array_equal(got, want)
    alone = device.run(
        cuflash.paged_attention, q[1:], k, v, moved[1:].astype(np.int32), case.seq_lens[1:], options=options
    )  # fmt: skip
    assert np.array_equal(alone, want[1:])


@pytest.mark.parametrize("arch", ["sm_86", "sm_90", "sm_100"])
def test_architectures(arch):
    rng = np.random.default_rng(10)
    case = paged(rng, LENGTHS, 16, 2, 128)
    q = np.concatenate(queries_of(rng, [1] * len(LENGTHS), 8, 128, np.float16))
    with cuflash.emulate(arch, warp_order=3):
        out, lse = cuflash.paged_attention(q, *case.arguments, return_lse=True)
    check_paged(case, list(q[:, None]), out, lse.T, causal=True)


@pytest.mark.parametrize("num_splits", [1, 3])
def test_one_query_is_a_token_axis_of_one(device, num_splits):
    """To the bit: q and out in any strides, rows that are not contiguous, a bias, a mask."""
    options = None if device.name == "cpu" else cuflash.Options(num_splits=num_splits)
    rng = np.random.default_rng(11)
    case = paged(rng, LENGTHS, 16, 2, 64)
    room = case.block_tables.shape[1] * 16
    wide = rng.standard_normal((8, len(LENGTHS), 128)).astype(np.float16).transpose(1, 0, 2)
    for q in (wide[..., :64], wide[::-1, ::2, 64:], wide[..., ::2]):
        heads = q.shape[1]
        bias = rng.standard_normal((heads, 1, room)).astype(np.float32)
        for keywords in ({}, {"bias": bias}, {"mask": masks.Dilated(3)}):
            outs = np.full((2, heads, len(LENGTHS), 80), 7, np.float16).transpose(0, 2, 1, 3)[..., :64]
            given = {"return_lse": True, "options": options} | keywords
            single, lse = device.run(cuflash.paged_attention, q, *case.arguments, out=outs[0], **given)
            tokens, lses = device.run(
                cuflash.paged_attention, q[:, None], *case.arguments, out=outs[1][:, None], **given
            )  # fmt: skip
            fresh = device.run(cuflash.paged_attention, q, *case.arguments, options=options, **keywords)
            assert (single.shape, lse.shape) == (q.shape, q.shape[:2])
            assert np.array_equal(single, tokens[:, 0])
            assert np.array_equal(single, fresh)
            assert np.array_equal(lse, lses[..., 0])


def test_no_sequence(device):
    case = paged(np.random.default_rng(12), (), 16, 2, 64)
    out, lse = device.run(cuflash.paged_attention, np.empty((0, 8, 64), np.float16), *case.arguments, return_lse=True)
    assert (out.shape, lse.shape) == ((0, 8, 64), (0, 8))
