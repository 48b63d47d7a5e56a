// Which part of the problem a thread block computes.
#pragma once

#include "attention/config.cuh"
#include "attention/params.cuh"
#include "tile/shared_tile.cuh"

namespace cuflash {

struct Work {
    int batch_entry;  // index into the batch axis of q, k, v, o, lse; 0 in a packed problem
    int sequence;     // index into the batch axis of bias
    int q_start;      // first token of the sequence; 0 in a dense problem
    int k_start;
    int len_q;  // of this sequence
    int len_k;
    int head;
    int row_begin;  // first query of the tile; a tile at or past len_q has nothing to do
    int chunk;      // of block_dv output columns
    int split;      // of the tile's keys

    __device__ __forceinline__ int row_end(int block_m) const {
        return row_begin + min(block_m, len_q - row_begin);
    }
};

// Entry `index` of cu_seqlens, wherever it may point, as a token in [0, total].
__device__ __forceinline__ int token_at(const int* cu_seqlens, int index, int total) {
    return min(max(cu_seqlens[index], 0), total);
}

// Sequence b of a packed problem owns the query tiles from slot floor(start_b / block_m) + b on. The next sequence's
// first slot is at least ceil(len_b / block_m) later, so a search in cu_seqlens_q finds the owner of a slot. Sequence
// `batch` stands for the tokens past the last one: they see no key.
template <ForwardConfig C>
__device__ __forceinline__ int sequence_of_slot(const ForwardParams& params, int slot) {
    int low = 0, high = params.batch + 1;
    while (high - low > 1) {
        const int middle = low + (high - low) / 2;
        const int first = token_at(params.cu_seqlens_q, middle, params.total_q) / C.block_m + middle;
        if (first <= slot) low = middle;
        else high = middle;
    }
    return low;
}

// First element of a row of q, k, v or o; strides of batch entry, token, head.
template <class T>
__device__ __forceinline__ T* row_at(T* array, const i64 (&strides)[3], i64 batch_entry, i64 token, i64 head) {
    return array + batch_entry * strides[0] + token * strides[1] + head * strides[2];
}

// Grid, fastest first: query tile, split, chunk, head, batch entry. Tiles of one head are neighbours, so that they share
// keys and values in L2. Under a window, later queries usually see more keys and start first.
template <ForwardConfig C>
__device__ __forceinline__ Work decode_work(const ForwardParams& params) {
    constexpr int kChunks = ceil_div(C.head_dim_v, C.block_dv);
    Work work;
    u32 rest = blockIdx.x;
    const auto next = [&rest](u32 count) {
        const u32 digit = rest % count;
        rest /= count;
        return static_cast<int>(digit);
    };
    const int slot = C.windowed ? params.q_tiles - 1 - next(params.q_tiles) : next(params.q_tiles);
    work.split = C.split ? next(params.num_splits) : 0;
    work.chunk = next(kChunks);
    work.head = next(params.num_heads);
    if constexpr (C.varlen) {
        const int b = sequence_of_slot<C>(params, slot);
        const bool real = b < params.batch;  // else: the tokens past the last sequence
        work.batch_entry = 0;
        work.sequence = b;
        work.q_start = token_at(params.cu_seqlens_q, b, params.total_q);
        work.k_start = real ? token_at(params.cu_seqlens_k, b, params.total_k) : 0;
        const int q_stop = real ? token_at(params.cu_seqlens_q, b + 1, params.total_q) : params.total_q;
        const int k_stop = real ? token_at(params.cu_seqlens_k, b + 1, params.total_k) : 0;
        work.len_q = max(q_stop - work.q_start, 0);
        work.len_k = min(max(k_stop - work.k_start, 0), params.seqlen_k);
        if (real) work.len_q = min(work.len_q, params.seqlen_q);
        const int tile = slot - (work.q_start / C.block_m + b);
        work.row_begin = tile < 0 ? work.len_q : static_cast<int>(min(tile * i64{C.block_m}, i64{work.len_q}));
    } else {
        work.batch_entry = work.sequence = static_cast<int>(rest);
        work.q_start = work.k_start = 0;
        work.len_q = params.seqlen_q;
        work.len_k = params.seqlen_k;
        work.row_begin = slot * C.block_m;
    }
    return work;
}

}  // namespace cuflash
