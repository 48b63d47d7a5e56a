// Rows of arrays to other places: into an order, into the slots of a cache, from block to block, out of blocks. Whatever
// the elements are, rows are moved in accesses of one width.
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

// Where the rows lie that are moved, on one side: in their own order, or where a list says. It names rows, of which a
// block has block_size, or whole blocks.
template <MoveRowsConfig C>
struct ListedRows {
    using Index = Conditional<C.index_bytes == 8, i64, int>;
    using Unsigned = Conditional<C.index_bytes == 8, u64, u32>;
    const Index* list;  // null: their own order
    i64 block_stride, row_stride;

    // Sets where a row lies, in accesses; false if the list says nowhere.
    __device__ __forceinline__ bool find(u32 row, i64& at) const {
        if (list == nullptr) {
            at = row * row_stride;
            return true;
        }
        const Index unit = list[C.whole_blocks ? row / C.block_size : row];
        const auto place = static_cast<Unsigned>(unit);
        const i64 block = C.whole_blocks ? place : place / C.block_size;
        at = block * block_stride + (C.whole_blocks ? row : place) % C.block_size * row_stride;
        return unit >= 0;
    }
};

// `lanes` threads share a row. Grid, fastest first: tile of rows, head, batch entry, array. Rows from nowhere are zeros,
// rows to nowhere are left out.
template <MoveRowsConfig C>
__device__ __forceinline__ void move_rows(const MoveRowsParams& params) {
    using T = Access<C.access_bytes>;
    using Rows = ListedRows<C>;
    using Index = typename Rows::Index;
    constexpr int kGroups = 32 * C.num_warps / C.lanes;
    constexpr u32 kTile = kGroups * C.rows;
    const u32 count = params.num_rows, tiles = (count + kTile - 1) / kTile;
    const u32 first = blockIdx.x % tiles * kTile + threadIdx.x / C.lanes, rest = blockIdx.x / tiles;
    const u32 head = rest % params.num_heads, batch = rest / params.num_heads % params.batch;
    const u32 array = rest / params.num_heads / params.batch;
    const i64 list_offset = (batch * i64{params.num_heads} + head) * params.list_pitch;
    const i64* from = params.source_strides + 4 * array;
    const i64* to = params.target_strides + 4 * array;
    const T* source = static_cast<const T*>(params.source[array]) + batch * from[0] + head * from[3];
    T* target = static_cast<T*>(params.target[array]) + batch * to[0] + head * to[3];
    const auto own = [&](const void* list) { return list ? static_cast<const Index*>(list) + list_offset : nullptr; };
    const Rows sources{own(params.sources), from[1], from[2]}, targets{own(params.targets), to[1], to[2]};

    const T* read[C.rows];
    T* written[C.rows];
#pragma unroll
    for (int i = 0; i < C.rows; ++i) {
        const u32 row = first + i * kGroups;
        i64 at;
        written[i] = row < count && targets.find(row, at) ? target + at : nullptr;
        read[i] = written[i] && sources.find(row, at) ? source + at : nullptr;
    }
    for (int column = threadIdx.x % C.lanes; column < params.columns[array]; column += C.lanes) {
        T value[C.rows];
#pragma unroll
        for (int i = 0; i < C.rows; ++i) value[i] = read[i] ? read[i][column] : T{};
#pragma unroll
        for (int i = 0; i < C.rows; ++i) {
            if (written[i]) written[i][column] = value[i];
        }
    }
}

}  // namespace cuflash
