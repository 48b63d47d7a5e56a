// Matrix products of a warp: operands in shared tiles or registers, float32 sums in registers.
//
// Register tile [16 kM][8 kN] of sums: float x[kM][kN][4]. Lane 4r + c holds rows 16m + r (elements 0, 1) and
// 16m + r + 8 (elements 2, 3) at columns 8n + 2c, 8n + 2c + 1.
#pragma once

#include "ptx/matrix.cuh"
#include "tile/element.cuh"
#include "tile/shared_tile.cuh"

namespace cuflash {

// Operands in shared tiles are given by this lane's address in block (0, 0), by columns (a left operand, B) or by rows
// (B^T).

// Left operand [16 kM][16 kK] in registers.
template <int kM, int kK>
struct LeftFragments {
    u32 value[kK][kM][4];

    // Columns 16 source .. 16 source + 15 of a shared tile, as fragment k.
    template <class Tile>
    __device__ __forceinline__ void load_column(u32 tile, int source, int k) {
#pragma unroll
        for (int m = 0; m < kM; ++m) ptx::ldmatrix_x4(value[k][m], Tile::block(tile, m, source));
    }

    template <class Tile>
    __device__ __forceinline__ void load(u32 tile) {
#pragma unroll
        for (int k = 0; k < kK; ++k) load_column<Tile>(tile, k, k);
    }
};

// One step in the shared dimension: sums [16 kM][8 kN] += a [16 kM][16] B[first 8 kN rows, 16k : 16k + 16]^T.
template <Element E, class TileB, int kM, int kN>
__device__ __forceinline__ void multiply_transposed(float (&sums)[kM][kN][4], const u32 (&a)[kM][4], u32 b, int k) {
    static_assert(8 * kN <= TileB::kRows);
#pragma unroll
    for (int n = 0; n < kN / 2; ++n) {
        u32 block[4];  // B[16n : 16n + 16][16k : 16k + 16]
        ptx::ldmatrix_x4(block, TileB::block(b, n, k));
#pragma unroll
        for (int m = 0; m < kM; ++m) {
            mma<E>(sums[m][2 * n], a[m], block[0], block[1]);
            mma<E>(sums[m][2 * n + 1], a[m], block[2], block[3]);
        }
    }
}

// One step in the shared dimension: sums [16 kM][8 kN] += a [16 kM][16] B[16k : 16k + 16, first 8 kN columns].
template <Element E, class TileB, int kM, int kN>
__device__ __forceinline__ void multiply(float (&sums)[kM][kN][4], const u32 (&a)[kM][4], u32 b, int k) {
    static_assert(8 * kN <= TileB::kCols);
#pragma unroll
    for (int n = 0; n < kN / 2; ++n) {
        u32 block[4];  // B[16k : 16k + 16][16n : 16n + 16], each 8x8 transposed
        ptx::ldmatrix_x4_trans(block, TileB::block(b, k, n));
#pragma unroll
        for (int m = 0; m < kM; ++m) {
            mma<E>(sums[m][2 * n], a[m], block[0], block[1]);
            mma<E>(sums[m][2 * n + 1], a[m], block[2], block[3]);
        }
    }
}

// As `multiply`, for some 16-column blocks of B: blocks[n] is this lane's address, by columns, of block (0, j_n), and
// `row_offset` the bytes from there to the 16 rows of this step.
template <Element E, int kM, int kN, int kBlocks>
__device__ __forceinline__ void multiply_blocks(float (&sums)[kM][kN][4], const u32 (&a)[kM][4],
                                                const u32 (&blocks)[kBlocks], u32 row_offset) {
    static_assert(kN == 2 * kBlocks);
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
        u32 block[4];
        ptx::ldmatrix_x4_trans(block, blocks[n] + row_offset);
#pragma unroll
        for (int m = 0; m < kM; ++m) {
            mma<E>(sums[m][2 * n], a[m], block[0], block[1]);
            mma<E>(sums[m][2 * n + 1], a[m], block[2], block[3]);
        }
    }
}

// Columns 16k .. 16k + 15 of sums, rounded to E, as a left operand: the layouts agree lane by lane.
template <Element E, int kM, int kN>
__device__ __forceinline__ void as_left(u32 (&a)[kM][4], const float (&sums)[kM][kN][4], int k) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
        a[m][0] = pack<E>(sums[m][2 * k][0], sums[m][2 * k][1]);
        a[m][1] = pack<E>(sums[m][2 * k][2], sums[m][2 * k][3]);
        a[m][2] = pack<E>(sums[m][2 * k + 1][0], sums[m][2 * k + 1][1]);
        a[m][3] = pack<E>(sums[m][2 * k + 1][2], sums[m][2 * k + 1][3]);
    }
}

template <int kM, int kN>
__device__ __forceinline__ void clear(float (&sums)[kM][kN][4]) {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) sums[m][n][e] = 0.0f;
}

template <int kM, int kN>
__device__ __forceinline__ void scale_by(float (&sums)[kM][kN][4], float factor) {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) sums[m][n][e] *= factor;
}

// Reductions over the four lanes that hold a row of a register tile.
__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, ptx::shfl_bfly<1>(x));
    return fmaxf(x, ptx::shfl_bfly<2>(x));
}

__device__ __forceinline__ float quad_sum(float x) {
    x += ptx::shfl_bfly<1>(x);
    return x + ptx::shfl_bfly<2>(x);
}

// Over all lanes of a warp.
__device__ __forceinline__ float warp_sum(float x) {
    x += ptx::shfl_bfly<16>(x);
    x += ptx::shfl_bfly<8>(x);
    x += ptx::shfl_bfly<4>(x);
    return quad_sum(x);
}

}  // namespace cuflash
