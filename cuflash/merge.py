"""`merge_states`: attention over a union of keys from attention over its parts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import numpy as np

from cuflash import records
from cuflash.arrays import Kind, device_of, gather, kind_of
from cuflash.check import DTYPE_NAMES
from cuflash.device import Call, Device
from cuflash.errors import InvalidDtypeError, InvalidShapeError, InvalidTypeError, InvalidValueError
from cuflash.layout import Layout, NativeArray, contiguous_strides, layout
from cuflash.plan.config import MAX_SPLITS, MergeConfig, state_dtype
from cuflash.plan.forward import plan_combine
from cuflash.vjp import Pullback, register


def merge_states(outs: Any, lses: Any) -> tuple[Any, Any]:
    """Merge attention states of the same queries over disjoint sets of keys into the state over all keys.

    lse = log Σ exp(lse_i) and out = Σ exp(lse_i - lse) out_i, in a form that neither overflows nor loses a state
    (Rabe & Staats 2021, section 2).

    Parameters
    ----------
    outs : sequence of arrays, or one array with the states along its first axis
        At least one state, each (batch, seqlen_q, num_heads, head_dim_v), (seqlen_q, num_heads, head_dim_v) or
        (seqlen_q, head_dim_v), as `attention` and `attention_varlen` return it. float16, bfloat16, float32 or float64.
    lses : sequence of arrays, or one array with the states along its first axis
        As many, each (batch, num_heads, seqlen_q), (num_heads, seqlen_q) or (seqlen_q,), natural log; float32, float64
        for outs of float64 (on the CPU for any). A state of -inf adds nothing, whatever its out holds.

    Returns
    -------
    out : array
        Of the shape, kind and dtype of each of outs; 0 where all states are -inf.
    lse : array
        Of the shape, kind and dtype of each of lses; -inf where all states are -inf.

    Raises
    ------
    InvalidTypeError, InvalidDtypeError, InvalidShapeError, InvalidValueError, DeviceError
        An argument is not what this page says; nothing was computed.

    Examples
    --------
    >>> import numpy as np, cuflash
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 100, 64))
    >>> parts = [cuflash.attention(q, k[s], v[s], return_lse=True) for s in (slice(0, 30), slice(30, 100))]
    >>> out, lse = cuflash.merge_states(*zip(*parts))
    >>> bool(np.allclose(out, cuflash.attention(q, k, v)))
    True
    """
    kind, device, out_arrays, lse_arrays = _take(outs, lses)
    if device is None:
        out, lse = _merge_on_cpu(out_arrays, lse_arrays)
    else:
        with device.call() as call:
            out, lse = _merge_on_device(device, call, out_arrays, lse_arrays)
    return kind.give(out), kind.give(lse)


def _take(outs: Any, lses: Any) -> tuple[Kind, Device | None, list[NativeArray], list[NativeArray]]:
    """The checked states as native arrays."""
    kind, out_names, out_arrays = _states("outs", outs)
    lse_kind, lse_names, lse_arrays = _states("lses", lses)
    if lse_kind is not kind:
        raise InvalidTypeError(f"lses are of kind {lse_kind.name}: must be of kind {kind.name}, as outs are")
    device = device_of(kind, (*out_names, *lse_names), (*out_arrays, *lse_arrays))
    _check(out_names, out_arrays, lse_names, lse_arrays, device)
    return kind, device, out_arrays, lse_arrays


def _states(name: str, value: Any) -> tuple[Kind, list[str], list[NativeArray]]:
    """The states of a sequence or of a stacked array, with their names."""
    if isinstance(value, tuple | list):
        if not value:
            raise InvalidValueError(f"{name} = {value}: must hold at least one array")
        names = [f"{name}[{i}]" for i in range(len(value))]
        kind, arrays = gather(names, value)
        return kind, names, arrays
    kind = kind_of(value, name)
    array = kind.take(value, name)
    if array.ndim == 0 or array.shape[0] == 0:
        raise InvalidShapeError(f"{name}.shape = {array.shape}: must hold at least one state along the first axis")
    return kind, [f"{name}[{i}]" for i in range(array.shape[0])], [array[i, ...] for i in range(array.shape[0])]


def _lse_shape(out_shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(out_shape) == 2:
        return out_shape[:1]
    *batch, tokens, heads, _ = out_shape
    return (*batch, heads, tokens)


def _check(
    out_names: Sequence[str],
    outs: Sequence[NativeArray],
    lse_names: Sequence[str],
    lses: Sequence[NativeArray],
    device: Device | None,
) -> None:
    if len(lses) != len(outs):
        raise InvalidValueError(f"lses hold {len(lses)} states: must hold {len(outs)}, as many as outs")
    shape, dtype = outs[0].shape, outs[0].dtype
    if not 2 <= len(shape) <= 4:
        raise InvalidShapeError(
            f"{out_names[0]}.shape = {shape}: must be (seqlen_q, head_dim_v), (seqlen_q, num_heads, head_dim_v) or "
            "(batch, seqlen_q, num_heads, head_dim_v)"
        )
    _check_dtype(out_names[0], dtype, tuple(DTYPE_NAMES.values()), device)
    lse_dtypes = ("float32", "float64") if device is None else (state_dtype(DTYPE_NAMES[dtype]),)
    _check_dtype(lse_names[0], lses[0].dtype, lse_dtypes, device)
    for names, arrays, want in ((out_names, outs, shape), (lse_names, lses, _lse_shape(shape))):
        for name, array in zip(names, arrays, strict=True):
            if array.shape != want:
                raise InvalidShapeError(f"{name}.shape = {array.shape}: must be {want}, since outs[0].shape = {shape}")
            if array.dtype != arrays[0].dtype:
                raise InvalidDtypeError(f"{name}.dtype = {array.dtype}: must be {arrays[0].dtype}, that of {names[0]}")


def _check_dtype(name: str, dtype: np.dtype, allowed: Sequence[str], device: Device | None) -> None:
    if DTYPE_NAMES.get(dtype) not in allowed:
        where = "" if device is None else f" on {device.arch.name}"
        raise InvalidDtypeError(f"{name}.dtype = {dtype}: must be one of {', '.join(allowed)}{where}; cast it")


def _merge_on_cpu(outs: Sequence[np.ndarray], lses: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    weights, lse = _weights(lses)
    accumulated: np.ndarray = np.zeros(outs[0].shape, _sum_dtype(outs, lses))
    for out, weight in zip(outs, weights, strict=True):
        accumulated += _weigh(weight, out.astype(accumulated.dtype))
    return accumulated.astype(outs[0].dtype), lse


def _sum_dtype(outs: Sequence[np.ndarray], lses: Sequence[np.ndarray]) -> type:
    return np.float64 if np.float64 in (outs[0].dtype, lses[0].dtype) else np.float32


def _weights(lses: Sequence[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
    """exp(lse_i - lse), and lse = m + log Σ exp(lse_i - m) with m the largest, 0 in its place where all are -inf."""
    m = reduce(np.maximum, lses)
    m = np.where(np.isneginf(m), 0, m).astype(m.dtype)
    terms = [np.exp(lse - m) for lse in lses]
    total = sum(terms)
    with np.errstate(divide="ignore"):
        lse = m + np.log(total)
    return [term / np.where(total == 0, 1, total) for term in terms], lse


def _weigh(weight: np.ndarray, values: np.ndarray) -> np.ndarray:
    """values (tokens, dim) times weight (tokens,), with axes for heads and batch between; 0 where the weight is."""
    weight = _by_token(weight)[..., None]
    return np.where(weight == 0, 0, weight * values)


def _by_token(of_rows: np.ndarray) -> np.ndarray:
    """The shape of an lse to that of an out without its last axis; and back."""
    return of_rows if of_rows.ndim == 1 else np.swapaxes(of_rows, -1, -2)


def _merge_states_vjp(outs: Any, lses: Any) -> tuple[tuple[Any, Any], Pullback]:
    """With w_i = exp(lse_i - lse): dout_i = w_i dO, dlse_i = w_i (rowsum(dO ∘ (out_i - out)) + dlse).

    The pullback is array operations where the arrays are: NumPy's functions give CuPy's arrays to CuPy.
    """
    kind, _, out_arrays, lse_arrays = _take(outs, lses)
    result = merge_states(outs, lses)

    def pullback(cotangent: Any) -> tuple[Any, Any]:
        native: list[NativeArray] = gather(("cotangent[0]", "cotangent[1]"), cotangent)[1]
        dout, dlse = native[0].astype(_sum_dtype(out_arrays, lse_arrays)), native[1]
        weights, _ = _weights(lse_arrays)
        dots = [_by_token((dout * state.astype(dout.dtype)).sum(axis=-1)) for state in out_arrays]
        dots = [np.where(weight == 0, 0, dot) for weight, dot in zip(weights, dots, strict=True)]
        delta = sum(weight * dot for weight, dot in zip(weights, dots, strict=True))  # rowsum(dO ∘ O)
        of_lses = [np.where(w == 0, 0, w * (dot - delta + dlse)) for w, dot in zip(weights, dots, strict=True)]
        return (
            _give_like(outs, kind, [_weigh(weight, dout).astype(out_arrays[0].dtype) for weight in weights]),
            _give_like(lses, kind, [gradient.astype(lse_arrays[0].dtype) for gradient in of_lses]),
        )

    return result, pullback


def _give_like(states: Any, kind: Kind, gradients: list[np.ndarray]) -> Any:
    """Gradients as the states came: a list, a tuple or one stacked array."""
    if isinstance(states, tuple | list):
        return type(states)(map(kind.give, gradients))
    return kind.give(np.stack(gradients))


class _States(NamedTuple):
    """Addresses of states of one layout, and their strides in elements as the records have them."""

    outs: Sequence[int]
    lses: Sequence[int]
    strides: tuple[int, int, int]
    lse_strides: tuple[int, int, int]
    dtype: str
    load_bytes: int  # widest access that every row of outs is aligned to


def _merge_on_device(
    device: Device, call: Call, outs: Sequence[NativeArray], lses: Sequence[NativeArray]
) -> tuple[NativeArray, NativeArray]:
    out, lse = device.empty(outs[0].shape, outs[0].dtype), device.empty(lses[0].shape, lses[0].dtype)
    if 0 in lse.shape:
        return out, lse
    outs, lses = _of_one_layout(outs), _of_one_layout(lses)
    states = _States(
        [call.read(array, f"outs[{i}]") for i, array in enumerate(outs)],
        [call.read(array, f"lses[{i}]") for i, array in enumerate(lses)],
        records.token_strides("outs[0]", layout(outs[0])),
        records.lse_strides(records.in_elements("lses[0]", layout(lses[0]))),
        DTYPE_NAMES[out.dtype],
        records.access_bytes(*map(layout, outs)),
    )
    while len(states.outs) > MAX_SPLITS:
        states = _merge_groups(device, call, states, out.shape, lse.shape)
    _combine(device, states, layout(out), call.write(out, "o"), call.write(lse, "lse"))
    return out, lse


def _of_one_layout(arrays: Sequence[NativeArray]) -> Sequence[NativeArray]:
    """The arrays, or C-contiguous copies where their strides differ or their rows are not contiguous."""
    if all(array.strides == arrays[0].strides for array in arrays) and layout(arrays[0]).rows_contiguous:
        return arrays
    return [array.copy(order="C") for array in arrays]


def _merge_groups(
    device: Device, call: Call, states: _States, shape: tuple[int, ...], lse_shape: tuple[int, ...]
) -> _States:
    """One level of a tree: up to MAX_SPLITS states become one, in the dtype of their sums."""
    dtype = np.dtype(state_dtype(states.dtype))
    starts = range(0, len(states.outs), MAX_SPLITS)
    out = Layout(shape, contiguous_strides(shape, dtype.itemsize), dtype, 0)
    first_out = call.workspace((len(starts), *shape), dtype, "o_partial")
    first_lse = call.workspace((len(starts), *lse_shape), dtype, "lse_partial")
    outs = [first_out + i * math.prod(shape) * dtype.itemsize for i in range(len(starts))]
    lses = [first_lse + i * math.prod(lse_shape) * dtype.itemsize for i in range(len(starts))]
    for i, start in enumerate(starts):
        group = slice(start, start + MAX_SPLITS)
        _combine(device, states._replace(outs=states.outs[group], lses=states.lses[group]), out, outs[i], lses[i])
    lse_strides = records.lse_strides(contiguous_strides(lse_shape, 1))
    return _States(
        outs, lses, records.token_strides("out", out), lse_strides, dtype.name, records.access_bytes(out)
    )  # fmt: skip


def _combine(device: Device, states: _States, out: Layout, out_address: int, lse_address: int) -> None:
    """Launch one merge into `out` and its C-contiguous lse."""
    batch, tokens, heads, head_dim_v = {2: (1, out.shape[0], 1, out.shape[1]), 3: (1, *out.shape)}.get(
        len(out.shape), out.shape
    )
    lse_strides = records.lse_strides(contiguous_strides(_lse_shape(out.shape), 1))
    rows = records.combine_record(
        (batch, tokens, heads),
        len(states.outs),
        states.strides,
        states.lse_strides,
        records.token_strides("out", out),
        lse_strides,
    )
    rows["o"], rows["lse"] = out_address, lse_address
    launch = plan_combine(
        states.dtype, DTYPE_NAMES[out.dtype], head_dim_v, batch * tokens * heads,
        num_states=len(states.outs), load_bytes=states.load_bytes, kind=MergeConfig,
    )  # fmt: skip
    device.load(launch)(records.merge_record(rows, states.outs, states.lses).reshape(1))


register(merge_states, _merge_states_vjp)
