"""Bytes and operations of attention algorithms, by problem and configuration.

Three algorithms, each as a `Cost`:

- `standard`: three array operations that keep the scores S and the weights P in memory, Θ(N·d + N²) bytes.
- `chunked`: Rabe & Staats 2021, the same operations on chunks: O(√N) memory, but still Θ(N²) bytes.
- `flash_forward`: the kernels of this package, Θ(N²·d²/M) bytes for an on-chip memory of M (Dao et al. 2022).

`flash_forward` is exact: a test compares it with the bytes that the emulated device counts, array by array.
`compare` is the way in for those who have shapes rather than a problem and a plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cuflash.errors import InvalidValueError
from cuflash.plan.gpus import Gpu
from cuflash.problem import Problem

DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
STATE_BYTES = 4  # a float32 partial output, sum or maximum

SeqLens = Sequence[tuple[int, int]]  # (queries, keys) of every sequence of a packed problem


@dataclass(frozen=True)
class Roofline:
    """Least seconds that each part of a GPU needs for a cost; the slowest part bounds the whole."""

    memory: float
    matmul: float
    special: float

    @property
    def seconds(self) -> float:
        return max(self.memory, self.matmul, self.special)

    @property
    def bound(self) -> str:
        """What the time is bound by: "memory", "matmul" or "special" (exponentials)."""
        return max(("memory", "matmul", "special"), key=lambda part: getattr(self, part))


@dataclass(frozen=True)
class Cost:
    """What an algorithm moves and computes for one problem.

    Parameters
    ----------
    read, written : mapping of str to int
        Bytes that the kernels ask of global memory, by array.
    dram_bytes : int
        Bytes that must cross the memory bus where the L2 cache serves every repeated read of an input; intermediate
        arrays of Θ(N²) are taken to exceed it.
    matmul_flops : int
        Operations of the matrix products as computed, hidden and padded elements of visited tiles included.
    exponentials, tanhs : int
        Special-function operations; tanh only with a softcap.
    workspace_bytes : int
        Memory that is live beyond inputs and outputs.
    useful_flops : int
        2·area·(head_dim + head_dim_v), area the number of visible (query, key) pairs over batch and heads: the count
        that published rates divide by their time.
    """

    read: Mapping[str, int]
    written: Mapping[str, int]
    dram_bytes: int
    matmul_flops: int
    exponentials: int
    tanhs: int
    workspace_bytes: int
    useful_flops: int

    @property
    def bytes_read(self) -> int:
        return sum(self.read.values())

    @property
    def bytes_written(self) -> int:
        return sum(self.written.values())

    @property
    def bytes(self) -> int:
        return self.bytes_read + self.bytes_written

    @property
    def intensity(self) -> float:
        """Useful operations per byte asked of global memory."""
        return self.useful_flops / self.bytes if self.bytes else 0.0

    def roofline(self, gpu: Gpu) -> Roofline:
        """The least time on `gpu`; no kernel of this algorithm can be faster."""
        return Roofline(
            memory=self.dram_bytes / gpu.bandwidth,
            matmul=self.matmul_flops / gpu.matmul_rate,
            special=(self.exponentials + self.tanhs) / gpu.special_rate,
        )


def standard(problem: Problem, *, seqlens: SeqLens | None = None, return_lse: bool = False) -> Cost:
    """Standard attention: S = τQKᵀ, P = softmax(S), O = PV, each operand of each operation once through memory.

    S and P have the dtype of the inputs; masks come from indices and cost nothing; a bias is read once per score.
    """
    b = _Sizes(problem, seqlens)
    read = {"q": b.q, "k": b.k, "v": b.v, "scores": b.scores * b.element, "weights": b.scores * b.element}
    written = {"scores": b.scores * b.element, "weights": b.scores * b.element, "o": b.o}
    if problem.bias_dtype:
        read["bias"] = b.scores * DTYPE_BYTES[problem.bias_dtype]
    if return_lse:
        written["lse"] = b.rows * STATE_BYTES
    return b.cost(read, written, workspace_bytes=2 * b.scores * b.element)


def chunked(
    problem: Problem,
    query_chunk: int = 1024,
    key_chunk: int = 4096,
    *,
    seqlens: SeqLens | None = None,
    return_lse: bool = False,
) -> Cost:
    """Rabe & Staats 2021, "Self-attention does not need O(n²) memory", as array operations on chunks.

    Every chunk of queries meets every chunk of keys; a meeting leaves a summary (P·V, Σ P, max) in float32, and the
    summaries of a query chunk are merged once all are there. Scores of a chunk go through memory as in `standard`.
    """
    for name, chunk in (("query_chunk", query_chunk), ("key_chunk", key_chunk)):
        if chunk < 1:
            raise InvalidValueError(f"{name} = {chunk}: must be >= 1")
    b = _Sizes(problem, seqlens)
    state = (problem.head_dim_v + 2) * STATE_BYTES
    q_passes = sum(n * -(-m // key_chunk) for n, m in b.seqlens)  # query rows times the key chunks that they meet
    k_passes = sum(m * -(-n // query_chunk) for n, m in b.seqlens)
    summaries = problem.num_heads * q_passes * state
    read = {
        "q": problem.num_heads * q_passes * problem.head_dim * b.element,
        "k": problem.num_kv_heads * k_passes * problem.head_dim * b.element,
        "v": problem.num_kv_heads * k_passes * problem.head_dim_v * b.element,
        "scores": b.scores * b.element,
        "weights": b.scores * b.element,
        "summaries": summaries,
    }
    written = {"scores": b.scores * b.element, "weights": b.scores * b.element, "summaries": summaries, "o": b.o}
    if problem.bias_dtype:
        read["bias"] = b.scores * DTYPE_BYTES[problem.bias_dtype]
    if return_lse:
        written["lse"] = b.rows * STATE_BYTES
    live = sum(
        2 * min(n, query_chunk) * min(m, key_chunk) * b.element + min(n, query_chunk) * -(-m // key_chunk) * state
        for n, m in b.seqlens
    )
    return b.cost(read, written, workspace_bytes=problem.num_heads * live)


class _Sizes:
    """Bytes of a problem's arrays and counts of its scores, over all sequences and heads."""

    def __init__(self, problem: Problem, seqlens: SeqLens | None) -> None:
        self.problem = problem
        self.seqlens = sequence_lengths(problem, seqlens)
        self.element = DTYPE_BYTES[problem.dtype]
        tokens_q = sum(n for n, _ in self.seqlens)
        tokens_k = sum(m for _, m in self.seqlens)
        self.rows = tokens_q * problem.num_heads
        self.q = self.rows * problem.head_dim * self.element
        self.o = self.rows * problem.head_dim_v * self.element
        self.k = tokens_k * problem.num_kv_heads * problem.head_dim * self.element
        self.v = tokens_k * problem.num_kv_heads * problem.head_dim_v * self.element
        self.scores = problem.num_heads * sum(n * m for n, m in self.seqlens)

    def cost(self, read: dict[str, int], written: dict[str, int], workspace_bytes: int) -> Cost:
        """The cost of an algorithm that computes every score, hidden or not, and keeps them in memory."""
        return Cost(
            read=read,
            written=written,
            dram_bytes=sum(read.values()) + sum(written.values()),
            matmul_flops=2 * self.scores * (self.problem.head_dim + self.problem.head_dim_v),
            exponentials=self.scores,
            tanhs=self.scores if self.problem.softcap else 0,
            workspace_bytes=workspace_bytes,
            useful_flops=useful_flops(self.problem, self.seqlens),
        )


