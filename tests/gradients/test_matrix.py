"""Gradients of every feature against every other, on every device, as tests/attention/test_matrix.py has results."""

from __future__ import annotations

from typing import Any

import pytest

from tests.attention.cases import NARROW_DTYPES, Case
from tests.attention.pairwise import covering, spread
from tests.attention.test_matrix import RUN_TIME, case_of
from tests.devices import EmulatedDevice
from tests.gradients.cases import check

HEAD_DIMS = ((33, 33), (40, 40), (64, 64), (80, 80), (128, 128), (256, 256), (1, 1), (64, 32), (7, 130), (192, 128))
COMPILED: dict[str, Any] = {
    "dims": HEAD_DIMS,
    "bias_dtype": (None, None, "float16", "float32"),
    "dtype": NARROW_DTYPES,
    "windowed": (False, True),
    "softcap": (None, 1.5),
    "packed": (False, True),
    "few_queries": (False, True),
}
CASES = [
    case_of({**row, "split": False, "batch": 1 + row["batch"] % 2})
    for row in spread(covering(COMPILED), RUN_TIME, times=2)
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matrix(device: Any, case: Case) -> None:
    check(case, device)


LARGE = Case(dtype="bfloat16", head_dim=512, head_dim_v=512, seqlen_q=20, seqlen_k=40, batch=1)


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90"])
@pytest.mark.parametrize("case", [LARGE, LARGE.but(seqlen_q=3), LARGE.but(head_dim_v=64)], ids=str)
def test_the_widest_heads(arch: str, case: Case) -> None:
    """On little shared memory too."""
    check(case, EmulatedDevice(arch))
