// Which key tiles a query tile visits, in which order, and which of them need a mask.
#pragma once

#include "attention/work.cuh"

namespace cuflash {

// Key j is visible to query i iff i + shift - left <= j <= i + shift + right and j < len_k, with shift = len_k - len_q.
// Bounds are formed in 64 bits: a length and an unbounded side (2^31 - 1) together exceed 32.
struct Window {
    i64 shift;
    int left, right;
    int len_q, len_k;

    template <class Params>
    __device__ __forceinline__ Window(const Params& params, const Sequence& sequence)
        : shift(static_cast<i64>(sequence.len_k) - sequence.len_q),
          left(params.left),
          right(params.right),
          len_q(sequence.len_q),
          len_k(sequence.len_k) {}

    // First key visible to query `row`, and the one past the last.
    __device__ __forceinline__ int begin(i64 row) const { return clamp(row + shift - left, len_k); }
    __device__ __forceinline__ int end(i64 row) const { return clamp(row + shift + right + 1, len_k); }

    // First query that sees key `key`, and the one past the last.
    __device__ __forceinline__ int begin_query(i64 key) const { return clamp(key - shift - right, len_q); }
    __device__ __forceinline__ int end_query(i64 key) const { return clamp(key - shift + left + 1, len_q); }

    static __device__ __forceinline__ int clamp(i64 index, int length) {
        return static_cast<int>(min(max(index, 0ll), static_cast<i64>(length)));
    }
};

struct Span {
    int begin, end;
};

// The tiles of `block` keys that hold the keys of a span.
__device__ __forceinline__ Span tiles_of(Span keys, int block) {
    const int first = keys.begin / block;
    return {first, keys.begin < keys.end ? 1 + (keys.end - 1) / block : first};
}

// The tiles that hold a key visible to one of the tile's rows. Positions 0, 1, ... number them in the order of visits:
// first the cut tiles, of which some scores are masked (those at the right edge or the end of the keys, from the last
// backwards, then those at the left edge), then the full ones. The block takes its share of the positions.
struct KeyTiles {
    Span keys;                // visible to at least one row; others are never read
    int first, last;          // tiles [first, last) hold them
    int right_cut, left_cut;  // how many of these are cut by either edge
    int begin, end;           // positions [begin, end) are this block's

    template <ForwardConfig C, class Mask>
    static __device__ __forceinline__ KeyTiles of(const ForwardParams& params, const Work& work, const Share& share) {
        const Window window(params, work);
        const int each = C.grouped ? params.group : 1;  // rows that a query has
        const int row_first = work.row_begin / each, row_last = (work.row_end(C.block_m) - 1) / each;
        KeyTiles tiles;
        tiles.keys.begin = C.windowed ? window.begin(row_first) : 0;
        tiles.keys.end = C.windowed ? window.end(row_last) : work.len_k;
        const int full_begin = C.windowed ? window.begin(row_last) : 0;
        const int full_end = C.windowed ? window.end(row_first) : work.len_k;
        const Span held = tiles_of(tiles.keys, C.block_n);
        tiles.first = held.begin;
        tiles.last = held.end;
        const int full_last = max(full_end / C.block_n, tiles.first);
        const int full_first = full_begin == 0 ? 0 : 1 + (full_begin - 1) / C.block_n;
        tiles.right_cut = tiles.last - full_last;
        tiles.left_cut = min(full_first, full_last) - tiles.first;
        tiles.begin = share.begin(tiles.last - tiles.first);
        tiles.end = share.end(tiles.last - tiles.first);
        return tiles;
    }

    // Cut tiles of this block come before this position.
    __device__ __forceinline__ int cut_end() const { return min(right_cut + left_cut, end); }

    __device__ __forceinline__ int tile(int position) const {
        if (position < right_cut) return last - 1 - position;
        if (position < right_cut + left_cut) return first + (position - right_cut);
        return last - 1 - (position - left_cut);
    }
};

}  // namespace cuflash
