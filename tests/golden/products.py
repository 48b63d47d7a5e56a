"""Matrix products of a warp, mma.sync, in every type and shape that kernels use."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from tests.golden.program import LANES, Expected, Program

WARPS = 64
FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
GROUP, QUAD = np.divmod(np.arange(LANES), 4)


@dataclass(frozen=True)
class Product:
    """d [rows][8] = a [rows][depth] b [depth][8] + c.

    types : of d, a, b, c in the instruction; dtype, sums : NumPy's for a and b, and for c and d
    cut : what the sum may lose with each of its terms, in parts of the largest
    """

    rows: int
    depth: int
    types: str
    dtype: np.dtype
    sums: np.dtype = FLOAT32
    cut: float = 2.0**-23

    @property
    def form(self) -> str:
        return f"m{self.rows}n8k{self.depth}.row.col.{self.types}"

    @property
    def elements(self) -> int:
        """Elements of A or B in a register."""
        return max(4 // self.dtype.itemsize, 1)

    @property
    def registers(self) -> tuple[int, int, int]:
        """Registers of A, B and C in a lane."""
        per_lane = LANES * self.elements
        return self.rows * self.depth // per_lane, 8 * self.depth // per_lane, 8 * self.rows // LANES

    def inputs(self, rng: np.random.Generator) -> np.ndarray:
        """Words of A, B and C in every lane; magnitudes differ by warp."""
        left, right, sums = self.registers
        size = np.exp2(rng.integers(-6, 7, (WARPS, 1, 1)).astype(np.float64))
        factors = size * rng.standard_normal((WARPS, LANES, self.elements * (left + right)))
        limit = float(ml_dtypes.finfo(self.dtype).max)
        factors = np.clip(factors, -limit, limit).astype(self.dtype).view(np.uint32)
        terms = rng.choice([0.0, 1.0, 1e3], (WARPS, 1, 1)) * rng.standard_normal((WARPS, LANES, sums))
        return np.concatenate([factors, terms.astype(self.sums).view(np.uint32)], axis=2).reshape(WARPS * LANES, -1)

    def model(self, words: np.ndarray) -> Expected:
        left, right, sums = self.registers
        lanes = words.reshape(-1, LANES, words.shape[1])
        split = words.shape[1] - sums * self.sums.itemsize // 4
        factors = np.ascontiguousarray(lanes[:, :, :split])
        if "tf32" in self.types:  # a product does not see the low bits
            factors &= np.uint32(0xFFFFE000)
        wide = np.longdouble if self.sums == FLOAT64 else FLOAT64
        numbers = factors.view(self.dtype).astype(wide).reshape(len(lanes), LANES, left + right, self.elements)
        terms = np.ascontiguousarray(lanes[:, :, split:]).view(self.sums)
        a = np.zeros((len(lanes), self.rows, self.depth), wide)
        b, c = np.zeros((len(lanes), self.depth, 8), wide), np.zeros((len(lanes), self.rows, 8), wide)
        halves = self.rows // 8
        for e in range(self.elements):
            for i in range(left):
                a[:, GROUP + 8 * (i % halves), self.elements * (QUAD + 4 * (i // halves)) + e] = numbers[:, :, i, e]
            for i in range(right):
                b[:, self.elements * (QUAD + 4 * i) + e, GROUP] = numbers[:, :, left + i, e]
        places = [(GROUP + 8 * (i // 2), 2 * QUAD + i % 2) for i in range(sums)]
        for i, place in enumerate(places):
            c[:, *place] = terms[:, :, i]
        exact, magnitude = c + a @ b, np.abs(c) + np.abs(a) @ np.abs(b)

        def fragment(matrix: np.ndarray) -> np.ndarray:
            return np.stack([matrix[:, *place] for place in places], axis=2).reshape(-1, sums).astype(np.float64)

        # Products are exact; they and c are summed in any order and with any rounding.
        error = (self.depth + 1) * self.cut * fragment(magnitude)
        return Expected(value=fragment(exact), error=error, dtype=self.sums)

    def body(self) -> str:
        """The instruction on words a, results to words d."""
        left, right, sums = self.registers
        factors, terms = range(left + right), range(left + right, left + right + sums)
        if self.sums == np.float64:
            kind, letter = "double", "d"
            ins = [f'"d"(__hiloint2double(a[{2 * i + 1}], a[{2 * i}]))' for i in (*factors, *terms)]
            store = "d[2 * i] = __double2loint(sums[i]), d[2 * i + 1] = __double2hiint(sums[i]);"
        else:
            kind, letter = "float", "f"
            ins = [*(f'"r"(a[{i}])' for i in factors), *(f'"f"(__uint_as_float(a[{i}]))' for i in terms)]
            store = "d[i] = __float_as_uint(sums[i]);"
        names = iter(range(left + right + 2 * sums))
        lists = ", ".join(f"{{{', '.join(f'%{next(names)}' for _ in range(n))}}}" for n in (sums, left, right, sums))
        outs = ", ".join(f'"={letter}"(sums[{i}])' for i in range(sums))
        return (
            f"{kind} sums[{sums}];\n"
            f'    asm("mma.sync.aligned.{self.form} {lists};"\n        : {outs}\n        : {", ".join(ins)});\n'
            f"    for (int i = 0; i < {sums}; ++i) {store}"
        )


def _wrapped(name: str, product: Product) -> Program:
    """The product through the function of the kernels."""
    body = f"""float sums[4];
    for (int i = 0; i < 4; ++i) sums[i] = __uint_as_float(a[6 + i]);
    const u32 left[4] = {{a[0], a[1], a[2], a[3]}};
    ptx::{name}(sums, left, a[4], a[5]);
    for (int i = 0; i < 4; ++i) d[i] = __float_as_uint(sums[i]);"""
    return Program(name, "matrix", body, 4, product.inputs, product.model, same_bits=True)


def _plain(product: Product, capability: int = 80) -> Program:
    name = f"mma_{product.form.replace('.row.col', '').replace('.', '_')}"
    outputs, single = product.registers[2] * product.sums.itemsize // 4, product.sums == FLOAT32
    return Program(name, "types", product.body(), outputs, product.inputs, product.model, capability, same_bits=single)


def _float64(rows: int, depth: int) -> Product:
    return Product(rows, depth, "f64.f64.f64.f64", FLOAT64, FLOAT64, 2.0**-52)


def _float8(kind: str) -> Product:
    """Float8 is summed with fewer bits than float32 has: thirteen of mantissa are what is known of sm_89 and sm_90."""
    dtype = {"e4m3": np.dtype(ml_dtypes.float8_e4m3fn), "e5m2": np.dtype(ml_dtypes.float8_e5m2)}[kind]
    return Product(16, 32, f"f32.{kind}.{kind}.f32", dtype, cut=2.0**-13)


PRODUCTS = (
    _wrapped("mma_m16n8k16_f16", Product(16, 16, "f32.f16.f16.f32", np.dtype(np.float16))),
    _wrapped("mma_m16n8k16_bf16", Product(16, 16, "f32.bf16.bf16.f32", np.dtype(ml_dtypes.bfloat16))),
    *(_plain(Product(16, depth, "f32.tf32.tf32.f32", FLOAT32)) for depth in (4, 8)),
    _plain(_float64(8, 4)),
    *(_plain(_float64(16, depth), 90) for depth in (4, 8, 16)),
    *(_plain(_float8(kind), 89) for kind in ("e4m3", "e5m2")),
)
