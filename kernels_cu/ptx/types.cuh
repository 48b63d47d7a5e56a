// Fixed-width names for the built-in types; NVRTC brings no <cstdint> and the kernels include no header but their own.
#pragma once

namespace cuflash {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using i64 = long long;
using u64 = unsigned long long;

template <bool kFirst, class A, class B>
struct ConditionalOf {
    using Type = A;
};
template <class A, class B>
struct ConditionalOf<false, A, B> {
    using Type = B;
};
template <bool kFirst, class A, class B>
using Conditional = typename ConditionalOf<kFirst, A, B>::Type;  // A or B

static_assert(sizeof(u16) == 2 && sizeof(u32) == 4 && sizeof(i64) == 8);

}  // namespace cuflash
