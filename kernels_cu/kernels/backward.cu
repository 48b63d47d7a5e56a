// Attention backward for sm_80 and later: dQ, dK and dV from O, its cotangent and lse, one key tile a block, queries in
// tiles, nothing of size seqlen_q x seqlen_k in memory (FlashAttention-2, algorithm 2). Scores are held transposed, keys
// by queries, so that P^T and dS^T are left operands of dV and dK where they lie. docs/kernel-backward.md has the
// roofline, the schedule and the layout of shared memory.
#pragma once

#include "attention/config.cuh"
#include "attention/epilogue.cuh"
#include "attention/gradient_rows.cuh"
#include "attention/params.cuh"
#include "attention/query_tiles.cuh"
#include "attention/score_gradients.cuh"
#include "tile/load.cuh"
#include "tile/product.cuh"

namespace cuflash {

template <BackwardConfig C>
struct BackwardTiles {
    static constexpr int kD = ceil_div(C.head_dim, 16), kDv = ceil_div(C.head_dim_v, 16);
    using Q = SharedTile<C.block_m, 16 * kD>;
    using K = SharedTile<C.block_n, 16 * kD>;
    using V = SharedTile<C.block_n, 16 * kDv>;
    using O = SharedTile<C.block_m, 16 * kDv>;
    using S = SharedTile<C.block_n, C.block_m>;  // keys by queries
};

// Shared memory of a block. dK and dV are staged where K and V lay.
template <BackwardConfig C>
struct BackwardShared {
    using Tiles = BackwardTiles<C>;
    u16 k[C.block_n * Tiles::K::kCols];
    u16 v[C.block_n * Tiles::V::kCols];
    u16 q[C.num_stages][C.block_m * Tiles::Q::kCols];
    u16 d_o[C.num_stages][C.block_m * Tiles::O::kCols];
    u16 ds[C.block_n * C.block_m];  // dS^T
    float lse[C.num_stages][C.block_m];  // base 2
    float delta[C.num_stages][C.block_m];
    KeyWork work;
    QueryTiles tiles;
    const u16* keys;    // first row of this sequence and head
    const u16* values;
};

// One thread finds out what the block computes.
template <BackwardConfig C>
__device__ __forceinline__ void locate(BackwardShared<C>& shared, const BackwardParams& params) {
    const KeyWork work = decode_key_work<C>(params);
    shared.work = work;
    shared.tiles = QueryTiles::of<C>(params, work);
    shared.keys = row_at(params.k, params.k_strides, work.batch_entry, work.k_start, work.kv_head);
    shared.values = row_at(params.v, params.v_strides, work.batch_entry, work.k_start, work.kv_head);
}

// S^T = K Q^T or dP^T = V dO^T: the warp's rows of a left tile with all rows of a right one, over their whole depth.
template <Element E, class Left, class Right, int kM, int kN>
__device__ __forceinline__ void multiply_rows(float (&S)[kM][kN][4], const u16* left, const u16* right) {
    const int thread = ptx::thread_index(), lane = thread % 32, row = thread / 32 * 16 * kM;
    const u32 a = ptx::shared_address(left) + row * Left::kPitch + Left::lane_by_columns(lane);
    const u32 b = ptx::shared_address(right) + Right::lane_by_rows(lane);
    clear(S);
#pragma unroll
    for (int d = 0; d < Left::kCols / 16; ++d) {  // S^T += K[:, d] Q[:, d]^T
        LeftFragments<kM, 1> fragments;
        fragments.template load_column<Left>(a, d, 0);
        multiply_transposed<E, Right>(S, fragments.value[0], b, d);
    }
}

// dV += P^T dO or dK += dS^T Q: the columns of a chunk.
template <Element E, class Right, int kM, int kN, int kColumns>
__device__ __forceinline__ void multiply_sums(float (&sums)[kM][kColumns][4], const float (&S)[kM][kN][4],
                                              const u16* right, int chunk) {
    const u32 b = ptx::shared_address(right) + Right::lane_by_columns(ptx::thread_index() % 32) + chunk * (16 * kColumns);
#pragma unroll
    for (int n = 0; n < kN / 2; ++n) {  // dV += P^T[:, n] dO[n, :]
        u32 left[kM][4];
        as_left<E>(left, S, n);
        multiply<E, Right>(sums, left, b, n);
    }
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

template <BackwardConfig C>
__device__ __forceinline__ void backward(const BackwardParams& params) {
    using Tiles = BackwardTiles<C>;
    using Query = QueryGradient<C>;
    constexpr int kThreads = 32 * C.num_warps, kStages = C.num_stages;
    constexpr int kM = C.block_n / (16 * C.num_warps);  // 16-key blocks of a warp
    constexpr int kN = C.block_m / 16;
    constexpr int kChunks = greater(ceil_div(C.head_dim, C.block_d), ceil_div(C.head_dim_v, C.block_dv));
    constexpr int kBlockD = lesser(C.block_d, 16 * Tiles::kD), kBlockDv = lesser(C.block_dv, 16 * Tiles::kDv);
    using SlopeOfCap = Conditional<C.softcapped, Slope<kM, 2 * kN>, NoSlope>;
    using QLoader = TileLoader<typename Tiles::Q, kThreads, C.load_bytes, C.head_dim % 16 != 0>;
    using KLoader = TileLoader<typename Tiles::K, kThreads, C.load_bytes, C.head_dim % 16 != 0>;
    using VLoader = TileLoader<typename Tiles::V, kThreads, C.load_bytes, C.head_dim_v % 16 != 0>;
    using OLoader = TileLoader<typename Tiles::O, kThreads, C.load_bytes, C.head_dim_v % 16 != 0>;

    extern __shared__ __align__(128) unsigned char shared_memory[];
    auto& shared = *reinterpret_cast<BackwardShared<C>*>(shared_memory);
    const KeyWork& work = shared.work;
    const QueryTiles& tiles = shared.tiles;
    if (ptx::thread_index() == 0) locate<C>(shared, params);
    __syncthreads();  // work and tiles are known to everyone
    if (work.rows <= 0) return;
    const bool has_dk = kChunks == 1 || work.chunk * C.block_d < C.head_dim;
    const bool has_dv = kChunks == 1 || work.chunk * C.block_dv < C.head_dim_v;

    // Start the copies of Q, dO, lse and delta of a query tile; of a cut tile, only of the queries that see a key.
    const auto load_queries = [&](Visit visit, int stage) {
        const int tile = tiles.tile(visit.position), begin = tile * C.block_m;
        const int head = work.kv_head * params.group + visit.head;
        const bool partial = begin < tiles.queries.begin || begin + C.block_m > tiles.queries.end;
        const u16* q = row_at(params.q, params.q_strides, work.batch_entry, work.q_start, head);
        const u16* d_o = row_at(params.d_o, params.d_o_strides, work.batch_entry, work.q_start, head);
        QLoader::load(partial, ptx::shared_address(shared.q[stage]), q, params.q_strides[1], C.head_dim, begin,
                      tiles.queries.begin, tiles.queries.end);
        OLoader::load(partial, ptx::shared_address(shared.d_o[stage]), d_o, params.d_o_strides[1], C.head_dim_v, begin,
                      tiles.queries.begin, tiles.queries.end);
        const int thread = ptx::thread_index();
        if (thread < C.block_m / 4) {
            const i64 row = query_tile_index(params, work.batch_entry, head, first_query_slot<C>(work) + tile) * C.block_m;
            ptx::cp_async_16(ptx::shared_address(shared.lse[stage]) + 16 * thread, params.row_lse + row + 4 * thread);
            ptx::cp_async_16(ptx::shared_address(shared.delta[stage]) + 16 * thread, params.row_delta + row + 4 * thread);
        }
    };

    float dK[kM][kBlockD / 8][4];    // dS^T Q summed over the tiles so far
    float dV[kM][kBlockDv / 8][4];  // P^T dO
    clear(dK);
    clear(dV);

    // The warp's rows of dS^T, in 16 bits.
    const auto store_ds = [&](const float(&dS)[kM][2 * kN][4]) {
        const int thread = ptx::thread_index(), lane = thread % 32, row = thread / 32 * 16 * kM;
        const u32 ds = ptx::shared_address(shared.ds) + Tiles::S::offset(row + lane / 4, 0) + 4 * (lane % 4);
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int n = 0; n < 2 * kN; ++n)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    ptx::store_shared(Tiles::S::step(ds, 16 * m + 8 * h, n),
                                      pack<C.dtype>(dS[m][n][2 * h], dS[m][n][2 * h + 1]));
                }
    };
    // dQ = dS K, added to the tile's sums in memory.
    const auto add_dq = [&](Visit visit) {
        const int thread = ptx::thread_index(), lane = thread % 32, warp = thread / 32;
        const int column = Query::first_column_block(warp);
        if (Query::kIdleWarps && column >= Query::kColumnBlocks) return;
        u32 columns[Query::kN];  // this lane's address of each 16x16 block of K's first 16 keys
#pragma unroll
        for (int n = 0; n < Query::kN; ++n) {
            const int chunk = 2 * min(column + n, Query::kColumnBlocks - 1) + lane / 16;
            columns[n] = ptx::shared_address(shared.k) + work.chunk * (2 * kBlockD) + Tiles::K::offset(lane % 16, chunk);
        }
        const u32 ds = Tiles::S::block(ptx::shared_address(shared.ds) + Tiles::S::lane_by_rows(lane), 0,
                                       Query::first_row_block(warp));
        float dQ[Query::kM][2 * Query::kN][4];
        clear(dQ);
#pragma unroll
        for (int k = 0; k < C.block_n / 16; ++k) {  // dQ += dS[:, k] K[k, :]
            u32 left[Query::kM][4];
#pragma unroll
            for (int m = 0; m < Query::kM; ++m) ptx::ldmatrix_x4_trans(left[m], Tiles::S::block(ds, k, m));
            multiply_blocks<C.dtype>(dQ, left, columns, 16 * k * Tiles::K::kPitch);
        }
        const int head = work.kv_head * params.group + visit.head;
        const int slot = first_query_slot<C>(work) + tiles.tile(visit.position);
        const i64 index = query_tile_index(params, work.batch_entry, head, slot) * Query::kChunks + work.chunk;
        float* sums = params.dq_sum + index * Query::kTileFloats;
#pragma unroll
        for (int m = 0; m < Query::kM; ++m)
#pragma unroll
            for (int n = 0; n < 2 * Query::kN; ++n) Query::add(sums, warp, lane, m, n, dQ[m][n]);
    };
    // The counter of key tiles that have added to the sums of a query tile, and what it is when it is this one's turn.
    const auto turns = [&](Visit visit) {
        const int head = work.kv_head * params.group + visit.head;
        const int slot = first_query_slot<C>(work) + tiles.tile(visit.position);
        return params.turns + query_tile_index(params, work.batch_entry, head, slot) * Query::kChunks + work.chunk;
    };
    const auto turn = [&](Visit visit) { return turn_of<C>(params, work, tiles.tile(visit.position) * C.block_m); };
    const auto await_turn = [&](Visit visit) {
        if (!C.deterministic || !has_dk || ptx::thread_index() != 0) return;
        while (ptx::load_acquire(turns(visit)) != turn(visit)) {}
    };
    const auto pass_turn = [&](Visit visit) {
        if (!C.deterministic || !has_dk || ptx::thread_index() != 0) return;
        ptx::store_release(turns(visit), turn(visit) + 1);
    };

