"""Bytes and operations of attention algorithms, by problem and configuration.

Three algorithms, each as a `Cost`:

- `standard`: three array operations that keep the scores S and the weights P in memory, Θ(N·d + N²) bytes.
- `chunked`: Rabe & Staats 2021, the same operations on chunks: O(√N) memory, but still Θ(N²) bytes.
- `flash_forward`: the kernels of this package, Θ(N²·d²/M) bytes for an on-chip memory of M (Dao et al. 2022).

`flash_forward` is exact: a test compares it with the bytes that the emulated device counts, array by array.
`compare` is the way in for those who have shapes rather than a problem and a plan.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

from cuflash import check
from cuflash.errors import InvalidDtypeError, InvalidShapeError, InvalidValueError
from cuflash.layout import ALIGNMENT, Layout, contiguous_strides
from cuflash.options import Options
from cuflash.plan.arch import Arch, arch_named
from cuflash.plan.config import ForwardConfig, round_up
from cuflash.plan.forward import ForwardPlan, plan_forward
from cuflash.plan.gpus import Gpu
from cuflash.plan.traffic import forward_traffic, query_tiles
from cuflash.problem import Problem

DTYPE_BYTES = {name: dtype.itemsize for dtype, name in check.DTYPE_NAMES.items()}
STATE_BYTES = 4  # a float32 partial output, sum or maximum


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
    exponentials : int
        Special-function operations: exponentials, with a softcap also those of its tanh.
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
            special=self.exponentials / gpu.special_rate,
        )


def standard(
    problem: Problem,
    *,
    cu_seqlens_q: Sequence[int] | None = None,
    cu_seqlens_k: Sequence[int] | None = None,
    return_lse: bool = False,
) -> Cost:
    """Standard attention: S = τQKᵀ, P = softmax(S), O = PV, each operand of each operation once through memory.

    S and P have the dtype of the inputs; masks come from indices and cost nothing; a bias is read once per score.
    """
    b = _Sizes(problem, cu_seqlens_q, cu_seqlens_k)
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
    cu_seqlens_q: Sequence[int] | None = None,
    cu_seqlens_k: Sequence[int] | None = None,
    return_lse: bool = False,
) -> Cost:
    """Rabe & Staats 2021, "Self-attention does not need O(n²) memory", as array operations on chunks.

    Every chunk of queries meets every chunk of keys; a meeting leaves a summary (P·V, Σ P, max) in float32, and the
    summaries of a query chunk are merged once all are there. Scores of a chunk go through memory as in `standard`.
    """
    for name, chunk in (("query_chunk", query_chunk), ("key_chunk", key_chunk)):
        if chunk < 1:
            raise InvalidValueError(f"{name} = {chunk}: must be >= 1")
    b = _Sizes(problem, cu_seqlens_q, cu_seqlens_k)
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


def flash_forward(
    problem: Problem,
    plan: ForwardPlan,
    *,
    cu_seqlens_q: Sequence[int] | None = None,
    cu_seqlens_k: Sequence[int] | None = None,
    return_lse: bool = False,
    bias_elements: int | None = None,
) -> Cost:
    """The launches of a plan, exactly as the kernels load and store; tiles that the mask hides are not visited.

    `bias_elements` is the number of elements that the bias has, which `dram_bytes` counts once; by default one per
    visible (query, key) pair.
    """
    seqlens = sequence_lengths(problem, cu_seqlens_q, cu_seqlens_k)
    packing = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    read: Counter[str] = Counter()
    written: Counter[str] = Counter()
    for launch in forward_traffic(problem, plan, return_lse=return_lse, **packing):
        read.update(launch.read)
        written.update(launch.written)
    partial = sum(written[name] for name in ("o_partial", "lse_partial"))
    once = compulsory_bytes(problem, return_lse=return_lse, bias_elements=bias_elements, **packing)
    config = cast(ForwardConfig, plan.forward.config)
    visits = tile_visits(problem, config, seqlens)
    tile = config.block_m * config.block_n
    return Cost(
        read=dict(read),
        written=dict(written),
        dram_bytes=once + 2 * partial,
        matmul_flops=2 * visits * tile * (round_up(config.head_dim, 16) + config.block_dv),
        # The four lanes of a row each compute its rescaling factor; tanh takes an exponential and a reciprocal.
        exponentials=visits * (tile * (3 if config.softcapped else 1) + 4 * config.block_m),
        workspace_bytes=partial,
        useful_flops=useful_flops(problem, **packing),
    )


def tile_visits(problem: Problem, config: ForwardConfig, seqlens: Sequence[tuple[int, int]]) -> int:
    """How many (query tile, key tile) pairs the kernel computes, over heads and chunks of output columns."""
    visits = sum(
        count * tile.key_tiles
        for lengths, count in Counter(seqlens).items()
        for tile in query_tiles(problem, config, *lengths)
    )
    return visits * problem.num_heads * -(-config.head_dim_v // config.block_dv)


class _Sizes:
    """Bytes of a problem's arrays and counts of its scores, over all sequences and heads."""

    def __init__(
        self, problem: Problem, cu_seqlens_q: Sequence[int] | None, cu_seqlens_k: Sequence[int] | None
    ) -> None:
        self.problem = problem
        self.seqlens = sequence_lengths(problem, cu_seqlens_q, cu_seqlens_k)
        self.element = DTYPE_BYTES[problem.dtype]
        tokens_q = sum(n for n, _ in self.seqlens)
        tokens_k = sum(m for _, m in self.seqlens)
        self.rows = tokens_q * problem.num_heads
        self.q = self.rows * problem.head_dim * self.element
        self.o = self.rows * problem.head_dim_v * self.element
        self.k = tokens_k * problem.num_kv_heads * problem.head_dim * self.element
        self.v = tokens_k * problem.num_kv_heads * problem.head_dim_v * self.element
        self.scores = problem.num_heads * sum(n * m for n, m in self.seqlens)

    def area(self) -> int:
        """Visible (query, key) pairs."""
        counts = Counter(self.seqlens)
        return self.problem.num_heads * sum(c * self.problem.visible_pairs(*pair) for pair, c in counts.items())

    def visible_keys(self) -> int:
        """Keys of all sequences that at least one query sees."""
        ranges = (self.problem.key_range(0, n, n, m) for n, m in self.seqlens if n)
        return sum(max(0, end - begin) for begin, end in ranges)

    def cost(self, read: dict[str, int], written: dict[str, int], workspace_bytes: int) -> Cost:
        """The cost of an algorithm that computes every score, hidden or not, and keeps them in memory."""
        return Cost(
            read=read,
            written=written,
            dram_bytes=sum(read.values()) + sum(written.values()),
            matmul_flops=2 * self.scores * (self.problem.head_dim + self.problem.head_dim_v),
            exponentials=self.scores * (2 if self.problem.softcap else 1),
            workspace_bytes=workspace_bytes,
            useful_flops=2 * self.area() * (self.problem.head_dim + self.problem.head_dim_v),
        )


