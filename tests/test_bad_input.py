"""Every bad argument is a typed error that names argument, value and requirement, and changes nothing."""

from __future__ import annotations

import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cuflash
from cuflash import (
    CuflashError,
    DeviceError,
    InvalidDtypeError,
    InvalidShapeError,
    InvalidTypeError,
    InvalidValueError,
    Options,
)
from cuflash.plan.config import CombineConfig, ForwardConfig
from tests.fake_cupy import without_the_cuda_device

Value, Shape, Type, Dtype = InvalidValueError, InvalidShapeError, InvalidTypeError, InvalidDtypeError
SENTINEL = 7.0
F16, F32 = np.dtype(np.float16), np.dtype(np.float32)


def zeros(*shape: int, dtype: Any = F32) -> np.ndarray:
    return np.zeros(shape, dtype)


def dense(**changes: Any) -> dict[str, Any]:
    """Arguments of `attention` that are right but for the changes."""
    return {"q": zeros(2, 5, 4, 8), "k": zeros(2, 6, 2, 8), "v": zeros(2, 6, 2, 3), **changes}


def packed(**changes: Any) -> dict[str, Any]:
    """Arguments of `attention_varlen` that are right but for the changes."""
    return {
        "q": zeros(9, 4, 8),
        "k": zeros(7, 2, 8),
        "v": zeros(7, 2, 3),
        "cu_seqlens_q": [0, 4, 9],
        "cu_seqlens_k": [0, 5, 7],
        **changes,
    }


class OnGpu:
    """A producer of DLPack on a GPU."""

    device = (2, 0)

    def __dlpack__(self, **_: object) -> object:
        raise BufferError("never asked")

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device


class Foreign(OnGpu):
    """Of a package that has from_dlpack."""

    def __array_namespace__(self) -> Any:
        return np


class OnVulkan(Foreign):
    device = (7, 0)


def read_only(*shape: int) -> np.ndarray:
    array = zeros(*shape)
    array.flags.writeable = False
    return array


PACKED_BUFFER = zeros(2, 5, 4, 8)
ROWS = np.lib.stride_tricks.as_strided(zeros(64), (2, 5, 4, 3), (0, 48, 12, 4))