    // One tile of queries.
    const auto visit_tile = [&](Visit visit, int stage) {
        const int thread = ptx::thread_index(), lane = thread % 32, row = thread / 32 * 16 * kM;
        const int first_query = tiles.tile(visit.position) * C.block_m;
        float S[kM][2 * kN][4];
        SlopeOfCap slope;
        multiply_rows<C.dtype, typename Tiles::K, typename Tiles::Q>(S, shared.k, shared.q[stage]);  // S^T = K Q^T
        const ScoreRule<C, BackwardParams, true> rule(params, work, work.kv_head * params.group + visit.head, tiles.queries,
                                                      work.key_begin + row + lane / 4, 2 * (lane % 4));
        rule.apply(S, slope, first_query, tiles.cut(first_query, min(first_query + C.block_m, work.len_q)));
        exponentiate(S, shared.lse[stage] + 2 * (lane % 4), rule.multiplier());  // P^T = 2^(S^T - lse)
        if (has_dv) multiply_sums<C.dtype, typename Tiles::O>(dV, S, shared.d_o[stage], work.chunk);  // dV += P^T dO

        float dS[kM][2 * kN][4];
        multiply_rows<C.dtype, typename Tiles::V, typename Tiles::O>(dS, shared.v, shared.d_o[stage]);  // dP^T = V dO^T
        differentiate(dS, S, slope, shared.delta[stage] + 2 * (lane % 4));  // dS^T = P^T (dP^T - delta)
        if (has_dk) {
            store_ds(dS);
            multiply_sums<C.dtype, typename Tiles::Q>(dK, dS, shared.q[stage], work.chunk);  // dK += dS^T Q
        }
    };

