// Element types of arrays: how they lie in memory, what their products are summed in, conversions between the two.
#pragma once

#include "ptx/copy.cuh"
#include "ptx/math.cuh"
#include "ptx/matrix.cuh"

namespace cuflash {

// tf32 is float32 in memory, of which products see 11 significant bits.
enum class Element { none, float16, bfloat16, float32, float64, tf32 };

constexpr int bytes_of(Element element) {
    return element == Element::float64 ? 8 : element == Element::float32 || element == Element::tf32 ? 4 : 2;
}

// The type of an element in memory, and that in which everything made of such elements is computed.
template <Element E>
using Storage = Conditional<bytes_of(E) == 8, double, Conditional<bytes_of(E) == 4, float, u16>>;
template <Element E>
using Sum = Conditional<E == Element::float64, double, float>;

// The element type of sums in memory.
constexpr Element sum_element(Element element) {
    return element == Element::float64 ? Element::float64 : Element::float32;
}

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

// array[offset] as float32, float64 as it is. The load is never dropped: bytes moved depend on shapes, not on values.
template <Element E>
__device__ __forceinline__ Sum<E> load_element(const void* array, i64 offset) {
    const void* element = static_cast<const char*>(array) + offset * bytes_of(E);
    if constexpr (bytes_of(E) == 8) return ptx::load_global_f64(element);
    else if constexpr (bytes_of(E) == 4) return ptx::load_global_f32(element);
    else if constexpr (E == Element::float16) return ptx::cvt_f32_f16(ptx::load_global_u16(element));
    else return ptx::cvt_f32_bf16(ptx::load_global_u16(element));
}

// kN elements from array[offset] on in one access, to which they are aligned.
template <Element E, int kN>
__device__ __forceinline__ void load_elements(Sum<E> (&to)[kN], const void* array, i64 offset) {
    constexpr int kBytes = kN * bytes_of(E);
    if constexpr (kN == 1) {
        to[0] = load_element<E>(array, offset);
    } else {
        u32 words[kBytes / 4];
        ptx::load_global(words, static_cast<const char*>(array) + offset * bytes_of(E));
#pragma unroll
        for (int i = 0; i < kN; ++i) {
            if constexpr (bytes_of(E) == 8) to[i] = __hiloint2double(words[2 * i + 1], words[2 * i]);
            else if constexpr (bytes_of(E) == 4) to[i] = __uint_as_float(words[i]);
            else to[i] = i % 2 == 0 ? unpack_low<E>(words[i / 2]) : unpack_high<E>(words[i / 2]);
        }
    }
}

// array[offset] = value, rounded to nearest even.
template <Element E>
__device__ __forceinline__ void store_element(void* array, i64 offset, Sum<E> value) {
    if constexpr (bytes_of(E) > 2) static_cast<Storage<E>*>(array)[offset] = value;
    else static_cast<u16*>(array)[offset] = static_cast<u16>(pack<E>(value, 0.0f));
}

}  // namespace cuflash
