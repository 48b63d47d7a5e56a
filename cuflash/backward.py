"""The backward pass from native arrays to native gradients: the counterpart of `cuflash.forward`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cuflash import check, forward
from cuflash.check import Packing, Scores
from cuflash.device import Device
from cuflash.errors import DeviceError
from cuflash.forward import Operands, full_bias, normal
from cuflash.layout import NativeArray, layout
from cuflash.options import Options

Pullback = Callable[[NativeArray, NativeArray | None], tuple[NativeArray, ...]]


def check_device(device: Device | None) -> None:
    """Gradients have no kernels yet."""
    if device is not None:
        raise DeviceError(
            f"vjp on {device.arch.name}: gradients run on the CPU so far; pass NumPy arrays, outside of cuflash.emulate"
        )


def run(
    device: Device | None, operands: Operands, asked: Scores, packing: Packing | None, options: Options | None
) -> tuple[NativeArray, NativeArray, Pullback]:
    """out, lse, and what turns their cotangents (dlse: or None) into the gradients of q, k, v and, if given, bias."""
    check_device(device)
    out, lse = forward.run(device, operands, asked, packing, True, options)
    q, k, v, bias, _, cu_seqlens_q, cu_seqlens_k = operands
    problem = check.problem(layout(q), layout(k), layout(v), None if bias is None else layout(bias), asked, packing)
    lse_shape = (problem.batch, problem.num_heads, problem.seqlen_q)

    def tokens_first(array: NativeArray) -> NativeArray:
        return normal(array, problem.varlen)

    def heads_first(array: NativeArray) -> NativeArray:
        return array if problem.varlen else array.reshape(lse_shape)

    def pullback(dout: np.ndarray, dlse: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
        from cuflash.cpu.backward import Arrays, backward

        dq, dk, dv = (np.zeros(array.shape, array.dtype) for array in (q, k, v))
        dbias = None if bias is None else np.zeros(bias.shape, bias.dtype)
        arrays = Arrays(
            tokens_first(q),
            tokens_first(k),
            tokens_first(v),
            None if bias is None else full_bias(bias, problem),
            tokens_first(out),
            heads_first(lse),
            tokens_first(dout),
            None if dlse is None else heads_first(dlse),
            tokens_first(dq),
            tokens_first(dk),
            tokens_first(dv),
        )
        in_rank_4 = None if dbias is None else dbias.reshape((1,) * (4 - dbias.ndim) + dbias.shape)
        backward(problem, arrays, cu_seqlens_q, cu_seqlens_k, in_rank_4)
        return (dq, dk, dv) if dbias is None else (dq, dk, dv, dbias)

    return out, lse, pullback
