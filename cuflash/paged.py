"""`paged_attention`: attention over keys and values that lie in the blocks of a cache."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from cuflash import check, forward
from cuflash.arrays import device_of, gather, give, kind_of
from cuflash.check import Packing
from cuflash.device import Device, check_placed
from cuflash.errors import InvalidDtypeError, InvalidShapeError, InvalidValueError
from cuflash.layout import NativeArray
from cuflash.masks import Mask
from cuflash.options import Options
from cuflash.packing import take_side

_NAMES = ("q", "k_cache", "v_cache", "bias", "out")
_OPTIONAL = ("bias", "out")


def paged_attention(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    block_tables: Any,
    seq_lens: Any,
    *,
    cu_seqlens_q: Any = None,
    max_seqlen_q: int | None = None,
    causal: bool = True,
    window: tuple[int | None, int | None] | None = None,
    mask: Mask | None = None,
    bias: Any = None,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    out: Any = None,
    options: Options | None = None,
) -> Any:
    """Exact attention to sequences whose keys and values lie in the blocks of a cache.

    PagedAttention (Kwon et al. 2023): key j of sequence b is token j % block_size of block
    block_tables[b, j // block_size]. The queries of a sequence are its last tokens: with `causal`, the last one sees
    all its keys. On a GPU nothing is brought together in contiguous memory.

    Parameters
    ----------
    q : array (batch, num_heads, head_dim)
        One query a sequence, as in decoding; or (batch, seqlen_q, num_heads, head_dim), as many for each; or, with
        `cu_seqlens_q`, (total_q, num_heads, head_dim), packed. Kinds of array, dtypes and strides as for `attention`.
    k_cache : array (num_blocks, block_size, num_kv_heads, head_dim)
        Keys, of q's kind, device and dtype, in any strides with a contiguous last axis: of a cache laid out as
        (num_blocks, num_kv_heads, block_size, head_dim) pass the transposed view. block_size is at least 1.
    v_cache : array (num_blocks, block_size, num_kv_heads, head_dim_v)
        Values.
    block_tables : array (batch, max_blocks)
        Blocks of each sequence in their order; whole numbers. Entries past the sequence's last key are never read.
    seq_lens : array (batch,)
        Keys of each sequence, its new tokens among them; whole numbers, at most max_blocks * block_size. On the host
        both are checked. On the GPU (int32, or cast there) they are not read back, so that a graph can be captured
        with them and replayed with other contents: lengths are clamped, blocks must be those of the cache.
    cu_seqlens_q : array or sequence (batch + 1,), optional
        Offsets of packed queries, as for `attention_varlen`.
    max_seqlen_q : int, optional
        At least the most queries of a sequence, with `cu_seqlens_q`; by default its longest or, on the GPU, total_q.
    causal, window, mask, scale, softcap, return_lse, options
        As for `attention`, sequence by sequence. ``options.num_splits`` fixed gives a query the same bits whatever else
        is in the batch.
    bias : array, optional
        Broadcasts to (batch, num_heads, seqlen_q, max_blocks * block_size); sequence b uses its first keys.
    out : array of q's shape with head_dim_v, optional
        Where the result goes.

    Returns
    -------
    out : array of q's shape with head_dim_v
        A query that sees no key gives 0.
    lse : array (batch, num_heads), (batch, num_heads, seqlen_q) or packed (num_heads, total_q)
        With return_lse; `merge_states` combines it with that of other keys, as of a shared prefix.

    Raises
    ------
    InvalidTypeError, InvalidDtypeError, InvalidShapeError, InvalidValueError, DeviceError
        An argument is not what this page says; nothing was computed or written.

    Examples
    --------
    >>> import numpy as np, cuflash
    >>> cache = np.random.default_rng(0).standard_normal((2, 8, 16, 2, 64), dtype=np.float32)
    >>> q = np.ones((3, 4, 64), np.float32)
    >>> tables = np.array([[5, 2], [0, 7], [3, 0]])
    >>> cuflash.paged_attention(q, *cache, tables, np.array([20, 32, 9])).shape
    (3, 4, 64)
    """
    asked = check.scores(causal, window, scale, softcap, mask)
    check.check_flag("return_lse", return_lse)
    kind, arrays = gather(_NAMES, (q, k_cache, v_cache, bias, out), _OPTIONAL)
    device = device_of(kind, _NAMES, arrays)
    q, k, v, bias, native_out = arrays
    _check_rank(q, cu_seqlens_q is not None)
    table = _take_table(device, q, k, v, block_tables, seq_lens)
    offsets = None
    if cu_seqlens_q is not None:
        offsets, packing = _packed(device, q, bias, table, cu_seqlens_q, max_seqlen_q)
    elif max_seqlen_q is not None:
        raise InvalidValueError(f"max_seqlen_q = {max_seqlen_q!r}: must be None without cu_seqlens_q; q says how many")
    else:
        packing = _dense(q, table)
    operands = forward.Operands(
        q, k, v, bias, native_out, offsets, None, table.blocks, table.seq_lens, asked.mask
    )  # fmt: skip
    return give(kind, out, *forward.run(device, operands, asked, packing, bool(return_lse), options))


class _Table(NamedTuple):
    """Checked tables of a cache."""

    blocks: NativeArray  # (batch, max_blocks)
    seq_lens: NativeArray  # (batch,)
    block_size: int

    @property
    def room(self) -> int:
        """Keys that a sequence may have."""
        return int(self.blocks.shape[1]) * self.block_size


def _check_rank(q: NativeArray, packed: bool) -> None:
    if packed:
        check.check_packed_rank("q", q.shape)
    elif q.ndim not in (3, 4):
        axes = "(batch, num_heads, head_dim), (batch, seqlen_q, num_heads, head_dim) or packed with cu_seqlens_q"
        raise InvalidShapeError(f"q.shape = {tuple(q.shape)}: must be {axes}")


def _take_table(
    device: Device | None, q: NativeArray, k: NativeArray, v: NativeArray, block_tables: Any, seq_lens: Any
) -> _Table:
    k_shape, v_shape = k.shape, v.shape
    for name, cache, shape in (("k_cache", k, k_shape), ("v_cache", v, v_shape)):
        if len(shape) != 4 or shape[1] < 1:
            axes = "(num_blocks, block_size, num_kv_heads, dim), block_size at least 1"
            raise InvalidShapeError(f"{name}.shape = {shape}: must be {axes}")
        if cache.dtype != q.dtype:
            raise InvalidDtypeError(f"{name}.dtype = {cache.dtype}: must be {q.dtype}, the dtype of q")
    if k_shape[3] != q.shape[-1]:
        have = k_shape[3]
        raise InvalidShapeError(f"k_cache.shape = {k_shape}: head_dim {have} must be {q.shape[-1]}, that of q")
    if v_shape[:2] != k_shape[:2]:
        raise InvalidShapeError(f"v_cache.shape = {v_shape}: must begin with {k_shape[:2]}, as k_cache does")
    blocks = _whole_numbers(device, "block_tables", block_tables, 2, "(batch, max_blocks)")
    lengths = _whole_numbers(device, "seq_lens", seq_lens, 1, "(batch,)")
    if lengths.shape[0] != blocks.shape[0]:
        raise InvalidShapeError(f"seq_lens.shape = {lengths.shape}: must be {blocks.shape[:1]}, one per block table")
    table = _Table(blocks, lengths, k_shape[1])
    if type(lengths) is np.ndarray:
        _check_lengths(lengths, table.room)
        if type(blocks) is np.ndarray:
            _check_blocks(blocks, lengths, table.block_size, k_shape[0])
    return table


def _whole_numbers(device: Device | None, name: str, value: Any, axes: int, shape: str) -> NativeArray:
    if isinstance(value, tuple | list):
        value = np.asarray(value) if value else np.zeros((0,) * axes, np.int64)
    array = kind_of(value, name).take(value, name)
    if array.ndim != axes:
        raise InvalidShapeError(f"{name}.shape = {tuple(array.shape)}: must be {shape}")
    if array.dtype.kind not in "iu":
        raise InvalidDtypeError(f"{name}.dtype = {array.dtype}: must be an integer dtype")
    if type(array) is not np.ndarray:
        check_placed(device, name, array)
    return array


def _check_lengths(seq_lens: np.ndarray, room: int) -> None:
    wrong = (seq_lens < 0) | (seq_lens > room)
    if wrong.any():
        b = int(np.argmax(wrong))
        raise InvalidValueError(
            f"seq_lens[{b}] = {seq_lens[b]}: must be 0 to {room}, the tokens that a row of block_tables has room for"
        )


def _check_blocks(block_tables: np.ndarray, seq_lens: np.ndarray, block_size: int, num_blocks: int) -> None:
    """Every entry that leads to a key."""
    used = np.arange(block_tables.shape[1]) < -(-seq_lens[:, None] // block_size)
    wrong = used & ((block_tables < 0) | (block_tables >= num_blocks))
    if wrong.any():
        b, i = (int(x) for x in np.argwhere(wrong)[0])
        raise InvalidValueError(
            f"block_tables[{b}, {i}] = {block_tables[b, i]}: must be 0 to {num_blocks - 1}, a block of the cache"
        )


def _dense(q: NativeArray, table: _Table) -> Packing:
    """As many queries for each sequence."""
    batch = table.seq_lens.shape[0]
    if q.shape[0] != batch:
        raise InvalidShapeError(f"q.shape = {tuple(q.shape)}: batch {q.shape[0]} must be {batch}, that of block_tables")
    single = q.ndim == 3
    return Packing(batch, 1 if single else q.shape[1], table.room, False, table.block_size, single)


def _packed(
    device: Device | None,
    q: NativeArray,
    bias: NativeArray | None,
    table: _Table,
    cu_seqlens_q: Any,
    max_seqlen_q: int | None,
) -> tuple[NativeArray, Packing]:
    biased = bias is not None and bias.ndim > 1 and bias.shape[-2] != 1
    side = take_side(device, "q", cu_seqlens_q, max_seqlen_q, q.shape[0], biased)
    batch = table.seq_lens.shape[0]
    if side.cu_seqlens.shape[0] != batch + 1:
        have = side.cu_seqlens.shape
        raise InvalidShapeError(f"cu_seqlens_q.shape = {have}: must be ({batch + 1},), block_tables has {batch} rows")
    return side.cu_seqlens, Packing(batch, side.max_seqlen, table.room, True, table.block_size)
