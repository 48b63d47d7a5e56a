"""The forward kernel in float32 (split TF32), TF32 and float64: every way that operands and results take."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cuflash.options import Options
from cuflash.plan.config import ELEMENT_BYTES, ForwardConfig
from tests.kernels.launch import Run, run_forward
from tests.kernels.test_forward import BASE, inputs, normal
from tests.oracle import attention
from tests.tolerances import assert_attention

DTYPES = ("float32", "tf32", "float64")
TF32_ERROR = 2.0**-10  # of a product, at most; 2^-11 for each factor


def config_of(dtype: str, **changes: Any) -> ForwardConfig:
    return replace(BASE, **{"dtype": dtype, **changes})


def check(dtype: str, config: ForwardConfig, num_splits: int | None = None, load_bytes: int | None = None,
          shape: dict[str, int] | None = None, **keywords: Any) -> Run:  # fmt: skip
    """Runs the kernel and holds it to the oracle; whole chunks do not conflict in shared memory."""
    arrays = inputs(**shape or {}, dtype=np.dtype("float32" if dtype == "tf32" else dtype))
    options = Options(config=config, num_splits=num_splits, precision="tf32" if dtype == "tf32" else None)
    run = run_forward(*arrays, options=options, load_bytes=load_bytes, **keywords)
    if dtype == "tf32":
        want = attention(*arrays, **keywords)
        finite = np.isfinite(want.lse)
        np.testing.assert_allclose(run.out, want.out, atol=4 * TF32_ERROR)
        np.testing.assert_allclose(run.lse[finite], want.lse[finite], rtol=TF32_ERROR, atol=TF32_ERROR)
        assert np.abs(run.out - want.out).max() > 1e-5  # it is TF32
    else:
        assert_attention(run.out, run.lse, *arrays, **keywords)
    if config.load_bytes == 16:
        assert all(report.bank_conflicts == 0 for report in run.reports)
    return run


TILES = [
    # block_m, block_n, num_warps, num_stages
    (16, 16, 1, 1),
    (16, 64, 1, 2),
    (32, 32, 1, 2),
    (64, 48, 4, 1),
    (128, 32, 4, 2),
    (128, 16, 8, 1),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("mask", [{}, {"window": (37, 5)}], ids=str)
def test_tiles(dtype: str, tile: tuple[int, ...], mask: dict[str, Any]) -> None:
    names = ("block_m", "block_n", "num_warps", "num_stages")
    check(dtype, config_of(dtype, **dict(zip(names, tile, strict=True)), windowed=bool(mask)), **mask)


@pytest.mark.parametrize("dtype", ["tf32", "float64"])
def test_queries_in_registers(dtype: str) -> None:
    check(dtype, config_of(dtype, q_in_registers=True))


HEAD_DIMS = [(1, 1), (8, 16), (17, 33), (40, 80), (64, 24), (80, 48), (112, 100), (200, 96), (64, 300)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", HEAD_DIMS, ids=str)
def test_head_dims(dtype: str, dims: tuple[int, int]) -> None:
    head_dim, head_dim_v = dims
    access = min(16, *((n := ELEMENT_BYTES[dtype] * d) & -n for d in dims))
    block_dv = -(-head_dim_v // 16) * 16 if head_dim_v < 300 else 112  # the last chunk is not full
    config = config_of(
        dtype, block_m=32, num_warps=2, block_n=16, num_stages=1, head_dim=head_dim, head_dim_v=head_dim_v,
        block_dv=block_dv, load_bytes=access, store_bytes=access, windowed=True,
    )  # fmt: skip
    shape = {"seqlen_q": 33, "seqlen_k": 50, "head_dim": head_dim, "head_dim_v": head_dim_v}
    check(dtype, config, shape=shape, causal=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("access", [4, 8, 16])
def test_narrow_accesses(dtype: str, access: int) -> None:
    if access < ELEMENT_BYTES[dtype]:
        return
    config = config_of(dtype, head_dim=48, head_dim_v=40, block_dv=48, load_bytes=access, store_bytes=access)
    check(dtype, config, load_bytes=access, shape={"head_dim": 48, "head_dim_v": 40})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_splits", [1, 3, 7])
@pytest.mark.parametrize("head_dim_v", [64, 33])
def test_splits(dtype: str, num_splits: int, head_dim_v: int) -> None:
    element = 8 if dtype == "float64" else 4
    config = config_of(
        dtype, split=True, block_n=16, windowed=True, store_bytes=element * (2 if head_dim_v % 2 == 0 else 1),
        head_dim_v=head_dim_v, block_dv=-(-head_dim_v // 16) * 16, load_bytes=16 if head_dim_v == 64 else element,
    )  # fmt: skip
    shape = {"seqlen_q": 70, "seqlen_k": 200, "head_dim_v": head_dim_v}
    check(dtype, config, num_splits, config.load_bytes, shape, window=(90, 0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["float16", "float32", "float64"])
def test_bias_and_softcap(dtype: str, kind: str) -> None:
    config = config_of(dtype, softcapped=True, bias_dtype=kind)
    check(dtype, config, bias=normal(1, 2, 100, 150, dtype=np.dtype(kind)), softcap=1.5)


def test_sums_move_to_the_second_level_without_a_trace() -> None:
    """Fewer tiles than the first level takes, as many, one more, and many more; maxima that grow late."""
    for keys in (15 * 16, 16 * 16, 17 * 16, 50 * 16 + 5):
        arrays = list(inputs(32, keys, dtype=np.dtype(np.float32)))
        arrays[1][:, keys // 2 :] *= 3
        config = config_of("float32", block_m=32, num_warps=1, block_n=16, num_stages=1)
        run = run_forward(*arrays, options=Options(config=config))
        assert_attention(run.out, run.lse, *arrays)