DENSE = {
    # what an array is
    "q is a list": (dense(q=[[1.0]]), Type, "q is a list: must be a NumPy or CuPy array"),
    "q is None": (dense(q=None), Type, "q is a NoneType: must be"),
    "k is a scalar": (dense(k=1.0), Type, "k is a float: must be a NumPy"),
    "k is None": (dense(k=None), Type, "k is a NoneType: must be a NumPy"),
    "v is None": (dense(v=None), Type, "v is a NoneType: must be a NumPy"),
    "bias is a number": (dense(bias=1.0), Type, "bias is a float: must be"),
    "masked array": (dense(q=np.ma.zeros((2, 5, 4, 8))), Type, "q is a numpy.ma.*MaskedArray: must be a plain"),
    "matrix": (dense(q=zeros(5, 8).view(np.matrix)), Type, "q is a numpy.matrix.*: must be a plain array"),
    "scalar of NumPy": (dense(q=np.float32(1)), Type, "q is a numpy.float32: must be"),
    "other kind": (dense(k=Foreign()), Type, "k is a .*Foreign: must be the same kind of array as q"),
    "no from_dlpack": (dense(q=OnGpu()), Type, "q is a .*OnGpu: must come from a package with from_dlpack"),
    # shapes
    "q of rank 0": (dense(q=zeros()), Shape, r"q.shape = \(\): must be \(seqlen, dim\), \(seqlen, heads, dim\)"),
    "q of rank 1": (dense(q=zeros(8)), Shape, r"q.shape = \(8,\): must be \(seqlen, dim\)"),
    "q of rank 5": (dense(q=zeros(1, 2, 5, 4, 8)), Shape, r"q.shape = \(1, 2, 5, 4, 8\): must be"),
    "k of rank 3": (dense(k=zeros(6, 2, 8)), Shape, r"k.shape = \(6, 2, 8\): must be \(batch, seqlen"),
    "v of rank 2": (dense(v=zeros(6, 8)), Shape, r"v.shape = \(6, 8\): must be \(batch, seqlen"),
    "batch of k": (dense(k=zeros(3, 6, 2, 8)), Shape, r"k.shape = \(3, .*: batch 3 must be 2, that of q"),
    "batch of v": (dense(v=zeros(1, 6, 2, 3)), Shape, r"v.shape = \(1, .*: batch 1 must be 2, that of q"),
    "head_dim of k": (dense(k=zeros(2, 6, 2, 7)), Shape, r"k.shape = .*: head_dim 7 must be 8, that of q"),
    "keys of v": (dense(v=zeros(2, 5, 2, 3)), Shape, r"v.shape = .*: number of keys 5 must be 6, that of k"),
    "heads of v": (dense(v=zeros(2, 6, 4, 3)), Shape, r"v.shape = .*: number of heads 4 must be 2"),
    "group": (dense(q=zeros(2, 5, 3, 8)), Shape, r"q.shape = .*: 3 heads must be a multiple of the 2 of k"),
    "no kv heads": (
        dense(k=zeros(2, 6, 0, 8), v=zeros(2, 6, 0, 3)), Shape, "4 heads must be a multiple of the 0 of k",
    ),
    # dtypes
    "integers": (dense(q=zeros(2, 5, 4, 8, dtype=int)), Dtype, "q.dtype = int64: must be one of float16, bfl"),
    "objects": (dense(q=zeros(2, 5, 4, 8, dtype=object)), Dtype, "q.dtype = object: must be one of"),
    "complex": (dense(q=zeros(2, 5, 4, 8, dtype=complex)), Dtype, "q.dtype = complex128: must be"),
    "bool": (dense(q=zeros(2, 5, 4, 8, dtype=bool)), Dtype, "q.dtype = bool: must be.*cast q, k and v"),
    "long double": (dense(q=zeros(2, 5, 4, 8, dtype="g")), Dtype, "q.dtype = float128: must be"),
    "big endian": (dense(q=zeros(2, 5, 4, 8, dtype=">f4")), Dtype, "q.dtype = >f4: must be .* in native byte order"),
    "float8": (
        dense(q=zeros(2, 5, 4, 8, dtype=ml_dtypes.float8_e4m3fn)), Dtype, "q.dtype = float8_e4m3fn: must be",
    ),
    "dtype of k": (dense(k=zeros(2, 6, 2, 8, dtype=F16)), Dtype, "k.dtype = float16: must be float32, the"),
    "dtype of v": (dense(v=zeros(2, 6, 2, 3, dtype=float)), Dtype, "v.dtype = float64: must be float32, the"),
    # bias
    "bias of integers": (dense(bias=zeros(6, dtype=int)), Dtype, "bias.dtype = int64: must be one of"),
    "bias of bool": (dense(bias=zeros(5, 6, dtype=bool)), Dtype, "bias.dtype = bool: must be one of"),
    "bias keys": (dense(bias=zeros(5, 5)), Shape, r"bias.shape = \(5, 5\): must broadcast to .*\(2, 4, 5, 6\)"),
    "bias queries": (dense(bias=zeros(6, 1)), Shape, r"bias.shape = \(6, 1\): must broadcast"),
    "bias heads": (dense(bias=zeros(2, 1, 1)), Shape, r"bias.shape = \(2, 1, 1\): must broadcast"),
    "bias batch": (dense(bias=zeros(3, 1, 1, 1)), Shape, r"bias.shape = \(3, 1, 1, 1\): must broadcast"),
    "bias of rank 5": (dense(bias=zeros(1, 1, 1, 1, 1)), Shape, r"bias.shape = .*: must broadcast"),
    "bias of higher rank": (
        {"q": zeros(5, 8), "k": zeros(6, 8), "v": zeros(6, 8), "bias": zeros(1, 5, 6)},
        Shape,
        r"bias.shape = \(1, 5, 6\): must broadcast to \(seqlen_q, seqlen_k\) = \(5, 6\)",
    ),
    # keywords
    "causal is an int": (dense(causal=1), Type, "causal = 1: must be True or False"),
    "causal is None": (dense(causal=None), Type, "causal = None: must be True or False"),
    "return_lse is a str": (dense(return_lse="yes"), Type, "return_lse = 'yes': must be True or False"),
    "window is an int": (dense(window=3), Type, r"window = 3: must be None or a pair \(left, right\)"),
    "window of three": (dense(window=(1, 2, 3)), Type, r"window = \(1, 2, 3\): must be None or a pair"),
    "window of floats": (dense(window=(1.5, None)), Type, r"window\[0\] = 1.5: must be an integer >= 0 or None"),
    "window of bools": (dense(window=(0, True)), Type, r"window\[1\] = True: must be an integer"),
    "left < 0": (dense(window=(-1, None)), Value, r"window\[0\] = -1: must be >= 0 or None"),
    "right < 0": (dense(window=(None, -2)), Value, r"window\[1\] = -2: must be >= 0 or None"),
    "right < 0, causal": (dense(window=(0, -1), causal=True), Value, r"window\[1\] = -1: must be >= 0"),
    "scale NaN": (dense(scale=float("nan")), Value, "scale = nan: must be finite and > 0"),
    "scale 0": (dense(scale=0), Value, "scale = 0.0: must be finite and > 0"),
    "scale < 0": (dense(scale=-0.5), Value, "scale = -0.5: must be finite and > 0"),
    "scale inf": (dense(scale=np.inf), Value, "scale = inf: must be finite and > 0"),
    "scale past float64": (dense(scale=10**400), Value, "scale = inf: must be finite and > 0"),
    "scale past float32": (dense(scale=1e50), Value, r"scale = 1e\+50: must be 1e-30 to 1e\+30 for float32"),
    "scale below float32": (dense(scale=1e-50), Value, "scale = 1e-50: must be 1e-30 to"),
    "softcap past float32": (dense(softcap=1e50), Value, r"softcap = 1e\+50: must be 1e-30 to"),
    "softcap of float64": (
        {**{name: array.astype(float) for name, array in dense().items()}, "softcap": 1e-305}, Value,
        r"softcap = 1e-305: must be 1e-300 to 1e\+300 for float64",
    ),
    "scale by softcap": (dense(scale=1e20, softcap=1e-20), Value, r"scale / softcap = 1e\+40: must be 1e-30 to"),
    "scale is a str": (dense(scale="1"), Type, "scale = '1': must be a number or None"),
    "scale is a bool": (dense(scale=True), Type, "scale = True: must be a number or None"),
    "scale is complex": (dense(scale=1j), Type, "scale = 1j: must be a number or None"),
    "scale is an array": (dense(scale=zeros(1)), Type, "scale = array.*: must be a number or None"),
    "softcap NaN": (dense(softcap=float("nan")), Value, "softcap = nan: must be finite and > 0"),
    "softcap 0": (dense(softcap=0.0), Value, "softcap = 0.0: must be finite and > 0, or None"),
    "softcap < 0": (dense(softcap=-30), Value, "softcap = -30.0: must be finite and > 0"),
    "softcap is a list": (dense(softcap=[30]), Type, r"softcap = \[30\]: must be a number or None"),
    "options is a dict": (dense(options={}), Type, "options = {}: must be a cuflash.Options or None"),
    "options on the CPU": (dense(options=Options(num_splits=2)), Value, "options = .*num_splits=2.*on the CPU"),
    # out
    "out of other shape": (dense(out=zeros(2, 5, 4, 8)), Shape, r"out.shape = \(2, 5, 4, 8\): must be \(2, 5, 4, 3\)"),
    "out of other dtype": (dense(out=zeros(2, 5, 4, 3, dtype=F16)), Dtype, "out.dtype = float16: must be float32"),
    "out is read-only": (dense(out=read_only(2, 5, 4, 3)), Value, "out is read-only: must be writeable"),
    "out is a list": (dense(out=[]), Type, "out is a list: must be"),
    "out overlaps itself": (dense(out=ROWS), Value, r"out.strides = \(0, .*: elements must not overlap"),
    "out not contiguous": (
        dense(out=zeros(2, 5, 4, 6)[..., ::2]), Value, "out.strides = .*: the last axis must be contiguous",
    ),
    "out is q": (
        dense(q=PACKED_BUFFER, v=zeros(2, 6, 2, 8), out=PACKED_BUFFER), Value, "out overlaps q: must not share",
    ),
    "out is q reversed": (
        dense(q=PACKED_BUFFER, v=zeros(2, 6, 2, 8), out=PACKED_BUFFER[:, ::-1]), Value, "out overlaps q",
    ),
    "out overlaps bias": (
        dense(v=zeros(2, 6, 2, 8), out=PACKED_BUFFER, bias=PACKED_BUFFER.reshape(-1)[3:9]),
        Value, "out overlaps bias: must not share memory",
    ),
}

