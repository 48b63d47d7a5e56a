"""Masks: every kind, combined and made of functions, with everything else that a call may ask for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import cuflash
from cuflash import CuflashError, masks
from cuflash.masks.steps import Lengths
from tests.attention.cases import Case, Inputs, call, check, hold_to_oracle, make, seen, tiled
from tests.attention.pairwise import covering
from tests.attention.test_orders import ORDERS, Ordered
from tests.masks.cases import CASES
from tests.masks.expressions import BATCH, HEADS, TABLE_LENGTH, compiled, truth

CASE = Case(batch=1, head_dim=16, head_dim_v=16, seqlen_q=70, seqlen_k=90)


def small(case: Case, **more: Any) -> Case:
    """The case in tiles of 16 queries by 16 keys, so that few tokens are many tiles."""
    return tiled(case, **{"block_m": 16, "block_n": 16, "num_warps": 1} | more)


RNG = np.random.default_rng(11)
IDS, FLAGS = np.sort(RNG.integers(0, 6, 300)), RNG.random(300) < 0.6
POINTS = RNG.integers(-9, 9, (2, 300))
REALS = np.where(RNG.random(300) < 0.2, np.nan, RNG.normal(size=300))
RATES = RNG.normal(size=(4, 3)).astype(np.float32)

OF_HEAD = masks.where(lambda batch, head, q, k: (q // 16 + k // 16 + head) % 3 == 0)
OF_BATCH = masks.where(lambda batch, head, q, k: (q - k) % (3 + batch) < 2)
OF_BOTH = masks.where(lambda batch, head, q, k: (q + 3 * k + 5 * head + 7 * batch) // 8 % 3 == 0)
NOTHING = ~masks.SlidingWindow(None, None)
MASKS: dict[str, masks.Mask] = {
    "window": masks.SlidingWindow(20, 3),
    "causal documents": masks.Documents(IDS[:90][:70], IDS[:90]) & masks.Causal(),
    "butterfly": masks.Butterfly(16),
    "stripes": masks.Dilated(3, 20, 0) | masks.GlobalTokens(2),
    "heads": OF_HEAD,
    "batch and heads": OF_BOTH,
    "points": masks.where(lambda batch, head, q, k: abs(POINTS[0, q] - POINTS[0, k]) + abs(POINTS[1, q] - k % 9) < 9),
    "reals": masks.where(lambda batch, head, q, k: ~(REALS[q] * RATES[head, 0] < REALS[k]) & (q / 3 - k < 9.5)),
    "wide": masks.where(lambda batch, head, q, k: (q * 2**40 - k * 2**39) // 2**39 % 7 < 3),
    "nothing": NOTHING,
    "everything": masks.SlidingWindow(None, None),
}


@pytest.mark.parametrize("name", CASES)
def test_built_in_masks(device: Any, name: str) -> None:
    check(device, small(CASE.of_lengths(97, 131).but(mask=CASES[name].mask(97, 131))))


@pytest.mark.parametrize("name", ["window", "butterfly", "heads", "points"])
@pytest.mark.parametrize(
    "lengths",
    [(1, 1), (1, 90), (90, 1), (16, 16), (17, 15), (31, 33), (64, 128), (13, 71), (0, 5), (5, 0)],
    ids=lambda pair: f"{pair[0]}x{pair[1]}",
)
def test_lengths(device: Any, name: str, lengths: tuple[int, int]) -> None:
    check(device, small(CASE.of_lengths(*lengths).but(mask=MASKS[name])))


@pytest.mark.parametrize("name", ["window", "butterfly", "batch and heads", "wide"])
def test_the_tiles_that_the_plan_chooses(device: Any, name: str) -> None:
    check(device, CASE.of_lengths(150, 200).but(mask=MASKS[name], head_dim=64, head_dim_v=64))


FACTORS: dict[str, Any] = {
    "mask": tuple(name for name in MASKS if name not in ("nothing", "everything", "window")),
    "dtype": ("float16", "bfloat16", "float32", "float64"),
    "dims": ((16, 16), (7, 7), (33, 48)),
    "heads": ((1, 1), (4, 2), (2, 1)),
    "batch": (1, 2),
    "bias": ("", "k", "q.", "h.k", "b.qk", "bhqk", "...."),
    "softcap": (None, None, 3.0),
    "window": ({}, {}, {"causal": True}, {"window": (30, 5)}),
    "layout": ("dense", "heads_first", "interleaved"),
    "tiles": (None, (16, 16, 1), (32, 48, 2)),
}


def case_of(row: dict[str, Any]) -> Case:
    same = {name: row[name] for name in ("dtype", "batch", "bias", "softcap", "layout")}
    names = ("head_dim", "head_dim_v", "num_heads", "num_kv_heads")
    sizes = dict(zip(names, (*row["dims"], *row["heads"]), strict=True))
    case = CASE.but(mask=MASKS[row["mask"]], **same, **sizes, **row["window"])
    if row["tiles"] is None:
        return case
    element = np.dtype(case.dtype).itemsize if case.dtype != "bfloat16" else 2
    rows = (case.head_dim * element, case.head_dim_v * element)
    access = min(16, *(row & -row for row in rows))
    block_m, block_n, warps = row["tiles"]
    return tiled(
        case, block_m=block_m, block_n=block_n, num_warps=warps, load_bytes=access,
        store_bytes=min(16, rows[1] & -rows[1]),
    )  # fmt: skip


@pytest.mark.parametrize(
    "case", [case_of(row) for row in covering(FACTORS)], ids=lambda case: f"{case.dtype}-{case.mask!r:.30}"
)
def test_with_everything_else(device: Any, case: Case) -> None:
    check(device, case)


def test_a_window_and_a_mask_hold_together(device: Any) -> None:
    case = small(CASE.but(causal=True, window=(25, None), mask=OF_HEAD))
    inputs = make(case)
    want = call(device, case.but(causal=False, window=None, mask=OF_HEAD & masks.SlidingWindow(25, 0)), inputs)
    for got, expected in zip(call(device, case, inputs), want, strict=True):
        np.testing.assert_array_equal(got, expected)
    check(device, case)


@pytest.mark.parametrize(
    ("mask", "window"),
    [(masks.Causal(), {"causal": True}), (masks.SlidingWindow(13, 4), {"window": (13, 4)}), (~NOTHING, {})],
    ids=["causal", "window", "all"],
)
def test_what_has_a_keyword_too(device: Any, mask: masks.Mask, window: dict[str, Any]) -> None:
    case = CASE.of_lengths(100, 130)
    inputs = make(case)
    want = call(device, case.but(**window), inputs)
    for got, expected in zip(call(device, case.but(mask=mask), inputs), want, strict=True):
        np.testing.assert_allclose(got.astype(float), expected.astype(float), atol=2e-3)


@pytest.mark.parametrize("name", ["window", "stripes", "batch and heads", "nothing"])
@pytest.mark.parametrize("num_splits", [2, 3, 7])
def test_split_keys(device: Any, name: str, num_splits: int) -> None:
    """Each split takes its share of the tiles that a query tile sees."""
    for lengths in ((1, 200), (20, 90)):
        case = CASE.of_lengths(*lengths).but(mask=MASKS[name], batch=2, num_heads=4, num_kv_heads=2)
        check(device, tiled(case, num_splits, block_m=16, block_n=16, num_warps=1))
        check(device, case.but(options=cuflash.Options(num_splits=num_splits)))


@pytest.mark.parametrize(
    "tile", [{"num_stages": 1}, {"q_in_registers": True}, {"block_dv": 16}, {"block_n": 80}], ids=str
)
@pytest.mark.parametrize("name", ["window", "heads"])
def test_pipelines(device: Any, tile: dict[str, Any], name: str) -> None:
    check(device, tiled(CASE.of_lengths(70, 190).but(mask=MASKS[name], head_dim_v=48), **tile))


PACKED = ((20, 40), (0, 5), (5, 0), (33, 17), (1, 1))


@pytest.mark.parametrize("name", ["window", "stripes", "heads", "batch and heads", "points", "nothing"])
@pytest.mark.parametrize("tail", [(0, 0), (3, 20)], ids=str)
def test_packed_sequences(device: Any, name: str, tail: tuple[int, int]) -> None:
    case = CASE.but(sequences=PACKED, tail=tail, mask=MASKS[name], num_heads=4, num_kv_heads=2)
    check(device, small(case))
    check(device, case.but(causal=True, bias="bhqk"))
    check(device, tiled(case, 3, block_m=16, block_n=16, num_warps=1))


@pytest.mark.parametrize("rank", [2, 3])
def test_inputs_of_lower_rank(device: Any, rank: int) -> None:
    case = CASE.but(mask=masks.Butterfly(16), num_heads=1)
    inputs = make(case)
    arrays = [x[0] if rank == 3 else x[0, :, 0] for x in inputs[:3]]
    out, lse = device.run(cuflash.attention, *arrays, mask=case.mask, return_lse=True)
    assert (out.shape, lse.shape) == (arrays[0].shape, (1, 70)[-rank + 1 :])
    hold_to_oracle(case, inputs, out.reshape(inputs.q.shape), lse.reshape(1, 1, 70))


def test_out_is_written_in_place(device: Any) -> None:
    case = CASE.but(mask=MASKS["stripes"])
    inputs, out = make(case), np.full((1, 70, 2, 16), np.nan, np.float16)
    result, lse = call(device, case, inputs, out=out)
    assert result is out
    hold_to_oracle(case, inputs, out, lse)


def test_rows_that_see_nothing(device: Any) -> None:
    case = small(CASE.but(mask=masks.where(lambda batch, head, q, k: (q // 5 % 3 > 0) & (q < 50) & (k > 8))))
    out, lse = call(device, case, make(case))
    hidden = ~seen(case).any(axis=-1)[0, 0]
    assert 0 < hidden.sum() < 70
    assert not out[:, hidden].any()
    assert np.isneginf(lse[..., hidden]).all()
    assert np.isfinite(lse[..., ~hidden]).all()


# Tiles of 16 by 16 of which no head sees any pair are neither loaded nor computed.
UNSEEN: dict[str, masks.Mask] = {
    "keys": masks.where(lambda batch, head, q, k: (k // 16 % 3 != 1) & (k < 100)),
    "queries": masks.where(lambda batch, head, q, k: q // 16 % 2 == 1),
    "blocks": masks.Blocks(RNG.random((5, 8)) < 0.3, 16),
    "heads": masks.where(lambda batch, head, q, k: (k // 16 % 4 == head) & (q >= 16)),
}


@pytest.mark.parametrize("name", UNSEEN)
@pytest.mark.parametrize("splits", [1, 3])
def test_what_nobody_sees_is_not_read(device: Any, name: str, splits: int) -> None:
    """NaN in tiles of keys that no query of their head sees, and in the bias of every hidden pair."""
    case = CASE.of_lengths(80, 128).but(mask=UNSEEN[name], bias="bhqk")
    case = tiled(case, splits, block_m=16, block_n=16, num_warps=1)
    inputs, shown = make(case), np.broadcast_to(seen(case), (1, 2, 80, 128))
    out, lse = call(device, case, poisoned(inputs, shown))
    hold_to_oracle(case, inputs, out, lse)


def poisoned(inputs: Inputs, shown: np.ndarray) -> Inputs:
    """NaN where no query of any head looks, tile by tile of the keys, and pair by pair of the bias."""
    keys = shown.any(axis=(0, 1, 2)).reshape(-1, 16).any(axis=1).repeat(16)
    k, v = (np.where(keys[None, :, None, None], x, np.nan).astype(x.dtype) for x in inputs[1:3])
    bias = None if inputs.bias is None else np.where(shown, inputs.bias, np.nan).astype(inputs.bias.dtype)
    return inputs._replace(k=k, v=v, bias=bias)


def test_hidden_scores_may_be_anything(device: Any) -> None:
    """NaN in keys that nobody sees, in tiles of which others are seen: their scores are gone."""
    case = small(CASE.of_lengths(80, 128).but(mask=masks.where(lambda batch, head, q, k: k % 3 > 0)))
    inputs = make(case)
    k = inputs.k.copy()
    k[:, ::3] = np.nan
    out, lse = call(device, case, inputs._replace(k=k))
    hold_to_oracle(case, inputs, out, lse)


@st.composite
def random_cases(draw: st.DrawFn) -> Case:
    """Cases under masks of random functions that may be asked at their lengths."""
    lengths = draw(st.tuples(st.integers(0, TABLE_LENGTH), st.integers(1, TABLE_LENGTH)))
    heads = draw(st.sampled_from([(HEADS, HEADS), (HEADS, 1)]))
    dtype = draw(st.sampled_from(["float16", "float64"]))
    case = CASE.of_lengths(*lengths).but(batch=BATCH, num_heads=heads[0], num_kv_heads=heads[1], dtype=dtype)
    try:
        case = case.but(mask=masks.where(compiled(draw(truth))))
        case.mask.program.check(Lengths(BATCH, *heads, *lengths))
    except CuflashError:  # a number that leaves int64, too many constants
        assume(False)
    return case


# Examples share a device: it keeps no state between runs.
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(random_cases())
def test_random_functions(device: Any, case: Case) -> None:
    check(device, case)


@pytest.mark.parametrize("order", ORDERS[1::3], ids=lambda order: f"warps_{order['warp_order']}_{order['copies']}")
def test_the_order_of_warps_and_copies_changes_no_bit(order: dict[str, Any]) -> None:
    for case in (
        tiled(CASE.but(mask=MASKS["stripes"]), block_m=32, block_n=16, num_warps=2),
        CASE.but(sequences=PACKED, mask=OF_BOTH),
        tiled(CASE.but(mask=MASKS["points"]), 2, block_m=32, block_n=16, num_warps=2, num_stages=1),
    ):
        inputs = make(case)
        want = call(Ordered(**ORDERS[0]), case, inputs)
        for got, expected in zip(call(Ordered(**order), case, inputs), want, strict=True):
            np.testing.assert_array_equal(got, expected)
