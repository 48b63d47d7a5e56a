// What the expression of a mask is made of, for all scores of a tile at once: bounds of what it is there. Python has
// proven that no number of a mask leaves int64; a bound that would, since it knows less, is cut to it.
#pragma once

#include "attention/mask_values.cuh"

namespace cuflash {

// All whole numbers from low to high.
struct Interval {
    i64 low, high;

    __device__ __forceinline__ bool is_point() const { return low == high; }
};
constexpr i64 kLeast = -0x7fffffffffffffffll - 1, kMost = 0x7fffffffffffffffll;
constexpr Interval kAnyWhole{kLeast, kMost};

// All float64 from low to high, none of them a NaN. Where the bounds are NaN: anything, NaN included.
struct RealInterval {
    double low, high;
};
constexpr double kUnboundedReal = __builtin_bit_cast(double, 0x7ff0000000000000ll);
constexpr double kUndefinedReal = __builtin_bit_cast(double, 0x7ff8000000000000ll);
constexpr RealInterval kAnyReal{kUndefinedReal, kUndefinedReal};

// Whether a statement surely holds of every score of a tile, or surely of none. Both come from positive evidence, so that
// a NaN leaves them false.
struct Truth {
    bool all, none;
};

// Arithmetic whose results are cut to int64.
__device__ __forceinline__ i64 cut(bool negative) { return negative ? kLeast : kMost; }
__device__ __forceinline__ i64 add_cut(i64 a, i64 b) {
    const i64 sum = static_cast<i64>(static_cast<u64>(a) + static_cast<u64>(b));
    return ((a ^ sum) & (b ^ sum)) < 0 ? cut(a < 0) : sum;
}
__device__ __forceinline__ i64 sub_cut(i64 a, i64 b) {
    const i64 difference = static_cast<i64>(static_cast<u64>(a) - static_cast<u64>(b));
    return ((a ^ b) & (a ^ difference)) < 0 ? cut(a < 0) : difference;
}
__device__ __forceinline__ i64 mul_cut(i64 a, i64 b) {
    const i64 product = static_cast<i64>(static_cast<u64>(a) * static_cast<u64>(b));
    return __mul64hi(a, b) == product >> 63 ? product : cut((a ^ b) < 0);
}
__device__ __forceinline__ i64 shift_left_cut(i64 a, i64 count) {
    const i64 shifted = static_cast<i64>(static_cast<u64>(a) << count);
    return shifted >> count == a ? shifted : cut(a < 0);
}

// Of an operation that is monotone in each operand while the other is fixed.
template <class Operation>
__device__ __forceinline__ Interval corners(Interval a, Interval b, Operation of) {
    const i64 p = of(a.low, b.low), q = of(a.low, b.high), r = of(a.high, b.low), s = of(a.high, b.high);
    return {min(min(p, q), min(r, s)), max(max(p, q), max(r, s))};
}
__device__ __forceinline__ Interval hull(Interval a, Interval b) { return {min(a.low, b.low), max(a.high, b.high)}; }
__device__ __forceinline__ Interval add(Interval a, Interval b) { return {add_cut(a.low, b.low), add_cut(a.high, b.high)}; }
__device__ __forceinline__ Interval sub(Interval a, Interval b) { return {sub_cut(a.low, b.high), sub_cut(a.high, b.low)}; }
__device__ __forceinline__ Interval mul(Interval a, Interval b) { return corners(a, b, mul_cut); }
__device__ __forceinline__ Interval negative(Interval a) { return sub(Interval{0, 0}, a); }
__device__ __forceinline__ Interval minimum(Interval a, Interval b) { return {min(a.low, b.low), min(a.high, b.high)}; }
__device__ __forceinline__ Interval maximum(Interval a, Interval b) { return {max(a.low, b.low), max(a.high, b.high)}; }
__device__ __forceinline__ Interval absolute(Interval a) {
    const Interval minus = negative(a);
    return {max(max(a.low, minus.low), 0ll), max(a.high, minus.high)};
}
// Divisors are positive, shift counts 0 to 62, as Python has proven.
__device__ __forceinline__ Interval positive(Interval divisor) { return maximum(divisor, Interval{1, 1}); }
__device__ __forceinline__ Interval floor_div(Interval a, Interval b) {
    return corners(a, positive(b), [](i64 x, i64 y) { return floor_div(x, y); });
}
__device__ __forceinline__ Interval floor_mod(Interval a, Interval divisor) {
    const Interval b = positive(divisor);
    const bool wraps = !b.is_point() || floor_div(a.low, b.low) != floor_div(a.high, b.low);
    if (!wraps || (a.low >= 0 && a.high < b.low)) return {floor_mod(a.low, b.high), floor_mod(a.high, b.high)};
    return {0, a.low >= 0 ? min(a.high, b.high - 1) : b.high - 1};
}
__device__ __forceinline__ Interval counts(Interval a) { return {max(a.low, 0ll), min(a.high, 62ll)}; }
__device__ __forceinline__ Interval shift_left(Interval a, Interval b) { return corners(a, counts(b), shift_left_cut); }
__device__ __forceinline__ Interval shift_right(Interval a, Interval b) {
    return corners(a, counts(b), [](i64 x, i64 y) { return x >> y; });
}

// The least 2^n - 1 that is not below a; -1 of a negative number.
__device__ __forceinline__ i64 filled(i64 a) { return a <= 0 ? a >> 63 : static_cast<i64>(~u64{0} >> __clzll(a)); }
// Bitwise operations. The leading bits of all values of an operand are the same, unless it has either sign; then the
// number of bits is what is known. `of` is given a value of each operand and a one for each bit that may differ.
template <class Operation>
__device__ __forceinline__ Interval bitwise(Interval a, Interval b, Operation of) {
    const i64 x = filled(a.low ^ a.high), y = filled(b.low ^ b.high);
    if (x >= 0 && y >= 0) return of(a.low, x, b.low, y);
    const i64 bits = filled(max(max(a.high, ~a.low), max(b.high, ~b.low)));
    return {~bits, bits};
}
__device__ __forceinline__ Interval bit_and(Interval a, Interval b) {
    return bitwise(a, b, [](i64 a, i64 x, i64 b, i64 y) { return Interval{a & ~x & b & ~y, (a | x) & (b | y)}; });
}
__device__ __forceinline__ Interval bit_or(Interval a, Interval b) {
    return bitwise(a, b, [](i64 a, i64 x, i64 b, i64 y) { return Interval{(a & ~x) | (b & ~y), a | x | b | y}; });
}
__device__ __forceinline__ Interval bit_xor(Interval a, Interval b) {
    return bitwise(a, b, [](i64 a, i64 x, i64 b, i64 y) { return Interval{(a ^ b) & ~(x | y), (a ^ b) | x | y}; });
}
__device__ __forceinline__ Truth less(Interval a, Interval b) { return {a.high < b.low, a.low >= b.high}; }
__device__ __forceinline__ Truth less_equal(Interval a, Interval b) { return {a.high <= b.low, a.low > b.high}; }
__device__ __forceinline__ Truth equal(Interval a, Interval b) {
    return {a.is_point() && b.is_point() && a.low == b.low, a.high < b.low || b.high < a.low};
}

// Reals: rounding is monotone, so the bounds of a sum are the sums of bounds. Those that hide a NaN, of inf - inf, 0 inf
// or inf / inf, bound nothing.
__device__ __forceinline__ RealInterval bounds(double low, double high) {
    const bool known = low <= high && (low > -kUnboundedReal || high < kUnboundedReal);
    return known ? RealInterval{low, high} : kAnyReal;
}
template <class Operation>
__device__ __forceinline__ RealInterval corners(RealInterval a, RealInterval b, Operation of) {
    const double p = of(a.low, b.low), q = of(a.low, b.high), r = of(a.high, b.low), s = of(a.high, b.high);
    return bounds(minimum(minimum(p, q), minimum(r, s)), maximum(maximum(p, q), maximum(r, s)));
}
__device__ __forceinline__ RealInterval hull(RealInterval a, RealInterval b) {
    return bounds(minimum(a.low, b.low), maximum(a.high, b.high));
}
__device__ __forceinline__ RealInterval add(RealInterval a, RealInterval b) {
    return bounds(add(a.low, b.low), add(a.high, b.high));
}
__device__ __forceinline__ RealInterval sub(RealInterval a, RealInterval b) {
    return bounds(sub(a.low, b.high), sub(a.high, b.low));
}
__device__ __forceinline__ RealInterval negative(RealInterval a) { return {-a.high, -a.low}; }
__device__ __forceinline__ RealInterval mul(RealInterval a, RealInterval b) {
    return corners(a, b, [](double x, double y) { return mul(x, y); });
}
__device__ __forceinline__ RealInterval quotient(RealInterval a, RealInterval b) {
    if (!(b.low > 0 || b.high < 0)) return kAnyReal;
    return corners(a, b, [](double x, double y) { return quotient(x, y); });
}
__device__ __forceinline__ RealInterval absolute(RealInterval a) {
    return {maximum(maximum(a.low, -a.high), 0.0), maximum(a.high, -a.low)};
}
__device__ __forceinline__ RealInterval minimum(RealInterval a, RealInterval b) {
    return bounds(minimum(a.low, b.low), minimum(a.high, b.high));
}
__device__ __forceinline__ RealInterval maximum(RealInterval a, RealInterval b) {
    return bounds(maximum(a.low, b.low), maximum(a.high, b.high));
}
__device__ __forceinline__ Truth less(RealInterval a, RealInterval b) { return {a.high < b.low, a.low >= b.high}; }
__device__ __forceinline__ Truth less_equal(RealInterval a, RealInterval b) { return {a.high <= b.low, a.low > b.high}; }
__device__ __forceinline__ Truth equal(RealInterval a, RealInterval b) {
    return {a.low == a.high && b.low == b.high && a.low == b.low, a.high < b.low || b.high < a.low};
}
__device__ __forceinline__ RealInterval to_real(Interval a) { return {static_cast<double>(a.low), static_cast<double>(a.high)}; }

__device__ __forceinline__ Truth logical_and(Truth a, Truth b) { return {a.all && b.all, a.none || b.none}; }
__device__ __forceinline__ Truth logical_or(Truth a, Truth b) { return {a.all || b.all, a.none && b.none}; }
__device__ __forceinline__ Truth hull(Truth a, Truth b) { return {a.all && b.all, a.none && b.none}; }
__device__ __forceinline__ Truth logical_not(Truth a) { return {a.none, a.all}; }
__device__ __forceinline__ Truth logical_xor(Truth a, Truth b) {
    return {(a.all && b.none) || (a.none && b.all), (a.all && b.all) || (a.none && b.none)};
}
__device__ __forceinline__ Truth not_equal(Interval a, Interval b) { return logical_not(equal(a, b)); }
__device__ __forceinline__ Truth not_equal(RealInterval a, RealInterval b) { return logical_not(equal(a, b)); }
__device__ __forceinline__ Interval to_whole(Truth a) { return {a.all, !a.none}; }
__device__ __forceinline__ Interval choose(Truth c, Interval a, Interval b) { return c.all ? a : c.none ? b : hull(a, b); }
__device__ __forceinline__ RealInterval choose(Truth c, RealInterval a, RealInterval b) {
    return c.all ? a : c.none ? b : hull(a, b);
}

}  // namespace cuflash
