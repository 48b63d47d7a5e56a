"""Arrays of the device: strides, alignment, gaps, life; loads and stores of every width; asynchronous copies."""

from __future__ import annotations

import numpy as np
import pytest

from cuflash.emulator import Device, InvalidLaunch, Misaligned, OutOfBounds, Uninitialized
from tests.emulator.programs import compile_cuda, run_cuda

COPY = """
extern "C" __global__ void kernel(const float* x, float* y, long long row, long long column, int columns) {
  int i = blockIdx.x, j = threadIdx.x;
  if (j < columns) y[i * columns + j] = x[i * row + j * column];
}
"""


def copy(view: np.ndarray, rows: int | None = None, columns: int | None = None) -> np.ndarray:
    """A 2-D float32 view read in place through its strides."""
    device = Device()
    x = device.to_device(view, name="x")
    rows, columns = rows or view.shape[0], columns or view.shape[1]
    y = device.empty((rows, columns), np.float32, name="y")
    strides = [np.int64(s // 4) for s in x.strides]
    device.load(compile_cuda(COPY)).kernel("kernel").launch(rows, 64, [x, y, *strides, np.int32(columns)])
    return y.to_host()


VIEWS = {
    "dense": lambda a: a,
    "columns": lambda a: a[:, 3:20],
    "steps": lambda a: a[::2, 1::3],
    "transposed": lambda a: a.T[:30],
    "reversed": lambda a: a[::-1, ::-1],
    "partly reversed": lambda a: a[5:1:-1, 4:30],
    "one row for all": lambda a: np.broadcast_to(a[2], (9, 40)),
    "one value for all": lambda a: np.broadcast_to(a[1:2, 1:2], (4, 5)),
    "sliding": lambda a: np.lib.stride_tricks.sliding_window_view(a[0], 8),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_are_used_in_place(name: str) -> None:
    a = np.arange(40 * 40, dtype=np.float32).reshape(40, 40)
    view = VIEWS[name](a)
    device = Device()
    array = device.to_device(view, name="x")
    assert array.shape == view.shape
    assert array.strides == view.strides
    assert array.pointer % 16 == (view.__array_interface__["data"][0] - a.__array_interface__["data"][0]) % 16
    np.testing.assert_array_equal(array.to_host(), view)
    np.testing.assert_array_equal(copy(view), view)


def test_gaps_between_elements_belong_to_nobody() -> None:
    a = np.arange(80, dtype=np.float32).reshape(8, 10)
    np.testing.assert_array_equal(copy(a[:, :6]), a[:, :6])
    with pytest.raises(
        OutOfBounds, match=r"read of 4 bytes at global address 0x\w+, byte 24 of 'x' \(304 bytes\)"
    ) as fault:
        copy(a[:, :6], columns=7)
    assert fault.value.block == (0, 0, 0)
    assert fault.value.thread == (6, 0, 0)
    assert fault.value.threads == 8
    with pytest.raises(OutOfBounds, match="'x'"):
        copy(a[:, :6], rows=9)


def test_pointer_of_reversed_view_is_its_first_element() -> None:
    device = Device()
    a = np.arange(10, dtype=np.int32)
    forward, backward = device.to_device(a, name="a"), device.to_device(a[::-1], name="b")
    assert forward.pointer % 256 == 0
    assert backward.pointer % 256 == 36
    np.testing.assert_array_equal(backward.to_host(), a[::-1])


def test_alignment_follows_the_view() -> None:
    source = """
    extern "C" __global__ void kernel(const float4* x, float* y) {
      float4 v = x[threadIdx.x]; y[threadIdx.x] = v.x + v.y + v.z + v.w;
    }
    """
    a = np.arange(64, dtype=np.float32)
    result, _ = run_cuda(source, {"x": a[4:], "y": np.empty(8, np.float32)}, block=8, outputs=("y",))
    np.testing.assert_array_equal(result["y"], a[4:36].reshape(8, 4).sum(1))
    with pytest.raises(Misaligned, match="not a multiple of 16") as fault:
        run_cuda(source, {"x": a[1:], "y": np.empty(8, np.float32)}, block=8, outputs=("y",))
    assert fault.value.threads == 8


def test_unwritten_elements_are_reported() -> None:
    device = Device()
    array = device.empty((4, 6), np.float16, name="scores")
    with pytest.raises(Uninitialized, match=r"scores\[0, 0\] was never written \(24 of 24 elements\)"):
        array.to_host()
    assert device.empty((0, 5), np.float32).to_host().shape == (0, 5)


def test_empty_like_keeps_strides() -> None:
    source = 'extern "C" __global__ void kernel(float* y, long long step) { y[threadIdx.x * step] = threadIdx.x; }'
    host = np.zeros((20, 3), np.float32)
    device = Device()
    array = device.empty_like(host[:, 1], name="y")
    assert array.strides == (12,)
    device.load(compile_cuda(source)).kernel("kernel").launch(1, 20, [array, np.int64(3)])
    np.testing.assert_array_equal(array.to_host(), np.arange(20))


def test_memory_is_used_again() -> None:
    device = Device()
    first = device.to_device(np.zeros(1000), name="first")
    for _ in range(300):
        array = device.to_device(np.ones(10000), name="again")
        second = device.empty(77, np.int8)
        device.free(array)
        device.free(second)
    assert len(device._memory.data) <= 1 << 20
    assert array.pointer > first.pointer


def test_freed_memory_cannot_be_read() -> None:
    device = Device()
    x = device.to_device(np.ones((2, 64), np.float32), name="gone")
    y = device.empty((2, 64), np.float32, name="y")
    device.free(x)
    with pytest.raises(OutOfBounds):
        device.load(compile_cuda(COPY)).kernel("kernel").launch(2, 64, [x, y, np.int64(64), np.int64(1), np.int32(64)])


def test_large_arrays_grow_the_memory() -> None:
    device = Device()
    small = device.to_device(np.arange(5.0), name="small")
    large = device.to_device(np.full((3, 1 << 20), 7, np.int32), name="large")
    np.testing.assert_array_equal(small.to_host(), np.arange(5.0))
    assert (large.to_host() == 7).all()


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "i4", "u8", "f8", "f2", "c8"])
def test_arrays_of_many_types_survive(dtype: str) -> None:
    a = np.arange(24).reshape(2, 3, 4).astype(dtype)
    device = Device()
    for view in (a, a[:, ::2], a.transpose(2, 0, 1)[::-1], a[..., 0]):
        np.testing.assert_array_equal(device.to_device(view).to_host(), view)


def test_loads_and_stores_of_every_width() -> None:
    source = """
    struct Words { unsigned char b; signed char sb; unsigned short h; short sh; unsigned w; unsigned long long d;
      uint2 v2; uint4 v4; double2 d2; };
    extern "C" __global__ void kernel(const Words* x, Words* y, long long* z) {
      int i = threadIdx.x; __shared__ Words s[64]; Words w;
      w.b = x[i].b; w.sb = x[i].sb; w.h = x[i].h; w.sh = x[i].sh; w.w = x[i].w; w.d = x[i].d; w.v2 = x[i].v2;
        w.v4 = x[i].v4; w.d2 = x[i].d2;
      s[i].b = w.b; s[i].sb = w.sb; s[i].h = w.h; s[i].sh = w.sh; s[i].w = w.w; s[i].d = w.d; s[i].v2 = w.v2;
        s[i].v4 = w.v4; s[i].d2 = w.d2;
      __syncthreads();
      int j = 63 - i;
      y[i].b = s[j].b; y[i].sb = s[j].sb; y[i].h = s[j].h; y[i].sh = s[j].sh; y[i].w = s[j].w; y[i].d = s[j].d;
        y[i].v2 = s[j].v2; y[i].v4 = s[j].v4; y[i].d2 = s[j].d2;
      z[i] = (long long)s[j].sb * 3 + s[j].sh + s[j].b + s[j].h;
    }
    """
    rng = np.random.default_rng(0)
    layout = {
        "names": ["b", "sb", "h", "sh", "w", "d", "v2", "v4", "d2"],
        "formats": ["u1", "i1", "u2", "i2", "u4", "u8", ("u4", 2), ("u4", 4), ("f8", 2)],
        "offsets": [0, 1, 2, 4, 8, 16, 24, 32, 48],
        "itemsize": 64,
    }
    x = np.zeros(64, np.dtype(layout))
    for name in x.dtype.names:
        part = x[name]
        part[...] = (
            rng.standard_normal(part.shape)
            if part.dtype.kind == "f"
            else rng.integers(-100, 100, part.shape).astype(part.dtype)
        )
    device = Device()
    dx = device.to_device(x.view(np.uint8), name="x")
    y, z = device.to_device(np.zeros(64 * 64, np.uint8), name="y"), device.empty(64, np.int64, name="z")
    device.load(compile_cuda(source)).kernel("kernel").launch(1, 64, [dx, y, z])
    result = y.to_host().view(x.dtype)
    for name in x.dtype.names:
        np.testing.assert_array_equal(result[name], x[name][::-1])
    reverse = x[::-1]
    expected = reverse["sb"].astype("i8") * 3 + reverse["sh"] + reverse["b"] + reverse["h"]
    np.testing.assert_array_equal(z.to_host(), expected)


def test_generic_addresses_reach_every_space() -> None:
    source = """
    __device__ __noinline__ void add(int* p, const int* q, int n) { for (int k = 0; k < n; k++) p[k] += q[k]; }
    extern "C" __global__ void kernel(int* x, int* y) {
      __shared__ int s[64]; int i = threadIdx.x, a[2] = {i, i * 2};
      s[i] = 5;
      int* p = i % 3 == 0 ? &s[i] : i % 3 == 1 ? &x[i] : &a[i & 1];
      add(p, i % 2 ? &x[64 + i] : &a[1], 1);
      y[i] = *p + a[0];
      y[64 + i] = __isShared(p) + 2 * __isGlobal(p) + 4 * __isLocal(p);
    }
    """
    x = np.arange(128, dtype=np.int32)
    result, _ = run_cuda(source, {"x": x, "y": np.empty(128, np.int32)}, block=64, outputs=("y",))
    for i in range(64):
        a = [i, 2 * i]
        added = int(x[64 + i]) if i % 2 else a[1]
        if i % 3 == 0:
            value, kind = 5 + added, 1
        elif i % 3 == 1:
            value, kind = i + added, 2
        else:
            a[i & 1] += added
            value, kind = a[i & 1], 4
        assert result["y"][i] == value + a[0], i
        assert result["y"][64 + i] == kind


ASYNC = """
extern "C" __global__ void kernel(const char* x, char* y, const int* lengths, int skip) {
  __shared__ __align__(16) char s[64 * SIZE];
  int i = threadIdx.x; unsigned a = (unsigned)__cvta_generic_to_shared(s + i * SIZE);
  const char* p = x + i * SIZE;
  FORM
  asm volatile("cp.async.commit_group;\\ncp.async.wait_group 0;" ::: "memory");
  __syncthreads();
  for (int k = 0; k < SIZE; k++) y[(63 - i) * SIZE + k] = s[(63 - i) * SIZE + k];
}
"""
COPY_AS = 'asm volatile("{ .reg .pred q; setp.ne.s32 q, %2, 0; TEXT }" :: "r"(a), "l"(p), "r"(VALUE) : "memory");'
INSTRUCTION = "cp.async.ca.shared.global [%0], [%1], SIZE"
FORMS = {
    "whole": COPY_AS.replace("TEXT", INSTRUCTION + ";").replace("VALUE", "0"),
    "source size": COPY_AS.replace("TEXT", INSTRUCTION.replace("global", "global.L2::128B") + ", %2;").replace(
        "VALUE", "lengths[i]"
    ),
    "ignored": COPY_AS.replace("TEXT", INSTRUCTION + ", q;").replace("VALUE", "(int)(i % 5 == 0)"),
    "guarded": "for (int k = 0; k < SIZE; k++) s[i * SIZE + k] = -1;"
    + COPY_AS.replace("TEXT", "@q " + INSTRUCTION + ";").replace("VALUE", "i % 5"),
}


@pytest.mark.parametrize("size", [4, 8, 16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("copies", ["late", "early"])
def test_asynchronous_copies(size: int, form: str, copies: str) -> None:
    rng = np.random.default_rng(1)
    x = rng.integers(1, 100, (64, size)).astype(np.int8)
    lengths = rng.choice(np.unique([0, 1, size // 2, size - 1, size]), 64).astype(np.int32)
    expected = x.copy()
    read = x.size
    if form == "source size":
        expected[np.arange(size) >= lengths[:, None]] = 0
        read = int(lengths.sum())
    elif form in ("ignored", "guarded"):
        expected[::5] = 0 if form == "ignored" else -1
        read = size * 51
    source = ASYNC.replace("FORM", FORMS[form]).replace("SIZE", str(size))
    arrays = {"x": x, "y": np.empty((64, size), np.int8), "lengths": lengths}
    result, report = run_cuda(source, arrays, np.int32(0), block=64, outputs=("y",), copies=copies)
    np.testing.assert_array_equal(result["y"], expected)
    assert report.read_by_array["x"] == read
    assert report.async_copies == (51 if form == "guarded" else 64)


def test_cache_policies_change_nothing() -> None:
    source = """
    extern "C" __global__ void kernel(const int* x, int* y) {
      __shared__ __align__(16) int s[128]; int i = threadIdx.x, v;
        unsigned a = (unsigned)__cvta_generic_to_shared(s + 4 * i);
      unsigned long long policy;
      asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
      asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;\\ncp.async.wait_all;"
                   :: "r"(a), "l"(x + 4 * i), "r"(8), "l"(policy) : "memory");
      asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.b32 %0, [%1], %2;" : "=r"(v) : "l"(x + i), "l"(policy));
      asm volatile("prefetch.global.L2 [%0];" :: "l"(x));
      asm volatile("st.global.cs.L2::cache_hint.b32 [%0], %1, %2;"
                   :: "l"(y + i), "r"(v + s[4 * i + 1] + s[4 * i + 2]), "l"(policy) : "memory");
    }
    """
    x = np.arange(128, dtype=np.int32)
    result, _ = run_cuda(source, {"x": x, "y": np.empty(32, np.int32)}, outputs=("y",))
    assert result["y"].tolist() == [i + 4 * i + 1 for i in range(32)]


def test_a_copy_of_nothing_reads_nothing() -> None:
    """With a source size of zero the address is not looked at, so it may lie anywhere."""
    source = """
    extern "C" __global__ void kernel(const char* x, int* y) {
      __shared__ __align__(16) int s[128]; int i = threadIdx.x;
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, 0;\\ncp.async.wait_all;" :
        : "r"((unsigned)__cvta_generic_to_shared(s + i * 4)), "l"(x + 1000000) : "memory");
      y[i] = s[i * 4] + s[i * 4 + 3];
    }
    """
    result, report = run_cuda(source, {"x": np.zeros(4, np.int8), "y": np.empty(32, np.int32)}, outputs=("y",))
    assert (result["y"] == 0).all()
    assert report.global_read == 0


GROUPS = """
extern "C" __global__ void kernel(const int* x, int* y) {
  __shared__ __align__(16) int s[4][32]; int i = threadIdx.x;
  for (int k = 0; k < 4; k++) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"((unsigned)__cvta_generic_to_shared(&s[k][i])),
      "l"(x + k * 32 + i) : "memory");
    asm volatile("cp.async.commit_group;" ::: "memory");
  }
  asm volatile("cp.async.wait_group 2;" ::: "memory"); y[i] = s[0][i]; y[32 + i] = s[1][i];
  asm volatile("cp.async.wait_group WAIT;" ::: "memory"); y[64 + i] = s[2][i]; y[96 + i] = s[3][i];
}
"""


def test_groups_complete_in_order() -> None:
    x = np.arange(128, dtype=np.int32)
    result, _ = run_cuda(GROUPS.replace("WAIT", "0"), {"x": x, "y": np.empty(128, np.int32)}, outputs=("y",))
    np.testing.assert_array_equal(result["y"], x)


def test_lanes_wait_for_their_own_groups() -> None:
    """Lanes commit different numbers of groups; wait_group counts each lane's own."""
    source = """
    extern "C" __global__ void kernel(const int* x, int* y) {
      __shared__ __align__(16) int s[3][32]; int i = threadIdx.x, n = i % 3 + 1;
      for (int k = 0; k < n; k++) {
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4;\\ncp.async.commit_group;" :
          : "r"((unsigned)__cvta_generic_to_shared(&s[k][i])), "l"(x + k * 32 + i) : "memory");
      }
      asm volatile("cp.async.wait_group 1;" ::: "memory");
      int v = 0; for (int k = 0; k + 1 < n; k++) v += s[k][i];
      y[i] = v;
    }
    """
    x = np.arange(96, dtype=np.int32)
    for copies in ("late", "early"):
        result, _ = run_cuda(source, {"x": x, "y": np.empty(32, np.int32)}, outputs=("y",), copies=copies)
        assert result["y"].tolist() == [[0, i, i + 32 + i][i % 3] for i in range(32)]


def test_a_group_of_lanes_that_commit_apart() -> None:
    """A copy belongs to the group that was open when it was issued, however its warp's lanes commit afterwards."""
    source = """
    extern "C" __global__ void kernel(const int* x, int* y) {
      __shared__ __align__(16) int s[3][32]; int i = threadIdx.x;
      for (int k = 0; k < 3; k++) {
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::
          "r"((unsigned)__cvta_generic_to_shared(&s[k][i])), "l"(x + k * 32 + i) : "memory");
        if (i % 4 == 0) asm volatile("cp.async.commit_group; // one" ::: "memory");
        else asm volatile("cp.async.commit_group; // other" ::: "memory");
      }
      asm volatile("cp.async.wait_group 0;" ::: "memory");
      y[i] = s[0][i] + s[1][i] + s[2][i];
    }
    """
    x = np.arange(96, dtype=np.int32)
    result, _ = run_cuda(source, {"x": x, "y": np.empty(32, np.int32)}, outputs=("y",))
    assert result["y"].tolist() == [3 * i + 96 for i in range(32)]


LAUNCHES = {
    "block = 1025: must be": {"block": 1025},
    "compiled for at most 128": {"block": 129},
    "grid = (0, 1): must be": {"grid": (0, 1)},
    "grid = (1, 70000)": {"grid": (1, 70000)},
    "at most 166912 on sm_80": {"shared_bytes": 166912},
    "shared_bytes = -1": {"shared_bytes": -1},
    "args has 1 values": {"args": 1},
    "parameter 1 of kernel has 4": {"args": (None, np.int64(3))},
    "must be a DeviceArray": {"args": (None, 3)},
}


@pytest.mark.parametrize("message", LAUNCHES)
def test_launches_that_a_device_refuses(message: str) -> None:
    source = """
    extern "C" __global__ void __launch_bounds__(128) kernel(int* y, int n) {
      __shared__ volatile int s[64]; int i = threadIdx.x % 64; s[i] = n; y[threadIdx.x] = s[i];
    }
    """
    device = Device()
    y = device.empty(128, np.int32, name="y")
    kernel = device.load(compile_cuda(source)).kernel("kernel")
    assert kernel.maxntid == (128, 1, 1)
    assert kernel.static_shared_bytes == 256
    assert kernel.param_sizes == (8, 4)
    given = LAUNCHES[message]
    args = given.get("args", (y, np.int32(1)))
    args = (y,) if args == 1 else tuple(y if a is None else a for a in args)
    with pytest.raises(InvalidLaunch) as fault:
        kernel.launch(given.get("grid", 1), given.get("block", 32), args, shared_bytes=given.get("shared_bytes", 0))
    assert message in str(fault.value)
    assert isinstance(fault.value, ValueError)


def test_kernels_of_a_module_have_shared_memory_of_their_own() -> None:
    source = """
    __shared__ volatile int both[10];
    extern "C" __global__ void first(int* y) { __shared__ volatile int a[100]; a[threadIdx.x] = 1; both[0] = a[0]; }
    extern "C" __global__ void second(int* y) { __shared__ volatile int b[7]; b[threadIdx.x % 7] = 1; }
    extern "C" __global__ void third(int* y) { extern __shared__ int c[]; c[threadIdx.x] = y[threadIdx.x];
      y[threadIdx.x] = c[threadIdx.x]; }
    """
    device = Device()
    module = device.load(compile_cuda(source))
    assert module.kernels == ("first", "second", "third")
    assert [module.kernel(name).static_shared_bytes for name in module.kernels] == [440, 28, 0]
    y = device.to_device(np.arange(32, dtype=np.int32), name="y")
    with pytest.raises(OutOfBounds, match="outside the 64 bytes"):
        module.kernel("third").launch(1, 32, [y], shared_bytes=64)
    module.kernel("third").launch(1, 32, [y], shared_bytes=128)


def test_bad_devices_arrays_and_kernels() -> None:
    with pytest.raises(InvalidLaunch, match="arch = 'sm_75'"):
        Device("sm_75")
    with pytest.raises(InvalidLaunch, match="copies = 'sometimes'"):
        Device(copies="sometimes")
    with pytest.raises(InvalidLaunch, match="must not hold Python objects"):
        Device().to_device(np.array([object()]))
    module = Device().load(compile_cuda('extern "C" __global__ void kernel() {}'))
    with pytest.raises(InvalidLaunch, match="kernel = 'other': must be one of kernel"):
        module.kernel("other")
    source = 'extern "C" __global__ void kernel(int* y) { *y = 1; }'
    device = Device()
    with pytest.raises(InvalidLaunch, match="lives on another device"):
        device.load(compile_cuda(source)).kernel("kernel").launch(1, 1, [Device().empty(1, np.int32)])
