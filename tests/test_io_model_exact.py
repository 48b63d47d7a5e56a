"""The cost model of flash forward against what the kernels do: bytes by array and matrix operations, to the last one.

The emulated device counts what the compiled kernels load and store; the model never sees a kernel run.
"""

from dataclasses import dataclass, field, replace
from itertools import product

import ml_dtypes
import numpy as np
import pytest

import cuflash
from cuflash import Options, io_model
from cuflash.plan.arch import arch_named
from cuflash.plan.config import ForwardConfig
from cuflash.plan.forward import plan_forward
from cuflash.problem import Problem

BF16 = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True)
class Case:
    """Shapes and keywords of one call of `attention`."""

    q: tuple[int, ...] = (1, 70, 2, 32)
    k: tuple[int, ...] | None = None
    v: tuple[int, ...] | None = None
    dtype: str = "bfloat16"
    bias: tuple[int, ...] | None = None
    bias_dtype: str = "float32"
    splits: int | None = None
    keywords: dict = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [self.dtype, f"q{self.q}", f"k{self.k}", f"v{self.v}", f"bias{self.bias}"]
        parts += [f"splits {self.splits}", self.keywords]
        return " ".join(str(part) for part in parts if "None" not in str(part) and part).replace(", ", ",")


MASKS = (
    {},
    {"causal": True},
    {"window": (13, 0)},
    {"window": (None, 7)},
    {"window": (5, None)},
    {"window": (0, 0)},
    {"window": (40, 3), "return_lse": True},
)
LENGTHS = ((1, 1), (1, 300), (300, 1), (64, 64), (65, 63), (127, 129), (257, 31), (31, 257), (5, 0))
HEAD_DIMS = ((1, 1), (8, 8), (17, 40), (64, 64), (72, 16), (80, 300), (128, 128), (256, 256), (512, 512))

CASES = (
    *(Case((2, n, 2, 40), (2, m, 1, 40), keywords=mask) for (n, m), mask in product(LENGTHS, MASKS)),
    *(Case((1, 70, 1, d), (1, 90, 1, d), (1, 90, 1, e)) for d, e in HEAD_DIMS),
    *(Case((1, 70, 2, d), dtype="float16", keywords={"causal": True, "return_lse": True}) for d in (3, 24, 100)),
    *(Case((1, 40, heads, 32), (1, 50, kv, 32)) for heads, kv in ((6, 6), (6, 3), (6, 2), (5, 1))),
    *(
        Case((2, 70, 2, 32), (2, 150, 2, 32), bias=bias, bias_dtype=dtype, keywords=mask)
        for bias, dtype, mask in (
            ((150,), "float32", {}),
            ((70, 1), "float16", {"causal": True}),
            ((1, 2, 1, 150), "bfloat16", {"window": (20, 4)}),
            ((2, 2, 70, 150), "float32", {"softcap": 5.0}),
            ((2, 1, 70, 150), "float16", {"window": (0, 60), "return_lse": True}),
        )
    ),
    *(
        Case((1, n, 2, d), (1, m, 1, d), splits=splits, keywords=mask)
        for n, m, d, splits, mask in (
            (1, 500, 64, 3, {}),
            (20, 500, 33, 4, {"causal": True, "return_lse": True}),
            (70, 300, 64, 2, {"window": (50, 10)}),
            (70, 20, 40, 7, {"return_lse": True}),
            (33, 90, 288, 2, {"causal": True}),
            (90, 33, 16, 3, {"causal": True}),
        )
    ),
    *(
        Case((1, n, 2, d), (1, m, 1, d), (1, m, 1, e), dtype, splits=splits, **more)
        for dtype in ("float32", "float64")
        for n, m, d, e, splits, more in (
            (70, 90, 64, 64, None, {"keywords": {"return_lse": True}}),
            (127, 129, 17, 41, None, {"keywords": {"causal": True}}),
            (40, 300, 80, 48, 3, {"keywords": {"window": (50, 10), "return_lse": True}}),
            (1, 500, 33, 3, 4, {}),
            (33, 70, 128, 300, None, {"bias": (33, 70), "bias_dtype": "float64"}),
            (300, 31, 256, 256, None, {"keywords": {"softcap": 5.0}}),
        )
    ),
    Case((70, 2, 32)),
    Case((70, 32), (50, 32)),
    Case((1, 40, 2, 64), keywords={"softcap": 20.0, "causal": True}),
)


