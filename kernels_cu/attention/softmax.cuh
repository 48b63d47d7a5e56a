// Online softmax in base 2 over register tiles.
#pragma once

#include "attention/scores.cuh"
#include "tile/functions.cuh"
#include "tile/product.cuh"

namespace cuflash {

// Below every score, and finite: for a row that has seen no key yet, 2^(-inf - m) is 0, not 2^(-inf + inf).
template <class T>
constexpr T kLowest = static_cast<T>(sizeof(T) == 8 ? -1.7e308 : -3.4e38);

// ln(2^m total), rounded once: log2 total is taken apart into an exponent and what is left, and products and sums into
// what T holds of them and what it does not.
template <class T>
__device__ __forceinline__ T natural_log(T m, T total) {
    constexpr T kLn2Low = static_cast<T>(sizeof(T) == 8 ? 2.3190468138462996e-17 : 0.6931471805599453 - kLn2<float>);
    int exponent;
    const T fraction = frexp(total, &exponent);
    const T sum = m + exponent, part = sum - m;
    const T rest = (m - (sum - part)) + (exponent - part) + log2_of(fraction);  // sum + rest = m + log2 total
    const T product = sum * kLn2<T>;
    return product + (fma(sum, kLn2<T>, -product) + fma(sum, kLn2Low, rest * kLn2<T>));
}

// Running state of rows 16m + 8h + lane / 4 (h = 0, 1). The maximum is the same in the four lanes of a row; the sum is
// this lane's share, added up once at the end.
template <class T, int kM>
struct OnlineSoftmax {
    T m[kM][2];  // maximum of the scores so far, base 2; kLowest before the first visible key
    T l[kM][2];  // sum of 2^(score - m) over this lane's keys

    __device__ __forceinline__ OnlineSoftmax() {
#pragma unroll
        for (int i = 0; i < kM; ++i)
#pragma unroll
            for (int h = 0; h < 2; ++h) m[i][h] = kLowest<T>, l[i][h] = 0;
    }

    // m' = max(m, c rowmax S);  P = 2^(c S - m');  l = 2^(m - m') l + rowsum P;  O = 2^(m - m') O.  S becomes P.
    template <int kN, int kO>
    __device__ __forceinline__ void update(T (&S)[kM][kN][4], T (&O)[kM][kO][4], T c) {
        T decay[kM][2];  // 2^(m - m')
        bool grew = false;
#pragma unroll
        for (int i = 0; i < kM; ++i)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                T peak = larger(S[i][0][2 * h], S[i][0][2 * h + 1]);
#pragma unroll
                for (int n = 1; n < kN; ++n) peak = larger(peak, larger(S[i][n][2 * h], S[i][n][2 * h + 1]));
                const T grown = larger(m[i][h], quad_max(peak) * c);
                decay[i][h] = exp2_of(m[i][h] - grown);
                grew |= grown > m[i][h];
                m[i][h] = grown;
            }
        if (ptx::vote_any(grew)) rescale(O, decay);  // else every decay is 1 (or O and l are still 0)
#pragma unroll
        for (int i = 0; i < kM; ++i)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                T sum = 0;  // of the tile: added one by one, small weights would be lost beside a large one
#pragma unroll
                for (int n = 0; n < kN; ++n)
#pragma unroll
                    for (int e = 2 * h; e < 2 * h + 2; ++e) {
                        S[i][n][e] = exp2_of(fma(S[i][n][e], c, -m[i][h]));
                        sum += S[i][n][e];
                    }
                l[i][h] += sum;
            }
    }

    template <int kO>
    __device__ __forceinline__ void rescale(T (&O)[kM][kO][4], const T (&decay)[kM][2]) {
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

    // O /= l and lse = ln(2^m l), in place of m. A row that saw nothing has l = 0: O = 0, lse = -inf.
    template <int kO>
    __device__ __forceinline__ void finish(T (&O)[kM][kO][4]) {
#pragma unroll
        for (int i = 0; i < kM; ++i)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const T total = quad_sum(l[i][h]);
                const T inverse = total == 0 ? 0 : reciprocal(total);
                m[i][h] = total == 0 ? -kInfinity : natural_log(m[i][h], total);
#pragma unroll
                for (int n = 0; n < kO; ++n)
#pragma unroll
                    for (int e = 2 * h; e < 2 * h + 2; ++e) O[i][n][e] *= inverse;
            }
    }
};

}  // namespace cuflash
