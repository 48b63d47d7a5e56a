"""What `vjp` and a pullback refuse: a typed error that names argument, value and requirement, before anything runs."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest

import cuflash
import cuflash.forward
import cuflash.reference  # functions of late modules are known once these are loaded
import cuflash.sparse
from cuflash import DeviceError, InvalidDtypeError, InvalidShapeError, InvalidTypeError, InvalidValueError
from cuflash.plan.config import BackwardConfig

Q, K, V = (np.zeros(shape, np.float32) for shape in ((2, 5, 4, 8), (2, 6, 2, 8), (2, 6, 2, 3)))
OUT, LSE = np.zeros((2, 5, 4, 3), np.float32), np.zeros((2, 4, 5), np.float32)


def torch_array() -> Any:
    import torch

    return torch.zeros(OUT.shape)


COTANGENTS = {
    "shape": (OUT[:1], InvalidShapeError, r"cotangent.shape = \(1, 5, 4, 3\): must be \(2, 5, 4, 3\), that of the res"),
    "broadcast": (OUT[:1, :1], InvalidShapeError, r"cotangent.shape = \(1, 1, 4, 3\): must be"),
    "rank": (OUT[0], InvalidShapeError, r"cotangent.shape = \(5, 4, 3\): must be"),
    "dtype": (OUT.astype(float), InvalidDtypeError, "cotangent.dtype = float64: must be float32, that of the result"),
    "integers": (OUT.astype(int), InvalidDtypeError, "cotangent.dtype = int64: must be float32"),
    "list": (OUT.tolist(), InvalidTypeError, "cotangent is a list: must be a numpy array, as the result is"),
    "None": (None, InvalidTypeError, "cotangent is a NoneType: must be a numpy array"),
    "number": (1.0, InvalidTypeError, "cotangent is a float: must be a numpy array"),
    "pair": ((OUT, LSE), InvalidTypeError, "cotangent is a tuple: must be a numpy array"),
    "kind": (torch_array, InvalidTypeError, "cotangent is a torch.Tensor: must be a numpy array, as the result is"),
    "masked": (np.ma.zeros(OUT.shape, np.float32), InvalidTypeError, "must be a plain array"),
}
PAIRS = {
    "alone": (OUT, InvalidTypeError, r"cotangent is a numpy.ndarray: must be a pair, as the result \(out, lse\) is"),
    "three": ((OUT, LSE, LSE), InvalidTypeError, "cotangent is a tuple: must be a pair"),
    "shape of lse": ((OUT, LSE[:1]), InvalidShapeError, r"cotangent\[1\].shape = \(1, 4, 5\): must be \(2, 4, 5\)"),
    "swapped": ((LSE, OUT), InvalidShapeError, r"cotangent\[0\].shape = \(2, 4, 5\): must be \(2, 5, 4, 3\)"),
    "dtype of lse": ((OUT, LSE.astype(float)), InvalidDtypeError, r"cotangent\[1\].dtype = float64: must be float32"),
    "no lse": ((OUT, None), InvalidTypeError, r"cotangent\[1\] is a NoneType: must be a numpy array"),
}
FUNCTIONS = pytest.mark.parametrize(
    "function", [cuflash.attention, cuflash.reference.standard_attention, cuflash.reference.chunked_attention],
    ids=lambda function: function.__name__,
)  # fmt: skip


@FUNCTIONS
@pytest.mark.parametrize("name", [name for name in COTANGENTS if name != "masked"])
def test_cotangents(function, name) -> None:
    value, error, message = COTANGENTS[name]
    _, pullback = cuflash.vjp(function, Q, K, V)
    with pytest.raises(error, match=message):
        pullback(value() if callable(value) else value)
    assert len(pullback(OUT)) == 3  # goes on working


@FUNCTIONS
@pytest.mark.parametrize("name", PAIRS)
def test_pairs_of_cotangents(function, name) -> None:
    value, error, message = PAIRS[name]
    with pytest.raises(error, match=message):
        cuflash.vjp(function, Q, K, V, return_lse=True)[1](value)


def test_cotangents_of_a_special_kind() -> None:
    with pytest.raises(InvalidTypeError, match=COTANGENTS["masked"][2]):
        cuflash.vjp(cuflash.attention, Q, K, V)[1](COTANGENTS["masked"][0])
    out, pullback = cuflash.vjp(cuflash.attention, *(torch_array() for _ in range(3)))
    with pytest.raises(InvalidTypeError, match=r"cotangent requires grad: must not.*cotangent.detach\(\)"):
        pullback(out.clone().requires_grad_())
    with pytest.raises(DeviceError, match="cotangent is on meta: must be on cpu, as the result is"):
        pullback(out.to("meta"))


def test_cotangents_of_merge_states() -> None:
    _, pullback = cuflash.vjp(cuflash.merge_states, [OUT], [LSE])
    for value, error, message in PAIRS.values():
        with pytest.raises(error, match=message):
            pullback(value)


@pytest.mark.parametrize(
    "function",
    [np.matmul, len, None, "attention", [], cuflash.emulate],
    ids=["ufunc", "builtin", "None", "str", "list", "cuflash"],
)
def test_functions_without_a_pullback(function) -> None:
    known = "attention, attention_varlen, chunked_attention, hash_sparse_attention, merge_states, qk_sparse_attention, "
    known += "standard_attention"
    with pytest.raises(InvalidTypeError, match=f"function = .*: must be one that has a pullback: {known}"):
        cuflash.vjp(function, Q, K, V)


def test_arguments_that_the_function_does_not_take() -> None:
    with pytest.raises(InvalidTypeError, match="vjp of attention: got an unexpected keyword argument 'casual'"):
        cuflash.vjp(cuflash.attention, Q, K, V, casual=True)
    with pytest.raises(InvalidTypeError, match="vjp of attention: missing a required argument: 'v'"):
        cuflash.vjp(cuflash.attention, Q, K)
    with pytest.raises(InvalidTypeError, match="vjp of attention: too many positional arguments"):
        cuflash.vjp(cuflash.attention, Q, K, V, OUT)
    with pytest.raises(InvalidTypeError, match="vjp of attention_varlen: missing a required argument: 'cu_seqlens_q'"):
        cuflash.vjp(cuflash.attention_varlen, Q[0], K[0], V[0])


def test_out_is_refused() -> None:
    out = np.full_like(OUT, 7)
    with pytest.raises(InvalidValueError, match="out is given: must be None within vjp, since the pullback keeps"):
        cuflash.vjp(cuflash.attention, Q, K, V, out=out)
    assert (out == 7).all()


def test_what_the_function_refuses() -> None:
    """The function's own errors, before the forward runs."""
    refused = [
        (lambda: cuflash.vjp(cuflash.attention, Q, V, V), InvalidShapeError, "k.shape = .*: head_dim 3 must be 8"),
        (lambda: cuflash.vjp(cuflash.attention, Q, K, V, scale=0), InvalidValueError, "scale = 0.0: must be finite"),
        (lambda: cuflash.vjp(cuflash.attention, Q, K, V, return_lse=1), InvalidTypeError, "return_lse = 1: must be"),
        (lambda: cuflash.vjp(cuflash.attention, Q, K, V, bias=Q), InvalidShapeError, "bias.shape = .*: must broadcast"),
        (lambda: cuflash.vjp(cuflash.attention, Q, K, V, options=3), InvalidTypeError, "options = 3: must be"),
        (lambda: cuflash.vjp(cuflash.attention, Q.tolist(), K, V), InvalidTypeError, "q is a list: must be"),
        (lambda: cuflash.vjp(cuflash.attention_varlen, Q[0], K[0], V[0], [0, 9], [0, 6]), InvalidValueError,
         r"cu_seqlens_q\[-1\] = 9: must be at most 5"),
        (lambda: cuflash.vjp(cuflash.merge_states, [OUT], []), InvalidValueError, r"lses = \[\]: must hold at least"),
        (lambda: cuflash.vjp(cuflash.reference.standard_attention, Q, V, V), InvalidShapeError, "k.shape = "),
    ]  # fmt: skip
    with mock.patch("cuflash.cpu.forward.forward", side_effect=AssertionError("ran")):
        for call, error, message in refused:
            with pytest.raises(error, match=message):
                call()


