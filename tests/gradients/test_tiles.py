"""How the work is cut changes nothing but rounding: explicit configurations of the backward kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import cuflash
from cuflash.plan.config import BackwardConfig, round_up
from tests.attention.cases import Case, make
from tests.attention.test_orders import Ordered
from tests.devices import EmulatedDevice
from tests.gradients.cases import check, cotangent, forward_on_cpu, gradients


@pytest.fixture(autouse=True)
def forward_pass() -> Iterator[None]:
    """Of no concern here; its kernels would take a third of the time."""
    with forward_on_cpu():
        yield


def tiled(case: Case, deterministic: bool = True, **tile: Any) -> Case:
    """The case with an explicit backward configuration; `tile` has the fields that differ from a plain one."""
    fields: dict[str, Any] = {
        "dtype": case.dtype, "bias_dtype": case.bias_dtype if case.bias else "none",
        "head_dim": case.head_dim, "head_dim_v": case.head_dim_v, "block_m": 32, "block_n": 64,
        "block_d": round_up(case.head_dim, 16), "block_dv": round_up(case.head_dim_v, 16), "num_warps": 4,
        "key_warps": 4, "num_stages": 2, "load_bytes": 16, "store_bytes": 16,
        "windowed": case.mask is None and (case.causal or case.window is not None),
        "softcapped": case.softcap is not None, "varlen": case.packed, "deterministic": deterministic,
    }  # fmt: skip
    config = BackwardConfig(**fields | tile)
    return case.but(options=cuflash.Options(deterministic=deterministic, backward_config=config))


TILES: dict[str, dict[str, Any]] = {
    "16x16_1_warp": {"block_m": 16, "block_n": 16, "num_warps": 1, "key_warps": 1},
    "32x16_2_warps_share": {"block_n": 16, "num_warps": 2, "key_warps": 1},
    "16x64": {"block_m": 16},
    "64x32_2_warps": {"block_m": 64, "block_n": 32, "num_warps": 2, "key_warps": 2},
    "64x64_shared_by_2": {"block_m": 64, "key_warps": 2},
    "64x64_shared_by_4": {"block_m": 64, "key_warps": 1},
    "64x64_shared_by_2_one_stage": {"block_m": 64, "key_warps": 2, "num_stages": 1},
    "64x128_8_warps": {"block_m": 64, "block_n": 128, "num_warps": 8, "key_warps": 8},
    "64x128_8_warps_shared": {"block_m": 64, "block_n": 128, "num_warps": 8, "key_warps": 4},
    "128x64": {"block_m": 128},
    "128x128": {"block_m": 128, "block_n": 128, "num_warps": 8, "key_warps": 8, "num_stages": 1},
    "one_stage": {"num_stages": 1},
    "16x64_one_stage": {"block_m": 16, "num_stages": 1},
    "narrow_loads": {"load_bytes": 8},
    "pairs": {"load_bytes": 4, "store_bytes": 4},
    "narrowest_loads": {"load_bytes": 2, "store_bytes": 2, "num_stages": 1},
    "narrowest_loads_two_stages": {"load_bytes": 2, "store_bytes": 8},
}
SMALL = Case(batch=1, seqlen_q=70, seqlen_k=150)
CASES = {
    "plain": SMALL,
    "causal_bias": SMALL.but(causal=True, bias="bhqk", softcap=3.0, dtype="bfloat16"),
    "packed": SMALL.but(sequences=((40, 70), (5, 0), (1, 90), (33, 17)), window=(20, 5), tail=(3, 7)),
}


@pytest.mark.parametrize(
    ("tile", "name"),
    [(tile, name) for i, tile in enumerate(TILES) for j, name in enumerate(CASES) if name == "plain" or (i + j) % 2],
)
def test_tiles(device: Any, tile: str, name: str) -> None:
    check(tiled(CASES[name], **TILES[tile]), device)


@pytest.mark.parametrize(
    ("dims", "tile"),
    [
        ((192, 192), {"block_d": 64, "block_dv": 64}),
        ((192, 192), {"block_d": 128, "block_dv": 128}),  # the last chunk is narrower
        ((200, 70), {"block_d": 64, "block_dv": 64, "key_warps": 2}),
        ((70, 200), {"block_d": 64, "block_dv": 128}),  # dk in two chunks, dv in two others
        ((70, 200), {"block_dv": 64, "num_stages": 1}),  # dk in the first of four chunks
        ((200, 33), {"block_d": 64}),
        ((256, 256), {"block_d": 128, "block_dv": 128, "key_warps": 2, "block_n": 32}),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["plain", "packed"])
def test_chunks_of_columns(device: Any, dims: tuple[int, int], tile: dict[str, Any], name: str) -> None:
    case = CASES[name].but(head_dim=dims[0], head_dim_v=dims[1])
    narrow = {"load_bytes": 2, "store_bytes": 2} if dims[1] % 2 else {"load_bytes": 4, "store_bytes": 4}
    check(tiled(case, **tile, **narrow if dims[0] % 8 or dims[1] % 8 else {}), device)


@pytest.mark.parametrize("arch", ["sm_86", "sm_90"])
@pytest.mark.parametrize("name", CASES)
def test_other_architectures(arch: str, name: str) -> None:
    check(CASES[name], EmulatedDevice(arch))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", CASES)
def test_any_order_of_additions(arch: str, name: str) -> None:
    """Gradients that need not be the same bits every time are as exact."""
    check(tiled(CASES[name], deterministic=False), EmulatedDevice(arch))
    check(CASES[name].but(options=cuflash.Options(deterministic=False)), EmulatedDevice(arch))


ORDERS = [{}, {"warp_order": 1, "copies": "early"}, {"warp_order": 2, "copies": "late"}]


@pytest.mark.parametrize("tile", ["16x64", "64x64_shared_by_2_one_stage"])
@pytest.mark.parametrize("name", CASES)
def test_the_order_of_warps_and_copies_changes_no_bit(tile: str, name: str) -> None:
    case = tiled(CASES[name], **TILES[tile])
    inputs = make(case)
    given = cotangent(case, inputs)
    want, *others = (gradients(Ordered(**order), case, inputs, given) for order in ORDERS)
    for got in others:
        for gradient, expected in zip(got, want, strict=True):
            np.testing.assert_array_equal(gradient, expected)


@pytest.mark.parametrize("name", CASES)
def test_a_block_waits_for_earlier_blocks_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks one after the other, in the order in which a GPU starts them: none may wait for one that comes later."""
    case = tiled(CASES[name], block_m=16)
    inputs = make(case)
    given = cotangent(case, inputs)
    together = gradients(EmulatedDevice(), case, inputs, given)
    monkeypatch.setattr("cuflash.emulator.device.BATCH_THREADS", 1)
    for alone, expected in zip(gradients(EmulatedDevice(), case, inputs, given), together, strict=True):
        np.testing.assert_array_equal(alone, expected)


WALKS = {
    "causal": SMALL.but(causal=True, seqlen_q=150),
    "window": SMALL.but(seqlen_q=150, window=(37, 20)),
    "left": SMALL.but(seqlen_q=200, seqlen_k=70, window=(10, None)),
    "group": SMALL.but(num_heads=4, num_kv_heads=2),
    "packed": CASES["packed"],
}


@pytest.mark.parametrize("name", WALKS)
def test_query_tiles_that_share_a_turn_change_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = tiled(WALKS[name], block_m=16, block_n=16, num_warps=1, key_warps=1)
    inputs = make(case)
    given = cotangent(case, inputs)
    alone = gradients(EmulatedDevice(), case, inputs, given)
    monkeypatch.setattr("cuflash.plan.backward.MAX_LAG", 1e3)
    shared = gradients(EmulatedDevice(), case, inputs, given)
    monkeypatch.setattr("cuflash.emulator.device.BATCH_THREADS", 1)
    in_turn = gradients(EmulatedDevice(), case, inputs, given)
    for expected, *others in zip(alone, shared, in_turn, strict=True):
        for got in others:
            np.testing.assert_array_equal(got, expected)
