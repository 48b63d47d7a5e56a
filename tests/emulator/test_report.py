"""Reports against counts made by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from cuflash.emulator import Device, LaunchReport
from tests.emulator.programs import run_cuda


def test_bytes_and_sectors_of_global_memory() -> None:
    source = """
    extern "C" __global__ void kernel(const float* x, const float4* v, float* y, int* count) {
      int i = blockIdx.x * 64 + threadIdx.x;
      float s = x[i * 8];                  // a sector each: 32 per warp
      float4 w = v[i];                     // 512 bytes per warp: 16 sectors
      s += x[0];                           // one sector for all
      y[128 + i] = s + w.x + w.w;
      if (threadIdx.x < 10) y[i] = s;  // 10 lanes of the first warp: 2 sectors
      if (threadIdx.x == 63) atomicAdd(count, 1);
    }
    """
    arrays = {
        "x": np.ones(128 * 8, np.float32),
        "v": np.ones((128, 4), np.float32),
        "y": np.zeros(256, np.float32),
        "count": np.zeros(1, np.int32),
    }
    _, report = run_cuda(source, arrays, grid=2, block=64)
    assert isinstance(report, LaunchReport)
    assert (report.kernel, report.grid, report.block) == ("kernel", (2, 1, 1), (64, 1, 1))
    assert dict(report.read_by_array) == {"x": 128 * 4 * 2, "v": 128 * 16, "count": 8}
    assert dict(report.written_by_array) == {"y": 128 * 4 + 2 * 10 * 4, "count": 8}
    assert report.global_read == 1024 + 2048 + 8
    assert report.global_written == 512 + 80 + 8
    assert report.sectors_read == 4 * 32 + 4 * 16 + 4 + 2
    assert report.sectors_written == 4 * 4 + 2 * 2 + 2


@pytest.mark.parametrize(
    ("width", "stride", "wavefronts", "ideal"),
    [
        ("float", 1, 1, 1),
        ("float", 2, 2, 1),
        ("float", 32, 32, 1),
        ("float", 33, 1, 1),
        ("float", 0, 1, 1),
        ("float2", 1, 2, 2),
        ("float2", 2, 4, 2),
        ("float4", 1, 4, 4),
        ("float4", 2, 8, 4),
        ("float4", 8, 32, 4),
        ("short", 1, 1, 1),
    ],
)
def test_bank_conflicts_of_loads(width: str, stride: int, wavefronts: int, ideal: int) -> None:
    body = {"float": "v", "short": "v", "float2": "v.x + v.y", "float4": "v.x + v.y + v.z + v.w"}[width]
    source = f"""
    extern "C" __global__ void kernel(float* y) {{
      extern __shared__ __align__(16) float s[];
      for (int k = threadIdx.x; k < 4352; k += 64) s[k] = 1;
      __syncthreads();
      {width} v = (({width}*)s)[(threadIdx.x % 32) * {stride}];
      y[threadIdx.x] = {body};
    }}
    """
    _, report = run_cuda(source, {"y": np.empty(64, np.float32)}, block=64, shared_bytes=4352 * 4, outputs=("y",))
    assert report.shared_wavefronts == 4352 // 32 + 2 * wavefronts
    assert report.bank_conflicts == 2 * (wavefronts - ideal)
    assert report.shared_bytes == 4352 * 4


STORES = {"float": "1.0f", "float2": "float2{1, 2}", "float4": "float4{1, 2, 3, 4}"}


@pytest.mark.parametrize(
    ("width", "stride", "wavefronts", "ideal"),
    [
        ("float", 1, 1, 1),
        ("float", 4, 4, 1),
        ("float2", 1, 2, 2),
        ("float2", 16, 32, 2),  # a half-warp at a time, all of it in the same two banks
        ("float4", 1, 4, 4),
        ("float4", 2, 8, 4),  # a quarter-warp at a time, in four of eight groups of banks
        ("float4", 9, 4, 4),  # the padding that spreads rows of 128 bytes
    ],
)
def test_bank_conflicts_of_stores(width: str, stride: int, wavefronts: int, ideal: int) -> None:
    source = f"""
    extern "C" __global__ void kernel(float* y) {{
      extern __shared__ __align__(16) float s[];
      (({width}*)s)[(threadIdx.x % 32) * {stride}] = {STORES[width]};
      __syncthreads();
      y[threadIdx.x] = *(volatile float*)s;
    }}
    """
    _, report = run_cuda(source, {"y": np.empty(32, np.float32)}, shared_bytes=32 * stride * 16, outputs=("y",))
    assert report.shared_wavefronts == wavefronts + 1  # one for the load that all lanes share
    assert report.bank_conflicts == wavefronts - ideal


@pytest.mark.parametrize(
    ("size", "pitch", "wavefronts", "ideal"), [(16, 16, 4, 4), (16, 128, 32, 4), (4, 8, 2, 1), (8, 8, 2, 2)]
)
def test_counts_of_asynchronous_copies(size: int, pitch: int, wavefronts: int, ideal: int) -> None:
    """Lane i asks for i % (size + 1) bytes of `size`: zero-filled bytes and lanes that read nothing do not count."""
    source = f"""
    extern "C" __global__ void kernel(const char* x, int* y) {{
      extern __shared__ __align__(16) char s[]; int i = threadIdx.x;
      asm volatile("cp.async.{"cg" if size == 16 else "ca"}.shared.global [%0], [%1], {size}, %2; cp.async.wait_all;"
        :: "r"((unsigned)__cvta_generic_to_shared(s + {pitch} * i)), "l"(x + {size} * i), "r"(i % {size + 1})
        : "memory");
      y[i] = i;
    }}
    """
    arrays = {"x": np.zeros(32 * size, np.int8), "y": np.empty(32, np.int32)}
    _, report = run_cuda(source, arrays, shared_bytes=32 * pitch, outputs=("y",))
    lengths = [i % (size + 1) for i in range(32)]
    assert dict(report.read_by_array) == {"x": sum(lengths)}
    assert report.sectors_read == len({size * i // 32 for i in range(32) if lengths[i]})
    assert report.async_copies == 32
    assert (report.shared_wavefronts, report.bank_conflicts) == (wavefronts, wavefronts - ideal)


@pytest.mark.parametrize(("pitch", "conflicts"), [(64, 7), (72, 0), (32, 3)])
def test_bank_conflicts_of_matrices(pitch: int, conflicts: int) -> None:
    """Rows of 16 bytes at a pitch of 128 bytes all lie in the same four banks."""
    source = f"""
    extern "C" __global__ void kernel(unsigned* y) {{
      __shared__ __align__(16) unsigned short s[32 * {pitch}];
      for (int k = threadIdx.x; k < 16 * {pitch}; k += 32) ((unsigned*)s)[k] = k;
      __syncwarp();
      unsigned r[4]; unsigned a = (unsigned)__cvta_generic_to_shared(s + threadIdx.x * {pitch});
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%0, %1, %2, %3}}, [%4];" : "=r"(r[0]), "=r"(r[1]),
        "=r"(r[2]), "=r"(r[3]) : "r"(a));
      y[threadIdx.x] = r[0] ^ r[1] ^ r[2] ^ r[3];
    }}
    """
    _, report = run_cuda(source, {"y": np.empty(32, np.uint32)}, outputs=("y",))
    assert report.bank_conflicts == 4 * conflicts


def test_bank_conflicts_of_lanes_that_are_masked() -> None:
    source = """
    extern "C" __global__ void kernel(float* y) {
      __shared__ volatile float s[1024]; int i = threadIdx.x;
      if (i < 5) s[i * 32] = i;
      if (i == 7) s[3] = 1;
      y[i] = i;
    }
    """
    _, report = run_cuda(source, {"y": np.empty(32, np.float32)}, outputs=("y",))
    assert report.shared_wavefronts == 5 + 1
    assert report.bank_conflicts == 4


def test_instructions_by_class() -> None:
    source = """
    extern "C" __global__ void kernel(float* y, int n) {
      float s = threadIdx.x;
      #pragma unroll 1
      for (int k = 0; k < n; k++) s = s * 1.5f + 2.0f;
      if (threadIdx.x >= 48) asm volatile("ex2.approx.f32 %0, %0;" : "+f"(s));
      __syncthreads();
      y[blockIdx.x * 64 + threadIdx.x] = __shfl_xor_sync(~0u, s, 1);
    }
    """
    _, report = run_cuda(source, {"y": np.empty(192, np.float32)}, np.int32(5), grid=3, block=64, outputs=("y",))
    assert report.instructions["floating"] == 3 * 64 * 5
    assert report.warp_instructions["floating"] == 3 * 2 * 5
    assert report.instructions["special"] == 3 * 16
    assert report.warp_instructions["special"] == 3
    assert report.instructions["barrier"] == 3 * 64
    assert report.barriers == 6
    assert report.warp_instructions["shuffle"] == 6
    assert report.instructions["store_global"] == 192


def test_matrix_operations() -> None:
    source = """
    extern "C" __global__ void kernel(float* y) {
      float d[4] = {0, 0, 0, 0}; unsigned a = 0x3C003C00;
      for (int k = 0; k < 3; k++)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%4,%4,%4}, {%4,%4},"
                     " {%0,%1,%2,%3};" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a));
      y[threadIdx.x] = d[0];
    }
    """
    result, report = run_cuda(source, {"y": np.empty(128, np.float32)}, block=128, outputs=("y",))
    assert (result["y"] == 48).all()
    assert report.mma == 12
    assert report.mma_flops == 12 * 2 * 16 * 8 * 16


def test_counts_do_not_depend_on_the_order_of_warps_or_on_batches() -> None:
    source = """
    extern "C" __global__ void kernel(const int* x, int* y) {
      __shared__ int s[128]; int i = threadIdx.x, b = blockIdx.x;
      s[i ^ (b & 7)] = x[b * 128 + i]; __syncthreads();
      int v = 0; for (int k = 0; k < b % 5; k++) v += s[(i * k) & 127];
      if (i % 3 == 0) y[b * 128 + i] = v; else y[b * 128 + i] = -v;
    }
    """
    x = np.arange(300 * 128, dtype=np.int32).reshape(300, 128)
    reports = [
        run_cuda(source, {"x": x, "y": np.empty_like(x)}, grid=300, block=128, outputs=("y",), **d)
        for d in ({}, {"check_races": False})
    ]
    small = [
        run_cuda(source, {"x": x[:9], "y": np.empty_like(x[:9])}, grid=9, block=128, outputs=("y",), **d)
        for d in ({}, {"warp_order": 1}, {"warp_order": 2})
    ]
    for group in (reports, small):
        assert all(r == group[0][1] for _, r in group)
        assert all((a["y"] == group[0][0]["y"]).all() for a, _ in group)


def test_reports_cannot_be_changed() -> None:
    source = 'extern "C" __global__ void kernel(int* y) { *y = 1; }'
    _, report = run_cuda(source, {"y": np.zeros(1, np.int32)}, block=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.mma = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        report.read_by_array["y"] = 3  # type: ignore[index]
    assert Device().arch.name == "sm_80"
