// Sorts the tokens of each (batch, head) by their keys, stably: a radix sort, the least significant digit first. A block
// per (batch, head).
#pragma once

#include "attention/config.cuh"
#include "attention/params.cuh"
#include "attention/token_keys.cuh"
#include "ptx/math.cuh"

namespace cuflash {

constexpr int kDigits = 256;  // a byte of the key

template <SortTokensConfig C>
struct SortShared {
    u32 next[C.num_warps][kDigits];  // tokens of a warp by digit; then where its next one of that digit goes
    u32 starts[kDigits];             // tokens by digit; then where the first one goes
};

// Keys and tokens in one order.
template <class Key>
struct Tokens {
    Key* keys;
    int* tokens;
};

// What a block sorts: keys come from an array with strides, later ones from where the pass before left them.
template <SortTokensConfig C>
struct TokenSort {
    using Key = TokenKey<C.key_bytes>;
    static constexpr int kAhead = 4;  // tokens of a lane whose loads are in flight together

    const SortTokensParams& params;
    SortShared<C>& shared;
    const Key* keys;  // of this batch entry and head
    int* inverse;
    u32 begin, end;  // positions of this warp
    int lane, warp;

    __device__ __forceinline__ TokenSort(const SortTokensParams& params, SortShared<C>& shared)
        : params(params), shared(shared), lane(threadIdx.x % 32), warp(threadIdx.x / 32) {
        const i64 pair = blockIdx.x, batch = pair / params.num_heads, head = pair % params.num_heads;
        keys = static_cast<const Key*>(params.source) + batch * params.source_strides[0] + head * params.source_strides[2];
        inverse = params.inverse + pair * params.tokens;
        const u32 tokens = params.tokens, rounds = (tokens + 32 * C.num_warps - 1) / (32 * C.num_warps);
        begin = min(32 * rounds * warp, tokens);
        end = min(begin + 32 * rounds, tokens);
    }

    // The key of a token, in the order of unsigned numbers.
    __device__ __forceinline__ Key source(u32 token) const {
        const Key key = keys[token * params.source_strides[1]];
        if constexpr (C.keep) return key == 0;
        else if constexpr (C.is_signed) return key ^ static_cast<Key>(Key{1} << (8 * C.key_bytes - 1));
        else return key;
    }

    // Bit i: digit i is not the same in all keys.
    __device__ __forceinline__ u32 varying_digits() const {
        const Key first = source(0);
        Key varying = 0;
        for (u32 token = threadIdx.x; token < params.tokens; token += 32 * C.num_warps) varying |= source(token) ^ first;
        u32 digits = 0;
#pragma unroll
        for (int i = 0; i < C.key_bytes; ++i) digits |= __syncthreads_or(varying >> 8 * i & 255) ? 1u << i : 0;
        return digits;
    }

