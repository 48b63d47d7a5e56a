"""What the public implementation of SCFA gets wrong, held here: pairs that its backward loses, tiles that it visits for
nothing, reads past the end, one head dimension, waiting for the GPU (`test_cuda_host.py`)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest

import cuflash
from cuflash import sparse, tokens
from cuflash.masks.steps import Place
from cuflash.plan.config import BackwardConfig, ForwardConfig
from tests import oracle, tolerances
from tests.devices import EmulatedDevice
from tests.sparse.cases import Case, Inputs, hold, make, visible

# Tokens, buckets, tile, how much likelier a bucket's queries are at one end of the sequence than at the other; its keys
# are likelier at the other end.
LOSING = {"small": (512, 8, 16, 100.0), "few": (256, 4, 16, 100.0), "large": (8192, 16, 128, 1000.0)}
UNIFORM = (8192, 16, 128, 1.0)


def skewed(length: int, buckets: int, drift: float, seed: int) -> np.ndarray:
    """Hashes (length,): even buckets get likelier along the sequence, odd ones less likely."""
    position = np.arange(length)[:, None] / length
    weights = np.where(np.arange(buckets) % 2, drift ** (1 - position), drift**position)
    thresholds = np.cumsum(weights / weights.sum(axis=1, keepdims=True), axis=1)
    return (np.random.default_rng(seed).random(length)[:, None] > thresholds[:, :-1]).sum(axis=1)


class Layout(NamedTuple):
    """Sorted queries and keys of one head: their hashes and tokens, and who sees whom."""

    q_hash: np.ndarray
    q_idx: np.ndarray
    k_hash: np.ndarray
    k_idx: np.ndarray
    seen: np.ndarray

    @classmethod
    def of(cls, q_hash: np.ndarray, k_hash: np.ndarray) -> Layout:
        q_idx, k_idx = (np.argsort(hashes, kind="stable") for hashes in (q_hash, k_hash))
        q_hash, k_hash = q_hash[q_idx], k_hash[k_idx]
        return cls(q_hash, q_idx, k_hash, k_idx, (q_hash[:, None] == k_hash) & (q_idx[:, None] >= k_idx))


class Visits(NamedTuple):
    lost_pairs: int
    tiles: int


def reference_backward(at: Layout, tile: int) -> Visits:
    """The reference's rule: a key tile starts behind the last query tile all of whose queries come before its keys."""
    tiles = [slice(i, i + tile) for i in range(0, len(at.q_idx), tile)]
    lost = visited = 0
    for keys in tiles:
        low, high = at.k_hash[keys].min(), at.k_hash[keys].max()
        shared = [i for i, q in enumerate(tiles) if at.q_hash[q].min() <= high and low <= at.q_hash[q].max()]
        behind = [i + 1 for i in shared if at.q_idx[tiles[i]].max() < at.k_idx[keys].min()]
        start = max(behind, default=0)
        lost += sum(int(at.seen[tiles[i], keys].sum()) for i in shared if i < start)
        visited += sum(i >= start for i in shared)
    return Visits(lost, visited)


