"""Decoding over a paged cache: what is asked, arrays that hold it, who answers."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from benchmarks.cases import DTYPES

SAMPLES = 3  # sequences whose results are compared with float64
PERIOD = 1_000_003  # standard normal numbers that fill a cache again and again, to begin elsewhere in each row


@dataclass(frozen=True)
class DecodeCase:
    """One query for each of `batch` sequences of `length` tokens.

    skewed: of lengths as 1, 1/2, 1/3 ..., as many tokens in all. block_size 0: a sequence is one block, its keys and
    values contiguous.
    """

    batch: int
    length: int
    kv_heads: int
    group: int
    block_size: int
    skewed: bool = False
    head_dim: int = 128
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        blocks = f"blocks of {self.block_size}" if self.block_size else "contiguous"
        skewed = " skewed" if self.skewed else ""
        heads = f"H{self.num_heads}/{self.kv_heads}"
        return f"B{self.batch} S{self.length}{skewed} {heads} D{self.head_dim} {self.dtype} {blocks}"

    @property
    def num_heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def lengths(self) -> np.ndarray:
        if not self.skewed:
            return np.full(self.batch, self.length)
        shares = 1 / np.arange(1, self.batch + 1)
        ends = np.rint(np.cumsum(shares) / shares.sum() * self.batch * self.length).astype(np.int64)
        return np.diff(ends, prepend=0)

    @property
    def bytes(self) -> int:
        """Keys and values of live tokens, queries and outputs, each once."""
        element = DTYPES[self.dtype].itemsize
        tokens = int(self.lengths.sum())
        return 2 * element * self.head_dim * (tokens * self.kv_heads + self.batch * self.num_heads)


def parse_case(text: str) -> DecodeCase:
    """batch,length,kv_heads,group,block_size[,skewed]."""
    *numbers, last = text.split(",")
    skewed = last == "skewed"
    try:
        sizes = [int(number) for number in (numbers if skewed else [*numbers, last])]
    except ValueError:
        sizes = []
    if len(sizes) != 5 or min(sizes[:4]) < 1 or sizes[4] < 0:
        must = "batch,length,kv_heads,group,block_size[,skewed], each >= 1, block_size 0 for contiguous"
        raise argparse.ArgumentTypeError(f"{text!r}: must be {must}")
    return DecodeCase(*sizes, skewed=skewed)


class Arrays(NamedTuple):
    """Arguments of `paged_attention`, NumPy or CuPy; pages lie in random order."""

    q: Any
    k_cache: Any
    v_cache: Any
    block_tables: Any
    seq_lens: Any


def arrays(case: DecodeCase, xp: Any, seed: int) -> Arrays:
    """With the array module `xp`."""
    rng = np.random.default_rng(seed)
    lengths = case.lengths
    size = case.block_size or int(lengths.max())
    counts = -(-lengths // size)
    tables = np.zeros((case.batch, counts.max()), np.int32)
    tables[np.arange(tables.shape[1]) < counts[:, None]] = rng.permutation(int(counts.sum()))
    dtype = DTYPES[case.dtype]
    numbers = xp.asarray(rng.standard_normal(PERIOD, np.float32).astype(dtype))
    shape = (int(counts.sum()), size, case.kv_heads, case.head_dim)
    caches = [_filled(xp, shape, numbers) for _ in "kv"]
    q = xp.asarray(rng.standard_normal((case.batch, case.num_heads, case.head_dim), np.float32).astype(dtype))
    return Arrays(q, *caches, xp.asarray(tables), xp.asarray(lengths.astype(np.int32)))


def _filled(xp: Any, shape: tuple[int, ...], numbers: Any) -> Any:
    array = xp.empty(shape, numbers.dtype)
    flat = array.reshape(-1)
    for begin in range(0, flat.size, numbers.size):
        part = flat[begin : begin + numbers.size]
        part[...] = numbers[: part.size]
    return array


def error(case: DecodeCase, given: Arrays, out: np.ndarray) -> float:
    """Largest |out - exact| of some sequences, relative to the largest exact |o|."""
    size, worst, largest = given.k_cache.shape[1], 0.0, 0.0
    for b in np.unique(np.linspace(0, case.batch - 1, SAMPLES).astype(int)):
        length = int(case.lengths[b])
        blocks = given.block_tables[b, : -(-length // size)]
        q, k, v = (_on_host(x).astype(np.float64) for x in (given.q[b], given.k_cache[blocks], given.v_cache[blocks]))
        k, v = (x.reshape(-1, *x.shape[2:])[:length] for x in (k, v))
        scores = np.einsum("hgd,khd->hgk", q.reshape(case.kv_heads, case.group, -1), k) / np.sqrt(case.head_dim)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        exact = np.einsum("hgk,khd->hgd", weights / weights.sum(axis=-1, keepdims=True), v)
        got = out[b].astype(np.float64).reshape(exact.shape)
        worst, largest = max(worst, float(np.abs(got - exact).max())), max(largest, float(np.abs(exact).max()))
    return worst / largest


def _on_host(array: Any) -> np.ndarray:
    return array if isinstance(array, np.ndarray) else array.get()


@dataclass(frozen=True)
class Decoder:
    """`prepare(case, arrays)` returns what starts a call and gives its result, (batch, num_heads, head_dim)."""

    name: str
    version: str
    prepare: Callable[[DecodeCase, Arrays], Callable[[], Any]]
    torch: bool = False  # whether its results are torch's


def find(device: str) -> list[Decoder]:
    """Who can be imported for "cpu" or "cuda", cuflash first."""
    found = [Decoder("cuflash", "source tree", _cuflash)]
    if find_spec("torch"):
        found.append(Decoder("torch SDPA, gathered", version("torch"), _torch_gathered, torch=True))
    if device == "cuda" and find_spec("flash_attn"):
        found.append(Decoder("flash_attn", version("flash_attn"), _flash_attn, torch=True))
    if device == "cuda" and find_spec("flashinfer"):
        found.append(Decoder("flashinfer", version("flashinfer-python"), _flashinfer, torch=True))
    return found


def _cuflash(case: DecodeCase, given: Arrays) -> Callable[[], Any]:
    import cuflash

    return lambda: cuflash.paged_attention(*given)


def _torch_gathered(case: DecodeCase, given: Arrays) -> Callable[[], Any]:
    """Keys and values were brought together before: what a cache without blocks would hold."""
    import torch

    if case.skewed:
        raise ValueError("lengths differ: no dense array holds them")
    q = to_torch(given.q)[:, :, None]
    dense = [given_cache[given.block_tables] for given_cache in (given.k_cache, given.v_cache)]
    rows = [x.reshape(case.batch, -1, case.kv_heads, case.head_dim)[:, : case.length] for x in dense]
    k, v = (to_torch(x).transpose(1, 2) for x in rows)

    def call() -> Any:
        with torch.inference_mode():
            attend = torch.nn.functional.scaled_dot_product_attention
            return attend(q, k, v, enable_gqa=case.group > 1)[:, :, 0]

    return call


def _flash_attn(case: DecodeCase, given: Arrays) -> Callable[[], Any]:
    from flash_attn import flash_attn_with_kvcache

    q, k, v, tables, lengths = map(to_torch, given)
    return lambda: flash_attn_with_kvcache(
        q[:, None], k, v, cache_seqlens=lengths, block_table=tables, causal=True
    )[:, 0]  # fmt: skip


def _flashinfer(case: DecodeCase, given: Arrays) -> Callable[[], Any]:
    """Planned before, as for the layers of a model after the first."""
    import flashinfer
    import torch

    size = case.block_size or int(case.lengths.max())
    counts = -(-case.lengths // size)
    tables = _on_host(given.block_tables)
    ends = torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)).cuda()
    used = torch.from_numpy(tables[np.arange(tables.shape[1]) < counts[:, None]]).cuda()
    last = torch.from_numpy((case.lengths - (counts - 1) * size).astype(np.int32)).cuda()
    q, k, v = map(to_torch, given[:3])
    workspace = torch.zeros(128 << 20, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=case.group >= 4)
    wrapper.plan(
        ends, used, last, case.num_heads, case.kv_heads, case.head_dim, size, q_data_type=q.dtype, kv_data_type=k.dtype
    )  # fmt: skip
    return lambda: wrapper.run(q, (k, v))


def to_torch(array: Any) -> Any:
    """A view of a NumPy or CuPy array."""
    import torch

    if array.dtype.name == "bfloat16":  # neither DLPack nor torch.from_numpy takes it everywhere
        return torch.from_dlpack(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_dlpack(array)


def to_numpy(decoder: Decoder, out: Any) -> np.ndarray:
    return out.float().cpu().numpy() if decoder.torch else _on_host(out)
