// What masks are made of: arithmetic that no compiler fuses, and loads of what no kernel writes.
#pragma once

#include "ptx/types.cuh"

namespace cuflash::ptx {

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

// memory[0] of an array that nobody writes while the kernel runs.
__device__ __forceinline__ u8 load_constant(const u8* memory) {
    u32 value;
    asm("ld.global.nc.u8 %0, [%1];" : "=r"(value) : "l"(memory));
    return static_cast<u8>(value);
}

__device__ __forceinline__ int load_constant(const int* memory) {
    int value;
    asm("ld.global.nc.s32 %0, [%1];" : "=r"(value) : "l"(memory));
    return value;
}

__device__ __forceinline__ i64 load_constant(const i64* memory) {
    i64 value;
    asm("ld.global.nc.s64 %0, [%1];" : "=l"(value) : "l"(memory));
    return value;
}

__device__ __forceinline__ float load_constant(const float* memory) {
    float value;
    asm("ld.global.nc.f32 %0, [%1];" : "=f"(value) : "l"(memory));
    return value;
}

__device__ __forceinline__ double load_constant(const double* memory) {
    double value;
    asm("ld.global.nc.f64 %0, [%1];" : "=d"(value) : "l"(memory));
    return value;
}

}  // namespace cuflash::ptx