VARLEN = {
    "q of rank 4": (packed(q=zeros(1, 9, 4, 8)), Shape, r"q.shape = \(1, 9, 4, 8\): must be \(total tokens, heads"),
    "k of rank 2": (packed(k=zeros(7, 8)), Shape, r"k.shape = \(7, 8\): must be \(total tokens, heads, dim\)"),
    "tokens of v": (packed(v=zeros(8, 2, 3)), Shape, r"v.shape = .*: number of keys 8 must be 7"),
    "group": (packed(q=zeros(9, 3, 8)), Shape, "3 heads must be a multiple of the 2 of k"),
    "integers": (packed(q=zeros(9, 4, 8, dtype=int)), Dtype, "q.dtype = int64: must be one of"),
    "not monotone": (packed(cu_seqlens_q=[0, 6, 4]), Value, r"cu_seqlens_q\[2\] = 4: must be >= cu_seqlens_q\[1\] = 6"),
    "past the end": (packed(cu_seqlens_k=[0, 5, 8]), Value, r"cu_seqlens_k\[-1\] = 8: must be at most 7, the"),
    "not from 0": (packed(cu_seqlens_q=[1, 4, 9]), Value, r"cu_seqlens_q\[0\] = 1: must be 0"),
    "negative": (packed(cu_seqlens_q=[0, -4, 9]), Value, r"cu_seqlens_q\[1\] = -4: must be >= cu_seqlens_q\[0\] = 0"),
    "floats": (packed(cu_seqlens_q=[0.0, 9.0]), Dtype, "cu_seqlens_q.dtype = float64: must be an integer dtype"),
    "bools": (packed(cu_seqlens_q=[False, True]), Dtype, "cu_seqlens_q.dtype = bool: must be an integer"),
    "empty": (packed(cu_seqlens_q=[]), Shape, r"cu_seqlens_q.shape = \(0,\): must be \(batch \+ 1,\)"),
    "of rank 2": (packed(cu_seqlens_k=zeros(2, 2, dtype=int)), Shape, r"cu_seqlens_k.shape = \(2, 2\): must be"),
    "ragged": (packed(cu_seqlens_k=[0, [1, 2]]), Type, r"cu_seqlens_k = \[0, \[1, 2\]\]: must be a flat sequence"),
    "a number": (packed(cu_seqlens_k=7), Type, "cu_seqlens_k is a int: must be"),
    "other length": (packed(cu_seqlens_k=[0, 7]), Shape, r"cu_seqlens_k.shape = \(2,\): must be \(3,\), that of cu_"),
    "max_seqlen_q too small": (packed(max_seqlen_q=4), Value, "max_seqlen_q = 4: must be at least 5, the longest"),
    "max_seqlen_k too small": (packed(max_seqlen_k=0), Value, "max_seqlen_k = 0: must be at least 5, the longest"),
    "max_seqlen_k < 0": (packed(max_seqlen_k=-1), Value, "max_seqlen_k = -1: must be >= 0 or None"),
    "max_seqlen_q a float": (packed(max_seqlen_q=9.0), Type, "max_seqlen_q = 9.0: must be an integer >= 0"),
    "bias too short": (
        packed(bias=zeros(4, 5, 4)), Shape,
        r"bias.shape = \(4, 5, 4\): must broadcast to .* = \(2, 4, 5, 5\), its last two axes at least as long",
    ),
    "bias batch": (packed(bias=zeros(3, 1, 1, 5)), Shape, r"bias.shape = \(3, 1, 1, 5\): must broadcast"),
    "window": (packed(window=(None, -1)), Value, r"window\[1\] = -1: must be >= 0"),
    "softcap": (packed(softcap=np.nan), Value, "softcap = nan: must be finite"),
    "out of other shape": (packed(out=zeros(9, 4, 8)), Shape, r"out.shape = \(9, 4, 8\): must be \(9, 4, 3\)"),
    "options on the CPU": (packed(options=Options(num_splits=1)), Value, "options = .*: must be None on the CPU"),
}

