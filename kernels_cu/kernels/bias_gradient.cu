// Gradient of the bias, after the backward kernel: dbias = P (dP - delta), added over the axes along which the bias is
// broadcast. A block owns a tile of dbias and visits every tile of scores that is added to it, one after the other: the
// sums stay in its registers, their order is fixed, and nothing of size seqlen_q x seqlen_k is in memory but dbias itself.
// Scores are held transposed, keys by queries.
#pragma once

#include "attention/config.cuh"
#include "attention/gradient_rows.cuh"
#include "attention/params.cuh"
#include "attention/query_tiles.cuh"
#include "attention/score_gradients.cuh"
#include "tile/load.cuh"
#include "tile/product.cuh"

namespace cuflash {

using BiasGradientParams = BackwardParams;

template <BiasGradientConfig C>
struct BiasGradientTiles {
    using T = Storage<C.dtype>;
    static constexpr int kM = C.block_n / (16 * C.num_warps);  // 16-key blocks of a warp
    static constexpr int kN = C.block_m / 8;                   // 8-query blocks
    static constexpr int kD = ceil_div(C.head_dim, 16), kDv = ceil_div(C.head_dim_v, 16);
    using Q = SharedTile<C.block_m, 16 * kD, T>;
    using K = SharedTile<C.block_n, 16 * kD, T>;
    using V = SharedTile<C.block_n, 16 * kDv, T>;
    using O = SharedTile<C.block_m, 16 * kDv, T>;
};

template <BiasGradientConfig C>
struct BiasGradientShared {
    using Tiles = BiasGradientTiles<C>;
    using T = Storage<C.dtype>;
    union {
        struct {
            T k[C.block_n * Tiles::K::kCols];
            T v[C.block_n * Tiles::V::kCols];
            T q[C.block_m * Tiles::Q::kCols];
            T d_o[C.block_m * Tiles::O::kCols];
        };
        Sum<C.dtype> sums[C.block_n][C.block_m + 1];  // at the end; padded: a column of it meets every bank
    };
    alignas(16) Sum<C.dtype> lse[C.block_m];  // base 2
    alignas(16) Sum<C.dtype> delta[C.block_m];
};

// The indices of an axis of the scores that a block adds: all, if the bias is broadcast along it.
__device__ __forceinline__ Span added(int axis_of_bias, int begin, int block, int length) {
    return axis_of_bias == 1 ? Span{0, length} : Span{begin, min(begin + block, length)};
}

// S^T = K Q^T or dP^T = V dO^T: the warp's keys by all queries of a tile.
template <BiasGradientConfig C, class Left, class Right, int kM, int kN>
__device__ __forceinline__ void multiply_tiles(Sum<C.dtype> (&S)[kM][kN][4], const Storage<C.dtype>* left,
                                               const Storage<C.dtype>* right) {
    const int lane = ptx::thread_index() % 32, warp = ptx::thread_index() / 32;
    const u32 a = ptx::shared_address(left) + warp * (16 * kM * Left::kPitch) + Left::lane_of_left(lane);
    const u32 b = ptx::shared_address(right) + Right::lane_by_rows(lane);
    clear(S);
#pragma unroll
    for (int d = 0; d < Left::kCols / 16; ++d) {  // S^T += K[:, d] Q[:, d]^T
        LeftFragments<kM, 1, C.dtype> fragments;
        fragments.template load_column<Left>(a, d, 0);
        multiply_transposed<C.dtype, Right>(S, fragments.value[0], b, d);
    }
}

// Grid, fastest first: key tile, query tile, head and batch entry of dbias.
template <BiasGradientConfig C, class Mask = NoMask>
__device__ __forceinline__ void bias_gradient(const BiasGradientParams& params) {
    using Tiles = BiasGradientTiles<C>;
    using Element = Storage<C.dtype>;
    using T = Sum<C.dtype>;
    constexpr int kThreads = 32 * C.num_warps, kM = Tiles::kM, kN = Tiles::kN;
    using QLoader = TileLoader<typename Tiles::Q, kThreads, C.load_bytes, C.head_dim % 16 != 0>;
    using KLoader = TileLoader<typename Tiles::K, kThreads, C.load_bytes, C.head_dim % 16 != 0>;
    using VLoader = TileLoader<typename Tiles::V, kThreads, C.load_bytes, C.head_dim_v % 16 != 0>;
    using OLoader = TileLoader<typename Tiles::O, kThreads, C.load_bytes, C.head_dim_v % 16 != 0>;

    extern __shared__ __align__(128) unsigned char shared_memory[];
    auto& shared = *reinterpret_cast<BiasGradientShared<C>*>(shared_memory);
    const int thread = ptx::thread_index(), lane = thread % 32;
    const int warp_key = thread / 32 * (16 * kM);  // the warp's first, in a tile
    const int(&shape)[4] = params.dbias_shape;
    Digits digits{blockIdx.x};
    const int key_begin = digits.next(ceil_div(shape[3], C.block_n)) * C.block_n;
    const int query_begin = digits.next(ceil_div(shape[2], C.block_m)) * C.block_m;
    const int own_head = digits.next(shape[1]), own_batch = static_cast<int>(digits.rest);

    T sums[kM][kN][4];  // dbias^T
    clear(sums);

    // One tile of scores: the queries from first_query on of one head against the keys of `work`; `masked`: a mask may hide
    // some of them.
    const auto visit = [&](const KeyWork& work, const QueryTiles& tiles, int head, int first_query, bool masked, bool new_keys) {
        __syncthreads();  // everyone is done with the tiles before
        if (new_keys) {
            const bool partial = work.key_begin < tiles.keys.begin || work.key_begin + C.block_n > tiles.keys.end;
            const auto* k = row_at(static_cast<const Element*>(params.k), params.k_strides, work.batch_entry, work.k_start, work.kv_head);
            const auto* v = row_at(static_cast<const Element*>(params.v), params.v_strides, work.batch_entry, work.k_start, work.kv_head);
            KLoader::load(partial, ptx::shared_address(shared.k), k, params.k_strides[1], C.head_dim, work.key_begin,
                          tiles.keys.begin, tiles.keys.end);
            VLoader::load(partial, ptx::shared_address(shared.v), v, params.v_strides[1], C.head_dim_v, work.key_begin,
                          tiles.keys.begin, tiles.keys.end);
        }
        const bool partial = first_query < tiles.queries.begin || first_query + C.block_m > tiles.queries.end;
        const auto* q = row_at(static_cast<const Element*>(params.q), params.q_strides, work.batch_entry, work.q_start, head);
        const auto* d_o = row_at(static_cast<const Element*>(params.d_o), params.d_o_strides, work.batch_entry, work.q_start, head);
        QLoader::load(partial, ptx::shared_address(shared.q), q, params.q_strides[1], C.head_dim, first_query,
                      tiles.queries.begin, tiles.queries.end);
        OLoader::load(partial, ptx::shared_address(shared.d_o), d_o, params.d_o_strides[1], C.head_dim_v, first_query,
                      tiles.queries.begin, tiles.queries.end);
        constexpr int kPerCopy = 16 / sizeof(T);
        const int i = kPerCopy * thread;
        if (i < C.block_m) {
            const int slot = C.varlen ? work.q_start / C.row_block + work.sequence : 0;
            const i64 row = query_tile_index(params, work.batch_entry, head, slot) * C.row_block + first_query + i;
            ptx::cp_async_16(ptx::shared_address(&shared.lse[i]), static_cast<const T*>(params.row_lse) + row);
            ptx::cp_async_16(ptx::shared_address(&shared.delta[i]), static_cast<const T*>(params.row_delta) + row);
        }
        ptx::cp_async_commit();
        ptx::cp_async_wait<0>();
        __syncthreads();  // the tiles have landed

        T S[kM][kN][4], dS[kM][kN][4];
        multiply_tiles<C, typename Tiles::K, typename Tiles::Q>(S, shared.k, shared.q);      // S^T = K Q^T
        multiply_tiles<C, typename Tiles::V, typename Tiles::O>(dS, shared.v, shared.d_o);  // dP^T = V dO^T
        const int column = 2 * (lane % 4);
        const ScoreRule<C, BackwardParams, Mask, true> rule(params, work, head, tiles.queries,
                                                            work.key_begin + warp_key + lane / 4, column);
        rule.apply(S, first_query, masked || tiles.cut<C>({}, first_query, work.len_q));
        exponentiate(S, shared.lse + column, rule.multiplier());  // P^T = 2^(S^T - lse)
        differentiate(dS, S, NoSlope(), shared.delta + column);   // dS^T = P^T (dP^T - delta)
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int n = 0; n < kN; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) sums[m][n][e] += dS[m][n][e];
    };

