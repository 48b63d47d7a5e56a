// What the warps of a block of the backward kernel multiply, and how they share it.
#pragma once

#include "attention/config.cuh"
#include "tile/product.cuh"

namespace cuflash {

// How the tiles of a block lie in shared memory, and how its warps share them: along the keys, and where there are more,
// along the queries of S and dP and along the columns of dK and dV.
template <BackwardConfig C>
struct BackwardTiles {
    using T = Storage<C.dtype>;
    static constexpr int kD = ceil_div(C.head_dim, 16), kDv = ceil_div(C.head_dim_v, 16);
    static constexpr int kShares = C.num_warps / C.key_warps;
    static constexpr bool kExchange = kShares > 1;              // dK and dV need what other warps know of P and dS
    static constexpr int kM = C.block_n / (16 * C.key_warps);   // 16-key blocks of a warp
    static constexpr int kN = C.block_m / (16 * kShares);       // 16-query blocks of its scores
    static constexpr int kBlocks = ceil_div(lesser(C.block_d, 16 * kD) / 16, kShares);     // 16-column blocks of its dK
    static constexpr int kBlocksV = ceil_div(lesser(C.block_dv, 16 * kDv) / 16, kShares);  // and of its dV
    static_assert(!kExchange || sizeof(T) == 2);  // wider elements are exchanged in another order than they are read
    static constexpr int kUnit = sizeof(T) == 4 ? 32 : 16;  // columns of a row, so that lanes read by words without conflict
    using Q = SharedTile<C.block_m, round_up(C.head_dim, kUnit), T>;
    using K = SharedTile<C.block_n, round_up(C.head_dim, kUnit), T>;
    using V = SharedTile<C.block_n, round_up(C.head_dim_v, kUnit), T>;
    using O = SharedTile<C.block_m, round_up(C.head_dim_v, kUnit), T>;
    using S = SharedTile<C.block_n, C.block_m, T>;  // keys by queries
    using Dk = SharedTile<C.block_n, 16 * kBlocks, T>;
    using Dv = SharedTile<C.block_n, 16 * kBlocksV, T>;
};

// Where the calling thread stands in its block. Made anew by each part of the kernel that needs it, not held throughout.
template <BackwardConfig C>
struct KeyPlace {
    int thread = ptx::thread_index();
    int lane = thread % 32;
    int share = thread / 32 / C.key_warps;
    int key = thread / 32 % C.key_warps * (16 * BackwardTiles<C>::kM);  // its warp's first, in the key tile
    int query = share * (16 * BackwardTiles<C>::kN);                    // the first of its scores, in the query tile
};

// S^T = K Q^T or dP^T = V dO^T: the warp's keys by its queries, over a depth of 16 kDepth.
template <BackwardConfig C, class Left, class Right, int kDepth, int kM, int kN>
__device__ __forceinline__ void multiply_rows(Sum<C.dtype> (&S)[kM][kN][4], const Storage<C.dtype>* left,
                                              const Storage<C.dtype>* right) {
    const KeyPlace<C> here;
    const u32 a = ptx::shared_address(left) + here.key * Left::kPitch + Left::lane_of_left(here.lane);
    const u32 b = ptx::shared_address(right) + here.query * Right::kPitch + Right::lane_by_rows(here.lane);
    clear(S);
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {  // S^T += K[:, d] Q[:, d]^T
        LeftFragments<kM, 1, C.dtype> fragments;
        fragments.template load_column<Left>(a, d, 0);
        multiply_transposed<C.dtype, Right>(S, fragments.value[0], b, d);
    }
}

// This lane's address, by columns, of the blocks first_block, ... of 16 columns of a tile; none past `blocks`.
template <class Tile, int kBlocks>
__device__ __forceinline__ void column_addresses(u32 (&addresses)[kBlocks], const typename Tile::Element* tile,
                                                 int first_block, int blocks, int lane) {
    constexpr int kBytes = sizeof(*tile);
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
        const int block = min(first_block + n, blocks - 1);
        if constexpr (kBytes == 2) {
            addresses[n] = ptx::shared_address(tile) + Tile::offset(lane % 16, 2 * block + lane / 16);
        } else {
            const int byte = (16 * block + lane / 4) * kBytes;
            addresses[n] = ptx::shared_address(tile) + Tile::offset(lane % 4 * 2, byte / 16) + byte % 16;
        }
    }
}

