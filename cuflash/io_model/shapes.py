"""From shapes of C-contiguous arrays to problems and plans."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cuflash import check
from cuflash.errors import InvalidDtypeError, InvalidShapeError
from cuflash.layout import ALIGNMENT, Layout, contiguous_strides
from cuflash.masks import Mask
from cuflash.options import Options
from cuflash.plan.arch import Arch
from cuflash.plan.backward import BackwardPlan, plan_backward
from cuflash.plan.config import ELEMENT_BYTES
from cuflash.plan.forward import ForwardPlan, plan_forward
from cuflash.problem import Problem


def problem_of_shapes(
    q_shape: Sequence[int],
    k_shape: Sequence[int] | None = None,
    v_shape: Sequence[int] | None = None,
    *,
    dtype: str = "bfloat16",
    causal: bool = False,
    window: Sequence[int | None] | None = None,
    mask: Mask | None = None,
    softcap: float | None = None,
    bias_shape: Sequence[int] | None = None,
    bias_dtype: str | None = None,
) -> Problem:
    """The problem that contiguous arrays of these shapes pose; parameters and errors as `compare`."""
    k_shape = q_shape if k_shape is None else k_shape
    v_shape = k_shape if v_shape is None else v_shape
    bias = None if bias_shape is None else layout_of_shape("bias", bias_shape, bias_dtype or dtype)
    q, k, v = (layout_of_shape(n, shape, dtype) for n, shape in (("q", q_shape), ("k", k_shape), ("v", v_shape)))
    return check.problem(q, k, v, bias, check.scores(causal, window, None, softcap, mask), None)


def layout_of_shape(name: str, shape: Sequence[int], dtype: str) -> Layout:
    """That of a C-contiguous array; raises what a wrong shape or dtype raises."""
    known = {text: kind for kind, text in check.DTYPE_NAMES.items()}
    if dtype not in known:
        raise InvalidDtypeError(f"{name}.dtype = {dtype!r}: must be one of {', '.join(known)}")
    sizes = tuple(check.whole_number(f"{name}_shape[{i}]", size) for i, size in enumerate(shape))
    return Layout(sizes, contiguous_strides(sizes, known[dtype].itemsize), known[dtype], 0)


def plan_contiguous(
    problem: Problem, arch: Arch, options: Options | None = None, sm_count: int | None = None
) -> ForwardPlan:
    """The plan for C-contiguous arrays, whose rows are aligned as their length lets them be."""
    _require(problem, ("batch", "seqlen_q", "num_heads"))
    row, row_v = _row_bytes(problem)
    return plan_forward(
        problem,
        arch,
        load_bytes=math.gcd(ALIGNMENT, row, row_v),
        store_bytes=math.gcd(ALIGNMENT, row_v),
        options=options,
        sm_count=sm_count,
    )


def plan_backward_contiguous(
    problem: Problem, arch: Arch, options: Options | None = None, bias_shape: Sequence[int] | None = None
) -> BackwardPlan:
    """The same of a pullback; `bias_shape` is that of the bias, of any rank."""
    _require(problem, ("batch", "seqlen_q", "seqlen_k", "num_heads"))
    access = math.gcd(ALIGNMENT, *_row_bytes(problem))
    return plan_backward(
        problem,
        arch,
        load_bytes=access,
        store_bytes=access,
        bias_shape=None if bias_shape is None else in_rank_4(bias_shape),
        options=options,
    )


def in_rank_4(bias_shape: Sequence[int]) -> tuple[int, int, int, int]:
    """(batch, head, query, key), 1 where the bias lacks the axis."""
    return (*(1,) * (4 - len(bias_shape)), *bias_shape)  # type: ignore[return-value]


def _row_bytes(problem: Problem) -> tuple[int, int]:
    """Of a row of q and k, and of v and out."""
    element = ELEMENT_BYTES[problem.dtype]
    return problem.head_dim * element, problem.head_dim_v * element


def _require(problem: Problem, names: Sequence[str]) -> None:
    sizes = tuple(getattr(problem, name) for name in names)
    if 0 in sizes:
        raise InvalidShapeError(f"{', '.join(names)} = {sizes}: must be >= 1 each for a kernel to run")
