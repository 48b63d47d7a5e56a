// Backward pass: which keys a block owns, and which query tiles it visits.
#pragma once

#include "attention/key_tiles.cuh"

namespace cuflash {

// A key tile of a sequence, for a block of the backward pass.
struct KeyWork : Sequence {
    int kv_head;
    int key_begin;  // first key of the tile
    int rows;       // of the tile that exist in memory; with packed keys some may lie past len_k, and no query sees them
    int chunk;      // of block_d and block_dv columns
    int slot;       // of the key tile
};

// Grid, fastest first: key/value head, chunk, batch entry, key tile. A key tile's predecessor in the order of a head
// always started before it, so that it may be waited for; and those of one head that run together are few and begin one
// after the other. Early keys, which a causal mask shows to most queries, start first.
template <BackwardConfig C>
__device__ __forceinline__ KeyWork decode_key_work(const BackwardParams& params) {
    constexpr int kChunks = greater(ceil_div(C.head_dim, C.block_d), ceil_div(C.head_dim_v, C.block_dv));
    KeyWork work;
    Digits digits{blockIdx.x};
    work.kv_head = digits.next(params.num_heads / params.group);
    work.chunk = digits.next(kChunks);
    if constexpr (C.varlen) {
        work.slot = static_cast<int>(digits.rest);
        const int b = sequence_of_slot(params.cu_seqlens_k, params.batch, params.total_k, C.block_n, work.slot);
        locate_packed(work, params, b);
        const int k_stop = b < params.batch ? token_at(params.cu_seqlens_k, b + 1, params.total_k) : params.total_k;
        const int tokens = max(k_stop - work.k_start, 0);
        work.key_begin = first_row_of_slot(work.slot, work.k_start, b, C.block_n, tokens);
        work.rows = min(C.block_n, tokens - work.key_begin);
        if (b == params.batch) work.len_q = 0;
    } else {
        locate_dense(work, params, digits.next(params.batch));
        work.slot = static_cast<int>(digits.rest);
        work.key_begin = work.slot * C.block_n;
        work.rows = min(C.block_n, work.len_k - work.key_begin);
    }
    return work;
}

// First slot of the query tiles of a sequence.
template <BackwardConfig C>
__device__ __forceinline__ int first_query_slot(const Sequence& sequence) {
    return C.varlen ? sequence.q_start / C.block_m + sequence.sequence : 0;
}

// The query tile that a block visits: of one head after the other, from the last tile to the first.
struct Visit {
    int head = 0;  // within the group
    int position = 0;

    __device__ __forceinline__ Visit after(int tiles) const {
        return position + 1 < tiles ? Visit{head, position + 1} : Visit{head + 1, 0};
    }
    __device__ __forceinline__ Visit before(int tiles) const {
        return position > 0 ? Visit{head, position - 1} : Visit{head - 1, tiles - 1};
    }
};

// The query tiles that see at least one key of a key tile, visited from the last to the first.
struct QueryTiles {
    Span queries;  // that see at least one key of the tile; of others nothing is read
    Span keys;     // that at least one query of the sequence sees; of others nothing is read
    Span full;     // queries that see every key of the tile
    int first, count;

    template <auto C, class Mask>
    static __device__ __forceinline__ QueryTiles of(const BackwardParams& params, const KeyWork& work) {
        const Window window(params, work);
        const int key_end = min(work.key_begin + C.block_n, work.len_k);
        QueryTiles tiles;
        tiles.queries = tiles.full = {0, work.len_q};
        tiles.keys = {0, work.len_k};
        if constexpr (C.windowed) {
            tiles.queries = {window.begin_query(work.key_begin), window.end_query(key_end - 1)};
            tiles.full = {window.begin_query(key_end - 1), window.end_query(work.key_begin)};
            tiles.keys = {window.begin(0), window.end(work.len_q - 1)};
        }
        if (work.key_begin + C.block_n > work.len_k) tiles.full.end = 0;  // the last keys of the tile do not exist
        const bool empty = work.key_begin >= work.len_k || tiles.queries.begin >= tiles.queries.end;
        tiles.first = tiles.queries.begin / C.block_m;
        tiles.count = empty ? 0 : 1 + (tiles.queries.end - 1) / C.block_m - tiles.first;
        return tiles;
    }

    __device__ __forceinline__ int tile(Visit visit) const { return first + count - 1 - visit.position; }

    // Whether a mask hides a key of the tile from one of the block_m queries from `begin` on. Queries past the last need
    // none, P = 0 by their lse; but a bias they have not.
    template <auto C>
    __device__ __forceinline__ bool cut(Visit, int begin, int len_q) const {
        const int end = C.bias_dtype != Element::none ? begin + C.block_m : min(begin + C.block_m, len_q);
        return begin < full.begin || end > full.end;
    }
};

// How many key tiles add to the dq of a query tile, or of several that share a turn, before this one. Windows of
// neighbouring queries begin side by side: each key tile in between is seen by one of these queries.
template <BackwardConfig C>
__device__ __forceinline__ u32 turn_of(const BackwardParams& params, const KeyWork& work, int first_query) {
    const int first_key = C.windowed ? Window(params, work).begin(first_query) : 0;
    return work.key_begin / C.block_n - first_key / C.block_n;
}

}  // namespace cuflash
