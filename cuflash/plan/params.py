"""Run-time parameters of the kernels: NumPy records, passed by value, mirrored by one CUDA struct each.

Strides are in elements, int64; pointers are uint64. A test compares names, order and offsets with the CUDA structs.
"""

from __future__ import annotations

import numpy as np

from cuflash.masks.program import MAX_REALS, MAX_TABLES, MAX_WHOLES
from cuflash.plan.config import MAX_SPLITS

FORWARD_PARAMS = np.dtype(
    [
        ("q", np.uint64),  # (batch, seqlen_q, num_heads, head_dim); packed: (total_q, num_heads, head_dim)
        ("k", np.uint64),  # (batch, seqlen_k, num_kv_heads, head_dim); packed: (total_k, ...)
        ("v", np.uint64),  # (batch, seqlen_k, num_kv_heads, head_dim_v); packed: (total_k, ...)
        ("o", np.uint64),  # (batch, seqlen_q, num_heads, head_dim_v); split: sums, one more leading axis
        ("lse", np.uint64),  # (batch, num_heads, seqlen_q), packed (num_heads, total_q); 0: not wanted
        ("bias", np.uint64),  # (batch, num_heads, seqlen_q, seqlen_k) by strides, 0 where broadcast
        ("cu_seqlens_q", np.uint64),  # int32 (batch + 1), packed only
        ("cu_seqlens_k", np.uint64),
        ("mask_tables", np.uint64, MAX_TABLES),  # arrays that the mask looks up
        ("block_tables", np.uint64),  # int32 (batch, table_pitch), paged only
        ("seq_lens", np.uint64),  # int32 (batch), paged only
        ("tile_lists", np.uint64),  # int32, see `cuflash.plan.tile_lists`
        ("tile_counts", np.uint64),
        ("shares", np.uint64),  # int32 (batch, 2), written: first partial state, how many; even work only
        ("q_strides", np.int64, 3),  # batch, token, head
        ("k_strides", np.int64, 3),
        ("v_strides", np.int64, 3),
        ("o_strides", np.int64, 3),
        ("lse_strides", np.int64, 3),  # batch, head, token
        ("bias_strides", np.int64, 4),  # batch, head, query, key
        ("o_split_stride", np.int64),
        ("lse_split_stride", np.int64),
        ("mask_strides", np.int64, 4 * MAX_TABLES),  # of each table
        ("mask_wholes", np.int64, MAX_WHOLES),  # its constants
        ("mask_reals", np.float64, MAX_REALS),
        ("scale64", np.float64),  # for float64, which float32 would round
        ("softcap64", np.float64),
        ("scale", np.float32),
        ("softcap", np.float32),
        ("batch", np.int32),
        ("num_heads", np.int32),
        ("group", np.int32),  # query heads per key/value head
        ("seqlen_q", np.int32),  # packed: upper bound of a sequence's length
        ("seqlen_k", np.int32),
        ("total_q", np.int32),  # packed: number of tokens; cu_seqlens are clamped to it
        ("total_k", np.int32),
        ("left", np.int32),  # window, NO_BOUND where unbounded
        ("right", np.int32),
        ("num_splits", np.int32),  # partial states of a query; even work: of all sequences in all, at most
        ("most_shares", np.int32),  # see `cuflash.plan.shares`
        ("least_tiles", np.int32),
        ("q_tiles", np.int32),  # query tiles of one head of one batch entry; packed: of one head in all
        ("list_pitch", np.int32),  # key tiles that a list has room for
        ("block_size", np.int32),  # tokens of a block of the cache
        ("table_pitch", np.int32),
    ],
    align=True,
)

NO_BOUND = 2**31 - 1  # kernels compute window bounds in 64 bits

