// Which part of the problem a thread block computes.
#pragma once

#include "attention/config.cuh"
#include "attention/params.cuh"
#include "tile/shared_tile.cuh"

namespace cuflash {

// One sequence of the problem: where it lies and how long it is.
struct Sequence {
    int batch_entry;  // index into the batch axis of q, k, v, o, lse; 0 in a packed problem
    int sequence;     // index into the batch axis of bias
    int q_start;      // first token of the sequence; 0 in a dense problem
    int k_start;
    int len_q;
    int len_k;
};

// A query tile of it, for a block of the forward pass.
struct Work : Sequence {
    int head;       // if rows are grouped, the first of the group
    int row_begin;  // first row of the tile; a tile at or past the last row has nothing to do
    int chunk;      // of block_dv output columns
    int split;      // which of the partial states the block writes
    int rows;       // of all tiles of the sequence: its queries, or as many for each head of a group
    int slot;       // of the tile

    __device__ __forceinline__ int row_end(int block_m) const { return row_begin + min(block_m, rows - row_begin); }
};

// An even share of the key tiles of a query tile.
struct Share {
    int index = 0, count = 1;
    int sequence = 0;  // of even work

    __device__ __forceinline__ int begin(i64 tiles) const { return static_cast<int>(tiles * index / count); }
    __device__ __forceinline__ int end(i64 tiles) const { return static_cast<int>(tiles * (index + 1) / count); }
};

// Entry `index` of cu_seqlens, wherever it may point, as a token in [0, total].
__device__ __forceinline__ int token_at(const int* cu_seqlens, int index, int total) {
    return min(max(cu_seqlens[index], 0), total);
}

// Sequence b of a packed problem owns the tiles from slot floor(start_b / block) + b on. The next sequence's first slot is
// at least ceil(len_b / block) later, so a search in cu_seqlens finds the owner of a slot. Sequence `batch` stands for the
// tokens past the last one: queries there see no key, keys there are seen by no query. `each`: rows that a token has.
__device__ __forceinline__ int sequence_of_slot(const int* cu_seqlens, int batch, int total, int block, int slot,
                                                int each = 1) {
    int low = 0, high = batch + 1;
    while (high - low > 1) {
        const int middle = low + (high - low) / 2;
        if (token_at(cu_seqlens, middle, total) * each / block + middle <= slot) low = middle;
        else high = middle;
    }
    return low;
}

// Tile `slot` of a sequence that begins at token `start`: its first row, len or more where it has none.
__device__ __forceinline__ int first_row_of_slot(int slot, int start, int sequence, int block, int len) {
    const int tile = slot - (start / block + sequence);
    return tile < 0 ? len : static_cast<int>(min(tile * i64{block}, i64{len}));
}

// The queries of sequence b of a packed problem; lengths are clamped to what the problem says.
template <class Params>
__device__ __forceinline__ void locate_queries(Sequence& to, const Params& params, int b) {
    const bool real = b < params.batch;  // else: the tokens past the last sequence
    to.q_start = token_at(params.cu_seqlens_q, b, params.total_q);
    const int q_stop = real ? token_at(params.cu_seqlens_q, b + 1, params.total_q) : params.total_q;
    to.len_q = max(q_stop - to.q_start, 0);
    if (real) to.len_q = min(to.len_q, params.seqlen_q);
}

// Sequence b of a packed problem.
template <class Params>
__device__ __forceinline__ void locate_packed(Sequence& to, const Params& params, int b) {
    const bool real = b < params.batch;
    to.batch_entry = 0;
    to.sequence = b;
    to.k_start = token_at(params.cu_seqlens_k, b, params.total_k);
    const int k_stop = real ? token_at(params.cu_seqlens_k, b + 1, params.total_k) : to.k_start;
    locate_queries(to, params, b);
    to.len_k = min(max(k_stop - to.k_start, 0), params.seqlen_k);
}

template <class Params>
__device__ __forceinline__ void locate_dense(Sequence& to, const Params& params, int b) {
    to.batch_entry = to.sequence = b;
    to.q_start = to.k_start = 0;
    to.len_q = params.seqlen_q;
    to.len_k = params.seqlen_k;
}

// Keys of sequence b that a paged cache holds, as many as the table has room for.
template <class Params>
__device__ __forceinline__ int cached_keys(const Params& params, int b) {
    return min(max(params.seq_lens[b], 0), params.seqlen_k);
}

// Sequence b of packed queries over a paged cache.
template <class Params>
__device__ __forceinline__ void locate_paged(Sequence& to, const Params& params, int b) {
    to.batch_entry = 0;
    to.sequence = b;
    to.k_start = 0;
    locate_queries(to, params, b);
    to.len_k = b < params.batch ? cached_keys(params, b) : 0;
}

// First element of a row of q, k, v or o; strides of batch entry, token, head.
template <class T>
__device__ __forceinline__ T* row_at(T* array, const i64 (&strides)[3], i64 batch_entry, i64 token, i64 head) {
    return array + batch_entry * strides[0] + token * strides[1] + head * strides[2];
}

// The digits of a block's index, fastest first.
struct Digits {
    u32 rest;

    __device__ __forceinline__ int next(u32 count) {
        const u32 digit = rest % count;
        rest /= count;
        return static_cast<int>(digit);
    }
};

// Grid, fastest first: query tile, split, chunk, head, batch entry. Tiles of one head are neighbours, so that they share
// keys and values in L2. Under a window or a mask, later queries usually see more keys and start first. Even work: query
// tile, chunk, head, slot, whose share it is; else the share is what the split says.
template <ForwardConfig C>
__device__ __forceinline__ Work decode_work(const ForwardParams& params, Share& share) {
    constexpr int kChunks = ceil_div(C.head_dim_v, C.block_dv);
    Work work;
    Digits digits{blockIdx.x};
    const int slot = work.slot = C.windowed || C.mask ? params.q_tiles - 1 - digits.next(params.q_tiles) : digits.next(params.q_tiles);
    work.split = C.split && !C.even ? digits.next(params.num_splits) : 0;
    if constexpr (C.split && !C.even) share = {work.split, params.num_splits};
    work.chunk = digits.next(kChunks);
    const int each = C.grouped ? params.group : 1;  // rows that a query has
    work.head = digits.next(C.grouped ? params.num_heads / each : params.num_heads) * each;
    if constexpr (C.varlen) {
        const int b = sequence_of_slot(params.cu_seqlens_q, params.batch, params.total_q, C.block_m, slot, each);
        if constexpr (C.paged) locate_paged(work, params, b);
        else locate_packed(work, params, b);
        work.rows = work.len_q * each;
        work.row_begin = first_row_of_slot(slot, work.q_start * each, b, C.block_m, work.rows);
    } else {
        if constexpr (C.even) work.split = static_cast<int>(digits.rest);
        locate_dense(work, params, C.even ? share.sequence : static_cast<int>(digits.rest));
        if constexpr (C.paged) work.len_k = cached_keys(params, work.sequence);
        work.rows = work.len_q * each;
        work.row_begin = slot * C.block_m;
    }
    return work;
}

}  // namespace cuflash
