// From raw products Q K^T to scores in base-2 units: scale, soft cap, bias, mask.
#pragma once

#include "attention/key_tiles.cuh"
#include "attention/mask.cuh"
#include "tile/element.cuh"
#include "tile/functions.cuh"

namespace cuflash {

template <class T>
constexpr T kLog2E = static_cast<T>(1.4426950408889634);
template <class T>
constexpr T kLn2 = static_cast<T>(0.6931471805599453);
constexpr float kInfinity = __builtin_bit_cast(float, 0x7f800000);

// tanh x within 3e-7 relative: an odd polynomial where 1 - 2 / (1 + e^2x) would cancel.
__device__ __forceinline__ float tanh_accurate(float x) {
    const float u = x * x;
    const float series = fmaf(fmaf(fmaf(fmaf(-0.005717044697f, u, 0.02065058611f), u, -0.0537434965f), u,
                                   0.1333149076f), u, -0.3333328366f);
    const float near_zero = fmaf(x * u, series, x);
    const float far = fmaf(-2.0f, ptx::rcp(1.0f + ptx::ex2(2.0f * kLog2E<float> * fabsf(x))), 1.0f);
    return u < 0.36f ? near_zero : copysignf(far, x);
}

__device__ __forceinline__ double tanh_accurate(double x) { return tanh(x); }

// What scores are multiplied by, and their cap, in the type that they are computed in.
template <class T, class Params>
__device__ __forceinline__ T scale_of(const Params& params) {
    if constexpr (sizeof(T) == 8) return params.scale64;
    else return params.scale;
}
template <class T, class Params>
__device__ __forceinline__ T softcap_of(const Params& params) {
    if constexpr (sizeof(T) == 8) return params.softcap64;
    else return params.softcap;
}

// Takes the derivatives of the soft cap where no one wants them, or where there is none.
struct NoSlope {
    template <class T>
    __device__ __forceinline__ void set(int, int, int, T) {}
    __device__ __forceinline__ float at(int, int, int) const { return 1.0f; }
};

// Turns a register tile S[kM][kN][4] of raw products into base-2 scores. Its rows are row + 16m + 8h (h = 0, 1), its
// columns first + column + 8n + e (e = 0, 1): queries by keys or, transposed, keys by queries. Raw products stay as they
// are where only a scale is asked for: it is folded into an exponent, as `multiplier`.
template <auto C, class Params, class Mask, bool kTransposed = false>
struct ScoreRule {
    using T = Sum<C.dtype>;
    static constexpr bool kBiased = C.bias_dtype != Element::none;
    static constexpr bool kRaw = !C.softcapped && !kBiased;
    static constexpr bool kGrouped = has_grouped_rows(C);

    const Params& params;
    const Sequence& sequence;
    const Span& columns;  // of the array of scores that exist in a cut tile
    const char* head_bias = nullptr;  // bias of this batch entry and head
    int head;
    int row;     // this lane's first row
    int column;  // this lane's first column of a tile

    __device__ __forceinline__ ScoreRule(const Params& params, const Sequence& sequence, int head, const Span& columns,
                                         int row, int column)
        : params(params), sequence(sequence), columns(columns), head(head), row(row), column(column) {
        if constexpr (kBiased) {
            const i64 offset = sequence.sequence * params.bias_strides[0] + head * params.bias_strides[1];
            head_bias = static_cast<const char*>(params.bias) + offset * bytes_of(C.bias_dtype);
        }
    }

    // Of a row that belongs to a query, where heads of a group share a tile: which query and which head. Else a row is a
    // query, or transposed a key.
    __device__ __forceinline__ int query_of(int row) const { return kGrouped ? row / params.group : row; }
    __device__ __forceinline__ int head_of(int row) const { return kGrouped ? head + row % params.group : head; }
    __device__ __forceinline__ const char* bias_of(int row) const {
        if constexpr (!kGrouped) return head_bias;
        else return head_bias + row % params.group * params.bias_strides[1] * bytes_of(C.bias_dtype);
    }

    // Base-2 score of what `apply` leaves in S: multiplier * S.
    __device__ __forceinline__ T multiplier() const { return kRaw ? scale_of<T>(params) * kLog2E<T> : T{1}; }

    // Scores of one tile; `cut`: some of its keys are hidden from some queries. `slope` is given the derivatives of the
    // soft cap.
    template <int kM, int kN, class Slope>
    __device__ __forceinline__ void apply(T (&S)[kM][kN][4], Slope& slope, int first, bool cut) const {
        if constexpr (kBiased) {
            if (cut) transform_rows<true>(S, slope, first + column);
            else transform_rows<false>(S, slope, first + column);
        } else if constexpr (C.softcapped) {
            transform_rows<false>(S, slope, first + column);
        }
        if (!cut) return;
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                if constexpr (C.mask) select(S[m], h, row + 16 * m + 8 * h, first + column);
                else mask(S[m], h, row + 16 * m + 8 * h, first + column);
            }
    }