COMBINE_PARAMS = np.dtype(  # of the kernel that merges the partial states of splits, which lie in one workspace
    [
        ("states", np.uint64),  # partial outputs
        ("lses", np.uint64),
        ("shares", np.uint64),  # int32 (batch, 2): of a sequence the first state, how many; 0: num_states of each row
        ("o", np.uint64),
        ("lse", np.uint64),  # 0: not wanted
        ("state_stride", np.int64),  # from one state to the next
        ("state_lse_stride", np.int64),
        ("state_strides", np.int64, 3),  # batch, token, head
        ("state_lse_strides", np.int64, 3),  # batch, head, token
        ("o_strides", np.int64, 3),
        ("lse_strides", np.int64, 3),
        ("num_states", np.int32),
        ("num_heads", np.int32),
        ("seqlen_q", np.int32),
        ("rows", np.int64),  # batch * num_heads * seqlen_q
    ],
    align=True,
)

MERGE_PARAMS = np.dtype(  # of the kernel that merges states which lie anywhere
    [
        ("rows", COMBINE_PARAMS),  # all but where states lie
        ("states", np.uint64, MAX_SPLITS),  # each laid out by state_strides of rows
        ("lses", np.uint64, MAX_SPLITS),  # each laid out by state_lse_strides of rows
    ],
    align=True,
)

BACKWARD_PARAMS = np.dtype(
    [
        ("q", np.uint64),  # as in FORWARD_PARAMS
        ("k", np.uint64),
        ("v", np.uint64),
        ("o", np.uint64),  # what the forward pass gave
        ("d_o", np.uint64),  # its cotangent, laid out by its own strides
        ("lse", np.uint64),  # what the forward pass gave
        ("d_lse", np.uint64),  # its cotangent; 0: none
        ("bias", np.uint64),
        ("dq", np.uint64),
        ("dk", np.uint64),
        ("dv", np.uint64),
        ("dbias", np.uint64),
        ("row_lse", np.uint64),  # workspace of sums, see `cuflash.plan.backward.Workspaces`
        ("row_delta", np.uint64),  # workspace of sums
        ("dq_sum", np.uint64),  # workspace of sums
        ("turns", np.uint64),  # uint32 workspace
        ("cu_seqlens_q", np.uint64),  # int32 (batch + 1), packed only
        ("cu_seqlens_k", np.uint64),
        ("mask_tables", np.uint64, MAX_TABLES),  # arrays that the mask looks up
        ("tile_lists", np.uint64),  # int32, see `cuflash.plan.tile_lists`
        ("tile_counts", np.uint64),
        ("q_strides", np.int64, 3),  # batch, token, head
        ("k_strides", np.int64, 3),
        ("v_strides", np.int64, 3),
        ("o_strides", np.int64, 3),
        ("d_o_strides", np.int64, 3),
        ("dq_strides", np.int64, 3),
        ("dk_strides", np.int64, 3),
        ("dv_strides", np.int64, 3),
        ("lse_strides", np.int64, 3),  # batch, head, token
        ("d_lse_strides", np.int64, 3),
        ("bias_strides", np.int64, 4),  # batch, head, query, key
        ("dbias_strides", np.int64, 4),
        ("mask_strides", np.int64, 4 * MAX_TABLES),  # of each table
        ("mask_lengths", np.int64, 4 * MAX_TABLES),  # of the axes of each table
        ("mask_wholes", np.int64, MAX_WHOLES),  # its constants
        ("mask_reals", np.float64, MAX_REALS),
        ("dbias_shape", np.int32, 4),  # packed: its last two axes may be longer than any sequence
        ("scale64", np.float64),  # for float64, which float32 would round
        ("softcap64", np.float64),
        ("scale", np.float32),
        ("softcap", np.float32),
        ("batch", np.int32),
        ("num_heads", np.int32),
        ("group", np.int32),  # query heads per key/value head
        ("seqlen_q", np.int32),  # packed: upper bound of a sequence's length
        ("seqlen_k", np.int32),
        ("total_q", np.int32),  # packed: number of tokens; cu_seqlens are clamped to it
        ("total_k", np.int32),
        ("left", np.int32),  # window, NO_BOUND where unbounded
        ("right", np.int32),
        ("q_tiles", np.int32),  # query tiles of one head of one batch entry; packed: of one head in all
        ("k_tiles", np.int32),  # the same of keys
        ("list_pitch", np.int32),  # query tiles that a list has room for
        ("turn_tiles", np.int32),  # query tiles that share a turn, a power of two
    ],
    align=True,
)