def sequence_lengths(
    problem: Problem, cu_seqlens_q: Sequence[int] | None = None, cu_seqlens_k: Sequence[int] | None = None
) -> list[tuple[int, int]]:
    """(queries, keys) of every sequence: the batch of a dense problem, differences of cu_seqlens of a packed one."""
    if not problem.varlen:
        return [(problem.seqlen_q, problem.seqlen_k)] * problem.batch
    lengths = []
    for name, ends in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if ends is None or len(ends) != problem.batch + 1:
            raise InvalidValueError(f"{name} = {ends}: must list the {problem.batch + 1} ends of packed sequences")
        lengths.append([int(end) - int(begin) for begin, end in pairwise(ends)])
    return list(zip(*lengths, strict=True))


def useful_flops(
    problem: Problem, *, cu_seqlens_q: Sequence[int] | None = None, cu_seqlens_k: Sequence[int] | None = None
) -> int:
    """2·area·(head_dim + head_dim_v), area the visible (query, key) pairs over batch and heads."""
    area = _Sizes(problem, cu_seqlens_q, cu_seqlens_k).area()
    return 2 * area * (problem.head_dim + problem.head_dim_v)


def compulsory_bytes(
    problem: Problem,
    *,
    cu_seqlens_q: Sequence[int] | None = None,
    cu_seqlens_k: Sequence[int] | None = None,
    return_lse: bool = False,
    bias_elements: int | None = None,
) -> int:
    """Bytes that any algorithm moves: every visible key, value and query read once, every output written once.

    `bias_elements` is the number of elements that the bias has; by default one per visible (query, key) pair.
    """
    b = _Sizes(problem, cu_seqlens_q, cu_seqlens_k)
    per_key = problem.num_kv_heads * (problem.head_dim + problem.head_dim_v) * b.element
    total = b.q + b.o + b.visible_keys() * per_key + (b.rows * STATE_BYTES if return_lse else 0)
    if problem.bias_dtype:
        area = b.area()
        total += DTYPE_BYTES[problem.bias_dtype] * (area if bias_elements is None else min(area, bias_elements))
    return total


