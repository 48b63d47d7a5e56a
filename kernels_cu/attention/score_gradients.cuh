// Backward pass, scores held transposed: from S^T to P^T, from dP^T to dS^T. Keys are rows, queries columns.
#pragma once

#include "attention/scores.cuh"

namespace cuflash {

// The derivative of the soft cap at each score.
template <class T, int kM, int kN>
struct Slope {
    T value[kM][kN][4];

    __device__ __forceinline__ void set(int m, int n, int e, T x) { value[m][n][e] = x; }
    __device__ __forceinline__ T at(int m, int n, int e) const { return value[m][n][e]; }
};

// P = 2^(c S - lse). `lse` points at the entry of this lane's first column; it is +inf where a query sees nothing.
template <class T, int kM, int kN>
__device__ __forceinline__ void exponentiate(T (&S)[kM][kN][4], const T* lse, T c) {
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const T column = lse[8 * n + e];
#pragma unroll
            for (int m = 0; m < kM; ++m)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    T& x = S[m][n][2 * h + e];
                    x = exp2_of(fma(x, c, -column));
                }
        }
}

// dS = P (dP - delta), in place of dP; times the slope of the soft cap it is the gradient of the products that were capped.
template <class T, int kM, int kN, class SlopeOrNot>
__device__ __forceinline__ void differentiate(T (&dP)[kM][kN][4], const T (&P)[kM][kN][4], const SlopeOrNot& slope,
                                              const T* delta) {
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const T column = delta[8 * n + e];
#pragma unroll
            for (int m = 0; m < kM; ++m)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const int at = 2 * h + e;
                    dP[m][n][at] = P[m][n][at] * (dP[m][n][at] - column) * slope.at(m, n, at);
                }
        }
}

}  // namespace cuflash
