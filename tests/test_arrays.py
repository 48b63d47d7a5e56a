"""Callers' kinds of array: taken without a copy, returned in kind; torch and JAX for real, on the CPU."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

import cuflash
from cuflash import arrays, dlpack
from cuflash.errors import DeviceError, InvalidTypeError, InvalidValueError
from cuflash.layout import address

TORCH = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
JAX = ("float16", "bfloat16", "float32")  # float64 needs a setting of the process
SHAPES = {"q": (2, 9, 4, 16), "k": (2, 11, 2, 16), "v": (2, 11, 2, 8)}


def numpy_arrays(dtype: str) -> list[np.ndarray]:
    rng = np.random.default_rng(7)
    return [rng.standard_normal(shape).astype(np.dtype(getattr(ml_dtypes, dtype, dtype))) for shape in SHAPES.values()]


def to_torch(array: np.ndarray) -> torch.Tensor:
    """A copy; bfloat16 through its bits."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def bits(array: Any) -> np.ndarray:
    """The contents of a NumPy, torch or JAX array as bytes."""
    if isinstance(array, torch.Tensor):
        array = array.contiguous().view(torch.uint8).numpy()
    return np.ascontiguousarray(array).view(np.uint8)


@pytest.mark.parametrize("dtype", TORCH)
def test_torch(dtype: str) -> None:
    """The same bits as for NumPy arrays, as tensors."""
    native = numpy_arrays(dtype)
    out, lse = cuflash.attention(*map(to_torch, native), causal=True, return_lse=True)
    want, want_lse = cuflash.attention(*native, causal=True, return_lse=True)
    assert out.dtype == TORCH[dtype]
    assert lse.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    np.testing.assert_array_equal(bits(out), bits(want))
    np.testing.assert_array_equal(bits(lse), bits(want_lse))


@pytest.mark.parametrize("dtype", JAX)
def test_jax(dtype: str) -> None:
    """JAX arrays are read-only for everyone else; they serve as inputs all the same."""
    native = numpy_arrays(dtype)
    out, lse = cuflash.attention(*map(jnp.asarray, native), window=(3, 2), return_lse=True)
    want, want_lse = cuflash.attention(*native, window=(3, 2), return_lse=True)
    assert isinstance(out, jax.Array)
    assert out.dtype == dtype
    assert lse.dtype == "float32"
    np.testing.assert_array_equal(bits(np.asarray(out)), bits(want))
    np.testing.assert_array_equal(bits(np.asarray(lse)), bits(want_lse))


@pytest.mark.parametrize("dtype", TORCH)
def test_torch_in_and_out_share_memory(dtype: str) -> None:
    tensor = to_torch(numpy_arrays(dtype)[0])
    kind = arrays.kind_of(tensor, "q")
    native = kind.take(tensor[:, ::2], "q")
    assert address(native) == tensor.data_ptr()
    assert native.strides == tuple(stride * tensor.element_size() for stride in tensor[:, ::2].stride())
    assert native.dtype.name == dtype
    back = kind.give(native)
    assert back.data_ptr() == tensor.data_ptr()
    assert back.dtype == tensor.dtype


@pytest.mark.parametrize("dtype", JAX)
def test_jax_inputs_share_memory(dtype: str) -> None:
    array = jnp.asarray(numpy_arrays(dtype)[0])
    native = arrays.kind_of(array, "q").take(array, "q")
    assert address(native) == array.unsafe_buffer_pointer()
    assert native.dtype.name == dtype
    assert not native.flags.writeable


@pytest.mark.parametrize("dtype", TORCH)
def test_torch_out_is_written_in_place(dtype: str) -> None:
    tensors = [to_torch(array) for array in numpy_arrays(dtype)]
    buffer = torch.full((2, 9, 4, 20), 3, dtype=TORCH[dtype])
    out = buffer[..., 6:14]
    returned = cuflash.attention(*tensors, out=out)
    assert returned is out
    assert torch.equal(out, cuflash.attention(*tensors))
    assert (buffer[..., :6] == 3).all()
    assert (buffer[..., 14:] == 3).all()


