"""The forward and combine kernels, launched directly on the emulated device: every field of the configuration."""

from contextlib import suppress
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from cuflash.emulator import Device
from cuflash.emulator.faults import Uninitialized
from cuflash.options import Options
from cuflash.plan.config import ForwardConfig
from tests.kernels.launch import run_forward
from tests.tolerances import assert_attention

BF16 = np.dtype(ml_dtypes.bfloat16)
BASE = ForwardConfig(
    dtype="float16", bias_dtype="none", head_dim=64, head_dim_v=64, block_m=64, block_n=32, block_dv=64, num_warps=4,
    num_stages=2, q_in_registers=False, load_bytes=16, store_bytes=16, windowed=False, softcapped=False, varlen=False,
    split=False,
)  # fmt: skip


def normal(*shape, dtype=np.float16, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def inputs(seqlen_q=100, seqlen_k=150, heads=2, kv_heads=1, head_dim=64, head_dim_v=64, batch=1, dtype=np.float16):
    return (
        normal(batch, seqlen_q, heads, head_dim, dtype=dtype, seed=1),
        normal(batch, seqlen_k, kv_heads, head_dim, dtype=dtype, seed=2),
        normal(batch, seqlen_k, kv_heads, head_dim_v, dtype=dtype, seed=3),
    )


def check(arrays, config=None, num_splits=None, cu_seqlens=None, device=None, load_bytes=None, **keywords):
    """Runs the kernel and holds it to the oracle; whole chunks do not conflict in shared memory."""
    options = Options(config=config, num_splits=num_splits)
    run = run_forward(*arrays, cu_seqlens=cu_seqlens, options=options, device=device, load_bytes=load_bytes, **keywords)
    assert_attention(run.out, run.lse, *arrays, cu_seqlens=cu_seqlens, **keywords)
    if run.plan.forward.config.load_bytes in (2, 16):  # copies of 4 and 8 bytes leave gaps
        assert all(report.bank_conflicts == 0 for report in run.reports)
    return run


TILES = [
    # block_m, block_n, num_warps, num_stages, q_in_registers
    (16, 16, 1, 1, False),
    (16, 64, 1, 2, True),
    (32, 16, 2, 2, False),
    (32, 48, 1, 1, True),
    (64, 32, 4, 1, False),
    (64, 128, 4, 2, False),
    (64, 16, 2, 1, True),
    (128, 64, 4, 1, False),
    (128, 32, 8, 2, True),
    (128, 96, 4, 2, False),
    (256, 32, 8, 1, False),
]


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window": (37, 5)}], ids=str)
def test_tiles(tile, mask):
    names = ("block_m", "block_n", "num_warps", "num_stages", "q_in_registers")
    config = replace(BASE, **dict(zip(names, tile, strict=True)), windowed=bool(mask))
    check(inputs(), config, **mask)


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BF16], ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (6, 2), (4, 1)], ids=str)
def test_dtypes_and_heads(dtype, heads):
    arrays = inputs(40, 70, *heads, dtype=dtype, batch=2)
    check(arrays, replace(BASE, dtype=dtype.name))


HEAD_DIMS = [(1, 1), (2, 3), (8, 16), (17, 33), (31, 64), (40, 80), (64, 24), (80, 48), (96, 128), (112, 100)]
HEAD_DIMS += [(136, 72), (160, 192), (200, 256), (256, 40), (64, 257), (320, 300), (512, 512)]


@pytest.mark.parametrize("dims", HEAD_DIMS, ids=str)
def test_head_dims(dims):
    check(inputs(33, 50, head_dim=dims[0], head_dim_v=dims[1]), causal=True)


@pytest.mark.parametrize("access", [2, 4, 8, 16])
@pytest.mark.parametrize("dims", [(64, 64), (48, 40), (72, 136)], ids=str)
def test_narrow_accesses(access, dims):
    block_dv = -(-dims[1] // 16) * 16
    config = replace(
        BASE, head_dim=dims[0], head_dim_v=dims[1], block_dv=block_dv, load_bytes=access, store_bytes=access
    )
    check(inputs(70, 90, head_dim=dims[0], head_dim_v=dims[1]), config)


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("shape", [(1, 1, 1, 150), (1, 2, 100, 1), (1, 2, 100, 150)], ids=str)
def test_bias_and_softcap(kind, softcap, shape):
    bias = normal(*shape, dtype=np.float32).astype(BF16 if kind == "bfloat16" else kind)
    check(inputs(), bias=bias, softcap=softcap, causal=shape[2] > 1)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 40.0])
