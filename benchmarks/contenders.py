"""Who is benchmarked: cuflash and the peers that this machine can import, behind one small interface."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
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
    to_numpy: Callable[[Any], Any]  # arrays (batch, seqlen, heads, head_dim): out, or dq, dk, dv
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


def find_backward(device: str, with_forward: bool) -> list[Contender]:
    """As `find`, for the gradients of q, k and v from `cotangent(inputs)`, with or without the forward."""
    source = version("cuflash") if _installed("cuflash") else "source tree"
    found = [Contender("cuflash", source, _cuflash_backward(device, with_forward))]
    if device == "cuda":
        any_order = _cuflash_backward(device, with_forward, deterministic=False)
        found.append(Contender("cuflash any order", source, any_order))
    if find_spec("torch"):
        found.extend(_torch_backward_contenders(device, with_forward))
    return found


def cotangent(inputs: Inputs) -> np.ndarray:
    """Standard normal, like the output."""
    return _cotangent((*inputs[0].shape[:3], inputs[2].shape[3]), inputs[0].dtype)


@lru_cache(maxsize=1)
def _cotangent(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return np.random.default_rng(2).standard_normal(shape, np.float32).astype(dtype)


def _installed(name: str) -> bool:
    try:
        return bool(version(name))
    except ModuleNotFoundError:
        return False


def _cuflash(device: str) -> Callable[[Case, Inputs], Run]:
    def prepare(case: Case, inputs: Inputs) -> Run:
        arrays: list[Any] = [*inputs, *case.marks()]
        function, keywords = case.function, case.keywords
        if device == "cpu":
            return Run(lambda: function(*arrays, **keywords), lambda out: None, np.asarray)
        import cupy

        arrays = [cupy.asarray(a) for a in arrays]
        return Run(
            call=lambda: function(*arrays, **keywords),
            wait=lambda out: cupy.cuda.Stream.null.synchronize(),
            to_numpy=cupy.asnumpy,
            on_null_stream=True,
        )

    return prepare


def _cuflash_backward(device: str, with_forward: bool, deterministic: bool = True) -> Callable[[Case, Inputs], Run]:
    def prepare(case: Case, inputs: Inputs) -> Run:
        import cuflash

        function, keywords = case.function, case.keywords
        if not deterministic:
            keywords["options"] = replace(keywords.get("options", cuflash.Options()), deterministic=False)

        arrays: list[Any] = [*inputs, *case.marks(), cotangent(inputs)]
        if device == "cuda":
            import cupy

            arrays = [cupy.asarray(a) for a in arrays]
        *operands, dout = arrays

        def differentiate() -> Any:
            return cuflash.vjp(function, *operands, **keywords)[1]

        pullback = differentiate()
        call = (lambda: differentiate()(dout)) if with_forward else (lambda: pullback(dout))
        if device == "cpu":
            return Run(call, lambda gradients: None, lambda gradients: gradients)
        return Run(
            call=call,
            wait=lambda gradients: cupy.cuda.Stream.null.synchronize(),
            to_numpy=lambda gradients: tuple(map(cupy.asnumpy, gradients)),
            on_null_stream=True,
        )

    return prepare


def _torch_contenders(device: str) -> Iterator[Contender]:
    for name, backend in _torch_backends(device).items():

        def prepare(case: Case, inputs: Inputs, backend: Any = backend) -> Run:
            return torch_run(inputs, device, _torch_attention(case, device, backend))

        yield Contender(name, version("torch"), prepare)


def _torch_backward_contenders(device: str, with_forward: bool) -> Iterator[Contender]:
    for name, backend in _torch_backends(device).items():

        def prepare(case: Case, inputs: Inputs, backend: Any = backend) -> Run:
            return torch_backward_run(inputs, device, _torch_attention(case, device, backend), with_forward)

        yield Contender(name, version("torch"), prepare)


def _torch_backends(device: str) -> dict[str, Any]:
    from torch.nn.attention import SDPBackend

    backends = {"torch math": SDPBackend.MATH, "torch flash": SDPBackend.FLASH_ATTENTION}
    if device == "cuda":
        backends["torch efficient"] = SDPBackend.EFFICIENT_ATTENTION
        backends["torch cudnn"] = SDPBackend.CUDNN_ATTENTION
    return backends


def torch_run(inputs: Inputs, device: str, attend: Callable[..., Any]) -> Run:
    """The run of a function of q, k, v as views (batch, heads, seqlen, head_dim)."""
    import torch

    arrays = _torch_views(inputs, device)

    def call() -> Any:
        with torch.inference_mode():
            return attend(*arrays)

    return Run(call, _torch_wait(device), _torch_to_numpy, on_null_stream=device == "cuda")


def torch_backward_run(inputs: Inputs, device: str, attend: Callable[..., Any], with_forward: bool) -> Run:
    """The same of its gradients."""
    import torch

    arrays = _torch_views(inputs, device)
    for array in arrays:
        array.requires_grad_()
    (dout,) = _torch_views((cotangent(inputs),), device)
    out = attend(*arrays)

    def call() -> Any:
        result = attend(*arrays) if with_forward else out
        return torch.autograd.grad(result, arrays, dout, retain_graph=not with_forward)

    def to_numpy(gradients: Any) -> tuple[np.ndarray, ...]:
        return tuple(map(_torch_to_numpy, gradients))

    return Run(call, _torch_wait(device), to_numpy, on_null_stream=device == "cuda")


def _torch_attention(case: Case, device: str, backend: Any) -> Callable[..., Any]:
    """torch's attention with the backend."""
    import torch
    from torch.nn.attention import sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    torch.backends.cuda.matmul.allow_tf32 = case.dtype == "tf32"
    mask = None if case.mask in ("full", "causal") else torch.from_numpy(case.visible()).to(device)

    def attend(q: Any, k: Any, v: Any) -> Any:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=case.mask == "causal", enable_gqa=case.num_heads != case.num_kv_heads
            )

    return attend


def _torch_views(arrays: Sequence[np.ndarray], device: str) -> list[Any]:
    return [_to_torch(array).to(device).transpose(1, 2) for array in arrays]


def _torch_wait(device: str) -> Callable[[Any], None]:
    import torch

    return (lambda out: torch.cuda.synchronize()) if device == "cuda" else (lambda out: None)


def _torch_to_numpy(out: Any) -> np.ndarray:
    import torch

    wide = out.dtype if out.dtype == torch.float64 else torch.float32
    return out.detach().to(wide).cpu().transpose(1, 2).numpy()


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
