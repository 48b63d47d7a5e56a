// Merging partial attention states of one row: outputs o_s normalised by their own sums, and lse_s (natural log).
//
// With m = max_s lse_s:  lse = m + log sum_s e^(lse_s - m),  o = sum_s e^(lse_s - lse) o_s.  All -inf: (0, -inf).
//
// What a row waits for is memory, so a warp asks for as many states as its registers hold before it adds the first, and of
// many states each warp of a block takes its part. The order of all sums follows from the number of states alone.
#pragma once

#include "attention/params.cuh"
#include "attention/scores.cuh"
#include "tile/element.cuh"
#include "tile/product.cuh"

namespace cuflash {

// Which row a warp merges.
struct Row {
    i64 batch, head, token;

    __device__ __forceinline__ i64 token_offset(const i64 (&strides)[3]) const {
        return batch * strides[0] + token * strides[1] + head * strides[2];
    }
    __device__ __forceinline__ i64 lse_offset(const i64 (&strides)[3]) const {
        return batch * strides[0] + head * strides[1] + token * strides[2];
    }
};

// How a warp's lanes share a row: kVector columns each, and those kSpan further. kAtOnce states are under way.
template <CombineConfig C>
struct MergeLanes {
    static constexpr int widest() {
        int n = 1;
        while (2 * n * bytes_of(C.state_dtype) <= C.load_bytes && 64 * n <= C.head_dim_v) n *= 2;
        return n;
    }
    static constexpr int kVector = widest(), kSpan = 32 * kVector, kSteps = (C.head_dim_v + kSpan - 1) / kSpan;
    static constexpr int most() {
        int n = 8;
        while (n > 1 && n * kSteps * kVector * sizeof(Sum<C.state_dtype>) > 128) n /= 2;  // of a lane's registers
        return n;
    }
    static constexpr int kAtOnce = most();
};

// e^(x - reference); a reference of -inf is that of states that saw nothing.
template <class T>
__device__ __forceinline__ T weight_of(T x, T reference) {
    return exp2_of((x - (reference == -kInfinity ? 0 : reference)) * kLog2E<T>);
}

// A part of a row's states, as its warp has them so far, o not yet divided by l.
template <CombineConfig C>
struct MergedPart {
    using T = Sum<C.state_dtype>;
    using Lanes = MergeLanes<C>;
    T m = -kInfinity, l = 0;
    T o[Lanes::kSteps][Lanes::kVector] = {};

    // States first, first + kStride, ... below count; of the arrays the row that begins at these offsets.
    template <int kStride, class States>
    __device__ __forceinline__ void add(const States& states, int first, i64 offset, i64 lse_offset, int lane) {
        for (; first < states.count; first += 32 * kStride) {  // an lse a lane
            const int count = min(32, ceil_div(states.count - first, kStride));
            const T lse = lane < count ? states.lse(first + kStride * lane)[lse_offset] : static_cast<T>(-kInfinity);
            T parts[Lanes::kAtOnce][Lanes::kSteps][Lanes::kVector];
            const auto load = [&](int begin) {
#pragma unroll
                for (int i = 0; i < Lanes::kAtOnce; ++i) {
                    if (begin + i < count) load_columns(parts[i], states.out(first + kStride * (begin + i)), offset, lane);
                }
            };
            load(0);
            const T grown = larger(m, warp_max(lse)), weight = weight_of(lse, grown), decay = weight_of(m, grown);
            m = grown;
            l = l * decay + warp_sum(weight);
            each_column([&](int j, int e, int) { o[j][e] *= decay; }, lane);
            for (int begin = 0;;) {
#pragma unroll
                for (int i = 0; i < Lanes::kAtOnce; ++i) {
                    const T w = ptx::shfl_idx(weight, begin + i);  // 0 past the last state
                    // A state that saw nothing may hold anything.
                    each_column([&](int j, int e, int) {
                        o[j][e] = w == 0 ? o[j][e] : fma(w, parts[i][j][e], o[j][e]);
                    }, lane);
                }
                if ((begin += Lanes::kAtOnce) >= count) break;
                load(begin);
            }
        }
    }

