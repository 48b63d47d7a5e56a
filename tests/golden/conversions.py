"""Conversions to TF32, and to and from float8: exact."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np

from tests.golden.program import LANES, Expected, Program

FLOAT16, FLOAT32 = np.dtype(np.float16), np.dtype(np.float32)
FLOAT8 = {"e4m3": np.dtype(ml_dtypes.float8_e4m3fn), "e5m2": np.dtype(ml_dtypes.float8_e5m2)}


def _whole_warps(words: np.ndarray) -> np.ndarray:
    return words[: len(words) // LANES * LANES]


# --- TF32 -------------------------------------------------------------------------------------------------------------


def _floats_to_round(rng: np.random.Generator) -> np.ndarray:
    """float32 words of every magnitude, without NaN, and the boundaries between neighbours of TF32."""
    random = rng.integers(0, 2**32, 4000, np.uint64).astype(np.uint32)
    boundaries = rng.integers(0, 2**19, 2000).astype(np.uint32) << np.uint32(13) | np.uint32(0x1000)
    words = np.concatenate([random, boundaries, np.array([0, 1 << 31, 0x7F800000, 0xFF800000], np.uint32)])
    return _whole_warps(words[~np.isnan(words.view(np.float32))][::-1])[:, None]


ROUNDINGS = {"rna": lambda x: np.floor(x + 0.5), "rn": np.rint, "rz": np.floor}


def _tf32(rounding: str, capability: int) -> Program:
    def model(words: np.ndarray) -> Expected:
        x = words.view(np.float32).astype(np.float64)
        finite = np.where(np.isfinite(x), x, 0)
        exponent = np.maximum(np.frexp(finite)[1], -125) - 11  # of the last bit that TF32 keeps
        magnitude = np.ldexp(ROUNDINGS[rounding](np.ldexp(np.abs(finite), -exponent)), exponent)
        with np.errstate(over="ignore"):
            rounded = np.where(np.isfinite(x), np.copysign(magnitude, x), x).astype(np.float32)
        return Expected(words=rounded.view(np.uint32))

    body = f'asm("cvt.{rounding}.tf32.f32 %0, %1;" : "=r"(d[0]) : "f"(__uint_as_float(a[0])));'
    return Program(f"cvt_{rounding}_tf32", "types", body, 1, _floats_to_round, model, capability)


# --- float8 -----------------------------------------------------------------------------------------------------------


def _rounded(source: np.dtype, kind: str) -> Callable[[np.ndarray], Expected]:
    """Pairs of the source type to pairs of float8, the second above the first; beyond the largest number, that one."""
    limit = source.type(ml_dtypes.finfo(FLOAT8[kind]).max)

    def model(words: np.ndarray) -> Expected:
        patterns = np.clip(words.view(source), -limit, limit).astype(FLOAT8[kind]).view(np.uint8).astype(np.uint32)
        return Expected(words=patterns[:, :1] | patterns[:, 1:] << np.uint32(8))

    return model


def _pairs(rng: np.random.Generator) -> np.ndarray:
    """Two float32 a thread: within and somewhat beyond the types, and boundaries between their numbers."""
    random = rng.choice([-1, 1], 4000) * np.exp2(rng.uniform(-20, 18, 4000))
    boundaries = (rng.integers(0, 32, 4000) + 0.5) * np.exp2(rng.integers(-18, 16, 4000))
    values = np.concatenate([random, boundaries, [np.inf, -np.inf, 0, -0.0]]).astype(np.float32)
    return _whole_warps(rng.permutation(values).view(np.uint32).reshape(-1, 2))


def _half_pairs(rng: np.random.Generator) -> np.ndarray:
    patterns = rng.permutation(np.arange(2**16)).astype(np.uint16)
    return _whole_warps(patterns[~np.isnan(patterns.view(np.float16))][: 2 * 31 * 1024].view(np.uint32)[:, None])


def _float8_pairs(kind: str) -> Callable[[np.random.Generator], np.ndarray]:
    def inputs(rng: np.random.Generator) -> np.ndarray:
        words = np.arange(2**16, dtype=np.uint16)
        numbers = words.view(np.uint8).reshape(-1, 2).view(FLOAT8[kind]).astype(np.float32)
        return _whole_warps(words[~np.isnan(numbers).any(axis=1)].astype(np.uint32)[:, None])

    return inputs


def _from_float32(kind: str) -> Program:
    body = f"""u16 pair;
    asm("cvt.rn.satfinite.{kind}x2.f32 %0, %1, %2;"
        : "=h"(pair)
        : "f"(__uint_as_float(a[1])), "f"(__uint_as_float(a[0])));
    d[0] = pair;"""
    return Program(f"cvt_{kind}x2_f32", "types", body, 1, _pairs, _rounded(FLOAT32, kind), 89)


def _from_float16(kind: str) -> Program:
    body = f"""u16 pair;
    asm("cvt.rn.satfinite.{kind}x2.f16x2 %0, %1;" : "=h"(pair) : "r"(a[0]));
    d[0] = pair;"""
    return Program(f"cvt_{kind}x2_f16x2", "types", body, 1, _half_pairs, _rounded(FLOAT16, kind), 89)


def _to_float16(kind: str) -> Program:
    def model(words: np.ndarray) -> Expected:
        pairs = words.astype(np.uint16).view(np.uint8).view(FLOAT8[kind]).astype(np.float16)
        return Expected(words=np.ascontiguousarray(pairs).view(np.uint32))

    body = f'asm("cvt.rn.f16x2.{kind}x2 %0, %1;" : "=r"(d[0]) : "h"(static_cast<u16>(a[0])));'
    return Program(f"cvt_f16x2_{kind}x2", "types", body, 1, _float8_pairs(kind), model, 89)


SHORT_FORMATS = (
    _tf32("rna", 80),
    _tf32("rn", 90),
    _tf32("rz", 90),
    *(make(kind) for kind in FLOAT8 for make in (_from_float32, _from_float16, _to_float16)),
)