def arrays(case):
    rng = np.random.default_rng(3)
    k = case.q if case.k is None else case.k
    shapes = {"q": case.q, "k": k, "v": k if case.v is None else case.v}
    dtype = BF16 if case.dtype == "bfloat16" else np.dtype(case.dtype)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes.values()]


def counted(launches):
    """Bytes by array over all launches, and operations of the matrix instructions."""
    read, written = {}, {}
    for launch in launches:
        for total, part in ((read, launch.read_by_array), (written, launch.written_by_array)):
            for name, count in part.items():
                total[name] = total.get(name, 0) + count
    return nonzero(read), nonzero(written), sum(launch.mma_flops for launch in launches)


def nonzero(counts):
    return {name: count for name, count in counts.items() if count}


def agree(launches, cost):
    read, written, flops = counted(launches)
    assert read == nonzero(cost.read)
    assert written == nonzero(cost.written)
    assert sum(launch.global_read for launch in launches) == cost.bytes_read
    assert sum(launch.global_written for launch in launches) == cost.bytes_written
    assert flops == cost.matmul_flops
    special = sum(launch.instructions.get("special", 0) for launch in launches)
    if len(launches) == 1:  # the model leaves out the last division and logarithm of each row
        assert cost.exponentials <= special


@pytest.mark.parametrize("case", CASES, ids=str)
def test_dense(case):
    options = None if case.splits is None else Options(num_splits=case.splits)
    keywords = dict(case.keywords)
    if case.bias is not None:
        kind = BF16 if case.bias_dtype == "bfloat16" else np.dtype(case.bias_dtype)
        keywords["bias"] = np.random.default_rng(4).standard_normal(case.bias).astype(kind)
    with cuflash.emulate("sm_80") as device:
        cuflash.attention(*arrays(case), **keywords, options=options)
    asked = {name: value for name, value in case.keywords.items() if name != "return_lse"}
    problem = io_model.problem_of_shapes(
        case.q, case.k, case.v, dtype=case.dtype, bias_shape=case.bias, bias_dtype=case.bias_dtype, **asked
    )
    plan = io_model.plan_contiguous(problem, arch_named("sm_80"), options)
    cost = io_model.flash_forward(problem, plan, return_lse=case.keywords.get("return_lse", False))
    assert len(device.launches) == (1 if plan.combine is None else 2)
    agree(device.launches, cost)


PACKED = (
    ([0, 70, 70, 200], [0, 40, 140, 270]),
    ([0, 5], [0, 300]),
    ([0, 1, 2, 3, 130], [0, 0, 64, 129, 400]),
    ([0, 128, 256], [0, 0, 128]),
)


@pytest.mark.parametrize("ends", PACKED, ids=str)
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("splits", [1, 3])
def test_packed(ends, mask, splits):
    ends_q, ends_k = ends
    rng = np.random.default_rng(5)
    q = rng.standard_normal((ends_q[-1], 2, 40)).astype(np.float16)
    k, v = (rng.standard_normal((ends_k[-1], 1, d)).astype(np.float16) for d in (40, 24))
    options = Options(num_splits=splits)
    with cuflash.emulate("sm_80") as device:
        cuflash.attention_varlen(q, k, v, np.int32(ends_q), np.int32(ends_k), **mask, options=options)
    window = mask.get("window", (None, 0 if mask.get("causal") else None))
    problem = Problem(
        batch=len(ends_q) - 1,
        seqlen_q=int(np.diff(ends_q).max()),
        seqlen_k=int(np.diff(ends_k).max()),
        num_heads=2,
        num_kv_heads=1,
        head_dim=40,
        head_dim_v=24,
        dtype="float16",
        scale=1.0,
        left=window[0],
        right=window[1],
        total_q=ends_q[-1],
        total_k=ends_k[-1],
    )
    plan = plan_forward(problem, arch_named("sm_80"), load_bytes=16, store_bytes=16, options=options)
    packing = {"cu_seqlens_q": ends_q, "cu_seqlens_k": ends_k}
    agree(device.launches, io_model.flash_forward(problem, plan, return_lse="return_lse" in mask, **packing))