def test_torch_strides_in_place() -> None:
    """Slices of one packed projection, heads first: q, k and v never become contiguous."""
    packed = torch.randn(2, 3, 4, 9, 16).transpose(2, 3)
    q, k, v = packed.unbind(1)
    assert torch.equal(cuflash.attention(q, k, v), cuflash.attention(q.contiguous(), k.contiguous(), v.contiguous()))


def test_results_outlive_and_release_their_memory() -> None:
    """A tensor made from a NumPy result keeps it alive, and no longer than the tensor lives."""
    native = np.zeros((4, 8), ml_dtypes.bfloat16)
    alive = weakref.ref(native)
    tensor = torch.from_dlpack(dlpack.exportable(native))
    del native
    gc.collect()
    assert tensor.float().sum() == 0
    del tensor
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("make", [torch.zeros, jnp.zeros], ids=["torch", "jax"])
def test_zero_lengths(make: Any) -> None:
    assert tuple(cuflash.attention(make((0, 8)), make((3, 8)), make((3, 5))).shape) == (0, 5)
    assert not np.asarray(cuflash.attention(make((2, 8)), make((0, 8)), make((0, 5)))).any()


@pytest.mark.parametrize("convert", [torch.from_numpy, jnp.asarray], ids=["torch", "jax"])
def test_varlen_and_merge(convert: Any) -> None:
    rng = np.random.default_rng(3)
    q, k, v = rng.standard_normal((3, 12, 2, 8)).astype(np.float32)
    offsets = np.array([0, 5, 12], np.int32)
    want = cuflash.attention_varlen(q, k, v, offsets, offsets, return_lse=True)
    got = cuflash.attention_varlen(*map(convert, (q, k, v, offsets, offsets)), return_lse=True)
    mixed = cuflash.attention_varlen(*map(convert, (q, k, v)), offsets, [0, 5, 12], return_lse=True)
    for result in (got, mixed):
        assert type(result[0]) is type(convert(q))
        for array, expected in zip(result, want, strict=True):
            np.testing.assert_array_equal(np.asarray(array), expected)
    merged = cuflash.merge_states([got[0], got[0]], [got[1], got[1]])
    assert type(merged[0]) is type(convert(q))
    np.testing.assert_allclose(np.asarray(merged[0]), want[0], rtol=1e-6)
    np.testing.assert_allclose(np.asarray(merged[1]), want[1] + np.log(np.float32(2)), rtol=1e-6)


def test_memmap_runs_as_an_array(tmp_path: Any) -> None:
    array = np.memmap(tmp_path / "q", np.float32, "w+", shape=(5, 8))
    array[...] = np.random.default_rng(0).standard_normal((5, 8))
    out = cuflash.attention(array, array, array)
    assert type(out) is np.ndarray
    np.testing.assert_array_equal(out, cuflash.attention(*[np.array(array)] * 3))


def test_rows_that_are_not_contiguous_are_copied() -> None:
    q, k, v = np.random.default_rng(1).standard_normal((3, 16, 10)).transpose(0, 2, 1)
    want = cuflash.attention(*map(np.ascontiguousarray, (q, k, v)))
    np.testing.assert_array_equal(cuflash.attention(q, k, v), want)
    np.testing.assert_allclose(cuflash.attention(q[:, ::-1], k[:, ::-1], v), want, rtol=1e-13)


def test_tensor_that_requires_grad() -> None:
    q, k, v = map(to_torch, numpy_arrays("float32"))
    with pytest.raises(InvalidTypeError, match=r"v requires grad: must not, .*pass v.detach\(\)"):
        cuflash.attention(q, k, v.requires_grad_())


def test_negated_view() -> None:
    """The imaginary part of a conjugate is such a view: its memory holds the numbers with the other sign."""
    q, k, v = map(to_torch, numpy_arrays("float32"))
    negated = torch.complex(k, k).conj().imag
    with pytest.raises(InvalidValueError, match=r"k is a negated view: must be resolved; pass k.resolve_neg\(\)"):
        cuflash.attention(q, negated, v)
    assert torch.equal(cuflash.attention(q, negated.resolve_neg(), v), cuflash.attention(q, -k, v))


