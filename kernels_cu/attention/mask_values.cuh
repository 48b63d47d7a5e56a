// What the expression of a mask is made of, for one score.
#pragma once

#include "ptx/math.cuh"

namespace cuflash {

// Whole numbers and truths of one score. Reals are float64, each operation rounded by itself as on the CPU.
template <class A, class B> __device__ __forceinline__ auto add(A a, B b) { return a + b; }
template <class A, class B> __device__ __forceinline__ auto sub(A a, B b) { return a - b; }
template <class A, class B> __device__ __forceinline__ auto mul(A a, B b) { return a * b; }
template <class A> __device__ __forceinline__ auto negative(A a) { return -a; }
template <class A> __device__ __forceinline__ auto absolute(A a) { return a < 0 ? -a : a; }
template <class A, class B> __device__ __forceinline__ auto minimum(A a, B b) { return a < b ? a : b; }
template <class A, class B> __device__ __forceinline__ auto maximum(A a, B b) { return a > b ? a : b; }
template <class A, class B> __device__ __forceinline__ auto bit_and(A a, B b) { return a & b; }
template <class A, class B> __device__ __forceinline__ auto bit_or(A a, B b) { return a | b; }
template <class A, class B> __device__ __forceinline__ auto bit_xor(A a, B b) { return a ^ b; }
// In 64 bits: a count may be more than an int has.
template <class A, class B> __device__ __forceinline__ auto shift_left(A a, B b) {
    return static_cast<decltype(a + b)>(static_cast<i64>(a) << b);
}
template <class A, class B> __device__ __forceinline__ auto shift_right(A a, B b) {
    return static_cast<decltype(a + b)>(static_cast<i64>(a) >> b);
}
template <class A, class B> __device__ __forceinline__ bool less(A a, B b) { return a < b; }
template <class A, class B> __device__ __forceinline__ bool less_equal(A a, B b) { return a <= b; }
template <class A, class B> __device__ __forceinline__ bool equal(A a, B b) { return a == b; }
template <class A, class B> __device__ __forceinline__ bool not_equal(A a, B b) { return a != b; }
template <class A, class B> __device__ __forceinline__ auto choose(bool c, A a, B b) { return c ? a : b; }
template <class A> __device__ __forceinline__ double to_real(A a) { return static_cast<double>(a); }
__device__ __forceinline__ int to_whole(bool a) { return a; }
__device__ __forceinline__ bool logical_and(bool a, bool b) { return a && b; }
__device__ __forceinline__ bool logical_or(bool a, bool b) { return a || b; }
__device__ __forceinline__ bool logical_xor(bool a, bool b) { return a != b; }
__device__ __forceinline__ bool logical_not(bool a) { return !a; }
__device__ __forceinline__ double add(double a, double b) { return ptx::add_rn(a, b); }
__device__ __forceinline__ double sub(double a, double b) { return ptx::sub_rn(a, b); }
__device__ __forceinline__ double mul(double a, double b) { return ptx::mul_rn(a, b); }
__device__ __forceinline__ double quotient(double a, double b) { return ptx::div_rn(a, b); }
// Of a NaN and a number the NaN, as NumPy has it.
__device__ __forceinline__ double minimum(double a, double b) { return a < b || a != a ? a : b; }
__device__ __forceinline__ double maximum(double a, double b) { return a > b || a != a ? a : b; }

// Rounded towards minus infinity; b > 0.
template <class A, class B>
__device__ __forceinline__ auto floor_div(A a, B b) {
    const auto quotient = a / b;
    return a % b < 0 ? quotient - 1 : quotient;
}
template <class A, class B>
__device__ __forceinline__ auto floor_mod(A a, B b) {
    const auto rest = a % b;
    return rest < 0 ? rest + b : rest;
}

}  // namespace cuflash