def needed_tiles(seen: np.ndarray, tile: int) -> np.ndarray:
    """Which tiles hold a visible pair."""
    blocks = seen.reshape(seen.shape[0] // tile, tile, seen.shape[1] // tile, tile)
    return blocks.any(axis=(1, 3))


def hashes(layout: tuple[int, int, int, float], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    length, buckets, _, drift = layout
    return skewed(length, buckets, drift, seed), skewed(length, buckets, 1 / drift, seed + 1)


@pytest.mark.parametrize("name", LOSING)
def test_the_layouts_are_those_on_which_pairs_are_lost(name: str) -> None:
    at = Layout.of(*hashes(LOSING[name]))
    assert reference_backward(at, LOSING[name][2]).lost_pairs > 300


def test_none_are_lost_where_hashes_are_uniform() -> None:
    assert reference_backward(Layout.of(*hashes(UNIFORM)), UNIFORM[2]).lost_pairs == 0


@pytest.mark.parametrize("layout", [*LOSING.values(), UNIFORM], ids=[*LOSING, "uniform"])
def test_every_pair_is_seen_and_no_tile_is_visited_for_nothing(layout: tuple[int, int, int, float]) -> None:
    tile = layout[2]
    q_hash, k_hash = hashes(layout)
    by_q, by_k = (tokens.sort(None, x[None, :, None]) for x in (q_hash, k_hash))
    begin, end = ranges = tokens.visible_ranges(None, by_q, by_k, 1)
    at = Layout.of(q_hash, k_hash)
    assert (end - begin).sum() == at.seen.sum()
    mask = sparse._RANGES.bind(*ranges)
    verdicts = mask.verdicts(Place(layout[0], layout[0]), tile, tile)
    needed = needed_tiles(at.seen, tile)
    np.testing.assert_array_equal(verdicts > 0, needed)
    np.testing.assert_array_equal(verdicts == 2, needed & ~needed_tiles(~at.seen, tile))
    if layout is UNIFORM:
        assert reference_backward(at, tile).tiles > 1.2 * needed.sum()


def losing_inputs(name: str, dtype: str = "float32") -> tuple[Case, Inputs]:
    """Two heads of such a layout, of grouped queries."""
    length, buckets, *_ = LOSING[name]
    case = Case(dtype, 1, length, length, 2, 1, buckets=buckets)
    inputs = make(case)
    inputs.mark_q[0] = np.stack([hashes(LOSING[name], seed)[0] for seed in (0, 2)], axis=1)
    inputs.mark_k[0, :, 0] = hashes(LOSING[name])[1]
    return case, inputs


@pytest.mark.parametrize("name", ["small", "few"])
def test_results_on_such_layouts(device: Any, name: str) -> None:
    case, inputs = losing_inputs(name)
    out, lse = device.run(sparse.hash_sparse_attention, *inputs.arrays, return_lse=True)
    hold(case, inputs, out, lse)


@pytest.mark.parametrize("name", ["small", "few"])
def test_gradients_on_such_layouts(device: Any, name: str) -> None:
    _, inputs = losing_inputs(name)
    dout = np.random.default_rng(1).standard_normal(inputs.q.shape, dtype=np.float32)
    got = device.run(lambda *a: cuflash.vjp(sparse.hash_sparse_attention, *a[:-1])[1](a[-1]), *inputs.arrays, dout)
    arguments, seen = (inputs.q, inputs.k, inputs.v, dout), visible(inputs)
    want, standard = (f(*arguments, seen=seen) for f in (oracle.gradients, oracle.standard_gradients))
    tolerances.assert_gradients(got, want, standard, "float32")


def small_tiles(case: Case, tile: int) -> cuflash.Options:
    """Kernels of one warp and tiles as small as those of the layouts."""
    shared = {
        "dtype": case.dtype, "bias_dtype": "none", "head_dim": case.head_dim, "head_dim_v": case.head_dim_v,
        "block_m": tile, "block_n": tile, "block_dv": case.head_dim_v, "num_warps": tile // 16, "num_stages": 1,
        "load_bytes": 16, "store_bytes": 16, "windowed": False, "softcapped": False, "varlen": False,
    }  # fmt: skip
    return cuflash.Options(
        num_splits=1,
        config=ForwardConfig(**shared, q_in_registers=False, split=False),
        backward_config=BackwardConfig(**shared, block_d=case.head_dim, key_warps=tile // 16, deterministic=True),
    )


@pytest.mark.parametrize("kind", ["small", "few", "qk"])
def test_kernels_visit_the_tiles_that_are_needed(kind: str) -> None:
    """The bytes of keys that the forward kernel reads, and of queries that the backward kernel reads, are theirs."""
    if kind == "qk":
        tile, case = 16, Case("float16", 1, 250, 250, 2, 1, keep_q=0.3, keep_k=0.5)
        inputs = make(case)
    else:
        tile, (case, inputs) = LOSING[kind][2], losing_inputs(kind, "float16")
    device = EmulatedDevice()

    def both(*arrays: Any) -> Any:
        (out, lse), pullback = cuflash.vjp(case.function, *arrays, return_lse=True, options=small_tiles(case, tile))
        return out, lse, pullback((out, lse))

    out, lse, _ = device.run(both, *inputs.arrays)
    hold(case, inputs, out, lse)
    orders = [tokens.sort(None, marks) for marks in (inputs.mark_q, inputs.mark_k)]
    row = case.head_dim * 2
    of_keys = of_queries = 0
    for head in range(case.num_heads):
        seen = visible(inputs)[0, head][orders[0].order[0, head]][:, orders[1].order[0, 0]]
        if kind == "qk":  # an order of -1 is that of a dropped token, which nobody sees
            seen &= (orders[0].order[0, head] >= 0)[:, None] & (orders[1].order[0, 0] >= 0)
        padding = [(0, -n % tile) for n in seen.shape]
        q_tiles, k_tiles = np.nonzero(needed_tiles(np.pad(seen, padding), tile))
        of_keys += sum(min(tile, case.seqlen_k - tile * j) for j in k_tiles) * row
        of_queries += sum(min(tile, case.seqlen_q - tile * i) for i in q_tiles) * row
    by_kernel = {report.kernel.removeprefix("cuflash_").partition("_d")[0]: report for report in device.launches}
    assert by_kernel["forward"].read_by_array["k"] == by_kernel["forward"].read_by_array["v"] == of_keys
    assert by_kernel["backward"].read_by_array["q"] == by_kernel["backward"].read_by_array["d_o"] == of_queries


@pytest.mark.parametrize("kind", ["hash", "qk"])
@pytest.mark.parametrize("length", [1, 100, 131])
def test_nothing_behind_a_ragged_end_is_read(device: Any, kind: str, length: int) -> None:
    """NaN, and marks that would be seen, follow the last token of every array."""
    case = Case(buckets=3 if kind == "hash" else 0).of_length(length)
    inputs = make(case)
    longer = [np.concatenate((x, np.full_like(x[:, :1], np.nan).repeat(40, axis=1)), axis=1) for x in inputs.arrays[:3]]
    marks = [np.concatenate((x, np.ones_like(x[:, :1]).repeat(40, axis=1)), axis=1) for x in inputs.arrays[3:]]
    arrays = [x[:, :length] for x in (*longer, *marks)]
    out, lse = device.run(case.function, *arrays, return_lse=True)
    hold(case, inputs, out, lse)
    for gradient in device.run(lambda *a: (r := cuflash.vjp(case.function, *a))[1](r[0]), *arrays):
        assert np.isfinite(gradient.astype(np.float32)).all()