def emulate(**keywords: Any) -> None:
    with cuflash.emulate(**keywords):
        pass


OUT, LSE = zeros(2, 5, 4, 8), zeros(2, 4, 5)
MERGE = {
    "no outs": (([], []), Value, r"outs = \[\]: must hold at least one array"),
    "no lses": (([OUT], ()), Value, r"lses = \(\): must hold at least one array"),
    "a number": ((1.0, [LSE]), Type, "outs is a float: must be"),
    "None in outs": (([OUT, None], [LSE, LSE]), Type, r"outs\[1\] is a NoneType: must be"),
    "fewer lses": (([OUT, OUT], [LSE]), Value, "lses hold 1 states: must hold 2, as many as outs"),
    "empty stack": ((zeros(0, 5, 8), zeros(0, 5)), Shape, r"outs.shape = \(0, 5, 8\): must hold at least one"),
    "rank 1": (([zeros(5)], [zeros(5)]), Shape, r"outs\[0\].shape = \(5,\): must be \(seqlen_q, head_dim_v\)"),
    "rank 5": (([zeros(1, 2, 5, 4, 8)], [LSE]), Shape, r"outs\[0\].shape = \(1, 2, 5, 4, 8\): must be"),
    "other shape": (([OUT, zeros(2, 5, 4, 7)], [LSE, LSE]), Shape, r"outs\[1\].shape = .*: must be \(2, 5, 4, 8\)"),
    "lse of other shape": (([OUT], [zeros(2, 5, 4)]), Shape, r"lses\[0\].shape = \(2, 5, 4\): must be \(2, 4, 5\)"),
    "integers": (([OUT.astype(int)], [LSE]), Dtype, r"outs\[0\].dtype = int64: must be one of float16"),
    "mixed dtypes": (([OUT, OUT.astype(F16)], [LSE, LSE]), Dtype, r"outs\[1\].dtype = float16: must be float32"),
    "lse in float16": (([OUT], [LSE.astype(F16)]), Dtype, r"lses\[0\].dtype = float16: must be one of float32"),
    "mixed lses": (([OUT, OUT], [LSE, LSE.astype(float)]), Dtype, r"lses\[1\].dtype = float64: must be float32"),
}

