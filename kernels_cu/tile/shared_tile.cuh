// A tile [rows][cols] of 16-bit elements in shared memory, swizzled so that no access to whole chunks conflicts.
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
template <int kRows_, int kCols_>
struct SharedTile {
    static constexpr int kRows = kRows_;
    static constexpr int kCols = kCols_;
    static_assert(kRows % 16 == 0 && kCols % 16 == 0);

    static constexpr int kChunks = kCols / 8;  // 16-byte chunks a row
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

    // Offset that this lane gives to ldmatrix for the 16x16 block at (0, 0). By columns, registers 0 .. 3 receive the 8x8
    // matrices upper left, lower left, upper right, lower right; by rows, upper left, upper right, lower left, lower
    // right. A product takes consecutive registers: a left operand by columns, a right one so that the pair of matrices
    // along the shared dimension comes together.
    static __device__ __forceinline__ u32 lane_by_columns(int lane) { return offset(lane % 16, lane / 16); }
    static __device__ __forceinline__ u32 lane_by_rows(int lane) { return offset(lane / 16 * 8 + lane % 8, lane / 8 % 2); }

    // From the address of this lane in block (0, 0) to that in the 16x16 block (i, j).
    static __device__ __forceinline__ u32 block(u32 address, int i, int j) { return step(address, 16 * i, 2 * j); }
};

}  // namespace cuflash