    const Span batches = added(shape[0], own_batch, 1, params.batch), heads = added(shape[1], own_head, 1, params.num_heads);
    for (int b = batches.begin; b < batches.end; ++b) {
        KeyWork work;
        if constexpr (C.varlen) locate_packed(work, params, b);
        else locate_dense(work, params, b);
        const Span queries = added(shape[2], query_begin, C.block_m, work.len_q);
        const Span keys = added(shape[3], key_begin, C.block_n, work.len_k);
        for (int head = heads.begin; head < heads.end; ++head) {
            work.kv_head = head / params.group;
            for (work.key_begin = keys.begin; work.key_begin < keys.end; work.key_begin += C.block_n) {
                const QueryTiles tiles = QueryTiles::of<C, Mask>(params, work);
                const int begin = max(queries.begin, tiles.first * C.block_m);
                const int end = min(queries.end, (tiles.first + tiles.count) * C.block_m);
                bool new_keys = true;
                for (int query = begin; query < end; query += C.block_m) {
                    Truth shown{true, false};
                    if constexpr (C.mask) {
                        shown = judge<Mask>(params, work, head, query, min(query + C.block_m, work.len_q), work.key_begin,
                                            min(work.key_begin + C.block_n, work.len_k));
                    }
                    if (shown.none) continue;
                    visit(work, tiles, head, query, !shown.all, new_keys);
                    new_keys = false;
                }
            }
        }
    }

    __syncthreads();  // everyone is done with the inputs, whose places the sums take
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                shared.sums[warp_key + 16 * m + e / 2 * 8 + lane / 4][8 * n + 2 * (lane % 4) + e % 2] = sums[m][n][e];
            }
    __syncthreads();  // the sums are there
    const int rows = min(C.block_m, shape[2] - query_begin), columns = min(C.block_n, shape[3] - key_begin);
    for (int i = thread; i < rows * columns; i += kThreads) {
        const int query = i / columns, key = i % columns;
        const Span of_queries = added(shape[2], query, 1, C.block_m), of_keys = added(shape[3], key, 1, C.block_n);
        T sum = 0;
        for (int r = of_queries.begin; r < of_queries.end; ++r)
            for (int c = of_keys.begin; c < of_keys.end; ++c) sum += shared.sums[c][r];
        store_element<C.bias_dtype>(params.dbias,
                                    own_batch * params.dbias_strides[0] + own_head * params.dbias_strides[1] +
                                        (query_begin + query) * params.dbias_strides[2] +
                                        (key_begin + key) * params.dbias_strides[3],
                                    sum);
    }
}

}  // namespace cuflash
