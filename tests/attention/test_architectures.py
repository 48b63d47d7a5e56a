"""One source for every architecture: other tiles where shared memory is short, other instructions where there are."""

from __future__ import annotations

import pytest

import cuflash
from cuflash.plan.arch import ARCHS
from tests.attention.cases import Case, check
from tests.devices import EmulatedDevice

CASES = {
    "causal": Case(causal=True),
    "wide_head": Case(batch=1, head_dim=256, head_dim_v=256, seqlen_q=70),
    "float32": Case(dtype="float32", head_dim=128, head_dim_v=96, window=(40, 3)),
    "float64": Case(dtype="float64", head_dim=80, head_dim_v=130, causal=True),
    "packed_split": Case(
        dtype="bfloat16", sequences=((40, 70), (3, 5)), bias="bhqk", softcap=2.0, options=cuflash.Options(num_splits=3)
    ),
}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", CASES)
def test_architecture(arch: str, name: str) -> None:
    check(EmulatedDevice(arch), CASES[name])
