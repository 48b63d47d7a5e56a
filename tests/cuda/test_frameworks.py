"""Arrays of torch and JAX on a GPU, over DLPack. Only frameworks that see the GPU are tested."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import cupy
import ml_dtypes
import numpy as np
import pytest

import cuflash
from tests.cuda.calls import SHAPE, SHORT, keep_busy

DTYPES = ("float16", "bfloat16")


def _torch_sees_the_gpu() -> bool:
    if find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def _jax_sees_the_gpu() -> bool:
    if find_spec("jax") is None:
        return False
    import jax

    return any(device.platform == "gpu" for device in jax.devices())


FRAMEWORKS = [name for name, sees in (("torch", _torch_sees_the_gpu), ("jax", _jax_sees_the_gpu)) if sees()]


def host_inputs(dtype: str) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.standard_normal(SHAPE).astype(getattr(ml_dtypes, dtype, dtype)) for _ in range(4)]


def to_torch(array: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(array.astype(np.float32)).cuda().to(getattr(torch, array.dtype.name))


def to_jax(array: np.ndarray) -> Any:
    import jax

    return jax.device_put(array, jax.devices("gpu")[0])


TO: dict[str, Callable[[np.ndarray], Any]] = {"torch": to_torch, "jax": to_jax}


def to_numpy(array: Any) -> np.ndarray:
    """float32 values of an array of any kind."""
    return array.float().cpu().numpy() if hasattr(array, "cpu") else np.asarray(array).astype(np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_results_are_the_frameworks_own_and_as_on_the_cpu(framework: str, dtype: str) -> None:
    host = host_inputs(dtype)
    want, want_lse = cuflash.attention(*host[:3], causal=True, return_lse=True)
    arrays = [TO[framework](array) for array in host]
    out, lse = cuflash.attention(*arrays[:3], causal=True, return_lse=True)
    assert type(out) is type(lse) is type(arrays[0])
    assert str(out.device) == str(arrays[0].device)
    assert out.dtype == arrays[0].dtype
    tolerance = 2 * float(ml_dtypes.finfo(host[0].dtype).eps)
    np.testing.assert_allclose(to_numpy(out), want.astype(np.float32), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(to_numpy(lse), want_lse, rtol=1e-5, atol=1e-5)
    _, pullback = cuflash.vjp(cuflash.attention, *arrays[:3], causal=True)
    _, on_the_host = cuflash.vjp(cuflash.attention, *host[:3], causal=True)
    for got, right in zip(pullback(arrays[3]), on_the_host(host[3]), strict=True):
        assert type(got) is type(arrays[0])
        right = right.astype(np.float32)
        np.testing.assert_allclose(to_numpy(got), right, rtol=0, atol=8 * tolerance * np.abs(right).max())


@pytest.mark.parametrize("framework", [name for name in FRAMEWORKS if name == "torch"])
def test_a_call_waits_for_the_stream_of_torch_and_torch_for_it(framework: str) -> None:
    """On a stream of torch that has something else to do first."""
    import torch

    fresh = [to_torch(array) for array in host_inputs("float16")[:3]]
    want = cuflash.attention(*fresh).clone()
    arrays = [torch.zeros_like(array) for array in fresh]
    cuflash.attention(*arrays)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        with cupy.cuda.ExternalStream(stream.cuda_stream):
            keep_busy(SHORT)
        for array, value in zip(arrays, fresh, strict=True):
            array.copy_(value)
        result = cuflash.attention(*arrays) + 1
    stream.synchronize()
    torch.testing.assert_close(result, want + 1, rtol=0, atol=0)


@pytest.mark.parametrize("framework", [name for name in FRAMEWORKS if name == "jax"])
def test_a_call_waits_for_what_jax_is_still_computing(framework: str) -> None:
    import jax
    import jax.numpy as jnp

    q, k, v = (to_jax(array) for array in host_inputs("float16")[:3])
    want = cuflash.attention(q, k, v)
    large = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.float32)

    @jax.jit
    def late(x: Any) -> Any:  # x itself, after a while
        product = large
        for _ in range(8):
            product = jnp.tanh(product @ large)
        return x + (0 * product.sum()).astype(x.dtype)

    jax.block_until_ready(late(q))
    result = cuflash.attention(late(q), k, v) + 1
    np.testing.assert_array_equal(np.asarray(result), np.asarray(want + 1))
