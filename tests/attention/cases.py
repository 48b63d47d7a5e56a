"""A test case of the public attention functions: how its inputs are made, called on a device and held to the oracle."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy
import numpy as np

import cuflash
from cuflash.masks import Mask
from cuflash.masks.steps import Place
from cuflash.plan.config import ELEMENT_BYTES, ForwardConfig
from tests import oracle, tolerances

NARROW_DTYPES = ("float16", "bfloat16")
WIDE_DTYPES = ("float32", "float64")


class Layout(NamedTuple):
    """How an array (batch, seqlen, heads, dim) lies in a larger buffer that holds NaN everywhere else."""

    shape: Callable[[int, int, int, int], tuple[int, ...]]  # of the buffer
    view: Callable[[Any], Any]  # of the array in the buffer, by basic indexing that every array module knows


LAYOUTS = {
    "dense": Layout(lambda b, s, h, d: (b, s, h, d), lambda x: x),
    "heads_first": Layout(lambda b, s, h, d: (b, h, s, d), lambda x: x.transpose(0, 2, 1, 3)),
    "tokens_first": Layout(lambda b, s, h, d: (s, b, h, d), lambda x: x.transpose(1, 0, 2, 3)),
    "interleaved": Layout(lambda b, s, h, d: (b, s, 3, h, d), lambda x: x[:, :, 1]),
    "interleaved_heads": Layout(lambda b, s, h, d: (b, s, h, 3, d), lambda x: x[:, :, :, 2]),
    "every_other_token": Layout(lambda b, s, h, d: (b, 2 * s, h, d), lambda x: x[:, ::2]),
    "every_third_head": Layout(lambda b, s, h, d: (b, s, 3 * h, d), lambda x: x[:, :, 1::3]),
    "every_other_batch": Layout(lambda b, s, h, d: (2 * b, s, h, d), lambda x: x[1::2]),
    "reversed_tokens": Layout(lambda b, s, h, d: (b, s, h, d), lambda x: x[:, ::-1]),
    "offset_1": Layout(lambda b, s, h, d: (b, s, h, d + 1), lambda x: x[..., 1:]),
    "offset_2": Layout(lambda b, s, h, d: (b, s, h, d + 2), lambda x: x[..., 2:]),
    "offset_4": Layout(lambda b, s, h, d: (b, s, h, d + 4), lambda x: x[..., 4:]),
    "padded_rows": Layout(lambda b, s, h, d: (b, s, h, d + 24), lambda x: x[..., 8:-16]),
    "page": Layout(lambda b, s, h, d: (b, s + 9, h + 1, d + 8), lambda x: x[:, 5:-4, 1:, :-8]),
}


def embed(layout: Layout, array: np.ndarray) -> np.ndarray:
    """A buffer of NaN in which `layout.view` finds `array`."""
    buffer = np.full(layout.shape(*array.shape), np.nan, array.dtype)
    layout.view(buffer)[...] = array
    return buffer


@dataclass(frozen=True)
class Case:
    """One call. Lengths, heads and dims as in `cuflash.attention`; packed if `sequences` lists (seqlen_q, seqlen_k)."""

    dtype: str = "float16"
    seqlen_q: int = 33
    seqlen_k: int = 65
    head_dim: int = 64
    head_dim_v: int = 64
    batch: int = 2
    num_heads: int = 2
    num_kv_heads: int = 1
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    mask: Mask | None = None
    softcap: float | None = None
    scale: float | None = None
    bias: str = ""  # right-aligned with "bhqk"; a dot is an axis of one: "b..k" is (batch, 1, 1, seqlen_k)
    bias_dtype: str = "float32"
    values: str = "normal"  # a key of VALUES
    bias_values: str = "normal"  # a key of BIAS_VALUES
    layout: str = "dense"
    options: cuflash.Options | None = None
    sequences: tuple[tuple[int, int], ...] | None = None
    tail: tuple[int, int] = (0, 0)  # tokens of q and of k, v behind the last sequence, NaN

    @property
    def packed(self) -> bool:
        return self.sequences is not None

    def __str__(self) -> str:
        """The fields that differ from the default, for test ids."""
        default, parts = Case(), [f"{self.seqlen_q}x{self.seqlen_k}", f"h{self.num_heads}:{self.num_kv_heads}"]
        if self.sequences is not None:
            parts[0] = (
                "packed" + ",".join(f"{q}x{k}" for q, k in self.sequences) + (f"+{self.tail}" if any(self.tail) else "")
            )
        parts.insert(0, f"{self.dtype}-d{self.head_dim}" + (f":{self.head_dim_v}" * (self.head_dim != self.head_dim_v)))
        if self.window is not None:
            parts.append("w" + "..".join("" if x is None else str(x) for x in self.window))
        parts += ["causal"] * self.causal
        if self.mask is not None:
            parts.append(repr(self.mask))
        if self.bias:
            parts.append(f"bias[{self.bias}]{self.bias_dtype}")
        for field in ("batch", "softcap", "scale", "values", "bias_values", "layout"):
            if getattr(self, field) != getattr(default, field):
                parts.append(f"{field}={getattr(self, field)}")
        if self.options is not None and self.options.num_splits is not None:
            parts.append(f"splits={self.options.num_splits}")
        return "-".join(parts)

    def but(self, **changes: Any) -> Case:
        return replace(self, **changes)

    def of_lengths(self, seqlen_q: int, seqlen_k: int) -> Case:
        return replace(self, seqlen_q=seqlen_q, seqlen_k=seqlen_k)


def tiled(case: Case, num_splits: int = 1, **tile: Any) -> Case:
    """The case with an explicit tile configuration; `tile` has the fields that differ from a plain one."""
    element = ELEMENT_BYTES[case.dtype]
    fields: dict[str, Any] = {
        "dtype": case.dtype, "bias_dtype": case.bias_dtype if case.bias else "none",
        "head_dim": case.head_dim, "head_dim_v": case.head_dim_v, "block_m": 64, "block_n": 32,
        "block_dv": -(-case.head_dim_v // 16) * 16, "num_warps": 4, "num_stages": 2, "q_in_registers": False,
        "load_bytes": 16, "store_bytes": 16 if num_splits == 1 else max(8, 2 * element),
        "windowed": case.mask is None and (case.causal or case.window is not None),
        "softcapped": case.softcap is not None, "varlen": case.packed, "split": num_splits > 1,
    }  # fmt: skip
    precision = "tf32" if tile.get("dtype") == "tf32" else None
    config = ForwardConfig(**fields | tile)
    return case.but(options=cuflash.Options(num_splits=num_splits, config=config, precision=precision))


class Inputs(NamedTuple):
    """NumPy arrays: (batch, seqlen, heads, dim), packed: (tokens, heads, dim)."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    bias: np.ndarray | None
    cu_seqlens_q: np.ndarray | None
    cu_seqlens_k: np.ndarray | None