CONFIG = {
    "dtype": "float16", "bias_dtype": "none", "head_dim": 64, "head_dim_v": 64, "block_m": 64, "block_n": 64,
    "block_dv": 64, "num_warps": 4, "num_stages": 1, "q_in_registers": True, "load_bytes": 16, "store_bytes": 16,
    "windowed": False, "softcapped": False, "varlen": False, "split": False,
}
FLOAT32_CONFIG = {
    **CONFIG, "dtype": "float32", "head_dim": 8, "head_dim_v": 3, "block_dv": 16, "q_in_registers": False,
    "load_bytes": 4, "store_bytes": 4,
}
MADE = {
    "num_splits is a float": (Options, {"num_splits": 2.0}, Type, "options.num_splits = 2.0: must be an int"),
    "num_splits is a bool": (Options, {"num_splits": True}, Type, "options.num_splits = True: must be an int"),
    "num_splits = 0": (Options, {"num_splits": 0}, Value, "options.num_splits = 0: must be 1 to 128"),
    "num_splits = 129": (Options, {"num_splits": 129}, Value, "options.num_splits = 129: must be 1 to 128"),
    "precision is a bool": (Options, {"precision": True}, Type, "options.precision = True: must be a str or None"),
    "precision unknown": (Options, {"precision": "float16"}, Value, "options.precision = 'float16': must be 'tf32' or"),
    "config is a dict": (Options, {"config": {}}, Type, "options.config = {}: must be a ForwardConfig or None"),
    "config dtype": (ForwardConfig, {**CONFIG, "dtype": "int8"}, Value, "ForwardConfig.dtype = 'int8': must be one"),
    "config bias": (ForwardConfig, {**CONFIG, "bias_dtype": "tf32"}, Value, "ForwardConfig.bias_dtype = 'tf32': must"),
    "config load_bytes": (
        ForwardConfig, {**CONFIG, "dtype": "float64", "load_bytes": 4}, Value, r"load_bytes = 4: must be one of \(8,",
    ),
    "config head_dim": (ForwardConfig, {**CONFIG, "head_dim": 513}, Value, "head_dim = 513: must be 1 to 512"),
    "config block_m": (ForwardConfig, {**CONFIG, "block_m": 72}, Value, "block_m = 72: must be a multiple of 16"),
    "config warps": (ForwardConfig, {**CONFIG, "num_warps": 3}, Value, "num_warps = 3: must be 1, 2, 4 or 8"),
    "config state": (
        CombineConfig,
        {
            "state_dtype": "tf32", "out_dtype": "float32", "head_dim_v": 8, "load_bytes": 4, "row_warps": 1,
            "num_warps": 4,
        },
        Value, "CombineConfig.state_dtype = 'tf32': must be one of",
    ),
    "unknown arch": (emulate, {"arch": "sm_75"}, Value, "arch = 'sm_75': must be one of sm_80"),
    "warp_order < 0": (
        emulate, {"arch": "sm_80", "warp_order": -1}, Value, "warp_order = -1: must be >= 0 or None",
    ),
    "warp_order a str": (
        emulate, {"arch": "sm_80", "warp_order": "a"}, Type, "warp_order = 'a': must be an int or",
    ),
    "copies": (emulate, {"arch": "sm_80", "copies": "soon"}, Value, "copies = 'soon': must be 'late'"),
    "check_races": (
        emulate, {"arch": "sm_80", "check_races": 1}, Type, "check_races = 1: must be True or False",
    ),
    "sm_count": (emulate, {"arch": "sm_80", "sm_count": 0}, Value, "sm_count = 0: must be >= 1 or"),
}


