// Matrix products of a warp: operands in shared tiles or registers, sums in registers.
//
// Register tile [16 kM][8 kN] of sums: T x[kM][kN][4], T = Sum<E>. Lane 4r + c holds rows 16m + r (elements 0, 1) and
// 16m + r + 8 (elements 2, 3) at columns 8n + 2c, 8n + 2c + 1.
#pragma once

#include "ptx/matrix.cuh"
#include "tile/element.cuh"
#include "tile/functions.cuh"
#include "tile/operand.cuh"
#include "tile/shared_tile.cuh"

namespace cuflash {

// Operands in shared tiles are given by this lane's address in block (0, 0): of a left operand, or of a right one by rows
// (B^T) or by columns (B). Both operands of a product must number the shared dimension alike: two tiles read along their
// rows do, and so do sums taken as a left operand and a tile read by columns. Of elements wider than 16 bits the latter
// take keys 2c, 2c + 1 of each 8 where an instruction has c, c + 4: the keys whose sums lane c holds.

// A 16x16 block of a left operand.
template <Element E, class Tile>
__device__ __forceinline__ void load_left(Word<E> (&words)[left_words(E, 16)], u32 block) {
    if constexpr (bytes_of(E) == 2) {
        ptx::ldmatrix_x4(words, block);
    } else {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            Word<E> elements[4];  // rows r, r + 8, r, r + 8 of columns c, c, c + 4, c + 4, however numbered
            if constexpr (bytes_of(E) == 4) {
                ptx::ldmatrix_x4(elements, Tile::step(block, 0, 2 * i));
            } else {
                ptx::load_shared_v2(elements[0], elements[2], Tile::step(block, 0, i));
                ptx::load_shared_v2(elements[1], elements[3], Tile::step(block, 8, i));
            }
            set_words<E>(words + i * instruction_words(E), elements);
        }
    }
}

// The same of a tile that holds the operand transposed, [shared dimension][rows]; `block` is by rows of 16-bit elements, by
// columns of wider ones. It numbers the shared dimension as a right operand by columns does.
template <Element E, class Tile>
__device__ __forceinline__ void load_left_transposed(Word<E> (&words)[left_words(E, 16)], u32 block) {
    if constexpr (bytes_of(E) == 2) {
        ptx::ldmatrix_x4_trans(words, block);
    } else {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            Word<E> elements[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                ptx::load_shared(elements[j], Tile::step(block, 8 * i + j / 2, j % 2 * bytes_of(E) / 2));
            }
            set_words<E>(words + i * instruction_words(E), elements);
        }
    }
}

// Rows 0 .. 15 of B in columns 0 .. 15 as two right operands, of rows 0 .. 7 and 8 .. 15.
template <Element E, class Tile>
__device__ __forceinline__ void load_right_rows(Word<E> (&words)[2][left_words(E, 16) / 2], u32 block) {
#pragma unroll
    for (int i = 0; i < instructions(E, 16); ++i) {
        Word<E> elements[4];
        if constexpr (bytes_of(E) <= 4) {
            ptx::ldmatrix_x4(elements, Tile::step(block, 0, 2 * i));
        } else {
            ptx::load_shared_v2(elements[0], elements[1], Tile::step(block, 0, i));
            ptx::load_shared_v2(elements[2], elements[3], Tile::step(block, 8, i));
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            set_words<E, 2>(words[h] + i * instruction_words(E) / 2, {elements[2 * h], elements[2 * h + 1]});
        }
    }
}

// As many rows of B as the words are for, in columns 0 .. 15, as two right operands: of columns 0 .. 7 and 8 .. 15.
template <Element E, class Tile, int kWords>
__device__ __forceinline__ void load_right_columns(Word<E> (&words)[2][kWords], u32 block) {
    if constexpr (bytes_of(E) == 2) {
        u32 elements[4];  // four 8x8 matrices, each transposed
        ptx::ldmatrix_x4_trans(elements, block);
#pragma unroll
        for (int i = 0; i < 4; ++i) words[i / 2][i % 2] = elements[i];
    } else {
        constexpr int kStep = instruction_words(E) / 2;
#pragma unroll
        for (int i = 0; i < kWords / kStep; ++i)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                Word<E> elements[2];  // of rows 2c and 2c + 1
                ptx::load_shared(elements[0], Tile::step(block, 8 * i, h * bytes_of(E) / 2));
                ptx::load_shared(elements[1], Tile::step(block, 8 * i + 1, h * bytes_of(E) / 2));
                set_words<E>(words[h] + i * kStep, elements);
            }
    }
}

// Left operand [16 kM][16 kK] in registers.
template <int kM, int kK, Element E>
struct LeftFragments {
    Word<E> value[kK][kM][left_words(E, 16)];

    // Columns 16 source .. 16 source + 15 of a shared tile, as fragment k.
    template <class Tile>
    __device__ __forceinline__ void load_column(u32 tile, int source, int k) {
#pragma unroll
        for (int m = 0; m < kM; ++m) load_left<E, Tile>(value[k][m], Tile::block(tile, m, source));
    }

    template <class Tile>
    __device__ __forceinline__ void load(u32 tile) {
#pragma unroll
        for (int k = 0; k < kK; ++k) load_column<Tile>(tile, k, k);
    }
};

