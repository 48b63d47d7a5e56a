// A tile [rows][cols] in shared memory, swizzled so that no access to whole chunks conflicts.
#pragma once

#include "ptx/types.cuh"

namespace cuflash {

constexpr int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }
constexpr int ceil_div(int value, int divisor) { return (value + divisor - 1) / divisor; }
constexpr int lesser(int a, int b) { return a < b ? a : b; }
constexpr int greater(int a, int b) { return a < b ? b : a; }

// Rows are unpadded and consist of chunks of 16 bytes. Eight chunks span the 32 banks. With kSpan = gcd(chunks a row, 8),
// 8 / kSpan consecutive rows already start in different banks, so chunk c of row r lies at c ^ (r / (8 / kSpan) % kSpan):
// the same chunk of eight consecutive rows, and kSpan consecutive chunks of 8 / kSpan rows, each cover all banks once.
// The XOR touches only address bits that neither a row, nor an aligned group of kSpan chunks, nor a tile's start (aligned
// to 128 bytes) reaches; so a thread computes one address and reaches others by an XOR and an addition of constants.
template <int kRows_, int kCols_, class T>
struct SharedTile {
    using Element = T;
    static constexpr int kRows = kRows_;
    static constexpr int kCols = kCols_;
    static_assert(kRows % 16 == 0 && kCols % 16 == 0);

    static constexpr int kPerChunk = 16 / sizeof(T);      // elements of a chunk
    static constexpr int kChunks = kCols / kPerChunk;  // 16-byte chunks a row
    static constexpr int kSpan = kChunks % 8 == 0 ? 8 : kChunks % 4 == 0 ? 4 : 2;
    static constexpr int kPitch = 16 * kChunks;  // bytes a row

    static __device__ __forceinline__ constexpr int swizzle(int row) { return row / (8 / kSpan) % kSpan; }

    // Byte offset of a chunk.
    static __device__ __forceinline__ u32 offset(int row, int chunk) {
        return row * kPitch + 16 * (chunk ^ swizzle(row));
    }

    // From the address of (row, chunk) to that of (row + row_step, chunk + chunk_step), for constant steps that share no
    // set bit with row and chunk.
    static __device__ __forceinline__ u32 step(u32 address, int row_step, int chunk_step) {
        return (address ^ (16 * (swizzle(row_step) ^ (chunk_step % kSpan)))) +
               (row_step * kPitch + 16 * (chunk_step / kSpan * kSpan));
    }

    // Offsets at which this lane reads a 16x16 block at (0, 0), as a left operand or as a right one by rows or by columns.
    //
    // ldmatrix takes the addresses of rows of 8x8 matrices, of 8x4 ones of 32-bit elements. As a left operand registers
    // 0 .. 3 receive the matrices upper left, lower left, upper right, lower right; by rows upper left, upper right, lower
    // left, lower right, so that the pair along the shared dimension comes together. By columns it transposes 16-bit
    // elements; of wider ones a lane loads those of rows 2c and 2c + 1. Of 64-bit elements it loads whole chunks of a row,
    // lane c of four chunk 2c: neighbouring rows then meet no bank twice.
    static __device__ __forceinline__ u32 lane_of_left(int lane) {
        if constexpr (sizeof(T) == 8) return offset(lane / 4, lane % 4 * 2);
        else return offset(lane % 16, lane / 16);
    }
    static __device__ __forceinline__ u32 lane_by_rows(int lane) {
        if constexpr (sizeof(T) == 8) return offset(lane / 4, lane % 4 * 2);
        else return offset(lane / 16 * 8 + lane % 8, lane / 8 % 2);
    }
    static __device__ __forceinline__ u32 lane_by_columns(int lane) {
        if constexpr (sizeof(T) == 2) return offset(lane % 16, lane / 16);
        constexpr int kBytes = sizeof(T);
        return offset(lane % 4 * 2, lane / 4 * kBytes / 16) + lane / 4 * kBytes % 16;
    }

    // From the address of this lane in block (0, 0) to that in the 16x16 block (i, j).
    static __device__ __forceinline__ u32 block(u32 address, int i, int j) {
        return step(address, 16 * i, 16 / kPerChunk * j);
    }
};

}  // namespace cuflash
