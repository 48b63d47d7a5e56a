// Keys that tokens are sorted by: unsigned numbers of 1, 2, 4 or 8 bytes.
#pragma once

#include "ptx/types.cuh"

namespace cuflash {

template <int kBytes>
using TokenKey =
    Conditional<kBytes == 8, u64, Conditional<kBytes == 4, u32, Conditional<kBytes == 2, u16, unsigned char>>>;

}  // namespace cuflash
