// Warp-wide matrix loads and products of the sm_80 class.
#pragma once

#include "ptx/types.cuh"

namespace cuflash::ptx {

// Four 8x8 matrices of 16-bit elements. Lanes 8i .. 8i+7 give the addresses of the rows of matrix i; lane 4r + c
// receives elements [r][2c], [r][2c+1] of matrix i in value[i].
__device__ __forceinline__ void ldmatrix_x4(u32 (&value)[4], u32 shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value[0]), "=r"(value[1]), "=r"(value[2]), "=r"(value[3])
                 : "r"(shared));
}

// The same, each matrix transposed: lane 4r + c receives elements [2c][r], [2c+1][r].
__device__ __forceinline__ void ldmatrix_x4_trans(u32 (&value)[4], u32 shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value[0]), "=r"(value[1]), "=r"(value[2]), "=r"(value[3])
                 : "r"(shared));
}

// d [16][8] += a [16][16] b [16][8]; lane 4r + c holds d[r][2c], d[r][2c+1], d[r+8][2c], d[r+8][2c+1].
__device__ __forceinline__ void mma_m16n8k16_f16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace cuflash::ptx