    // Calls visit(valid, key, token, digit, peers) of this warp's positions in their order; peers are the lanes that hold
    // the same digit. All lanes are there at each call.
    template <class Visit>
    __device__ __forceinline__ void each(bool from_source, const Tokens<Key>& from, int shift, const Visit& visit) const {
        for (u32 first = begin; first < end; first += 32 * kAhead) {
            Key key[kAhead];
            u32 token[kAhead];
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
                token[i] = first + 32 * i + lane;
                key[i] = 0;
                if (token[i] >= end) continue;
                key[i] = from_source ? source(token[i]) : from.keys[token[i]];
                if (!from_source) token[i] = from.tokens[token[i]];
            }
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
                const bool valid = first + 32 * i + lane < end;
                const u32 digit = static_cast<u32>(key[i] >> shift) & (kDigits - 1);
                visit(valid, key[i], token[i], digit, ptx::match_any(valid ? digit : kDigits));
            }
        }
    }

    // Where each warp's first token of each digit goes, from how many there are.
    __device__ __forceinline__ void scan() {
        for (int digit = threadIdx.x; digit < kDigits; digit += 32 * C.num_warps) {
            u32 sum = 0;
            for (int w = 0; w < C.num_warps; ++w) {
                const u32 count = shared.next[w][digit];
                shared.next[w][digit] = sum;
                sum += count;
            }
            shared.starts[digit] = sum;
        }
        __syncthreads();  // the digits are counted
        if (warp == 0) {
            constexpr int kOwn = kDigits / 32;
            u32 own = 0;
            for (int i = 0; i < kOwn; ++i) own += shared.starts[kOwn * lane + i];
            u32 sum = own;  // of this lane and those before it
#pragma unroll
            for (int step = 1; step < 32; step *= 2) {
                const u32 before = ptx::shfl_idx(static_cast<int>(sum), max(lane - step, 0));
                sum += lane >= step ? before : 0;
            }
            sum -= own;
            for (int i = 0; i < kOwn; ++i) {
                const u32 count = shared.starts[kOwn * lane + i];
                shared.starts[kOwn * lane + i] = sum;
                sum += count;
            }
        }
        __syncthreads();  // the starts are there
        for (int digit = threadIdx.x; digit < kDigits; digit += 32 * C.num_warps) {
            for (int w = 0; w < C.num_warps; ++w) shared.next[w][digit] += shared.starts[digit];
        }
        __syncthreads();  // everyone's places are there
    }

    // One digit: counts, places, moves. The last pass also writes the inverse order.
    __device__ __forceinline__ void pass(bool from_source, const Tokens<Key>& from, const Tokens<Key>& to, int digit,
                                         bool last) {
        const u32 below = (1u << lane) - 1;
        u32* next = shared.next[warp];
        for (int i = lane; i < kDigits; i += 32) next[i] = 0;
        __syncwarp();  // the counts are zero
        each(from_source, from, 8 * digit, [&](bool valid, Key, u32, u32 digit, u32 peers) {
            if (valid && (peers & below) == 0) next[digit] += __popc(peers);
            __syncwarp();  // the next token of this digit may be another lane's
        });
        __syncthreads();  // everyone has counted
        scan();
        each(from_source, from, 8 * digit, [&](bool valid, Key key, u32 token, u32 digit, u32 peers) {
            const u32 position = next[digit] + __popc(peers & below);
            __syncwarp();  // everyone knows its place
            if (valid) {
                if ((peers & below) == 0) next[digit] += __popc(peers);
                to.keys[position] = key;
                to.tokens[position] = C.keep && key != 0 ? -1 : static_cast<int>(token);
                if (last) inverse[token] = position;
            }
            __syncwarp();  // the next place is there
        });
        __syncthreads();  // the tokens are moved: warps read what others wrote, and counts may be overwritten
    }
};

template <SortTokensConfig C>
__device__ __forceinline__ void sort_tokens(const SortTokensParams& params) {
    using Key = TokenKey<C.key_bytes>;
    __shared__ SortShared<C> shared;
    TokenSort<C> sort(params, shared);
    const i64 offset = static_cast<i64>(blockIdx.x) * params.tokens;
    Key *keys = static_cast<Key*>(params.keys) + offset, *other_keys = static_cast<Key*>(params.spare_keys) + offset;
    int *order = params.order + offset, *other_order = params.spare_order + offset;

    // Digits that all keys share sort nothing; one pass there must be.
    u32 digits = 1;
    if constexpr (C.key_bytes > 1) digits = max(sort.varying_digits(), 1u);
    const int first = __ffs(digits);
    for (; digits != 0; digits &= digits - 1) {
        const int left = __popc(digits), digit = __ffs(digits);
        const bool odd = left % 2 != 0;  // the last pass writes the results
        const Tokens<Key> from{odd ? other_keys : keys, odd ? other_order : order};
        const Tokens<Key> to{odd ? keys : other_keys, odd ? order : other_order};
        sort.pass(digit == first, from, to, digit - 1, left == 1);
    }
}

}  // namespace cuflash
