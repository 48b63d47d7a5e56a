"""`attention` and `attention_varlen`: exact attention in memory linear in the sequence length."""

from __future__ import annotations

from typing import Any

from cuflash import check, forward
from cuflash.arrays import gather
from cuflash.device import device_of
from cuflash.options import Options

_NAMES = ("q", "k", "v", "bias", "out")


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
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
        ``__dlpack__`` runs where it is. float16, bfloat16, and on the CPU float32 and float64.
        Any strides are used in place, except that an array whose last axis is not contiguous is copied.
    k : array (batch, seqlen_k, num_kv_heads, head_dim)
        Keys, of q's rank, kind, device and dtype. num_heads is a multiple of num_kv_heads: query head h reads
        key/value head h // (num_heads // num_kv_heads).
    v : array (batch, seqlen_k, num_kv_heads, head_dim_v)
        Values; head_dim_v may differ from head_dim. On a GPU both are 1 to 512.
    causal : bool
        Query i sees key j only if j <= i + seqlen_k - seqlen_q: the last query sees every key.
    window : (left, right), optional
        Query i sees keys i + seqlen_k - seqlen_q - left to i + seqlen_k - seqlen_q + right, ends included. None on a
        side is no bound; with `causal`, right is 0.
    bias : array, optional
        Added to the scores, in natural-log units; broadcasts to (batch, num_heads, seqlen_q, seqlen_k), less the axes
        that q lacks. Its strides are used in place, zeros included. float16, bfloat16, float32, on the CPU float64.
        -inf hides a key.
    scale : float, optional
        Factor of q kᵀ, > 0; 1/√head_dim by default.
    softcap : float, optional
        c > 0 bounds the scores by c tanh(x / c) before the bias; none by default.
    return_lse : bool
        Return (out, lse) instead of out.
    out : array (batch, seqlen_q, num_heads, head_dim_v), optional
        Where the result goes, of q's kind, device and dtype: any strides with a contiguous last axis, sharing no
        element with an input.
    options : Options, optional
        How the kernels run; on the CPU there is nothing to choose, and anything but the default is an error.

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
    Sums are in float32, in float64 for float64. On a GPU the call waits for nothing: it launches on CuPy's current
    stream of the arrays' device and can be captured in a graph once its kernel is loaded.

    Examples
    --------
    >>> import numpy as np, cuflash
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 100, 4, 64), dtype=np.float32)
    >>> cuflash.attention(q, k, v, causal=True).shape
    (2, 100, 4, 64)
    """
    asked = check.scores(causal, window, scale, softcap)
    check.check_flag("return_lse", return_lse)
    kind, arrays = gather(_NAMES, (q, k, v, bias, out))
    device = device_of(kind, _NAMES, arrays)
    result, lse = forward.run(device, forward.Operands(*arrays), asked, None, bool(return_lse), options)
    returned = kind.give(result) if out is None else out
    return (returned, kind.give(lse)) if return_lse else returned
