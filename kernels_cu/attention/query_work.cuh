// Backward pass: the query tile that a block of the kernels before and after the main one works on.
#pragma once

#include "attention/work.cuh"

namespace cuflash {

struct QueryWork : Sequence {
    int head;
    int row_begin;  // first query of the tile; a tile at or past len_q has nothing to do
    int slot;       // of the query tile
};

// Digits, fastest first: query tile, head, batch entry.
template <BackwardConfig C>
__device__ __forceinline__ QueryWork decode_query_work(const BackwardParams& params, Digits digits) {
    QueryWork work;
    work.slot = digits.next(params.q_tiles);
    work.head = digits.next(params.num_heads);
    if constexpr (C.varlen) {
        const int b = sequence_of_slot(params.cu_seqlens_q, params.batch, params.total_q, C.block_m, work.slot);
        locate_packed(work, params, b);
        work.row_begin = first_row_of_slot(work.slot, work.q_start, b, C.block_m, work.len_q);
    } else {
        locate_dense(work, params, static_cast<int>(digits.rest));
        work.row_begin = work.slot * C.block_m;
    }
    return work;
}

}  // namespace cuflash
