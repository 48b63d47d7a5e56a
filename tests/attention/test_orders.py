"""On the emulated GPU results do not depend, bit for bit, on the order of warps or on when copies complete."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

import cuflash
from tests.attention.cases import Case, call, make
from tests.devices import EmulatedDevice

CASES = {
    "plain": Case(batch=1, seqlen_q=70, seqlen_k=130),
    "causal": Case(batch=1, seqlen_q=70, seqlen_k=130, causal=True),
    "bias": Case(batch=1, seqlen_q=70, seqlen_k=130, bias="bhqk"),
    "softcap_window": Case(batch=1, seqlen_q=70, seqlen_k=130, window=(40, 9), softcap=2.0),
    "packed": Case(sequences=((40, 70), (5, 0), (17, 90))),
    "split": Case(batch=1, seqlen_q=5, seqlen_k=260, options=cuflash.Options(num_splits=3)),
    "odd_head_dim": Case(batch=1, head_dim=33, head_dim_v=33, seqlen_q=40, seqlen_k=130),
    "wide_head": Case(batch=1, head_dim=320, head_dim_v=320, seqlen_q=20, seqlen_k=70),
    "bfloat16": Case(batch=1, dtype="bfloat16", head_dim=128, head_dim_v=128, seqlen_q=70, seqlen_k=130),
}
ORDERS = [{"warp_order": seed, "copies": copies} for seed in (None, 0, 1, 2, 3) for copies in ("late", "early")]


class Ordered(EmulatedDevice):
    """The emulated device with a scheduling of its own."""

    def __init__(self, **scheduling: Any) -> None:
        super().__init__()
        self.scheduling = scheduling

    def run(self, function: Any, *arrays: Any, **keywords: Any) -> Any:
        with cuflash.emulate(self.arch, **self.scheduling):
            return function(*arrays, **keywords)


@cache
def in_step(name: str) -> Any:
    """The results of a case with warps in step and late copies."""
    return call(Ordered(**ORDERS[0]), CASES[name], make(CASES[name]))


@pytest.mark.parametrize("order", ORDERS[1:], ids=lambda order: f"warps_{order['warp_order']}_{order['copies']}")
@pytest.mark.parametrize("name", CASES)
def test_same_bits(name: str, order: dict[str, Any]) -> None:
    got = call(Ordered(**order), CASES[name], make(CASES[name]))
    for result, expected in zip(got, in_step(name), strict=True):
        np.testing.assert_array_equal(result, expected)
