// Rows of a global array into a shared tile, zero-filled past the array's columns and outside of the wanted rows.
#pragma once

#include "ptx/copy.cuh"
#include "ptx/math.cuh"
#include "tile/shared_tile.cuh"

namespace cuflash {

// Rows that lie a stride apart.
template <class T>
struct StridedRows {
    T* array;
    i64 stride;

    __device__ __forceinline__ T* at(int row) const { return array + row * stride; }
};

// Rows of the heads of a group, token after token.
template <class T>
struct GroupedRows {
    T* array;  // first token of the sequence, first head of the group
    i64 token_stride, head_stride;
    int group;
    int first;  // what row 0 is of them

    __device__ __forceinline__ T* at(int row) const {
        return array + (first + row) / group * token_stride + (first + row) % group * head_stride;
    }
};

// All threads of a block load tiles [rows][cols] of an array. A thread keeps one column of chunks (and those kSpan
// further), so that a row costs one pointer addition. Accesses are kLoadBytes wide: asynchronous copies from 4 bytes up,
// completed by the caller's commit and wait; plain loads of 2 bytes. kPadded: the array has fewer columns than the tile.
template <class Tile, int kThreads, int kLoadBytes, bool kPadded>
struct TileLoader {
    using T = typename Tile::Element;
    static constexpr int kBytes = sizeof(T);
    static constexpr int kRows = Tile::kRows;
    static constexpr int kRowStep = kThreads / Tile::kSpan;

    // Rows first_row .. first_row + kRows - 1 of `array` [..][columns], row_stride elements apart, into the tile at shared
    // address `tile`. Of a partial tile only the rows [begin, end) are read, the others become zero.
    static __device__ __forceinline__ void load(bool partial, u32 tile, const T* array, i64 row_stride, int columns,
                                                int first_row, int begin, int end) {
        if (partial) load_rows<true>(tile, array, row_stride, columns, first_row, begin, end);
        else load_rows<false>(tile, array, row_stride, columns, first_row, begin, end);
    }

    // The same of rows that lie anywhere: `rows.at(row)` is asked for rows in [begin, end) alone. Where a row lies takes
    // many instructions to find: each lane finds those of one or two rows, and hands them to the lanes that copy them.
    template <class Rows>
    static __device__ __forceinline__ void load_scattered(u32 tile, const Rows& rows, int columns, int first_row, int begin,
                                                          int end) {
        constexpr int kOfWarp = 32 / Tile::kSpan;  // rows of a warp in one step
        constexpr int kSets = ceil_div(ceil_div(kRows, kRowStep) * kOfWarp, 32);
        const int thread = ptx::thread_index(), lane = thread % 32;
        const int row = thread / Tile::kSpan, chunk = thread % Tile::kSpan;
        const T* found[kSets];  // null: zeros
#pragma unroll
        for (int set = 0; set < kSets; ++set) {
            const int n = 32 * set + lane, own = n / kOfWarp * kRowStep + thread / 32 * kOfWarp + n % kOfWarp;
            const int array_row = first_row + own;
            const bool in_range = own < kRows && begin <= array_row && array_row < end;
            found[set] = in_range ? rows.at(array_row) : nullptr;
        }
        const u32 target = tile + Tile::offset(row, chunk);
#pragma unroll
        for (int i = 0; i < kRows; i += kRowStep) {
            const int n = i / kRowStep * kOfWarp;
            const T* array = ptx::shfl_idx(found[n / 32], n % 32 + lane / Tile::kSpan);
            if (kRows % kRowStep != 0 && row + i >= kRows) break;
            const T* source = array + Tile::kPerChunk * chunk;
#pragma unroll
            for (int j = 0; j < Tile::kChunks; j += Tile::kSpan) {
                const int row_left = kPadded ? min(max(kBytes * columns - 16 * (chunk + j), 0), 16) : 16;
                copy_chunk<true>(Tile::step(target, i, j), source + Tile::kPerChunk * j, array != nullptr ? row_left : 0);
            }
        }
    }

    template <bool kPartial>
    static __device__ __forceinline__ void load_rows(u32 tile, const T* array, i64 row_stride, int columns,
                                                     int first_row, int begin, int end) {
        const int thread = ptx::thread_index();
        const int row = thread / Tile::kSpan, chunk = thread % Tile::kSpan;
        const u32 target = tile + Tile::offset(row, chunk);
        const T* source = array + (first_row + row) * row_stride + Tile::kPerChunk * chunk;
#pragma unroll
        for (int i = 0; i < kRows; i += kRowStep, source += kRowStep * row_stride) {
            if (kRows % kRowStep != 0 && row + i >= kRows) break;
            const int array_row = first_row + row + i;
            const bool in_range = !kPartial || (begin <= array_row && array_row < end);
#pragma unroll
            for (int j = 0; j < Tile::kChunks; j += Tile::kSpan) {
                const int row_left = kPadded ? min(max(kBytes * columns - 16 * (chunk + j), 0), 16) : 16;
                const int valid = in_range ? row_left : 0;  // bytes of the chunk that may be read
                copy_chunk<kPartial>(Tile::step(target, i, j), source + Tile::kPerChunk * j, valid);
            }
        }
    }

    template <bool kPartial>
    static __device__ __forceinline__ void copy_chunk(u32 target, const T* source, int valid) {
        if constexpr (kLoadBytes == 16) {
            if constexpr (kPartial || kPadded) ptx::cp_async_16(target, source, valid);
            else ptx::cp_async_16(target, source);
        } else if constexpr (kLoadBytes > 2) {
            static_assert(kLoadBytes >= kBytes);
#pragma unroll
            for (int at = 0; at < 16; at += kLoadBytes) {
                ptx::cp_async_narrow<kLoadBytes>(target + at, source + at / kBytes, min(max(valid - at, 0), kLoadBytes));
            }
        } else {
            u32 value[4];
#pragma unroll
            for (int at = 0; at < 8; at += 2) {
                const u32 low = 2 * at < valid ? source[at] : 0, high = 2 * at + 2 < valid ? source[at + 1] : 0;
                value[at / 2] = low | high << 16;
            }
            ptx::store_shared_v4(target, value);
        }
    }
};

}  // namespace cuflash