// dV += P^T dO or dK += dS^T Q, P or dS in registers: the columns of a chunk.
template <BackwardConfig C, class Right, int kM, int kN, int kColumns>
__device__ __forceinline__ void multiply_sums(Sum<C.dtype> (&sums)[kM][kColumns][4], const Sum<C.dtype> (&S)[kM][kN][4],
                                              const Storage<C.dtype>* right, int chunk) {
    const int lane = ptx::thread_index() % 32;
    const u32 b = ptx::shared_address(right) + Right::lane_by_columns(lane) + chunk * (8 * kColumns * bytes_of(C.dtype));
    constexpr bool kReachesPast = kColumns % 8 == 0 && Right::kCols % (8 * kColumns) != 0;  // the last of several chunks
    u32 columns[kColumns / 2];
    if constexpr (kReachesPast) column_addresses<Right>(columns, right, chunk * (kColumns / 2), Right::kCols / 16, lane);
#pragma unroll
    for (int n = 0; n < kN / 2; ++n) {  // dV += P^T[:, n] dO[n, :]
        Word<C.dtype> left[kM][left_words(C.dtype, 16)];
        as_left<C.dtype>(left, S, n);
        if constexpr (kReachesPast) multiply_blocks<C.dtype, Right>(sums, left, columns, 16 * n * Right::kPitch);
        else multiply<C.dtype, Right>(sums, left, b, n);
    }
}

// As multiply_sums, with P or dS in shared memory: the warp's share of the columns of a chunk.
template <BackwardConfig C, class Right, int kM, int kColumns>
__device__ __forceinline__ void multiply_shared(Sum<C.dtype> (&sums)[kM][kColumns][4], const Storage<C.dtype>* S,
                                                const Storage<C.dtype>* right, int chunk_block) {
    using Scores = typename BackwardTiles<C>::S;
    const KeyPlace<C> here;
    const u32 a = ptx::shared_address(S) + here.key * Scores::kPitch + Scores::lane_of_left(here.lane);
    u32 columns[kColumns / 2];
    column_addresses<Right>(columns, right, chunk_block + here.share * (kColumns / 2), Right::kCols / 16, here.lane);
#pragma unroll
    for (int n = 0; n < C.block_m / 16; ++n) {  // dV += P^T[:, n] dO[n, :]
        LeftFragments<kM, 1, C.dtype> fragments;
        fragments.template load_column<Scores>(a, n, 0);
        multiply_blocks<C.dtype, Right>(sums, fragments.value[0], columns, 16 * n * Right::kPitch);
    }
}

// The warp's part of P^T or dS^T, as elements.
template <BackwardConfig C, int kM, int kN>
__device__ __forceinline__ void store_scores(const Sum<C.dtype> (&S)[kM][kN][4], Storage<C.dtype>* to) {
    using Scores = typename BackwardTiles<C>::S;
    constexpr int kBytes = bytes_of(C.dtype), kChunks = kBytes / 2;  // of 8 columns
    const KeyPlace<C> here;
    const int byte = 2 * (here.lane % 4) * kBytes;  // of this lane's pair of columns in 8
    const u32 first = ptx::shared_address(to) +
                      Scores::offset(here.key + here.lane / 4, here.query / 8 * kChunks + byte / 16) + byte % 16;
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const u32 address = Scores::step(first, 16 * m + 8 * h, n * kChunks);
                if constexpr (kBytes == 2) ptx::store_shared(address, pack<C.dtype>(S[m][n][2 * h], S[m][n][2 * h + 1]));
                else ptx::store_shared_v2(address, as_word(S[m][n][2 * h]), as_word(S[m][n][2 * h + 1]));
            }
}

}  // namespace cuflash
