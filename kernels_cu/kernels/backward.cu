// Attention backward for sm_80 and later: dQ, dK and dV from O, its cotangent and lse, one key tile a block, queries in
// tiles, nothing of size seqlen_q x seqlen_k in memory (FlashAttention-2, algorithm 2). Scores are held transposed, keys
// by queries, so that P^T and dS^T are left operands of dV and dK where they lie. docs/kernel-backward.md has the
// roofline, the schedule and the layout of shared memory.
#pragma once

#include "attention/config.cuh"
#include "attention/epilogue.cuh"
#include "attention/gradient_rows.cuh"
#include "attention/key_gradient.cuh"
#include "attention/params.cuh"
#include "attention/listed_tiles.cuh"
#include "attention/score_gradients.cuh"
#include "tile/load.cuh"

namespace cuflash {

// Shared memory of a block. dK and dV are staged where their inputs lay.
template <BackwardConfig C>
struct BackwardShared {
    using Tiles = BackwardTiles<C>;
    using T = Storage<C.dtype>;
    using QueriesOf = Conditional<C.mask, ListedQueryTiles, QueryTiles>;
    static constexpr bool kStaged = sizeof(T) == 2;  // wider elements are stored from registers
    union {
        struct {
            T k[C.block_n * Tiles::K::kCols];
            T v[C.block_n * Tiles::V::kCols];
            T q[C.num_stages][C.block_m * Tiles::Q::kCols];
            T d_o[C.num_stages][C.block_m * Tiles::O::kCols];
        };
        struct {
            T dk[Tiles::kShares][kStaged ? C.block_n * Tiles::Dk::kCols : 1];
            T dv[Tiles::kShares][kStaged ? C.block_n * Tiles::Dv::kCols : 1];
        };
    };
    T ds[C.block_n * C.block_m];                             // dS^T
    T p[Tiles::kExchange ? C.block_n * C.block_m : 8];       // P^T
    Sum<C.dtype> lse[C.num_stages][C.block_m];  // base 2
    Sum<C.dtype> delta[C.num_stages][C.block_m];
    KeyWork work;
    QueriesOf tiles;
    const T* keys;    // first row of this sequence and head
    const T* values;
};

// One thread finds out what the block computes.
template <BackwardConfig C, class Mask>
__device__ __forceinline__ void locate(BackwardShared<C>& shared, const BackwardParams& params) {
    const KeyWork work = decode_key_work<C>(params);
    shared.work = work;
    shared.tiles = BackwardShared<C>::QueriesOf::template of<C, Mask>(params, work);
    using T = Storage<C.dtype>;
    shared.keys = row_at(static_cast<const T*>(params.k), params.k_strides, work.batch_entry, work.k_start, work.kv_head);
    shared.values = row_at(static_cast<const T*>(params.v), params.v_strides, work.batch_entry, work.k_start, work.kv_head);
}

template <BackwardConfig C, class Mask = NoMask>
__device__ __forceinline__ void backward(const BackwardParams& params) {
    using Tiles = BackwardTiles<C>;
    using Query = QueryGradient<C>;
    using Element = Storage<C.dtype>;
    using T = Sum<C.dtype>;
    constexpr int kThreads = 32 * C.num_warps, kStages = C.num_stages;
    constexpr int kM = Tiles::kM, kN = Tiles::kN;
    constexpr int kChunks = greater(ceil_div(C.head_dim, C.block_d), ceil_div(C.head_dim_v, C.block_dv));
    using SlopeOfCap = Conditional<C.softcapped, Slope<T, kM, 2 * kN>, NoSlope>;
    using QLoader = TileLoader<typename Tiles::Q, kThreads, C.load_bytes, C.head_dim % Tiles::kUnit != 0>;
    using KLoader = TileLoader<typename Tiles::K, kThreads, C.load_bytes, C.head_dim % Tiles::kUnit != 0>;
    using VLoader = TileLoader<typename Tiles::V, kThreads, C.load_bytes, C.head_dim_v % Tiles::kUnit != 0>;
    using OLoader = TileLoader<typename Tiles::O, kThreads, C.load_bytes, C.head_dim_v % Tiles::kUnit != 0>;

    extern __shared__ __align__(128) unsigned char shared_memory[];
    auto& shared = *reinterpret_cast<BackwardShared<C>*>(shared_memory);
    const KeyWork& work = shared.work;
    const auto& tiles = shared.tiles;
    if (ptx::thread_index() == 0) locate<C, Mask>(shared, params);
    __syncthreads();  // work and tiles are known to everyone
    if (work.rows <= 0) return;
    const bool has_dk = kChunks == 1 || work.chunk * C.block_d < C.head_dim;
    const bool has_dv = kChunks == 1 || work.chunk * C.block_dv < C.head_dim_v;

    // A list that depends on the head has the tiles of all heads of the group, others serve one head after the other.
    const int repeats = Mask::kByHead ? 1 : params.group;
    const auto head_of = [&](Visit visit) {
        return work.kv_head * params.group + (Mask::kByHead ? tiles.tile(visit) / params.q_tiles : visit.head);
    };
    const auto tile_of = [&](Visit visit) { return Mask::kByHead ? tiles.tile(visit) % params.q_tiles : tiles.tile(visit); };

    // Start the copies of Q, dO, lse and delta of a query tile; of a cut tile, only of the queries that see a key.
    const auto load_queries = [&](Visit visit, int stage) {
        const int tile = tile_of(visit), begin = tile * C.block_m;
        const int head = head_of(visit);
        const bool partial = begin < tiles.queries.begin || begin + C.block_m > tiles.queries.end;
        const auto* q = row_at(static_cast<const Element*>(params.q), params.q_strides, work.batch_entry, work.q_start, head);
        const auto* d_o = row_at(static_cast<const Element*>(params.d_o), params.d_o_strides, work.batch_entry, work.q_start, head);
        QLoader::load(partial, ptx::shared_address(shared.q[stage]), q, params.q_strides[1], C.head_dim, begin,
                      tiles.queries.begin, tiles.queries.end);
        OLoader::load(partial, ptx::shared_address(shared.d_o[stage]), d_o, params.d_o_strides[1], C.head_dim_v, begin,
                      tiles.queries.begin, tiles.queries.end);
        constexpr int kPerCopy = 16 / sizeof(T);
        const int i = kPerCopy * ptx::thread_index();
        if (i < C.block_m) {
            const i64 row = query_tile_index(params, work.batch_entry, head, first_query_slot<C>(work) + tile) * C.block_m + i;
            ptx::cp_async_16(ptx::shared_address(&shared.lse[stage][i]), static_cast<const T*>(params.row_lse) + row);
            ptx::cp_async_16(ptx::shared_address(&shared.delta[stage][i]), static_cast<const T*>(params.row_delta) + row);
        }
    };

    T dK[kM][2 * Tiles::kBlocks][4];   // dS^T Q summed over the tiles so far
    T dV[kM][2 * Tiles::kBlocksV][4];  // P^T dO
    clear(dK);
    clear(dV);

    // dQ = dS K, added to the tile's sums in memory.
    const auto add_dq = [&](Visit visit) {
        const int thread = ptx::thread_index(), lane = thread % 32, warp = thread / 32;
        const int column = Query::first_column_block(warp);
        if (Query::kIdleWarps && column >= Query::kColumnBlocks) return;
        u32 columns[Query::kN];
        column_addresses<typename Tiles::K>(columns, shared.k, work.chunk * (C.block_d / 16) + column,
                                            work.chunk * (C.block_d / 16) + Query::kColumnBlocks, lane);
        const u32 lane_address = ptx::shared_address(shared.ds) +
                                 (bytes_of(C.dtype) == 2 ? Tiles::S::lane_by_rows(lane) : Tiles::S::lane_by_columns(lane));
        const u32 ds = Tiles::S::block(lane_address, 0, Query::first_row_block(warp));
        T dQ[Query::kM][2 * Query::kN][4];
        clear(dQ);
#pragma unroll
        for (int k = 0; k < C.block_n / 16; ++k) {  // dQ += dS[:, k] K[k, :]
            Word<C.dtype> left[Query::kM][left_words(C.dtype, 16)];
#pragma unroll
            for (int m = 0; m < Query::kM; ++m) {
                load_left_transposed<C.dtype, typename Tiles::S>(left[m], Tiles::S::block(ds, k, m));
            }
            multiply_blocks<C.dtype, typename Tiles::K>(dQ, left, columns, 16 * k * Tiles::K::kPitch);
        }
        const int slot = first_query_slot<C>(work) + tile_of(visit);
        const i64 index = query_tile_index(params, work.batch_entry, head_of(visit), slot) * Query::kChunks + work.chunk;
        T* sums = static_cast<T*>(params.dq_sum) + index * Query::kTileSums;
#pragma unroll
        for (int m = 0; m < Query::kM; ++m)
#pragma unroll
            for (int n = 0; n < 2 * Query::kN; ++n) Query::add(sums, warp, lane, m, n, dQ[m][n]);
    };
    // Query tiles that share a turn: the counter of key tiles that have added to their sums, and what it is when it is this
    // one's turn. Under a mask every tile has its own.
    const auto shared_turn = [&](Visit visit) {
        return C.mask ? tile_of(visit) : tile_of(visit) & -params.turn_tiles;
    };
    const auto turns = [&](Visit visit) {
        const int slot = first_query_slot<C>(work) + shared_turn(visit);
        return params.turns + query_tile_index(params, work.batch_entry, head_of(visit), slot) * Query::kChunks + work.chunk;
    };
    const auto turn = [&](Visit visit) {
        if constexpr (C.mask) return tiles.turn(visit);
        else return turn_of<C>(params, work, shared_turn(visit) * C.block_m);
    };
    // Whether a visit is the first, and the last, of those to the tiles that share a turn.
    const auto begins_turn = [&](Visit visit) {
        return C.mask || visit.position == 0 || ((tile_of(visit) + 1) & (params.turn_tiles - 1)) == 0;
    };
    const auto ends_turn = [&](Visit visit) {
        return C.mask || visit.position + 1 == tiles.count || (tile_of(visit) & (params.turn_tiles - 1)) == 0;
    };
    const bool takes_turns = C.deterministic && has_dk && ptx::thread_index() == 0;
    const bool passes_turns = C.deterministic && has_dk && ptx::thread_index() == kThreads / 2;
    const auto pass_turn = [&](Visit done) {
        if (passes_turns && ends_turn(done)) ptx::store_release(turns(done), turn(done) + 1);
    };

    // P^T and dS^T of one tile of queries, and what of dV and dK a warp computes from its own.
    const auto visit_tile = [&](Visit visit, int stage, Visit next) {
        const KeyPlace<C> here;
        const int first_query = tile_of(visit) * C.block_m;
        const int column = here.query + 2 * (here.lane % 4);
        T S[kM][2 * kN][4], dS[kM][2 * kN][4];
        const auto multiply_dp = [&] {  // dP^T = V dO^T
            multiply_rows<C, typename Tiles::V, typename Tiles::O, Tiles::kDv>(dS, shared.v, shared.d_o[stage]);
        };
        multiply_rows<C, typename Tiles::K, typename Tiles::Q, Tiles::kD>(S, shared.k, shared.q[stage]);  // S^T = K Q^T
        if (kStages == 2 && next.head < repeats) load_queries(next, stage ^ 1);
        if constexpr (C.mask) {
            const Visit coming = next.after(tiles.count);
            if (here.thread == 0 && coming.head < repeats) tiles.fetch(coming);
        }
        if constexpr (Tiles::kExchange) multiply_dp();  // the exponentials of S run under it
        SlopeOfCap slope;
        const ScoreRule<C, BackwardParams, Mask, true> rule(params, work, head_of(visit), tiles.queries,
                                                            work.key_begin + here.key + here.lane / 4, column);
        rule.apply(S, slope, first_query, tiles.template cut<C>(visit, first_query, work.len_q));
        exponentiate(S, shared.lse[stage] + column, rule.multiplier());  // P^T = 2^(S^T - lse)
        if constexpr (Tiles::kExchange) {
            store_scores<C>(S, shared.p);
        } else {
            if (has_dv) multiply_sums<C, typename Tiles::O>(dV, S, shared.d_o[stage], work.chunk);  // dV += P^T dO
            multiply_dp();
        }
        differentiate(dS, S, slope, shared.delta[stage] + column);  // dS^T = P^T (dP^T - delta)
        if (!has_dk) return;
        store_scores<C>(dS, shared.ds);
        if constexpr (!Tiles::kExchange) {
            multiply_sums<C, typename Tiles::Q>(dK, dS, shared.q[stage], work.chunk);  // dK += dS^T Q
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
    for (int stage = 0; tiles.count > 0 && visit.head < repeats; stage ^= kStages - 1) {
        const Visit next = visit.after(tiles.count);
        ptx::cp_async_wait<0>();  // this thread's share of the query tile has landed
        __syncthreads();          // everyone's has; everyone is done with the tile before and has added its dQ
        if (visit.head + visit.position > 0) pass_turn(visit.before(tiles.count));
        const bool asks = takes_turns && begins_turn(visit);
        u32 served = asks ? ptx::load_acquire(turns(visit)) : 0;  // under the products of the other warps
        visit_tile(visit, stage, next);
        ptx::cp_async_commit();
        if (asks) {
            while (served != turn(visit)) served = ptx::load_acquire(turns(visit));
        }
        __syncthreads();  // P and dS are written; this block may add to dQ; of warps that exchange nothing, Q and dO are free
        if (!Tiles::kExchange && kStages == 1 && next.head < repeats) load_queries(next, 0);
        if constexpr (Tiles::kExchange) {
            if (has_dv) {  // dV += P^T dO
                multiply_shared<C, typename Tiles::O>(dV, shared.p, shared.d_o[stage], work.chunk * (C.block_dv / 16));
            }
            // Early, so that the additions are done when the turn is passed; else last, which is a little faster.
            if (C.deterministic && has_dk) add_dq(visit);
            if (has_dk) {  // dK += dS^T Q
                multiply_shared<C, typename Tiles::Q>(dK, shared.ds, shared.q[stage], work.chunk * (C.block_d / 16));
            }
        }
        if (!(Tiles::kExchange && C.deterministic) && has_dk) add_dq(visit);
        if (Tiles::kExchange && kStages == 1 && next.head < repeats) {
            __syncthreads();  // everyone is done with Q and dO
            load_queries(next, 0);
        }
        ptx::cp_async_commit();
        visit = next;
    }
    __syncthreads();  // everyone is done with the inputs, whose places dK and dV take, and has added the last dQ
    if (tiles.count > 0) pass_turn(visit.before(tiles.count));

    const KeyPlace<C> here;
    const int token = work.k_start + work.key_begin;
    if (has_dk) {
        scale_by(dK, scale_of<T>(params));
        auto* dk = row_at(static_cast<Element*>(params.dk), params.dk_strides, work.batch_entry, token, work.kv_head);
        store_rows<C.dtype, typename Tiles::Dk, C.head_dim, C.store_bytes>(
            dK, StridedRows<Element>{dk, params.dk_strides[1]}, work.rows, work.chunk * C.block_d + here.share * Tiles::Dk::kCols,
            ptx::shared_address(shared.dk[here.share]), here.key, here.lane);
    }
    if (has_dv) {
        auto* dv = row_at(static_cast<Element*>(params.dv), params.dv_strides, work.batch_entry, token, work.kv_head);
        store_rows<C.dtype, typename Tiles::Dv, C.head_dim_v, C.store_bytes>(
            dV, StridedRows<Element>{dv, params.dv_strides[1]}, work.rows, work.chunk * C.block_dv + here.share * Tiles::Dv::kCols,
            ptx::shared_address(shared.dv[here.share]), here.key, here.lane);
    }
}

}  // namespace cuflash
