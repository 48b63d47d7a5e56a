"""Programs of one instruction each, their inputs, and what the PTX ISA says of their outputs.

A thread reads its input words, executes the body, writes its output words: `a` and `d` in the body. The same unit is
compiled for the emulator (PTX) and for a GPU (cubin), so that recorded outputs of a GPU and the model here hold the
emulator from two sides. Tolerances are those of the PTX ISA, chapters on floating point and on matrix products.
"""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np

from tests.golden.conversions import SHORT_FORMATS
from tests.golden.products import PRODUCTS
from tests.golden.program import LANES, Expected, Program

BF16 = np.dtype(ml_dtypes.bfloat16)
F16 = np.dtype(np.float16)


def _floats(*parts: np.ndarray) -> np.ndarray:
    """float32 values as words, one a thread, padded with ones to whole warps."""
    values = np.concatenate([np.asarray(part, np.float32).ravel() for part in parts])
    padding = np.ones(-len(values) % LANES, np.float32)
    return np.concatenate([values, padding]).view(np.uint32)[:, None]


def _flushed(value: np.ndarray) -> np.ndarray:
    """Subnormal float32 numbers as zeros of their sign: the .ftz forms."""
    return np.where(np.abs(value) < 2.0**-126, np.copysign(0.0, value), value)


