"""Matrix instructions: fragments laid out as the PTX ISA draws them, products against float64."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from cuflash.emulator import Device
from tests.emulator.programs import compile_cuda, run_cuda

BF16 = np.dtype(ml_dtypes.bfloat16)
GROUP, QUAD = np.arange(32) // 4, np.arange(32) % 4


def multiply(
    shape: str, types: str, a: np.ndarray, b: np.ndarray, c: np.ndarray, device: Device | None = None
) -> np.ndarray:
    """One mma.sync per warp on fragments (warps, 32, registers); returns d's fragments."""
    letters = {"f8": "d", "f4": "f", "u4": "r"}
    ca, cb, cc = (letters[x.dtype.str[1:]] for x in (a, b, c))
    kinds = {"d": "double", "f": "float", "r": "unsigned"}
    na, nb, nc = (x.shape[-1] for x in (a, b, c))
    places = iter(range(nc + na + nb + nc))
    text = ", ".join("{" + ", ".join(f"%{next(places)}" for _ in range(n)) + "}" for n in (nc, na, nb, nc))
    outs = ", ".join(f'"={cc}"(d[{k}])' for k in range(nc))
    ins = ", ".join(
        [f'"{ca}"(A[{k}])' for k in range(na)]
        + [f'"{cb}"(B[{k}])' for k in range(nb)]
        + [f'"{cc}"(C[{k}])' for k in range(nc)]
    )
    source = f"""
    extern "C" __global__ void kernel(const {kinds[ca]}* a, const {kinds[cb]}* b, const {kinds[cc]}* c,
      {kinds[cc]}* out) {{
      int i = blockIdx.x * blockDim.x + threadIdx.x;
      const {kinds[ca]}* A = a + i * {na}; const {kinds[cb]}* B = b + i * {nb}; const {kinds[cc]}* C = c + i * {nc};
      {kinds[cc]} d[{nc}];
      asm volatile("mma.sync.aligned.{shape}.row.col.{types} {text};" : {outs} : {ins});
      for (int k = 0; k < {nc}; k++) out[i * {nc} + k] = d[k];
    }}
    """
    device = device or Device()
    arrays = [device.to_device(np.ascontiguousarray(x), name=n) for x, n in zip((a, b, c), "abc", strict=True)]
    out = device.empty(c.shape, c.dtype, name="d")
    device.load(compile_cuda(source)).kernel("kernel").launch(1, 32 * len(a), [*arrays, out])
    return out.to_host()


def words16(matrix: np.ndarray) -> np.ndarray:
    """Pairs along the last axis as 32-bit words."""
    return np.ascontiguousarray(matrix).view(np.uint32)