def test_arrays_that_require_grad() -> None:
    arrays = [torch_array().requires_grad_() for _ in range(3)]
    with pytest.raises(InvalidTypeError, match="q requires grad: must not"):
        cuflash.vjp(cuflash.attention, *arrays)


def test_heads_too_wide_for_the_shared_memory() -> None:
    q = np.zeros((1, 4, 1, 512), np.float64)
    message = r"q.shape\[-1\] = 512, v.shape\[-1\] = 512: gradients of float64 take \d+ bytes of shared memory"
    with cuflash.emulate("sm_86") as device, pytest.raises(InvalidShapeError, match=message):
        cuflash.vjp(cuflash.attention, q, q, q)
    assert not device.launches


def test_a_cotangent_is_checked_before_a_kernel_runs() -> None:
    q = np.zeros((1, 4, 1, 16), np.float16)
    with cuflash.emulate("sm_80") as device:
        out, pullback = cuflash.vjp(cuflash.attention, q, q, q)
        launches = len(device.launches)
        for value, error in (out[:, :3], InvalidShapeError), (out.astype(float), InvalidDtypeError), (None, TypeError):
            with pytest.raises(error):
                pullback(value)
        assert len(device.launches) == launches


def test_a_backward_configuration_that_does_not_fit() -> None:
    q = np.zeros((1, 40, 1, 64), np.float16)
    config = BackwardConfig(
        dtype="float16", bias_dtype="none", head_dim=64, head_dim_v=64, block_m=16, block_n=16, block_d=64, block_dv=64,
        num_warps=1, key_warps=1, num_stages=1, load_bytes=16, store_bytes=16, windowed=True, softcapped=False,
        varlen=False, deterministic=True,
    )  # fmt: skip
    options = cuflash.Options(backward_config=config)
    with cuflash.emulate("sm_80") as device:
        _, pullback = cuflash.vjp(cuflash.attention, q, q, q, options=options)
        with pytest.raises(cuflash.CuflashError, match=r"backward_config.windowed = True: must be False, as the pro"):
            pullback(q)
        assert len(device.launches) == 1
    with pytest.raises(InvalidValueError, match=r"options = .*: must be None on the CPU"):
        cuflash.vjp(cuflash.attention, q, q, q, options=options)


@pytest.mark.parametrize("deterministic", [True, False])
def test_the_order_of_additions_may_be_asked_for_on_the_cpu_too(deterministic) -> None:
    options = cuflash.Options(deterministic=deterministic)
    _, pullback = cuflash.vjp(cuflash.attention, Q, K, V, options=options)
    assert len(pullback(OUT)) == 3
