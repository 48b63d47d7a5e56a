// Merging partial attention states of one row: outputs o_s normalised by their own sums, and lse_s (natural log).
//
// With M = max_s lse_s:  lse = M + log sum_s e^(lse_s - M),  o = sum_s e^(lse_s - lse) o_s.  All -inf: (0, -inf).
#pragma once

#include "attention/params.cuh"
#include "attention/scores.cuh"
#include "tile/product.cuh"

namespace cuflash {

// Weights of a warp's row: lane holds those of states lane, lane + 32, ...
template <class T>
struct MergeWeights {
    static constexpr int kPerLane = kMaxSplits / 32;

    T weight[kPerLane];  // e^(lse_s - lse); 0 for a state that saw nothing, and past the last state
    T lse;

    __device__ __forceinline__ MergeWeights(const T (&lses)[kPerLane]) {
        T peak = -kInfinity;
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) peak = larger(peak, lses[i]);
        peak = warp_max(peak);
        const T shift = peak == -kInfinity ? 0 : peak;  // no state saw anything: all weights 0
        T sum = 0;
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
            weight[i] = exp2_of((lses[i] - shift) * kLog2E<T>);
            sum += weight[i];
        }
        sum = warp_sum(sum);
        const T inverse = sum == 0 ? 0 : reciprocal(sum);
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) weight[i] *= inverse;
        lse = sum == 0 ? static_cast<T>(-kInfinity) : shift + kLn2<T> * log2_of(sum);
    }
};

}  // namespace cuflash
