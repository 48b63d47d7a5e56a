"""The traffic and the operations of a pullback against what the kernels do, launch by launch, to the last byte.

One count depends on timing: how often a block asks whether it is its turn to add to dq. The model has the least.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import cuflash
from cuflash import io_model
from cuflash.emulator import LaunchReport
from cuflash.layout import layout
from cuflash.plan.arch import arch_named
from cuflash.plan.backward_traffic import backward_traffic
from cuflash.plan.traffic import LaunchTraffic
from cuflash.problem import Problem
from cuflash.records import bias_shape
from tests.attention.cases import Case, make
from tests.attention.pairwise import covering
from tests.gradients.cases import cotangent, forward_on_cpu, vjp
from tests.gradients.test_tiles import TILES, tiled
from tests.test_io_model_exact import nonzero

MASKS: tuple[dict[str, Any], ...] = (
    {},
    {"causal": True},
    {"window": (13, 0)},
    {"window": (None, 7)},
    {"window": (40, 3)},
)
DENSE = ((1, 300), (70, 1), (65, 130))
PACKED = (
    ((70, 40), (0, 100), (65, 130)),
    ((1, 0), (1, 64), (1, 65), (127, 70)),
    ((33, 17),),
)
FACTORS: dict[str, Any] = {
    "dims": ((33, 33), (40, 24), (64, 64), (80, 128), (130, 130), (6, 72)),
    "dtype": ("float16", "bfloat16", "float32", "tf32", "float64"),
    "arch": ("sm_80", "sm_90"),
    "mask": MASKS,
    "lengths": (*DENSE, *PACKED),
    "heads": ((1, 1), (2, 1), (6, 3)),
    "bias": ("", "", "k", "q.", "b.qk", "...."),
    "bias_dtype": ("float16", "float32", "float64"),
    "softcap": (None, None, 5.0),
    "deterministic": (True, False),
    "dlse": (True, False),
}


def case_of(row: dict[str, Any]) -> Case:
    packed = isinstance(row["lengths"][0], tuple)
    lengths = (
        {"sequences": row["lengths"], "tail": (3, 40)} if packed else dict(zip(SIDES, row["lengths"], strict=True))
    )
    return Case(
        head_dim=row["dims"][0],
        head_dim_v=row["dims"][1],
        num_heads=row["heads"][0],
        num_kv_heads=row["heads"][1],
        dtype="float32" if row["dtype"] == "tf32" else row["dtype"],
        options=cuflash.Options(
            deterministic=row["deterministic"], precision="tf32" if row["dtype"] == "tf32" else None
        ),
        **{name: row[name] for name in ("bias", "bias_dtype", "softcap")},
        **row["mask"],
        **lengths,
    )


SIDES = ("seqlen_q", "seqlen_k")
ROWS = [(case_of(row), row["arch"], row["dlse"]) for row in covering(FACTORS)]


def problem_of(case: Case) -> tuple[Problem, dict[str, Any]]:
    """The problem of a case, and its cu_seqlens if it is packed."""
    left, right = case.window or (None, None)
    inputs = make(case)
    lengths: dict[str, Any] = {name: getattr(case, name) for name in ("batch", *SIDES)}
    packing = {}
    if case.sequences is not None:
        lengths = {name: max(pair[i] for pair in case.sequences) for i, name in enumerate(SIDES)}
        lengths |= {"batch": len(case.sequences), "total_q": len(inputs.q), "total_k": len(inputs.k)}
        packing = {"cu_seqlens_q": list(inputs.cu_seqlens_q), "cu_seqlens_k": list(inputs.cu_seqlens_k)}
    shared = {name: getattr(case, name) for name in ("num_heads", "num_kv_heads", "head_dim", "head_dim_v", "dtype")}
    return Problem(
        **lengths,
        **shared,
        scale=1.0,
        softcap=case.softcap or 0.0,
        left=left,
        right=0 if case.causal else right,
        bias_dtype=case.bias_dtype if case.bias else None,
    ), packing


def hold_to_model(case: Case, arch: str = "sm_80", dlse: bool = True) -> None:
    """Runs the pullback of a case on the emulated device and compares every launch with the model."""
    inputs = make(case)
    given = cotangent(case, inputs)
    with cuflash.emulate(arch) as device, forward_on_cpu():
        _, pullback = vjp(case, inputs, return_lse=dlse, options=case.options)
        pullback(given if dlse else given[0])
    problem, packing = problem_of(case)
    shape = None if inputs.bias is None else bias_shape(layout(inputs.bias))
    plan = io_model.plan_backward_contiguous(problem, arch_named(arch), case.options, shape)
    more = {"lse_cotangent": dlse, "bias_shape": shape, **packing}
    models = backward_traffic(problem, plan, **more)
    assert [launch.kernel for launch in device.launches] == [planned.config.entry for planned in plan.launches]
    for launch, model in zip(device.launches, models, strict=True):
        agree(launch, model)
    cost = io_model.flash_backward(problem, plan, **more)
    assert cost.bytes == sum(sum((*model.read.values(), *model.written.values())) for model in models)
    assert cost.dtype == plan.launches[1].config.dtype
    assert cost.matmul_flops == sum(launch.mma_flops for launch in device.launches)
    assert cost.exponentials <= sum(launch.instructions.get("special", 0) for launch in device.launches)


def agree(launch: LaunchReport, model: LaunchTraffic) -> None:
    read = nonzero(launch.read_by_array)
    asked = read.get("turns", 0) - model.read.get("turns", 0)
    assert asked >= 0
    assert read == nonzero({**model.read, "turns": read.get("turns", 0)})
    assert nonzero(launch.written_by_array) == model.written
    assert launch.global_read == sum(model.read.values()) + asked
    assert launch.global_written == sum(model.written.values())


@pytest.mark.parametrize(("case", "arch", "dlse"), ROWS, ids=str)
def test_every_feature(case: Case, arch: str, dlse: bool) -> None:
    hold_to_model(case, arch, dlse)


SMALL = Case(batch=1, seqlen_q=70, seqlen_k=150)
TILED = {
    "plain": SMALL,
    "causal_bias": SMALL.but(causal=True, bias="hqk", softcap=3.0, dtype="bfloat16"),
    "packed": SMALL.but(sequences=((40, 70), (5, 0), (1, 90), (33, 17)), window=(20, 5), tail=(3, 7)),
}


@pytest.mark.parametrize("name", TILED)
def test_query_tiles_that_share_a_turn(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cuflash.plan.backward.MAX_LAG", 1e3)
    hold_to_model(tiled(TILED[name], block_m=16))


@pytest.mark.parametrize(("tile", "name"), [(tile, list(TILED)[i % 3]) for i, tile in enumerate(TILES)])
def test_every_tiling(tile: str, name: str) -> None:
    hold_to_model(tiled(TILED[name], **TILES[tile]))


@pytest.mark.parametrize(
    ("dims", "tile"),
    [
        ((192, 192), {"block_d": 128, "block_dv": 128}),  # the last chunk is narrower
        ((200, 70), {"block_d": 64, "block_dv": 64, "key_warps": 2}),
        ((70, 200), {"block_d": 64, "block_dv": 128}),  # dk in two chunks, dv in two others
        ((70, 200), {"block_dv": 64, "num_stages": 1}),  # dk in the first of four chunks
        ((33, 33), {"num_warps": 8, "key_warps": 4}),  # warps past the last column of dq
    ],
    ids=str,
)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_chunks_of_columns(dims: tuple[int, int], tile: dict[str, Any], arch: str) -> None:
    case = SMALL.but(head_dim=dims[0], head_dim_v=dims[1], num_heads=4, num_kv_heads=2)
    narrow = 2 if dims[0] % 2 else 4
    hold_to_model(tiled(case, **tile, load_bytes=narrow, store_bytes=narrow), arch)


def test_one_byte_more_is_noticed() -> None:
    case = SMALL.but(seqlen_k=40)  # one key tile, which never waits for its turn
    inputs = make(case)
    with cuflash.emulate("sm_80") as device, forward_on_cpu():
        vjp(case, inputs)[1](cotangent(case, inputs))
    problem, _ = problem_of(case)
    plan = io_model.plan_backward_contiguous(problem, arch_named("sm_80"))
    models = backward_traffic(problem, plan, lse_cotangent=True)
    for launch, model in zip(device.launches, models, strict=True):
        assert nonzero(launch.read_by_array) == model.read
        for name in model.read:
            more = replace(model, read={**model.read, name: model.read[name] + 1})
            with pytest.raises(AssertionError):
                agree(launch, more)
        for name in model.written:
            more = replace(model, written={**model.written, name: model.written[name] + 1})
            with pytest.raises(AssertionError):
                agree(launch, more)


def test_traffic_is_that_of_the_theorem() -> None:
    """Θ(N²·d²/M): quadratic in N, linear in d at given tiles, inverse to the keys of a tile."""

    def cost(length: int, head_dim: int, block_n: int) -> io_model.Cost:
        problem = io_model.problem_of_shapes((length, 1, head_dim))
        plan = io_model.plan_backward_contiguous(problem, arch_named("sm_90"))
        config = plan.launches[1].config
        config = replace(config, block_m=64, block_n=block_n, num_warps=4, key_warps=4, num_stages=1)
        options = cuflash.Options(backward_config=config)
        return io_model.flash_backward(
            problem, io_model.plan_backward_contiguous(problem, arch_named("sm_90"), options)
        )

    base = cost(2**14, 64, 64).bytes
    assert cost(2**15, 64, 64).bytes / base == pytest.approx(4, rel=0.01)
    assert cost(2**14, 128, 64).bytes / base == pytest.approx(2, rel=0.01)
    assert cost(2**14, 64, 128).bytes / base == pytest.approx(0.5, rel=0.01)
    # Q and dO once per key tile, and dQ there and back in float32: 64·(2 + 2 + 4 + 4)/128 bytes a score, with lse and
    # delta (4 + 4)/128 more; standard attention moves 7·2.
    standard = io_model.standard_backward(io_model.problem_of_shapes((2**16, 1, 64))).bytes
    assert standard / cost(2**16, 64, 128).bytes == pytest.approx(14 / (6 + 1 / 16), rel=0.01)
    full = cost(2**14, 64, 128)
    assert full.matmul_flops == full.useful_flops