def expect(error: type[CuflashError], message: str) -> Any:
    return pytest.raises(error, match=message)


def check_untouched(function: Any, arguments: dict[str, Any], error: type[CuflashError], message: str) -> None:
    """Raises as said and leaves `out`, a right one if the case has none, as it was."""
    q, v = arguments["q"], arguments["v"]
    if "out" not in arguments and all(isinstance(array, np.ndarray) and array.ndim for array in (q, v)):
        arguments = {**arguments, "out": np.full((*q.shape[:-1], v.shape[-1]), SENTINEL, q.dtype)}
    out = arguments.get("out")
    before = out.copy() if isinstance(out, np.ndarray) else None
    with expect(error, message):
        function(**arguments)
    if before is not None:
        np.testing.assert_array_equal(out, before)


@pytest.mark.parametrize("case", DENSE.values(), ids=DENSE)
def test_attention(case) -> None:
    check_untouched(cuflash.attention, *case)


@pytest.mark.parametrize("case", VARLEN.values(), ids=VARLEN)
def test_attention_varlen(case) -> None:
    check_untouched(cuflash.attention_varlen, *case)


@pytest.mark.parametrize("case", MERGE.values(), ids=MERGE)
def test_merge_states(case) -> None:
    arguments, error, message = case
    with expect(error, message):
        cuflash.merge_states(*arguments)


@pytest.mark.parametrize("case", MADE.values(), ids=MADE)
def test_what_is_made(case) -> None:
    make, keywords, error, message = case
    with expect(error, message):
        make(**keywords)


