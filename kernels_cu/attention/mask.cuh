// Where a mask is evaluated. The unit of a masked kernel defines `struct Mask`, whose `visible(at)` is the
// expression in functions of mask_values.cuh or mask_intervals.cuh. `at` gives the indices of one score (ScoreAt), and the
// expression is a bool; or those of a whole tile as intervals (TileAt), and it is a Truth: what holds of all its scores.
#pragma once

#include "attention/mask_intervals.cuh"
#include "attention/work.cuh"
#include "ptx/copy.cuh"

namespace cuflash {

// Of a kernel without a mask.
struct NoMask {
    static constexpr bool kByBatch = false, kByHead = false;
    using Whole = int;
};

// Where an element of table I lies: indices are within the table, as Python has proven.
template <int I, class Params>
__device__ __forceinline__ i64 table_stride(const Params& params, int axis) {
    return params.mask_strides[4 * I + axis];
}

// The indices of one score, and what the expression looks up with them.
template <class Mask, class Params>
struct ScoreAt {
    using Whole = typename Mask::Whole;
    const Params& params;
    const Sequence& sequence;
    int head_index, query, key;

    __device__ __forceinline__ Whole batch() const { return sequence.sequence; }
    __device__ __forceinline__ Whole head() const { return head_index; }
    __device__ __forceinline__ Whole kv_head() const { return head_index / params.group; }
    __device__ __forceinline__ Whole q() const { return query; }
    __device__ __forceinline__ Whole k() const { return key; }
    __device__ __forceinline__ Whole len_q() const { return sequence.len_q; }
    __device__ __forceinline__ Whole len_k() const { return sequence.len_k; }
    __device__ __forceinline__ Whole q_token() const { return sequence.q_start + query; }
    __device__ __forceinline__ Whole k_token() const { return sequence.k_start + key; }
    __device__ __forceinline__ Whole whole(int i) const { return static_cast<Whole>(params.mask_wholes[i]); }
    __device__ __forceinline__ double real(int i) const { return params.mask_reals[i]; }
    __device__ __forceinline__ Whole literal(Whole value) const { return value; }
    __device__ __forceinline__ bool truth(bool value) const { return value; }

    template <int I, class T, class... Indices>
    __device__ __forceinline__ auto table(Indices... indices) const {
        i64 offset = 0;
        int axis = 0;
        ((offset += indices * table_stride<I>(params, axis++)), ...);
        const T value = ptx::load_constant(static_cast<const T*>(params.mask_tables[I]) + offset);
        if constexpr (sizeof(T) == 1) return value != 0;
        else if constexpr (static_cast<T>(0.5) != 0) return static_cast<double>(value);
        else return static_cast<Whole>(value);
    }
    template <int I, class T, class... Indices>
    __device__ __forceinline__ auto ascending_table(Indices... indices) const {
        return table<I, T>(indices...);
    }
};

constexpr int kMostLookups = 256;  // elements of a table that one tile may look up

// The same of the queries [first, last] against the keys [first, last] of a tile.
template <class Params>
struct TileAt {
    const Params& params;
    const Sequence& sequence;
    int head_index;
    Interval queries, keys;
    int most_lookups;  // elements of a table

    static __device__ __forceinline__ Interval point(i64 value) { return {value, value}; }
    __device__ __forceinline__ Interval batch() const { return point(sequence.sequence); }
    __device__ __forceinline__ Interval head() const { return point(head_index); }
    __device__ __forceinline__ Interval kv_head() const { return point(head_index / params.group); }
    __device__ __forceinline__ Interval q() const { return queries; }
    __device__ __forceinline__ Interval k() const { return keys; }
    __device__ __forceinline__ Interval len_q() const { return point(sequence.len_q); }
    __device__ __forceinline__ Interval len_k() const { return point(sequence.len_k); }
    __device__ __forceinline__ Interval q_token() const { return add(point(sequence.q_start), queries); }
    __device__ __forceinline__ Interval k_token() const { return add(point(sequence.k_start), keys); }
    __device__ __forceinline__ Interval whole(int i) const { return point(params.mask_wholes[i]); }
    __device__ __forceinline__ RealInterval real(int i) const { return {params.mask_reals[i], params.mask_reals[i]}; }
    __device__ __forceinline__ Interval literal(i64 value) const { return point(value); }
    __device__ __forceinline__ Truth truth(bool value) const { return {value, !value}; }

