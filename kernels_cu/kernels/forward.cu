// Attention forward for sm_80 and later: O = softmax(scale Q K^T) V and its log-sum-exp, one query tile a block, keys in
// tiles, nothing of size seqlen_q x seqlen_k in memory (FlashAttention-2, algorithm 1). docs/kernel-forward.md has the
// roofline, the schedule and the layout of shared memory.
#pragma once

#include "attention/config.cuh"
#include "attention/epilogue.cuh"
#include "attention/listed_tiles.cuh"
#include "attention/paged_rows.cuh"
#include "attention/params.cuh"
#include "attention/scores.cuh"
#include "attention/settled.cuh"
#include "attention/shares.cuh"
#include "attention/softmax.cuh"
#include "attention/work.cuh"
#include "tile/load.cuh"
#include "tile/product.cuh"

namespace cuflash {

// Shared memory of a block. Outputs are staged where the inputs lay. What all threads know alike lies here rather than in
// the registers of each.
template <ForwardConfig C>
struct ForwardShared {
    using T = Storage<C.dtype>;
    using Tiles = Conditional<C.mask, ListedKeyTiles, KeyTiles>;
    static constexpr bool kStaged = sizeof(T) == 2 && !C.split;  // whether O goes through shared memory
    static constexpr int kKeys = C.block_n;
    static constexpr int kColumnsOfV = round_up(C.block_dv, sizeof(T) == 4 ? 32 : 16);  // where lanes read V by words
    union {
        struct {
            T q[C.block_m * round_up(C.head_dim, 16)];
            T k[C.num_stages][C.block_n * round_up(C.head_dim, 16)];
            T v[C.num_stages][C.block_n * kColumnsOfV];
        };
        T o[kStaged ? C.block_m * C.block_dv : 1];
    };
    Work work;
    Tiles tiles;
    const T* keys;    // first row of this sequence and head
    const T* values;  // the same, first column of this block's chunk
    [[no_unique_address]] TableParts<C.paged, C.block_n> table;
};

// Where the calling thread stands in its block. Made anew by each part of the kernel that needs it, not held throughout.
template <int kM>
struct Place {
    int thread = ptx::thread_index();
    int lane = thread % 32;
    int row = thread / 32 * 16 * kM;  // its warp's first, in the query tile
};

// One thread finds out what the block computes; of even work a warp whose share it is.
template <ForwardConfig C, class Mask>
__device__ __forceinline__ void locate(ForwardShared<C>& shared, const ForwardParams& params) {
    using T = Storage<C.dtype>;
    Share share;
    if constexpr (C.even) {
        const int blocks = gridDim.x / params.num_splits, slot = blockIdx.x / blocks;
        share = share_of_slot<C>(params, slot);
        if (!ptx::vote_any(share.count > 0) && ptx::thread_index() == 0) shared.work = Work{};  // no rows
        if (share.count == 0) return;
        if (share.index == 0 && blockIdx.x % blocks == 0) {  // one block tells the combine kernel
            params.shares[2 * share.sequence] = slot;
            params.shares[2 * share.sequence + 1] = share.count;
        }
    }
    const Work work = decode_work<C>(params, share);
    const int kv_head = work.head / params.group;
    shared.work = work;
    shared.tiles = ForwardShared<C>::Tiles::template of<C, Mask>(params, work, share);
    const int batch_entry = C.paged ? 0 : work.batch_entry;  // a cache has none: its strides are of block, token, head
    shared.keys = row_at(static_cast<const T*>(params.k), params.k_strides, batch_entry, work.k_start, kv_head);
    shared.values = row_at(static_cast<const T*>(params.v), params.v_strides, batch_entry, work.k_start, kv_head) +
                    work.chunk * C.block_dv;
}

// The block's rows of q, o or lse, from `first` on; strides of batch entry, token, head.
template <ForwardConfig C, class T>
__device__ __forceinline__ auto rows_of(T* array, const i64 (&strides)[3], const Work& work, const ForwardParams& params,
                                        int first) {
    if constexpr (C.grouped) {
        T* token = row_at(array, strides, work.batch_entry, work.q_start, work.head);
        return GroupedRows<T>{token, strides[1], strides[2], params.group, first};
    } else {
        return StridedRows<T>{row_at(array, strides, work.batch_entry, work.q_start + first, work.head), strides[1]};
    }
}

// Normalised O and lse of the block's rows to where they belong: the results, or a split's partial state.
template <ForwardConfig C, class T, int kM, int kN>
__device__ __forceinline__ void store_results(const T (&O)[kM][kN][4], const T (&lse)[kM][2], ForwardShared<C>& shared,
                                              const ForwardParams& params) {
    constexpr Element kTo = C.split ? sum_element(C.dtype) : C.dtype;
    const Work& work = shared.work;
    const Place<kM> here;
    const int rows = work.row_end(C.block_m) - work.row_begin;
    if constexpr (ForwardShared<C>::kStaged) __syncthreads();  // everyone is done with Q, K and V, whose place O takes
    auto* o = static_cast<Storage<kTo>*>(params.o);
    if constexpr (C.split) o += work.split * params.o_split_stride;
    store_rows<kTo, SharedTile<C.block_m, C.block_dv, Storage<kTo>>, C.head_dim_v, C.store_bytes>(
        O, rows_of<C>(o, params.o_strides, work, params, work.row_begin), rows, work.chunk * C.block_dv,
        ptx::shared_address(shared.o), here.row, here.lane);
    if (params.lse != nullptr && work.chunk == 0) {
        const i64 strides[3] = {params.lse_strides[0], params.lse_strides[2], params.lse_strides[1]};
        T* target = static_cast<T*>(params.lse) + work.split * params.lse_split_stride;
        store_lse(lse, rows_of<C>(target, strides, work, params, work.row_begin), rows, here.row, here.lane);
    }
}

// The first key of the tile at `position` that is read.
template <class Shared>
__device__ __forceinline__ int first_key(const Shared& shared, int position) {
    return max(shared.tiles.tile(position) * Shared::kKeys, shared.tiles.keys.begin);
}

// Rows of the cache that hold the tile at `position`.
template <class Shared>
__device__ __forceinline__ auto paged_rows(const Shared& shared, const ForwardParams& params,
                                           const typename Shared::T* cache, const i64 (&strides)[3], int position) {
    return PagedRows<typename Shared::T, Shared::kKeys>(cache, strides, shared.table.entries[position % 4],
                                                        first_key(shared, position), params.block_size);
}

template <ForwardConfig C, class Mask = NoMask>
__device__ __forceinline__ void forward(const ForwardParams& params) {
    constexpr int kThreads = 32 * C.num_warps, kStages = C.num_stages;
    constexpr int kM = C.block_m / (16 * C.num_warps);  // 16-row blocks of a warp
    constexpr int kN = C.block_n / 16, kD = ceil_div(C.head_dim, 16);
    using Shared = ForwardShared<C>;
    using T = Sum<C.dtype>;
    using QTile = SharedTile<C.block_m, 16 * kD, typename Shared::T>;
    using KTile = SharedTile<C.block_n, 16 * kD, typename Shared::T>;
    using VTile = SharedTile<C.block_n, Shared::kColumnsOfV, typename Shared::T>;
    // Where the assembler would prepare more steps of Q K^T ahead than there are registers for.
    constexpr bool kLoopOverDepth =
        !C.q_in_registers && (C.dtype == Element::float64 || (C.dtype == Element::float32 && kM == 1));
    constexpr u32 kPass = 32 * sizeof(typename Shared::T);
    using QLoader = TileLoader<QTile, kThreads, C.load_bytes, C.head_dim % 16 != 0>;
    using KLoader = TileLoader<KTile, kThreads, C.load_bytes, C.head_dim % 16 != 0>;
    using VLoader = TileLoader<VTile, kThreads, C.load_bytes, C.head_dim_v % VTile::kCols != 0>;

    extern __shared__ __align__(128) unsigned char shared_memory[];
    auto& shared = *reinterpret_cast<Shared*>(shared_memory);
    const Work& work = shared.work;
    const typename Shared::Tiles& tiles = shared.tiles;
    if (ptx::thread_index() < (C.even ? 32 : 1)) locate<C, Mask>(shared, params);
    __syncthreads();  // work and tiles are known to everyone
    if (work.row_begin >= work.rows) return;

    // Start the copy of the entries of the table that lead to the tile at `position`.
    const auto fetch_table = [&](int position) {
        if constexpr (C.paged) {
            if (position >= tiles.end) return;
            const int end = min((tiles.tile(position) + 1) * C.block_n, tiles.keys.end);
            const int* table = params.block_tables + work.sequence * i64{params.table_pitch};
            fetch_entries<kThreads>(shared.table.entries[position % 4], table, params.block_size,
                                    first_key(shared, position), end);
        }
    };

    // Start the copy of K(j) or V(j), j the tile at `position`; of a cut tile, only of the visible keys.
    const auto load_k = [&](int position) {
        if constexpr (C.paged) {
            KLoader::load_scattered(ptx::shared_address(shared.k[position % kStages]),
                                    paged_rows(shared, params, shared.keys, params.k_strides, position), C.head_dim,
                                    tiles.tile(position) * C.block_n, tiles.keys.begin, tiles.keys.end);
        } else {
            KLoader::load(position < tiles.cut_end(), ptx::shared_address(shared.k[position % kStages]), shared.keys,
                          params.k_strides[1], C.head_dim, tiles.tile(position) * C.block_n, tiles.keys.begin,
                          tiles.keys.end);
        }
    };
    const auto load_v = [&](int position) {
        int columns = C.head_dim_v - work.chunk * C.block_dv;
        if constexpr (VTile::kCols > C.block_dv) columns = min(columns, C.block_dv);
        if constexpr (C.paged) {
            VLoader::load_scattered(ptx::shared_address(shared.v[position % kStages]),
                                    paged_rows(shared, params, shared.values, params.v_strides, position), columns,
                                    tiles.tile(position) * C.block_n, tiles.keys.begin, tiles.keys.end);
        } else {
            VLoader::load(position < tiles.cut_end(), ptx::shared_address(shared.v[position % kStages]), shared.values,
                          params.v_strides[1], columns, tiles.tile(position) * C.block_n, tiles.keys.begin,
                          tiles.keys.end);
        }
    };
    // The same for the next tile, if there is one, with two stages K and V.
    const auto load_next = [&](int position) {
        if (position + 1 >= tiles.end) return;
        load_k(position + 1);
        if constexpr (kStages == 2) load_v(position + 1);
    };

    LeftFragments<kM, C.q_in_registers ? kD : 1, C.dtype> q_fragments;
    OnlineSoftmax<T, kM> softmax;  // m, l
    T O[kM][C.block_dv / 8][4];    // unnormalised: sum of 2^(S - m) V over the tiles so far
    clear(O);

    const auto q_address = [&](Place<kM> here) {
        return ptx::shared_address(shared.q) + here.row * QTile::kPitch + QTile::lane_of_left(here.lane);
    };
    // S = Q K(j)^T
    const auto multiply_qk = [&](T(&S)[kM][2 * kN][4], int position) {
        const Place<kM> here;
        u32 q = q_address(here);
        u32 k = ptx::shared_address(shared.k[position % kStages]) + KTile::lane_by_rows(here.lane);
        clear(S);
        const auto step = [&](int d) {  // S += Q[:, d] K(j)[:, d]^T
            if constexpr (!C.q_in_registers) q_fragments.template load_column<QTile>(q, d, 0);
            multiply_transposed<C.dtype, KTile>(S, q_fragments.value[C.q_in_registers ? d : 0], k, d);
        };
        if constexpr (kLoopOverDepth) {  // two steps a pass: a multiple of the tiles' swizzle further
#pragma unroll 1
            for (int d = 0; d < kD / 2; ++d, q += kPass, k += kPass) step(0), step(1);
            if constexpr (kD % 2 == 1) step(0);
        } else {
#pragma unroll
            for (int d = 0; d < kD; ++d) step(d);
        }
    };
    // O += P V(j)
    const auto multiply_pv = [&](const T(&P)[kM][2 * kN][4], int position, int lane) {
        const u32 v = ptx::shared_address(shared.v[position % kStages]) + VTile::lane_by_columns(lane);
#pragma unroll
        for (int n = 0; n < kN; ++n) {  // O += P[:, n] V(j)[n, :]
            Word<C.dtype> left[kM][left_words(C.dtype, 16)];
            as_left<C.dtype>(left, P, n);
            multiply<C.dtype, VTile>(O, left, v, n);
        }
    };

    // One tile of keys.
    const auto visit = [&](int position) {
        ptx::cp_async_wait<0>();  // this thread's share of K(j), with two stages also V(j), has landed
        __syncthreads();          // everyone's has; everyone is done with V(j-1), with two stages also K(j-1)
        if constexpr (kStages == 1) load_v(position);
        else load_next(position);
        if constexpr (C.mask) {
            if (ptx::thread_index() == 0) tiles.fetch(position + 3);
        }
        fetch_table(position + 2);  // where entries of position - 2 were
        ptx::cp_async_commit();

        T S[kM][2 * kN][4];
        multiply_qk(S, position);  // S = Q K(j)^T
        if constexpr (kStages == 1) {
            ptx::cp_async_wait<0>();  // this thread's share of V(j) has landed
            __syncthreads();          // everyone's has; everyone is done with K(j)
            load_next(position);
            ptx::cp_async_commit();
        }

        const Place<kM> here;
        const ScoreRule<C, ForwardParams, Mask> rule(params, work, work.head, tiles.keys,
                                                     work.row_begin + here.row + here.lane / 4, 2 * (here.lane % 4));
        rule.apply(S, tiles.tile(position) * C.block_n, position < tiles.cut_end());  // S = mask(softcap(S) + bias)
        softmax.update(S, O, rule.multiplier());  // S becomes P = 2^(S - m), O and l follow a grown m
        multiply_pv(S, position, here.lane);      // O += P V(j)
    };

    if (tiles.begin < tiles.end) {
        const auto* q = static_cast<const typename Shared::T*>(params.q);
        const auto q_rows = rows_of<C>(q, params.q_strides, work, params, 0);
        if constexpr (C.grouped) {
            QLoader::load_scattered(ptx::shared_address(shared.q), q_rows, C.head_dim, work.row_begin, 0, work.rows);
        } else {
            QLoader::load(true, ptx::shared_address(shared.q), q_rows.array, q_rows.stride, C.head_dim, work.row_begin, 0,
                          work.rows);
        }
        if constexpr (C.paged) {
            fetch_table(tiles.begin);
            fetch_table(tiles.begin + 1);
            ptx::cp_async_commit();
            ptx::cp_async_wait<0>();
            __syncthreads();  // the entries that lead to the first two tiles have landed
        }
        load_k(tiles.begin);
        if constexpr (kStages == 2) load_v(tiles.begin);
        ptx::cp_async_commit();
        if constexpr (C.q_in_registers) {
            ptx::cp_async_wait<0>();  // this thread's share of Q has landed
            __syncthreads();          // everyone's has
            q_fragments.template load<QTile>(q_address(Place<kM>()));
        }
        if constexpr (is_split(C.dtype)) {
            SettledSums<kM, C.block_dv / 8> settled;
            for (int position = tiles.begin;;) {
                do visit(position); while (++position < tiles.end && position % settled.kTiles != 0);
                if (position == tiles.end) break;
                settled.add(softmax, O);
            }
            settled.take(softmax, O);
        } else {
            for (int position = tiles.begin; position < tiles.end; ++position) visit(position);
        }
    }
    softmax.finish(O);  // O /= l, m becomes lse
    store_results<C>(O, softmax.m, shared, params);
}

}  // namespace cuflash