    template <int kM, int kN>
    __device__ __forceinline__ void apply(T (&S)[kM][kN][4], int first, bool cut) const {
        NoSlope none;
        apply(S, none, first, cut);
    }

    template <bool kCut, int kM, int kN, class Slope>
    __device__ __forceinline__ void transform_rows(T (&S)[kM][kN][4], Slope& slope, int first) const {
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) transform<kCut>(S[m], slope, m, h, row + 16 * m + 8 * h, first);
    }

    // S = softcap(scale S) + bias, times log2 e. Of a bias the elements of the tile's existing scores are read, masked or
    // not.
    template <bool kCut, int kN, class Slope>
    __device__ __forceinline__ void transform(T (&S)[kN][4], Slope& slope, int m, int h, int row, int first) const {
        const T scale = scale_of<T>(params), softcap = softcap_of<T>(params);
        const T inner = C.softcapped ? scale / softcap : scale * kLog2E<T>;
        const i64 row_stride = params.bias_strides[kTransposed ? 3 : 2];
        const i64 column_stride = params.bias_strides[kTransposed ? 2 : 3];
        const char* bias = bias_of(row) + (query_of(row) * row_stride + first * column_stride) * bytes_of(C.bias_dtype);
        const i64 step = 8 * column_stride * bytes_of(C.bias_dtype);  // bytes from one n to the next
        const int begin = columns.begin - first, end = columns.end - first;
#pragma unroll
        for (int n = 0; n < kN; ++n, bias += step)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                T score = S[n][2 * h + e] * inner;
                if constexpr (C.softcapped) {
                    const T t = tanh_accurate(score);
                    slope.set(m, n, 2 * h + e, fma(-t, t, T{1}));
                    score = softcap * kLog2E<T> * t;
                }
                if constexpr (kBiased) {
                    const bool exists = query_of(row) < (kTransposed ? sequence.len_k : sequence.len_q);
                    if (exists && (!kCut || (begin <= 8 * n + e && 8 * n + e < end))) {
                        score = fma(static_cast<T>(load_element<C.bias_dtype>(bias, e * column_stride)), kLog2E<T>, score);
                    }
                }
                S[n][2 * h + e] = score;
            }
    }

    // S = -inf where the key is not visible to the query: a select, so that whatever stood there is gone.
    template <int kN>
    __device__ __forceinline__ void mask(T (&S)[kN][4], int h, int row, int first) const {
        const Window window(params, sequence);
        int begin = 0, end;
        if constexpr (kTransposed) {
            if constexpr (C.windowed) begin = window.begin_query(row);
            end = row >= sequence.len_k ? 0 : C.windowed ? window.end_query(row) : sequence.len_q;
        } else {
            if constexpr (C.windowed) begin = window.begin(query_of(row));
            end = C.windowed ? window.end(query_of(row)) : sequence.len_k;
        }
        begin -= first, end -= first;
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const bool visible = 8 * n + e < end && (!C.windowed || 8 * n + e >= begin);
                S[n][2 * h + e] = visible ? S[n][2 * h + e] : static_cast<T>(-kInfinity);
            }
    }

    // The same by the expression of a mask, a bit for each score of the row. The loop is unrolled in part alone: the
    // expression may be long, and stands in the kernel four times a row. It sees only indices that exist.
    template <int kN>
    __device__ __forceinline__ void select(T (&S)[kN][4], int h, int row, int first) const {
        static_assert(kN <= 16);
        const int last_query = sequence.len_q - 1, last_key = sequence.len_k - 1;
        const int last_row = kTransposed ? last_key : last_query, last_column = kTransposed ? last_query : last_key;
        u32 visible = 0;
#pragma unroll 4
        for (int i = 0; i < 2 * kN; ++i) {
            const int column = first + i / 2 * 8 + i % 2;
            const int r = min(query_of(row), last_row), c = min(column, last_column);
            const bool shown = shows<Mask>(params, sequence, head_of(row), kTransposed ? c : r, kTransposed ? r : c);
            visible |= static_cast<u32>(shown && query_of(row) <= last_row && column <= last_column) << i;
        }
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                S[n][2 * h + e] = visible >> (2 * n + e) & 1 ? S[n][2 * h + e] : static_cast<T>(-kInfinity);
            }
    }
};

}  // namespace cuflash
