// Special functions, conversions and lane exchange. Approximate forms flush subnormal numbers to zero.
#pragma once

#include "ptx/types.cuh"

namespace cuflash::ptx {

// 2^x, relative error 2^-22; 2^-inf = 0.
__device__ __forceinline__ float ex2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// log2 x, absolute error 2^-22 near 1, relative 2^-22 elsewhere; log2 0 = -inf.
__device__ __forceinline__ float lg2(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1/x within one unit in the last place.
__device__ __forceinline__ float rcp(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two floats rounded to nearest even; `low` in bits 0-15.
__device__ __forceinline__ u32 cvt_f16x2(float low, float high) {
    u32 packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

__device__ __forceinline__ u32 cvt_bf16x2(float low, float high) {
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

__device__ __forceinline__ float cvt_f32_f16(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

// bfloat16 is the upper half of a float32.
__device__ __forceinline__ float cvt_f32_bf16(u16 bits) {
    float value;
    asm("mov.b32 %0, {%1, %2};" : "=f"(value) : "h"(static_cast<u16>(0)), "h"(bits));
    return value;
}

// Arithmetic that no compiler fuses.
__device__ __forceinline__ double add_rn(double x, double y) {
    double z;
    asm("add.rn.f64 %0, %1, %2;" : "=d"(z) : "d"(x), "d"(y));
    return z;
}

__device__ __forceinline__ double sub_rn(double x, double y) {
    double z;
    asm("sub.rn.f64 %0, %1, %2;" : "=d"(z) : "d"(x), "d"(y));
    return z;
}

__device__ __forceinline__ double mul_rn(double x, double y) {
    double z;
    asm("mul.rn.f64 %0, %1, %2;" : "=d"(z) : "d"(x), "d"(y));
    return z;
}

__device__ __forceinline__ double div_rn(double x, double y) {
    double z;
    asm("div.rn.f64 %0, %1, %2;" : "=d"(z) : "d"(x), "d"(y));
    return z;
}

// The 11 significant bits of TF32, rounded to nearest with ties away from zero.
__device__ __forceinline__ u32 cvt_rna_tf32(u32 bits) {
    u32 rounded;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
    return rounded;
}

// Index of the thread in its block, read anew at every call: what derives from it is not held in registers from one use
// to the next.
__device__ __forceinline__ int thread_index() {
    int index;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
    return index;
}

// Value of the lane whose index differs in the bits of kMask.
template <int kMask>
__device__ __forceinline__ float shfl_bfly(float x) {
    float y;
    asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 0x1f, 0xffffffff;" : "=f"(y) : "f"(x), "n"(kMask));
    return y;
}

template <int kMask>
__device__ __forceinline__ int shfl_bfly(int x) {
    int y;
    asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 0x1f, 0xffffffff;" : "=r"(y) : "r"(x), "n"(kMask));
    return y;
}

template <int kMask>
__device__ __forceinline__ double shfl_bfly(double x) {
    return __hiloint2double(shfl_bfly<kMask>(__double2hiint(x)), shfl_bfly<kMask>(__double2loint(x)));
}

// Whether `predicate` holds in any lane of the warp.
__device__ __forceinline__ bool vote_any(bool predicate) {
    u32 any;
    asm volatile("{\n.reg .pred p, q;\nsetp.ne.u32 p, %1, 0;\nvote.sync.any.pred q, p, 0xffffffff;\n"
                 "selp.u32 %0, 1, 0, q;\n}"
                 : "=r"(any)
                 : "r"(static_cast<u32>(predicate)));
    return any != 0;
}

// Lanes of the warp that hold the same value, as bits.
__device__ __forceinline__ u32 match_any(u32 value) {
    u32 lanes;
    asm volatile("match.any.sync.b32 %0, %1, 0xffffffff;" : "=r"(lanes) : "r"(value));
    return lanes;
}

// The lanes of the warp in which `predicate` holds, a bit each.
__device__ __forceinline__ u32 ballot(bool predicate) {
    u32 lanes;
    asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %1, 0;\nvote.sync.ballot.b32 %0, p, 0xffffffff;\n}"
                 : "=r"(lanes)
                 : "r"(static_cast<u32>(predicate)));
    return lanes;
}

// Value of lane `source`.
__device__ __forceinline__ float shfl_idx(float x, int source) {
    float y;
    asm volatile("shfl.sync.idx.b32 %0, %1, %2, 0x1f, 0xffffffff;" : "=f"(y) : "f"(x), "r"(source));
    return y;
}

__device__ __forceinline__ int shfl_idx(int x, int source) {
    int y;
    asm volatile("shfl.sync.idx.b32 %0, %1, %2, 0x1f, 0xffffffff;" : "=r"(y) : "r"(x), "r"(source));
    return y;
}

__device__ __forceinline__ double shfl_idx(double x, int source) {
    return __hiloint2double(shfl_idx(__double2hiint(x), source), shfl_idx(__double2loint(x), source));
}

template <class T>
__device__ __forceinline__ T* shfl_idx(T* x, int source) {
    const auto bits = reinterpret_cast<unsigned long long>(x);
    const auto low = static_cast<u32>(shfl_idx(static_cast<int>(bits), source));
    const auto high = static_cast<u32>(shfl_idx(static_cast<int>(bits >> 32), source));
    return reinterpret_cast<T*>(static_cast<unsigned long long>(high) << 32 | low);
}

}  // namespace cuflash::ptx
