"""Who is benchmarked: cuflash and the peers that this machine can import, behind one small interface."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import numpy as np

from benchmarks.cases import Case

Inputs = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Run:
    """One contender on one case: `call` starts the computation, `wait` ends when it is done, `to_numpy` reads it."""

    call: Callable[[], Any]
    wait: Callable[[Any], None]
    to_numpy: Callable[[Any], np.ndarray]  # (batch, seqlen, heads, head_dim)
    on_null_stream: bool = False  # GPU work that events on CUDA's default stream can time


@dataclass(frozen=True)
class Contender:
    """`prepare(case, inputs)` returns a Run, or raises what the library raises for a case that it cannot take."""

    name: str
    version: str
    prepare: Callable[[Case, Inputs], Run]


def find(device: str) -> list[Contender]:
    """Every contender that can be imported for "cpu" or "cuda", cuflash first."""
    found = [Contender("cuflash", version("cuflash") if _installed("cuflash") else "source tree", _cuflash(device))]
    if find_spec("torch"):
        found.extend(_torch_contenders(device))
    if device == "cuda" and find_spec("jax"):
        found.append(Contender("jax cudnn", version("jax"), _jax_cudnn))
    return found


def _installed(name: str) -> bool:
    try:
        return bool(version(name))
    except ModuleNotFoundError:
        return False


def _cuflash(device: str) -> Callable[[Case, Inputs], Run]:
    def prepare(case: Case, inputs: Inputs) -> Run:
        import cuflash

        keywords = {"causal": case.mask == "causal"}
        if case.left is not None:
            keywords["window"] = (case.left, case.right)
        if device == "cpu":
            return Run(lambda: cuflash.attention(*inputs, **keywords), lambda out: None, np.asarray)
        import cupy

        arrays = [cupy.asarray(a) for a in inputs]
        return Run(
            call=lambda: cuflash.attention(*arrays, **keywords),
            wait=lambda out: cupy.cuda.Stream.null.synchronize(),
            to_numpy=cupy.asnumpy,
            on_null_stream=True,
        )

    return prepare


def _torch_contenders(device: str) -> Iterator[Contender]:
    from torch.nn.attention import SDPBackend

    backends = {"torch math": SDPBackend.MATH, "torch flash": SDPBackend.FLASH_ATTENTION}
    if device == "cuda":
        backends["torch efficient"] = SDPBackend.EFFICIENT_ATTENTION
        backends["torch cudnn"] = SDPBackend.CUDNN_ATTENTION
    for name, backend in backends.items():
        yield Contender(name, version("torch"), lambda case, inputs, b=backend: _torch_run(case, inputs, device, b))


def _torch_run(case: Case, inputs: Inputs, device: str, backend: Any) -> Run:
    import torch
    from torch.nn.attention import sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    q, k, v = (_to_torch(a).to(device).transpose(1, 2) for a in inputs)  # views (batch, heads, seqlen, head_dim)
    mask = None if case.left is None else torch.from_numpy(case.visible()).to(device)

    def call() -> Any:
        with torch.inference_mode(), sdpa_kernel(backend):
            return scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=case.mask == "causal", enable_gqa=case.num_heads != case.num_kv_heads
            )

    def wait(out: Any) -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def to_numpy(out: Any) -> np.ndarray:
        wide = out.dtype if out.dtype == torch.float64 else torch.float32
        return out.to(wide).cpu().transpose(1, 2).numpy()

    return Run(call, wait, to_numpy, on_null_stream=device == "cuda")


def _to_torch(array: np.ndarray) -> Any:
    import torch

    if array.dtype.name == "bfloat16":  # torch.from_numpy does not know ml_dtypes
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _jax_cudnn(case: Case, inputs: Inputs) -> Run:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # else JAX takes most of the GPU's memory
    import jax

    window = None if case.left is None else (case.left, case.right)
    call = jax.jit(
        lambda q, k, v: jax.nn.dot_product_attention(
            q, k, v, is_causal=case.mask == "causal", local_window_size=window, implementation="cudnn"
        )
    )
    gpu = jax.devices("gpu")[0]
    arrays = [jax.device_put(a, gpu) for a in inputs]
    return Run(lambda: call(*arrays), jax.block_until_ready, np.asarray)