    // In flight: K, V and the first query tile; then, with two stages, the next tile under all of this one.
    Visit visit;
    if (tiles.count > 0) {
        const bool partial = work.key_begin < tiles.keys.begin || work.key_begin + C.block_n > tiles.keys.end;
        KLoader::load(partial, ptx::shared_address(shared.k), shared.keys, params.k_strides[1], C.head_dim,
                      work.key_begin, tiles.keys.begin, tiles.keys.end);
        VLoader::load(partial, ptx::shared_address(shared.v), shared.values, params.v_strides[1], C.head_dim_v,
                      work.key_begin, tiles.keys.begin, tiles.keys.end);
        load_queries(visit, 0);
        ptx::cp_async_commit();
    }
    for (int stage = 0; tiles.count > 0 && visit.head < params.group; stage ^= kStages - 1) {
        const Visit next = visit.after(tiles.count);
        ptx::cp_async_wait<0>();  // this thread's share of the query tile has landed
        __syncthreads();          // everyone's has; everyone is done with the tile before, its dS, and has added its dQ
        if (visit.head + visit.position > 0) pass_turn(visit.before(tiles.count));
        if (kStages == 2 && next.head < params.group) load_queries(next, stage ^ 1);
        ptx::cp_async_commit();
        visit_tile(visit, stage);
        await_turn(visit);
        __syncthreads();  // dS is written; everyone is done with Q and dO; this block may add to dQ
        if (kStages == 1 && next.head < params.group) load_queries(next, 0);
        ptx::cp_async_commit();
        if (has_dk) add_dq(visit);
        visit = next;
    }
    __syncthreads();  // everyone is done with K and V, whose places dK and dV take, and has added the last dQ
    if (tiles.count > 0) pass_turn(visit.before(tiles.count));

    const int thread = ptx::thread_index(), lane = thread % 32, row = thread / 32 * 16 * kM;
    const int token = work.k_start + work.key_begin;
    if (has_dk) {
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int n = 0; n < kBlockD / 8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) dK[m][n][e] *= params.scale;
        u16* dk = row_at(params.dk, params.dk_strides, work.batch_entry, token, work.kv_head);
        store_rows<C.dtype, SharedTile<C.block_n, kBlockD>, C.head_dim, C.store_bytes>(
            dK, dk, params.dk_strides[1], work.rows, work.chunk * kBlockD, ptx::shared_address(shared.k), row, lane);
    }
    if (has_dv) {
        u16* dv = row_at(params.dv, params.dv_strides, work.batch_entry, token, work.kv_head);
        store_rows<C.dtype, SharedTile<C.block_n, kBlockDv>, C.head_dim_v, C.store_bytes>(
            dV, dv, params.dv_strides[1], work.rows, work.chunk * kBlockDv, ptx::shared_address(shared.v), row, lane);
    }
}

}  // namespace cuflash
