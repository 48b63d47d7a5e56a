"""What hash-sparse and QK-sparse attention refuse, by message, before anything is computed or written."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import cuflash
from cuflash import sparse
from cuflash.errors import (
    InvalidDtypeError,
    InvalidShapeError,
    InvalidTypeError,
    InvalidValueError,
)

Q, K = np.ones((2, 30, 4, 16), np.float32), np.ones((2, 30, 2, 16), np.float32)
HASH_Q, HASH_K = np.zeros((2, 30, 4), np.int32), np.zeros((2, 30, 2), np.int32)
KEEP_Q, KEEP_K = np.ones((2, 30, 4), bool), np.ones((2, 30, 2), bool)

HASHES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "heads of q for keys": (
        {"k_hash": HASH_Q},
        InvalidShapeError,
        "k_hash.shape = (2, 30, 4): must be (2, 30, 2), k's without head_dim",
    ),
    "another length": (
        {"q_hash": HASH_Q[:, 1:]},
        InvalidShapeError,
        "q_hash.shape = (2, 29, 4): must be (2, 30, 4), q's without head_dim",
    ),
    "heads before tokens": (
        {"q_hash": HASH_Q.swapaxes(1, 2)},
        InvalidShapeError,
        "q_hash.shape = (2, 4, 30): must be (2, 30, 4), q's without head_dim",
    ),
    "another rank": (
        {"q_hash": HASH_Q[..., None]},
        InvalidShapeError,
        "q_hash.shape = (2, 30, 4, 1): must be (2, 30, 4), q's without head_dim",
    ),
    "floats": (
        {"q_hash": HASH_Q.astype(np.float32)},
        InvalidDtypeError,
        "q_hash.dtype = float32: must be an integer dtype in native byte order; cuflash.sparse.angular_hash makes "
        "hashes of vectors, cuflash.sparse.qk_sparse_attention takes truths",
    ),
    "truths": (
        {"k_hash": KEEP_K},
        InvalidDtypeError,
        "k_hash.dtype = bool: must be an integer dtype in native byte order; cuflash.sparse.angular_hash makes "
        "hashes of vectors, cuflash.sparse.qk_sparse_attention takes truths",
    ),
    "byte order": (
        {"k_hash": HASH_K.astype(">i4")},
        InvalidDtypeError,
        "k_hash.dtype = >i4: must be an integer dtype in native byte order; cuflash.sparse.angular_hash makes "
        "hashes of vectors, cuflash.sparse.qk_sparse_attention takes truths",
    ),
    "two dtypes": (
        {"k_hash": HASH_K.astype(np.int64)},
        InvalidDtypeError,
        "k_hash.dtype = int64: must be int32, that of q_hash; cast one of them",
    ),
    "a list": (
        {"q_hash": HASH_Q.tolist()},
        InvalidTypeError,
        "q_hash is a list: must be a NumPy or CuPy array or one that implements __dlpack__",
    ),
    "none": (
        {"k_hash": None},
        InvalidTypeError,
        "k_hash is a NoneType: must be a NumPy or CuPy array or one that implements __dlpack__",
    ),
    "include_self": ({"include_self": 1}, InvalidTypeError, "include_self = 1: must be True or False"),
    "return_lse": ({"return_lse": None}, InvalidTypeError, "return_lse = None: must be True or False"),
    "scale": ({"scale": 0}, InvalidValueError, "scale = 0.0: must be finite and > 0, or None"),
    "softcap": ({"softcap": "1"}, InvalidTypeError, "softcap = '1': must be a number or None"),
    "q of two ranks": (
        {"k": K[0]},
        InvalidShapeError,
        "k.shape = (30, 2, 16): must be (batch, seqlen, heads, dim), as q is",
    ),
    "heads": (
        {"q": Q[:, :, :3], "q_hash": HASH_Q[:, :, :3]},
        InvalidShapeError,
        "q.shape = (2, 30, 3, 16): 3 heads must be a multiple of the 2 of k",
    ),
    "dtype of v": (
        {"v": K.astype(np.float64)},
        InvalidDtypeError,
        "v.dtype = float64: must be float32, the dtype of q",
    ),
    "shape of out": (
        {"out": np.empty((2, 30, 4, 17), np.float32)},
        InvalidShapeError,
        "out.shape = (2, 30, 4, 17): must be (2, 30, 4, 16)",
    ),
    "dtype of out": (
        {"out": np.empty((2, 30, 4, 16))},
        InvalidDtypeError,
        "out.dtype = float64: must be float32, the dtype of q",
    ),
    "out over an input": ({"out": Q}, InvalidValueError, "out overlaps q: must not share memory with it"),
    "options": ({"options": {}}, InvalidTypeError, "options = {}: must be a cuflash.Options or None"),
}

KEEPS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "shape": (
        {"keep_k": KEEP_Q},
        InvalidShapeError,
        "keep_k.shape = (2, 30, 4): must be (2, 30, 2), k's without head_dim",
    ),
    "without heads": (
        {"keep_q": KEEP_Q[..., 0]},
        InvalidShapeError,
        "keep_q.shape = (2, 30): must be (2, 30, 4), q's without head_dim",
    ),
    "whole numbers": (
        {"keep_q": HASH_Q},
        InvalidDtypeError,
        "keep_q.dtype = int32: must be bool; of whole numbers pass keep_q != 0",
    ),
    "floats": (
        {"keep_k": KEEP_K.astype(float)},
        InvalidDtypeError,
        "keep_k.dtype = float64: must be bool; of whole numbers pass keep_k != 0",
    ),
    "none": (
        {"keep_q": None},
        InvalidTypeError,
        "keep_q is a NoneType: must be a NumPy or CuPy array or one that implements __dlpack__",
    ),
}


def refuse(device: Any, function: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    """Both the function and its vjp; `arguments` by name, the arrays first."""
    names = list(arguments)[:5]
    arrays, keywords = [arguments[name] for name in names], {n: x for n, x in arguments.items() if n not in names}
    out = arguments.get("out")
    before = None if out is None else out.copy()
    for call in (function, lambda *a, **k: cuflash.vjp(function, *a, **k)):
        if out is not None and call is not function:
            continue  # vjp takes no out
        with pytest.raises(error) as raised:
            device.run(call, *arrays, **keywords)
        assert str(raised.value) == message
    if before is not None:
        np.testing.assert_array_equal(out, before)


@pytest.mark.parametrize("name", HASHES)
def test_hash_sparse(device: Any, name: str) -> None:
    changes, error, message = HASHES[name]
    arguments = {"q": Q, "k": K, "v": K, "q_hash": HASH_Q, "k_hash": HASH_K} | changes
    refuse(device, sparse.hash_sparse_attention, arguments, error, message)


@pytest.mark.parametrize("name", KEEPS)
def test_qk_sparse(device: Any, name: str) -> None:
    changes, error, message = KEEPS[name]
    arguments = {"q": Q, "k": K, "v": K, "keep_q": KEEP_Q, "keep_k": KEEP_K} | changes
    refuse(device, sparse.qk_sparse_attention, arguments, error, message)


def test_two_dimensions(device: Any) -> None:
    """One head of one sequence: marks have one axis."""
    q = Q[0, :, 0]
    with pytest.raises(InvalidShapeError, match=r"q_hash.shape = \(30, 1\): must be \(30,\), q's without head_dim"):
        device.run(sparse.hash_sparse_attention, q, q, q, HASH_Q[0, :, :1], HASH_K[0, :, 0])


def test_limits_of_the_kernels() -> None:
    wide = np.ones((1, 2, 1, 513), np.float16)
    marks = np.zeros((1, 2, 1), np.int32)
    with cuflash.emulate("sm_80") as device:
        with pytest.raises(InvalidShapeError, match=r"q.shape\[-1\] = 513: must be 1 to 512 for float16 on sm_80"):
            sparse.hash_sparse_attention(wide, wide, wide, marks, marks)
        x = wide[..., :16].copy()
        odd = np.zeros(9, np.int8)[1:].view(np.int32).reshape(1, 2, 1)
        with pytest.raises(InvalidValueError, match=r"k_hash.strides = .* elements must be aligned to their 4 bytes"):
            sparse.hash_sparse_attention(x, x, x, marks, odd)
        assert device.launches == []
    wide = np.ones((1, 2, 1, 300))
    with cuflash.emulate("sm_86") as device:
        with pytest.raises(InvalidShapeError, match=r"must be at most .* on sm_86; cast to a narrower dtype"):
            cuflash.vjp(sparse.hash_sparse_attention, wide, wide, wide, marks, marks)
        assert device.launches == []


def test_kinds_of_arrays_do_not_mix() -> None:
    with pytest.raises(
        InvalidTypeError, match=r"q_hash is a torch.Tensor: must be the same kind of array as q, a numpy"
    ):
        sparse.hash_sparse_attention(Q, K, K, torch.tensor(HASH_Q), HASH_K)


def test_out_within_vjp() -> None:
    with pytest.raises(InvalidValueError, match="out is given: must be None within vjp"):
        cuflash.vjp(sparse.qk_sparse_attention, Q, K, K, KEEP_Q, KEEP_K, out=Q.copy())
