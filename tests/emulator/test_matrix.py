"""Matrix instructions: fragments laid out as the PTX ISA draws them, products against float64."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from cuflash.emulator import Device, UnsupportedInstruction
from tests.emulator.programs import compile_cuda, run_cuda

BF16 = np.dtype(ml_dtypes.bfloat16)
GROUP, QUAD = np.arange(32) // 4, np.arange(32) % 4


def multiply(
    shape: str,
    types: str,
    a: np.ndarray,
    b: np.ndarray,
    c: np.ndarray,
    device: Device | None = None,
    arch: str = "sm_80",
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
    device = device or Device(arch)
    arrays = [device.to_device(np.ascontiguousarray(x), name=n) for x, n in zip((a, b, c), "abc", strict=True)]
    out = device.empty(c.shape, c.dtype, name="d")
    ptx = compile_cuda(source, f"--gpu-architecture={arch.replace('sm', 'compute')}")
    device.load(ptx).kernel("kernel").launch(1, 32 * len(a), [*arrays, out])
    return out.to_host()


def words(matrix: np.ndarray) -> np.ndarray:
    """Neighbours along the last axis as 32-bit words: pairs of 16-bit elements, fours of 8-bit ones."""
    return np.ascontiguousarray(matrix).view(np.uint32)


def left(a: np.ndarray) -> np.ndarray:
    """A (warps, rows, k words or numbers) to fragments: (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4), ..."""
    halves = a.shape[1] // 8
    registers = range(halves * a.shape[2] // 4)
    return np.stack([a[:, GROUP + 8 * (r % halves), QUAD + 4 * (r // halves)] for r in registers], -1)


def right(b: np.ndarray) -> np.ndarray:
    """B transposed (warps, 8, k words or numbers) to fragments: (t, g), (t + 4, g), ..."""
    return np.stack([b[:, GROUP, QUAD + 4 * r] for r in range(b.shape[2] // 4)], -1)


def left16(a: np.ndarray) -> np.ndarray:
    """A (warps, 16, k) to fragments (warps, 32, k / 4): a0 (g, 2t), a1 (g + 8, 2t), a2 (g, 2t + 8), a3 both."""
    return left(words(a))


def right16(b: np.ndarray) -> np.ndarray:
    """B (warps, k, 8) to fragments: b0 (2t, g), b1 (2t + 8, g)."""
    return right(words(b.swapaxes(1, 2)))


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
        packed = words(accumulators(half))
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


def truncated(x: np.ndarray) -> np.ndarray:
    """What a product takes of a float32 that was not rounded to TF32."""
    return (x.view("u4") & np.uint32(0xFFFFE000)).view("f4")


@pytest.mark.parametrize("depth", [4, 8])
def test_mma_of_tf32(depth: int) -> None:
    rng = np.random.default_rng(2)
    a, b, c = (rng.standard_normal(s).astype("f4") for s in ((2, 16, depth), (2, depth, 8), (2, 16, 8)))

    def product(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        fragments = left(a).view("u4"), right(b.swapaxes(1, 2)).view("u4"), accumulators(c)
        return multiply(f"m16n8k{depth}", "f32.tf32.tf32.f32", *fragments)

    result = product(a, b, c)
    np.testing.assert_allclose(result, accumulators(truncated(a).astype("f8") @ truncated(b) + c), rtol=0, atol=2e-6)
    np.testing.assert_array_equal(result, product(truncated(a), truncated(b), c))
    assert np.abs(result - accumulators(a.astype("f8") @ b + c)).max() > 1e-4  # the low bits are gone
    whole = [np.rint(200 * x).astype("f4") for x in (a, b, c)]
    np.testing.assert_array_equal(product(*whole), accumulators(whole[0] @ whole[1] + whole[2]))


def test_sums_of_tf32_are_cut_toward_zero() -> None:
    """1 + 1.5 · 2^-24 would round up to 1 + 2^-23; a chain of such sums errs to one side."""
    a, b, c = np.zeros((1, 16, 8), "f4"), np.zeros((1, 8, 8), "f4"), np.zeros((1, 16, 8), "f4")
    a[:, :8, 3], b[:, 3], c[:, :8] = 1.5 * 2.0**-24, 1, 1
    a[:, 8:, 3], c[:, 8:] = -(2.0**-23 + 1.5 * 2.0**-24), -1
    fragments = left(a).view("u4"), right(b.swapaxes(1, 2)).view("u4"), accumulators(c)
    result = multiply("m16n8k8", "f32.tf32.tf32.f32", *fragments)
    np.testing.assert_array_equal(result[..., :2], 1)
    np.testing.assert_array_equal(result[..., 2:], np.float32(-1 - 2.0**-23))


def one_sum(start: float, products: list[tuple[float, float]], dtype: np.dtype) -> float:
    """mma of sixteen-bit types whose first sum is that of `products`; the others, of a second warp too, are zero."""
    a, b, c = np.zeros((2, 16, 16), dtype), np.zeros((2, 16, 8), dtype), np.zeros((2, 16, 8), "f4")
    c[0, 0, 0] = start
    for k, (x, y) in enumerate(products):
        a[0, 0, k], b[0, k, 0] = x, y
    name = "bf16" if dtype == BF16 else "f16"
    result = multiply("m16n8k16", f"f32.{name}.{name}.f32", left16(a), right16(b), accumulators(c))
    assert np.count_nonzero(result[1]) == np.count_nonzero(result[0, 1:]) == 0
    return float(result[0, 0, 0])


def test_terms_of_a_sum_are_cut_below_the_largest_exponent() -> None:
    """As on an H200: 25 bits below it, a product's exponent being the sum of its factors'."""
    half = np.dtype("f2")
    assert one_sum(1, 16 * [(1.5 * 2.0**-13, 2.0**-13)], half) == 1
    assert one_sum(1, 16 * [(2.0**-12, 2.0**-13)], half) == 1 + 2.0**-21
    assert one_sum(1, 15 * [(-1.5 * 2.0**-12, 1.5 * 2.0**-13)], half) == 1 - 2.0**-20 + 2.0**-24  # -30 · 2^-25
    assert one_sum(0, [(1.5, 1.5), *8 * [(2.0**-12, 2.0**-13)]], half) == 2.25 + 2.0**-22
    assert one_sum(0, [(2, 1), *8 * [(2.0**-12, 2.0**-13)]], half) == 2


def test_sums_of_bfloat_at_both_ends_of_the_range() -> None:
    assert one_sum(0, [(2.0**100, 2.0**100)], BF16) == np.inf
    assert one_sum(-(2.0**100), [(2.0**64, 2.0**63)], BF16) == np.float32(2.0**127 - 2.0**100)
    assert one_sum(-np.inf, [(2.0**127, 2.0**127)], BF16) == -np.inf
    assert one_sum(3e38, [(0, 2.0**127)], BF16) == np.float32(3e38)
    assert one_sum(2.0**-140, [(2.0**-60, 2.0**-60)], BF16) == 2.0**-120
    assert one_sum(2.0**-100, [(0, 2.0**127)], BF16) == 2.0**-100


FLOAT64_SHAPES = {"m8n8k4": "sm_80", "m16n8k4": "sm_90", "m16n8k8": "sm_90", "m16n8k16": "sm_90"}


@pytest.mark.parametrize("shape", FLOAT64_SHAPES)
def test_mma_of_float64(shape: str) -> None:
    rng = np.random.default_rng(3)
    rows, depth = int(shape[1:].split("n")[0]), int(shape.split("k")[1])
    a, b, c = (rng.standard_normal(s) for s in ((2, rows, depth), (2, depth, 8), (2, rows, 8)))
    for x, y, z, tolerance in ((a, b, c, 2e-14), (*(np.rint(1e6 * m) for m in (a, b, c)), 0)):
        fragments = left(x), right(y.swapaxes(1, 2)), accumulators(z)
        result = multiply(shape, "f64.f64.f64.f64", *fragments, arch=FLOAT64_SHAPES[shape])
        np.testing.assert_allclose(result, accumulators(x @ y + z), rtol=0, atol=tolerance)


FLOAT8 = {"e4m3": np.dtype(ml_dtypes.float8_e4m3fn), "e5m2": np.dtype(ml_dtypes.float8_e5m2)}


@pytest.mark.parametrize("first", FLOAT8)
@pytest.mark.parametrize("second", FLOAT8)
def test_mma_of_float8(first: str, second: str) -> None:
    rng = np.random.default_rng(6)
    a, b, c = (rng.standard_normal(s).astype("f4") for s in ((2, 16, 32), (2, 32, 8), (2, 16, 8)))
    for x, y, z, tolerance in ((a, b, c, 4e-6), (np.rint(3 * a), np.rint(3 * b), np.rint(100 * c), 0)):
        x, y = x.astype(FLOAT8[first]), y.astype(FLOAT8[second])
        fragments = left(words(x)), right(words(y.swapaxes(1, 2))), accumulators(z)
        result = multiply("m16n8k32", f"f32.{first}.{second}.f32", *fragments, arch="sm_89")
        exact = x.astype("f8") @ y.astype("f8") + z
        np.testing.assert_allclose(result, accumulators(exact), rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", FLOAT8)
def test_mma_reads_every_finite_float8(name: str) -> None:
    """All patterns as elements of A, times eight columns of the unit matrix at a time."""
    patterns = np.arange(512, dtype=np.uint16).astype(np.uint8).reshape(1, 16, 32).view(FLOAT8[name])
    numbers = np.where(np.isfinite(patterns.astype("f4")), patterns, 0).astype(FLOAT8[name])
    zeros = accumulators(np.zeros((1, 16, 8), "f4"))
    for start in range(0, 32, 8):
        unit = np.eye(32)[None, start : start + 8].astype(FLOAT8[name])
        fragments = left(words(numbers)), right(words(unit)), zeros
        result = multiply("m16n8k32", f"f32.{name}.{name}.f32", *fragments, arch="sm_89")
        np.testing.assert_array_equal(result, accumulators(numbers[:, :, start : start + 8].astype("f4")))


@pytest.mark.parametrize(
    ("form", "types", "arch"),
    [
        ("m16n8k16", "f32.f16.f16.f32", "sm_80"),
        ("m16n8k8", "f32.tf32.tf32.f32", "sm_80"),
        ("m8n8k4", "f64.f64.f64.f64", "sm_80"),
        ("m16n8k16", "f64.f64.f64.f64", "sm_90"),
        ("m16n8k32", "f32.e4m3.e5m2.f32", "sm_89"),
    ],
)
def test_mma_does_not_depend_on_how_many_warps_run_together(form: str, types: str, arch: str) -> None:
    rng = np.random.default_rng(4)
    rows, depth = int(form[1:].split("n")[0]), int(form.split("k")[1])
    result, first, second, _ = types.split(".")
    numpy = {"f16": np.dtype("f2"), "tf32": np.dtype("f4"), "f32": np.dtype("f4"), "f64": np.dtype("f8"), **FLOAT8}
    a = rng.standard_normal((32, rows, depth)).astype(numpy[first])
    b = rng.standard_normal((32, 8, depth)).astype(numpy[second])
    c = rng.standard_normal((32, rows, 8)).astype(numpy[result])
    fragments = (left(a), right(b)) if result == "f64" else (left(words(a)), right(words(b)))

    def run(chosen: slice, device: Device | None = None) -> np.ndarray:
        parts = (f[chosen] for f in (*fragments, accumulators(c)))
        return multiply(form, types, *parts, device=device, arch=arch).view("u4")

    together = run(slice(None))
    for k in (0, 7, 31):
        np.testing.assert_array_equal(run(slice(k, k + 1))[0], together[k])
    np.testing.assert_array_equal(run(slice(5, 16), Device(arch, warp_order=2)), together[5:16])


@pytest.mark.parametrize(
    ("form", "types"),
    [
        ("m16n8k32", "f32.f16.f16.f32"),
        ("m16n8k16", "f32.tf32.tf32.f32"),
        ("m16n8k16", "f32.f16.bf16.f32"),
        ("m16n8k8", "f32.f64.f64.f32"),
        ("m16n8k32", "f16.e4m3.e4m3.f16"),
    ],
)
def test_mma_of_other_forms_is_refused(form: str, types: str) -> None:
    nothing = np.zeros((1, 32, 1), "f4")
    with pytest.raises(UnsupportedInstruction, match=f"mma.{form}"):
        multiply(form, types, nothing, nothing, nothing)


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