def left16(a: np.ndarray) -> np.ndarray:
    """A (warps, 16, k) to fragments (warps, 32, k / 4): a0 (g, 2t), a1 (g + 8, 2t), a2 (g, 2t + 8), a3 both."""
    w = words16(a)
    return np.stack([w[:, GROUP + 8 * (r % 2), QUAD + 4 * (r // 2)] for r in range(a.shape[2] // 4)], -1)


def right16(b: np.ndarray) -> np.ndarray:
    """B (warps, k, 8) to fragments: b0 (2t, g), b1 (2t + 8, g)."""
    w = words16(b.swapaxes(1, 2))
    return np.stack([w[:, GROUP, QUAD + 4 * r] for r in range(b.shape[1] // 8)], -1)


def accumulators(c: np.ndarray) -> np.ndarray:
    """C (warps, rows, 8) to fragments: c0, c1 (g, 2t), (g, 2t + 1); c2, c3 eight rows below."""
    rows = c.shape[1] // 8
    return np.stack([c[:, GROUP + 8 * (r // 2), 2 * QUAD + r % 2] for r in range(2 * rows)], -1)


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("dtype", [np.dtype("f2"), BF16])
def test_mma_of_sixteen_bit_types(depth: int, dtype: np.dtype) -> None:
    rng = np.random.default_rng(0)
    a, b, c = (
        rng.standard_normal((4, 16, depth)),
        rng.standard_normal((4, depth, 8)),
        rng.standard_normal((4, 16, 8)).astype("f4"),
    )
    a, b = a.astype(dtype), b.astype(dtype)
    name = "bf16" if dtype == BF16 else "f16"
    result = multiply(f"m16n8k{depth}", f"f32.{name}.{name}.f32", left16(a), right16(b), accumulators(c))
    exact = a.astype("f8") @ b.astype("f8") + c
    np.testing.assert_allclose(result, accumulators(exact), rtol=0, atol=2e-6)
    if dtype != BF16:
        half = c.astype("f2")
        packed = words16(accumulators(half))
        result = multiply(f"m16n8k{depth}", "f16.f16.f16.f16", left16(a), right16(b), packed)
        np.testing.assert_allclose(result.view("f2"), accumulators(a.astype("f8") @ b.astype("f8") + half), atol=8e-3)


def test_mma_products_are_exact_and_integers_come_out_whole() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.integers(-60, 60, (2, 16, 16)), rng.integers(-60, 60, (2, 16, 8))
    c = rng.integers(-1000, 1000, (2, 16, 8))
    result = multiply(
        "m16n8k16", "f32.f16.f16.f32", left16(a.astype("f2")), right16(b.astype("f2")), accumulators(c.astype("f4"))
    )
    np.testing.assert_array_equal(result, accumulators(a @ b + c))


def test_mma_of_infinities_and_subnormals() -> None:
    a = np.zeros((1, 16, 16), "f2")
    b = np.zeros((1, 16, 8), "f2")
    a[0, 0, 0], b[0, 0, :] = np.inf, 1
    a[0, 1, 1], b[0, 1, :] = 2.0**-24, 1
    result = multiply("m16n8k16", "f32.f16.f16.f32", left16(a), right16(b), accumulators(np.zeros((1, 16, 8), "f4")))
    assert np.isinf(result[0, 0, 0])
    assert result[0, 4, 0] == 2.0**-24


@pytest.mark.parametrize("depth", [4, 8])
def test_mma_of_tf32(depth: int) -> None:
    rng = np.random.default_rng(2)
    a, b, c = (rng.standard_normal(s).astype("f4") for s in ((2, 16, depth), (2, depth, 8), (2, 16, 8)))
    left = np.stack([a[:, GROUP + 8 * (r % 2), QUAD + 4 * (r // 2)] for r in range(depth // 2)], -1).view("u4")
    right = np.stack([b[:, QUAD + 4 * r, GROUP] for r in range(depth // 4)], -1).view("u4")
    result = multiply(f"m16n8k{depth}", "f32.tf32.tf32.f32", left, right, accumulators(c))
    short_a, short_b = ((x.view("u4") & np.uint32(0xFFFFE000)).view("f4").astype("f8") for x in (a, b))
    np.testing.assert_allclose(result, accumulators(short_a @ short_b + c), atol=2e-6)


def test_mma_of_float64() -> None:
    rng = np.random.default_rng(3)
    a, b, c = rng.standard_normal((2, 8, 4)), rng.standard_normal((2, 4, 8)), rng.standard_normal((2, 8, 8))
    result = multiply(
        "m8n8k4", "f64.f64.f64.f64", a[:, GROUP, QUAD][..., None], b[:, QUAD, GROUP][..., None], accumulators(c)
    )
    np.testing.assert_allclose(result, accumulators(a @ b + c), atol=1e-14)


def test_mma_does_not_depend_on_how_many_warps_run_together() -> None:
    rng = np.random.default_rng(4)
    a, b, c = (
        rng.standard_normal((32, 16, 16)),
        rng.standard_normal((32, 16, 8)),
        rng.standard_normal((32, 16, 8)).astype("f4"),
    )
    fragments = left16(a.astype("f2")), right16(b.astype("f2")), accumulators(c)
    together = multiply("m16n8k16", "f32.f16.f16.f32", *fragments)
    for k in (0, 7, 31):
        alone = multiply("m16n8k16", "f32.f16.f16.f32", *(f[k : k + 1] for f in fragments))
        np.testing.assert_array_equal(alone[0].view("u4"), together[k].view("u4"))
    parts = multiply("m16n8k16", "f32.f16.f16.f32", *(f[5:16] for f in fragments), device=Device(warp_order=2))
    np.testing.assert_array_equal(parts.view("u4"), together[5:16].view("u4"))


@pytest.mark.parametrize("number", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(number: int, transposed: bool) -> None:
    trans = ".trans" if transposed else ""
    regs = ", ".join(f"%{k}" for k in range(number))
    outs = ", ".join(f'"=r"(r[{k}])' for k in range(number))
    source = f"""
    extern "C" __global__ void kernel(const unsigned short* x, unsigned* y) {{
      __shared__ __align__(16) unsigned short tile[64 * 8];
      for (int k = threadIdx.x; k < 512; k += 64) tile[k] = x[k];
      __syncthreads();
      int row = (threadIdx.x * 5 + 3) % 64; unsigned r[{number}];
      unsigned address = (unsigned)__cvta_generic_to_shared(tile + row * 8);
      asm volatile("ldmatrix.sync.aligned.m8n8.x{number}{trans}.shared.b16 {{{regs}}}, [%{number}];"
                   : {outs} : "r"(address));
      for (int k = 0; k < {number}; k++) y[threadIdx.x * {number} + k] = r[k];
    }}
    """
    x = np.arange(512, dtype=np.uint16)
    result, _ = run_cuda(source, {"x": x, "y": np.empty((64, number), np.uint32)}, block=64, outputs=("y",))
    tile = x.reshape(64, 8)
    for warp in range(2):
        rows = (np.arange(32 * warp, 32 * warp + 32) * 5 + 3) % 64
        for k in range(number):
            matrix = tile[rows[8 * k : 8 * k + 8]]
            matrix = matrix.T if transposed else matrix
            expected = np.ascontiguousarray(matrix).view(np.uint32).reshape(32)
            np.testing.assert_array_equal(result["y"][32 * warp : 32 * warp + 32, k], expected)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("number", [1, 2, 4])
def test_stmatrix_is_the_inverse_of_ldmatrix(number: int, transposed: bool) -> None:
    trans = ".trans" if transposed else ""
    ins = ", ".join(f'"r"(r[{k}])' for k in range(number))
    regs = ", ".join(f"%{k + 1}" for k in range(number))
    source = f"""
    extern "C" __global__ void kernel(const unsigned* x, unsigned short* y) {{
      __shared__ __align__(16) unsigned short tile[{64 * number}];
      unsigned r[{number}]; for (int k = 0; k < {number}; k++) r[k] = x[threadIdx.x * {number} + k];
      unsigned address = (unsigned)__cvta_generic_to_shared(tile + (threadIdx.x % {8 * number}) * 8);
      asm volatile("stmatrix.sync.aligned.m8n8.x{number}{trans}.shared.b16 [%0], {{{regs}}};" :: "r"(address), {ins}
        : "memory");
      __syncwarp();
      for (int k = threadIdx.x; k < {64 * number}; k += 32) y[k] = tile[k];
    }}
    """
    x = np.random.default_rng(5).integers(0, 2**32, (32, number), np.uint32)
    arrays = {"x": x, "y": np.empty((number, 8, 8), np.uint16)}
    result, _ = run_cuda(source, arrays, outputs=("y",), options=("--gpu-architecture=compute_90",), arch="sm_90")
    for k in range(number):
        matrix = np.ascontiguousarray(x[:, k]).view(np.uint16).reshape(8, 8)
        np.testing.assert_array_equal(result["y"][k], matrix.T if transposed else matrix)


def test_movmatrix() -> None:
    source = """
    extern "C" __global__ void kernel(const unsigned* x, unsigned* y) {
      unsigned r; asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(x[threadIdx.x]));
        y[threadIdx.x] = r;
    }
    """
    x = np.arange(64, dtype=np.uint16).view(np.uint32)
    result, _ = run_cuda(source, {"x": x, "y": np.empty(32, np.uint32)}, outputs=("y",))
    np.testing.assert_array_equal(result["y"].view(np.uint16).reshape(8, 8), np.arange(64).reshape(8, 8).T)
