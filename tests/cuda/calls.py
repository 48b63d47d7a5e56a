"""Calls that every test here makes, and what keeps a stream busy meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import cupy
import numpy as np

import cuflash
from cuflash.jit import compile_cubin

SHAPE = (2, 200, 4, 64)
SHORT, LONG = 100_000_000, 1_000_000_000  # clocks: some 0.05 and 0.5 seconds

Arrays = tuple[cupy.ndarray, ...]


def _attention(q: cupy.ndarray, k: cupy.ndarray, v: cupy.ndarray, dout: cupy.ndarray) -> Arrays:
    return cuflash.attention(q, k, v, causal=True, return_lse=True, options=cuflash.Options(num_splits=1))


def _split(q: cupy.ndarray, k: cupy.ndarray, v: cupy.ndarray, dout: cupy.ndarray) -> Arrays:
    return cuflash.attention(q, k, v, return_lse=True, options=cuflash.Options(num_splits=3))


def _packed(q: cupy.ndarray, k: cupy.ndarray, v: cupy.ndarray, dout: cupy.ndarray) -> Arrays:
    return cuflash.attention_varlen(q[0], k[0], v[0], _edges(), _edges(), causal=True, return_lse=True)


@cache
def _edges() -> cupy.ndarray:
    return cupy.asarray(np.array([0, 63, 63, 200], np.int32))


def _gradients(q: cupy.ndarray, k: cupy.ndarray, v: cupy.ndarray, dout: cupy.ndarray) -> Arrays:
    return cuflash.vjp(cuflash.attention, q, k, v, causal=True)[1](dout)


def _hash_sparse(q: cupy.ndarray, k: cupy.ndarray, v: cupy.ndarray, dout: cupy.ndarray) -> Arrays:
    """Hashes are of the inputs: a replay sorts other ones."""
    hashes = [(x[..., 0] > 0) + 2 * (x[..., 1] > 0).astype(cupy.int64) for x in (q, k)]
    out, pullback = cuflash.vjp(cuflash.sparse.hash_sparse_attention, q, k, v, *hashes)
    return (out, *pullback(dout))


def _qk_sparse(q: cupy.ndarray, k: cupy.ndarray, v: cupy.ndarray, dout: cupy.ndarray) -> Arrays:
    out, pullback = cuflash.vjp(cuflash.sparse.qk_sparse_attention, q, k, v, q[..., 0] > 0, k[..., 0] > 0.5)
    return (out, *pullback(dout))


CALLS: dict[str, Callable[..., Arrays]] = {
    "attention": _attention, "split": _split, "packed": _packed, "gradients": _gradients, "hash sparse": _hash_sparse,
    "qk sparse": _qk_sparse,
}  # fmt: skip


def inputs(seed: int) -> list[cupy.ndarray]:
    """q, k, v and a cotangent of the output, on the device when this returns."""
    rng = np.random.default_rng(seed)
    arrays = [cupy.asarray(rng.standard_normal(SHAPE).astype(np.float16)) for _ in range(4)]
    cupy.cuda.Device().synchronize()
    return arrays


def expected(name: str, arrays: list[cupy.ndarray]) -> list[np.ndarray]:
    """The call's results on the default stream."""
    return [cupy.asnumpy(result) for result in CALLS[name](*arrays)]


def assert_same(results: list[np.ndarray], want: list[np.ndarray]) -> None:
    """But for the order in which gradients are summed."""
    for got, right in zip(results, want, strict=True):
        np.testing.assert_allclose(got.astype(np.float64), right.astype(np.float64), rtol=0, atol=1e-2)


@dataclass(frozen=True)
class _Wait:
    """A kernel of one thread that does nothing for some clocks."""

    entry = "wait"

    def unit(self) -> str:
        return (
            'extern "C" __global__ void wait(long long clocks) {\n'
            "    const long long start = clock64();\n"
            "    while (clock64() - start < clocks) {}\n"
            "}\n"
        )


@cache
def _wait(device_id: int) -> Any:
    capability = cupy.cuda.Device(device_id).compute_capability
    return cupy.RawModule(path=str(compile_cubin(_Wait(), f"sm_{capability}"))).get_function(_Wait.entry)


def keep_busy(clocks: int) -> None:
    """CuPy's current stream has something to do for so long."""
    _wait(cupy.cuda.Device().id)((1,), (1,), (np.int64(clocks),))
