"""The combine kernel on states of the caller: any dtype, any strides, states that saw nothing."""

import math

import ml_dtypes
import numpy as np
import pytest

from cuflash.emulator import Device
from cuflash.plan.config import MergeConfig, state_dtype
from cuflash.plan.forward import plan_combine
from cuflash.plan.params import COMBINE_PARAMS, MERGE_PARAMS
from tests.kernels.launch import launch

EPS = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-21, "float64": 2.0**-50}


def merged(outs, lses):
    """o and lse of states (n, batch, tokens, heads, dim) and (n, batch, heads, tokens), in float64."""
    lses = lses.astype(np.float64)
    peak = lses.max(axis=0)
    shift = np.where(np.isneginf(peak), 0, peak)
    weights = np.exp(lses - shift)
    total = weights.sum(axis=0)
    with np.errstate(divide="ignore"):
        lse = shift + np.log(total)
    weights = np.moveaxis(weights / np.where(total == 0, 1, total), 2, 3)[..., None]
    return np.where(weights == 0, 0, outs.astype(np.float64) * weights).sum(axis=0), lse


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("dim", [1, 33, 64, 300])
@pytest.mark.parametrize("states", [1, 2, 33, 128])
def test_combine(dtype, dim, states):
    rng = np.random.default_rng(states)
    kind = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    sums = np.dtype(state_dtype(dtype))
    batch, tokens, heads = 2, 5, 3
    outs = rng.standard_normal((states, batch, tokens, heads, dim)).astype(kind)
    lses = (50 * rng.standard_normal((states, batch, heads, tokens))).astype(sums)
    lses[:, 0, 0, 0] = -np.inf  # a row that no state saw
    lses[0, 1, 2, 3] = -np.inf
    outs[0, 1, 3, 2] = np.nan  # what a state that saw nothing holds does not matter
    lses[:, 0, 1, :] += 1e4

    device = Device("sm_80")
    record = np.zeros((), MERGE_PARAMS)
    rows = record["rows"]
    held = [(device.to_device(o, name="o"), device.to_device(x, name="lse")) for o, x in zip(outs, lses, strict=True)]
    record["states"][:states] = [o.pointer for o, _ in held]
    record["lses"][:states] = [lse.pointer for _, lse in held]
    out, lse = device.empty(outs.shape[1:], kind, name="out"), device.empty(lses.shape[1:], sums, name="lse")
    rows["o"], rows["lse"] = out.pointer, lse.pointer
    rows["state_strides"] = rows["o_strides"] = (tokens * heads * dim, heads * dim, dim)
    rows["state_lse_strides"] = rows["lse_strides"] = (heads * tokens, tokens, 1)
    rows["num_states"], rows["num_heads"], rows["seqlen_q"] = states, heads, tokens
    rows["rows"] = batch * heads * tokens
    plan = plan_combine(
        dtype, dtype, dim, batch * heads * tokens,
        num_states=states, load_bytes=math.gcd(16, outs.itemsize * dim), kind=MergeConfig,
    )  # fmt: skip
    launch(device, plan, record)

    want, want_lse = merged(outs, lses)
    got = out.to_host().astype(np.float64)
    assert not got[0, 0, 0].any()
    np.testing.assert_allclose(got, want, rtol=0, atol=4 * EPS[dtype] * np.abs(want).max())
    close = 1e-6 if sums == np.float32 else 1e-15
    np.testing.assert_allclose(lse.to_host(), want_lse, rtol=close, atol=close)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("dim", [7, 64, 130])
@pytest.mark.parametrize("counts", [(1, 1), (9, 30), (300, 2)])
def test_combine_of_states_in_a_workspace(dtype, dim, counts):
    """Of each batch entry as many states as a table says; other slots hold nothing that may be read."""
    rng = np.random.default_rng(dim)
    heads, before = 3, 2
    slots = before + sum(counts)
    outs = rng.standard_normal((slots, 1, 1, heads, dim)).astype(dtype)
    lses = (10 * rng.standard_normal((slots, 1, heads, 1))).astype(dtype)
    firsts = (before, before + counts[0])
    device = Device("sm_80")
    record = np.zeros((), COMBINE_PARAMS)
    o_states, lse_states = device.to_device(outs, name="o_partial"), device.to_device(lses, name="lse_partial")
    table = device.to_device(np.array(list(zip(firsts, counts, strict=True)), np.int32), name="shares")
    record["states"], record["lses"], record["shares"] = o_states.pointer, lse_states.pointer, table.pointer
    out, lse = (
        device.empty((2, 1, heads, dim), outs.dtype, name="out"),
        device.empty((2, heads, 1), lses.dtype, name="lse"),
    )
    record["o"], record["lse"] = out.pointer, lse.pointer
    record["state_stride"], record["state_lse_stride"] = heads * dim, heads
    record["state_strides"], record["state_lse_strides"] = (0, heads * dim, dim), (0, 1, 1)
    record["o_strides"], record["lse_strides"] = (heads * dim, heads * dim, dim), (heads, 1, 1)
    record["num_states"], record["num_heads"], record["seqlen_q"], record["rows"] = slots, heads, 1, 2 * heads
    plan = plan_combine(
        dtype, dtype, dim, 2 * heads, num_states=slots, load_bytes=math.gcd(16, outs.itemsize * dim)
    )  # fmt: skip
    launch(device, plan, record)
    for b, (first, count) in enumerate(zip(firsts, counts, strict=True)):
        want, want_lse = merged(outs[first : first + count], lses[first : first + count])
        np.testing.assert_allclose(out.to_host()[b], want[0], rtol=0, atol=4 * EPS[dtype] * np.abs(want).max())
        close = 1e-6 if dtype == "float32" else 1e-15
        np.testing.assert_allclose(lse.to_host()[b], want_lse[0], rtol=close, atol=close)
