// Workspaces of the backward pass: what it knows of each query, and the sums of dq.
#pragma once

#include "attention/config.cuh"
#include "attention/params.cuh"
#include "ptx/copy.cuh"
#include "tile/element.cuh"
#include "tile/shared_tile.cuh"

namespace cuflash {

// How the warps of a block share dQ [block_m][block_d] = dS K: two 16-row blocks a warp, so that a fragment of K serves
// twice, and where that leaves warps over, columns.
template <BackwardConfig C>
struct QueryGradient {
    using T = Sum<C.dtype>;
    static constexpr int kRowBlocks = C.block_m / 16, kColumnBlocks = ceil_div(lesser(C.block_d, C.head_dim), 16);
    static constexpr bool kPairs = kRowBlocks % 2 == 0 && 2 * C.num_warps <= kRowBlocks * kColumnBlocks;
    static constexpr int kM = greater(kPairs ? 2 : 1, kRowBlocks / C.num_warps);  // 16-row blocks of a warp
    static constexpr int kWarpRows = kRowBlocks / kM;                             // warps side by side in rows
    static constexpr int kWarpColumns = C.num_warps / kWarpRows;
    static constexpr int kN = ceil_div(kColumnBlocks, kWarpColumns);       // 16-column blocks of a warp
    static constexpr bool kIdleWarps = kN * (kWarpColumns - 1) >= kColumnBlocks;  // more than there are columns for
    static_assert(kWarpRows * kWarpColumns == C.num_warps);
    static_assert(kColumnBlocks % kN == 0 || C.block_d >= C.head_dim);  // else a warp would reach into the next chunk

    static __device__ __forceinline__ int first_row_block(int warp) { return warp % kWarpRows * kM; }
    static __device__ __forceinline__ int first_column_block(int warp) { return warp / kWarpRows * kN; }

    // Sums of a tile lie in the order in which threads hold them, so that a warp adds to consecutive memory: T
    // x[kM][2 * kN][4] of each thread in units of kUnit.
    static constexpr int kUnit = __CUDA_ARCH__ >= 900 && sizeof(T) == 4 ? 4 : 1;
    static constexpr int kChunks = ceil_div(C.head_dim, C.block_d);
    static constexpr int kTileSums = C.num_warps * kM * 2 * kN * 128;
    static __device__ __forceinline__ int offset(int warp, int lane, int m, int n, int e) {
        return (((warp * kM + m) * 2 * kN + n) * 4 + e / kUnit * kUnit) * 32 + lane * kUnit + e % kUnit;
    }

    // The fragment (m, n) of a thread, rows that do not exist included.
    static __device__ __forceinline__ void load(T (&x)[4], const T* sums, int warp, int lane, int m, int n) {
        if constexpr (kUnit == 4) {
            ptx::load_global_v4(x, sums + offset(warp, lane, m, n, 0));
        } else {
#pragma unroll
            for (int e = 0; e < 4; ++e) x[e] = load_element<sum_element(C.dtype)>(sums, offset(warp, lane, m, n, e));
        }
    }

    // sums += x, the fragment (m, n) of a thread.
    static __device__ __forceinline__ void add(T* sums, int warp, int lane, int m, int n, const T (&x)[4]) {
        if constexpr (kUnit == 4) {
            ptx::red_add_v4(sums + offset(warp, lane, m, n, 0), x);
        } else {
#pragma unroll
            for (int e = 0; e < 4; ++e) ptx::red_add(sums + offset(warp, lane, m, n, e), x[e]);
        }
    }
};

// Index of a query tile in workspaces that hold an entry per tile.
__device__ __forceinline__ i64 query_tile_index(const BackwardParams& params, int batch_entry, int head, int slot) {
    return (static_cast<i64>(batch_entry) * params.num_heads + head) * params.q_tiles + slot;
}

}  // namespace cuflash
