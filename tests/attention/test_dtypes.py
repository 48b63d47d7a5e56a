"""Dtypes: each one where it is computed, refused by name where it is not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cuflash
from tests.attention.cases import KERNEL_DTYPES, WIDE_DTYPES, Case, check, make
from tests.devices import CpuDevice

CASE = Case(num_heads=4, num_kv_heads=2, seqlen_q=33, seqlen_k=65)


def test_dtype(device: Any, dtype: str) -> None:
    for mask in ({}, {"causal": True}, {"bias": "b..k"}, {"softcap": 2.0}, {"sequences": ((20, 30), (13, 5))}):
        check(device, CASE.but(dtype=dtype, **mask))


@pytest.mark.parametrize("layout", ["interleaved", "offset_1", "reversed_tokens"])
@pytest.mark.parametrize("dtype", WIDE_DTYPES)
def test_layout_of_wide_dtypes(dtype: str, layout: str) -> None:
    check(CpuDevice(), CASE.but(dtype=dtype, layout=layout))


@pytest.mark.parametrize("bias_dtype", [*KERNEL_DTYPES, *WIDE_DTYPES])
def test_bias_dtype(dtype: str, device: Any, bias_dtype: str) -> None:
    """A bias need not have the dtype of q; float64 is not read by kernels."""
    case = CASE.but(dtype=dtype, bias="..qk", bias_dtype=bias_dtype)
    if bias_dtype in ("float64",) and device.name != "cpu":
        with pytest.raises(
            cuflash.InvalidDtypeError, match=r"bias\.dtype = float64: must be float16, bfloat16, float32"
        ):
            check(device, case)
    else:
        check(device, case)


@pytest.mark.parametrize("wide", WIDE_DTYPES)
def test_kernels_name_the_dtypes_to_cast_to(device: Any, wide: str) -> None:
    inputs = make(CASE.but(dtype=wide))
    if device.name == "cpu":
        assert device.run(cuflash.attention, *inputs[:3]).dtype == wide
        return
    out = np.full(inputs.q.shape, 7, wide)
    with pytest.raises(cuflash.InvalidDtypeError, match=f"q.dtype = {wide}: must be float16 or bfloat16 .*cast"):
        device.run(cuflash.attention, *inputs[:3], out=out)
    assert (out == 7).all()


@pytest.mark.parametrize("array", ["q", "k", "v"])
def test_mixed_dtypes_are_refused(device: Any, array: str) -> None:
    inputs = make(CASE)
    mixed = [x.astype("bfloat16") if name == array else x for name, x in zip("qkv", inputs[:3], strict=True)]
    with pytest.raises(cuflash.InvalidDtypeError, match=r"k\.dtype" if array == "q" else rf"{array}\.dtype"):
        device.run(cuflash.attention, *mixed)


@pytest.mark.parametrize("dtype", ["int8", "int64", "bool", "complex64", "object"])
def test_other_dtypes_are_refused(dtype: str) -> None:
    arrays = [x.astype("float32").astype(dtype) for x in make(CASE)[:3]]
    with pytest.raises(cuflash.CuflashError, match=r"q\.dtype = "):
        cuflash.attention(*arrays)


@pytest.mark.parametrize("head_dim", [0, 513])
def test_kernels_name_the_head_dims_they_take(device: Any, head_dim: int) -> None:
    inputs = make(CASE.but(head_dim=head_dim))
    if device.name == "cpu":
        check(device, CASE.but(head_dim=head_dim))
        return
    with pytest.raises(cuflash.InvalidShapeError, match=rf"q\.shape\[-1\] = {head_dim}: must be 1 to 512"):
        device.run(cuflash.attention, *inputs[:3])
