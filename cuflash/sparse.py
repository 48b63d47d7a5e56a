"""Attention whose sparsity the data decides: SCFA (Pagliardini et al. 2023), forward and backward.

Tokens are sorted by a key, attention runs over the sorted tokens, of which each query sees keys that lie side by side,
and the results are put back in order. Everything happens where the arrays are: no length depends on what they hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from cuflash import backward, check, forward, records, tokens
from cuflash.arrays import Kind, device_of, gather
from cuflash.check import Scores
from cuflash.device import Device
from cuflash.errors import InvalidDtypeError, InvalidShapeError
from cuflash.forward import Operands
from cuflash.hashing import angular_hash
from cuflash.layout import NativeArray, check_separate, layout
from cuflash.masks.program import Program
from cuflash.masks.steps import VARIABLES as at
from cuflash.masks.tables import Table
from cuflash.options import Options
from cuflash.plan.backward import check_gradient_shape
from cuflash.vjp import Pullback, register

__all__ = ["angular_hash", "hash_sparse_attention", "qk_sparse_attention"]


def hash_sparse_attention(
    q: Any,
    k: Any,
    v: Any,
    q_hash: Any,
    k_hash: Any,
    *,
    include_self: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    out: Any = None,
    options: Options | None = None,
) -> Any:
    """Causal attention of each query to the keys of its own hash, exactly (SCFA; Pagliardini et al. 2023, section 3.2).

    Parameters
    ----------
    q : array (batch, seqlen_q, num_heads, head_dim)
        Queries; also (seqlen_q, num_heads, head_dim) or (seqlen_q, head_dim). Kinds of array, dtypes and strides as for
        `cuflash.attention`.
    k : array (batch, seqlen_k, num_kv_heads, head_dim)
        Keys.
    v : array (batch, seqlen_k, num_kv_heads, head_dim_v)
        Values.
    q_hash : array (batch, seqlen_q, num_heads)
        Whole numbers of any integer dtype, of q's kind and device: `angular_hash` makes some. Any strides.
    k_hash : array (batch, seqlen_k, num_kv_heads)
        The same of the keys, of the dtype of q_hash. Query i sees key j if their hashes are equal and
        j <= i + seqlen_k - seqlen_q.
    include_self : bool
        If False, j < i + seqlen_k - seqlen_q: with shared queries and keys, no token sees itself.
    scale, softcap, options
        As for `cuflash.attention`; tiles and splits are those of the sorted tokens.
    return_lse : bool
        Return (out, lse) instead of out.
    out : array (batch, seqlen_q, num_heads, head_dim_v), optional
        Where the result goes, as for `cuflash.attention`.

    Returns
    -------
    out : array (batch, seqlen_q, num_heads, head_dim_v)
        In the order of q. A query that sees no key gives 0.
    lse : array (batch, num_heads, seqlen_q)
        With return_lse, as for `cuflash.attention`; -inf for a query that sees no key.

    Raises
    ------
    InvalidTypeError, InvalidDtypeError, InvalidShapeError, InvalidValueError, DeviceError
        An argument is not what this page says; nothing was computed or written.

    Notes
    -----
    Queries are sorted by (hash, token), per batch entry and head, keys and values per key/value head. A query then sees
    keys that lie side by side, whose first and last ascend from query to query, so that a tile is visited if and only
    if it has a visible pair. Buckets may have any sizes. Beside the results, a call takes memory for the sorted copies
    of q, k, v and out and some 20 bytes a token and head.

    On a GPU the call waits for nothing and can be captured in a graph once its kernels are loaded.

    Examples
    --------
    >>> import numpy as np, cuflash
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 100, 4, 64))
    >>> hashes = [cuflash.sparse.angular_hash(x, 8) for x in (q, k)]
    >>> cuflash.sparse.hash_sparse_attention(q, k, v, *hashes).shape
    (2, 100, 4, 64)
    """
    keywords = {"scale": scale, "softcap": softcap, "return_lse": return_lse, "out": out, "options": options}
    return _attend(_ask_hash_sparse(q, k, v, q_hash, k_hash, include_self, **keywords))


def qk_sparse_attention(
    q: Any,
    k: Any,
    v: Any,
    keep_q: Any,
    keep_k: Any,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    out: Any = None,
    options: Options | None = None,
) -> Any:
    """Causal attention from which queries and keys are dropped (SCFA; Pagliardini et al. 2023, section 3.1).

    Parameters
    ----------
    q : array (batch, seqlen_q, num_heads, head_dim)
        Queries; also (seqlen_q, num_heads, head_dim) or (seqlen_q, head_dim). Kinds of array, dtypes and strides as for
        `cuflash.attention`.
    k : array (batch, seqlen_k, num_kv_heads, head_dim)
        Keys.
    v : array (batch, seqlen_k, num_kv_heads, head_dim_v)
        Values.
    keep_q : array (batch, seqlen_q, num_heads)
        bool, of q's kind and device: False drops a query. Any strides.
    keep_k : array (batch, seqlen_k, num_kv_heads)
        The same of the keys. Kept query i sees kept key j if j <= i + seqlen_k - seqlen_q.
    scale, softcap, options
        As for `cuflash.attention`; tiles and splits are those of the kept tokens.
    return_lse : bool
        Return (out, lse) instead of out.
    out : array (batch, seqlen_q, num_heads, head_dim_v), optional
        Where the result goes, as for `cuflash.attention`.

    Returns
    -------
    out : array (batch, seqlen_q, num_heads, head_dim_v)
        In the order of q. A query that is dropped or sees no key gives 0.
    lse : array (batch, num_heads, seqlen_q)
        With return_lse, as for `cuflash.attention`; -inf for a query that is dropped or sees no key.

    Raises
    ------
    InvalidTypeError, InvalidDtypeError, InvalidShapeError, InvalidValueError, DeviceError
        An argument is not what this page says; nothing was computed or written.

    Notes
    -----
    Kept tokens are moved together, in their order; their number is never read back, so that room is taken for all
    tokens, but tiles are visited only where kept ones see each other. Dropped tokens are never read: they may hold
    anything, and their gradients are 0.

    On a GPU the call waits for nothing and can be captured in a graph once its kernels are loaded.

    Examples
    --------
    >>> import numpy as np, cuflash
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 100, 4, 64))
    >>> keep = np.linalg.norm(k, axis=-1) > 8
    >>> cuflash.sparse.qk_sparse_attention(q, k, v, np.ones((2, 100, 4), bool), keep).shape
    (2, 100, 4, 64)
    """
    keywords = {"scale": scale, "softcap": softcap, "return_lse": return_lse, "out": out, "options": options}
    return _attend(_ask_qk_sparse(q, k, v, keep_q, keep_k, **keywords))


# Indices that give a caller's array all its axes, and take them away again, by its rank; a view each.
_ALL_AXES: dict[int, Any] = {4: ..., 3: None, 2: (None, slice(None), None)}
_OWN_AXES: dict[int, Any] = {4: ..., 3: 0, 2: (0, slice(None), 0)}
_ALL_LSE_AXES: dict[int, Any] = {4: ..., 3: None, 2: (None, None)}
_OWN_LSE_AXES: dict[int, Any] = {4: ..., 3: 0, 2: (0, 0)}


class _Marks(NamedTuple):
    """What says who sees whom: arrays like q and k without their last axis, and a check of what they hold."""

    names: tuple[str, str]
    arrays: Sequence[Any]
    check: Callable[[Sequence[str], Sequence[NativeArray]], None]


class _Question(NamedTuple):
    """A checked call: native arrays (batch, seqlen, heads, dim), marks without the last axis."""

    kind: Kind
    device: Device | None
    q: NativeArray
    k: NativeArray
    v: NativeArray
    marks: Sequence[NativeArray]
    native_out: NativeArray | None
    out: Any  # as the caller has it
    shift: int  # query i sees keys before i + shift
    asked: Scores
    rank: int  # of the caller's arrays
    return_lse: bool
    options: Options | None


def _ask_hash_sparse(
    q: Any, k: Any, v: Any, q_hash: Any, k_hash: Any, include_self: bool, **keywords: Any
) -> _Question:
    check.check_flag("include_self", include_self)
    marks = _Marks(("q_hash", "k_hash"), (q_hash, k_hash), _check_hashes)
    return _ask(q, k, v, marks, int(include_self), **keywords)


def _ask_qk_sparse(q: Any, k: Any, v: Any, keep_q: Any, keep_k: Any, **keywords: Any) -> _Question:
    return _ask(q, k, v, _Marks(("keep_q", "keep_k"), (keep_q, keep_k), _check_keep), 1, **keywords)


def _ask(
    q: Any,
    k: Any,
    v: Any,
    marks: _Marks,
    shift: int,
    *,
    scale: object,
    softcap: object,
    return_lse: bool,
    out: Any,
    options: Options | None,
) -> _Question:
    asked = check.scores(False, None, scale, softcap)
    check.check_flag("return_lse", return_lse)
    names = ("q", "k", "v", *marks.names, "out")
    kind, native = gather(names, (q, k, v, *marks.arrays, out), ("out",))
    arrays: list[Any] = native
    device = device_of(kind, names, arrays)
    _check(device, names, arrays, marks, asked, options)
    rank = len(arrays[0].shape)
    axes = _ALL_AXES[rank]
    own_q, own_k, own_v = (x[axes] for x in arrays[:3])
    by_mark = [x[..., None][axes][..., 0] for x in arrays[3:5]]
    native_out = None if arrays[5] is None else arrays[5][axes]
    shift += own_k.shape[1] - own_q.shape[1]
    answer = bool(return_lse), options
    return _Question(kind, device, own_q, own_k, own_v, by_mark, native_out, out, shift, asked, rank, *answer)


def _check(
    device: Device | None,
    names: Sequence[str],
    arrays: list[Any],
    marks: _Marks,
    asked: Scores,
    options: Options | None,
) -> None:
    """Of the caller's arrays all that the passes check of the sorted ones, and the marks."""
    if options is not None:
        check.check_options(options, on_kernels=device is not None)
    q, k, v, *by_mark, out = arrays
    problem = check.problem(layout(q), layout(k), layout(v), None, asked, None)
    if device is not None:
        check.check_kernel_limits(problem, device.arch)
    if options is not None:
        check.check_precision(problem, options)
    for name, of, array, vectors in zip(marks.names, "qk", by_mark, (q, k), strict=True):
        if array.shape != vectors.shape[:-1]:
            raise InvalidShapeError(
                f"{name}.shape = {array.shape}: must be {vectors.shape[:-1]}, {of}'s without head_dim"
            )
    marks.check(marks.names, by_mark)
    if device is not None:
        for name, array in zip(marks.names, by_mark, strict=True):
            records.in_elements(name, layout(array))
    if out is not None:
        check.check_out(layout(out), (*q.shape[:-1], problem.head_dim_v), q.dtype)
        check_separate(out, names[:-1], arrays[:-1])


