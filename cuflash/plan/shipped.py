"""The configurations that budgets, ahead-of-time compilation and documentation walk over."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from math import gcd

from cuflash.errors import InvalidShapeError
from cuflash.plan.arch import Arch, arch_named
from cuflash.plan.backward import check_gradient_shape, plan_backward
from cuflash.plan.config import ELEMENT_BYTES
from cuflash.plan.forward import max_head_dim, plan_forward
from cuflash.plan.kernel import KernelConfig
from cuflash.problem import Problem, default_scale

HEAD_DIMS = (32, 64, 80, 96, 128, 192, 256, 512)
DTYPES = ("float16", "bfloat16")
LONG = 4096


def shipped_configs(
    arch: str, dtypes: Sequence[str] = DTYPES, head_dims: Sequence[int] = HEAD_DIMS
) -> tuple[KernelConfig, ...]:
    """What the plan chooses on an architecture for the common problems: each once, in a fixed order.

    Any dtypes and head dimensions that the kernels take; rows are taken as contiguous.
    """
    chosen: dict[KernelConfig, None] = {}
    for dtype in dtypes:
        for head_dim in head_dims:
            row_bytes = gcd(16, ELEMENT_BYTES[dtype] * head_dim)
            for problem in _problems(head_dim, dtype):
                chosen |= dict.fromkeys(_configs(problem, arch_named(arch), row_bytes))
    return tuple(chosen)


def _configs(problem: Problem, arch: Arch, row_bytes: int) -> list[KernelConfig]:
    """Of both passes as far as their tiles fit, with the gradient of a bias as large as the scores."""
    if problem.head_dim > max_head_dim(problem.dtype, arch):
        return []
    forward = plan_forward(problem, arch, load_bytes=row_bytes, store_bytes=row_bytes)
    launches = [forward.forward, forward.combine]
    bias_shape = (problem.batch, problem.num_heads, problem.seqlen_q, problem.seqlen_k) if problem.bias_dtype else None
    with suppress(InvalidShapeError):
        check_gradient_shape(problem.dtype, problem.head_dim, problem.head_dim_v, arch)
        backward = plan_backward(problem, arch, load_bytes=row_bytes, store_bytes=row_bytes, bias_shape=bias_shape)
        launches += backward.launches
    return [launch.config for launch in launches if launch is not None]


def _problems(head_dim: int, dtype: str) -> list[Problem]:
    full = Problem(
        batch=8, seqlen_q=LONG, seqlen_k=LONG, num_heads=16, num_kv_heads=16, head_dim=head_dim,
        head_dim_v=head_dim, dtype=dtype, scale=default_scale(head_dim),
    )  # fmt: skip
    causal = replace(full, right=0)
    packed = {"total_q": 8 * LONG, "total_k": 8 * LONG}
    return [
        full,
        causal,
        replace(causal, left=512),
        replace(full, bias_dtype=dtype),
        replace(causal, bias_dtype=dtype),
        replace(causal, softcap=30.0),
        replace(full, **packed),  # type: ignore[arg-type]
        replace(causal, **packed),  # type: ignore[arg-type]
        replace(causal, batch=1, seqlen_q=1, num_kv_heads=4),  # decode
        replace(full, batch=1, seqlen_q=64, num_heads=4, num_kv_heads=4, seqlen_k=64 * LONG),  # few tiles: split
    ]
