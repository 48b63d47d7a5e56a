// Elementary functions of float and double under one name each.
#pragma once

#include "ptx/math.cuh"

namespace cuflash {

// The larger; of a NaN and a number it may be either.
__device__ __forceinline__ float larger(float x, float y) { return fmaxf(x, y); }
__device__ __forceinline__ double larger(double x, double y) { return y > x ? y : x; }

__device__ __forceinline__ float reciprocal(float x) { return ptx::rcp(x); }
__device__ __forceinline__ double reciprocal(double x) { return 1.0 / x; }

// 2^x for x < 1024, 0 where it would be below 2^-1022.
__device__ __forceinline__ float exp2_of(float x) { return ptx::ex2(x); }

// With n the integer nearest to x and f = x - n: 2^x = 2^n (1 + f q(f)), q the polynomial that is nearest to (2^f - 1) / f
// on [-1/2, 1/2]. Within 0.6 units in the last place.
__device__ __forceinline__ double exp2_of(double x) {
    constexpr double kRound = 0x1.8p52;  // in a sum with it the low word is n
    const double shifted = x + kRound;
    const double f = x - (shifted - kRound);
    double q = 4.4549605981865186e-10;
    q = fma(q, f, 7.072585949269223e-9);
    q = fma(q, f, 1.0178062445845774e-7);
    q = fma(q, f, 1.321544258792169e-6);
    q = fma(q, f, 1.525273382983612e-5);
    q = fma(q, f, 1.540353044173605e-4);
    q = fma(q, f, 1.3333558146416936e-3);
    q = fma(q, f, 9.618129107606888e-3);
    q = fma(q, f, 5.55041086648216e-2);
    q = fma(q, f, 2.4022650695910097e-1);
    q = fma(q, f, 6.931471805599453e-1);
    const double power = fma(q, f, 1.0) * __hiloint2double((__double2loint(shifted) + 1023) << 20, 0);
    return x < -1022.0 ? 0.0 : power;
}

__device__ __forceinline__ float log2_of(float x) { return ptx::lg2(x); }
__device__ __forceinline__ double log2_of(double x) { return log2(x); }

}  // namespace cuflash