def _check_hashes(names: Sequence[str], hashes: Sequence[NativeArray]) -> None:
    for name, array in zip(names, hashes, strict=True):
        if array.dtype.kind not in "iu" or not array.dtype.isnative:
            raise InvalidDtypeError(
                f"{name}.dtype = {array.dtype}: must be an integer dtype in native byte order; "
                "cuflash.sparse.angular_hash makes hashes of vectors, cuflash.sparse.qk_sparse_attention takes truths"
            )
    of_q, of_k = (array.dtype for array in hashes)
    if of_q != of_k:
        raise InvalidDtypeError(f"k_hash.dtype = {of_k}: must be {of_q}, that of q_hash; cast one of them")


def _check_keep(names: Sequence[str], keep: Sequence[NativeArray]) -> None:
    for name, array in zip(names, keep, strict=True):
        if array.dtype != np.bool_:
            raise InvalidDtypeError(f"{name}.dtype = {array.dtype}: must be bool; of whole numbers pass {name} != 0")


class _Sorted(NamedTuple):
    """A question of sorted tokens, of which each query sees a range of keys."""

    q: tokens.Sorted
    k: tokens.Sorted
    operands: Operands
    asked: Scores


def _sort(question: _Question) -> _Sorted:
    device = question.device
    by_q, by_k = (tokens.sort(device, marks) for marks in question.marks)
    mask = _RANGES.bind(*tokens.visible_ranges(device, by_q, by_k, question.shift))
    q = tokens.gather(device, question.q, by_q.order)
    k, v = (tokens.gather(device, array, by_k.order) for array in (question.k, question.v))
    asked = question.asked._replace(mask=mask)
    return _Sorted(by_q, by_k, Operands(q, k, v, None, None, mask=mask), asked)