def test_softcap_is_accurate_at_all_scales(scale):
    q, k, v = inputs(32, 64)
    run = check((q, k, v), replace(BASE, softcapped=True), scale=scale, softcap=3.0)
    assert np.isfinite(run.lse).all()


WINDOWS = [(0, 0), (1, None), (None, 3), (16, 16), (200, 0), (0, 200), (None, 2**31 - 2), (2**31 - 2, None)]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("lengths", [(100, 150), (150, 100), (1, 130), (130, 1), (64, 64)], ids=str)
def test_windows(window, lengths):
    check(inputs(*lengths), replace(BASE, windowed=True), window=window)


@pytest.mark.parametrize("num_splits", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window": (20, 0)}], ids=str)
def test_splits(num_splits, mask):
    config = replace(BASE, split=True, block_n=16, windowed=bool(mask), store_bytes=8)
    check(inputs(70, 200), config, num_splits, **mask)


def test_splits_of_odd_columns_in_chunks():
    check(inputs(20, 90, head_dim=33, head_dim_v=301), num_splits=3, causal=True)


def test_no_keys():
    run = check(inputs(40, 0), BASE)
    assert not run.out.any()
    assert np.isneginf(run.lse).all()
    check(inputs(40, 0), replace(BASE, split=True, store_bytes=8), 2)


def test_rows_that_see_nothing_and_infinite_bias():
    bias = np.zeros((1, 1, 64, 64), np.float32)
    bias[:, :, 5:20] = -np.inf
    bias[:, :, 30, :40] = -np.inf
    check(inputs(64, 64), bias=bias, causal=True)
    check(inputs(200, 30), replace(BASE, windowed=True), causal=True)


@pytest.mark.parametrize("magnitude", [1e2, 3e3])
def test_extreme_scores(magnitude):
    q, k, v = inputs(48, 80)
    run = check((q, k, v), BASE, scale=magnitude)
    assert np.isfinite(run.out.astype(np.float32)).all()


ENDS = [
    ([0, 100, 100, 101, 230], [0, 90, 150, 150, 300]),
    ([0, 64, 128], [0, 64, 128]),
    ([0, 0, 0, 5], [0, 10, 20, 20]),
    ([0, 33, 60], [0, 7, 80]),
]


@pytest.mark.parametrize("ends", ENDS, ids=str)
@pytest.mark.parametrize("mask", [{}, {"causal": True}], ids=str)
@pytest.mark.parametrize("num_splits", [1, 3])
def test_packed(ends, mask, num_splits):
    q, k, v = (x[0] for x in inputs(ends[0][-1] + 13, ends[1][-1] + 9))  # tokens of no sequence at the end
    config = replace(BASE, varlen=True, windowed=bool(mask), split=num_splits > 1, store_bytes=8, block_n=16)
    run = check((q, k, v), config, num_splits, cu_seqlens=ends, **mask)
    assert np.isneginf(run.lse[:, ends[0][-1] :]).all()


@pytest.mark.parametrize("ends_q", [[0, 900, 20], [-5, 30, 2**31 - 1], [50, 20, 10], [2**30, 0, -(2**31)]], ids=str)
@pytest.mark.parametrize("ends_k", [[0, 10, 60], [-9, 2**31 - 1, 7], [70, 70, 0]], ids=str)
def test_wrong_cu_seqlens_stay_inside_the_arrays(ends_q, ends_k):
    q, k, v = (x[0] for x in inputs(60, 60))
    config = replace(BASE, varlen=True)
    device = Device("sm_80", check_races=False)  # wrong lengths may give one row to two blocks
    with suppress(Uninitialized):  # of rows that nobody owns, when the result is read
        run_forward(q, k, v, cu_seqlens=(ends_q, ends_k), options=Options(config=config), device=device)


def test_every_order_of_warps_gives_the_same_bits():
    arrays = inputs(130, 170)
    config = replace(BASE, block_m=64, windowed=True)
    runs = [
        run_forward(*arrays, causal=True, options=Options(config=config), device=Device("sm_80", warp_order=order))
        for order in (None, 1, 2)
    ]
    for run in runs[1:]:
        np.testing.assert_array_equal(run.out, runs[0].out)
        np.testing.assert_array_equal(run.lse, runs[0].lse)


def test_copies_that_land_early_give_the_same_bits():
    arrays = inputs(130, 170)
    late, early = (run_forward(*arrays, device=Device("sm_80", copies=when)) for when in ("late", "early"))
    np.testing.assert_array_equal(late.out, early.out)
