"""Attention with gradients for torch and JAX, made of cuflash calls: two adapters to copy into your own code.

cuflash takes and returns arrays of both frameworks over DLPack, without a copy, but each framework wants to be told how
to differentiate: torch by an `autograd.Function`, JAX by a `custom_vjp`. Both are here, with all masks and a bias, and
their gradients are compared with those of the frameworks' own attention. Arrays are (batch, seqlen, heads, head_dim).

    python examples/04_torch_and_jax.py
    python examples/04_torch_and_jax.py --device cuda

Either framework may be absent: `pip install torch` or `pip install jax`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np

import cuflash

try:
    import torch
except ImportError:
    torch = None
try:
    import jax
except ImportError:
    jax = None

BATCH, SEQLEN, HEADS, KV_HEADS, HEAD_DIM = 2, 300, 8, 2, 64


if torch is not None:

    class TorchAttention(torch.autograd.Function):
        """`cuflash.attention` of torch tensors; use `torch_attention`."""

        @staticmethod
        def forward(ctx: Any, keywords: dict[str, Any], *tensors: torch.Tensor | None) -> torch.Tensor:
            q, k, v, bias = (None if x is None else x.detach() for x in tensors)
            out, ctx.pullback = cuflash.vjp(cuflash.attention, q, k, v, bias=bias, **keywords)
            ctx.save_for_backward(*tensors, out)
            return out

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            *_, bias, _ = ctx.saved_tensors  # an error if one was written to: the pullback reads their memory
            gradients = ctx.pullback(dout)
            return None, *gradients, *([None] if bias is None else [])

    @torch.compiler.disable
    def torch_attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None, **keywords: Any
    ) -> torch.Tensor:
        """`cuflash.attention` with its keywords but out and return_lse, and gradients of first order.

        `torch.compile` leaves it as it is, and compiles what is around it.
        """
        return TorchAttention.apply(keywords, q, k, v, bias)


def jax_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None, **keywords: Any
) -> jax.Array:
    """`cuflash.attention` with its keywords but out and return_lse, and reverse-mode gradients of first order.

    Called on arrays it runs where they are, on a CPU or a GPU. Where JAX traces (`jit`, `vmap`, `scan`) there are no
    arrays yet: XLA calls back when there are, with copies in host memory, which is right for a CPU and slow for a GPU.
    Between forward and backward JAX keeps arrays only, no pullback, so the backward runs the forward again.
    """

    def forward(q: Any, k: Any, v: Any, bias: Any = None) -> Any:
        return cuflash.attention(q, k, v, bias=bias, **keywords)

    def backward(dout: Any, q: Any, k: Any, v: Any, bias: Any = None) -> tuple[Any, ...]:
        _, pullback = cuflash.vjp(cuflash.attention, q, k, v, bias=bias, **keywords)
        return pullback(dout)

    @jax.custom_vjp
    def attention(*arrays: Any) -> Any:
        q, _, v, *_ = arrays
        return call(forward, jax.ShapeDtypeStruct((*q.shape[:-1], v.shape[-1]), q.dtype), *arrays)

    attention.defvjp(
        lambda *arrays: (attention(*arrays), arrays),
        lambda arrays, dout: call(backward, arrays, dout, *arrays),
    )
    return attention(q, k, v) if bias is None else attention(q, k, v, bias)


def call(function: Callable[..., Any], like: Any, *arrays: Any) -> Any:
    """function(*arrays), now, or when XLA has arrays of what JAX traces now; `like` has the result's shapes and dtypes.

    A callback gets and returns NumPy arrays: if it used JAX, the two could wait for each other.
    """
    if not any(isinstance(array, jax.core.Tracer) for array in arrays):
        return function(*arrays)
    return jax.pure_callback(lambda *a: function(*map(np.asarray, a)), like, *arrays, vmap_method="sequential")


def main() -> None:
    parser = argparse.ArgumentParser(description="Gradients of cuflash and of torch's and JAX's own attention.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    device = parser.parse_args().device

    rng = np.random.default_rng(0)
    heads_of = {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS, "dout": HEADS}
    q, k, v, dout = (rng.standard_normal((BATCH, SEQLEN, n, HEAD_DIM), np.float32) for n in heads_of.values())
    bias = rng.standard_normal((1, HEADS, SEQLEN, SEQLEN), np.float32)

    print("largest difference from the framework's own gradient, relative to that gradient's largest entry")
    print(f"{'':14}{'dq':>10}{'dk':>10}{'dv':>10}{'dbias':>10}")
    if torch is None:
        print("torch is not installed")
    else:
        compare_torch(device, q, k, v, bias, dout)
    if jax is None:
        print("JAX is not installed")
    else:
        compare_jax(device, q, k, v, bias, dout)


def compare_torch(device: str, *arrays: np.ndarray) -> None:
    *leaves, dout = (torch.from_numpy(x).to(device) for x in arrays)
    q, k, v, bias = (x.requires_grad_() for x in leaves)
    visible = torch.ones(SEQLEN, SEQLEN, dtype=torch.bool, device=device).tril()
    own = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=bias.masked_fill(~visible, -torch.inf), enable_gqa=True
    ).transpose(1, 2)
    out = torch_attention(q, k, v, bias, causal=True)
    ours, theirs = (torch.autograd.grad(x, (q, k, v, bias), dout) for x in (out, own))
    print_row("torch", (x.cpu() for x in ours), (x.cpu() for x in theirs))


def compare_jax(device: str, *arrays: np.ndarray) -> None:
    *primals, dout = (jax.device_put(x, jax.devices(device)[0]) for x in arrays)

    def gradients(attention: Callable[..., jax.Array]) -> tuple[jax.Array, ...]:
        _, pullback = jax.vjp(attention, *primals)
        return pullback(dout)

    with jax.default_matmul_precision("highest"):
        own = gradients(partial(jax.nn.dot_product_attention, is_causal=True))
    attention = partial(jax_attention, causal=True)
    print_row("JAX", gradients(attention), own)
    print_row("JAX, in jit", gradients(jax.jit(attention)), own)


def print_row(name: str, gradients: Iterable[Any], own: Iterable[Any]) -> None:
    pairs = [(np.asarray(ours), np.asarray(theirs)) for ours, theirs in zip(gradients, own, strict=True)]
    print(f"{name:14}" + "".join(f"{np.abs(a - b).max() / np.abs(b).max():10.1e}" for a, b in pairs))


if __name__ == "__main__":
    main()
