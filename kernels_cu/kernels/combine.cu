// Merges partial attention states: the splits of a forward launch, or states that the caller holds. A warp per row.
#pragma once

#include "attention/config.cuh"
#include "attention/merge.cuh"
#include "attention/params.cuh"
#include "tile/element.cuh"

namespace cuflash {

template <CombineConfig C>
__device__ __forceinline__ void combine(const CombineParams& params) {
    using T = Sum<C.state_dtype>;
    constexpr int kColumns = (C.head_dim_v + 31) / 32;  // of a lane: lane, lane + 32, ...
    const int lane = threadIdx.x % 32;
    const i64 row = static_cast<i64>(blockIdx.x) * C.num_warps + threadIdx.x / 32;  // (batch, head, token)
    if (row >= params.rows) return;
    const i64 token = row % params.seqlen_q, head = row / params.seqlen_q % params.num_heads;
    const i64 batch = row / params.seqlen_q / params.num_heads;

    const i64 lse_offset =
        batch * params.state_lse_strides[0] + head * params.state_lse_strides[1] + token * params.state_lse_strides[2];
    using Weights = MergeWeights<T>;
    T lses[Weights::kPerLane];
#pragma unroll
    for (int i = 0; i < Weights::kPerLane; ++i) {
        const int state = lane + 32 * i;
        lses[i] = state < params.num_states ? static_cast<const T*>(params.lses[state])[lse_offset] : -kInfinity;
    }
    const Weights weights(lses);

    const i64 state_offset =
        batch * params.state_strides[0] + token * params.state_strides[1] + head * params.state_strides[2];
    T o[kColumns] = {};
#pragma unroll
    for (int i = 0; i < Weights::kPerLane; ++i) {
        for (int state = 32 * i; state < min(32 * i + 32, params.num_states); ++state) {
            const T weight = ptx::shfl_idx(weights.weight[i], state % 32);
#pragma unroll
            for (int j = 0; j < kColumns; ++j) {
                const int column = lane + 32 * j;
                if (column >= C.head_dim_v) break;
                const T part = load_element<C.state_dtype>(params.states[state], state_offset + column);
                o[j] = weight == 0 ? o[j] : fma(weight, part, o[j]);  // a state that saw nothing may hold anything
            }
        }
    }

    const i64 o_offset = batch * params.o_strides[0] + token * params.o_strides[1] + head * params.o_strides[2];
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
        if (lane + 32 * j < C.head_dim_v) store_element<C.out_dtype>(params.o, o_offset + lane + 32 * j, o[j]);
    }
    if (params.lse != nullptr && lane == 0) {
        static_cast<T*>(params.lse)[batch * params.lse_strides[0] + head * params.lse_strides[1] +
                                    token * params.lse_strides[2]] = weights.lse;
    }
}

}  // namespace cuflash
