"""Cases of SCFA: inputs, who sees whom from the definition, and results held to the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy
import numpy as np

import cuflash
from cuflash import sparse
from tests import oracle, tolerances


@dataclass(frozen=True)
class Case:
    """One call of `hash_sparse_attention` (buckets > 0) or of `qk_sparse_attention`."""

    dtype: str = "float16"
    batch: int = 2
    seqlen_q: int = 70
    seqlen_k: int = 70
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    head_dim_v: int = 32
    buckets: int = 0
    skew: float = 0.0  # 0: buckets are equally likely; else the share of each is this much smaller than the last one's
    hash_dtype: str = "int32"
    include_self: bool = True
    keep_q: float = 0.5  # shares of tokens that are kept
    keep_k: float = 0.5
    softcap: float | None = None
    scale: float | None = None

    def but(self, **changes: Any) -> Case:
        return replace(self, **changes)

    def of_length(self, length: int) -> Case:
        return replace(self, seqlen_q=length, seqlen_k=length)

    def __str__(self) -> str:
        default = Case()
        fields = (name for name in self.__dataclass_fields__ if getattr(self, name) != getattr(default, name))
        return "-".join(f"{name}={getattr(self, name)}" for name in fields) or "default"

    @property
    def function(self) -> Callable[..., Any]:
        return sparse.hash_sparse_attention if self.buckets else sparse.qk_sparse_attention

    @property
    def keywords(self) -> dict[str, Any]:
        own = {"include_self": self.include_self} if self.buckets else {}
        return own | {"softcap": self.softcap, "scale": self.scale}


@dataclass
class Inputs:
    """Arrays of a call; the marks are hashes or truths."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    mark_q: np.ndarray
    mark_k: np.ndarray

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        return self.q, self.k, self.v, self.mark_q, self.mark_k


def make(case: Case, seed: int = 0) -> Inputs:
    rng = np.random.default_rng(seed)

    def values(length: int, heads: int, dim: int) -> np.ndarray:
        return rng.standard_normal((case.batch, length, heads, dim)).astype(case.dtype)

    q = values(case.seqlen_q, case.num_heads, case.head_dim)
    k = values(case.seqlen_k, case.num_kv_heads, case.head_dim)
    v = values(case.seqlen_k, case.num_kv_heads, case.head_dim_v)
    shares = (1 - case.skew) ** np.arange(case.buckets)
    marks = [
        rng.choice(case.buckets, x.shape[:-1], p=shares / shares.sum()).astype(case.hash_dtype)
        if case.buckets
        else rng.random(x.shape[:-1]) < share
        for x, share in ((q, case.keep_q), (k, case.keep_k))
    ]
    return Inputs(q, k, v, *marks)


def visible(inputs: Inputs, include_self: bool = True) -> np.ndarray:
    """bool (batch, num_heads, seqlen_q, seqlen_k), by the definition."""
    group = inputs.mark_q.shape[2] // max(1, inputs.mark_k.shape[2])
    mark_q = inputs.mark_q.transpose(0, 2, 1)[..., None]
    mark_k = np.repeat(inputs.mark_k, group, axis=2).transpose(0, 2, 1)[:, :, None]
    together = mark_q & mark_k if mark_q.dtype == np.bool_ else mark_q == mark_k
    seqlen_q, seqlen_k = inputs.q.shape[1], inputs.k.shape[1]
    q_idx, k_idx = np.arange(seqlen_q)[:, None] + (seqlen_k - seqlen_q), np.arange(seqlen_k)
    return together & (q_idx >= k_idx if include_self else q_idx > k_idx)


def check(device: Any, case: Case, seed: int = 0) -> None:
    """A call on a device against the oracle."""
    inputs = make(case, seed)
    out, lse = device.run(case.function, *inputs.arrays, return_lse=True, **case.keywords)
    hold(case, inputs, out, lse)


def hold(case: Case, inputs: Inputs, out: np.ndarray, lse: np.ndarray | None) -> None:
    seen = visible(inputs, case.include_self)
    keywords = {"softcap": case.softcap, "scale": case.scale}
    tolerances.assert_attention(out, lse, inputs.q, inputs.k, inputs.v, seen=seen, **keywords)
    nothing = ~seen.any(axis=3)
    assert not out.transpose(0, 2, 1, 3)[nothing].any()
    assert lse is None or np.isneginf(lse[nothing]).all()


def check_gradients(device: Any, case: Case, lse_too: bool = False, seed: int = 0) -> None:
    """A pullback on a device against the oracle."""
    inputs = make(case, seed)
    rng = np.random.default_rng(seed + 1)
    dout = rng.standard_normal((*inputs.q.shape[:-1], case.head_dim_v)).astype(case.dtype)
    lse_shape = (case.batch, case.num_heads, case.seqlen_q)
    dlse = rng.standard_normal(lse_shape).astype(tolerances.lse_dtype(case.dtype)) if lse_too else None

    def gradients(*arrays: Any, **keywords: Any) -> Any:
        *arrays, dout, dlse = arrays
        _, pullback = cuflash.vjp(case.function, *arrays, return_lse=lse_too, **keywords)
        return pullback((dout, dlse) if lse_too else dout)

    got = device.run(gradients, *inputs.arrays, dout, dlse, **case.keywords)
    seen = visible(inputs, case.include_self)
    keywords = {"seen": seen, "softcap": case.softcap, "scale": case.scale}
    arguments = (inputs.q, inputs.k, inputs.v, dout, dlse)
    want, standard = (f(*arguments, **keywords) for f in (oracle.gradients, oracle.standard_gradients))
    tolerances.assert_gradients(got, want, standard, case.dtype)
    group = case.num_heads // case.num_kv_heads
    unseen = ~seen.reshape(case.batch, case.num_kv_heads, group * case.seqlen_q, case.seqlen_k).any(axis=2)
    assert not got[0].transpose(0, 2, 1, 3)[~seen.any(axis=3)].any()
    for gradient in got[1:]:
        assert not gradient.transpose(0, 2, 1, 3)[unseen].any()
