// What a mask's expression is made of. The unit of a masked kernel defines `struct Mask`, whose `visible(at)` is the
// expression in these functions. `at` gives the indices of one score (ScoreAt), and the expression is a bool; or those
// of a whole tile as intervals (TileAt), and it is a Truth: what holds of every score of the tile.
#pragma once

#include "attention/work.cuh"
#include "ptx/mask.cuh"

namespace cuflash {

// Of a kernel without a mask.
struct NoMask {
    static constexpr bool kByBatch = false, kByHead = false;
    using Whole = int;
};

// All whole numbers from low to high, and the same of float64. Python has proven that no bound overflows.
struct Interval {
    i64 low, high;

    __device__ __forceinline__ bool is_point() const { return low == high; }
};
struct RealInterval {
    double low, high;
};
constexpr double kUnboundedReal = __builtin_bit_cast(double, 0x7ff0000000000000ll);

// Whether a statement surely holds of every score of a tile, or surely of none. Both come from positive evidence, so that
// a NaN leaves them false.
struct Truth {
    bool all, none;
};

// Whole numbers and truths of one score. Reals are float64, each operation rounded by itself as on the CPU.
template <class A, class B> __device__ __forceinline__ auto add(A a, B b) { return a + b; }
template <class A, class B> __device__ __forceinline__ auto sub(A a, B b) { return a - b; }
template <class A, class B> __device__ __forceinline__ auto mul(A a, B b) { return a * b; }
template <class A> __device__ __forceinline__ auto negative(A a) { return -a; }
template <class A> __device__ __forceinline__ auto absolute(A a) { return a < 0 ? -a : a; }
template <class A, class B> __device__ __forceinline__ auto minimum(A a, B b) { return a < b ? a : b; }
template <class A, class B> __device__ __forceinline__ auto maximum(A a, B b) { return a > b ? a : b; }
template <class A, class B> __device__ __forceinline__ auto bit_and(A a, B b) { return a & b; }
template <class A, class B> __device__ __forceinline__ auto bit_or(A a, B b) { return a | b; }
template <class A, class B> __device__ __forceinline__ auto bit_xor(A a, B b) { return a ^ b; }
template <class A, class B> __device__ __forceinline__ auto shift_left(A a, B b) { return a << b; }
template <class A, class B> __device__ __forceinline__ auto shift_right(A a, B b) { return a >> b; }
template <class A, class B> __device__ __forceinline__ bool less(A a, B b) { return a < b; }
template <class A, class B> __device__ __forceinline__ bool less_equal(A a, B b) { return a <= b; }
template <class A, class B> __device__ __forceinline__ bool equal(A a, B b) { return a == b; }
template <class A, class B> __device__ __forceinline__ bool not_equal(A a, B b) { return a != b; }
template <class A, class B> __device__ __forceinline__ auto choose(bool c, A a, B b) { return c ? a : b; }
template <class A> __device__ __forceinline__ double to_real(A a) { return static_cast<double>(a); }
__device__ __forceinline__ int to_whole(bool a) { return a; }
__device__ __forceinline__ bool logical_and(bool a, bool b) { return a && b; }
__device__ __forceinline__ bool logical_or(bool a, bool b) { return a || b; }
__device__ __forceinline__ bool logical_xor(bool a, bool b) { return a != b; }
__device__ __forceinline__ bool logical_not(bool a) { return !a; }
__device__ __forceinline__ double add(double a, double b) { return ptx::add_rn(a, b); }
__device__ __forceinline__ double sub(double a, double b) { return ptx::sub_rn(a, b); }
__device__ __forceinline__ double mul(double a, double b) { return ptx::mul_rn(a, b); }
__device__ __forceinline__ double quotient(double a, double b) { return ptx::div_rn(a, b); }
// Of a NaN and a number the NaN, as NumPy has it.
__device__ __forceinline__ double minimum(double a, double b) { return a < b || a != a ? a : b; }
__device__ __forceinline__ double maximum(double a, double b) { return a > b || a != a ? a : b; }

// Rounded towards minus infinity; b > 0.
template <class A, class B>
__device__ __forceinline__ auto floor_div(A a, B b) {
    const auto quotient = a / b;
    return a % b < 0 ? quotient - 1 : quotient;
}
template <class A, class B>
__device__ __forceinline__ auto floor_mod(A a, B b) {
    const auto rest = a % b;
    return rest < 0 ? rest + b : rest;
}

// The same of a whole tile.
__device__ __forceinline__ Interval hull(Interval a, Interval b) { return {min(a.low, b.low), max(a.high, b.high)}; }
__device__ __forceinline__ Interval add(Interval a, Interval b) { return {a.low + b.low, a.high + b.high}; }
__device__ __forceinline__ Interval sub(Interval a, Interval b) { return {a.low - b.high, a.high - b.low}; }
__device__ __forceinline__ Interval negative(Interval a) { return {-a.high, -a.low}; }
__device__ __forceinline__ Interval mul(Interval a, Interval b) {
    const i64 p = a.low * b.low, q = a.low * b.high, r = a.high * b.low, s = a.high * b.high;
    return {min(min(p, q), min(r, s)), max(max(p, q), max(r, s))};
}
__device__ __forceinline__ Interval absolute(Interval a) {
    const i64 low = a.low < 0 ? -a.low : a.low, high = a.high < 0 ? -a.high : a.high;
    return {a.low <= 0 && 0 <= a.high ? 0 : min(low, high), max(low, high)};
}
__device__ __forceinline__ Interval minimum(Interval a, Interval b) { return {min(a.low, b.low), min(a.high, b.high)}; }
__device__ __forceinline__ Interval maximum(Interval a, Interval b) { return {max(a.low, b.low), max(a.high, b.high)}; }
__device__ __forceinline__ Interval floor_div(Interval a, Interval b) {
    return hull({floor_div(a.low, b.low), floor_div(a.high, b.low)}, {floor_div(a.low, b.high), floor_div(a.high, b.high)});
}
__device__ __forceinline__ Interval floor_mod(Interval a, Interval b) {
    if (b.is_point() && floor_div(a.low, b.low) == floor_div(a.high, b.low)) {
        return {floor_mod(a.low, b.low), floor_mod(a.high, b.low)};
    }
    return {0, b.high - 1};
}
// The least 2^n - 1 that is not below a >= 0.
__device__ __forceinline__ i64 all_bits(i64 a) { return a == 0 ? 0 : static_cast<i64>(~u64{0} >> __clzll(a)); }
constexpr Interval kAnyWhole{-0x7fffffffffffffffll - 1, 0x7fffffffffffffffll};
// Bitwise operations: exact of points, else bounded by the bits of what is not negative.
__device__ __forceinline__ Interval bit_and(Interval a, Interval b) {
    if (a.is_point() && b.is_point()) return {a.low & b.low, a.low & b.low};
    if (a.low >= 0 && b.low >= 0) return {0, min(a.high, b.high)};
    return a.low >= 0 ? Interval{0, a.high} : b.low >= 0 ? Interval{0, b.high} : kAnyWhole;
}
__device__ __forceinline__ Interval bit_or(Interval a, Interval b) {
    if (a.is_point() && b.is_point()) return {a.low | b.low, a.low | b.low};
    return a.low >= 0 && b.low >= 0 ? Interval{max(a.low, b.low), all_bits(a.high | b.high)} : kAnyWhole;
}
__device__ __forceinline__ Interval bit_xor(Interval a, Interval b) {
    if (a.is_point() && b.is_point()) return {a.low ^ b.low, a.low ^ b.low};
    return a.low >= 0 && b.low >= 0 ? Interval{0, all_bits(a.high | b.high)} : kAnyWhole;
}
__device__ __forceinline__ Interval shift_left(Interval a, Interval b) {
    return hull({a.low << b.low, a.high << b.low}, {a.low << b.high, a.high << b.high});
}
__device__ __forceinline__ Interval shift_right(Interval a, Interval b) {
    return hull({a.low >> b.low, a.high >> b.low}, {a.low >> b.high, a.high >> b.high});
}
__device__ __forceinline__ Truth less(Interval a, Interval b) { return {a.high < b.low, a.low >= b.high}; }
__device__ __forceinline__ Truth less_equal(Interval a, Interval b) { return {a.high <= b.low, a.low > b.high}; }
__device__ __forceinline__ Truth equal(Interval a, Interval b) {
    return {a.is_point() && b.is_point() && a.low == b.low, a.high < b.low || b.high < a.low};
}

// Reals: rounding is monotone, so the bounds of a sum are the sums of bounds. Infinite bounds may give NaN, which proves
// nothing.
__device__ __forceinline__ RealInterval hull(RealInterval a, RealInterval b) {
    return {a.low < b.low ? a.low : b.low, a.high > b.high ? a.high : b.high};
}
constexpr RealInterval kAnyReal{-kUnboundedReal, kUnboundedReal};
__device__ __forceinline__ RealInterval add(RealInterval a, RealInterval b) { return {add(a.low, b.low), add(a.high, b.high)}; }
__device__ __forceinline__ RealInterval sub(RealInterval a, RealInterval b) { return {sub(a.low, b.high), sub(a.high, b.low)}; }
__device__ __forceinline__ RealInterval negative(RealInterval a) { return {-a.high, -a.low}; }
__device__ __forceinline__ RealInterval mul(RealInterval a, RealInterval b) {
    const double p = mul(a.low, b.low), q = mul(a.low, b.high), r = mul(a.high, b.low), s = mul(a.high, b.high);
    if (!(p - p == 0 && q - q == 0 && r - r == 0 && s - s == 0)) return kAnyReal;  // an infinite or undefined bound
    return {fmin(fmin(p, q), fmin(r, s)), fmax(fmax(p, q), fmax(r, s))};
}
__device__ __forceinline__ RealInterval quotient(RealInterval a, RealInterval b) {
    if (!(b.low > 0 || b.high < 0)) return kAnyReal;
    const double p = quotient(a.low, b.low), q = quotient(a.low, b.high), r = quotient(a.high, b.low), s = quotient(a.high, b.high);
    if (!(p - p == 0 && q - q == 0 && r - r == 0 && s - s == 0)) return kAnyReal;
    return {fmin(fmin(p, q), fmin(r, s)), fmax(fmax(p, q), fmax(r, s))};
}
__device__ __forceinline__ RealInterval absolute(RealInterval a) {
    const double low = fabs(a.low), high = fabs(a.high);
    return {a.low > 0 || a.high < 0 ? fmin(low, high) : 0.0, low > high ? low : high};
}
__device__ __forceinline__ RealInterval minimum(RealInterval a, RealInterval b) { return {minimum(a.low, b.low), minimum(a.high, b.high)}; }
__device__ __forceinline__ RealInterval maximum(RealInterval a, RealInterval b) { return {maximum(a.low, b.low), maximum(a.high, b.high)}; }
__device__ __forceinline__ Truth less(RealInterval a, RealInterval b) { return {a.high < b.low, a.low >= b.high}; }
__device__ __forceinline__ Truth less_equal(RealInterval a, RealInterval b) { return {a.high <= b.low, a.low > b.high}; }
__device__ __forceinline__ Truth equal(RealInterval a, RealInterval b) {
    return {a.low == a.high && b.low == b.high && a.low == b.low, a.high < b.low || b.high < a.low};
}
__device__ __forceinline__ RealInterval to_real(Interval a) { return {static_cast<double>(a.low), static_cast<double>(a.high)}; }

__device__ __forceinline__ Truth logical_and(Truth a, Truth b) { return {a.all && b.all, a.none || b.none}; }
__device__ __forceinline__ Truth logical_or(Truth a, Truth b) { return {a.all || b.all, a.none && b.none}; }
__device__ __forceinline__ Truth logical_not(Truth a) { return {a.none, a.all}; }
__device__ __forceinline__ Truth logical_xor(Truth a, Truth b) {
    return {(a.all && b.none) || (a.none && b.all), (a.all && b.all) || (a.none && b.none)};
}
__device__ __forceinline__ Truth equal(Truth a, Truth b) { return logical_not(logical_xor(a, b)); }
template <class A>
__device__ __forceinline__ Truth not_equal_of(A a, A b) { return logical_not(equal(a, b)); }
__device__ __forceinline__ Truth not_equal(Interval a, Interval b) { return not_equal_of(a, b); }
__device__ __forceinline__ Truth not_equal(RealInterval a, RealInterval b) { return not_equal_of(a, b); }
__device__ __forceinline__ Truth not_equal(Truth a, Truth b) { return not_equal_of(a, b); }
__device__ __forceinline__ Interval to_whole(Truth a) { return {a.all, !a.none}; }
__device__ __forceinline__ Interval choose(Truth c, Interval a, Interval b) { return c.all ? a : c.none ? b : hull(a, b); }
__device__ __forceinline__ RealInterval choose(Truth c, RealInterval a, RealInterval b) {
    return c.all ? a : c.none ? b : hull(a, b);
}
__device__ __forceinline__ Truth choose(Truth c, Truth a, Truth b) {
    return c.all ? a : c.none ? b : Truth{a.all && b.all, a.none && b.none};
}

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

// The same of the queries [first, last] against the keys [first, last] of a tile.
template <class Params>
struct TileAt {
    const Params& params;
    const Sequence& sequence;
    int head_index;
    Interval queries, keys;

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

    // Known where every index is; of an ascending table also where all but the last are.
    template <int I, class T, class... Indices>
    __device__ __forceinline__ auto table(Indices... indices) const {
        i64 offset = 0;
        int axis = 0;
        ((offset += indices.low * table_stride<I>(params, axis++)), ...);
        if (!(indices.is_point() && ...)) return anything<T>();
        const T value = ptx::load_constant(static_cast<const T*>(params.mask_tables[I]) + offset);
        return between(value, value);
    }
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
                                       int query_end, int key_begin, int key_end) {
    const TileAt<Params> at{params, sequence, head, {query_begin, query_end - 1}, {key_begin, key_end - 1}};
    return Mask::visible(at);
}

// Whether a mask shows a key to a query, both of which exist.
template <class Mask, class Params>
__device__ __forceinline__ bool shows(const Params& params, const Sequence& sequence, int head, int query, int key) {
    const ScoreAt<Mask, Params> at{params, sequence, head, query, key};
    return Mask::visible(at);
}

}  // namespace cuflash
