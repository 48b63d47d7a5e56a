"""A packed problem whose tokens lie 2^32 elements behind the arrays' addresses, on an emulated GPU with little memory.

Its only sequence begins at token START and tokens are STRIDE elements apart, so that no offset fits 32 bits.
The tokens before do not exist: the addresses that the kernel gets point START tokens before the arrays that do.
"""

from __future__ import annotations

import numpy as np

import cuflash.jit
from cuflash import records
from cuflash.emulator import Device
from cuflash.layout import Layout
from cuflash.options import Options
from cuflash.plan.arch import arch_named
from cuflash.plan.forward import plan_forward
from cuflash.problem import Problem
from tests.attention.cases import Case, Inputs, hold_to_oracle, make

ARCH = "sm_80"
START, STRIDE = 2**14, 2**18
CASE = Case(num_heads=1, num_kv_heads=1, causal=True, sequences=((17, 20),))


def check_far() -> None:
    """Run the problem and hold its result to the oracle."""
    inputs = make(CASE)
    hold_to_oracle(CASE, inputs, *_run(inputs))


def _run(inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    (len_q, len_k), dim = CASE.sequences[0], CASE.head_dim
    problem = Problem(
        1, len_q, len_k, 1, 1, dim, dim, CASE.dtype, dim**-0.5, right=0, total_q=START + len_q, total_k=START + len_k
    )
    plan = plan_forward(problem, arch_named(ARCH), load_bytes=16, store_bytes=16, options=Options(num_splits=1))
    layouts = [Layout((START + n, 1, dim), (2 * STRIDE, 2 * dim, 2), np.dtype(np.float16), 0) for n in (len_q, len_k)]
    q_layout, k_layout = layouts
    record = records.forward_record(problem, plan, q_layout, k_layout, k_layout, None, q_layout, (1, START + len_q))
    device = Device(ARCH)
    out = _spaced(np.zeros_like(inputs.q))
    arrays = {name: device.to_device(_spaced(x), name=name) for name, x in zip("qkv", inputs[:3], strict=True)}
    arrays["o"] = device.empty_like(out, name="o")
    for name, array in arrays.items():
        record[name] = array.pointer - START * STRIDE * 2
    lse = device.empty((1, len_q), np.float32, name="lse")
    record["lse"] = lse.pointer - START * 4
    for name, length in (("cu_seqlens_q", len_q), ("cu_seqlens_k", len_k)):
        arrays[name] = device.to_device(np.array([START, START + length], np.int32), name=name)
        record[name] = arrays[name].pointer
    launch = plan.forward
    kernel = device.load(cuflash.jit.compile_ptx(launch.config, ARCH)).kernel(launch.config.entry)
    kernel.launch(launch.grid, launch.block, (record,), shared_bytes=launch.shared_bytes)
    return arrays["o"].to_host(), lse.to_host()


def _spaced(array: np.ndarray) -> np.ndarray:
    """A copy of (tokens, 1, dim) with tokens STRIDE elements apart."""
    buffer = np.empty(((len(array) - 1) * STRIDE + array[0].size,), array.dtype)
    view = np.lib.stride_tricks.as_strided(buffer, array.shape, (2 * STRIDE, 2 * array.shape[2], 2))
    view[...] = array
    return view
