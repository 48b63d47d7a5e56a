"""Control flow as NVRTC compiles it: divergence, loops, switches, calls, scopes, local memory."""

from __future__ import annotations

import numpy as np
import pytest

from cuflash.emulator import Device
from tests.emulator.programs import run_cuda

COLLATZ = """
extern "C" __global__ void kernel(const unsigned* x, int* steps, int count) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  unsigned v = x[i]; int n = 0;
  while (v != 1) { if (v % 2) v = 3 * v + 1; else v /= 2; n++; }
  steps[i] = n;
}
"""


@pytest.mark.parametrize("block", [32, 70, 128])
@pytest.mark.parametrize("warp_order", [None, 1])
def test_every_lane_goes_its_own_way(block: int, warp_order: int | None) -> None:
    x = np.arange(1, 300, dtype=np.uint32)
    arrays = {"x": x, "steps": np.empty(299, np.int32)}
    result, _ = run_cuda(
        COLLATZ, arrays, np.int32(299), grid=-(-299 // block), block=block, outputs=("steps",), warp_order=warp_order
    )

    def collatz(v: int) -> int:
        return 0 if v == 1 else 1 + collatz(3 * v + 1 if v % 2 else v // 2)

    assert result["steps"].tolist() == [collatz(int(v)) for v in x]


def test_switch_and_nested_branches() -> None:
    source = """
    extern "C" __global__ void kernel(const int* x, int* y) {
      int i = threadIdx.x, v = x[i], r;
      switch (v) {
        case 0: r = i * 3; break;
        case 1: r = i - 7; for (int k = 0; k < i; k++) r ^= k * v + y[0]; break;
        case 2: r = (i & 1) ? 5 : -5; break;
        case 3: r = __popc(i); break;
        case 4: r = i * i; break;
        case 5: r = ~i; break;
        default: r = v;
      }
      x[i] < 3 ? y[i + 1] = r : y[i + 1] = -r;
    }
    """
    rng = np.random.default_rng(0)
    x = rng.integers(0, 8, 128).astype(np.int32)
    y = np.full(129, 11, np.int32)
    result, _ = run_cuda(source, {"x": x, "y": y}, block=128)

    def expected(i: int, v: int) -> int:
        r = i - 7
        for k in range(i):
            r ^= k * v + 11
        value = {0: i * 3, 1: r, 2: 5 if i & 1 else -5, 3: bin(i).count("1"), 4: i * i, 5: ~i}.get(v, v)
        return value if v < 3 else -value

    assert result["y"][1:].tolist() == [expected(i, int(v)) for i, v in enumerate(x)]


def test_indexed_branch() -> None:
    ptx = """
    .version 8.0
    .target sm_80
    .address_size 64
    .visible .entry kernel(.param .u64 kernel_param_0) {
      .reg .b32 %r<4>; .reg .b64 %rd<3>;
      mov.u32 %r1, %tid.x; rem.u32 %r2, %r1, 3;
      brx.idx %r2, $table;
    $table: .branchtargets $zero, $one, $two;
    $zero: mov.u32 %r3, 100; bra $end;
    $one: mov.u32 %r3, 200; bra $end;
    $two: mov.u32 %r3, 300;
    $end: ld.param.u64 %rd1, [kernel_param_0]; mad.wide.u32 %rd2, %r1, 4, %rd1; st.global.u32 [%rd2], %r3; ret;
    }
    """
    device = Device()
    out = device.empty(64, np.uint32, name="out")
    device.load(ptx).kernel("kernel").launch(1, 64, [out])
    assert out.to_host().tolist() == [100 * (1 + i % 3) for i in range(64)]


def test_functions_that_are_not_inlined() -> None:
    source = """
    struct Big { float x[6]; int n; };
    __device__ __noinline__ float total(Big b, float* extra) { float s = 0; for (int i = 0; i < b.n; i++) s += b.x[i];
      *extra += s; return s; }
    __device__ __noinline__ float twice(float x) { return 2 * x; }
    extern "C" __global__ void kernel(const float* x, float* y) {
      int i = threadIdx.x; Big b; float extra = 1;
      for (int k = 0; k < 6; k++) b.x[k] = x[(i + k) % 64];
      b.n = i % 7;
      float s = total(b, &extra);
      if (i % 2) s = twice(s) + twice(extra);
      y[i] = s + extra;
    }
    """
    x = np.arange(64, dtype=np.float32)
    result, _ = run_cuda(source, {"x": x, "y": np.empty(64, np.float32)}, block=64, outputs=("y",))
    expected = []
    for i in range(64):
        s = sum(float(x[(i + k) % 64]) for k in range(i % 7))
        expected.append((2 * s + 2 * (1 + s) if i % 2 else s) + 1 + s)
    np.testing.assert_array_equal(result["y"], expected)


def test_local_arrays_with_computed_indices() -> None:
    source = """
    extern "C" __global__ void kernel(const int* x, int* y) {
      int i = threadIdx.x, a[16];
      for (int k = 0; k < 16; k++) a[k] = k * i;
      a[x[i] & 15] = -1; a[(x[i] + 3) & 15] += 7;
      int s = 0; for (int k = 0; k < 16; k++) s = s * 3 + a[(k * 5) & 15];
      y[i] = s;
    }
    """
    x = np.random.default_rng(1).integers(0, 100, 96).astype(np.int32)
    result, _ = run_cuda(source, {"x": x, "y": np.empty(96, np.int32)}, block=96, outputs=("y",))
    for i, v in enumerate(x.tolist()):
        a = [k * i for k in range(16)]
        a[v & 15] = -1
        a[(v + 3) & 15] += 7
        s = 0
        for k in range(16):
            s = s * 3 + a[k * 5 & 15]
        assert (int(result["y"][i]) - s) % 2**32 == 0


def test_assembly_scopes_have_names_of_their_own() -> None:
    source = """
    extern "C" __global__ void kernel(int* y) {
      int i = threadIdx.x, a, b;
      asm volatile("{ .reg .pred p; .reg .b32 t; setp.lt.s32 p, %1, 5; mov.b32 t, 1; @!p bra DONE;"
                   "  mov.b32 t, 2; DONE: mov.b32 %0, t; }"
                   : "=r"(a) : "r"(i));
      asm volatile("{ .reg .pred p; .reg .b32 t; setp.gt.s32 p, %1, 9; mov.b32 t, 10; @p bra DONE;"
                   "  add.s32 t, t, %1; DONE: mov.b32 %0, t; }"
                   : "=r"(b) : "r"(i));
      y[i] = a * 1000 + b;
    }
    """
    result, _ = run_cuda(source, {"y": np.empty(32, np.int32)}, outputs=("y",))
    assert result["y"].tolist() == [(2 if i < 5 else 1) * 1000 + (10 if i > 9 else 10 + i) for i in range(32)]


def test_variables_of_the_module() -> None:
    source = """
    __constant__ int table[4] = {5, -6, 7, 8};
    __device__ float scale = 2.5f;
    __device__ int counter;
    __device__ int* pointer = &counter;
    extern "C" __global__ void kernel(float* y) {
      int i = threadIdx.x;
      y[i] = table[i & 3] * scale;
      if (i == 0) { scale = 1.0f; *pointer += 1; y[32] = counter; }
    }
    """
    from tests.emulator.programs import compile_cuda

    device = Device()
    y = device.empty(33, np.float32, name="y")
    kernel = device.load(compile_cuda(source)).kernel("kernel")
    kernel.launch(1, 32, [y])
    assert y.to_host()[:4].tolist() == [12.5, -15, 17.5, 20]
    kernel.launch(1, 32, [y])  # variables keep their values between launches
    assert y.to_host()[:4].tolist() == [5, -6, 7, 8]
    assert y.to_host()[32] == 2


def test_special_registers() -> None:
    source = """
    extern "C" __global__ void kernel(int* y) {
      int t = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z),
        b = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
      int n = blockDim.x * blockDim.y * blockDim.z; unsigned lane, below, warp;
      asm("mov.u32 %0, %%laneid;" : "=r"(lane)); asm("mov.u32 %0, %%lanemask_lt;" : "=r"(below));
        asm("mov.u32 %0, %%warpid;" : "=r"(warp));
      y[b * n + t] = (lane == t % 32) + 2 * (below == (1u << lane) - 1) + 4 * (warp == t / 32) + 8 * t + 8192 * b;
    }
    """
    grid, block = (2, 3, 2), (4, 5, 3)
    result, _ = run_cuda(source, {"y": np.empty(12 * 60, np.int32)}, grid=grid, block=block, outputs=("y",))
    assert result["y"].tolist() == [7 + 8 * t + 8192 * b for b in range(12) for t in range(60)]


def test_parameters_by_value_and_by_computed_index() -> None:
    source = """
    struct Params { const float* x; long long stride; int sizes[4]; double scale; };
    extern "C" __global__ void kernel(const __grid_constant__ Params p, float* y, char c, short s) {
      int i = threadIdx.x;
      y[i] = p.x[i * p.stride] * p.scale + p.sizes[i & 3] + c + s;
    }
    """
    from tests.emulator.programs import compile_cuda

    device = Device()
    x = np.arange(64, dtype=np.float32)
    dx, y = device.to_device(x, name="x"), device.empty(32, np.float32, name="y")
    record = np.zeros((), np.dtype([("x", "u8"), ("stride", "i8"), ("sizes", "i4", 4), ("scale", "f8")], align=True))
    record["x"], record["stride"], record["sizes"], record["scale"] = dx.pointer, 2, [10, 20, 30, 40], 0.5
    device.load(compile_cuda(source)).kernel("kernel").launch(1, 32, [record, y, np.int8(-3), np.int16(300)])
    assert y.to_host().tolist() == [i + 10 * (i % 4 + 1) + 297 for i in range(32)]


def test_sixty_four_bit_division_and_double() -> None:
    source = """
    extern "C" __global__ void kernel(const long long* x, long long* y, double* z, unsigned* u) {
      int i = threadIdx.x; long long d = x[(i + 1) % 64] | 1;
      y[i] = x[i] / d + x[i] % d; z[i] = (double)x[i] / (double)d + sqrt((double)(i + 1)) * exp2(-(double)i);
        u[i] = (unsigned)(unsigned long long)x[i] / 10u;
    }
    """
    x = np.random.default_rng(2).integers(-(2**62), 2**62, 64) >> np.random.default_rng(3).integers(0, 60, 64)
    arrays = {"x": x, "y": np.empty(64, np.int64), "z": np.empty(64), "u": np.empty(64, np.uint32)}
    result, _ = run_cuda(source, arrays, block=64, outputs=("y", "z", "u"))
    for i in range(64):
        a, d = int(x[i]), int(x[(i + 1) % 64]) | 1
        quotient = abs(a) // abs(d) * (1 if (a < 0) == (d < 0) else -1)
        assert result["y"][i] == quotient + a - quotient * d
        np.testing.assert_allclose(result["z"][i], a / d + np.sqrt(i + 1) * 2.0**-i, rtol=1e-14)
        assert result["u"][i] == a % 2**32 // 10


@pytest.mark.parametrize("options", [(), ("--use_fast_math",)])
def test_library_mathematics(options: tuple[str, ...]) -> None:
    source = """
    extern "C" __global__ void kernel(const float* x, float* y) {
      int i = threadIdx.x; float v = x[i];
      y[i] = expf(v) + logf(fabsf(v) + 1) + tanhf(v) + v / 3.0f + sinf(v) + powf(fabsf(v),
        0.3f) + rsqrtf(fabsf(v) + 1) + fmodf(v, 0.7f) + floorf(v) + erff(v);
    }
    """
    x = np.linspace(-3, 3, 128).astype(np.float32)
    result, _ = run_cuda(source, {"x": x, "y": np.empty(128, np.float32)}, block=128, outputs=("y",), options=options)
    from scipy.special import erf

    v = x.astype(np.float64)
    expected = (
        np.exp(v) + np.log1p(np.abs(v)) + np.tanh(v) + v / 3 + np.sin(v) + np.abs(v) ** 0.3 + 1 / np.sqrt(np.abs(v) + 1)
    )
    expected += np.fmod(v, np.float64(np.float32(0.7))) + np.floor(v) + erf(v)
    np.testing.assert_allclose(result["y"], expected, rtol=2e-5, atol=2e-5)