def _ranges_mask() -> Program:
    """Keys from `begin` to `end`, which lie by (batch, head, query) and ascend along the queries."""
    first, last = (
        Table(name, array, ascending=True, bounds=(0, tokens.NOWHERE))
        for name, array in zip(("begin", "end"), np.zeros((2, 1, 1, 1), np.int32), strict=True)
    )
    query = at.batch, at.head, at.q
    return Program(((first[query] <= at.k) & (at.k < last[query])).node)


_RANGES = _ranges_mask()  # traced once; every call has it over ranges of its own


def _attend(question: _Question) -> Any:
    by = _sort(question)
    device, answer = question.device, (question.return_lse, question.options)
    out, lse = forward.run(device, by.operands, by.asked, None, *answer)
    return _give(question, by, out, lse)


def _give(question: _Question, by: _Sorted, out: NativeArray, lse: NativeArray | None) -> Any:
    """What the caller gets, in the order of q. `out` is given as well: that orders the caller's stream after ours."""
    device, give, rank = question.device, question.kind.give, question.rank
    result = give(_restored(device, out, by.q, question.native_out)[_OWN_AXES[rank]])
    if question.out is not None:
        result = question.out
    if lse is None:
        return result
    return result, give(tokens.gather_numbers(device, lse, by.q.inverse)[_OWN_LSE_AXES[rank]])


