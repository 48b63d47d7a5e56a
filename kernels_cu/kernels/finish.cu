// After the backward kernel: dq = scale * its sums, rounded to the type of q.
#pragma once

#include "attention/epilogue.cuh"
#include "attention/gradient_rows.cuh"
#include "attention/query_work.cuh"
#include "attention/scores.cuh"

namespace cuflash {

// Grid, fastest first: chunk of columns, query tile, head, batch entry.
template <BackwardConfig C>
__device__ __forceinline__ void finish(const BackwardParams& params) {
    using Query = QueryGradient<C>;
    using T = Storage<C.dtype>;
    using Tile = SharedTile<C.block_m, 16 * Query::kN, T>;
    constexpr bool kStaged = sizeof(T) == 2;
    __shared__ __align__(128) T staging[Query::kWarpColumns][kStaged ? C.block_m * Tile::kCols : 1];
    const int lane = ptx::thread_index() % 32, warp = ptx::thread_index() / 32;
    Digits digits{blockIdx.x};
    const int chunk = digits.next(Query::kChunks);
    const QueryWork work = decode_query_work<C>(params, digits);
    const int column = Query::first_column_block(warp);
    if (work.row_begin >= work.len_q || column >= Query::kColumnBlocks) return;

    const i64 tile = query_tile_index(params, work.batch_entry, work.head, work.slot);
    const auto* sums = static_cast<const Sum<C.dtype>*>(params.dq_sum) + (tile * Query::kChunks + chunk) * Query::kTileSums;
    Sum<C.dtype> dQ[Query::kM][2 * Query::kN][4];
#pragma unroll
    for (int m = 0; m < Query::kM; ++m)
#pragma unroll
        for (int n = 0; n < 2 * Query::kN; ++n) {
            Query::load(dQ[m][n], sums, warp, lane, m, n);
        }
    scale_by(dQ, scale_of<Sum<C.dtype>>(params));
    T* dq = row_at(static_cast<T*>(params.dq), params.dq_strides, work.batch_entry, work.q_start + work.row_begin, work.head);
    store_rows<C.dtype, Tile, C.head_dim, C.store_bytes>(
        dQ, StridedRows<T>{dq, params.dq_strides[1]}, min(C.block_m, work.len_q - work.row_begin), chunk * C.block_d + 16 * column,
        ptx::shared_address(staging[warp / Query::kWarpRows]), 16 * Query::first_row_block(warp), lane);
}

}  // namespace cuflash
