// From raw products Q K^T to scores in base-2 units: scale, soft cap, bias, mask.
#pragma once

#include "attention/key_tiles.cuh"
#include "tile/element.cuh"

namespace cuflash {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kInfinity = __builtin_bit_cast(float, 0x7f800000);

// tanh x within 3e-7 relative: an odd polynomial where 1 - 2 / (1 + e^2x) would cancel.
__device__ __forceinline__ float tanh_accurate(float x) {
    const float u = x * x;
    const float series = fmaf(fmaf(fmaf(fmaf(-0.005717044697f, u, 0.02065058611f), u, -0.0537434965f), u,
                                   0.1333149076f), u, -0.3333328366f);
    const float near_zero = fmaf(x * u, series, x);
    const float far = fmaf(-2.0f, ptx::rcp(1.0f + ptx::ex2(2.0f * kLog2E * fabsf(x))), 1.0f);
    return u < 0.36f ? near_zero : copysignf(far, x);
}

// Turns a register tile S[kM][kN][4] of raw products of queries row + 16m + 8h (h = 0, 1) with keys
// first_key + 8n + column + e (e = 0, 1) into scores. Raw products stay as they are where only a scale is asked for: the
// softmax folds it into its exponent, as `multiplier`.
template <ForwardConfig C>
struct ScoreRule {
    static constexpr bool kBiased = C.bias_dtype != Element::none;
    static constexpr bool kRaw = !C.softcapped && !kBiased;

    const ForwardParams& params;
    const Work& work;
    const KeyTiles& tiles;
    const char* head_bias = nullptr;  // bias of this batch entry and head
    int row;     // this lane's first query, of its sequence
    int column;  // this lane's first key, of its tile

    __device__ __forceinline__ ScoreRule(const ForwardParams& params, const Work& work, const KeyTiles& tiles, int row,
                                         int column)
        : params(params), work(work), tiles(tiles), row(row), column(column) {
        if constexpr (kBiased) {
            const i64 offset = work.sequence * params.bias_strides[0] + work.head * params.bias_strides[1];
            head_bias = static_cast<const char*>(params.bias) + offset * bytes_of(C.bias_dtype);
        }
    }

    // Base-2 score of what `apply` leaves in S: multiplier * S.
    __device__ __forceinline__ float multiplier() const { return kRaw ? params.scale * kLog2E : 1.0f; }

    // Scores of one tile; `cut`: some of its keys are hidden from some rows.
    template <int kM, int kN>
    __device__ __forceinline__ void apply(float (&S)[kM][kN][4], int first_key, bool cut) const {
        if constexpr (kBiased) {
            if (cut) transform_rows<true>(S, first_key + column);
            else transform_rows<false>(S, first_key + column);
        } else if constexpr (C.softcapped) {
            transform_rows<false>(S, first_key + column);
        }
        if (!cut) return;
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) mask(S[m], h, row + 16 * m + 8 * h, first_key + column);
    }

    template <bool kCut, int kM, int kN>
    __device__ __forceinline__ void transform_rows(float (&S)[kM][kN][4], int key) const {
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) transform<kCut>(S[m], h, row + 16 * m + 8 * h, key);
    }

    // S = softcap(scale S) + bias, times log2 e. Of a bias the elements of the tile's rows and visible keys are read,
    // masked or not.
    template <bool kCut, int kN>
    __device__ __forceinline__ void transform(float (&S)[kN][4], int h, int row, int key) const {
        const float inner = C.softcapped ? params.scale / params.softcap : params.scale * kLog2E;
        const char* bias =
            head_bias + (row * params.bias_strides[2] + key * params.bias_strides[3]) * bytes_of(C.bias_dtype);
        const i64 step = 8 * params.bias_strides[3] * bytes_of(C.bias_dtype);  // bytes from one n to the next
        const int begin = tiles.key_begin - key, end = tiles.key_end - key;
#pragma unroll
        for (int n = 0; n < kN; ++n, bias += step)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                float score = S[n][2 * h + e] * inner;
                if constexpr (C.softcapped) score = params.softcap * kLog2E * tanh_accurate(score);
                if constexpr (kBiased) {
                    if (row < work.len_q && (!kCut || (begin <= 8 * n + e && 8 * n + e < end))) {
                        const i64 offset = e * params.bias_strides[3];
                        score = fmaf(load_element<C.bias_dtype>(bias, offset), kLog2E, score);
                    }
                }
                S[n][2 * h + e] = score;
            }
    }

    // S = -inf where the key is not visible to the row: a select, so that whatever stood there is gone.
    template <int kN>
    __device__ __forceinline__ void mask(float (&S)[kN][4], int h, int row, int key) const {
        const Window window(params, work);
        const int begin = C.windowed ? window.begin(row) - key : 0;
        const int end = (C.windowed ? window.end(row) : work.len_k) - key;
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const bool visible = 8 * n + e < end && (!C.windowed || 8 * n + e >= begin);
                S[n][2 * h + e] = visible ? S[n][2 * h + e] : -kInfinity;
            }
    }
};

}  // namespace cuflash
