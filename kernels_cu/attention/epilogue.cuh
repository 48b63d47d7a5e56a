// Results from registers to global memory.
#pragma once

#include "attention/work.cuh"
#include "ptx/copy.cuh"
#include "tile/product.cuh"
#include "tile/shared_tile.cuh"

namespace cuflash {

// Largest power of two that divides a row, at most the row alignment; both in bytes.
constexpr int store_unit(int row_bytes, int alignment) {
    const int power = row_bytes & -row_bytes;
    return power < alignment ? power : alignment;
}

// The warp's rows of a register tile in 16 bits: registers -> its own rows of a shared tile -> whole chunks of rows in
// global memory. The tile's first row lies at `target`, its columns are first_column, ... of kColumns; `rows` of it exist.
// `warp_row` is the warp's first row of the tile.
template <Element E, class Tile, int kColumns, int kAlignment, int kM, int kN>
__device__ __forceinline__ void store_rows(const float (&x)[kM][kN][4], u16* array, i64 row_stride, int rows,
                                           int first_column, u32 staging, int warp_row, int lane) {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int row = warp_row + 16 * m + 8 * h + lane / 4;
                ptx::store_shared(staging + Tile::offset(row, n) + 4 * (lane % 4),
                                  pack<E>(x[m][n][2 * h], x[m][n][2 * h + 1]));
            }
    __syncwarp();  // the rows are staged: lanes read what others wrote

    constexpr int kUnit = store_unit(2 * kColumns, kAlignment);
    for (int i = lane; i < 16 * kM * Tile::kChunks; i += 32) {
        const int row = warp_row + i / Tile::kChunks, chunk = i % Tile::kChunks;
        if (row >= rows) break;
        u32 value[4];
        ptx::load_shared_v4(value, staging + Tile::offset(row, chunk));
        u16* target = array + row * row_stride + first_column + 8 * chunk;
        const int columns = kColumns - first_column - 8 * chunk;  // that remain in the row
        if constexpr (kUnit == 16) {
            if (columns > 0) ptx::store_global_v4(target, value);
        } else {
#pragma unroll
            for (int at = 0; at < 8; at += kUnit / 2) {
                if (at >= columns) break;
                if constexpr (kUnit == 8) ptx::store_global_v2(target + at, value[at / 2], value[at / 2 + 1]);
                else if constexpr (kUnit == 4) *reinterpret_cast<u32*>(target + at) = value[at / 2];
                else target[at] = static_cast<u16>(value[at / 2] >> 16 * (at % 2));
            }
        }
    }
}

// The warp's rows of a partial O in float32, straight from registers: four lanes write 32 consecutive bytes.
template <ForwardConfig C, int kM, int kN>
__device__ __forceinline__ void store_partial(const float (&O)[kM][kN][4], float* o, i64 row_stride, const Work& work,
                                              int warp_row, int lane) {
    const int rows = work.row_end(C.block_m) - work.row_begin;
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = warp_row + 16 * m + 8 * h + lane / 4;
            if (row >= rows) continue;
#pragma unroll
            for (int n = 0; n < kN; ++n) {
                const int column = work.chunk * C.block_dv + 8 * n + 2 * (lane % 4);
                float* target = o + row * row_stride + column;
                const float low = O[m][n][2 * h], high = O[m][n][2 * h + 1];
                if constexpr (C.store_bytes >= 8 && C.head_dim_v % 2 == 0) {
                    if (column < C.head_dim_v) {
                        ptx::store_global_v2(target, __float_as_uint(low), __float_as_uint(high));
                    }
                } else {
                    if (column < C.head_dim_v) target[0] = low;
                    if (column + 1 < C.head_dim_v) target[1] = high;
                }
            }
        }
}

// lse of the warp's rows; one lane of the four that hold a row writes.
template <ForwardConfig C, int kM>
__device__ __forceinline__ void store_lse(const float (&row_lse)[kM][2], float* lse, i64 row_stride, const Work& work,
                                          int warp_row, int lane) {
    const int rows = work.row_end(C.block_m) - work.row_begin;
    if (lane % 4 != 0) return;
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = warp_row + 16 * m + 8 * h + lane / 4;
            if (row < rows) lse[row * row_stride] = row_lse[m][h];
        }
}

}  // namespace cuflash
