// Merges the partial states of the splits of a forward launch.
#pragma once

#include "attention/merge.cuh"

namespace cuflash {

// States one after the other in a workspace.
template <class T>
struct StatesInRow {
    const CombineParams& params;
    int count;

    __device__ __forceinline__ const void* out(int state) const {
        return static_cast<const T*>(params.states) + state * params.state_stride;
    }
    __device__ __forceinline__ const T* lse(int state) const {
        return static_cast<const T*>(params.lses) + state * params.state_lse_stride;
    }
};

template <CombineConfig C>
__device__ __forceinline__ void combine(const CombineParams& params) {
    static_assert(bytes_of(C.state_dtype) == sizeof(Sum<C.state_dtype>));  // states are of the type of sums
    merge_row<C>(params, [&](const Row&) { return StatesInRow<Sum<C.state_dtype>>{params, params.num_states}; });
}

}  // namespace cuflash
