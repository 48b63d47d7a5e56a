"""From a problem, a plan and layouts to the kernels' parameter records, all but the addresses.

Axes that an array lacks have stride 0. Strides of the records are in elements, those of layouts in bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import gcd
from typing import NamedTuple

import numpy as np

from cuflash.errors import InvalidValueError
from cuflash.layout import ALIGNMENT, Layout, contiguous_strides
from cuflash.plan.backward import BackwardPlan
from cuflash.plan.config import state_dtype
from cuflash.plan.forward import ForwardPlan
from cuflash.plan.params import (
    BACKWARD_PARAMS,
    COMBINE_PARAMS,
    FORWARD_PARAMS,
    MERGE_PARAMS,
    NO_BOUND,
    TILE_LIST_PARAMS,
)
from cuflash.plan.tile_lists import TileListPlan
from cuflash.problem import Problem


def access_bytes(*layouts: Layout) -> int:
    """The widest power of two, at most 16, that every row of every array is aligned to and divides into."""
    bytes_ = ALIGNMENT
    for array in layouts:
        strides = (stride for stride, size in zip(array.strides[:-1], array.shape, strict=False) if size > 1)
        bytes_ = gcd(bytes_, array.misalignment, array.shape[-1] * array.dtype.itemsize, *strides)
    return bytes_


def in_elements(name: str, array: Layout) -> tuple[int, ...]:
    """Strides in elements."""
    itemsize = array.dtype.itemsize
    if array.misalignment % itemsize or any(stride % itemsize for stride in array.strides):
        raise InvalidValueError(
            f"{name}.strides = {array.strides}: elements must be aligned to their {itemsize} bytes for a kernel"
        )
    return tuple(stride // itemsize for stride in array.strides)


def token_strides(name: str, array: Layout) -> tuple[int, int, int]:
    """(batch, token, head) of q, k, v, o or a state, of rank 2 to 4 or packed."""
    strides = in_elements(name, array)[:-1]
    if len(strides) == 1:
        return 0, strides[0], 0
    return (0, *strides) if len(strides) == 2 else strides  # type: ignore[return-value]


def lse_strides(strides: Sequence[int]) -> tuple[int, int, int]:
    """(batch, head, token) of an lse with these strides in elements."""
    return (*(0,) * (3 - len(strides)), *strides)  # type: ignore[return-value]


def bias_strides(bias: Layout) -> tuple[int, int, int, int]:
    """(batch, head, query, key), 0 where it is broadcast."""
    strides = (s if size != 1 else 0 for s, size in zip(in_elements("bias", bias), bias.shape, strict=True))
    return (*(0,) * (4 - len(bias.shape)), *strides)  # type: ignore[return-value]


def bias_shape(bias: Layout) -> tuple[int, int, int, int]:
    """(batch, head, query, key), 1 where it lacks the axis."""
    return (*(1,) * (4 - len(bias.shape)), *bias.shape)  # type: ignore[return-value]


class Partials(NamedTuple):
    """C-contiguous states of a split plan, the split axis first; strides in elements."""

    dtype: np.dtype
    shape: tuple[int, ...]
    lse_shape: tuple[int, ...]
    strides: tuple[int, int, int, int]  # split, batch, token, head
    lse_strides: tuple[int, int, int, int]  # split, batch, head, token


def partials(problem: Problem, plan: ForwardPlan) -> Partials:
    batch, tokens = (1, problem.total_q) if problem.total_q is not None else (problem.batch, problem.seqlen_q)
    if plan.even is not None:
        batch = 1  # a state is of one sequence
    shape = (plan.num_splits, batch, tokens, problem.num_heads, problem.head_dim_v)
    lse_shape = (plan.num_splits, batch, problem.num_heads, tokens)
    strides, lse_strides = contiguous_strides(shape, 1)[:-1], contiguous_strides(lse_shape, 1)
    if plan.even is not None:
        strides, lse_strides = (strides[0], 0, *strides[2:]), (lse_strides[0], 0, *lse_strides[2:])
    dtype = np.dtype(state_dtype(problem.dtype))
    return Partials(dtype, shape, lse_shape, strides, lse_strides)  # type: ignore[arg-type]


def as_words(record: np.ndarray) -> np.ndarray:
    """The memory of a record as uint64: addresses are the words that `address_words` names.

    NumPy copies, describes and fills plain words in a fraction of a microsecond, a record of 30 fields in many.
    """
    return record.reshape(1).view(np.uint64)


def address_words(record: np.dtype) -> dict[str, int | slice]:
    """Which words of a record hold its addresses, by field: the fields of uint64."""
    words: dict[str, int | slice] = {}
    for name, (field, offset, *_) in (record.fields or {}).items():
        if field.base == np.uint64:
            first, count = offset // 8, field.itemsize // 8
            words[name] = slice(first, first + count) if field.shape else first
    return words


def as_bytes(record: np.dtype) -> np.dtype:
    """The dtype of one record as a kernel launch takes it: bytes."""
    return np.dtype((np.void, record.itemsize))


def forward_record(
    problem: Problem,
    plan: ForwardPlan,
    q: Layout,
    k: Layout,
    v: Layout,
    bias: Layout | None,
    o: Layout,
    lse_shape: Sequence[int],
) -> np.ndarray:
    """Parameters of the forward launch; `o` and `lse_shape` are the results', which a split plan does not write."""
    record = np.zeros((), FORWARD_PARAMS)
    record["q_strides"] = token_strides("q", q)
    record["k_strides"] = token_strides("k", k)
    record["v_strides"] = token_strides("v", v)
    if plan.combine is None:
        record["o_strides"] = token_strides("out", o)
        record["lse_strides"] = lse_strides(contiguous_strides(lse_shape, 1))
    else:
        partial = partials(problem, plan)
        record["o_split_stride"], *record["o_strides"] = partial.strides
        record["lse_split_stride"], *record["lse_strides"] = partial.lse_strides
    if bias is not None:
        record["bias_strides"] = bias_strides(bias)
    _set_problem(record, problem)
    record["num_splits"], record["q_tiles"] = plan.num_splits, plan.q_tiles
    if plan.even is not None:
        record["most_shares"], record["least_tiles"] = plan.even.most, plan.even.least
    record["block_size"] = problem.block_size or 0
    record["table_pitch"] = problem.seqlen_k // problem.block_size if problem.block_size else 0
    _set_mask(record, problem, plan.lists)
    return record


