"""How the work is cut changes nothing but rounding: splits of the keys, explicit tile configurations."""

from __future__ import annotations

from typing import Any

import pytest

import cuflash
from tests.attention.cases import Case, check, tiled

MASKS: dict[str, dict[str, Any]] = {
    "full": {}, "causal": {"causal": True}, "window": {"window": (30, 3)}, "bias": {"bias": "b..k"},
}  # fmt: skip
DECODE = Case(batch=2, num_heads=4, num_kv_heads=2, seqlen_q=1, seqlen_k=330)


@pytest.mark.parametrize("num_splits", [1, 2, 3, 4, 5, 6, 7, 11, 64, 128])
@pytest.mark.parametrize("mask", MASKS)
def test_num_splits(device: Any, num_splits: int, mask: str) -> None:
    check(device, DECODE.but(options=cuflash.Options(num_splits=num_splits), **MASKS[mask]))


@pytest.mark.parametrize(
    "lengths", [(0, 9), (9, 0), (1, 1), (65, 64), (17, 129), (130, 20)], ids=lambda p: f"{p[0]}x{p[1]}"
)
@pytest.mark.parametrize("num_splits", [2, 9])
@pytest.mark.parametrize("mask", ["full", "causal"])
def test_splits_of_short_sequences(device: Any, lengths: tuple[int, int], num_splits: int, mask: str) -> None:
    """Parts without a key, and rows that see nothing in any part."""
    check(device, DECODE.of_lengths(*lengths).but(options=cuflash.Options(num_splits=num_splits), **MASKS[mask]))


@pytest.mark.parametrize("head_dim", [33, 128, 256])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_splits_of_other_heads(device: Any, head_dim: int, dtype: str) -> None:
    options = cuflash.Options(num_splits=3)
    check(device, DECODE.but(dtype=dtype, head_dim=head_dim, head_dim_v=head_dim, options=options, batch=1))


TILES: dict[str, dict[str, Any]] = {
    "16x16_1_warp": {"block_m": 16, "block_n": 16, "num_warps": 1},
    "16x64_1_warp": {"block_m": 16, "block_n": 64, "num_warps": 1},
    "32x48_2_warps": {"block_m": 32, "block_n": 48, "num_warps": 2},
    "64x16_2_warps": {"block_m": 64, "block_n": 16, "num_warps": 2},
    "64x80": {"block_n": 80},
    "64x128": {"block_n": 128},
    "128x32_4_warps": {"block_m": 128},
    "128x64_8_warps": {"block_m": 128, "block_n": 64, "num_warps": 8},
    "one_stage": {"num_stages": 1},
    "q_in_registers": {"q_in_registers": True},
    "q_in_registers_one_stage": {"q_in_registers": True, "num_stages": 1, "block_n": 64},
    "narrow_columns": {"block_dv": 32},
    "narrowest_columns": {"block_dv": 16, "q_in_registers": True},
    "narrow_loads": {"load_bytes": 8},
    "narrowest_loads": {"load_bytes": 2, "store_bytes": 2},
    "pairs": {"load_bytes": 4, "store_bytes": 4},
}
TILED_CASES = {
    "plain": Case(batch=1, seqlen_q=70, seqlen_k=150),
    "causal_bias": Case(batch=1, seqlen_q=70, seqlen_k=150, causal=True, bias="bhqk", softcap=3.0),
    "packed": Case(sequences=((40, 70), (5, 0), (1, 90)), window=(20, 5)),
}


@pytest.mark.parametrize(
    ("tile", "name"),
    [
        (tile, name)
        for i, tile in enumerate(TILES)
        for j, name in enumerate(TILED_CASES)
        if name == "plain" or (i + j) % 2 == 0
    ],
)
def test_tiles(device: Any, tile: str, name: str) -> None:
    case = TILED_CASES[name]
    check(device, tiled(case, **TILES[tile]))


@pytest.mark.parametrize("tile", ["16x16_1_warp", "64x80", "narrow_columns"])
def test_tiles_of_split_keys(device: Any, tile: str) -> None:
    case = TILED_CASES["plain"]
    check(device, tiled(case, num_splits=3, **TILES[tile]))


@pytest.mark.parametrize("tile", ["16x16_1_warp", "32x48_2_warps", "one_stage", "q_in_registers"])
@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(40, 104), (128, 128)])
def test_tiles_of_other_heads(device: Any, tile: str, head_dim: int, head_dim_v: int) -> None:
    case = TILED_CASES["plain"].but(head_dim=head_dim, head_dim_v=head_dim_v)
    check(device, tiled(case, **TILES[tile]))