// One step in the shared dimension: sums [16 kM][8 kN] += a [16 kM][16] B[first 8 kN rows, 16k : 16k + 16]^T.
template <Element E, class TileB, int kM, int kN, int kWords>
__device__ __forceinline__ void multiply_transposed(Sum<E> (&sums)[kM][kN][4], const Word<E> (&a)[kM][kWords], u32 b,
                                                    int k) {
    static_assert(8 * kN <= TileB::kRows);
#pragma unroll
    for (int n = 0; n < kN / 2; ++n) {
        Word<E> right[2][kWords / 2];
        load_right_rows<E, TileB>(right, TileB::block(b, n, k));
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int m = 0; m < kM; ++m) mma<E>(sums[m][2 * n + h], a[m], right[h]);
    }
}

// As `multiply`, for some 16-column blocks of B: blocks[n] is this lane's address, by columns, of block (0, j_n), and
// `row_offset` the bytes from there to the rows of this step.
template <Element E, class TileB, int kM, int kN, int kWords, int kBlocks>
__device__ __forceinline__ void multiply_blocks(Sum<E> (&sums)[kM][kN][4], const Word<E> (&a)[kM][kWords],
                                                const u32 (&blocks)[kBlocks], u32 row_offset) {
    static_assert(kN == 2 * kBlocks);
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
        Word<E> right[2][kWords / 2];
        load_right_columns<E, TileB>(right, blocks[n] + row_offset);
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int m = 0; m < kM; ++m) mma<E>(sums[m][2 * n + h], a[m], right[h]);
    }
}

// The k-th step in the shared dimension, of the depth for which a lane has kWords of the left operand:
// sums [16 kM][8 kN] += a [16 kM][depth] B[depth k : depth (k + 1), first 8 kN columns].
template <Element E, class TileB, int kM, int kN, int kWords>
__device__ __forceinline__ void multiply(Sum<E> (&sums)[kM][kN][4], const Word<E> (&a)[kM][kWords], u32 b, int k) {
    static_assert(8 * kN <= TileB::kCols);
    constexpr int kDepth = 16 * kWords / left_words(E, 16);
#pragma unroll
    for (int n = 0; n < kN / 2; ++n) {
        Word<E> right[2][kWords / 2];
        load_right_columns<E, TileB>(right, TileB::step(b, kDepth * k, 16 / TileB::kPerChunk * n));
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int m = 0; m < kM; ++m) mma<E>(sums[m][2 * n + h], a[m], right[h]);
    }
}

__device__ __forceinline__ u32 as_word(float x) { return __float_as_uint(x); }
__device__ __forceinline__ double as_word(double x) { return x; }

// The k-th step of columns of sums, rounded to E, as a left operand: the layouts agree lane by lane.
template <Element E, int kM, int kN, int kWords>
__device__ __forceinline__ void as_left(Word<E> (&a)[kM][kWords], const Sum<E> (&sums)[kM][kN][4], int k) {
    constexpr int kSteps = kWords / instruction_words(E);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
        if constexpr (bytes_of(E) == 2) {
            a[m][0] = pack<E>(sums[m][2 * k][0], sums[m][2 * k][1]);
            a[m][1] = pack<E>(sums[m][2 * k][2], sums[m][2 * k][3]);
            a[m][2] = pack<E>(sums[m][2 * k + 1][0], sums[m][2 * k + 1][1]);
            a[m][3] = pack<E>(sums[m][2 * k + 1][2], sums[m][2 * k + 1][3]);
        } else {
#pragma unroll
            for (int i = 0; i < kSteps; ++i) {
                const Sum<E>(&x)[4] = sums[m][k * kSteps + i];
                set_words<E, 4>(a[m] + i * instruction_words(E),
                                {as_word(x[0]), as_word(x[2]), as_word(x[1]), as_word(x[3])});
            }
        }
    }
}

template <class T, int kM, int kN>
__device__ __forceinline__ void clear(T (&sums)[kM][kN][4]) {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) sums[m][n][e] = 0;
}

template <class T, int kM, int kN>
__device__ __forceinline__ void scale_by(T (&sums)[kM][kN][4], T factor) {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) sums[m][n][e] *= factor;
}

// Reductions over the four lanes that hold a row of a register tile.
template <class T>
__device__ __forceinline__ T quad_max(T x) {
    x = larger(x, ptx::shfl_bfly<1>(x));
    return larger(x, ptx::shfl_bfly<2>(x));
}

template <class T>
__device__ __forceinline__ T quad_sum(T x) {
    x += ptx::shfl_bfly<1>(x);
    return x + ptx::shfl_bfly<2>(x);
}

// Over all lanes of a warp.
template <class T>
__device__ __forceinline__ T warp_max(T x) {
    x = larger(x, ptx::shfl_bfly<16>(x));
    x = larger(x, ptx::shfl_bfly<8>(x));
    x = larger(x, ptx::shfl_bfly<4>(x));
    return quad_max(x);
}

template <class T>
__device__ __forceinline__ T warp_sum(T x) {
    x += ptx::shfl_bfly<16>(x);
    x += ptx::shfl_bfly<8>(x);
    x += ptx::shfl_bfly<4>(x);
    return quad_sum(x);
}

}  // namespace cuflash
