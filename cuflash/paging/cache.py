"""`PagedKVCache`: keys and values of sequences that grow, fork and share, in blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from cuflash.arrays import NUMPY, Kind, device_of, kind_of
from cuflash.check import DTYPE_NAMES
from cuflash.device import Device
from cuflash.errors import InvalidDtypeError, InvalidShapeError, InvalidTypeError, InvalidValueError, type_name
from cuflash.layout import NativeArray
from cuflash.paging import moves, report
from cuflash.paging.checks import check_count, take_counts, take_integers
from cuflash.paging.ledger import Ledger
from cuflash.paging.pool import BlockPool


class PagedKVCache:
    """The keys and values of many sequences in blocks of one size (PagedAttention; Kwon et al. 2023, section 4).

    A sequence of L tokens holds ⌈L / block_size⌉ blocks, anywhere in the cache. Sequences that begin alike hold the
    same blocks; one that writes into a block that others hold copies it first. Slot s is slot s % block_size of block
    s // block_size, in every layer.

    A step of a model: `reserve` slots for the new tokens, and in each layer `append` their keys and values and attend
    with ``paged_attention(q, cache.k_cache(layer), cache.v_cache(layer), tables, lengths)``; then `commit` the tokens,
    whose full blocks are found from then on by sequences that begin alike.

    After an error the cache is as it was, to the byte. Bookkeeping is Python on the host and O(1) a block; a cache is
    not for several threads at once. On a GPU nothing is read back but what is swapped out.

    Parameters
    ----------
    num_layers, num_blocks, block_size, num_kv_heads, head_dim : int
        At least 1. A layer is two arrays: keys (num_blocks, block_size, num_kv_heads, head_dim), and values with
        head_dim_v.
    head_dim_v : int, optional
        By default head_dim.
    dtype : str or dtype
        "float16", "bfloat16", "float32" or "float64".
    like : array, optional
        Arrays are of its kind and lie on its device; by default NumPy's. Not JAX's, which cannot be written.
    window : int, optional
        Queries see at most this many keys before their own, the ``window=(left, 0)`` of `paged_attention`: blocks that
        no later query sees are given back. They stay in tables as block 0, whose keys the window hides.
    prefix_cache : bool
        Whether blocks are found by their tokens; if not, `add_sequence` finds none and `commit` remembers none.
    host_blocks : int
        Blocks on the host that `swap_out` can fill.

    Raises
    ------
    InvalidTypeError, InvalidDtypeError, InvalidShapeError, InvalidValueError, DeviceError
        An argument, here or of a method, is not what its page says.
    OutOfBlocksError
        From `reserve` and `swap_in` with too few free blocks, from `swap_out` with too few on the host.
    UnknownSequenceError
        From every method: a sequence that is not one of this cache, or was freed.

    Examples
    --------
    >>> import numpy as np, cuflash
    >>> cache = cuflash.PagedKVCache(1, 8, 4, 2, 16, dtype="float32")
    >>> seq_id, cached = cache.add_sequence()
    >>> slots = cache.reserve([seq_id], [7])
    >>> k, v = np.random.default_rng(0).standard_normal((2, 7, 2, 16), dtype=np.float32)
    >>> cache.append(0, k, v, slots)
    >>> other = cache.fork(seq_id)
    >>> cache.usage().in_use
    2
    >>> slots = cache.reserve([seq_id, other], [1, 2])  # a copy for one, a further block for the other
    >>> cache.block_tables([seq_id, other])
    array([[ 0,  2, -1],
           [ 0,  1,  3]], dtype=int32)
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        head_dim_v: int | None = None,
        dtype: Any = "bfloat16",
        like: Any = None,
        window: int | None = None,
        prefix_cache: bool = True,
        host_blocks: int = 0,
    ) -> None:
        head_dim_v = head_dim if head_dim_v is None else head_dim_v
        sizes = {
            "num_layers": num_layers, "num_blocks": num_blocks, "block_size": block_size,
            "num_kv_heads": num_kv_heads, "head_dim": head_dim, "head_dim_v": head_dim_v,
        }  # fmt: skip
        for name, size in sizes.items():
            check_count(name, size, 1)
        check_count("host_blocks", host_blocks)
        if window is not None:
            check_count("window", window)
        if not isinstance(prefix_cache, bool):
            raise InvalidTypeError(f"prefix_cache = {prefix_cache!r}: must be True or False")
        self.block_size = int(block_size)
        self.dtype = _dtype(dtype)
        self._kind, self._device = _place(like)
        shapes = [(num_layers, num_blocks, block_size, num_kv_heads, dim) for dim in (head_dim, head_dim_v)]
        self._caches = [self._zeros(shape) for shape in shapes]
        self._host = [np.zeros((num_layers, host_blocks, *shape[2:]), self.dtype) for shape in shapes]
        window = None if window is None else int(window)
        self._ledger = Ledger(BlockPool(num_blocks), BlockPool(host_blocks), self.block_size, window, prefix_cache)
        self._stats: Counter[str] = Counter()

    def _zeros(self, shape: tuple[int, ...]) -> NativeArray:
        if self._device is None:
            return np.zeros(shape, self.dtype)
        with self._device.call():
            array = self._device.empty(shape, self.dtype)
            array.fill(0)
        return array

    def __repr__(self) -> str:
        layers, _, _, heads, dim = self._caches[0].shape
        return f"PagedKVCache({layers} layers, {heads} heads of {dim}, {self.dtype}): {self.usage()}"

    @property
    def num_free(self) -> int:
        """Blocks that `reserve` can take."""
        return self._ledger.pool.num_free

    def add_sequence(self, tokens: Any = None, extra: str | bytes | None = None) -> tuple[int, int]:
        """Begin a sequence with as much of a prompt as the cache already holds.

        Parameters
        ----------
        tokens : sequence of int, optional
            The prompt. Whole blocks of it that were committed by any sequence, and not taken since, are held at once.
        extra : str or bytes, optional
            What else keys and values depend on, such as an adapter or an image: only sequences with the same one share.

        Returns
        -------
        seq_id : int
            Never used again.
        cached_tokens : int
            Its tokens so far, a multiple of block_size; `reserve`, `append` and `commit` the others. Where that is the
            whole prompt there is nothing to append, and its last token's query sees the whole sequence.
        """
        if extra is not None and not isinstance(extra, str | bytes):
            raise InvalidTypeError(f"extra = {extra!r}: must be str, bytes or None")
        prompt = take_integers("tokens", () if tokens is None else tokens)
        seq_id, cached = self._ledger.add(prompt, extra)
        self._stats["prompt_tokens"] += len(prompt)
        self._stats["cached_tokens"] += cached
        return seq_id, cached

    def reserve(self, seq_ids: Sequence[int], counts: Any = 1) -> Any:
        """Slots for new tokens, all or none; blocks that others hold too are copied, all in one call.

        Parameters
        ----------
        seq_ids : sequence of int
            Each once.
        counts : int or sequence of int
            New tokens of each sequence.

        Returns
        -------
        slots : array (sum of counts,)
            int64, on the cache's device: those of the first sequence's tokens, then of the second's, and so on.
        """
        sequences = self._ledger.present(seq_ids, once=True)
        numbers = take_counts("counts", counts, len(sequences))
        slots, copied = self._ledger.reserve(sequences, numbers, lambda pairs: moves.copy_blocks(self._caches, pairs))
        self._stats["reserved_tokens"] += len(slots)
        self._stats["copied_blocks"] += copied
        return self._give(np.array(slots, np.int64))

    def append(self, layer: int, k: Any, v: Any, slots: Any) -> None:
        """Write the keys and values of new tokens into one layer.

        Parameters
        ----------
        layer : int
        k, v : array (tokens, num_kv_heads, head_dim or head_dim_v)
            Of the cache's dtype, on its device, in any strides.
        slots : array (tokens,)
            As `reserve` returned them, or a part. On the host each must be another one, in a block that one sequence
            holds. On a GPU they are not read back: they must be slots of the cache.
        """
        caches = [cache[self._layer(layer)] for cache in self._caches]
        keys, values = self._take_tokens("k", k, caches[0]), self._take_tokens("v", v, caches[1])
        places = self._take_slots(slots)
        counts = [array.shape[0] for array in (keys, values, places)]
        if len(set(counts)) > 1:
            raise InvalidShapeError(f"k, v and slots have {counts} tokens: must have the same number")
        moves.write_tokens(caches[0], caches[1], keys, values, places)

    def commit(self, seq_ids: Sequence[int], tokens: Any) -> None:
        """Say which tokens were written: full blocks of known tokens are found by later sequences.

        Parameters
        ----------
        seq_ids : sequence of int
            Each once.
        tokens : sequence of sequences of int
            For each sequence the next ones after those found or committed before, no more than were reserved. Call it
            when all layers are written.
        """
        sequences = self._ledger.present(seq_ids, once=True)
        if not hasattr(tokens, "__len__") or len(tokens) != len(sequences):
            raise InvalidValueError(f"tokens = {tokens!r}: must be {len(sequences)} sequences, one for each of seq_ids")
        self._ledger.commit(sequences, [take_integers(f"tokens[{i}]", more) for i, more in enumerate(tokens)])

    def fork(self, seq_id: int) -> int:
        """The id of a new sequence with the same tokens, in the same blocks; none is allocated or copied."""
        (sequence,) = self._ledger.present((seq_id,))
        return self._ledger.fork(sequence)

    def truncate(self, seq_id: int, length: int) -> None:
        """Keep the first `length` tokens; blocks that only the others needed are given back."""
        (sequence,) = self._ledger.present((seq_id,))
        check_count("length", length)
        self._ledger.truncate(sequence, int(length))

    def free(self, seq_id: int) -> None:
        """End a sequence, swapped out or not; blocks that nobody else holds are free, found until taken."""
        self._ledger.free(seq_id)

    def swap_out(self, seq_ids: Sequence[int]) -> None:
        """Move sequences to the host, all or none. Blocks that they share with others stay with these as well."""
        self._swap(seq_ids, self._caches, self._host, "swapped_out_blocks")

    def swap_in(self, seq_ids: Sequence[int]) -> None:
        """Move sequences back into the cache, all or none, into whichever blocks are free."""
        self._swap(seq_ids, self._host, self._caches, "swapped_in_blocks")

    def _swap(self, seq_ids: Sequence[int], sources: list[Any], targets: list[Any], counter: str) -> None:
        to_host = targets is self._host
        self._stats[counter] += self._ledger.swap(
            seq_ids, to_host, lambda pairs: moves.move_blocks(sources, targets, pairs)
        )

    def k_cache(self, layer: int) -> Any:
        """Keys of a layer (num_blocks, block_size, num_kv_heads, head_dim) for `paged_attention`; no copy."""
        return self._kind.give(self._caches[0][self._layer(layer)])

    def v_cache(self, layer: int) -> Any:
        """Values of a layer (num_blocks, block_size, num_kv_heads, head_dim_v); no copy."""
        return self._kind.give(self._caches[1][self._layer(layer)])

    def block_tables(self, seq_ids: Sequence[int]) -> Any:
        """Blocks of each sequence, -1 past its last: int32 (sequences, most blocks of one), on the cache's device."""
        sequences = self._ledger.present(seq_ids)
        table = np.full((len(sequences), max((len(s.blocks) for s in sequences), default=0)), -1, np.int32)
        for row, sequence in zip(table, sequences, strict=True):
            row[: len(sequence.blocks)] = sequence.blocks
        return self._give(table)

    def seq_lens(self, seq_ids: Sequence[int]) -> Any:
        """Tokens of each sequence, the reserved ones among them; int32 (sequences,), on the cache's device."""
        return self._give(np.array([s.length for s in self._ledger.present(seq_ids)], np.int32))

    def gather(self, layer: int, seq_id: int) -> tuple[Any, Any]:
        """Copies of a sequence's keys and values in one layer, (tokens, num_kv_heads, head_dim or head_dim_v)."""
        (sequence,) = self._ledger.present((seq_id,))
        if sequence.released:
            gone = sequence.released * self.block_size
            raise InvalidValueError(f"sequence {seq_id} has lost its first {gone} tokens to the window: must have all")
        index = self._layer(layer)
        k, v = (moves.gather_tokens(cache[index], sequence.blocks, sequence.length) for cache in self._caches)
        return self._kind.give(k), self._kind.give(v)

    def usage(self) -> report.Usage:
        """Blocks and slots now: in use, shared, free, wasted. Takes O(sequences)."""
        return report.usage(self._ledger)

    def stats(self) -> report.Stats:
        """What was found, reserved, copied, evicted and swapped since the cache was made."""
        return report.Stats(**self._stats, evicted_blocks=self._ledger.pool.evictions)

    def _give(self, array: np.ndarray) -> Any:
        return self._kind.give(array if self._device is None else self._device.constant(array))

    def _layer(self, layer: int) -> int:
        check_count("layer", layer)
        num_layers = self._caches[0].shape[0]
        if layer >= num_layers:
            raise InvalidValueError(f"layer = {layer}: must be 0 to {num_layers - 1}")
        return int(layer)

    def _take_tokens(self, name: str, value: Any, cache: NativeArray) -> NativeArray:
        array = self._take(name, value)
        if array.ndim != 3 or array.shape[1:] != cache.shape[2:]:
            want = ", ".join(map(str, cache.shape[2:]))
            raise InvalidShapeError(f"{name}.shape = {tuple(array.shape)}: must be (tokens, {want})")
        if array.dtype != self.dtype:
            raise InvalidDtypeError(f"{name}.dtype = {array.dtype}: must be {self.dtype}, that of the cache")
        return array

    def _take_slots(self, value: Any) -> NativeArray:
        slots = self._take("slots", value)
        if slots.ndim != 1:
            raise InvalidShapeError(f"slots.shape = {tuple(slots.shape)}: must be (tokens,)")
        if slots.dtype.kind not in "iu":
            raise InvalidDtypeError(f"slots.dtype = {slots.dtype}: must be an integer dtype")
        if type(slots) is np.ndarray:
            self._check_slots(slots)
        return slots

    def _check_slots(self, slots: np.ndarray) -> None:
        most = self._ledger.pool.num_blocks * self.block_size
        wrong = (slots < 0) | (slots >= most)
        if wrong.any():
            i = int(np.argmax(wrong))
            raise InvalidValueError(f"slots[{i}] = {slots[i]}: must be 0 to {most - 1}")
        holders = self._ledger.pool.counts[slots // self.block_size]
        if (holders != 1).any():
            i = int(np.argmax(holders != 1))
            block = slots[i] // self.block_size
            raise InvalidValueError(
                f"slots[{i}] = {slots[i]}: {holders[i]} sequences hold block {block}: must be one, as after reserve"
            )
        first = np.unique(slots, return_index=True)[1]
        if len(first) < len(slots):
            i = int(np.setdiff1d(np.arange(len(slots)), first)[0])
            raise InvalidValueError(f"slots[{i}] = {slots[i]}: must occur once")

    def _take(self, name: str, value: Any) -> NativeArray:
        kind = kind_of(value, name)
        array = kind.take(value, name)
        device_of(kind, ("the cache", name), (self._caches[0], array))
        return array


def _dtype(dtype: Any) -> np.dtype:
    try:
        native = np.dtype(dtype)
    except TypeError:
        native = None
    if native not in DTYPE_NAMES:
        raise InvalidDtypeError(f"dtype = {dtype!r}: must be one of {', '.join(DTYPE_NAMES.values())}")
    return native


def _place(like: Any) -> tuple[Kind, Device | None]:
    if like is None:
        return NUMPY, None
    kind = kind_of(like, "like")
    if kind.name.startswith("jax"):
        raise InvalidTypeError(f"like is a {type_name(like)}: must be writeable, which JAX arrays are not")
    array = kind.take(like, "like")
    return kind, None if type(array) is np.ndarray else device_of(kind, ("like",), (array,))
