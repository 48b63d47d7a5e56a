// Which key tiles a mask shows to each query tile: none of a tile's scores, some or all. Intervals decide most tiles at
// once, a thread each; of the others a warp looks at every score, so that lists are exact. Nothing of size
// seqlen_q x seqlen_k is in memory.
#pragma once

#include "attention/listed_tiles.cuh"
#include "attention/query_work.cuh"

namespace cuflash {

enum Verdict { kEmpty, kPartial, kFull, kUnknown };

// Every score of a tile, by a warp: lanes are keys. Ends at the first sight of both kinds.
template <class Mask>
__device__ __forceinline__ Verdict look_at(const TileListParams& params, const Sequence& sequence, int head,
                                           int query_begin, int query_end, int key_begin, int key_end, int lane) {
    bool some = false, hidden = false;
    for (int key = key_begin + lane; key - lane < key_end; key += 32) {
        for (int query = query_begin; query < query_end; ++query) {
            if (key < key_end) {
                const bool shown = shows<Mask>(params, sequence, head, query, key);
                some |= shown;
                hidden |= !shown;
            }
            if (query % 8 == 0 && ptx::vote_any(some) && ptx::vote_any(hidden)) return kPartial;
        }
    }
    some = ptx::vote_any(some);
    hidden = ptx::vote_any(hidden);
    return some && hidden ? kPartial : some ? kFull : kEmpty;
}

// Grid, fastest first: query tile, head, batch entry; the latter two as far as the mask depends on them. Each turn of the
// loop decides as many tiles as there are threads.
template <TileListConfig C, class Mask>
__device__ __forceinline__ void tile_rows(const TileListParams& params) {
    constexpr int kThreads = 32 * C.num_warps;
    __shared__ int counts[2][C.num_warps];  // partial and full tiles of each warp
    const int thread = ptx::thread_index(), lane = thread % 32, warp = thread / 32;
    Digits digits{blockIdx.x};
    QueryWork work;
    work.slot = digits.next(params.q_tiles);
    work.head = Mask::kByHead ? digits.next(params.num_heads) : 0;
    if constexpr (C.varlen) {
        const int b = sequence_of_slot(params.cu_seqlens_q, params.batch, params.total_q, C.block_m, work.slot);
        if constexpr (C.paged) locate_paged(work, params, b);
        else locate_packed(work, params, b);
        work.row_begin = first_row_of_slot(work.slot, work.q_start, b, C.block_m, work.len_q);
        if (b == params.batch) work.len_k = 0;
    } else {
        locate_dense(work, params, static_cast<int>(digits.rest));
        if constexpr (C.paged) work.len_k = cached_keys(params, work.sequence);
        work.row_begin = work.slot * C.block_m;
    }
    const i64 index = list_index<Mask, C.paged>(work.batch_entry, work.head, params.num_heads, work.slot, params.q_tiles);
    const int row_end = min(work.row_begin + C.block_m, work.len_q);
    const int tiles = work.row_begin < work.len_q ? ceil_div(work.len_k, C.block_n) : 0;

    int partial = 0, full = 0;  // found so far
    for (int first = 0; first < tiles; first += kThreads) {
        const int tile = first + thread;
        Verdict verdict = kEmpty;
        if (tile < tiles) {
            const int begin = tile * C.block_n, end = min(begin + C.block_n, work.len_k);
            const Truth truth = judge<Mask>(params, work, work.head, work.row_begin, row_end, begin, end);
            verdict = truth.none ? kEmpty : truth.all ? kFull : kUnknown;
        }
        for (u32 unknown = ptx::ballot(verdict == kUnknown); unknown != 0; unknown &= unknown - 1) {
            const int source = __ffs(unknown) - 1, begin = (first + 32 * warp + source) * C.block_n;
            const Verdict seen = look_at<Mask>(params, work, work.head, work.row_begin, row_end, begin,
                                               min(begin + C.block_n, work.len_k), lane);
            if (lane == source) verdict = seen;
        }
        if (verdict == kFull && (tile + 1) * C.block_n > work.len_k) verdict = kPartial;  // its last keys do not exist
        const u32 partials = ptx::ballot(verdict == kPartial), fulls = ptx::ballot(verdict == kFull);
        if (lane == 0) counts[0][warp] = __popc(partials), counts[1][warp] = __popc(fulls);
        __syncthreads();  // the counts are there
        const u32 before = (1u << lane) - 1;
        int partials_before = partial + __popc(partials & before), fulls_before = full + __popc(fulls & before);
#pragma unroll
        for (int w = 0; w < C.num_warps; ++w) {
            if (w < warp) partials_before += counts[0][w], fulls_before += counts[1][w];
            partial += counts[0][w], full += counts[1][w];
        }
        if constexpr (C.turns) {
            const int turn = partials_before + fulls_before;
            if (tile < tiles) {
                params.turns[index * params.turn_pitch + tile] = verdict == kEmpty ? 0 : 4 * turn + 2 * (verdict == kPartial) + 1;
            }
        } else {
            int* list = params.lists + index * params.list_pitch;
            if (verdict == kPartial) list[partials_before] = tile;
            if (verdict == kFull) list[params.list_pitch - 1 - fulls_before] = tile;
        }
        __syncthreads();  // everyone has read the counts
    }
    if (!C.turns && thread < 2) params.counts[2 * index + thread] = thread == 0 ? partial : full;
}

}  // namespace cuflash
