"""Bytes and operations of attention algorithms, by problem and configuration.

Forward, each algorithm as a `Cost`:

- `standard`: three array operations that keep the scores S and the weights P in memory, Θ(N·d + N²) bytes.
- `chunked`: Rabe & Staats 2021, the same operations on chunks: O(√N) memory, but still Θ(N²) bytes.
- `flash_forward`: the kernels of this package, Θ(N²·d²/M) bytes for an on-chip memory of M (Dao et al. 2022).
- `paged_forward`: the same over the blocks of a cache, a token's key and value once for all query heads of a group.

Backward, from cotangents to gradients:

- `standard_backward`: five array operations on P, dP and dS in memory, Θ(N·d + N²) bytes.
- `flash_backward`: the kernels of this package, which compute P again, Θ(N²·d²/M) bytes, O(N) memory.

The costs of flash are exact: a test compares them with the bytes that the emulated device counts, array by array.
`compare` is the way in for those who have shapes rather than a problem and a plan.
"""

from __future__ import annotations

from collections.abc import Sequence

from cuflash import check
from cuflash.io_model.backward import (
    backward_costs,
    compulsory_backward_bytes,
    flash_backward,
    standard_backward,
    useful_backward_flops,
    workspace_bytes,
)
from cuflash.io_model.cost import Cost, Roofline
from cuflash.io_model.forward import chunked, compulsory_bytes, costs, flash_forward, standard, useful_flops
from cuflash.io_model.paged import paged_forward
from cuflash.io_model.shapes import plan_backward_contiguous, plan_contiguous, problem_of_shapes
from cuflash.masks import Mask
from cuflash.options import Options
from cuflash.plan.arch import arch_named

__all__ = [
    "Cost",
    "Roofline",
    "backward_costs",
    "chunked",
    "compare",
    "compulsory_backward_bytes",
    "compulsory_bytes",
    "costs",
    "flash_backward",
    "flash_forward",
    "paged_forward",
    "plan_backward_contiguous",
    "plan_contiguous",
    "problem_of_shapes",
    "standard",
    "standard_backward",
    "useful_backward_flops",
    "useful_flops",
    "workspace_bytes",
]


def compare(
    q_shape: Sequence[int],
    k_shape: Sequence[int] | None = None,
    v_shape: Sequence[int] | None = None,
    *,
    dtype: str = "bfloat16",
    causal: bool = False,
    window: Sequence[int | None] | None = None,
    mask: Mask | None = None,
    bias_shape: Sequence[int] | None = None,
    bias_dtype: str | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    backward: bool = False,
    arch: str = "sm_80",
    options: Options | None = None,
) -> dict[str, Cost]:
    """Costs of one `cuflash.attention` call by algorithm: "standard", "chunked" and "flash".

    Parameters
    ----------
    q_shape, k_shape, v_shape : sequence of int
        Shapes as `cuflash.attention` takes them; k as q and v as k where left out.
    dtype : str
        Of q, k and v: "float16", "bfloat16", "float32" or "float64".
    causal, window, mask : optional
        As `cuflash.attention` takes them.
    bias_shape, bias_dtype : optional
        Of a bias that broadcasts to (batch, num_heads, seqlen_q, seqlen_k); its dtype is that of q where left out.
    return_lse : bool
        Whether lse is a result; backward, whether it has a cotangent.
    backward : bool
        The costs of the pullback of `cuflash.vjp` instead, by "standard" and "flash".
    arch : str
        Architecture that the kernels are chosen for, such as "sm_80".
    options : Options, optional
        As `cuflash.attention` takes them.

    Raises
    ------
    InvalidValueError, InvalidTypeError
        As `cuflash.attention` raises for arrays of these shapes and dtypes.
    """
    problem = problem_of_shapes(
        q_shape,
        k_shape,
        v_shape,
        dtype=dtype,
        causal=causal,
        window=window,
        mask=mask,
        softcap=softcap,
        bias_shape=bias_shape,
        bias_dtype=bias_dtype,
    )
    known = arch_named(arch)
    check.check_kernel_limits(problem, known)
    check.check_precision(problem, options or Options())
    if not backward:
        return costs(problem, plan_contiguous(problem, known, options), return_lse=return_lse, bias_shape=bias_shape)
    plan = plan_backward_contiguous(problem, known, options, bias_shape)
    return backward_costs(problem, plan, lse_cotangent=return_lse, bias_shape=bias_shape)
