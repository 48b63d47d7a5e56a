"""Head dimensions that are multiples of nothing; each one is a configuration of its own."""

from __future__ import annotations

from typing import Any

import pytest

from tests.attention.cases import Case, check

HEAD_DIMS = (1, 2, 3, 5, 8, 15, 16, 17, 31, 32, 33, 48, 63, 65, 72, 80, 96, 127, 128, 129, 160)
LARGE = (192, 200, 255, 256, 257, 320, 384, 511, 512)
UNEQUAL = ((64, 128), (128, 64), (1, 64), (64, 1), (33, 70), (512, 16), (24, 300))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dim(device: Any, head_dim: int) -> None:
    case = Case(head_dim=head_dim, head_dim_v=head_dim, seqlen_q=20, seqlen_k=70)
    check(device, case)
    check(device, case.but(seqlen_q=65, seqlen_k=33, layout="padded_rows" if head_dim % 8 == 0 else "heads_first"))


@pytest.mark.parametrize("head_dim", LARGE)
def test_large_head_dim(device: Any, head_dim: int) -> None:
    check(device, Case(dtype="bfloat16", head_dim=head_dim, head_dim_v=head_dim, batch=1, seqlen_q=20, seqlen_k=70))


@pytest.mark.parametrize("head_dim", [1, 17, 48, 72, 127, 144, 256, 300, 512])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_head_dim_of_wide_dtypes(device: Any, dtype: str, head_dim: int) -> None:
    check(device, Case(dtype=dtype, head_dim=head_dim, head_dim_v=head_dim, batch=1, seqlen_q=20, seqlen_k=70))


@pytest.mark.parametrize(("head_dim", "head_dim_v"), UNEQUAL)
def test_unequal_head_dims(device: Any, head_dim: int, head_dim_v: int) -> None:
    check(device, Case(head_dim=head_dim, head_dim_v=head_dim_v, batch=1, seqlen_q=20, seqlen_k=70))
