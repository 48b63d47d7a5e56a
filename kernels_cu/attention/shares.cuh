// Even work in decoding: what a block computes follows from the lengths of all sequences, which only the device knows.
//
// The key tiles of all sequences are cut into shares of at most C tiles, ceil(tiles_b / C) even ones of sequence b and at
// least one, in the order of sequences; the s-th share is that of slot s. Blocks of the slots that remain leave. C is the
// smallest of a few sizes, between what would do if no sequence had a share that is not full and what always does, with no
// more shares than are wanted (cuflash/plan/shares.py).
#pragma once

#include "attention/key_tiles.cuh"
#include "tile/product.cuh"

namespace cuflash {

// Key tiles that the queries of sequence b see.
template <ForwardConfig C>
__device__ __forceinline__ int visible_tiles(const ForwardParams& params, int b) {
    Sequence sequence;
    locate_dense(sequence, params, b);
    sequence.len_k = cached_keys(params, b);
    const Window window(params, sequence);
    const Span keys = C.windowed ? Span{window.begin(0), window.end(sequence.len_q - 1)} : Span{0, sequence.len_k};
    const Span tiles = tiles_of(keys, C.block_n);
    return tiles.end - tiles.begin;
}

// The share of a slot, found by all lanes of a warp: it comes to the lane whose sequences it is one of; a share of count 0
// comes to the others. A lane has a row of sequences, so that one scan suffices for any batch.
template <ForwardConfig C>
__device__ __forceinline__ Share share_of_slot(const ForwardParams& params, int slot) {
    const int lane = ptx::thread_index(), row = ceil_div(params.batch, 32);
    const int first = min(lane * row, params.batch), last = min(first + row, params.batch);
    int tiles = 0;
#pragma unroll 1
    for (int b = first; b < last; ++b) tiles += visible_tiles<C>(params, b);
    const int all = warp_sum(tiles);
    const int low = max(params.least_tiles, ceil_div(all, params.most_shares));
    int size = max(params.least_tiles, ceil_div(all, params.most_shares + 1 - params.batch));
    if (low < size) {
        constexpr int kSizes = 8;
        const int step = size - low;
        int counts[kSizes - 1] = {};
#pragma unroll 1
        for (int b = first; b < last; ++b) {
            const int own = visible_tiles<C>(params, b);
#pragma unroll
            for (int i = 0; i < kSizes - 1; ++i) counts[i] += max(1, ceil_div(own, low + step * i / (kSizes - 1)));
        }
#pragma unroll
        for (int i = kSizes - 2; i >= 0; --i) {
            if (warp_sum(counts[i]) <= params.most_shares) size = low + step * i / (kSizes - 1);
        }
    }
    const auto shares_of = [&](int b) { return max(1, ceil_div(visible_tiles<C>(params, b), size)); };
    int own = 0;
#pragma unroll 1
    for (int b = first; b < last; ++b) own += shares_of(b);
    int before = own;  // of the lanes up to this one
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const int other = ptx::shfl_idx(before, max(lane - step, 0));
        if (lane >= step) before += other;
    }
    before -= own;
    Share found{0, 0};
#pragma unroll 1
    for (int b = first; b < last; ++b) {
        const int count = shares_of(b);
        if (before <= slot && slot < before + count) found = {slot - before, count, b};
        before += count;
    }
    return found;
}

}  // namespace cuflash
