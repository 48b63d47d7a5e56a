// Backward pass: of each key tile the query tiles that see it, from the turns that tile_rows.cu found. The last query tile
// comes first, as where no mask is.
#pragma once

#include "attention/listed_tiles.cuh"

namespace cuflash {

// Grid, fastest first: key tile, key/value head, batch entry; the latter two as far as the mask depends on them.
template <TileListConfig C, class Mask>
__device__ __forceinline__ void tile_columns(const TileListParams& params) {
    constexpr int kThreads = 32 * C.num_warps;
    __shared__ int counts[C.num_warps];
    const int thread = ptx::thread_index(), lane = thread % 32, warp = thread / 32;
    const int kv_heads = params.num_heads / params.group;
    Digits digits{blockIdx.x};
    const int slot = digits.next(params.k_tiles);
    const int kv_head = Mask::kByHead ? digits.next(kv_heads) : 0;
    Sequence sequence;
    int key_begin = slot * C.block_n, first_slot = 0;
    if constexpr (C.varlen) {
        const int b = sequence_of_slot(params.cu_seqlens_k, params.batch, params.total_k, C.block_n, slot);
        locate_packed(sequence, params, b);
        key_begin = first_row_of_slot(slot, sequence.k_start, b, C.block_n, sequence.len_k);
        first_slot = sequence.q_start / C.block_m + b;
    } else {
        locate_dense(sequence, params, static_cast<int>(digits.rest));
    }
    const i64 index = list_index<Mask>(sequence.batch_entry, kv_head, kv_heads, slot, params.k_tiles);
    auto* list = reinterpret_cast<ListedQueryTiles::Entry*>(params.lists) + index * params.list_pitch;
    const int tiles = key_begin < sequence.len_k ? ceil_div(sequence.len_q, C.block_m) : 0;
    const int heads = Mask::kByHead ? params.group : 1;

    int count = 0;  // found so far
    for (int first = 0; first < heads * tiles; first += kThreads) {
        const int i = first + thread, head = i / max(tiles, 1), tile = tiles - 1 - i % max(tiles, 1);
        int turn = 0;
        if (i < heads * tiles) {
            const i64 row = list_index<Mask>(sequence.batch_entry, kv_head * heads + head, params.num_heads,
                                             first_slot + tile, params.q_tiles);
            turn = params.turns[row * params.turn_pitch + key_begin / C.block_n];
        }
        const u32 found = ptx::ballot(turn != 0);
        if (lane == 0) counts[warp] = __popc(found);
        __syncthreads();  // the counts are there
        int before = count + __popc(found & ((1u << lane) - 1));
#pragma unroll
        for (int w = 0; w < C.num_warps; ++w) {
            if (w < warp) before += counts[w];
            count += counts[w];
        }
        if (turn != 0) list[before] = {head * params.q_tiles + tile, turn / 2};
        __syncthreads();  // everyone has read the counts
    }
    if (thread == 0) params.counts[index] = count;
}

}  // namespace cuflash
