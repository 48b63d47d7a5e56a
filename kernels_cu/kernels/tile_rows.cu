// Which key tiles a mask shows to each query tile: none of a tile's scores, some or all. Intervals decide most tiles at
// once, a thread each. The others are spread over the warps, which look at every score that stays in doubt, so that lists are
// exact. Nothing of size seqlen_q x seqlen_k is in memory.
#pragma once

#include "attention/listed_tiles.cuh"
#include "attention/query_work.cuh"

namespace cuflash {

enum Verdict { kEmpty, kPartial, kFull, kOpen };

// Queries [query_begin, query_end) against keys [key_begin, key_end), all of which exist; not empty.
struct Box {
    int query_begin, query_end, key_begin, key_end;
};

// A tile is 4 by 8 parts, numbered along its keys, a part's pairs along rows of kRow keys. The last query and key of a tile
// stand for those that it lacks.
template <TileListConfig C>
struct TileParts {
    static constexpr int kQueries = ceil_div(C.block_m, 4), kKeys = ceil_div(C.block_n, 8);
    static constexpr int row_of(int keys) { return keys == 1 ? 1 : 2 * row_of(ceil_div(keys, 2)); }
    static constexpr int kRow = row_of(kKeys);  // a power of two
    static constexpr int kLooks = ceil_div(kQueries * kRow, 32);  // of a warp, a pair a lane
    static constexpr int kSampleLooks = kLooks < 4 ? kLooks : 4;
    // Elements of a table that a part may look up. All pairs of a tile take a lane kQueries * kKeys lookups.
    static constexpr int kMostLookups = 32;

    static __device__ __forceinline__ Box box(const Box& tile, int part) {
        const int query = min(tile.query_begin + part / 8 * kQueries, tile.query_end - 1);
        const int key = min(tile.key_begin + part % 8 * kKeys, tile.key_end - 1);
        return {query, min(query + kQueries, tile.query_end), key, min(key + kKeys, tile.key_end)};
    }
    // A pair within a part's box; those of all parts are spread over the tile, its corners among them.
    static __device__ __forceinline__ u32 sample(int part) {
        return part / 8 * (kQueries - 1) / 3 * kRow + part % 8 * (kKeys - 1) / 7;
    }
    template <class Mask>
    static __device__ __forceinline__ bool shows_pair(const TileListParams& params, const QueryWork& work, const Box& tile,
                                                      int part, u32 pair) {
        const int query = tile.query_begin + part / 8 * kQueries + static_cast<int>(pair / kRow);
        const int key = tile.key_begin + part % 8 * kKeys + static_cast<int>(pair % kRow);
        return shows<Mask>(params, work, work.head, min(query, tile.query_end - 1), min(key, tile.key_end - 1));
    }
};

// In shared memory, of the tiles that a block decides at once, a thread each: those that intervals leave open.
template <int kWarps>
struct OpenTiles {
    int counts[kWarps];         // of each warp
    int threads[32 * kWarps];   // whose tiles they are
    int verdicts[32 * kWarps];  // of each thread's tile, if it was open

    // How many there are, once all threads know which.
    __device__ __forceinline__ int gather(bool open, int thread) {
        const int lane = thread % 32, warp = thread / 32;
        const u32 of_warp = ptx::ballot(open);
        if (lane == 0) counts[warp] = __popc(of_warp);
        const int count = __syncthreads_count(open);  // the counts of open tiles are there
        if (count == 0) return 0;
        int place = __popc(of_warp & ((1u << lane) - 1));
#pragma unroll
        for (int w = 0; w < kWarps - 1; ++w) place += w < warp ? counts[w] : 0;
        if (open) threads[place] = thread;
        __syncthreads();  // the open tiles are there
        return count;
    }
};

// The verdict of tile first + thread, as far as its keys exist. In the first turn of the loop each thread judges its own tile,
// in the others a warp shares an open one; so the mask's expression stands here once for intervals and once for pairs.
template <TileListConfig C, class Mask>
__device__ __forceinline__ Verdict decide(const TileListParams& params, const QueryWork& work, int row_end, int first,
                                          int tiles, OpenTiles<C.num_warps>& open, int thread) {
    using Parts = TileParts<C>;
    const int lane = thread % 32, warp = thread / 32;
    Verdict verdict = kEmpty;
    int count = 0;  // open tiles
#pragma unroll 1
    for (int i = warp - C.num_warps; i < count; i += C.num_warps) {
        const bool own = i < 0;
        const int tile = first + (own ? thread : open.threads[i]);
        const Box box{work.row_begin, row_end, tile * C.block_n, min((tile + 1) * C.block_n, work.len_k)};
        u32 visible = 0, hidden = 0;  // not 0 once such a pair of an open tile is known; both end the search
        u32 doubtful = 0;             // parts of which intervals are not sure, still to be looked at
        // Of an open tile: step 0 looks at few pairs of each part, a part a lane. Step 1 asks intervals, in the same way: where
        // they are sure of a part, one pair of it has told all. Then, of each other part, all pairs.
#pragma unroll 1
        for (int step = own ? 1 : 0; !(visible && hidden); ++step) {
            int part = lane, looks = Parts::kSampleLooks;
            u32 pair = Parts::sample(lane);
            if (step == 1) {
                Truth truth{false, true};
                if (tile < tiles) {
                    const Box judged = own ? box : Parts::box(box, lane);
                    truth = judge<Mask>(params, work, work.head, judged.query_begin, judged.query_end, judged.key_begin,
                                        judged.key_end, own ? kMostLookups : Parts::kMostLookups);
                }
                if (own) {
                    verdict = truth.none ? kEmpty : truth.all ? kFull : kOpen;
                    break;
                }
                doubtful = ptx::ballot(!truth.all && !truth.none);
            }
            if (step >= 1) {
                if (doubtful == 0) break;
                part = __ffs(doubtful) - 1, pair = lane, looks = Parts::kLooks;
                doubtful &= doubtful - 1;
            }
#pragma unroll 1
            for (; looks > 0 && !(visible && hidden); --looks, pair += 32) {
                const u32 shown = ptx::ballot(Parts::template shows_pair<Mask>(params, work, box, part, pair));
                visible |= shown;
                hidden |= ~shown;
            }
        }
        if (own) count = open.gather(verdict == kOpen, thread);
        else if (lane == 0) open.verdicts[tile - first] = !visible ? kEmpty : hidden ? kPartial : kFull;
    }
    if (count > 0) __syncthreads();  // the verdicts are there
    return verdict == kOpen ? static_cast<Verdict>(open.verdicts[thread]) : verdict;
}

// Grid, fastest first: query tile, head, batch entry; the latter two as far as the mask depends on them. Each turn of the
// loop decides as many tiles as there are threads.
template <TileListConfig C, class Mask>
__device__ __forceinline__ void tile_rows(const TileListParams& params) {
    constexpr int kThreads = 32 * C.num_warps;
    __shared__ int counts[2][C.num_warps];  // partial and full tiles of each warp
    __shared__ OpenTiles<C.num_warps> open;
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
        // Its barriers come after all have read the counts of the turn before.
        Verdict verdict = decide<C, Mask>(params, work, row_end, first, tiles, open, thread);
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
    }
    if (!C.turns && thread < 2) params.counts[2 * index + thread] = thread == 0 ? partial : full;
}

}  // namespace cuflash