def half(**changes: Any) -> dict[str, Any]:
    """Arguments in float16, but for the changes."""
    arguments = dense()
    return {**{name: array.astype(F16) for name, array in arguments.items()}, **changes}


KERNELS = {
    "precision of float16": (
        half(options=Options(precision="tf32")), Value, "options.precision = 'tf32': must be None for float16; float32",
    ),
    "precision of float64": (
        {**{name: array.astype(float) for name, array in dense().items()}, "options": Options(precision="tf32")},
        Value, "options.precision = 'tf32': must be None for float64; float32 alone has another",
    ),
    "config without its precision": (
        dense(options=Options(config=ForwardConfig(**FLOAT32_CONFIG), precision="tf32")),
        Value, "options.config.dtype = 'float32': must be 'tf32', as the problem has it",
    ),
    "head_dim 0": (half(q=zeros(2, 5, 4, 0, dtype=F16), k=zeros(2, 6, 2, 0, dtype=F16)), Shape, "q.shape.-1. = 0: m"),
    "head_dim 513": (
        half(q=zeros(2, 5, 4, 513, dtype=F16), k=zeros(2, 6, 2, 513, dtype=F16)), Shape, "q.shape.-1. = 513: must be 1",
    ),
    "head_dim_v 513": (half(v=zeros(2, 6, 2, 513, dtype=F16)), Shape, "v.shape.-1. = 513: must be 1 to 512 for f"),
    "config of other dims": (
        half(options=Options(config=ForwardConfig(**CONFIG))), Value, r"options\.config|ForwardConfig|config",
    ),
    "out": (half(out=zeros(2, 5, 4, 3)), Dtype, "out.dtype = float32: must be float16"),
}


@pytest.mark.parametrize("case", KERNELS.values(), ids=KERNELS)
def test_kernels(case) -> None:
    """What the CPU takes and kernels do not."""
    with cuflash.emulate("sm_80") as device:
        check_untouched(cuflash.attention, *case)
    assert device.launches == []


def test_merge_states_on_kernels() -> None:
    with cuflash.emulate("sm_80"), expect(InvalidDtypeError, r"lses\[0\].dtype = float32: must be one of float64 on"):
        cuflash.merge_states([OUT.astype(float)], [LSE])
    with cuflash.emulate("sm_80"), expect(InvalidDtypeError, r"lses\[0\].dtype = float64: must be one of float32"):
        cuflash.merge_states([OUT], [LSE.astype(float)])


def test_gpu_array_without_the_extra() -> None:
    with without_the_cuda_device() as patch:
        patch.setitem(sys.modules, "cupy", None)
        with expect(DeviceError, r"q is on a GPU: .*install the extra .*cuflash\[cu12\] or cuflash\[cu13\]"):
            cuflash.attention(**dense(q=Foreign(), k=Foreign(), v=Foreign()))
    with expect(DeviceError, r"q is on DLPack device \(7, 0\): must be on a CPU or a CUDA GPU"):
        cuflash.attention(**dense(q=OnVulkan(), k=OnVulkan(), v=OnVulkan()))


def test_the_first_good_call_hides_no_bad_one() -> None:
    """What a call has prepared is found by value: 1 == True, and 1.0 == 1, must not find it."""
    cuflash.attention(**dense(causal=True, window=(1, None)))
    with expect(InvalidTypeError, "causal = 1: must be True or False"):
        cuflash.attention(**dense(causal=1, window=(1, None)))
    with expect(InvalidTypeError, r"window\[0\] = 1.0: must be an integer"):
        cuflash.attention(**dense(causal=True, window=(1.0, None)))


def test_errors_are_of_the_built_in_kinds() -> None:
    for error, built_in in (
        (InvalidValueError, ValueError), (InvalidShapeError, ValueError), (InvalidTypeError, TypeError),
        (InvalidDtypeError, TypeError), (DeviceError, RuntimeError),
    ):
        assert issubclass(error, built_in)
        assert issubclass(error, CuflashError)


def test_there_are_enough_cases() -> None:
    assert sum(map(len, (DENSE, VARLEN, MERGE, MADE, KERNELS))) >= 130
