"""Dtypes: each one on every device, others refused by name."""

from __future__ import annotations

from typing import Any

import pytest

import cuflash
from cuflash.plan.arch import arch_named
from cuflash.plan.forward import max_head_dim
from tests.attention.cases import Case, check, make
from tests.devices import EmulatedDevice

CASE = Case(num_heads=4, num_kv_heads=2, seqlen_q=33, seqlen_k=65)


def test_dtype(device: Any, dtype: str) -> None:
    for mask in ({}, {"causal": True}, {"bias": "b..k"}, {"softcap": 2.0}, {"sequences": ((20, 30), (13, 5))}):
        check(device, CASE.but(dtype=dtype, **mask))


@pytest.mark.parametrize("layout", ["interleaved", "offset_1", "reversed_tokens"])
def test_layout(device: Any, dtype: str, layout: str) -> None:
    check(device, CASE.but(dtype=dtype, layout=layout))


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


def test_the_largest_head_dim_of_float64_is_that_of_shared_memory() -> None:
    most = max_head_dim("float64", arch_named("sm_86"))
    assert 256 < most < 512
    case = Case(dtype="float64", batch=1, num_heads=1, seqlen_q=5, seqlen_k=40, head_dim=most, head_dim_v=512)
    check(EmulatedDevice("sm_86"), case)
    inputs = make(case.but(head_dim=most + 1))
    with pytest.raises(cuflash.InvalidShapeError, match=rf"must be 1 to {most} for float64 on sm_86"):
        EmulatedDevice("sm_86").run(cuflash.attention, *inputs[:3])