def _approximate(
    function: Callable[[np.ndarray], np.ndarray], tolerance: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> Callable[[np.ndarray], Expected]:
    """The model of an approximate instruction; tolerance(x, y) is the absolute error allowed at y = function(x)."""

    def model(words: np.ndarray) -> Expected:
        x = _flushed(words.view(np.float32).astype(np.float64))
        with np.errstate(all="ignore"):
            exact = _flushed(function(x))
            y = np.where(np.abs(exact) > np.finfo(np.float32).max, np.copysign(np.inf, exact), exact)
            return Expected(value=y, error=tolerance(x, y))

    return model


def _special_function(name: str, inputs: Callable[..., np.ndarray], model: Callable[[np.ndarray], Expected]) -> Program:
    return Program(name, "math", f"d[0] = __float_as_uint(ptx::{name}(__uint_as_float(a[0])));", 1, inputs, model)


def _exponents(rng: np.random.Generator) -> np.ndarray:
    # Results below 2^-125 are left out: whether one at the edge is flushed may depend on its last bit.
    return _floats(rng.uniform(-125, 127, 4000), rng.uniform(-1, 1, 2000), np.arange(-125, 128), [0.0, -np.inf, np.inf])


def _positive(rng: np.random.Generator) -> np.ndarray:
    near_one = rng.uniform(0.5, 2, 2000)
    return _floats(2.0 ** rng.uniform(-126, 127, 4000), near_one, 2.0 ** np.arange(-126, 128), [0.0, 1.0, np.inf])


def _divisors(rng: np.random.Generator) -> np.ndarray:
    sign = rng.choice([-1.0, 1.0], 4000)
    return _floats(sign * 2.0 ** rng.uniform(-125, 125, 4000), rng.uniform(1, 2, 2000), [0.0, np.inf, -np.inf])


SPECIAL_FUNCTIONS = (
    _special_function("ex2", _exponents, _approximate(np.exp2, lambda x, y: 2.0**-22 * y)),
    _special_function(
        "lg2",
        _positive,
        _approximate(np.log2, lambda x, y: 2.0**-22 * np.where((x > 0.5) & (x < 2), 1.0, np.abs(y))),
    ),
    _special_function("rcp", _divisors, _approximate(np.reciprocal, lambda x, y: 2.0**-23 * np.abs(y))),
)


# --- conversions: exact -----------------------------------------------------------------------------------------------


def _pairs_to_round(rng: np.random.Generator) -> np.ndarray:
    """Two float32 a thread: random ones of every magnitude, and ties between neighbours of both 16-bit formats."""
    random = rng.integers(0, 2**32, 6000, np.uint64).astype(np.uint32).view(np.float32)
    ties = (rng.integers(0x3000, 0x4700, 1000, np.uint32) << np.uint32(16) | np.uint32(0x8000)).view(np.float32)
    halves = rng.integers(0x0000, 0x7BFF, 1000).astype(np.uint16).view(F16).astype(np.float32)
    next_halves = np.nextafter(halves.astype(F16), F16.type(np.inf)).astype(np.float32)
    limits = np.asarray([65504, 65519.996, 65520, 2.0**-24, 2.0**-25, 0, -0.0, np.inf, -np.inf, 3.3e38], np.float32)
    values = np.concatenate([random[~np.isnan(random)], ties, (halves + next_halves) / 2, limits])
    return values[: len(values) // (2 * LANES) * (2 * LANES)].view(np.uint32).reshape(-1, 2)


def _rounded_pairs(dtype: np.dtype) -> Callable[[np.ndarray], Expected]:
    def model(words: np.ndarray) -> Expected:
        with np.errstate(over="ignore"):
            halves = words.view(np.float32).astype(dtype).view(np.uint16).astype(np.uint32)
        return Expected(words=halves[:, :1] | halves[:, 1:] << np.uint32(16))

    return model


def _every_number(dtype: np.dtype) -> Callable[[np.random.Generator], np.ndarray]:
    def inputs(rng: np.random.Generator) -> np.ndarray:
        words = np.arange(2**16, dtype=np.uint16)
        with np.errstate(invalid="ignore"):  # signalling NaNs
            numbers = words[~np.isnan(words.view(dtype))].astype(np.uint32)
        return np.concatenate([numbers, np.zeros(-len(numbers) % LANES, np.uint32)])[:, None]

    return inputs


def _widened(dtype: np.dtype) -> Callable[[np.ndarray], Expected]:
    return lambda words: Expected(words=words.astype(np.uint16).view(dtype).astype(np.float32).view(np.uint32))


def _rounding(name: str, dtype: np.dtype) -> Program:
    body = f"d[0] = ptx::{name}(__uint_as_float(a[0]), __uint_as_float(a[1]));"
    return Program(name, "math", body, 1, _pairs_to_round, _rounded_pairs(dtype))


def _widening(name: str, dtype: np.dtype) -> Program:
    body = f"d[0] = __float_as_uint(ptx::{name}(static_cast<u16>(a[0])));"
    return Program(name, "math", body, 1, _every_number(dtype), _widened(dtype))


CONVERSIONS = (
    _rounding("cvt_f16x2", F16),
    _rounding("cvt_bf16x2", BF16),
    _widening("cvt_f32_f16", F16),
    _widening("cvt_f32_bf16", BF16),
)


# --- lane exchange, shared memory, matrix loads: exact ----------------------------------------------------------------


def _words(columns: int) -> Callable[[np.random.Generator], np.ndarray]:
    return lambda rng: rng.integers(0, 2**32, (4 * LANES, columns), np.uint64).astype(np.uint32)


def _butterfly(mask: int) -> Program:
    def model(words: np.ndarray) -> Expected:
        return Expected(words=words[np.arange(len(words)) ^ mask])

    body = f"d[0] = __float_as_uint(ptx::shfl_bfly<{mask}>(__uint_as_float(a[0])));"
    return Program(f"shfl_bfly_{mask}", "math", body, 1, _plain_floats, model)


def _plain_floats(rng: np.random.Generator) -> np.ndarray:
    return _floats(rng.standard_normal(4 * LANES))


def _indexed_inputs(rng: np.random.Generator) -> np.ndarray:
    return np.column_stack([_plain_floats(rng)[:, 0], rng.integers(0, LANES, 4 * LANES)])


def _indexed(words: np.ndarray) -> Expected:
    values, sources = words[:, 0].reshape(-1, LANES), words[:, 1].reshape(-1, LANES)
    return Expected(words=np.take_along_axis(values, sources.astype(np.int64), axis=1).reshape(-1, 1))


SHUFFLES = (
    *(_butterfly(mask) for mask in (1, 2, 4, 8, 16)),
    Program(
        "shfl_idx", "math", "d[0] = __float_as_uint(ptx::shfl_idx(__uint_as_float(a[0]), a[1]));", 1, _indexed_inputs,
        _indexed,
    ),
)  # fmt: skip

# Lane i stores its 16 bytes as row i of a tile [32][8 x 16 bit] and gives the address of row a[4] to ldmatrix.
_LDMATRIX = """__shared__ __align__(16) u32 tile[{lanes}][4];
    for (int i = 0; i < 4; ++i) tile[lane][i] = a[i];
    __syncthreads();
    ptx::{name}(d, static_cast<u32>(__cvta_generic_to_shared(tile[a[4]])));"""


def _ldmatrix_inputs(rng: np.random.Generator) -> np.ndarray:
    rows = np.concatenate([rng.permutation(LANES) for _ in range(4)])
    return np.column_stack([_words(4)(rng), rows])


def _ldmatrix(transposed: bool) -> Callable[[np.ndarray], Expected]:
    def model(words: np.ndarray) -> Expected:
        tiles = np.ascontiguousarray(words[:, :4]).view(np.uint16).reshape(-1, LANES, 8)
        rows = words[:, 4].reshape(-1, LANES).astype(np.int64)
        matrices = np.take_along_axis(tiles, rows[:, :, None], axis=1).reshape(-1, 4, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        # Lane 4r + c has elements [r][2c], [r][2c + 1] of every matrix.
        pairs = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, 4, LANES)
        return Expected(words=pairs.swapaxes(1, 2).reshape(-1, 4))

    return model


def _ldmatrix_program(name: str, transposed: bool) -> Program:
    body = _LDMATRIX.format(lanes=LANES, name=name)
    return Program(name, "matrix", body, 4, _ldmatrix_inputs, _ldmatrix(transposed))


# Lane i copies the first a[0] bytes of the 16 that follow in its own input; the rest of the 16 must become zero.
_CP_ASYNC = """__shared__ __align__(16) u32 tile[{lanes}][4];
    const u32* source = in + 8 * thread + 4;
    const u32 target = ptx::shared_address(tile[lane]);
    {copies}
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    for (int i = 0; i < 4; ++i) d[i] = tile[lane][i];"""


def _cp_async_inputs(rng: np.random.Generator) -> np.ndarray:
    words = _words(8)(rng)
    words[:, 0] = np.arange(len(words)) % 17
    return words


def _cp_async(words: np.ndarray) -> Expected:
    data = np.ascontiguousarray(words[:, 4:]).view(np.uint8).copy()
    data[np.arange(16)[None, :] >= words[:, :1]] = 0
    return Expected(words=data.view(np.uint32))


def _cp_async_program(width: int) -> Program:
    if width == 16:
        copies = "ptx::cp_async_16(target, source, a[0]);"
    else:
        copies = (
            f"for (int at = 0; at < 16; at += {width}) "
            f"ptx::cp_async_narrow<{width}>(target + at, source + at / 4, min(max(int(a[0]) - at, 0), {width}));"
        )
    body = _CP_ASYNC.format(lanes=LANES, copies=copies)
    return Program(f"cp_async_{width}", "copy", body, 4, _cp_async_inputs, _cp_async)


MEMORY = (
    _ldmatrix_program("ldmatrix_x4", False),
    _ldmatrix_program("ldmatrix_x4_trans", True),
    *(_cp_async_program(width) for width in (4, 8, 16)),
)

PROGRAMS = (*SPECIAL_FUNCTIONS, *CONVERSIONS, *SHORT_FORMATS, *SHUFFLES, *MEMORY, *PRODUCTS)
