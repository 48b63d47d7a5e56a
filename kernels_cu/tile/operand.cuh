// Operands of matrix products in registers, as the instructions take them.
//
// An instruction covers 16 (16-bit elements) or 8 of the shared dimension. float32 is split: a = a1 + a2, each of 11
// significant bits, and ab is a1 b1 + a1 b2 + a2 b1 to 22 bits. docs/float32-on-tensor-cores.md says what that costs.
#pragma once

#include "ptx/matrix.cuh"
#include "tile/element.cuh"

namespace cuflash {

// A register of an operand: two 16-bit elements, a float32 or a float64.
template <Element E>
using Word = Conditional<E == Element::float64, double, u32>;

constexpr bool is_split(Element element) { return element == Element::float32; }

// Words of a lane for one instruction, of a left operand [16][8 or 16]: four, split four high and four low ones; of a
// right operand half as many.
constexpr int instruction_words(Element element) { return is_split(element) ? 8 : 4; }

// Instructions that cover `depth` of the shared dimension, and a lane's words of a left operand of that depth.
constexpr int instructions(Element element, int depth) { return depth / (bytes_of(element) == 2 ? 16 : 8); }
constexpr int left_words(Element element, int depth) { return instructions(element, depth) * instruction_words(element); }

// x = high + low + at most 2^-23 |x|, of either sign: products ignore the low 13 bits of what they are given, here of `low`.
// An infinity gives a NaN.
__device__ __forceinline__ void split(u32& high, u32& low, u32 x) {
    high = (x + 0x1000) & 0xffffe000;
    low = __float_as_uint(__uint_as_float(x) - __uint_as_float(high));
}

// The words of one instruction, kN = 4 of a left operand or 2 of a right one, from the elements as they are in memory.
template <Element E, int kN>
__device__ __forceinline__ void set_words(Word<E>* words, const Word<E> (&elements)[kN]) {
#pragma unroll
    for (int i = 0; i < kN; ++i) {
        if constexpr (is_split(E)) split(words[i], words[kN + i], elements[i]);
        else if constexpr (E == Element::tf32) words[i] = ptx::cvt_rna_tf32(elements[i]);
        else words[i] = elements[i];
    }
}

// One instruction: d [16][8] += a [16][8 or 16] b [8 or 16][8].
template <Element E>
__device__ __forceinline__ void multiply_words(Sum<E> (&d)[4], const Word<E>* a, const Word<E>* b) {
    const Word<E> left[4] = {a[0], a[1], a[2], a[3]};
    if constexpr (E == Element::float16) ptx::mma_m16n8k16_f16(d, left, b[0], b[1]);
    else if constexpr (E == Element::bfloat16) ptx::mma_m16n8k16_bf16(d, left, b[0], b[1]);
    else if constexpr (E == Element::float64) ptx::mma_m16n8k8_f64(d, left, b[0], b[1]);
    else ptx::mma_m16n8k8_tf32(d, left, b[0], b[1]);
}

// d [16][8] += a [16][depth] b [depth][8]. The instructions cut float32 sums toward zero, so that errors of one sign would
// add up over a long chain of them: products of split operands start from zero, the small ones first, and their sum is
// added by an addition that rounds to nearest.
template <Element E, int kLeft, int kRight>
__device__ __forceinline__ void mma(Sum<E> (&d)[4], const Word<E> (&a)[kLeft], const Word<E> (&b)[kRight]) {
    static_assert(kLeft == 2 * kRight);
    if constexpr (is_split(E)) {
        float sum[4] = {};
#pragma unroll
        for (int i = 0; i < kLeft; i += 8) {
            multiply_words<E>(sum, a + i + 4, b + i / 2);  // a2 b1
            multiply_words<E>(sum, a + i, b + i / 2 + 2);  // a1 b2
        }
#pragma unroll
        for (int i = 0; i < kLeft; i += 8) multiply_words<E>(sum, a + i, b + i / 2);  // a1 b1
#pragma unroll
        for (int e = 0; e < 4; ++e) d[e] += sum[e];
    } else {
#pragma unroll
        for (int i = 0; i < kLeft; i += 4) multiply_words<E>(d, a + i, b + i / 2);
    }
}

}  // namespace cuflash