def _restored(
    device: Device | None, rows: NativeArray, by: tokens.Sorted, out: NativeArray | None = None
) -> NativeArray:
    """Sorted rows in the order of their tokens."""
    if out is None:
        out = tokens.empty(device, rows.shape, rows.dtype)
    return tokens.gather(device, rows, by.inverse, out)


def _differentiate(question: _Question) -> tuple[Any, Pullback]:
    """Cotangents are sorted as the queries are, gradients put back in the order of what they are gradients of."""
    device, rank, q, v = question.device, question.rank, question.q, question.v
    if device is not None and min(q.shape[3], v.shape[3]) > 0:
        check_gradient_shape(check.DTYPE_NAMES[q.dtype], q.shape[3], v.shape[3], device.arch)
    by = _sort(question)
    out, lse, native_pullback = backward.run(device, by.operands, by.asked, None, question.options)

    def pullback(cotangent: Any) -> tuple[Any, ...]:
        pair = question.return_lse
        names = ("cotangent[0]", "cotangent[1]") if pair else ("cotangent",)
        native: list[Any] = gather(names, cotangent if pair else (cotangent,))[1]
        dout = tokens.gather(device, native[0][_ALL_AXES[rank]], by.q.order)
        dlse = tokens.gather_numbers(device, native[1][_ALL_LSE_AXES[rank]], by.q.order) if pair else None
        gradients = zip(native_pullback(dout, dlse), (by.q, by.k, by.k), strict=True)
        return tuple(question.kind.give(_restored(device, rows, own)[_OWN_AXES[rank]]) for rows, own in gradients)

    return _give(question, by, out, lse if question.return_lse else None), pullback


def _hash_sparse_vjp(
    q: Any, k: Any, v: Any, q_hash: Any, k_hash: Any, *, include_self: bool, **keywords: Any
) -> tuple[Any, Pullback]:
    return _differentiate(_ask_hash_sparse(q, k, v, q_hash, k_hash, include_self, **keywords))


def _qk_sparse_vjp(q: Any, k: Any, v: Any, keep_q: Any, keep_k: Any, **keywords: Any) -> tuple[Any, Pullback]:
    return _differentiate(_ask_qk_sparse(q, k, v, keep_q, keep_k, **keywords))


register(hash_sparse_attention, _hash_sparse_vjp)
register(qk_sparse_attention, _qk_sparse_vjp)