def _set_problem(record: np.ndarray, problem: Problem) -> None:
    """What the records of both passes say about the problem."""
    for name in ("scale", "softcap", "batch", "num_heads", "seqlen_q", "seqlen_k"):
        record[name] = getattr(problem, name)
    record["scale64"], record["softcap64"] = problem.scale, problem.softcap
    record["group"] = problem.group
    record["total_q"], record["total_k"] = problem.total_q or 0, problem.total_k or 0
    for name in ("left", "right"):
        bound = getattr(problem, name)
        record[name] = NO_BOUND if bound is None else min(bound, NO_BOUND)


def backward_record(problem: Problem, plan: BackwardPlan, arrays: Mapping[str, Layout]) -> np.ndarray:
    """Parameters that the launches of a backward pass share; `arrays` by name, those that are absent left out."""
    record = np.zeros((), BACKWARD_PARAMS)
    for name, array in arrays.items():
        if name in ("bias", "dbias"):
            strides: Sequence[int] = bias_strides(array)
        elif name in ("lse", "d_lse"):
            strides = lse_strides(in_elements(name, array))
        else:
            strides = token_strides(name, array)
        record[f"{name}_strides"] = strides
    if "dbias" in arrays:
        record["dbias_shape"] = bias_shape(arrays["dbias"])
    _set_problem(record, problem)
    record["q_tiles"], record["k_tiles"], record["turn_tiles"] = plan.q_tiles, plan.k_tiles, plan.turn_tiles
    _set_mask(record, problem, plan.lists)
    return record


def tile_list_record(problem: Problem, plan: TileListPlan) -> np.ndarray:
    """Parameters that the launches which list a mask's tiles share."""
    record = np.zeros((), TILE_LIST_PARAMS)
    for name in ("batch", "num_heads", "group", "seqlen_q", "seqlen_k"):
        record[name] = getattr(problem, name)
    record["total_q"], record["total_k"] = problem.total_q or 0, problem.total_k or 0
    record["q_tiles"], record["k_tiles"] = plan.tiles
    record["turn_pitch"] = plan.turn_shape[-1] if plan.turn_shape else 0
    _set_mask(record, problem, plan)
    return record


def _set_mask(record: np.ndarray, problem: Problem, lists: TileListPlan | None) -> None:
    """Constants of the mask, the strides of its tables and, where intervals are asked, lengths; how long lists are."""
    if problem.mask is None or lists is None:
        return
    record["list_pitch"] = lists.list_shape[3]
    for name, values in (("mask_wholes", problem.mask.wholes), ("mask_reals", problem.mask.reals)):
        record[name][: len(values)] = values
    for i, table in enumerate(problem.mask.tables):
        shape, axes = table.array.shape, slice(4 * i, 4 * i + table.array.ndim)
        record["mask_strides"][axes] = contiguous_strides(shape, 1)
        if "mask_lengths" in (record.dtype.names or ()):
            record["mask_lengths"][axes] = shape


def combine_record(
    shape: tuple[int, int, int],
    num_states: int,
    state_strides: Sequence[int],
    state_lse_strides: Sequence[int],
    o_strides: Sequence[int],
    o_lse_strides: Sequence[int],
) -> np.ndarray:
    """Parameters of a launch that merges states of (batch, seqlen_q, heads) rows; strides as in the record."""
    batch, seqlen_q, num_heads = shape
    record = np.zeros((), COMBINE_PARAMS)
    record["state_strides"], record["state_lse_strides"] = state_strides, state_lse_strides
    record["o_strides"], record["lse_strides"] = o_strides, o_lse_strides
    record["num_states"], record["num_heads"], record["seqlen_q"] = num_states, num_heads, seqlen_q
    record["rows"] = batch * num_heads * seqlen_q
    return record


def split_combine_record(problem: Problem, plan: ForwardPlan, o: Layout, lse_shape: Sequence[int]) -> np.ndarray:
    """Parameters of the launch that merges the partial states of a split plan."""
    partial = partials(problem, plan)
    tokens, num_heads = partial.shape[2:4]
    record = combine_record(
        (1 if problem.varlen else problem.batch, tokens, num_heads),
        plan.num_splits,
        partial.strides[1:],
        partial.lse_strides[1:],
        token_strides("out", o),
        lse_strides(contiguous_strides(lse_shape, 1)),
    )
    record["state_stride"], record["state_lse_stride"] = partial.strides[0], partial.lse_strides[0]
    return record


def merge_record(rows: np.ndarray, states: Sequence[int], lses: Sequence[int]) -> np.ndarray:
    """Parameters of a launch that merges states at these addresses; `rows` says the rest."""
    record = np.zeros((), MERGE_PARAMS)
    record["rows"] = rows
    record["states"][: len(states)], record["lses"][: len(lses)] = states, lses
    return record
