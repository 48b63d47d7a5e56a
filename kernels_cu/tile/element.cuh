// Element types of arrays in memory, and their conversion from and to float32.
#pragma once

#include "ptx/copy.cuh"
#include "ptx/math.cuh"
#include "ptx/matrix.cuh"

namespace cuflash {

enum class Element { none, float16, bfloat16, float32 };

constexpr int bytes_of(Element element) { return element == Element::float32 ? 4 : 2; }

// A pair of floats rounded to a 16-bit type, the first in the lower half.
template <Element E>
__device__ __forceinline__ u32 pack(float low, float high) {
    static_assert(E == Element::float16 || E == Element::bfloat16);
    if constexpr (E == Element::float16) return ptx::cvt_f16x2(low, high);
    else return ptx::cvt_bf16x2(low, high);
}

// The halves of such a pair.
template <Element E>
__device__ __forceinline__ float unpack_low(u32 pair) {
    if constexpr (E == Element::float16) return ptx::cvt_f32_f16(static_cast<u16>(pair));
    else return ptx::cvt_f32_bf16(static_cast<u16>(pair));
}

template <Element E>
__device__ __forceinline__ float unpack_high(u32 pair) {
    if constexpr (E == Element::float16) return ptx::cvt_f32_f16(static_cast<u16>(pair >> 16));
    else return ptx::cvt_f32_bf16(static_cast<u16>(pair >> 16));
}

// array[offset] as float32. The load is never dropped: bytes moved depend on shapes, not on values.
template <Element E>
__device__ __forceinline__ float load_element(const void* array, i64 offset) {
    const void* element = static_cast<const char*>(array) + offset * bytes_of(E);
    if constexpr (E == Element::float32) return ptx::load_global_f32(element);
    else if constexpr (E == Element::float16) return ptx::cvt_f32_f16(ptx::load_global_u16(element));
    else return ptx::cvt_f32_bf16(ptx::load_global_u16(element));
}

// array[offset] = value, rounded to nearest even.
template <Element E>
__device__ __forceinline__ void store_element(void* array, i64 offset, float value) {
    if constexpr (E == Element::float32) static_cast<float*>(array)[offset] = value;
    else static_cast<u16*>(array)[offset] = static_cast<u16>(pack<E>(value, 0.0f));
}

// d [16][8] += a [16][16] b [16][8]
template <Element E>
__device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    if constexpr (E == Element::float16) ptx::mma_m16n8k16_f16(d, a, b0, b1);
    else ptx::mma_m16n8k16_bf16(d, a, b0, b1);
}

}  // namespace cuflash
