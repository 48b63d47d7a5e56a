"""What lanes of a warp tell each other, atomics, and barriers between warps."""

from __future__ import annotations

import numpy as np
import pytest

from cuflash.emulator import Device, Misaligned, Race, Uninitialized
from tests.emulator.programs import compile_cuda, run_cuda

LANES = np.arange(32)


@pytest.mark.parametrize("width", [32, 16, 4])
def test_shuffles(width: int) -> None:
    source = """
    extern "C" __global__ void kernel(const int* x, int* y) {
      int i = threadIdx.x, v = x[i];
      y[i] = __shfl_up_sync(~0u, v, 3, W); y[64 + i] = __shfl_down_sync(~0u, v, 5, W);
      y[128 + i] = __shfl_xor_sync(~0u, v, 2, W); y[192 + i] = __shfl_sync(~0u, v, (i * 7) & 31, W);
    }
    """.replace("W", str(width))
    x = np.random.default_rng(0).integers(0, 1000, 64).astype(np.int32)
    result, _ = run_cuda(source, {"x": x, "y": np.empty(256, np.int32)}, block=64, outputs=("y",))
    for warp in range(2):
        v = x[32 * warp : 32 * warp + 32]
        group, inside = LANES // width * width, LANES % width
        up = np.where(inside >= 3, LANES - 3, LANES)
        down = np.where(inside + 5 < width, (LANES + 5) % 32, LANES)
        index = group + (LANES + 32 * warp) * 7 % 32 % width
        for k, source_lane in enumerate((up, down, LANES ^ 2, index)):
            np.testing.assert_array_equal(result["y"][64 * k + 32 * warp :][:32], v[source_lane])


def test_shuffle_tells_whether_the_source_was_in_range() -> None:
    source = """
    extern "C" __global__ void kernel(int* y) {
      int i = threadIdx.x, v, p;
      asm("{ .reg .pred q; shfl.sync.down.b32 %0|q, %2, 4, 31, 0xffffffff; selp.s32 %1, 1, 0, q; }" : "=r"(v),
        "=r"(p) : "r"(i));
      y[i] = v * 2 + p;
    }
    """
    result, _ = run_cuda(source, {"y": np.empty(32, np.int32)}, outputs=("y",))
    assert result["y"].tolist() == [2 * (i + 4) + 1 if i < 28 else 2 * i for i in range(32)]


def test_shuffles_wait_for_the_living_and_the_dead_give_ones() -> None:
    source = """
    extern "C" __global__ void kernel(int* y) {
      int i = threadIdx.x; if (i >= 25) return;
      y[i] = __shfl_xor_sync(~0u, i, 1); y[32 + i] = __popc(__ballot_sync(~0u, 1)); __syncwarp();
    }
    """
    result, _ = run_cuda(source, {"y": np.full(64, 7, np.int32)})
    assert result["y"].tolist() == [i ^ 1 for i in range(24)] + [-1] + [7] * 7 + [25] * 25 + [7] * 7


def test_votes_and_matches() -> None:
    source = """
    extern "C" __global__ void kernel(const int* x, unsigned* y) {
      int i = threadIdx.x, v = x[i]; int all;
      y[i] = __ballot_sync(~0u, v > 5); y[64 + i] = __any_sync(~0u, v > 8) + 2 * __all_sync(~0u, v >= 0);
      y[128 + i] = __match_any_sync(~0u, v); y[192 + i] = __match_all_sync(~0u, v / 100, &all) + all;
      y[256 + i] = __reduce_add_sync(~0u, v); y[320 + i] = __reduce_max_sync(~0u, v ^ i);
        y[384 + i] = __reduce_xor_sync(~0u, (unsigned)v);
      if (v > 5) y[448 + i] = __activemask(); else y[448 + i] = 0;
    }
    """
    x = np.random.default_rng(1).integers(0, 10, 64).astype(np.int32)
    result, _ = run_cuda(source, {"x": x, "y": np.empty(512, np.uint32)}, block=64, outputs=("y",))
    y = result["y"].reshape(8, 64)
    for warp in range(2):
        part, v = slice(32 * warp, 32 * warp + 32), x[32 * warp : 32 * warp + 32]
        ballot = int(sum(1 << k for k in range(32) if v[k] > 5))
        assert (y[0, part] == ballot).all()
        assert (y[1, part] == int((v > 8).any()) + 2).all()
        assert y[2, part].tolist() == [sum(1 << k for k in range(32) if v[k] == v[i]) for i in range(32)]
        assert (y[3, part] == np.uint32(0)).all()  # 0xffffffff + 1
        assert (y[4, part] == v.sum()).all()
        assert (y[5, part] == (v ^ (LANES + 32 * warp)).max()).all()
        assert (y[6, part] == np.bitwise_xor.reduce(v)).all()
        assert y[7, part].tolist() == [ballot if v[i] > 5 else 0 for i in range(32)]


