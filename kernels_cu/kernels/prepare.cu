// Before the backward kernel: of each query its lse in base 2 and delta = rowsum(do o) - d_lse, and sums of dq set to zero.
// d_lse enters here alone: lse's gradient is P, so dS = P (dP - rowsum(do o) + d_lse).
#pragma once

#include "attention/gradient_rows.cuh"
#include "attention/query_work.cuh"
#include "attention/scores.cuh"
#include "tile/product.cuh"

namespace cuflash {

// This lane's share of rowsum(o do) over head_dim_v columns. With TF32 do is rounded as it is in dP = dO V^T: where one key
// has nearly all the weight, dP and delta nearly cancel, and so must their roundings.
template <BackwardConfig C>
__device__ __forceinline__ Sum<C.dtype> dot_share(const Storage<C.dtype>* o, const Storage<C.dtype>* d_o, int lane) {
    constexpr bool kPairs = bytes_of(C.dtype) == 2 && C.load_bytes >= 4 && C.head_dim_v % 2 == 0;
    constexpr int kWidth = kPairs ? 2 : 1;  // columns a load
    Sum<C.dtype> sum = 0;
#pragma unroll
    for (int j = 0; j < C.head_dim_v; j += 32 * kWidth) {
        const int column = j + kWidth * lane;
        if (column >= C.head_dim_v) break;
        if constexpr (kPairs) {
            const u32 x = *reinterpret_cast<const u32*>(o + column), y = *reinterpret_cast<const u32*>(d_o + column);
            sum = fma(unpack_low<C.dtype>(x), unpack_low<C.dtype>(y), sum);
            sum = fma(unpack_high<C.dtype>(x), unpack_high<C.dtype>(y), sum);
        } else {
            Sum<C.dtype> y = load_element<C.dtype>(d_o, column);
            if constexpr (C.dtype == Element::tf32) y = __uint_as_float(ptx::cvt_rna_tf32(__float_as_uint(y)));
            sum = fma(load_element<C.dtype>(o, column), y, sum);
        }
    }
    return sum;
}

// Element of an array with these strides.
template <class T>
__device__ __forceinline__ T at(const void* array, const i64 (&strides)[3], i64 batch_entry, i64 head, i64 token) {
    return static_cast<const T*>(array)[batch_entry * strides[0] + head * strides[1] + token * strides[2]];
}

// Grid, fastest first: query tile, head, batch entry.
template <BackwardConfig C>
__device__ __forceinline__ void prepare(const BackwardParams& params) {
    using Query = QueryGradient<C>;
    using T = Sum<C.dtype>;
    const int lane = ptx::thread_index() % 32, warp = ptx::thread_index() / 32;
    const QueryWork work = decode_query_work<C>(params, Digits{blockIdx.x});
    if (work.row_begin >= work.len_q) return;

    const i64 tile = query_tile_index(params, work.batch_entry, work.head, work.slot);
    constexpr int kSums = Query::kChunks * Query::kTileSums, kPerStore = 16 / sizeof(T);
    for (int i = ptx::thread_index(); i < kSums / kPerStore; i += 32 * C.num_warps) {
        ptx::store_global_v4(static_cast<T*>(params.dq_sum) + tile * kSums + kPerStore * i, {0, 0, 0, 0});
    }
    if (ptx::thread_index() < Query::kChunks) params.turns[tile * Query::kChunks + ptx::thread_index()] = 0;

    for (int i = warp; i < C.block_m; i += C.num_warps) {
        const int row = work.row_begin + i, token = work.q_start + row;
        T lse = kInfinity, delta = 0;  // of a row that sees nothing or does not exist: P = 2^(S - inf) = 0
        if (row < work.len_q) {
            const T natural = at<T>(params.lse, params.lse_strides, work.batch_entry, work.head, token);
            const auto* o = row_at(static_cast<const Storage<C.dtype>*>(params.o), params.o_strides, work.batch_entry,
                                   token, work.head);
            const auto* d_o = row_at(static_cast<const Storage<C.dtype>*>(params.d_o), params.d_o_strides,
                                     work.batch_entry, token, work.head);
            const T sum = warp_sum(dot_share<C>(o, d_o, lane));
            if (natural != -kInfinity) {
                lse = natural * kLog2E<T>;
                delta = sum;
                if (params.d_lse != nullptr) {
                    delta -= at<T>(params.d_lse, params.d_lse_strides, work.batch_entry, work.head, token);
                }
            }
        }
        if (lane == 0) {
            static_cast<T*>(params.row_lse)[tile * C.block_m + i] = lse;
            static_cast<T*>(params.row_delta)[tile * C.block_m + i] = delta;
        }
    }
}

}  // namespace cuflash
