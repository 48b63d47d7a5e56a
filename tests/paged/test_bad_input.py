"""Bad arguments of `paged_attention`: a typed error by name, and nothing written."""

from __future__ import annotations

import re
from contextlib import nullcontext

import numpy as np
import pytest

import cuflash
from tests.paged.cases import paged


def arguments():
    rng = np.random.default_rng(0)
    case = paged(rng, (20, 7), 8, 2, 32)
    q = rng.standard_normal((2, 4, 32)).astype(np.float16)
    return [q, *case.arguments]


def changed(index, change):
    def make():
        given = arguments()
        given[index] = change(given[index])
        return given, {}

    return make


def keyword(**keywords):
    return lambda: (arguments(), keywords)


def set_entry(array, index, value):
    array = array.copy()
    array[index] = value
    return array


CASES = {
    "k_cache.shape = (7, 2, 32): must be (num_blocks, block_size, num_kv_heads, dim)": changed(1, lambda x: x[:, 0]),
    "k_cache.shape = (7, 0, 2, 32): must be": changed(1, lambda x: x[:, :0]),
    "v_cache.shape = (5, 8, 2, 32): must begin with (7, 8), as k_cache does": changed(2, lambda x: x[:5]),
    "v_cache.dtype = float32": changed(2, lambda x: x.astype(np.float32)),
    "block_tables.shape = (5,): must be (batch, max_blocks)": changed(3, lambda x: x[0]),
    "block_tables.dtype = float64: must be an integer dtype": changed(3, lambda x: x.astype(np.float64)),
    "block_tables[0, 1] = 7: must be 0 to 6, a block of the cache": changed(3, lambda x: set_entry(x, (0, 1), 7)),
    "block_tables[1, 0] = -1: must be 0 to 6, a block of the cache": changed(3, lambda x: set_entry(x, (1, 0), -1)),
    "seq_lens.shape = (3,): must be (2,), one per block table": changed(4, lambda x: np.append(x, 1)),
    "seq_lens.shape = (2, 1): must be (batch,)": changed(4, lambda x: x[:, None]),
    "seq_lens.dtype = float32: must be an integer dtype": changed(4, lambda x: x.astype(np.float32)),
    "seq_lens[1] = 41: must be 0 to 40": changed(4, lambda x: set_entry(x, 1, 41)),
    "seq_lens[0] = -1: must be 0 to 40": changed(4, lambda x: set_entry(x, 0, -1)),
    "q.shape = (3, 4, 32): batch 3 must be 2, that of block_tables": changed(0, lambda x: np.concatenate([x, x[:1]])),
    "q.shape = (4, 32): must be (batch, num_heads, head_dim)": changed(0, lambda x: x[0]),
    "q.shape = (): must be (batch, num_heads, head_dim)": changed(0, lambda x: x[0, 0, 0, ...]),
    "q.shape = (2, 1, 3, 32): 3 heads must be a multiple of the 2 of k": changed(0, lambda x: x[:, :3]),
    "k_cache.shape = (7, 8, 2, 32): head_dim 32 must be 16, that of q": changed(0, lambda x: x[..., :16]),
    "cu_seqlens_q.shape = (2,): must be (3,), block_tables has 2 rows": keyword(cu_seqlens_q=[0, 2]),
    "cu_seqlens_q[-1] = 3: must be at most 2, the tokens of q": keyword(cu_seqlens_q=[0, 1, 3]),
    "max_seqlen_q = 0: must be at least 1": keyword(cu_seqlens_q=[0, 1, 2], max_seqlen_q=0),
    "max_seqlen_q = 1: must be None without cu_seqlens_q": keyword(max_seqlen_q=1),
    "causal = 1: must be True or False": keyword(causal=1),
    "return_lse = 'yes': must be True or False": keyword(return_lse="yes"),
    "bias.shape = (2, 4, 1, 39): must broadcast to": keyword(bias=np.zeros((2, 4, 1, 39), np.float32)),
    "mask is a": keyword(mask=np.ones((1, 40), bool)),
}


@pytest.mark.parametrize("message", CASES)
@pytest.mark.parametrize("emulated", [False, True])
def test_is_refused_by_name(message, emulated):
    given, keywords = CASES[message]()
    out = np.full((2, 4, 32), 7, np.float16)
    if not keywords and given[0].shape == out.shape:
        keywords = {"out": out}
    device = cuflash.emulate("sm_80") if emulated else nullcontext()
    with device, pytest.raises(cuflash.CuflashError, match=re.escape(message)):
        cuflash.paged_attention(*given, **keywords)
    assert (out == 7).all()


def test_out_of_another_shape_is_refused():
    out = np.full((2, 4, 16), 7, np.float16)
    with pytest.raises(cuflash.InvalidShapeError, match=re.escape("out.shape = (2, 4, 16): must be (2, 4, 32)")):
        cuflash.paged_attention(*arguments(), out=out)
    assert (out == 7).all()


def test_out_of_other_strides_is_refused_as_the_caller_has_it():
    for out, message in (
        (np.full((2, 4, 64), 7, np.float16)[..., ::2], "out.strides = (512, 128, 4): the last axis must be contiguous"),
        (np.lib.stride_tricks.as_strided(np.full(64, 7, np.float16), (2, 4, 32), (0, 16, 2)),
         "out.strides = (0, 16, 2): elements must not overlap"),
        (np.full((2, 4, 32), 7, np.float32), "out.dtype = float32: must be float16, the dtype of q"),
        (np.full((2, 1, 4, 32), 7, np.float16), "out.shape = (2, 1, 4, 32): must be (2, 4, 32)"),
    ):  # fmt: skip
        with pytest.raises(cuflash.CuflashError, match=re.escape(message)):
            cuflash.paged_attention(*arguments(), out=out)
        assert (out == 7).all()
    given = arguments()
    with pytest.raises(cuflash.InvalidValueError, match="out overlaps q: must not share memory with it"):
        cuflash.paged_attention(*given, out=given[0])