@pytest.mark.parametrize(("block_m", "block_n"), [(16, 16), (64, 32), (64, 128), (128, 64)])
@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window": (30, 9)}], ids=str)
def test_every_tile_size(block_m, block_n, mask):
    case = Case((1, 200, 1, 64), (1, 230, 1, 64), keywords=mask)
    problem = io_model.problem_of_shapes(case.q, case.k, **mask)
    chosen = io_model.plan_contiguous(problem, arch_named("sm_80"), Options(num_splits=1)).forward.config
    assert isinstance(chosen, ForwardConfig)
    config = replace(
        chosen, block_m=block_m, block_n=block_n, num_warps=min(4, block_m // 16), num_stages=1, q_in_registers=False
    )
    options = Options(num_splits=1, config=config)
    with cuflash.emulate("sm_80") as device:
        cuflash.attention(*arrays(case), **mask, options=options)
    plan = io_model.plan_contiguous(problem, arch_named("sm_80"), options)
    agree(device.launches, io_model.flash_forward(problem, plan))


def test_one_byte_more_is_noticed():
    case = Case()
    with cuflash.emulate("sm_80") as device:
        cuflash.attention(*arrays(case))
    cost = io_model.compare(case.q)["flash"]
    agree(device.launches, cost)
    with pytest.raises(AssertionError):
        agree(device.launches, replace(cost, read={**cost.read, "k": cost.read["k"] + 1}))


def test_traffic_of_flash_is_that_of_the_theorem():
    """Θ(N²·d²/M): quadratic in N, linear in d at given tiles, inverse to the rows of a tile."""

    def traffic(length, head_dim, block_m):
        problem = io_model.problem_of_shapes((length, 1, head_dim))
        chosen = io_model.plan_contiguous(problem, arch_named("sm_80"), Options(num_splits=1)).forward.config
        config = replace(chosen, block_m=block_m, num_warps=4, block_n=32, num_stages=1, q_in_registers=False)
        plan = io_model.plan_contiguous(problem, arch_named("sm_80"), Options(num_splits=1, config=config))
        return io_model.flash_forward(problem, plan).bytes

    base = traffic(2**15, 64, 64)
    assert traffic(2**16, 64, 64) / base == pytest.approx(4, rel=0.01)
    assert traffic(2**15, 128, 64) / base == pytest.approx(2, rel=0.01)
    assert traffic(2**15, 64, 128) / base == pytest.approx(0.5, rel=0.01)
    # K and V once per query tile of 128 rows: 2·64·2/128 bytes a score, where standard attention moves 4·2.
    standard = io_model.standard(io_model.problem_of_shapes((2**15, 1, 64))).bytes
    assert standard / traffic(2**15, 64, 128) == pytest.approx(4, rel=0.01)


def test_hidden_tiles_cost_nothing():
    def cost(**mask):
        problem = io_model.problem_of_shapes((1, 2**14, 1, 64), **mask)
        chosen = io_model.plan_contiguous(problem, arch_named("sm_80"), Options(num_splits=1)).forward.config
        config = replace(chosen, block_m=64, num_warps=4, block_n=64, num_stages=1, q_in_registers=False)
        plan = io_model.plan_contiguous(problem, arch_named("sm_80"), Options(num_splits=1, config=config))
        return io_model.flash_forward(problem, plan)

    full, causal, window = cost(), cost(causal=True), cost(window=(512, 0))
    assert causal.bytes / full.bytes == pytest.approx(0.5, rel=0.03)
    assert causal.matmul_flops / full.matmul_flops == pytest.approx(0.5, rel=0.03)
    assert window.bytes / full.bytes == pytest.approx((512 + 64) / 2**14, rel=0.15)  # and the queries and outputs
    assert causal.useful_flops <= causal.matmul_flops
