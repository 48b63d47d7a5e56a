// The second level of sums over many key tiles.
#pragma once

#include "attention/softmax.cuh"
#include "ptx/copy.cuh"

namespace cuflash {

// The error of a sum that is rounded after every addition grows with their number, however exact its terms. Every kTiles
// tiles O and l of split float32 therefore move on to sums of their own, and start from zero again. Those lie in local
// memory: registers are full, and they are seldom wanted.
template <int kM, int kO>
struct SettledSums {
    static constexpr int kTiles = 16;

    alignas(16) float O[kM][kO][4];
    alignas(16) float state[kM][4];  // l of two rows, then the maxima that O and l refer to

    __device__ __forceinline__ SettledSums() {
#pragma unroll
        for (int i = 0; i < kM; ++i) {
            ptx::store_local_v4(ptx::local_address(state[i]), {0.0f, 0.0f, kLowest<float>, kLowest<float>});
#pragma unroll
            for (int n = 0; n < kO; ++n) ptx::store_local_v4(ptx::local_address(O[i][n]), {0.0f, 0.0f, 0.0f, 0.0f});
        }
    }

    // The running sums += these; these are then out of date.
    __device__ __forceinline__ void take(OnlineSoftmax<float, kM>& running, float (&x)[kM][kO][4]) {
#pragma unroll
        for (int i = 0; i < kM; ++i) {
            float old[4], decay[2];
            ptx::load_local_v4(old, ptx::local_address(state[i]));
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                decay[h] = exp2_of(old[2 + h] - running.m[i][h]);
                running.l[i][h] = fma(old[h], decay[h], running.l[i][h]);
            }
#pragma unroll
            for (int n = 0; n < kO; ++n) {
                ptx::load_local_v4(old, ptx::local_address(O[i][n]));
#pragma unroll
                for (int e = 0; e < 4; ++e) x[i][n][e] = fma(old[e], decay[e / 2], x[i][n][e]);
            }
        }
    }

    // These sums += the running ones, which become zero.
    __device__ __forceinline__ void add(OnlineSoftmax<float, kM>& running, float (&x)[kM][kO][4]) {
        take(running, x);
#pragma unroll
        for (int i = 0; i < kM; ++i) {
            ptx::store_local_v4(ptx::local_address(state[i]),
                                {running.l[i][0], running.l[i][1], running.m[i][0], running.m[i][1]});
            running.l[i][0] = running.l[i][1] = 0.0f;
#pragma unroll
            for (int n = 0; n < kO; ++n) ptx::store_local_v4(ptx::local_address(O[i][n]), x[i][n]);
        }
        clear(x);
    }
};

}  // namespace cuflash
