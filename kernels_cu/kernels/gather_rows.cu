// Rows of an array in another order: target[batch, i, head] = source[batch, order[batch, head, i], head], zeros where the
// order says -1. Whatever the elements are, rows are moved in accesses of one width.
#pragma once

#include "attention/config.cuh"
#include "attention/params.cuh"
#include "ptx/types.cuh"

namespace cuflash {

struct alignas(16) SixteenBytes {
    u64 low, high;
};

template <int kBytes>
using Access = Conditional<
    kBytes == 16, SixteenBytes,
    Conditional<kBytes == 8, u64, Conditional<kBytes == 4, u32, Conditional<kBytes == 2, u16, unsigned char>>>>;

// `lanes` threads share a row. Grid, fastest first: tile of rows, head, batch entry.
template <GatherRowsConfig C>
__device__ __forceinline__ void gather_rows(const GatherRowsParams& params) {
    using T = Access<C.access_bytes>;
    constexpr int kGroups = 32 * C.num_warps / C.lanes;
    constexpr u32 kTile = kGroups * C.rows;
    const u32 count = params.tokens, tiles = (count + kTile - 1) / kTile;
    const u32 pair = blockIdx.x / tiles, first = blockIdx.x % tiles * kTile + threadIdx.x / C.lanes;
    const i64 batch = pair / params.num_heads, head = pair % params.num_heads;
    const int* order = params.order + static_cast<i64>(pair) * count;
    const T* source = static_cast<const T*>(params.source) + batch * params.source_strides[0] + head * params.source_strides[2];
    T* target = static_cast<T*>(params.target) + batch * params.target_strides[0] + head * params.target_strides[2];

    int from[C.rows];
#pragma unroll
    for (int i = 0; i < C.rows; ++i) from[i] = first + i * kGroups < count ? order[first + i * kGroups] : -1;
    for (int column = threadIdx.x % C.lanes; column < params.columns; column += C.lanes) {
        T value[C.rows];
#pragma unroll
        for (int i = 0; i < C.rows; ++i) {
            value[i] = from[i] < 0 ? T{} : source[from[i] * params.source_strides[1] + column];
        }
#pragma unroll
        for (int i = 0; i < C.rows; ++i) {
            const u32 row = first + i * kGroups;
            if (row < count) target[row * params.target_strides[1] + column] = value[i];
        }
    }
}

}  // namespace cuflash
