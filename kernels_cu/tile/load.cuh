// Rows of a global array into a shared tile, zero-filled past the array's columns and past a row limit.
#pragma once

#include "ptx/copy.cuh"
#include "tile/shared_tile.cuh"

namespace cuflash {

// All threads of the block load a tile. A thread keeps one column of chunks (and those kSpan further), so that a row
// costs one pointer addition. Accesses are kLoadBytes wide: asynchronous copies from 4 bytes up, completed by the
// caller's commit and wait; plain loads of 2 bytes. kPadded: the array has fewer columns than the tile.
template <class Tile, int kThreads, int kLoadBytes, bool kPadded>
struct TileLoader {
    static constexpr int kRows = Tile::kRows;
    static constexpr int kRowStep = kThreads / Tile::kSpan;

    const char* source;  // this thread's first chunk of the array's first row
    i64 row_bytes;
    int columns;     // of the array, from the tile's first column on
    int row, chunk;  // this thread's first within a tile

    __device__ __forceinline__ TileLoader(const u16* array, i64 row_stride, int columns, int thread)
        : row_bytes(2 * row_stride), columns(columns), row(thread / Tile::kSpan), chunk(thread % Tile::kSpan) {
        source = reinterpret_cast<const char*>(array) + row * row_bytes + 16 * chunk;
    }

    // Rows first_row .. first_row + kRows - 1 into the tile at shared address `tile`. Of a kPartial tile only the array's
    // rows [begin, end) are read, the others become zero.
    template <bool kPartial>
    __device__ __forceinline__ void load(u32 tile, int first_row, int begin, int end) const {
        const char* pointer = source + first_row * row_bytes;
        const u32 target = tile + Tile::offset(row, chunk);
#pragma unroll
        for (int i = 0; i < kRows; i += kRowStep, pointer += kRowStep * row_bytes) {
            if (kRows % kRowStep != 0 && row + i >= kRows) break;
            const int array_row = first_row + row + i;
            const bool in_range = !kPartial || (begin <= array_row && array_row < end);
#pragma unroll
            for (int j = 0; j < Tile::kChunks; j += Tile::kSpan) {
                copy_chunk<kPartial>(Tile::step(target, i, j), pointer + 16 * j, in_range, chunk + j);
            }
        }
    }

    template <bool kPartial>
    __device__ __forceinline__ void copy_chunk(u32 target, const char* pointer, bool in_range, int chunk) const {
        const int row_left = kPadded ? min(max(2 * columns - 16 * chunk, 0), 16) : 16;
        const int valid = in_range ? row_left : 0;  // bytes of the chunk that may be read
        if constexpr (kLoadBytes == 16) {
            if constexpr (kPartial || kPadded) ptx::cp_async_16(target, pointer, valid);
            else ptx::cp_async_16(target, pointer);
        } else if constexpr (kLoadBytes > 2) {
#pragma unroll
            for (int at = 0; at < 16; at += kLoadBytes) {
                ptx::cp_async_narrow<kLoadBytes>(target + at, pointer + at, min(max(valid - at, 0), kLoadBytes));
            }
        } else {
            u32 value[4];
#pragma unroll
            for (int at = 0; at < 16; at += 4) {
                const u16* pair = reinterpret_cast<const u16*>(pointer + at);
                const u32 low = at < valid ? pair[0] : 0, high = at + 2 < valid ? pair[1] : 0;
                value[at / 4] = low | high << 16;
            }
            ptx::store_shared_v4(target, value);
        }
    }
};

}  // namespace cuflash
