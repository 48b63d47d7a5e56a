"""The cost model of attention over a paged cache against what the kernels do: bytes by array, to the last one.

The emulated device counts what the compiled kernels load and store; the model never sees a kernel run.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cuflash
from cuflash import Options, io_model
from cuflash.errors import InvalidShapeError, InvalidValueError
from cuflash.plan.gpus import gpu_named
from tests.paged.cases import paged
from tests.test_io_model_exact import agree

LENGTHS = (37, 5, 130, 0, 64)
UNEVEN = (900, 3, 0, 41, 200)


@dataclass(frozen=True)
class Case:
    """One call of `paged_attention`."""

    heads: int = 8
    kv_heads: int = 2
    dim: int = 64
    dim_v: int | None = None
    block_size: int = 16
    lengths: tuple[int, ...] = LENGTHS
    queries: int | tuple[int, ...] = 1
    dtype: str = "float16"
    bias: tuple[int, ...] | None = None
    splits: int | None = None
    keywords: dict[str, Any] = field(default_factory=dict, hash=False)


CASES = (
    *(Case(n, kv, block_size=size) for n, kv, size in ((8, 2, 16), (4, 4, 5), (6, 1, 1), (32, 1, 48), (20, 1, 7))),
    *(Case(keywords={"window": window}, block_size=size) for window in ((20, None), (0, 0)) for size in (1, 16, 200)),
    *(Case(splits=splits, lengths=(700, 1, 0, 333)) for splits in (1, 3, 7)),
    *(Case(lengths=lengths, block_size=size, keywords={"return_lse": True})
      for lengths in (UNEVEN, (700, 350, 233, 175), (*range(37), 500), (0, 0, 300)) for size in (1, 5, 16)),
    *(Case(lengths=UNEVEN, queries=n, heads=heads, keywords={"window": (300, 0)})
      for n, heads in ((1, 8), (4, 4), (9, 20))),
    Case(2, 1, dim=32, lengths=(17000, 5)),  # more than 128 states
    Case(4, 4, splits=5, lengths=(300, 90), keywords={"return_lse": True, "window": (100, 0)}),
    *(Case(queries=n, lengths=(50, 41, 130, 2), heads=heads) for n, heads in ((4, 4), (3, 16), (40, 4), (17, 2))),
    *(Case(queries=(3, 1, 70, 0, 5), block_size=size, dim=80) for size in (7, 16)),
    Case(queries=(1, 1, 1, 0, 1), splits=2, keywords={"return_lse": True}),
    Case(queries=(2, 5, 16, 0, 3), keywords={"window": (9, 3), "causal": False}, heads=4),
    *(Case(dtype=dtype, dim=48, dim_v=80) for dtype in ("bfloat16", "float32", "float64")),
    Case(dim=33, dim_v=7, keywords={"softcap": 5.0}),
    Case(dim=64, dim_v=300, keywords={"causal": False}),
    Case(bias=(5, 8, 1, 176)),
    Case(bias=(5, 1, 4, 176), queries=4, splits=2),
)  # fmt: skip


def run(case: Case) -> list[Any]:
    """The launches of the case on the emulated device."""
    rng = np.random.default_rng(0)
    dtype = np.dtype(ml_dtypes.bfloat16) if case.dtype == "bfloat16" else np.dtype(case.dtype)
    cache = paged(rng, case.lengths, case.block_size, case.kv_heads, case.dim, dtype, case.dim_v)
    q_shape, packing = shape_of_queries(case)
    q = rng.standard_normal(q_shape).astype(dtype)
    keywords = dict(case.keywords) | packing
    if case.bias is not None:
        keywords["bias"] = rng.standard_normal(case.bias).astype(np.float32)
    options = None if case.splits is None else Options(num_splits=case.splits)
    with cuflash.emulate("sm_80") as device:
        cuflash.paged_attention(q, *cache.arguments, **keywords, options=options)
    return device.launches


def shape_of_queries(case: Case) -> tuple[tuple[int, ...], dict[str, Any]]:
    if isinstance(case.queries, tuple):
        ends = [0, *np.cumsum(case.queries).tolist()]
        return (ends[-1], case.heads, case.dim), {"cu_seqlens_q": ends}
    return (len(case.lengths), case.queries, case.heads, case.dim), {}


def model(case: Case) -> io_model.Cost:
    q_shape, packing = shape_of_queries(case)
    cache_shape = (99, case.block_size, case.kv_heads, case.dim)
    return io_model.paged_forward(
        q_shape, cache_shape, case.lengths,
        v_cache_shape=None if case.dim_v is None else (*cache_shape[:3], case.dim_v),
        max_blocks=max(-(-n // case.block_size) for n in case.lengths) + 2, dtype=case.dtype,
        bias_shape=case.bias, bias_dtype="float32" if case.bias else None,
        options=None if case.splits is None else Options(num_splits=case.splits), **case.keywords, **packing,
    )  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bytes_are_those_that_the_kernels_move(case):
    agree(run(case), model(case))


def test_one_byte_more_is_noticed():
    launches, cost = run(Case()), model(Case())
    with pytest.raises(AssertionError):
        agree(launches, replace(cost, read={**cost.read, "block_tables": cost.read["block_tables"] + 1}))


def test_keys_and_values_are_read_once_for_a_group() -> None:
    """Live tokens alone, whatever the group, the splits and the room of the table; entries as far as they go."""
    tokens = sum(LENGTHS)
    for heads in (2, 8, 32):
        for splits in (1, 3):
            cost = model(Case(heads=heads, splits=splits))
            assert cost.read["k"] == cost.read["v"] == tokens * 2 * 64 * 2
            blocks = sum(-(-n // 16) for n in LENGTHS)
            assert blocks * 2 * 4 <= cost.read["block_tables"] <= 2 * blocks * 2 * 4


def test_a_lower_bound_of_the_time_of_decoding() -> None:
    """Keys and values bound it: 32 x 4096 tokens, 32 query and 8 key heads of 128, take an H200 at least 112 us."""
    cost = io_model.paged_forward((32, 32, 128), (2**14, 16, 8, 128), [4096] * 32, arch="sm_90", sm_count=132)
    roofline = cost.roofline(gpu_named("H200"))
    assert roofline.bound == "memory"
    assert 110e-6 < roofline.seconds < 115e-6
    assert cost.dram_bytes / (32 * 4096 * 8 * 128 * 2 * 2) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k_cache_shape": (9, 16, 2)}, InvalidShapeError, "k_cache_shape = (9, 16, 2): must be (num_blocks,"),
        ({"seq_lens": [5]}, InvalidValueError, "seq_lens = [5]: must be 2 lengths, one per sequence of q"),
        ({"cu_seqlens_q": [0, 2]}, InvalidValueError, "cu_seqlens_q = [0, 2]: must list the 3 ends"),
        ({"dtype": "int8"}, TypeError, "q.dtype = 'int8': must be one of"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"q_shape": (2, 4, 32), "k_cache_shape": (9, 16, 2, 32), "seq_lens": [5, 7]} | change
    with pytest.raises(error) as caught:
        io_model.paged_forward(**given)
    assert message in str(caught.value)
