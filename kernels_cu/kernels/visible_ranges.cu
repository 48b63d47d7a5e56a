// Which keys each query sees, once both are sorted by (key, token): those with its key and before its bound lie side by
// side, from begin to end. Both ascend along the sorted queries. A thread per query.
#pragma once

#include "attention/config.cuh"
#include "attention/params.cuh"
#include "attention/token_keys.cuh"

namespace cuflash {

// The first position in [begin, end) at which `before` does not hold; it holds up to there.
template <class Before>
__device__ __forceinline__ u32 partition_point(u32 begin, u32 end, const Before& before) {
    while (begin < end) {
        const u32 middle = begin + (end - begin) / 2;
        if (before(middle)) begin = middle + 1;
        else end = middle;
    }
    return begin;
}

// Grid, fastest first: tile of queries, head, batch entry.
template <VisibleRangesConfig C>
__device__ __forceinline__ void visible_ranges(const VisibleRangesParams& params) {
    using Key = TokenKey<C.key_bytes>;
    constexpr u32 kTile = 32 * C.num_warps;
    const u32 len_q = params.len_q, len_k = params.len_k, tiles = (len_q + kTile - 1) / kTile;
    const u32 pair = blockIdx.x / tiles, position = blockIdx.x % tiles * kTile + threadIdx.x;
    if (position >= len_q) return;

    const i64 query = static_cast<i64>(pair) * len_q + position;
    const i64 keys = static_cast<i64>(pair / params.group) * len_k;  // heads are a multiple of the group
    const int token = params.q_order[query];
    if (token < 0) {  // dropped, as all queries after it
        params.begin[query] = params.end[query] = 0x7fffffff;
        return;
    }
    const Key key = static_cast<const Key*>(params.q_keys)[query];
    const Key* k_keys = static_cast<const Key*>(params.k_keys) + keys;
    const int* k_order = params.k_order + keys;
    const i64 bound = token + params.shift;
    const u32 begin = partition_point(0, len_k, [&](u32 i) { return k_keys[i] < key; });
    const u32 end = partition_point(begin, len_k, [&](u32 i) { return k_keys[i] == key && k_order[i] < bound; });
    params.begin[query] = begin;
    params.end[query] = end;
}

}  // namespace cuflash