TILE_LIST_PARAMS = np.dtype(
    [
        ("mask_tables", np.uint64, MAX_TABLES),  # as in FORWARD_PARAMS
        ("lists", np.uint64),  # int32, what the kernels find
        ("counts", np.uint64),
        ("turns", np.uint64),  # int32 workspace of the backward pass
        ("cu_seqlens_q", np.uint64),  # int32 (batch + 1), packed only
        ("cu_seqlens_k", np.uint64),
        ("seq_lens", np.uint64),  # int32 (batch), paged only
        ("mask_strides", np.int64, 4 * MAX_TABLES),
        ("mask_lengths", np.int64, 4 * MAX_TABLES),  # of the axes of each table
        ("mask_wholes", np.int64, MAX_WHOLES),
        ("mask_reals", np.float64, MAX_REALS),
        ("batch", np.int32),
        ("num_heads", np.int32),
        ("group", np.int32),
        ("seqlen_q", np.int32),
        ("seqlen_k", np.int32),
        ("total_q", np.int32),
        ("total_k", np.int32),
        ("q_tiles", np.int32),
        ("k_tiles", np.int32),
        ("list_pitch", np.int32),
        ("turn_pitch", np.int32),  # key tiles of a sequence at most
    ],
    align=True,
)

SORT_TOKENS_PARAMS = np.dtype(
    [
        ("source", np.uint64),  # keys (batch, tokens, heads)
        ("keys", np.uint64),  # (batch, heads, tokens), sorted
        ("order", np.uint64),  # int32 (batch, heads, tokens): of each position its token
        ("inverse", np.uint64),  # int32 (batch, heads, tokens): of each token its position
        ("spare_keys", np.uint64),  # workspaces of the same shapes
        ("spare_order", np.uint64),
        ("source_strides", np.int64, 3),  # batch, token, head
        ("num_heads", np.int32),
        ("tokens", np.int32),
    ],
    align=True,
)

VISIBLE_RANGES_PARAMS = np.dtype(
    [
        ("q_keys", np.uint64),  # (batch, num_heads, len_q), sorted
        ("q_order", np.uint64),
        ("k_keys", np.uint64),  # (batch, num_kv_heads, len_k), sorted
        ("k_order", np.uint64),
        ("begin", np.uint64),  # int32 (batch, num_heads, len_q): sorted keys that the sorted query sees
        ("end", np.uint64),
        ("shift", np.int64),  # query token i sees key tokens before i + shift
        ("group", np.int32),
        ("len_q", np.int32),
        ("len_k", np.int32),
    ],
    align=True,
)

MOVED_ARRAYS = 2  # keys and values, in one launch

MOVE_ROWS_PARAMS = np.dtype(
    [
        ("source", np.uint64, MOVED_ARRAYS),  # each (batch, blocks, rows of a block, num_heads, columns)
        ("target", np.uint64, MOVED_ARRAYS),
        ("sources", np.uint64),  # which rows or blocks of the source; negative: zeros; 0: the first ones
        ("targets", np.uint64),  # which rows or blocks of the target; negative: none; 0: the first ones
        ("source_strides", np.int64, 4 * MOVED_ARRAYS),  # of each: batch, block, row, head, in accesses
        ("target_strides", np.int64, 4 * MOVED_ARRAYS),
        ("list_pitch", np.int64),  # from the list of a (batch, head) to the next one's; 0: one for all
        ("columns", np.int32, MOVED_ARRAYS),  # accesses of a row
        ("batch", np.int32),
        ("num_heads", np.int32),
        ("num_rows", np.int32),  # moved of each (batch, head)
    ],
    align=True,
)