def compare(
    q_shape: Sequence[int],
    k_shape: Sequence[int] | None = None,
    v_shape: Sequence[int] | None = None,
    *,
    dtype: str = "bfloat16",
    causal: bool = False,
    window: Sequence[int | None] | None = None,
    bias_shape: Sequence[int] | None = None,
    bias_dtype: str | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    arch: str = "sm_80",
    options: Options | None = None,
) -> dict[str, Cost]:
    """Costs of one `cuflash.attention` call by algorithm: "standard", "chunked" and "flash".

    Parameters
    ----------
    q_shape, k_shape, v_shape : sequence of int
        Shapes as `cuflash.attention` takes them; k as q and v as k where left out.
    dtype : str
        Of q, k and v: "float16" or "bfloat16".
    bias_shape, bias_dtype : optional
        Of a bias that broadcasts to (batch, num_heads, seqlen_q, seqlen_k); its dtype is that of q where left out.
    arch : str
        Architecture that the kernels are chosen for, such as "sm_80".
    options : Options, optional
        As `cuflash.attention` takes them.

    Raises
    ------
    InvalidValueError, InvalidTypeError
        As `cuflash.attention` raises for arrays of these shapes and dtypes.
    """
    problem = problem_of_shapes(
        q_shape,
        k_shape,
        v_shape,
        dtype=dtype,
        causal=causal,
        window=window,
        softcap=softcap,
        bias_shape=bias_shape,
        bias_dtype=bias_dtype,
    )
    known = arch_named(arch)
    check.check_kernel_limits(problem, known)
    return costs(problem, plan_contiguous(problem, known, options), return_lse=return_lse, bias_shape=bias_shape)


def plan_contiguous(
    problem: Problem, arch: Arch, options: Options | None = None, sm_count: int | None = None
) -> ForwardPlan:
    """The plan for C-contiguous arrays, whose rows are aligned as their length lets them be."""
    rows = problem.batch, problem.seqlen_q, problem.num_heads
    if 0 in rows:
        raise InvalidShapeError(f"batch, seqlen_q, num_heads = {rows}: must be >= 1 each for a kernel to run")
    row, row_v = (size * DTYPE_BYTES[problem.dtype] for size in (problem.head_dim, problem.head_dim_v))
    return plan_forward(
        problem,
        arch,
        load_bytes=math.gcd(ALIGNMENT, row, row_v),
        store_bytes=math.gcd(ALIGNMENT, row_v),
        options=options,
        sm_count=sm_count,
    )


def costs(
    problem: Problem, plan: ForwardPlan, *, return_lse: bool = False, bias_shape: Sequence[int] | None = None
) -> dict[str, Cost]:
    """Costs of a dense problem by algorithm: "standard", "chunked" and "flash", the launches of `plan`."""
    elements = None if bias_shape is None else math.prod(bias_shape)
    return {
        "standard": standard(problem, return_lse=return_lse),
        "chunked": chunked(problem, return_lse=return_lse),
        "flash": flash_forward(problem, plan, return_lse=return_lse, bias_elements=elements),
    }


def problem_of_shapes(
    q_shape: Sequence[int],
    k_shape: Sequence[int] | None = None,
    v_shape: Sequence[int] | None = None,
    *,
    dtype: str = "bfloat16",
    causal: bool = False,
    window: Sequence[int | None] | None = None,
    softcap: float | None = None,
    bias_shape: Sequence[int] | None = None,
    bias_dtype: str | None = None,
) -> Problem:
    """The problem that contiguous arrays of these shapes pose; parameters and errors as `compare`."""
    k_shape = q_shape if k_shape is None else k_shape
    v_shape = k_shape if v_shape is None else v_shape
    bias = None if bias_shape is None else _layout("bias", bias_shape, bias_dtype or dtype)
    q, k, v = (_layout(n, shape, dtype) for n, shape in (("q", q_shape), ("k", k_shape), ("v", v_shape)))
    return check.problem(q, k, v, bias, check.scores(causal, window, None, softcap), None)


def _layout(name: str, shape: Sequence[int], dtype: str) -> Layout:
    known = {text: kind for kind, text in check.DTYPE_NAMES.items()}
    if dtype not in known:
        raise InvalidDtypeError(f"{name}.dtype = {dtype!r}: must be one of {', '.join(known)}")
    sizes = tuple(check.whole_number(f"{name}_shape[{i}]", size) for i, size in enumerate(shape))
    return Layout(sizes, contiguous_strides(sizes, known[dtype].itemsize), known[dtype], 0)