    static __device__ __forceinline__ void load_columns(T (&to)[Lanes::kSteps][Lanes::kVector], const void* array,
                                                        i64 offset, int lane) {
#pragma unroll
        for (int j = 0; j < Lanes::kSteps; ++j) {
            const int column = Lanes::kSpan * j + Lanes::kVector * lane;
            if (column < C.head_dim_v) load_elements<C.state_dtype>(to[j], array, offset + column);
        }
    }

    template <class Do>
    static __device__ __forceinline__ void each_column(const Do& what, int lane) {
#pragma unroll
        for (int j = 0; j < Lanes::kSteps; ++j)
#pragma unroll
            for (int e = 0; e < Lanes::kVector; ++e) what(j, e, Lanes::kSpan * j + Lanes::kVector * lane + e);
    }
};

// The block's rows: one, or one a warp. `states_of(row)` says where the states of a row lie, and how many there are.
template <CombineConfig C, class StatesOf>
__device__ __forceinline__ void merge_row(const CombineParams& params, const StatesOf& states_of) {
    using Part = MergedPart<C>;
    using T = typename Part::T;
    constexpr int kWarps = C.row_warps;
    const int thread = ptx::thread_index(), lane = thread % 32, warp = thread / 32;
    const i64 index = static_cast<i64>(blockIdx.x) * (C.num_warps / kWarps) + warp / kWarps;  // (batch, head, token)
    if (index >= params.rows) return;
    const Row row{index / params.seqlen_q / params.num_heads, index / params.seqlen_q % params.num_heads,
                  index % params.seqlen_q};
    const i64 o_offset = row.token_offset(params.o_strides);
    Part part;
    part.template add<kWarps>(states_of(row), warp % kWarps, row.token_offset(params.state_strides),
                              row.lse_offset(params.state_lse_strides), lane);
    T m = part.m, l = part.l;
    if constexpr (kWarps == 1) {
        const T inverse = l == 0 ? 0 : reciprocal(l);
        Part::each_column([&](int j, int e, int column) {
            if (column < C.head_dim_v) store_element<C.out_dtype>(params.o, o_offset + column, part.o[j][e] * inverse);
        }, lane);
    } else {
        using Lanes = MergeLanes<C>;
        constexpr int kPlaces = Lanes::kSteps * Lanes::kSpan;  // of a row, lanes side by side: no two in a bank
        __shared__ T outs[kWarps][kPlaces];
        __shared__ T peaks[kWarps], sums[kWarps];
        Part::each_column([&](int j, int e, int column) {
            if (column < C.head_dim_v) outs[warp][32 * (Lanes::kVector * j + e) + lane] = part.o[j][e];
        }, lane);
        if (lane == 0) peaks[warp] = m, sums[warp] = l;
        __syncthreads();  // the parts of all warps are there
        m = peaks[0];
#pragma unroll
        for (int i = 1; i < kWarps; ++i) m = larger(m, peaks[i]);
        T weights[kWarps];
        l = 0;
#pragma unroll
        for (int i = 0; i < kWarps; ++i) {
            weights[i] = weight_of(peaks[i], m);
            l += weights[i] * sums[i];
        }
        const T inverse = l == 0 ? 0 : reciprocal(l);
        for (int place = thread; place < kPlaces; place += 32 * kWarps) {
            const int item = place / 32;  // of the lane
            const int column = item / Lanes::kVector * Lanes::kSpan + Lanes::kVector * lane + item % Lanes::kVector;
            if (column >= C.head_dim_v) continue;
            T o = 0;
#pragma unroll
            for (int i = 0; i < kWarps; ++i) o = fma(weights[i], outs[i][place], o);
            store_element<C.out_dtype>(params.o, o_offset + column, o * inverse);
        }
    }
    if (params.lse != nullptr && lane == 0 && warp % kWarps == 0) {
        static_cast<T*>(params.lse)[row.lse_offset(params.lse_strides)] =
            l == 0 ? static_cast<T>(-kInfinity) : m + kLn2<T> * log2_of(l);
    }
}

}  // namespace cuflash