def test_tensors_that_have_no_plain_memory() -> None:
    q, k, v = map(to_torch, numpy_arrays("float32"))
    with pytest.raises(InvalidTypeError, match=r"k is a torch.Tensor: must be a concrete array that DLPack can export"):
        cuflash.attention(q, k.to_sparse(), v)
    with pytest.raises(InvalidTypeError, match=r"q is a torch.Tensor: must be a concrete array"):
        cuflash.attention(q.to("meta"), k, v)


def test_traced_jax_values() -> None:
    def traced(x: jax.Array) -> jax.Array:
        with pytest.raises(InvalidTypeError, match=r"q is a .*Tracer: must be a concrete array"):
            cuflash.attention(x, x, x)
        return x

    jax.jit(traced)(jnp.zeros((4, 8)))


def test_jax_out_is_refused() -> None:
    q, k, v = map(jnp.asarray, numpy_arrays("float32"))
    with pytest.raises(InvalidValueError, match=r"out is a jaxlib.*: must be writeable, which JAX arrays are not"):
        cuflash.attention(q, k, v, out=jnp.zeros((2, 9, 4, 8)))


def test_mixed_kinds() -> None:
    q, k, v = numpy_arrays("float32")
    with pytest.raises(InvalidTypeError, match=r"v is a torch.Tensor: must be the same kind of array as q, a numpy"):
        cuflash.attention(q, k, to_torch(v))
    with pytest.raises(InvalidTypeError, match=r"bias is a numpy.ndarray: must be the same kind of array as q"):
        cuflash.attention(to_torch(q), to_torch(k), to_torch(v), bias=np.zeros(11))
    with pytest.raises(InvalidTypeError, match="lses are of kind torch: must be of kind numpy, as outs are"):
        cuflash.merge_states([q], [torch.zeros(2, 4, 9)])


def test_only_numpy_runs_on_the_emulated_device() -> None:
    tensors = [to_torch(array) for array in numpy_arrays("float16")]
    with (
        cuflash.emulate("sm_80"),
        pytest.raises(DeviceError, match=r"q is of kind torch: must be a NumPy array within cuflash.emulate"),
    ):
        cuflash.attention(*tensors)


class TestOverlap:
    """`out` may interleave with inputs in one buffer, but share no element."""

    def test_slices_of_one_buffer(self) -> None:
        buffer = np.random.default_rng(0).standard_normal((2, 9, 4, 4, 16)).astype(np.float32)
        q, k, v, out = (buffer[:, :, i] for i in range(4))
        want = cuflash.attention(q.copy(), k.copy(), v.copy())
        assert cuflash.attention(q, k, v, out=out) is out
        np.testing.assert_array_equal(out, want)

    def test_slices_of_one_row(self) -> None:
        buffer = np.zeros((9, 40), np.float32)
        cuflash.attention(buffer[:, :8], buffer[:, 8:16], buffer[:, 16:28], out=buffer[:, 28:40])
        with pytest.raises(InvalidValueError, match="out overlaps v: must not share memory"):
            cuflash.attention(buffer[:, :8], buffer[:, 8:16], buffer[:, 16:28], out=buffer[:, 27:39])

    def test_alternate_rows(self) -> None:
        buffer = np.zeros((18, 8), np.float32)
        other = np.zeros((9, 8), np.float32)
        cuflash.attention(buffer[::2], other, other, out=buffer[1::2])
        with pytest.raises(InvalidValueError, match="out overlaps q"):
            cuflash.attention(buffer[1::2], other, other, out=buffer[17::-2])

    def test_bits_of_one_element(self) -> None:
        """Sharing is by bytes: a float16 bias within a float32 out."""
        memory = np.zeros((4, 8), np.float32)
        q = np.ones((4, 8), np.float32)
        with pytest.raises(InvalidValueError, match="out overlaps bias"):
            cuflash.attention(q, q, q, out=memory, bias=memory.view(np.float16)[0, 1:5])
