// Before the backward kernel: of each query its lse in base 2 and delta = rowsum(do o) - d_lse, and sums of dq set to zero.
// d_lse enters here alone: lse's gradient is P, so dS = P (dP - rowsum(do o) + d_lse).
#pragma once

#include "attention/gradient_rows.cuh"
#include "attention/query_work.cuh"
#include "attention/scores.cuh"
#include "tile/product.cuh"

namespace cuflash {

// This lane's share of rowsum(a b) over head_dim_v columns.
template <BackwardConfig C>
__device__ __forceinline__ float dot_share(const u16* a, const u16* b, int lane) {
    constexpr int kWidth = C.load_bytes >= 4 && C.head_dim_v % 2 == 0 ? 2 : 1;  // columns a load
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < C.head_dim_v; j += 32 * kWidth) {
        const int column = j + kWidth * lane;
        if (column >= C.head_dim_v) break;
        if constexpr (kWidth == 2) {
            const u32 x = *reinterpret_cast<const u32*>(a + column), y = *reinterpret_cast<const u32*>(b + column);
            sum = fmaf(unpack_low<C.dtype>(x), unpack_low<C.dtype>(y), sum);
            sum = fmaf(unpack_high<C.dtype>(x), unpack_high<C.dtype>(y), sum);
        } else {
            sum = fmaf(load_element<C.dtype>(a, column), load_element<C.dtype>(b, column), sum);
        }
    }
    return sum;
}

// Grid, fastest first: query tile, head, batch entry.
template <BackwardConfig C>
__device__ __forceinline__ void prepare(const BackwardParams& params) {
    using Query = QueryGradient<C>;
    const int lane = ptx::thread_index() % 32, warp = ptx::thread_index() / 32;
    const QueryWork work = decode_query_work<C>(params, Digits{blockIdx.x});
    if (work.row_begin >= work.len_q) return;

    const i64 tile = query_tile_index(params, work.batch_entry, work.head, work.slot);
    for (int i = ptx::thread_index(); i < Query::kChunks * Query::kTileFloats / 4; i += 32 * C.num_warps) {
        ptx::store_global_v4(params.dq_sum + tile * Query::kChunks * Query::kTileFloats + 4 * i, {0, 0, 0, 0});
    }
    if (ptx::thread_index() < Query::kChunks) params.turns[tile * Query::kChunks + ptx::thread_index()] = 0;

    for (int i = warp; i < C.block_m; i += C.num_warps) {
        const int row = work.row_begin + i, token = work.q_start + row;
        float lse = kInfinity, delta = 0.0f;  // of a row that sees nothing or does not exist: P = 2^(S - inf) = 0
        if (row < work.len_q) {
            const float natural = params.lse[work.batch_entry * params.lse_strides[0] + work.head * params.lse_strides[1] +
                                             token * params.lse_strides[2]];
            const u16* o = row_at(params.o, params.o_strides, work.batch_entry, token, work.head);
            const u16* d_o = row_at(params.d_o, params.d_o_strides, work.batch_entry, token, work.head);
            const float sum = warp_sum(dot_share<C>(o, d_o, lane));
            if (natural != -kInfinity) {
                lse = natural * kLog2E<float>;
                delta = sum;
                if (params.d_lse != nullptr) {
                    delta -= params.d_lse[work.batch_entry * params.d_lse_strides[0] +
                                          work.head * params.d_lse_strides[1] + token * params.d_lse_strides[2]];
                }
            }
        }
        if (lane == 0) {
            params.row_lse[tile * C.block_m + i] = lse;
            params.row_delta[tile * C.block_m + i] = delta;
        }
    }
}

}  // namespace cuflash