def test_partial_masks_gather_their_members() -> None:
    """Two halves of a warp shuffle among themselves in different branches."""
    source = """
    extern "C" __global__ void kernel(int* y) {
      int i = threadIdx.x, v = i * i;
      if (i < 16) { for (int k = 0; k < i; k++) v += k; v = __shfl_xor_sync(0xffffu, v, 1); }
      else { unsigned m = 0xffff0000u + (unsigned)(v * 0); v = __shfl_xor_sync(m, v, 8); }
      __syncwarp();
      y[i] = __shfl_sync(~0u, v, 31 - i);
    }
    """
    result, _ = run_cuda(source, {"y": np.empty(32, np.int32)}, outputs=("y",))
    v = np.array([i * i + (i * (i - 1) // 2 if i < 16 else 0) for i in range(32)])
    v = np.where(LANES < 16, v[LANES ^ 1], v[LANES ^ 8])
    np.testing.assert_array_equal(result["y"], v[31 - LANES])


def test_one_lane_is_elected() -> None:
    source = """
    extern "C" __global__ void kernel(int* y) {
      int i = threadIdx.x, p, who;
      asm volatile("{ .reg .pred q; elect.sync %0|q, 0xffffffff; selp.s32 %1, 1, 0, q; }" : "=r"(who), "=r"(p));
      y[i] = who * 10 + p;
    }
    """
    arrays = {"y": np.empty(64, np.int32)}
    result, _ = run_cuda(
        source, arrays, block=64, outputs=("y",), options=("--gpu-architecture=compute_90",), arch="sm_90"
    )
    assert result["y"].tolist() == [1] + [0] * 31 + [1] + [0] * 31


@pytest.mark.parametrize("warp_order", [None, 0, 1])
def test_block_reduction(warp_order: int | None) -> None:
    source = """
    extern "C" __global__ void kernel(const float* x, float* y) {
      __shared__ float part[8];
      float v = x[blockIdx.x * 256 + threadIdx.x];
      for (int k = 16; k; k /= 2) v += __shfl_down_sync(~0u, v, k);
      if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
      __syncthreads();
      if (threadIdx.x == 0) { float s = 0; for (int k = 0; k < 8; k++) s += part[k]; y[blockIdx.x] = s; }
    }
    """
    x = np.random.default_rng(2).integers(0, 100, (5, 256)).astype(np.float32)
    result, _ = run_cuda(
        source, {"x": x, "y": np.empty(5, np.float32)}, grid=5, block=256, outputs=("y",), warp_order=warp_order
    )
    np.testing.assert_array_equal(result["y"], x.sum(1))


@pytest.mark.parametrize("space", ["global", "shared"])
def test_atomics(space: str) -> None:
    source = """
    extern "C" __global__ void kernel(int* g, unsigned* old, float* f) {
      __shared__ int s[16];
      if (threadIdx.x < 16) s[threadIdx.x] = g[threadIdx.x];
      __syncthreads();
      int* a = SPACE; int i = threadIdx.x, bin = i % 3;
      atomicAdd(&a[bin], i); atomicMax(&a[3 + bin], i); atomicMin(&a[6 + bin], -i); atomicOr((unsigned*)&a[9],
        1u << (i % 32)); atomicXor(&a[10], i);
      old[i] = atomicAdd(&a[11], 1); atomicInc((unsigned*)&a[12], 9); atomicDec((unsigned*)&a[13], 5);
        atomicExch(&a[14], 77); atomicCAS(&a[15], 0, i + 1);
      atomicAdd(f, 0.5f);
      __syncthreads();
      if (a != g && i < 16) g[i] = s[i];
    }
    """.replace("SPACE", {"global": "g", "shared": "s"}[space])
    arrays = {"g": np.zeros(16, np.int32), "old": np.empty(96, np.uint32), "f": np.zeros(1, np.float32)}
    result, _ = run_cuda(source, arrays, block=96, outputs=("old",))
    i = np.arange(96)
    g = result["g"]
    assert g[:3].tolist() == [int(i[i % 3 == b].sum()) for b in range(3)]
    assert g[3:6].tolist() == [int(i[i % 3 == b].max()) for b in range(3)]
    assert g[6:9].tolist() == [-int(i[i % 3 == b].max()) for b in range(3)]
    assert g[9] == -1
    assert g[10] == np.bitwise_xor.reduce(i)
    assert g[11] == 96
    assert sorted(result["old"].tolist()) == list(range(96))
    assert g[12] == 96 % 10
    assert g[14] == 77
    assert 1 <= g[15] <= 96
    assert result["f"][0] == 48


def test_atomics_on_short_and_long_types() -> None:
    source = """
    extern "C" __global__ void kernel(double* d, unsigned long long* u, unsigned* h) {
      atomicAdd(d, 0.25); atomicAdd(u, 1ull << 33); atomicMax(u + 1, (unsigned long long)threadIdx.x << 40);
      asm volatile("red.global.add.noftz.f16x2 [%0], %1;" :: "l"(h), "r"(0x3C003C00) : "memory");
    }
    """
    arrays = {"d": np.zeros(1), "u": np.zeros(2, np.uint64), "h": np.zeros(1, np.uint32)}
    result, _ = run_cuda(source, arrays)
    assert result["d"][0] == 8
    assert result["u"].tolist() == [32 << 33, 31 << 40]
    np.testing.assert_array_equal(result["h"].view(np.float16), [32, 32])


def test_atomic_sums_of_float32_flush_subnormals_in_global_memory_alone() -> None:
    source = """
    extern "C" __global__ void kernel(float* g, float* y) {
      __shared__ float s; s = 0; atomicAdd(&s, 1e-39f); *y = s; atomicAdd(g, 1e-39f); atomicAdd(g + 1, -1e-38f);
    }
    """
    result, _ = run_cuda(source, {"g": np.float32([0, 1.2e-38]), "y": np.zeros(1, np.float32)}, block=1)
    assert result["y"][0] == np.float32(1e-39)
    assert result["g"].tolist() == [0, np.float32(1.2e-38)]


@pytest.mark.parametrize("count", [2, 4])
def test_vector_sums_in_global_memory(count: int) -> None:
    """Each element is added by itself; lanes may meet in one place, and one that is guarded adds nothing."""
    places = ", ".join(f"%{k + 1}" for k in range(count))
    values = ", ".join(f'"f"(i + {k}.0f)' for k in range(count))
    source = f"""
    extern "C" __global__ void kernel(float* y) {{
      int i = threadIdx.x;
      if (i % 5 != 0)
        asm volatile("red.relaxed.gpu.global.add.v{count}.f32 [%0], {{{places}}};"
                     :: "l"(y + {count} * (i / 4)), {values} : "memory");
    }}"""
    device = Device("sm_90")
    y = device.to_device(np.ones((9, count), np.float32), name="y")
    kernel = device.load(compile_cuda(source).replace(".target sm_80", ".target sm_90")).kernel("kernel")
    report = kernel.launch(1, 32, [y])
    expected = np.ones((9, count), np.float32)
    for i in LANES[LANES % 5 != 0]:
        expected[i // 4] += i + np.arange(count)
    np.testing.assert_array_equal(y.to_host(), expected)
    assert report.global_written == report.global_read == 25 * 4 * count
    with pytest.raises(Misaligned):
        kernel.launch(1, 32, [np.uint64(y.pointer + 4)])


@pytest.mark.parametrize("warp_order", [None, 3])
def test_named_barriers_hand_over_between_warps(warp_order: int | None) -> None:
    """A producer warp fills a buffer, a consumer warp empties it: arrive and sync on two barriers."""
    source = """
    extern "C" __global__ void kernel(const int* x, int* y, int rounds) {
      __shared__ int buffer[32];
      int lane = threadIdx.x % 32;
      if (threadIdx.x < 32) {
        for (int r = 0; r < rounds; r++) {
          if (r) asm volatile("bar.sync 2, 64;" ::: "memory");
          buffer[lane] = x[r * 32 + lane] * 2;
          asm volatile("bar.arrive 1, 64;" ::: "memory");
        }
      } else {
        for (int r = 0; r < rounds; r++) {
          asm volatile("bar.sync 1, 64;" ::: "memory");
          y[r * 32 + lane] = buffer[31 - lane] + 1;
          if (r + 1 < rounds) asm volatile("bar.arrive 2, 64;" ::: "memory");
        }
      }
    }
    """
    x = np.arange(160, dtype=np.int32).reshape(5, 32)
    arrays = {"x": x, "y": np.empty((5, 32), np.int32)}
    result, _ = run_cuda(source, arrays, np.int32(5), block=64, outputs=("y",), warp_order=warp_order)
    np.testing.assert_array_equal(result["y"], x[:, ::-1] * 2 + 1)


def test_barrier_reductions() -> None:
    source = """
    extern "C" __global__ void kernel(const int* x, int* y) {
      int i = threadIdx.x;
      for (int r = 0; r < 2; r++) { int v = x[i] + r;
        y[r * 288 + i] = __syncthreads_count(v > 5); y[r * 288 + 96 + i] = __syncthreads_or(v > 9);
          y[r * 288 + 192 + i] = __syncthreads_and(v > 0); }
    }
    """
    x = np.random.default_rng(3).integers(0, 9, 96).astype(np.int32)
    result, _ = run_cuda(source, {"x": x, "y": np.empty((2, 3, 96), np.int32)}, block=96, outputs=("y",))
    for r in range(2):
        v = x + r
        assert (result["y"][r, 0] == (v > 5).sum()).all()
        assert (result["y"][r, 1] == int((v > 9).any())).all()
        assert (result["y"][r, 2] == int((v > 0).all())).all()


def test_warps_that_wait_for_each_other_by_flags_make_progress() -> None:
    """Warp 0 spins on a flag that warp 1 sets: the lowest program counter alone would never let warp 1 run."""
    source = """
    extern "C" __global__ void kernel(int* y) {
      __shared__ int flag; volatile int* f = &flag;
      if (threadIdx.x == 0) flag = 0;
      __syncthreads();
      if (threadIdx.x < 32) { while (atomicAdd(&flag, 0) == 0) { } y[threadIdx.x] = 5; }
      else { int s = 0; for (int k = 0; k < 50; k++) s += k * (int)threadIdx.x % 7; y[threadIdx.x] = s;
        __threadfence_block(); if (threadIdx.x == 32) atomicExch(&flag, 1); }
    }
    """
    for order in (None, 1):
        result, _ = run_cuda(source, {"y": np.empty(64, np.int32)}, block=64, outputs=("y",), warp_order=order)
        assert (result["y"][:32] == 5).all()


def test_blocks_that_wait_for_each_other_by_semaphores() -> None:
    """Blocks add in turn: each waits for its number, adds without atomics, and passes the turn on."""
    source = """
    extern "C" __global__ void kernel(float* sum, int* turn) {
      if (threadIdx.x == 0) { while (atomicAdd(turn, 0) != (int)blockIdx.x) { } __threadfence(); }
      __syncthreads();
      sum[threadIdx.x] = sum[threadIdx.x] * 0.5f + blockIdx.x;
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) atomicAdd(turn, 1);
    }
    """
    arrays = {"sum": np.zeros(32, np.float32), "turn": np.zeros(1, np.int32)}
    result, _ = run_cuda(source, arrays, grid=8)
    expected = 0.0
    for block in range(8):
        expected = expected * 0.5 + block
    assert (result["sum"] == np.float32(expected)).all()


def test_device_keeps_results_equal_under_every_order() -> None:
    source = """
    extern "C" __global__ void kernel(const float* x, float* y, int n) {
      __shared__ float tile[2][128];
      float s = 0; int i = threadIdx.x;
      for (int k = 0; k < n; k++) {
        tile[k & 1][i] = x[k * 128 + i] * 1.1f;
        __syncthreads();
        s = s * 0.9f + tile[k & 1][(i * 37 + k) & 127];
      }
      y[i] = s;
    }
    """
    x = np.random.default_rng(4).standard_normal((9, 128)).astype(np.float32)
    results = []
    for order in (None, *range(6)):
        device = Device(warp_order=order)
        dx, dy = device.to_device(x, name="x"), device.empty(128, np.float32, name="y")
        device.load(compile_cuda(source)).kernel("kernel").launch(1, 128, [dx, dy, np.int32(9)])
        results.append(dy.to_host().view(np.uint32))
    assert all((r == results[0]).all() for r in results)


def test_atomics_beside_narrower_accesses_are_no_race() -> None:
    """A byte and a counter in one line of 16 bytes: the byte makes the line's history finer between two atomics."""
    source = """
    extern "C" __global__ void kernel(int* y) {
      __shared__ __align__(16) struct { int counter; char flag; } s; int i = threadIdx.x;
      if (i == 0) s.counter = 0;
      __syncthreads();
      if (i < 32) atomicAdd(&s.counter, i); else if (i == 32) s.flag = 1;
      if (i >= 32) atomicAdd(&s.counter, i);
      __syncthreads();
      y[i] = s.counter + s.flag;
    }
    """
    for order in (None, 0, 1, 2):
        result, _ = run_cuda(source, {"y": np.empty(64, np.int32)}, block=64, outputs=("y",), warp_order=order)
        assert (result["y"] == 63 * 32 + 1).all()


HAND_OVER = """
extern "C" __global__ void kernel(int* y) {
  __shared__ int s[64]; int i = threadIdx.x;
  if (i < 32) { FIRST asm volatile("bar.arrive 1, 64;" ::: "memory"); SECOND }
  else { BEFORE asm volatile("bar.sync 1, 64;" ::: "memory"); AFTER }
}
"""


@pytest.mark.parametrize("warp_order", [None, 0, 1, 2])
@pytest.mark.parametrize(
    ("race", "places"),
    [
        (False, {"FIRST": "s[i] = i;", "AFTER": "y[i] = s[i ^ 32];"}),
        (True, {"SECOND": "s[i] = i;", "AFTER": "y[i] = s[i ^ 32];"}),  # written after the arrival that announced it
        (True, {"BEFORE": "s[i ^ 32] = i;", "SECOND": "y[i] = s[i];"}),  # who only arrives has waited for nothing
        (True, {"BEFORE": "y[i] = s[i ^ 32];", "SECOND": "s[i] = i;"}),
        (False, {"BEFORE": "s[i] = i;", "AFTER": "y[i] = s[i ^ 1];"}),  # who waits is in step with its own warp
        (True, {"FIRST": "s[i] = i;", "SECOND": "y[i] = s[i ^ 1];"}),  # who arrives is not
    ],
)
def test_arriving_gives_order_and_waiting_takes_it(race: bool, places: dict[str, str], warp_order: int | None) -> None:
    source = HAND_OVER
    for place in ("FIRST", "SECOND", "BEFORE", "AFTER"):
        source = source.replace(place, places.get(place, ""))
    arrays = {"y": np.zeros(64, np.int32)}
    if not race:
        run_cuda(source, arrays, block=64, warp_order=warp_order)
        return
    with pytest.raises((Race, Uninitialized)):
        run_cuda(source, arrays, block=64, warp_order=warp_order)
