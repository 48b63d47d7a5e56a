// Merges states that the caller holds, wherever they lie.
#pragma once

#include "attention/merge.cuh"

namespace cuflash {

template <class T>
struct StatesAnywhere {
    const MergeParams& params;
    int count;

    __device__ __forceinline__ const void* out(int state) const { return params.states[state]; }
    __device__ __forceinline__ const T* lse(int state) const { return static_cast<const T*>(params.lses[state]); }
};

template <CombineConfig C>
__device__ __forceinline__ void merge(const MergeParams& params) {
    merge_row<C>(params.rows, [&](const Row&) {
        return StatesAnywhere<Sum<C.state_dtype>>{params, params.rows.num_states};
    });
}

}  // namespace cuflash
