// Merges the partial states of the splits of a forward launch.
#pragma once

#include "attention/merge.cuh"

namespace cuflash {

// States one after the other in a workspace.
template <class T>
struct StatesInRow {
    const CombineParams& params;
    int first, count;

    __device__ __forceinline__ const void* out(int state) const {
        return static_cast<const T*>(params.states) + (first + state) * params.state_stride;
    }
    __device__ __forceinline__ const T* lse(int state) const {
        return static_cast<const T*>(params.lses) + (first + state) * params.state_lse_stride;
    }
};

template <CombineConfig C>
__device__ __forceinline__ void combine(const CombineParams& params) {
    using T = Sum<C.state_dtype>;
    static_assert(bytes_of(C.state_dtype) == sizeof(T));  // states are of the type of sums
    merge_row<C>(params, [&](const Row& row) {
        if (params.shares == nullptr) return StatesInRow<T>{params, 0, params.num_states};
        const int lane = ptx::thread_index() % 32, entry = lane < 2 ? params.shares[2 * row.batch + lane] : 0;
        return StatesInRow<T>{params, ptx::shfl_idx(entry, 0), ptx::shfl_idx(entry, 1)};
    });
}

}  // namespace cuflash