def sequence_lengths(problem: Problem, seqlens: SeqLens | None) -> list[tuple[int, int]]:
    """(queries, keys) of every sequence: the batch of a dense problem, `seqlens` of a packed one."""
    if not problem.varlen:
        return [(problem.seqlen_q, problem.seqlen_k)] * problem.batch
    if seqlens is None or len(seqlens) != problem.batch:
        raise InvalidValueError(f"seqlens = {seqlens}: must list the lengths of {problem.batch} packed sequences")
    return list(seqlens)


def useful_flops(problem: Problem, seqlens: SeqLens | None = None) -> int:
    """2·area·(head_dim + head_dim_v) over batch and heads, area the visible (query, key) pairs."""
    area = sum(problem.visible_pairs(n, m) for n, m in sequence_lengths(problem, seqlens))
    return 2 * problem.num_heads * area * (problem.head_dim + problem.head_dim_v)


def compulsory_bytes(
    problem: Problem, *, seqlens: SeqLens | None = None, return_lse: bool = False, bias_elements: int | None = None
) -> int:
    """Bytes that any algorithm moves: every visible key, value and query read once, every output written once.

    `bias_elements` is the number of elements that the bias has; by default one per visible (query, key) pair.
    """
    b = _Sizes(problem, seqlens)
    visible = 0  # keys that at least one query of their sequence sees
    for n, m in b.seqlens:
        begin, end = problem.key_range(0, n, n, m)
        visible += max(0, end - begin) if n else 0
    per_key = problem.num_kv_heads * (problem.head_dim + problem.head_dim_v) * b.element
    total = b.q + b.o + visible * per_key + (b.rows * STATE_BYTES if return_lse else 0)
    if problem.bias_dtype:
        area = problem.num_heads * sum(problem.visible_pairs(n, m) for n, m in b.seqlens)
        total += DTYPE_BYTES[problem.bias_dtype] * (area if bias_elements is None else min(area, bias_elements))
    return total