def _scores_of(size: float) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """Scales q so that the largest score is about `size`."""

    def change(q: np.ndarray, k: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return q * (size / (3 * max(1, q.shape[-1]) ** 0.5)), k

    return change


def _outlier(q: np.ndarray, k: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One huge element in k, as in the activations of large models."""
    k = k.copy()
    if k.size:
        k.reshape(-1)[rng.integers(k.size)] = 3e3
    return q, k


VALUES: dict[str, Callable[..., tuple[np.ndarray, np.ndarray]]] = {
    "normal": lambda q, k, rng: (q, k),
    "zeros": lambda q, k, rng: (q * 0, k),
    "scores_1e2": _scores_of(1e2),
    "scores_1e4": _scores_of(1e4),
    "scores_negative": lambda q, k, rng: (np.abs(q) * 20 + 20, -np.abs(k) - 1),  # all of them under -88.7
    "scores_positive": lambda q, k, rng: (np.abs(q) * 20 + 20, np.abs(k) + 1),
    "outlier": _outlier,
}


def _infinite(axis: str) -> Callable[[np.ndarray, np.random.Generator], np.ndarray]:
    """-inf in a third of the elements, of the rows or of the columns, and always in the first."""

    def change(bias: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        shape = {
            "elements": bias.shape,
            "rows": (*bias.shape[:-1], 1),
            "keys": (1,) * (bias.ndim - 1) + bias.shape[-1:],
        }
        dropped = rng.random(shape[axis]) < 1 / 3
        dropped.reshape(-1)[:1] = True
        return np.where(dropped, -np.inf, bias)

    return change


BIAS_VALUES: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "normal": lambda bias, rng: bias,
    "large": lambda bias, rng: bias * 1e4,
    "inf_elements": _infinite("elements"),
    "inf_rows": _infinite("rows"),
    "inf_keys": _infinite("keys"),
    "inf_all": lambda bias, rng: np.full_like(bias, -np.inf),
    "lowest": lambda bias, rng: np.where(rng.random(bias.shape) < 0.5, -65504.0, bias),  # a mask as frameworks spell it
}


def make(case: Case) -> Inputs:
    """Inputs of a case, the same ones at every call."""
    rng = np.random.default_rng(zlib.crc32(str(case).encode()))
    if case.sequences is None:
        batch, lengths, edges = case.batch, (case.seqlen_q, case.seqlen_k), (None, None)
    else:
        batch = 1
        edges = tuple(np.cumsum([0, *column]).astype(np.int32) for column in zip(*case.sequences, strict=True))
        lengths = tuple(int(e[-1]) + extra for e, extra in zip(edges, case.tail, strict=True))
    q = rng.standard_normal((batch, lengths[0], case.num_heads, case.head_dim))
    k = rng.standard_normal((batch, lengths[1], case.num_kv_heads, case.head_dim))
    v = rng.standard_normal((batch, lengths[1], case.num_kv_heads, case.head_dim_v))
    q, k = VALUES[case.values](q, k, rng)
    bias = None
    if case.bias:
        full = (len(case.sequences) if case.sequences else case.batch, case.num_heads, *_bias_lengths(case))
        shape = [1 if c == "." else size for c, size in zip(case.bias, full[-len(case.bias) :], strict=True)]
        bias = BIAS_VALUES[case.bias_values](rng.standard_normal(shape), rng).astype(case.bias_dtype)
    if case.packed:
        q, k, v = q[0], k[0], v[0]
        for array, edge in ((q, edges[0]), (k, edges[1]), (v, edges[1])):
            array[edge[-1] :] = np.nan
    return Inputs(q.astype(case.dtype), k.astype(case.dtype), v.astype(case.dtype), bias, *edges)


def _bias_lengths(case: Case) -> tuple[int, int]:
    if case.sequences is None:
        return case.seqlen_q, case.seqlen_k
    return max(q for q, _ in case.sequences), max(k for _, k in case.sequences)


def call(device: Any, case: Case, inputs: Inputs, **more: Any) -> tuple[np.ndarray, np.ndarray]:
    """(out, lse) of the case on the device, q, k and v lying in buffers as the case's layout says.

    Options are for kernels: the CPU takes none.
    """
    layout = LAYOUTS[case.layout]
    arrays = [x[None] if case.packed else x for x in inputs[:3]]
    buffers = [embed(layout, x) for x in arrays]
    keywords = {
        "causal": case.causal, "window": case.window, "mask": case.mask, "softcap": case.softcap, "scale": case.scale,
        "options": None if device.name == "cpu" else case.options, "return_lse": True,
    }  # fmt: skip
    if case.packed:
        keywords |= dict(zip(("max_seqlen_q", "max_seqlen_k"), _bias_lengths(case), strict=True))
    keywords |= {name: value for name, value in more.items() if not isinstance(value, np.ndarray)}

    def dense(q: Any, k: Any, v: Any, **arrays: Any) -> Any:
        return cuflash.attention(layout.view(q), layout.view(k), layout.view(v), **arrays, **keywords)

    def packed(q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, **arrays: Any) -> Any:
        views = (layout.view(x)[0] for x in (q, k, v))
        return cuflash.attention_varlen(*views, cu_seqlens_q, cu_seqlens_k, **arrays, **keywords)

    given = {name: value for name, value in ({"bias": inputs.bias} | more).items() if isinstance(value, np.ndarray)}
    if case.packed:
        return device.run(packed, *buffers, inputs.cu_seqlens_q, inputs.cu_seqlens_k, **given)
    return device.run(dense, *buffers, **given)


def expected(case: Case, inputs: Inputs, function: Callable[..., oracle.Result], **more: Any) -> oracle.Result:
    """What `function` (of the oracle) gives for the case; rows that belong to no sequence give 0 and -inf."""
    q, k, v, bias, q_edges, k_edges = inputs
    scale = case.scale if case.head_dim else 1.0  # any: there is nothing to scale
    keywords = {"causal": case.causal, "window": case.window, "softcap": case.softcap, "scale": scale, **more}
    if case.sequences is None:
        return function(q, k, v, bias=bias, seen=seen(case), **keywords)
    out = np.zeros((*q.shape[:2], v.shape[2]))
    lse = np.full((q.shape[1], q.shape[0]), -np.inf)
    full = None
    if bias is not None:
        full = np.broadcast_to(bias, (len(case.sequences), case.num_heads, *_bias_lengths(case)))
    for i, (len_q, len_k) in enumerate(case.sequences):
        rows, columns = slice(q_edges[i], q_edges[i] + len_q), slice(k_edges[i], k_edges[i] + len_k)
        own = None if full is None else full[i : i + 1, :, :len_q, :len_k]
        shown = seen(case, i)
        out[rows], lse[:, rows] = function(q[rows], k[columns], v[columns], bias=own, seen=shown, **keywords)
    return oracle.Result(out, lse)


def seen(case: Case, sequence: int = 0) -> np.ndarray | None:
    """Pairs that the mask shows, bool, broadcasts to (batch, num_heads, seqlen_q, seqlen_k); packed: of a sequence."""
    if case.mask is None:
        return None
    batch = np.arange(case.batch)[:, None, None, None]
    lengths, starts = (case.seqlen_q, case.seqlen_k), (0, 0)
    if case.sequences is not None:
        batch, lengths = np.full((1, 1, 1, 1), sequence), case.sequences[sequence]
        starts = tuple(sum(pair[i] for pair in case.sequences[:sequence]) for i in range(2))
    heads = np.arange(case.num_heads)[:, None, None]
    place = Place(*lengths, batch, heads, heads // (case.num_heads // case.num_kv_heads), *starts)
    return case.mask.program.visible(place.indices(np.arange(lengths[0])[:, None], np.arange(lengths[1])))


def hold_to_oracle(case: Case, inputs: Inputs, out: np.ndarray, lse: np.ndarray | None) -> None:
    """Asserts shapes, dtypes and values of a result."""
    lse_dtype = tolerances.lse_dtype(case.dtype)
    assert out.dtype == np.dtype(case.dtype)
    want = expected(case, inputs, oracle.attention)
    in_dtype = expected(case, inputs, oracle.standard)
    ulps = tolerances.TOLERANCES[case.dtype].out_ulps
    if case.dtype in WIDE_DTYPES:
        # A score s errs by some ulps of itself, so its exponential by |s| times as many: by one where it is rounded,
        # and sqrt(D)/8 as the sum of D products of one sign, which a BLAS may form in one chain. float64 is compared
        # with float64, whose sums have another order.
        of_score = 4 if case.dtype == "float64" else max(1, case.head_dim**0.5 / 8)
        ulps += of_score * np.abs(want.lse[np.isfinite(want.lse)]).max(initial=0)
    tolerances.assert_within("out", out, want.out, in_dtype.out, case.dtype, ulps)
    if lse is not None:
        assert lse.dtype == lse_dtype
        in_lse_dtype = expected(case, inputs, oracle.standard, dtype=lse_dtype)
        ulps = tolerances.TOLERANCES[case.dtype].of_lse(case.head_dim)
        tolerances.assert_within("lse", lse, want.lse, in_lse_dtype.lse, lse_dtype, ulps)


def check(device: Any, case: Case) -> None:
    """The case on the device is as exact as standard attention in its dtype, out and lse."""
    inputs = make(case)
    out, lse = call(device, case, inputs)
    hold_to_oracle(case, inputs, out, lse)
