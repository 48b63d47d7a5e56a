// Online softmax in base 2 over register tiles.
#pragma once

#include "attention/scores.cuh"
#include "tile/product.cuh"

namespace cuflash {

// Below every score, and finite: for a row that has seen no key yet, 2^(-inf - m) is 0, not 2^(-inf + inf).
constexpr float kLowest = -3.4e38f;

// Running state of rows 16m + 8h + lane / 4 (h = 0, 1). The maximum is the same in the four lanes of a row; the sum is
// this lane's share, added up once at the end.
template <int kM>
struct OnlineSoftmax {
    float m[kM][2];  // maximum of the scores so far, base 2; kLowest before the first visible key
    float l[kM][2];  // sum of 2^(score - m) over this lane's keys

    __device__ __forceinline__ OnlineSoftmax() {
#pragma unroll
        for (int i = 0; i < kM; ++i)
#pragma unroll
            for (int h = 0; h < 2; ++h) m[i][h] = kLowest, l[i][h] = 0.0f;
    }

    // m' = max(m, c rowmax S);  P = 2^(c S - m');  l = 2^(m - m') l + rowsum P;  O = 2^(m - m') O.  S becomes P.
    template <int kN, int kO>
    __device__ __forceinline__ void update(float (&S)[kM][kN][4], float (&O)[kM][kO][4], float c) {
        float decay[kM][2];  // 2^(m - m')
        bool grew = false;
#pragma unroll
        for (int i = 0; i < kM; ++i)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float peak = fmaxf(S[i][0][2 * h], S[i][0][2 * h + 1]);
#pragma unroll
                for (int n = 1; n < kN; ++n) peak = fmaxf(peak, fmaxf(S[i][n][2 * h], S[i][n][2 * h + 1]));
                const float grown = fmaxf(m[i][h], quad_max(peak) * c);
                decay[i][h] = ptx::ex2(m[i][h] - grown);
                grew |= grown > m[i][h];
                m[i][h] = grown;
            }
        if (ptx::vote_any(grew)) rescale(O, decay);  // else every decay is 1 (or O and l are still 0)
#pragma unroll
        for (int i = 0; i < kM; ++i)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
#pragma unroll
                for (int n = 0; n < kN; ++n)
#pragma unroll
                    for (int e = 2 * h; e < 2 * h + 2; ++e) {
                        S[i][n][e] = ptx::ex2(fmaf(S[i][n][e], c, -m[i][h]));
                        l[i][h] += S[i][n][e];
                    }
            }
    }

    template <int kO>
    __device__ __forceinline__ void rescale(float (&O)[kM][kO][4], const float (&decay)[kM][2]) {
#pragma unroll
        for (int i = 0; i < kM; ++i)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                l[i][h] *= decay[i][h];
#pragma unroll
                for (int n = 0; n < kO; ++n)
#pragma unroll
                    for (int e = 2 * h; e < 2 * h + 2; ++e) O[i][n][e] *= decay[i][h];
            }
    }

    // O /= l and lse = ln 2 (m + log2 l), in place of m. A row that saw nothing has l = 0: O = 0, lse = -inf.
    template <int kO>
    __device__ __forceinline__ void finish(float (&O)[kM][kO][4]) {
#pragma unroll
        for (int i = 0; i < kM; ++i)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const float total = quad_sum(l[i][h]);
                const float inverse = total == 0.0f ? 0.0f : ptx::rcp(total);
                m[i][h] = total == 0.0f ? -kInfinity : kLn2 * (m[i][h] + ptx::lg2(total));
#pragma unroll
                for (int n = 0; n < kO; ++n)
#pragma unroll
                    for (int e = 2 * h; e < 2 * h + 2; ++e) O[i][n][e] *= inverse;
            }
    }
};

}  // namespace cuflash
