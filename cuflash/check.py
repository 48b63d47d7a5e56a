"""Arguments become a `Problem`, or an error that names argument, value and requirement. No array is touched here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from operator import index
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from cuflash.errors import InvalidDtypeError, InvalidShapeError, InvalidTypeError, InvalidValueError, type_name
from cuflash.layout import Layout
from cuflash.masks import Mask
from cuflash.masks.patterns import with_window
from cuflash.masks.program import Program
from cuflash.options import Options
from cuflash.plan.arch import Arch
from cuflash.plan.forward import MAX_HEAD_DIM, max_head_dim
from cuflash.problem import Problem, default_scale

DTYPE_NAMES: dict[np.dtype, str] = {
    np.dtype(np.float16): "float16",
    np.dtype(ml_dtypes.bfloat16): "bfloat16",
    np.dtype(np.float32): "float32",
    np.dtype(np.float64): "float64",
}
_DTYPES = ", ".join(DTYPE_NAMES.values())
MAX_LENGTH = 2**31 - 1  # kernels count tokens in int32


class Scores(NamedTuple):
    """How scores are made and which of them are visible; None is the default scale or an unbounded side."""

    left: int | None
    right: int | None
    scale: float | None
    softcap: float  # 0: none
    mask: Program | None = None


class Packing(NamedTuple):
    """How many sequences a problem has whose lengths are data, and what bounds them."""

    batch: int
    max_seqlen_q: int
    max_seqlen_k: int
    packed: bool = True  # queries are; else all sequences have as many
    block_size: int | None = None  # of the cache, if keys are in one; else they are packed
    single: bool = False  # one query a sequence: q and out lack the token axis, lse too


def scores(causal: object, window: object, scale: object, softcap: object, mask: object = None) -> Scores:
    """The checked keywords of every attention function."""
    check_flag("causal", causal)
    left, right = (None, None) if window is None else _window(window)
    if causal:
        right = 0  # window[1] >= 0 never narrows what causal leaves
    program = None if mask is None else _mask(mask, left, right)
    if program is not None:
        left = right = None  # the mask has them
    return Scores(
        left,
        right,
        None if scale is None else _positive("scale", scale),
        0.0 if softcap is None else _positive("softcap", softcap),
        program,
    )


def without_arrays(asked: Scores) -> Scores:
    """The same but for what the arrays of a mask hold: what launches are prepared by."""
    return asked if asked.mask is None else asked._replace(mask=asked.mask.asked)


def _mask(mask: object, left: int | None, right: int | None) -> Program:
    """What a mask and a window together show."""
    if isinstance(mask, Mask):
        return with_window(mask, left, right).program
    if callable(mask):
        write = "cuflash.masks.where(function), made once and kept"
    elif getattr(mask, "dtype", None) == np.bool_ or str(getattr(mask, "dtype", "")).endswith("bool"):
        write = "cuflash.masks.Dense(array), made once and kept, or one of the masks that need no array"
    elif hasattr(mask, "dtype"):
        write = "cuflash.masks.Dense of a boolean array; what is added to the scores goes into bias"
    else:
        write = "one of cuflash.masks, or None"
    raise InvalidTypeError(f"mask is a {type_name(mask)}: must be {write}")


def check_flag(name: str, value: object) -> None:
    if value is not True and value is not False and not isinstance(value, np.bool_):
        raise InvalidTypeError(f"{name} = {value!r}: must be True or False")


def _window(window: object) -> list[int | None]:
    if not isinstance(window, tuple | list) or len(window) != 2:
        raise InvalidTypeError(f"window = {window!r}: must be None or a pair (left, right) of integers or None")
    sides: list[int | None] = []
    for i, side in enumerate(window):
        sides.append(None if side is None else whole_number(f"window[{i}]", side))
    return sides


def whole_number(name: str, value: object) -> int:
    """A non-negative integer; bool is not one."""
    try:
        number = index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or isinstance(value, bool | np.bool_):
        raise InvalidTypeError(f"{name} = {value!r}: must be an integer >= 0 or None")
    if number < 0:
        raise InvalidValueError(f"{name} = {number}: must be >= 0 or None")
    return number


def _positive(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InvalidTypeError(f"{name} = {value!r}: must be a number or None")
    try:
        number = float(value)
    except OverflowError:  # an integer past float64
        number = math.inf
    if not (math.isfinite(number) and number > 0):
        raise InvalidValueError(f"{name} = {number}: must be finite and > 0, or None")
    return number


def problem(q: Layout, k: Layout, v: Layout, bias: Layout | None, asked: Scores, packing: Packing | None) -> Problem:
    """The problem that arrays of these layouts pose."""
    dtype = _common_dtype(q, k, v)
    packed = packing is not None and packing.packed
    axes_q = _axes("q", q.shape, q.shape, packed)
    if packing is not None and packing.block_size is not None:
        axes_k, axes_v = (_cache_axes(name, array.shape, axes_q.batch) for name, array in (("k", k), ("v", v)))
    else:
        axes_k, axes_v = (_axes(name, array.shape, q.shape, packed) for name, array in (("k", k), ("v", v)))
    _require_same("k", k, "batch", axes_k.batch, axes_q.batch, "q")
    _require_same("k", k, "head_dim", axes_k.dim, axes_q.dim, "q")
    _require_same("v", v, "batch", axes_v.batch, axes_q.batch, "q")
    _require_same("v", v, "number of keys", axes_v.tokens, axes_k.tokens, "k")
    _require_same("v", v, "number of heads", axes_v.heads, axes_k.heads, "k")
    if axes_q.heads % axes_k.heads if axes_k.heads else axes_q.heads:
        heads = f"{axes_q.heads} heads must be a multiple of the {axes_k.heads} of k"
        raise InvalidShapeError(f"q.shape = {q.shape}: {heads}")
    batch, seqlen_q, seqlen_k = packing[:3] if packing else (axes_q.batch, axes_q.tokens, axes_k.tokens)
    if bias is not None:
        _check_bias(bias, (batch, axes_q.heads, seqlen_q, seqlen_k), len(q.shape), packing is not None)
    scale = default_scale(axes_q.dim) if asked.scale is None else asked.scale
    _check_factors(scale, asked.softcap, dtype)
    answer = Problem(
        batch=batch,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        num_heads=axes_q.heads,
        num_kv_heads=axes_k.heads,
        head_dim=axes_q.dim,
        head_dim_v=axes_v.dim,
        dtype=dtype,
        scale=scale,
        softcap=asked.softcap,
        left=asked.left,
        right=asked.right,
        bias_dtype=None if bias is None else DTYPE_NAMES[bias.dtype],
        total_q=axes_q.tokens if packed else None,
        total_k=axes_k.tokens if packed else None,
        block_size=None if packing is None else packing.block_size,
        mask=asked.mask,
    )
    if answer.mask is not None:
        answer.mask.check(answer.lengths)
    return answer


class _Axes(NamedTuple):
    """The shape of q, k or v with all its axes; a packed array has a batch of one."""

    batch: int
    tokens: int
    heads: int
    dim: int


_RANKS = {2: "(seqlen, dim)", 3: "(seqlen, heads, dim)", 4: "(batch, seqlen, heads, dim)"}


def _cache_axes(name: str, shape: tuple[int, ...], batch: int) -> _Axes:
    """Of a paged cache, whose tokens belong to any sequence."""
    if len(shape) != 4:
        raise InvalidShapeError(f"{name}_cache.shape = {shape}: must be (num_blocks, block_size, num_kv_heads, dim)")
    return _Axes(batch, shape[0] * shape[1], *shape[2:])


def _axes(name: str, shape: tuple[int, ...], shape_q: tuple[int, ...], packed: bool) -> _Axes:
    if packed:
        check_packed_rank(name, shape)
    elif len(shape) not in _RANKS:
        raise InvalidShapeError(f"{name}.shape = {shape}: must be {', '.join(_RANKS.values())}")
    elif len(shape) != len(shape_q):
        raise InvalidShapeError(f"{name}.shape = {shape}: must be {_RANKS[len(shape_q)]}, as q is")
    if len(shape) == 2:
        return _Axes(1, shape[0], 1, shape[1])
    return _Axes(*shape) if len(shape) == 4 else _Axes(1, *shape)


def check_packed_rank(name: str, shape: Sequence[int]) -> None:
    if len(shape) != 3:
        raise InvalidShapeError(f"{name}.shape = {tuple(shape)}: must be (total tokens, heads, dim)")


def _require_same(name: str, array: Layout, what: str, have: int, want: int, other: str) -> None:
    if have != want:
        raise InvalidShapeError(f"{name}.shape = {array.shape}: {what} {have} must be {want}, that of {other}")


def _common_dtype(q: Layout, k: Layout, v: Layout) -> str:
    if q.dtype not in DTYPE_NAMES:
        raise InvalidDtypeError(f"q.dtype = {q.dtype}: must be one of {_DTYPES}, in native byte order; cast q, k and v")
    for name, array in (("k", k), ("v", v)):
        if array.dtype != q.dtype:
            raise InvalidDtypeError(f"{name}.dtype = {array.dtype}: must be {q.dtype}, the dtype of q")
    return DTYPE_NAMES[q.dtype]


def _check_factors(scale: float, softcap: float, dtype: str) -> None:
    """What scores are multiplied by must neither overflow nor vanish where they are computed, in float32 or float64."""
    digits = 300 if dtype == "float64" else 30
    least, most = 10.0**-digits, 10.0**digits
    factors = {"scale": scale, "softcap": softcap, "scale / softcap": scale / softcap} if softcap else {"scale": scale}
    for name, number in factors.items():
        if not least <= number <= most:
            raise InvalidValueError(f"{name} = {number}: must be {least} to {most} for {dtype}")


_BIAS_RANKS = {2: "(seqlen_q, seqlen_k)", 3: "(num_heads, seqlen_q, seqlen_k)"}


def _check_bias(bias: Layout, full: tuple[int, int, int, int], rank: int, packed: bool) -> None:
    """A bias broadcasts to `full`, less the axes that the arrays lack; its sequence axes may be longer if packed."""
    if bias.dtype not in DTYPE_NAMES:
        raise InvalidDtypeError(f"bias.dtype = {bias.dtype}: must be one of {_DTYPES}, in native byte order; cast it")
    target: tuple[int, ...] = full
    names = "(batch, num_heads, seqlen_q, seqlen_k)"
    if not packed and rank < 4:
        target, names = full[4 - rank :], _BIAS_RANKS[rank]
    fits = len(bias.shape) <= len(target) and all(
        have in (1, want) or (packed and from_end < 2 and have >= want)
        for from_end, (have, want) in enumerate(zip(reversed(bias.shape), reversed(target), strict=False))
    )
    if not fits:
        at_least = ", its last two axes at least as long as the longest sequence" if packed else ""
        raise InvalidShapeError(f"bias.shape = {bias.shape}: must broadcast to {names} = {target}{at_least}")


def check_kernel_limits(asked: Problem, arch: Arch) -> None:
    """What the kernels cannot take but the CPU can."""
    for name, size in (("q", asked.head_dim), ("v", asked.head_dim_v)):
        most = max_head_dim(asked.dtype, arch) if name == "q" else MAX_HEAD_DIM
        if not 1 <= size <= most:
            raise InvalidShapeError(f"{name}.shape[-1] = {size}: must be 1 to {most} for {asked.dtype} on {arch.name}")
    for name, length in (
        ("batch", asked.batch),
        ("seqlen_q", asked.total_q or asked.seqlen_q),
        ("seqlen_k", asked.total_k or asked.seqlen_k),
    ):
        if length > MAX_LENGTH:
            raise InvalidShapeError(f"{name} = {length}: must be at most {MAX_LENGTH} on {arch.name}")


def check_out(out: Layout, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """`out` must take the result as it is, each element in a place of its own."""
    if out.shape != shape:
        raise InvalidShapeError(f"out.shape = {out.shape}: must be {shape}")
    if out.dtype != dtype:
        raise InvalidDtypeError(f"out.dtype = {out.dtype}: must be {dtype}, the dtype of q")
    if not out.rows_contiguous:
        raise InvalidValueError(f"out.strides = {out.strides}: the last axis must be contiguous")
    if 0 in shape:
        return
    spanned = out.dtype.itemsize  # bytes spanned by the axes seen, smallest stride first
    axes = [(abs(stride), size) for stride, size in zip(out.strides, shape, strict=True) if size > 1]
    for stride, size in sorted(axes):
        if stride < spanned:
            raise InvalidValueError(f"out.strides = {out.strides}: elements must not overlap")
        spanned += (size - 1) * stride


def check_precision(asked: Problem, options: Options) -> None:
    if options.precision is not None and asked.dtype != "float32":
        raise InvalidValueError(
            f"options.precision = {options.precision!r}: must be None for {asked.dtype}; float32 alone has another"
        )


def check_options(options: Any, on_kernels: bool) -> None:
    if not isinstance(options, Options):
        raise InvalidTypeError(f"options = {options!r}: must be a cuflash.Options or None")
    if not on_kernels and options != Options(deterministic=options.deterministic):
        raise InvalidValueError(f"options = {options}: must be None on the CPU, which runs no kernel to choose")