    template <class T>
    static __device__ __forceinline__ auto between(T low, T high) {
        if constexpr (sizeof(T) == 1) return Truth{low != 0 && high != 0, low == 0 && high == 0};
        else if constexpr (static_cast<T>(0.5) != 0) return RealInterval{static_cast<double>(low), static_cast<double>(high)};
        else return Interval{static_cast<i64>(low), static_cast<i64>(high)};
    }
    template <class T>
    static __device__ __forceinline__ auto anything() {
        if constexpr (sizeof(T) == 1) return Truth{false, false};
        else if constexpr (static_cast<T>(0.5) != 0) return kAnyReal;
        else if constexpr (sizeof(T) == 4) return Interval{-0x80000000ll, 0x7fffffffll};
        else return kAnyWhole;
    }

    // Bounded by the elements that the indices may ask for, where those are few: the documents of a tile's queries, blocks
    // that are smaller than a tile. Indices that hang on lookups of which too little is known may leave the table.
    template <int I, class T, class... Indices>
    __device__ __forceinline__ auto table(Indices... indices) const {
        constexpr int kAxes = sizeof...(Indices);
        const Interval spans[kAxes] = {indices...};
        i64 count = 1;
#pragma unroll
        for (int axis = 0; axis < kAxes; ++axis) {
            const Interval span = spans[axis];
            if (span.low < 0 || span.high >= params.mask_lengths[4 * I + axis]) return anything<T>();
            count *= span.high - span.low + 1;
        }
        if (count > most_lookups) return anything<T>();
        auto elements = one_of<I, T>(spans, 0);
        for (int i = 1; i < count; ++i) elements = hull(elements, one_of<I, T>(spans, i));
        return elements;
    }
    // Element i of a box of indices, the last axis fastest.
    template <int I, class T, int kAxes>
    __device__ __forceinline__ auto one_of(const Interval (&spans)[kAxes], int i) const {
        i64 offset = 0;
#pragma unroll
        for (int axis = kAxes - 1; axis > 0; --axis) {
            const int length = static_cast<int>(spans[axis].high - spans[axis].low + 1);
            offset += (spans[axis].low + i % length) * table_stride<I>(params, axis);
            i /= length;
        }
        offset += (spans[0].low + i) * table_stride<I>(params, 0);
        const T value = ptx::load_constant(static_cast<const T*>(params.mask_tables[I]) + offset);
        return between(value, value);
    }
    // The same of a table that ascends along its last axis: that axis may be any interval.
    template <int I, class T, class... Indices>
    __device__ __forceinline__ auto ascending_table(Indices... indices) const {
        constexpr int kLast = sizeof...(Indices) - 1;
        i64 low = 0, high = 0;
        int axis = 0, points = 0;
        ((points += indices.is_point() || axis == kLast, low += indices.low * table_stride<I>(params, axis),
          high += indices.high * table_stride<I>(params, axis), ++axis), ...);
        if (points != kLast + 1) return anything<T>();
        const T* array = static_cast<const T*>(params.mask_tables[I]);
        return between(ptx::load_constant(array + low), ptx::load_constant(array + high));
    }
};

// What a mask says of a tile as far as intervals tell.
template <class Mask, class Params>
__device__ __forceinline__ Truth judge(const Params& params, const Sequence& sequence, int head, int query_begin,
                                       int query_end, int key_begin, int key_end, int most_lookups = kMostLookups) {
    const TileAt<Params> at{params, sequence, head, {query_begin, query_end - 1}, {key_begin, key_end - 1}, most_lookups};
    return Mask::visible(at);
}

// Whether a mask shows a key to a query, both of which exist.
template <class Mask, class Params>
__device__ __forceinline__ bool shows(const Params& params, const Sequence& sequence, int head, int query, int key) {
    const ScoreAt<Mask, Params> at{params, sequence, head, query, key};
    return Mask::visible(at);
}

}  // namespace cuflash
