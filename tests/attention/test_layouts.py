"""Strided inputs and outputs are used in place: page-like views, interleaved buffers, alignments, shared memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cuflash
from tests.attention.cases import LAYOUTS, Case, check, embed, hold_to_oracle, make

CASE = Case(seqlen_q=33, seqlen_k=65, num_heads=4, num_kv_heads=2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head_dim", [64, 40, 33])
def test_layout(device: Any, layout: str, head_dim: int) -> None:
    check(device, CASE.but(layout=layout, head_dim=head_dim, head_dim_v=head_dim))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_split_keys(device: Any, layout: str) -> None:
    check(device, CASE.but(layout=layout, causal=True, options=cuflash.Options(num_splits=2)))


@pytest.mark.parametrize(
    "layouts",
    [
        ("interleaved", "page", "heads_first"),
        ("offset_1", "dense", "dense"),
        ("dense", "offset_2", "offset_4"),
        ("reversed_tokens", "dense", "offset_4"),
    ],
    ids="-".join,
)
def test_each_array_has_its_own_layout(device: Any, layouts: tuple[str, str, str]) -> None:
    inputs = make(CASE)
    chosen = [LAYOUTS[name] for name in layouts]
    buffers = [embed(layout, x) for layout, x in zip(chosen, inputs[:3], strict=True)]

    def attend(*arrays: Any) -> Any:
        views = [layout.view(x) for layout, x in zip(chosen, arrays, strict=True)]
        return cuflash.attention(*views, return_lse=True)

    hold_to_oracle(CASE, inputs, *device.run(attend, *buffers))


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_out_is_written_in_place(device: Any, layout: str, split: bool) -> None:
    """`out` of any layout gets the result, and its gaps keep what they held."""
    inputs = make(CASE)
    view = LAYOUTS[layout].view
    shape = (*inputs.q.shape[:3], CASE.head_dim_v)
    buffer = embed(LAYOUTS[layout], np.full(shape, 7, CASE.dtype))
    options = None if device.name == "cpu" else cuflash.Options(num_splits=2 if split else 1)

    def attend(q: Any, k: Any, v: Any, buffer: Any) -> Any:
        out = view(buffer)
        result, lse = cuflash.attention(q, k, v, out=out, return_lse=True, options=options)
        assert result is out
        return buffer, lse

    written, lse = device.run(attend, *inputs[:3], buffer)
    hold_to_oracle(CASE, inputs, view(written), lse)
    view(written)[...] = 7
    np.testing.assert_array_equal(written, embed(LAYOUTS[layout], np.full(shape, 7, CASE.dtype)))


@pytest.mark.parametrize("layout", ["interleaved", "heads_first", "page"])
def test_out_of_packed_sequences(device: Any, layout: str) -> None:
    """Rows of `out` behind the last sequence are set to zero, memory around it is kept."""
    case = CASE.but(sequences=((20, 30), (0, 5), (33, 17)), tail=(3, 4))
    inputs = make(case)
    view = LAYOUTS[layout].view
    shape = (1, *inputs.q.shape[:2], case.head_dim_v)
    buffer = embed(LAYOUTS[layout], np.full(shape, 7, case.dtype))

    def attend(q: Any, k: Any, v: Any, edges_q: Any, edges_k: Any, buffer: Any) -> Any:
        cuflash.attention_varlen(q, k, v, edges_q, edges_k, out=view(buffer)[0])
        return buffer

    written = device.run(attend, *inputs[:3], inputs.cu_seqlens_q, inputs.cu_seqlens_k, buffer)
    hold_to_oracle(case, inputs, view(written)[0], None)


def test_one_buffer_of_q_k_and_v(device: Any) -> None:
    """A projection's output (batch, seqlen, 3, heads, dim), used without a copy."""
    case = Case(batch=2, seqlen_q=47, seqlen_k=47, num_heads=2, num_kv_heads=2)
    inputs = make(case)
    buffer = np.stack(inputs[:3], axis=2)

    def attend(qkv: Any) -> Any:
        return cuflash.attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], return_lse=True)

    hold_to_oracle(case, inputs, *device.run(attend, buffer))


def test_one_array_three_times(device: Any) -> None:
    case = Case(batch=2, seqlen_q=47, seqlen_k=47, num_heads=2, num_kv_heads=2)
    inputs = make(case)
    inputs = inputs._replace(k=inputs.q, v=inputs.q)
    hold_to_oracle(case, inputs, *device.run(lambda x: cuflash.attention(x, x, x, return_lse=True), inputs.q))


def test_stride_zero(device: Any) -> None:
    """Keys shared by the batch and by the heads, as a broadcast view."""
    case = Case(batch=3, num_heads=4, num_kv_heads=4)
    inputs = make(case)
    k, v = (np.broadcast_to(x[:1, :, :1], x.shape) for x in (inputs.k, inputs.v))

    def attend(q: Any, k: Any, v: Any) -> Any:
        views = (np.broadcast_to(x, (3, case.seqlen_k, 4, 64)) for x in (k, v))
        return cuflash.attention(q, *views, return_lse=True)

    out, lse = device.run(attend, inputs.q, inputs.k[:1, :, :1].copy(), inputs.v[:1, :, :1].copy())
    hold_to_oracle(case, inputs._replace(k=k, v=v), out, lse)


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("mask", [{}, {"causal": True}], ids=["full", "causal"])
def test_fewer_axes(device: Any, rank: int, mask: dict[str, Any]) -> None:
    """(seqlen, heads, dim) and (seqlen, dim); lse lacks the same axes."""
    case = Case(batch=1, num_heads=1, num_kv_heads=1, **mask)
    inputs = make(case)
    index = (0,) if rank == 3 else (0, slice(None), 0)
    arrays = [x[index] for x in inputs[:3]]
    out, lse = device.run(lambda *x: cuflash.attention(*x, return_lse=True, **mask), *arrays)
    assert out.shape == arrays[0].shape
    assert lse.shape == ((1, 33) if rank == 3 else (33,))
    hold_to_oracle(case, inputs, out.reshape(inputs.q.shape), lse.reshape(1, 1, 33))


def test_inputs_are_left_alone(device: Any) -> None:
    case = CASE.but(bias="bhqk", causal=True, softcap=2.0)
    inputs = make(case)
    copies = [x.copy() for x in inputs[:4]]
    device.run(lambda q, k, v, bias: cuflash.attention(q, k, v, bias=bias, causal=True, softcap=2.0), *inputs[:4])
    for array, copy in zip(inputs[:4], copies, strict=True):
        np.testing.assert_array_equal(array, copy)


@pytest.mark.parametrize("return_lse", [False, True])
def test_read_only_inputs(device: Any, return_lse: bool) -> None:
    inputs = make(CASE)
    for array in inputs[:3]:
        array.flags.writeable = False
    result = device.run(lambda *x: cuflash.attention(*x, return_lse=return_lse), *inputs[:3])
    out, lse = result if return_lse else (result, None)
    hold_to_oracle(CASE, inputs, out, lse)
