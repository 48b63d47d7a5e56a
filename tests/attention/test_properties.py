"""Any problem, any strides, any packing, drawn by hypothesis."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cuflash
from tests import strategies
from tests.attention.cases import WIDE_DTYPES, Case, Layout, call, check, embed, hold_to_oracle, make
from tests.devices import ALL_DTYPES, CpuDevice

# Examples share a device: it keeps no state between runs.
with_device = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@with_device
@given(case=strategies.cases(ALL_DTYPES, (40, 64)))
def test_any_problem(device: Any, case: Case) -> None:
    check(device, case)


@with_device
@given(case=strategies.cases(("float16", "float32"), (64,), packed=True))
def test_any_packing(device: Any, case: Case) -> None:
    check(device, case)


@settings(max_examples=150)
@given(case=strategies.cases(WIDE_DTYPES, tuple(range(1, 70))))
def test_any_problem_of_wide_dtypes(case: Case) -> None:
    check(CpuDevice(), case)


@settings(max_examples=150)
@given(case=strategies.cases(WIDE_DTYPES, tuple(range(1, 70)), packed=True))
def test_any_packing_of_wide_dtypes(case: Case) -> None:
    check(CpuDevice(), case)


@with_device
@given(layouts=st.tuples(*[strategies.layouts()] * 4), seqlen_q=st.integers(1, 40), seqlen_k=st.integers(1, 70))
def test_any_strides(device: Any, layouts: tuple[Layout, ...], seqlen_q: int, seqlen_k: int) -> None:
    """q, k, v and out lie in buffers of NaN, each its own way; the gaps of out are kept."""
    case = Case(head_dim=40, head_dim_v=40, num_heads=4, num_kv_heads=2).of_lengths(seqlen_q, seqlen_k)
    inputs = make(case)
    out = np.full(inputs.q.shape, 7, case.dtype)
    buffers = [embed(layout, x) for layout, x in zip(layouts, (*inputs[:3], out), strict=True)]

    def attend(*arrays: Any) -> Any:
        q, k, v, o = (layout.view(x) for layout, x in zip(layouts, arrays, strict=True))
        _, lse = cuflash.attention(q, k, v, out=o, return_lse=True)
        return arrays[3], lse

    written, lse = device.run(attend, *buffers)
    hold_to_oracle(case, inputs, layouts[3].view(written), lse)
    layouts[3].view(written)[...] = 7
    np.testing.assert_array_equal(written, embed(layouts[3], out))


@with_device
@given(edges=st.lists(st.integers(0, 90), max_size=6))
def test_keys_split_anywhere(device: Any, edges: list[int]) -> None:
    """Merged states of any partition of the keys are the whole."""
    case = Case(seqlen_q=20, seqlen_k=90)
    inputs = make(case)
    cuts = [0, *sorted(edges), 90]

    def attend(q: Any, k: Any, v: Any) -> Any:
        parts = [slice(*pair) for pair in pairwise(cuts)]
        states = [cuflash.attention(q, k[:, part], v[:, part], return_lse=True) for part in parts]
        return cuflash.merge_states([out for out, _ in states], [lse for _, lse in states])

    out, lse = device.run(attend, *inputs[:3])
    whole, lse_whole = call(device, case, inputs)
    np.testing.assert_allclose(out.astype(float), whole.astype(float), atol=4e-3)
    np.testing.assert_allclose(lse, lse_whole, atol=1e-5)
