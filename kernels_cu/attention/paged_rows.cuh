// Keys and values in the blocks of a cache: row r of a sequence is token r % block_size of the block that the sequence's
// table names at r / block_size (PagedAttention, Kwon et al. 2023).
#pragma once

#include "attention/params.cuh"
#include "ptx/copy.cuh"
#include "ptx/math.cuh"

namespace cuflash {

// Parts of the table, as many as a tile of kRows rows touches, for three tiles in a row: entries come by asynchronous
// copies before the tile that they lead to. Empty without a cache.
template <bool kPaged, int kRows>
struct TableParts {
    int entries[4][kRows + 3];
};
template <int kRows>
struct TableParts<false, kRows> {};

// Start the copies of the entries that lead to the rows [first_row, end) of a tile; entries past them are not read.
template <int kThreads, int kRows>
__device__ __forceinline__ void fetch_entries(int (&part)[kRows], const int* table, int block_size, int first_row, int end) {
    const int first = first_row / block_size, last = (end - 1) / block_size;
    for (int i = ptx::thread_index(); i <= last - first; i += kThreads) {
        ptx::cp_async_narrow<4>(ptx::shared_address(&part[i]), table + first + i, 4);
    }
}

// Rows of keys or values of one head, where they lie: those of a tile of kRows rows.
template <class T, int kRows>
struct PagedRows {
    static constexpr int kShift = 22;
    static_assert(2 * kRows * ((1 << kShift) + 1ll) < 1ll << 32);
    const T* cache;  // first block and token, this head
    i64 block_stride, token_stride;
    const int* part;  // of the table
    int begin;        // first row of the block with which it begins
    int block_size;
    u32 reciprocal;  // of block_size, in units of 2^-kShift, rounded up, for a division is many instructions

    __device__ __forceinline__ PagedRows(const T* cache, const i64 (&strides)[3], const int* part, int first_key,
                                         int block_size)
        : cache(cache),
          block_stride(strides[0]),
          token_stride(strides[1]),
          part(part),
          begin(first_key - first_key % block_size),
          block_size(block_size),
          reciprocal((1u << kShift) / block_size + 1) {}

    // Of larger blocks a tile touches two at most. Else row - begin < 2 kRows and block_size < kRows: the quotient is exact.
    __device__ __forceinline__ const T* at(int row) const {
        const int offset = row - begin;
        const int entry = block_size >= kRows ? offset >= block_size : static_cast<int>(offset * reciprocal >> kShift);
        return cache + part[entry] * block_stride + (offset - entry * block_size) * token_stride;
    }
};

}  // namespace cuflash
