"""`attention` and `attention_varlen`: exact attention in memory linear in the sequence length."""

from __future__ import annotations

from typing import Any, NamedTuple

from cuflash import backward, check, forward
from cuflash.arrays import Kind, device_of, gather, give
from cuflash.check import Packing, Scores
from cuflash.device import Device
from cuflash.layout import NativeArray
from cuflash.masks import Mask
from cuflash.options import Options
from cuflash.packing import take_lengths
from cuflash.vjp import Pullback, register

_NAMES = ("q", "k", "v", "bias", "out")
_OPTIONAL = ("bias", "out")


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    mask: Mask | None = None,
    bias: Any = None,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    out: Any = None,
    options: Options | None = None,
) -> Any:
    """Exact softmax attention, out = softmax(softcap(scale * q kᵀ) + bias) v, tile by tile.

    The scores are never stored, so memory beyond the arrays is independent of the sequence lengths
    (FlashAttention; Dao et al. 2022, Dao 2023).

    Parameters
    ----------
    q : array (batch, seqlen_q, num_heads, head_dim)
        Queries; also (seqlen_q, num_heads, head_dim) or (seqlen_q, head_dim). NumPy arrays run on the CPU, or on the
        device of a surrounding `cuflash.emulate`; CuPy arrays run on their GPU; any other array that implements
        ``__dlpack__`` runs where it is. float16, bfloat16, float32 or float64.
        Any strides are used in place, except that an array whose last axis is not contiguous is copied.
    k : array (batch, seqlen_k, num_kv_heads, head_dim)
        Keys, of q's rank, kind, device and dtype. num_heads is a multiple of num_kv_heads: query head h reads
        key/value head h // (num_heads // num_kv_heads).
    v : array (batch, seqlen_k, num_kv_heads, head_dim_v)
        Values; head_dim_v may differ from head_dim. On a GPU both are 1 to 512; head_dim of float64 is up to 320 where
        a block has 99 KiB of shared memory (sm_86, sm_89, sm_120).
    causal : bool
        Query i sees key j only if j <= i + seqlen_k - seqlen_q: the last query sees every key.
    window : (left, right), optional
        Query i sees keys i + seqlen_k - seqlen_q - left to i + seqlen_k - seqlen_q + right, ends included. None on a
        side is no bound; with `causal`, right is 0.
    mask : cuflash.masks.Mask, optional
        Which keys a query sees, of those that `causal` and `window` show it. Tiles that it hides are not visited;
        lists of the others are kept with the mask, so make it once and use it in every call and layer.
    bias : array, optional
        Added to the scores, in natural-log units; broadcasts to (batch, num_heads, seqlen_q, seqlen_k), less the axes
        that q lacks. Its strides are used in place, zeros included. float16, bfloat16, float32 or float64, whatever q
        has. -inf hides a key; on a GPU so does what is below -2.3e38 (float64 q: -1.2e308).
    scale : float, optional
        Factor of q kᵀ, 1e-30 to 1e30, for float64 1e-300 to 1e300; 1/√head_dim by default.
    softcap : float, optional
        c bounds the scores by c tanh(x / c) before the bias; it and scale / c as large as a scale. None by default.
    return_lse : bool
        Return (out, lse) instead of out.
    out : array (batch, seqlen_q, num_heads, head_dim_v), optional
        Where the result goes, of q's kind, device and dtype: any strides with a contiguous last axis, sharing no
        element with an input.
    options : Options, optional
        How the kernels run; on the CPU there is nothing to choose, and anything but `deterministic` is an error.

    Returns
    -------
    out : array (batch, seqlen_q, num_heads, head_dim_v)
        Of q's rank, kind, device and dtype; `out` itself where it was given. A query that sees no key gives 0.
    lse : array (batch, num_heads, seqlen_q)
        With return_lse: natural logarithm of the sum of exp(scores), float32 (float64 for float64), less the axes
        that q lacks. A query that sees no key gives -inf.

    Raises
    ------
    InvalidTypeError, InvalidDtypeError, InvalidShapeError, InvalidValueError
        An argument is not what this page says; nothing was computed or written.
    DeviceError
        Arrays lie on different devices, or the extra that drives a GPU is not installed.

    Notes
    -----
    Sums are in float32, in float64 for float64. NaN and infinities reach only queries that see them; on a GPU those of
    v also reach the other queries of a tile, and an infinity in float32 counts as NaN. On a GPU scores must stay within
    ±1e8 where there is neither bias nor softcap: the maximum is rounded before it is subtracted.

    On a GPU the call waits for nothing: it launches on CuPy's current stream of the arrays' device and can be captured
    in a graph once its kernel is loaded.

    Examples
    --------
    >>> import numpy as np, cuflash
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 100, 4, 64), dtype=np.float32)
    >>> cuflash.attention(q, k, v, causal=True).shape
    (2, 100, 4, 64)
    """
    kind, question = _dense(q, k, v, bias, out, check.scores(causal, window, scale, softcap, mask), return_lse)
    return give(kind, out, *forward.run(*question, bool(return_lse), options))


