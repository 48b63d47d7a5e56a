"""Tokens of each (batch, head) in another order: sorting by a key, moving rows, and who then sees whom.

Native arrays in, native arrays out, on a device or, where it is None, on the CPU. Nothing is read back: lengths do not
depend on what the keys hold.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cuflash import records
from cuflash.device import Device, Kernel
from cuflash.forward import MAX_PREPARED
from cuflash.layout import Layout, NativeArray, layout
from cuflash.plan.launch import Launch
from cuflash.plan.params import MOVE_ROWS_PARAMS, MOVED_ARRAYS, SORT_TOKENS_PARAMS, VISIBLE_RANGES_PARAMS
from cuflash.plan.tokens import Lists, plan_move, plan_ranges, plan_sort

INT32 = np.dtype(np.int32)
NOWHERE = 2**31 - 1  # where the range of a dropped query begins and ends


class Sorted(NamedTuple):
    """Tokens sorted by their keys, those of one key in their own order; arrays (batch, heads, tokens)."""

    keys: NativeArray  # on a device in the order of unsigned numbers
    order: NativeArray  # int32, of each position its token; -1 for dropped ones, which come last
    inverse: NativeArray  # int32, of each token its position


class _Prepared(NamedTuple):
    """A kernel and its parameters, complete but for the addresses."""

    kernel: Kernel
    words: np.ndarray

    def launch(self, record: _Record, addresses: Mapping[str, int | list[int]]) -> None:
        words = self.words.copy()
        for name, address in addresses.items():
            words[record.at[name]] = address
        self.kernel(words.view(record.as_bytes))


class _Record(NamedTuple):
    """A parameter record as a launch fills and takes it."""

    at: dict[str, int | slice]  # the words that hold addresses
    as_bytes: np.dtype

    @classmethod
    def of(cls, params: np.dtype) -> _Record:
        return cls(records.address_words(params), records.as_bytes(params))


_SORT, _RANGES, _MOVE = map(_Record.of, (SORT_TOKENS_PARAMS, VISIBLE_RANGES_PARAMS, MOVE_ROWS_PARAMS))


def sort(device: Device | None, source: NativeArray) -> Sorted:
    """Sort by keys (batch, tokens, heads): whole numbers, or truths, of which False drops a token."""
    batch, tokens, heads = source.shape
    if device is None:
        return _sort_on_cpu(source)
    shape, key_dtype = (batch, heads, tokens), np.dtype(f"u{source.dtype.itemsize}")
    with device.call() as call:
        result = Sorted(device.empty(shape, key_dtype), device.empty(shape, INT32), device.empty(shape, INT32))
        if 0 in shape:
            return result
        prepared = _prepared(device, ("sort", array := layout(source)), lambda: _prepare_sort(array))
        addresses = {"source": call.read(source, "source")}
        addresses |= {name: call.write(array, name) for name, array in zip(Sorted._fields, result, strict=True)}
        if key_dtype.itemsize > 1:
            addresses["spare_keys"] = call.workspace(shape, key_dtype, "spare_keys")
            addresses["spare_order"] = call.workspace(shape, INT32, "spare_order")
        prepared.launch(_SORT, addresses)
    return result


def _prepare_sort(source: Layout) -> tuple[Launch, np.ndarray]:
    batch, tokens, heads = source.shape
    record = np.zeros((), SORT_TOKENS_PARAMS)
    record["source_strides"] = records.in_elements("hash", source)
    record["num_heads"], record["tokens"] = heads, tokens
    return plan_sort(source.dtype, batch * heads), record


def _sort_on_cpu(source: np.ndarray) -> Sorted:
    keep = source.dtype == np.bool_
    keys = np.swapaxes(~source if keep else source, 1, 2)
    order = np.argsort(keys, axis=-1, kind="stable").astype(INT32)
    positions = np.broadcast_to(np.arange(keys.shape[-1], dtype=INT32), keys.shape)
    inverse = np.empty_like(order)
    np.put_along_axis(inverse, order, positions, axis=-1)
    keys = np.take_along_axis(keys, order, axis=-1)
    return Sorted(keys, np.where(keys, INT32.type(-1), order) if keep else order, inverse)


def visible_ranges(device: Device | None, q: Sorted, k: Sorted, shift: int) -> tuple[NativeArray, NativeArray]:
    """int32 (batch, num_heads, len_q) each: where the sorted keys begin and end that a sorted query sees.

    They are those with its key whose token is less than its own + shift. Both ascend along the queries; dropped queries
    have NOWHERE twice.
    """
    if device is None:
        return _ranges_on_cpu(q, k, shift)
    batch, heads, len_q = shape = q.order.shape
    kv_heads, len_k = k.order.shape[1:]
    with device.call() as call:
        begin, end = device.empty(shape, INT32), device.empty(shape, INT32)
        if 0 in shape:
            return begin, end

        def prepare() -> tuple[Launch, np.ndarray]:
            record = np.zeros((), VISIBLE_RANGES_PARAMS)
            record["shift"], record["group"], record["len_q"], record["len_k"] = shift, heads // kv_heads, len_q, len_k
            return plan_ranges(q.keys.dtype.itemsize, batch * heads, len_q), record

        asked = ("ranges", q.keys.dtype, shape, kv_heads, len_k, shift)
        addresses = {
            "q_keys": call.read(q.keys, "q_keys"),
            "q_order": call.read(q.order, "q_order"),
            "k_keys": call.read(k.keys, "k_keys"),
            "k_order": call.read(k.order, "k_order"),
            "begin": call.write(begin, "begin"),
            "end": call.write(end, "end"),
        }
        _prepared(device, asked, prepare).launch(_RANGES, addresses)
    return begin, end


def _ranges_on_cpu(q: Sorted, k: Sorted, shift: int) -> tuple[np.ndarray, np.ndarray]:
    begin, end = np.empty(q.order.shape, INT32), np.empty(q.order.shape, INT32)
    count = k.order.shape[2] + 1
    for batch, head in np.ndindex(q.order.shape[:2]):
        own, kv = (batch, head), (batch, head * k.order.shape[1] // q.order.shape[1])
        first, last = (np.searchsorted(k.keys[kv], q.keys[own], side) for side in ("left", "right"))
        # (key, token) as one number: keys that are the same begin at the same position
        places = np.searchsorted(k.keys[kv], k.keys[kv]).astype(np.int64) * count + k.order[kv]
        bounds = np.clip(q.order[own].astype(np.int64) + shift, 0, count - 1)
        dropped = q.order[own] < 0
        begin[own] = np.where(dropped, NOWHERE, first)
        end[own] = np.where(dropped, NOWHERE, np.clip(np.searchsorted(places, first * count + bounds), first, last))
    return begin, end


def gather(
    device: Device | None, source: NativeArray, order: NativeArray, out: NativeArray | None = None
) -> NativeArray:
    """out[b, i, h] = source[b, order[b, h, i], h], zeros where the order says -1.

    source and out (batch, tokens, heads, dim) of any element type, order (batch, heads, tokens of out). Without `out`
    the rows of a head are put side by side.
    """
    if out is None:
        out = empty(device, (*order.shape, source.shape[3]), source.dtype).transpose(0, 2, 1, 3)
    if 0 in out.shape:
        return out
    if device is None:
        for batch, head in np.ndindex(order.shape[:2]):
            rows = source[batch, :, head][order[batch, head]]
            rows[order[batch, head] < 0] = 0
            out[batch, :, head] = rows
        return out
    with device.call() as call:
        if not layout(source).rows_contiguous:
            source = source.copy(order="C")
        layouts = layout(source), layout(out)
        prepared = _prepared(device, ("gather", *layouts), lambda: _prepare_gather(*layouts))
        addresses: dict[str, int | list[int]] = {
            "source": _padded([call.read(source, "source")]),
            "target": _padded([call.write(out, "target")]),
            "sources": call.read(order, "order"),
        }
        prepared.launch(_MOVE, addresses)
    return out


def gather_numbers(device: Device | None, source: NativeArray, order: NativeArray) -> NativeArray:
    """out[b, h, i] = source[b, h, order[b, h, i]], 0 where the order says -1: an lse (batch, heads, tokens)."""
    return gather(device, source.transpose(0, 2, 1)[..., None], order).transpose(0, 2, 1, 3)[..., 0]


def empty(device: Device | None, shape: tuple[int, ...], dtype: np.dtype) -> NativeArray:
    """A C-contiguous native array."""
    if device is None:
        return np.empty(shape, dtype)
    with device.call():
        return device.empty(shape, dtype)


def _prepare_gather(source: Layout, target: Layout) -> tuple[Launch, np.ndarray]:
    tokens = target.shape[1]
    source, target = _with_axis(source, 2), _with_axis(target, 1)  # a row is a block, as the order has them
    return _prepare_move([(source, target)], tokens, Lists(), tokens)


class Moved(NamedTuple):
    """One array of a move: 5 axes (batch, blocks, rows of a block, heads, dim), of which the first may be missing."""

    source: NativeArray
    target: NativeArray
    names: tuple[str, str]
    fresh: bool = False  # every element of the target is written; else it may also be the source


def move(device: Device, moved: Sequence[Moved], rows: int, lists: Lists, **entries: NativeArray) -> None:
    """Rows of `sources` to `targets`, where lists of these names say, in one launch; at most MOVED_ARRAYS arrays.

    Lists are C-contiguous. Without one the rows are the first of their array. Rows from a negative entry are zeros,
    those to one are left out.
    """
    if rows == 0:
        return
    layouts = tuple((layout(pair.source), layout(pair.target)) for pair in moved)

    def prepare() -> tuple[Launch, np.ndarray]:
        return _prepare_move([(_full_rank(source), _full_rank(target)) for source, target in layouts], rows, lists)

    with device.call() as call:
        sources, targets = [], []
        for source, target, names, fresh in moved:
            targets.append(call.write(target, names[1]) if fresh else call.update(target, names[1]))
            sources.append(targets[-1] if source is target else call.read(source, names[0]))
        addresses: dict[str, int | list[int]] = {"source": _padded(sources), "target": _padded(targets)}
        addresses |= {name: call.read(entry, name) for name, entry in entries.items()}
        _prepared(device, ("move", layouts, rows, lists), prepare).launch(_MOVE, addresses)


def _prepare_move(
    moved: Sequence[tuple[Layout, Layout]], rows: int, lists: Lists, list_pitch: int = 0
) -> tuple[Launch, np.ndarray]:
    """Of layouts of 5 axes; one list for all (batch, head), or one for each, list_pitch entries long."""
    if list_pitch == 0 and all(_heads_contiguous(array) for pair in moved for array in pair):
        moved = [(_one_row(source), _one_row(target)) for source, target in moved]
    access = records.access_bytes(*(array for pair in moved for array in pair))
    record = np.zeros((), MOVE_ROWS_PARAMS)
    for side, arrays in zip(("source", "target"), zip(*moved, strict=True), strict=True):
        strides = [
            stride // access if size > 1 else 0
            for array in arrays
            for stride, size in zip(array.strides[:4], array.shape, strict=False)
        ]
        record[f"{side}_strides"][: len(strides)] = strides
    columns = [source.shape[4] * source.dtype.itemsize // access for source, _ in moved]
    record["columns"][: len(moved)] = columns
    batch, heads = moved[0][0].shape[0], moved[0][0].shape[3]
    record["batch"], record["num_heads"], record["num_rows"], record["list_pitch"] = batch, heads, rows, list_pitch
    return plan_move(access, max(columns), len(moved) * batch * heads, rows, lists), record


def _padded(addresses: list[int]) -> list[int]:
    return addresses + [0] * (MOVED_ARRAYS - len(addresses))


def _with_axis(array: Layout, axis: int) -> Layout:
    """With an axis of one element more."""
    shape, strides = ((*x[:axis], value, *x[axis:]) for x, value in ((array.shape, 1), (array.strides, 0)))
    return array._replace(shape=shape, strides=strides)


def _full_rank(array: Layout) -> Layout:
    return array if len(array.shape) == 5 else _with_axis(array, 0)


def _heads_contiguous(array: Layout) -> bool:
    return array.shape[3] == 1 or array.strides[3] == array.shape[4] * array.dtype.itemsize


def _one_row(array: Layout) -> Layout:
    """The heads of a token, which lie side by side, as one."""
    shape = (*array.shape[:3], 1, array.shape[3] * array.shape[4])
    return array._replace(shape=shape, strides=(*array.strides[:3], 0, array.dtype.itemsize))


def _prepared(device: Device, asked: Hashable, prepare: Callable[[], tuple[Launch, np.ndarray]]) -> _Prepared:
    prepared: Any = device.prepared.get(asked)
    if prepared is None:
        launch, record = prepare()
        if len(device.prepared) >= MAX_PREPARED:
            device.prepared.clear()
        prepared = device.prepared[asked] = _Prepared(device.load(launch), records.as_words(record))
    return prepared
