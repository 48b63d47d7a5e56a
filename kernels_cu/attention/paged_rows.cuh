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

// Rows of keys or values of one head, where they lie.
template <class T>
struct PagedRows {
    const T* cache;  // first block and token, this head
    i64 block_stride, token_stride;
    const int* part;  // of the table
    int first;        // entry of the table with which it begins
    int block_size;

    __device__ __forceinline__ const T* at(int row) const {
        const int entry = row / block_size;
        return cache + part[entry - first] * block_stride + (row - entry * block_size) * token_stride;
    }
};

}  // namespace cuflash