def attention_varlen(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    mask: Mask | None = None,
    bias: Any = None,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    out: Any = None,
    options: Options | None = None,
) -> Any:
    """Exact attention over sequences of different lengths, packed one after another without padding.

    Sequence b has the queries cu_seqlens_q[b] to cu_seqlens_q[b + 1] and the keys cu_seqlens_k[b] to
    cu_seqlens_k[b + 1], and is answered as `attention` would answer it alone.

    Parameters
    ----------
    q : array (total_q, num_heads, head_dim)
        Queries; kinds of array, dtypes and strides as for `attention`.
    k : array (total_k, num_kv_heads, head_dim)
        Keys.
    v : array (total_k, num_kv_heads, head_dim_v)
        Values.
    cu_seqlens_q, cu_seqlens_k : array or sequence (batch + 1,)
        Integer offsets of the sequences, from 0 up, at most total_q and total_k at the end. On the host they are
        checked. On the GPU (int32, or cast there) they are not read back: kernels clamp them, and a graph can be
        captured.
    max_seqlen_q, max_seqlen_k : int, optional
        At least the longest sequence. By default that of offsets on the host, and total_q or total_k for offsets on
        the GPU; there a bias with an axis along the sequence needs it, and longer sequences are cut to it.
    causal, window, mask, scale, softcap, options
        As for `attention`, sequence by sequence: q and k of a mask count from the sequence's first token, its batch is
        the number of the sequence.
    bias : array, optional
        Broadcasts to (batch, num_heads, seqlen_q, seqlen_k), its last two axes 1 or at least max_seqlen_q and
        max_seqlen_k long; sequence b uses bias[b, :, :length_q, :length_k].
    return_lse : bool
        Return (out, lse) instead of out.
    out : array (total_q, num_heads, head_dim_v), optional
        Where the result goes, as for `attention`.

    Returns
    -------
    out : array (total_q, num_heads, head_dim_v)
        As for `attention`; 0 for tokens after the last sequence.
    lse : array (num_heads, total_q)
        With return_lse, as for `attention`; -inf for tokens after the last sequence.

    Raises
    ------
    InvalidTypeError, InvalidDtypeError, InvalidShapeError, InvalidValueError, DeviceError
        As for `attention`; nothing was computed or written.

    Examples
    --------
    >>> import numpy as np, cuflash
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 70, 4, 64), dtype=np.float32)
    >>> cuflash.attention_varlen(q, k, v, [0, 20, 70], [0, 20, 70], causal=True).shape
    (70, 4, 64)
    """
    asked = check.scores(causal, window, scale, softcap, mask)
    cu_seqlens, max_seqlens = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    kind, question = _packed(q, k, v, bias, out, cu_seqlens, max_seqlens, asked, return_lse)
    return give(kind, out, *forward.run(*question, bool(return_lse), options))


class _Question(NamedTuple):
    """A call in native arrays, as the passes take it."""

    device: Device | None
    operands: forward.Operands
    asked: Scores
    packing: Packing | None


def _dense(q: Any, k: Any, v: Any, bias: Any, out: Any, asked: Scores, return_lse: bool) -> tuple[Kind, _Question]:
    check.check_flag("return_lse", return_lse)
    kind, arrays = gather(_NAMES, (q, k, v, bias, out), _OPTIONAL)
    q, k, v, bias, out = arrays
    operands = forward.Operands(q, k, v, bias, out, mask=asked.mask)
    return kind, _Question(device_of(kind, _NAMES, arrays), operands, asked, None)


def _packed(
    q: Any,
    k: Any,
    v: Any,
    bias: Any,
    out: Any,
    cu_seqlens: tuple[Any, Any],
    max_seqlens: tuple[int | None, int | None],
    asked: Scores,
    return_lse: bool,
) -> tuple[Kind, _Question]:
    kind, (device, operands, *_) = _dense(q, k, v, bias, out, asked, return_lse)
    for name, array in zip("qkv", operands[:3], strict=True):
        check.check_packed_rank(name, array.shape)
    totals = operands.q.shape[0], operands.k.shape[0]
    lengths = take_lengths(device, cu_seqlens, max_seqlens, totals, _biased_axes(operands.bias))
    operands = operands._replace(cu_seqlens_q=lengths.cu_seqlens_q, cu_seqlens_k=lengths.cu_seqlens_k)
    return kind, _Question(device, operands, asked, lengths.packing)


def _biased_axes(bias: NativeArray | None) -> tuple[bool, bool]:
    """Whether a bias has an axis along the queries and one along the keys."""
    along_q, along_k = ((1, 1) if bias is None else (1, 1, *bias.shape))[-2:]
    return along_q != 1, along_k != 1


def _attention_vjp(
    q: Any, k: Any, v: Any, *, bias: Any, out: Any, return_lse: bool, options: Options | None, **scores: Any
) -> tuple[Any, Pullback]:
    return _differentiate(*_dense(q, k, v, bias, out, check.scores(**scores), return_lse), return_lse, options)


def _attention_varlen_vjp(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    *,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    bias: Any,
    out: Any,
    return_lse: bool,
    options: Options | None,
    **scores: Any,
) -> tuple[Any, Pullback]:
    asked = check.scores(**scores)
    cu_seqlens, max_seqlens = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    kind, question = _packed(q, k, v, bias, out, cu_seqlens, max_seqlens, asked, return_lse)
    return _differentiate(kind, question, return_lse, options)


def _differentiate(kind: Kind, question: _Question, return_lse: bool, options: Options | None) -> tuple[Any, Pullback]:
    out, lse, native_pullback = backward.run(*question, options)

    def pullback(cotangent: Any) -> tuple[Any, ...]:
        names = ("cotangent[0]", "cotangent[1]") if return_lse else ("cotangent",)
        _, cotangents = gather(names, cotangent if return_lse else (cotangent,))
        return tuple(map(kind.give, native_pullback(*cotangents)))

    result = kind.give(out)
    return ((result, kind.give(lse)) if return_lse else result), pullback


register(attention, _attention_vjp)
register(attention_varlen, _attention_varlen_vjp)
