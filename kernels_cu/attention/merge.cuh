// Merging partial attention states of one row: outputs o_s normalised by their own sums, and lse_s (natural log).
//
// With M = max_s lse_s:  lse = M + log sum_s e^(lse_s - M),  o = sum_s e^(lse_s - lse) o_s.  All -inf: (0, -inf).
#pragma once

#include "attention/params.cuh"
#include "attention/scores.cuh"
#include "ptx/math.cuh"

namespace cuflash {

__device__ __forceinline__ float warp_max(float x) {
    x = fmaxf(x, ptx::shfl_bfly<16>(x));
    x = fmaxf(x, ptx::shfl_bfly<8>(x));
    x = fmaxf(x, ptx::shfl_bfly<4>(x));
    x = fmaxf(x, ptx::shfl_bfly<2>(x));
    return fmaxf(x, ptx::shfl_bfly<1>(x));
}

__device__ __forceinline__ float warp_sum(float x) {
    x += ptx::shfl_bfly<16>(x);
    x += ptx::shfl_bfly<8>(x);
    x += ptx::shfl_bfly<4>(x);
    x += ptx::shfl_bfly<2>(x);
    return x + ptx::shfl_bfly<1>(x);
}

// Weights of a warp's row: lane holds those of states lane, lane + 32, ...
struct MergeWeights {
    static constexpr int kPerLane = kMaxSplits / 32;

    float weight[kPerLane];  // e^(lse_s - lse); 0 for a state that saw nothing, and past the last state
    float lse;

    __device__ __forceinline__ MergeWeights(const float (&lses)[kPerLane]) {
        float peak = -kInfinity;
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) peak = fmaxf(peak, lses[i]);
        peak = warp_max(peak);
        const float shift = peak == -kInfinity ? 0.0f : peak;  // no state saw anything: all weights 0
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
            weight[i] = ptx::ex2((lses[i] - shift) * kLog2E);
            sum += weight[i];
        }
        sum = warp_sum(sum);
        const float inverse = sum == 0.0f ? 0.0f : ptx::rcp(sum);
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) weight[i] *= inverse;
        lse = sum == 0.0f ? -kInfinity : shift + kLn2 * ptx::lg2(sum);
    }
};

}  // namespace cuflash
