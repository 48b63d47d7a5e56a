// Warp-wide matrix loads and products of the sm_80 class.
//
// Of a 16x8 product lane 4r + c holds d[r][2c], d[r][2c+1], d[r+8][2c], d[r+8][2c+1], whatever its elements are.
#pragma once

#include "ptx/types.cuh"

namespace cuflash::ptx {

// Four 8x8 matrices of 16-bit elements. Lanes 8i .. 8i+7 give the addresses of the rows of matrix i; lane 4r + c
// receives elements [r][2c], [r][2c+1] of matrix i in value[i]; of 8x4 matrices of 32-bit elements, element [r][c].
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

// d [16][8] += a [16][16] b [16][8]
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

// d [16][8] += a [16][8] b [8][8] of TF32: float32 of which the low 13 bits do not take part. Lane 4r + c holds a[r][c],
// a[r+8][c], a[r][c+4], a[r+8][c+4] and b[c][r], b[c+4][r]. The sum is cut, not rounded, to float32.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#if __CUDA_ARCH__ >= 900
// The same of float64, a chain of fused multiply-adds.
__device__ __forceinline__ void mma_m16n8k8_f64(double (&d)[4], const double (&a)[4], double b0, double b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+d"(d[0]), "+d"(d[1]), "+d"(d[2]), "+d"(d[3])
        : "d"(a[0]), "d"(a[1]), "d"(a[2]), "d"(a[3]), "d"(b0), "d"(b1));
}
#else
// d [8][8] += a [8][4] b [4][8]; lane 4r + c holds a[r][c], b[c][r], d[r][2c], d[r][2c+1].
__device__ __forceinline__ void mma_m8n8k4_f64(double& d0, double& d1, double a, double b) {
    asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
        : "+d"(d0), "+d"(d1)
        : "d"(a), "d"(b));
}

// As on later architectures, of four products of 8x8.
__device__ __forceinline__ void mma_m16n8k8_f64(double (&d)[4], const double (&a)[4], double b0, double b1) {
    mma_m8n8k4_f64(d[0], d[1], a[0], b0);
    mma_m8n8k4_f64(d[2], d[3], a[1], b0);
    mma_m8n8k4_f64(d[0], d[1], a[2], b1);
    mma_m8n8k4_f64(d[2], d[3], a[3], b1);
}
#endif

}  // namespace cuflash::ptx
