"""Gradients under masks: every kind, every feature, lists of query tiles and their turns, any order of warps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

import cuflash
from cuflash import masks
from tests.attention import test_mask_objects
from tests.attention.cases import Case, make, seen
from tests.attention.pairwise import covering
from tests.attention.test_mask_objects import (
    CASE,
    MASKS,
    NOTHING,
    OF_BOTH,
    OF_HEAD,
    PACKED,
    UNSEEN,
    poisoned,
    random_cases,
)
from tests.attention.test_orders import Ordered
from tests.devices import EmulatedDevice
from tests.gradients.cases import check, cotangent, gradients, hold_to_oracle
from tests.gradients.test_tiles import ORDERS, tiled
from tests.masks.cases import CASES


def small(case: Case, **more: Any) -> Case:
    """The case in tiles of 16 queries by 16 keys."""
    return tiled(case, **{"block_m": 16, "block_n": 16, "num_warps": 1, "key_warps": 1} | more)


@pytest.mark.parametrize("name", CASES)
def test_built_in_masks(device: Any, name: str) -> None:
    check(small(CASE.of_lengths(40, 61).but(mask=CASES[name].mask(40, 61))), device)


@pytest.mark.parametrize("name", ["window", "heads"])
@pytest.mark.parametrize(
    "lengths",
    [(1, 1), (1, 90), (90, 1), (16, 16), (17, 15), (31, 33), (13, 71), (0, 5), (5, 0)],
    ids=lambda pair: f"{pair[0]}x{pair[1]}",
)
def test_lengths(device: Any, name: str, lengths: tuple[int, int]) -> None:
    check(small(CASE.of_lengths(*lengths).but(mask=MASKS[name])), device)


@pytest.mark.parametrize("name", ["butterfly", "batch and heads"])
@pytest.mark.parametrize("deterministic", [True, False])
def test_the_tiles_that_the_plan_chooses(device: Any, name: str, deterministic: bool) -> None:
    case = CASE.of_lengths(140, 170).but(mask=MASKS[name], head_dim=64, head_dim_v=64)
    check(case.but(options=cuflash.Options(deterministic=deterministic)), device)


FACTORS: dict[str, Any] = {
    "mask": ("causal documents", "batch and heads", "points", "wide"),
    "dtype": ("float16", "bfloat16", "float32", "float64"),
    "dims": ((16, 16), (33, 48)),
    "heads": ((1, 1), (4, 2)),
    "bias": ("", "q.", "h.k", "bhqk"),
    "softcap": (None, 3.0),
    "window": ({}, {"causal": True}, {"window": (30, 5)}),
    "layout": ("dense", "heads_first", "interleaved"),
    "tiles": ((16, 16), (32, 64)),
    "deterministic": (True, False),
}


def case_of(row: dict[str, Any]) -> Case:
    same = {name: row[name] for name in ("dtype", "bias", "softcap", "layout")}
    names = ("head_dim", "head_dim_v", "num_heads", "num_kv_heads")
    sizes = dict(zip(names, (*row["dims"], *row["heads"]), strict=True))
    case = CASE.but(mask=MASKS[row["mask"]], batch=2, **same, **sizes, **row["window"])
    element = 2 if case.dtype == "bfloat16" else np.dtype(case.dtype).itemsize
    access = min(16, *((dim * element) & -(dim * element) for dim in row["dims"]))
    block_m, block_n = row["tiles"]
    return tiled(
        case, row["deterministic"], block_m=block_m, block_n=block_n, num_warps=block_n // 16, key_warps=block_n // 16,
        load_bytes=access, store_bytes=access,
    )  # fmt: skip


ROWS = [case_of(row) for row in covering(FACTORS)]


@pytest.mark.parametrize("case", ROWS, ids=lambda case: f"{case.dtype}-{case.mask!r:.30}")
def test_with_everything_else(device: Any, case: Case) -> None:
    check(case, device)


TILES: tuple[dict[str, Any], ...] = (
    {"block_n": 16, "num_warps": 2, "key_warps": 1},
    {"block_m": 64, "key_warps": 2},
    {"block_m": 64, "key_warps": 2, "num_stages": 1},
    {"num_stages": 1},
)


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("name", ["window", "batch and heads"])
def test_tilings(device: Any, tile: dict[str, Any], name: str) -> None:
    case = CASE.of_lengths(130, 90).but(mask=MASKS[name], num_heads=2, num_kv_heads=1)
    check(tiled(case, "num_stages" not in tile, **tile), device)


@pytest.mark.parametrize("name", ["stripes", "heads", "batch and heads", "nothing"])
@pytest.mark.parametrize("tail", [(0, 0), (3, 20)], ids=str)
def test_packed_sequences(device: Any, name: str, tail: tuple[int, int]) -> None:
    case = CASE.but(sequences=PACKED, tail=tail, mask=MASKS[name], num_heads=4, num_kv_heads=2)
    check(small(case), device)
    check(case.but(causal=True, bias="bhqk"), device)


@pytest.mark.parametrize("bias", ["k", "q.", "qk", "h..", "b..k", "...."])
@pytest.mark.parametrize("mask", [OF_BOTH, NOTHING], ids=["both", "nothing"])
def test_the_gradient_of_a_bias(device: Any, mask: masks.Mask, bias: str) -> None:
    """A block adds tiles of scores, some of them hidden, over the axes along which the bias is broadcast."""
    check(small(CASE.of_lengths(40, 70).but(mask=mask, bias=bias, batch=2, num_heads=2)), device)


def test_what_has_a_keyword_too(device: Any) -> None:
    case = CASE.of_lengths(70, 90)
    inputs = make(case)
    given = cotangent(case, inputs)
    for mask, window in ((masks.Causal(), {"causal": True}), (masks.SlidingWindow(13, 4), {"window": (13, 4)})):
        want = gradients(device, case.but(**window), inputs, given)
        for got, expected in zip(gradients(device, case.but(mask=mask), inputs, given), want, strict=True):
            np.testing.assert_allclose(got.astype(float), expected.astype(float), atol=6e-3)


def test_what_sees_nothing_and_is_seen_by_nobody(device: Any) -> None:
    hidden = masks.where(lambda batch, head, q, k: (q // 5 % 3 > 0) & (q < 50) & (k > 8) & (k % 7 > 0))
    case = small(CASE.but(mask=hidden))
    inputs = make(case)
    dq, dk, dv = gradients(device, case, inputs, cotangent(case, inputs))
    shown = seen(case)[0, 0]
    assert not dq[:, ~shown.any(axis=1)].any()
    assert not dk[:, ~shown.any(axis=0)].any()
    assert not dv[:, ~shown.any(axis=0)].any()
    check(case, device)


@pytest.mark.parametrize("name", UNSEEN)
def test_what_nobody_sees_is_not_read(device: Any, name: str) -> None:
    """NaN in tiles of keys that no query sees and of queries that see none; or in the bias of every hidden pair."""
    biased = small(CASE.of_lengths(80, 128).but(mask=UNSEEN[name], bias="bhqk"))
    inputs, shown = make(biased), np.broadcast_to(seen(biased), (1, 2, 80, 128))
    given = cotangent(biased, inputs)
    hidden = inputs._replace(bias=poisoned(inputs, shown).bias)
    hold_to_oracle(biased, inputs, given, gradients(device, biased, hidden, given))
    case = biased.but(bias="", options=None)
    options = replace(small(case).options, config=test_mask_objects.small(case).options.config)
    case = case.but(options=options)
    inputs = make(case)
    given = cotangent(case, inputs)
    queries = shown.any(axis=(0, 1, 3)).reshape(-1, 16).any(axis=1).repeat(16)[None, :, None, None]
    hidden = poisoned(inputs, shown)
    hidden = hidden._replace(q=np.where(queries, inputs.q, np.nan).astype(inputs.q.dtype))
    dout = np.where(queries, given[0], np.nan).astype(given[0].dtype)
    got = gradients(device, case, hidden, (dout, given[1]))
    hold_to_oracle(case, inputs, given, got)


# Examples share a device: it keeps no state between runs.
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(random_cases())
def test_random_functions(device: Any, case: Case) -> None:
    check(case, device)


ORDERED = {
    "stripes": tiled(CASE.but(mask=MASKS["stripes"]), block_m=16, block_n=32, num_warps=2, key_warps=2),
    "heads": tiled(
        CASE.but(mask=OF_HEAD, num_heads=4, num_kv_heads=2), block_m=32, block_n=16, num_warps=2, key_warps=1
    ),
    "packed": CASE.but(sequences=PACKED, mask=OF_BOTH, bias="hqk"),
    "one stage": tiled(CASE.but(mask=MASKS["points"]), block_n=32, num_warps=2, key_warps=2, num_stages=1),
}


@pytest.mark.parametrize("name", ORDERED)
def test_the_order_of_warps_and_copies_changes_no_bit(name: str) -> None:
    case = ORDERED[name]
    inputs = make(case)
    given = cotangent(case, inputs)
    want, *others = (gradients(Ordered(**order), case, inputs, given) for order in ORDERS)
    for got in others:
        for gradient, expected in zip(got, want, strict=True):
            np.testing.assert_array_equal(gradient, expected)


@pytest.mark.parametrize("name", ["stripes", "heads", "packed"])
def test_a_block_waits_for_earlier_blocks_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks one after the other, in the order in which a GPU starts them: none may wait for one that comes later."""
    case = ORDERED[name]
    inputs = make(case)
    given = cotangent(case, inputs)
    together = gradients(EmulatedDevice(), case, inputs, given)
    monkeypatch.setattr("cuflash.emulator.device.BATCH_THREADS", 1)
    for alone, expected in zip(gradients(EmulatedDevice(), case, inputs, given), together, strict=True):
        np.testing.assert_array_equal(alone, expected)
