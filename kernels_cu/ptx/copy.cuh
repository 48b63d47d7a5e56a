// Asynchronous copies from global to shared memory, and plain vector accesses of shared memory.
// Shared addresses are 32-bit, in the shared window.
#pragma once

#include "ptx/types.cuh"

namespace cuflash::ptx {

__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// 16 bytes past L1; both addresses aligned to 16.
__device__ __forceinline__ void cp_async_16(u32 shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}

// The first `source_bytes` (0 to 16) of 16 bytes; the rest becomes zero and is not read.
__device__ __forceinline__ void cp_async_16(u32 shared, const void* global, int source_bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(source_bytes)
                 : "memory");
}

// The first `source_bytes` (0 to kBytes) of kBytes = 4 or 8; the rest becomes zero and is not read.
template <int kBytes>
__device__ __forceinline__ void cp_async_narrow(u32 shared, const void* global, int source_bytes) {
    static_assert(kBytes == 4 || kBytes == 8);
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared), "l"(global), "n"(kBytes),
                 "r"(source_bytes)
                 : "memory");
}

// Closes the group of this thread's copies since the last call.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's groups are in flight.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void store_shared(u32 shared, u32 value) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(shared), "r"(value) : "memory");
}

__device__ __forceinline__ void store_shared_v2(u32 shared, u32 x, u32 y) {
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(shared), "r"(x), "r"(y) : "memory");
}

__device__ __forceinline__ void store_shared_v2(u32 shared, double x, double y) {
    asm volatile("st.shared.v2.f64 [%0], {%1, %2};" ::"r"(shared), "d"(x), "d"(y) : "memory");
}

__device__ __forceinline__ void store_shared_v4(u32 shared, const u32 (&value)[4]) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(value[0]), "r"(value[1]),
                 "r"(value[2]), "r"(value[3])
                 : "memory");
}

__device__ __forceinline__ void load_shared_v4(u32 (&value)[4], u32 shared) {
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value[0]), "=r"(value[1]), "=r"(value[2]), "=r"(value[3])
                 : "r"(shared)
                 : "memory");
}

// Elements of a tile that asynchronous copies filled.
__device__ __forceinline__ void load_shared(u32& value, u32 shared) {
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(shared));
}

__device__ __forceinline__ void load_shared(double& value, u32 shared) {
    asm volatile("ld.shared.f64 %0, [%1];" : "=d"(value) : "r"(shared));
}

__device__ __forceinline__ void load_shared_v2(double& x, double& y, u32 shared) {
    asm volatile("ld.shared.v2.f64 {%0, %1}, [%2];" : "=d"(x), "=d"(y) : "r"(shared));
}

// A thread's own memory, in the local window; aligned to 16. Arrays reached so are never held in registers.
__device__ __forceinline__ u32 local_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_local(pointer));
}

__device__ __forceinline__ void store_local_v4(u32 local, const float (&value)[4]) {
    asm volatile("st.local.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(local), "f"(value[0]), "f"(value[1]), "f"(value[2]),
                 "f"(value[3])
                 : "memory");
}

__device__ __forceinline__ void load_local_v4(float (&value)[4], u32 local) {
    asm volatile("ld.local.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(value[0]), "=f"(value[1]), "=f"(value[2]), "=f"(value[3])
                 : "r"(local)
                 : "memory");
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

// Loads that happen where they stand, whether or not the value turns out to matter.
__device__ __forceinline__ u16 load_global_u16(const void* global) {
    u16 value;
    asm volatile("ld.global.u16 %0, [%1];" : "=h"(value) : "l"(global));
    return value;
}

__device__ __forceinline__ float load_global_f32(const void* global) {
    float value;
    asm volatile("ld.global.f32 %0, [%1];" : "=f"(value) : "l"(global));
    return value;
}

__device__ __forceinline__ double load_global_f64(const void* global) {
    double value;
    asm volatile("ld.global.f64 %0, [%1];" : "=d"(value) : "l"(global));
    return value;
}

__device__ __forceinline__ void load_global(u32 (&value)[1], const void* global) {
    asm volatile("ld.global.b32 %0, [%1];" : "=r"(value[0]) : "l"(global));
}

__device__ __forceinline__ void load_global(u32 (&value)[2], const void* global) {
    asm volatile("ld.global.v2.b32 {%0, %1}, [%2];" : "=r"(value[0]), "=r"(value[1]) : "l"(global));
}

__device__ __forceinline__ void load_global(u32 (&value)[4], const void* global) {
    asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value[0]), "=r"(value[1]), "=r"(value[2]), "=r"(value[3])
                 : "l"(global));
}

// memory[0] += x, past all caches but L2; of the other threads' additions before or after it nothing is said.
__device__ __forceinline__ void red_add(float* memory, float x) {
    asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(memory), "f"(x) : "memory");
}

__device__ __forceinline__ void red_add(double* memory, double x) {
    asm volatile("red.relaxed.gpu.global.add.f64 [%0], %1;" ::"l"(memory), "d"(x) : "memory");
}

// memory[0 .. 3] += x, each by itself; the address aligned to 16. From sm_90 on.
__device__ __forceinline__ void red_add_v4(float* memory, const float (&x)[4]) {
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(memory), "f"(x[0]), "f"(x[1]),
                 "f"(x[2]), "f"(x[3])
                 : "memory");
}

// What this thread wrote, and what it knows that others wrote, is seen by whoever acquires this value.
__device__ __forceinline__ void store_release(u32* memory, u32 value) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(memory), "r"(value) : "memory");
}

__device__ __forceinline__ u32 load_acquire(const u32* memory) {
    u32 value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(memory) : "memory");
    return value;
}

__device__ __forceinline__ void store_global_v2(void* global, u32 x, u32 y) {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(global), "r"(x), "r"(y) : "memory");
}

__device__ __forceinline__ void store_global_v2(void* global, double x, double y) {
    asm volatile("st.global.v2.f64 [%0], {%1, %2};" ::"l"(global), "d"(x), "d"(y) : "memory");
}

__device__ __forceinline__ void load_global_v4(float (&value)[4], const float* global) {
    asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(value[0]), "=f"(value[1]), "=f"(value[2]), "=f"(value[3])
                 : "l"(global));
}

__device__ __forceinline__ void store_global_v4(void* global, const u32 (&value)[4]) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(value[0]), "r"(value[1]),
                 "r"(value[2]), "r"(value[3])
                 : "memory");
}

}  // namespace cuflash::ptx
