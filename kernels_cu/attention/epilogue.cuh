// Results from registers to global memory.
#pragma once

#include "attention/work.cuh"
#include "ptx/copy.cuh"
#include "tile/load.cuh"
#include "tile/product.cuh"
#include "tile/shared_tile.cuh"

namespace cuflash {

// Largest power of two that divides a row, at most the row alignment; both in bytes.
constexpr int store_unit(int row_bytes, int alignment) {
    const int power = row_bytes & -row_bytes;
    return power < alignment ? power : alignment;
}

// The warp's rows of a register tile straight to global memory, elements wider than 16 bits: four lanes write 32 or 64
// consecutive bytes. The tile's rows lie where `to` says, its columns are first_column, ... of kColumns; `rows` of it
// exist. `warp_row` is the warp's first row of the tile.
template <Element E, int kColumns, int kAlignment, class Rows, int kM, int kN>
__device__ __forceinline__ void store_sums(const Sum<E> (&x)[kM][kN][4], const Rows& to, int rows, int first_column,
                                           int warp_row, int lane) {
    constexpr bool kPairs = store_unit(bytes_of(E) * kColumns, kAlignment) >= 2 * bytes_of(E);
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = warp_row + 16 * m + 8 * h + lane / 4;
            if (row >= rows) continue;
#pragma unroll
            for (int n = 0; n < kN; ++n) {
                const int column = first_column + 8 * n + 2 * (lane % 4);
                Storage<E>* target = to.at(row) + column;
                if constexpr (kPairs) {
                    if (column < kColumns) ptx::store_global_v2(target, as_word(x[m][n][2 * h]), as_word(x[m][n][2 * h + 1]));
                } else {
                    if (column < kColumns) target[0] = x[m][n][2 * h];
                    if (column + 1 < kColumns) target[1] = x[m][n][2 * h + 1];
                }
            }
        }
}

// The same of 16-bit elements: registers -> the warp's own rows of a shared tile -> whole chunks of rows.
template <Element E, class Tile, int kColumns, int kAlignment, class Rows, int kM, int kN>
__device__ __forceinline__ void store_staged(const float (&x)[kM][kN][4], const Rows& to, int rows, int first_column,
                                             u32 staging, int warp_row, int lane) {
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
        u16* target = to.at(row) + first_column + 8 * chunk;
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

// The same of any elements; `staging` and Tile are for those of 16 bits.
template <Element E, class Tile, int kColumns, int kAlignment, class Rows, int kM, int kN>
__device__ __forceinline__ void store_rows(const Sum<E> (&x)[kM][kN][4], const Rows& to, int rows, int first_column,
                                           u32 staging, int warp_row, int lane) {
    if constexpr (bytes_of(E) == 2) {
        store_staged<E, Tile, kColumns, kAlignment>(x, to, rows, first_column, staging, warp_row, lane);
    } else {
        store_sums<E, kColumns, kAlignment>(x, to, rows, first_column, warp_row, lane);
    }
}

// lse of the warp's rows; one lane of the four that hold a row writes.
template <class T, class Rows, int kM>
__device__ __forceinline__ void store_lse(const T (&row_lse)[kM][2], const Rows& to, int rows, int warp_row, int lane) {
    if (lane % 4 != 0) return;
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = warp_row + 16 * m + 8 * h + lane / 4;
            if (row < rows) *to.at(row) = row_lse[m][h];
        }
}

}  // namespace cuflash
