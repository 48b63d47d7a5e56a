"""The kernels that list a mask's tiles, alone on the emulated device: against all pairs, and against the host."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cuflash import CuflashError, masks, records
from cuflash.emulator import Device
from cuflash.masks.program import Program
from cuflash.masks.steps import Lengths, Place
from cuflash.plan.params import MAX_TABLES
from cuflash.plan.tile_lists import TileListPlan, plan_backward_lists, plan_forward_lists
from cuflash.problem import Problem
from tests.kernels.launch import ARCH, launch
from tests.masks.cases import CASES, formula
from tests.masks.expressions import BATCH, HEADS, TABLE_LENGTH, compiled, truth

EMPTY, PARTIAL, FULL = 0, 1, 2


class Asked(NamedTuple):
    """Lengths of every sequence, whose heads are as many of queries as given and fewer of keys; tiles of any size."""

    lengths: tuple[tuple[int, int], ...]
    block_m: int
    block_n: int
    num_heads: int = 1
    num_kv_heads: int = 1
    packed: bool = False
    tail: tuple[int, int] = (0, 0)  # tokens behind the last sequence

    @property
    def ends(self) -> tuple[np.ndarray, np.ndarray]:
        """cu_seqlens of queries and of keys."""
        q, k = (np.cumsum([0, *side]).astype(np.int32) for side in zip(*self.lengths, strict=True))
        return q, k

    def problem(self, mask: Program) -> Problem:
        longest = [max(side) for side in zip(*self.lengths, strict=True)]
        totals = [int(ends[-1]) + more for ends, more in zip(self.ends, self.tail, strict=True)]
        packed: dict[str, Any] = dict(zip(("total_q", "total_k"), totals, strict=True)) if self.packed else {}
        return Problem(
            len(self.lengths), *longest, self.num_heads, self.num_kv_heads, 16, 16, "float16", 1.0, mask=mask, **packed
        )  # fmt: skip

    def tiles(self, axis: int) -> int:
        """Tiles of one head of one batch entry; packed: slots of one head in all."""
        block = (self.block_m, self.block_n)[axis]
        if self.packed:
            return (int(self.ends[axis][-1]) + self.tail[axis]) // block + len(self.lengths) + 1
        return -(-self.lengths[0][axis] // block)

    def first_slot(self, axis: int, sequence: int) -> int:
        return int(self.ends[axis][sequence]) // (self.block_m, self.block_n)[axis] + sequence if self.packed else 0


class Run(NamedTuple):
    lists: np.ndarray
    counts: np.ndarray
    turns: np.ndarray | None
    reports: list[Any]


def run(mask: masks.Mask, asked: Asked, backward: bool = False, **scheduling: Any) -> Run:
    """What the kernels leave in memory; -1 where they write nothing."""
    device, problem = Device(ARCH, **scheduling), asked.problem(mask.program)
    config: Any = SimpleNamespace(block_m=asked.block_m, block_n=asked.block_n, mask=problem.mask_code, paged=False)
    if backward:
        plan = plan_backward_lists(problem, config, asked.tiles(0), asked.tiles(1))
    else:
        plan = plan_forward_lists(problem, config, asked.tiles(0))
    record = records.tile_list_record(problem, plan)
    tables = [device.to_device(table.array, name=f"mask_{table.name}").pointer for table in mask.program.tables]
    record["mask_tables"] = tables + [0] * (MAX_TABLES - len(tables))
    for name, ends in zip(("cu_seqlens_q", "cu_seqlens_k"), asked.ends, strict=True):
        record[name] = device.to_device(ends, name=name).pointer if asked.packed else 0
    arrays = [_filled(device, shape, name) for name, shape in _shapes(plan).items()]
    for array in arrays:
        record[array.name] = array.pointer
    reports = [launch(device, planned, record) for planned in plan.launches]
    return Run(*(array.to_host() for array in arrays), *[None] * (3 - len(arrays)), reports)


def _shapes(plan: TileListPlan) -> dict[str, tuple[int, ...]]:
    shapes = {"lists": plan.list_shape, "counts": plan.count_shape}
    return shapes if plan.turn_shape is None else shapes | {"turns": plan.turn_shape}


def _filled(device: Device, shape: tuple[int, ...], name: str) -> Any:
    return device.to_device(np.full(shape, -1, np.int32), name=name)


def shown(mask: masks.Mask, asked: Asked) -> list[np.ndarray]:
    """Of every sequence the visible pairs, bool (num_heads, len_q, len_k), one by one."""
    group, result = asked.num_heads // asked.num_kv_heads, []
    heads = np.arange(asked.num_heads)[:, None, None]
    for i, (len_q, len_k) in enumerate(asked.lengths):
        starts = [int(ends[i]) if asked.packed else 0 for ends in asked.ends]
        place = Place(len_q, len_k, i, heads, heads // group, *starts)
        visible = mask.program.visible(place.indices(np.arange(len_q)[:, None], np.arange(len_k)))
        result.append(np.broadcast_to(visible, (asked.num_heads, len_q, len_k)))
    return result


def verdict(pairs: np.ndarray, block_n: int) -> int:
    if not pairs.any():
        return EMPTY
    return FULL if pairs.all() and pairs.shape[1] == block_n else PARTIAL


def verdicts(pairs: np.ndarray, asked: Asked) -> np.ndarray:
    """(query tiles, key tiles) of one head."""
    rows, keys = (range(0, n, block) for n, block in zip(pairs.shape, asked[1:3], strict=True))
    tiles = [[verdict(pairs[i : i + asked.block_m, j : j + asked.block_n], asked.block_n) for j in keys] for i in rows]
    return np.array(tiles, int).reshape(len(rows), len(keys))


def hold_to_pairs(mask: masks.Mask, asked: Asked, **scheduling: Any) -> None:
    """Forward and backward lists are those of a look at every pair, and of the host's verdicts."""
    pairs, program = shown(mask, asked), mask.program
    program.check(asked.problem(program).lengths)
    found = [[verdicts(of_head, asked) for of_head in of_sequence] for of_sequence in pairs]
    for i, (len_q, len_k) in enumerate(asked.lengths):
        starts = [int(ends[i]) if asked.packed else 0 for ends in asked.ends]
        for head in range(asked.num_heads):
            place = Place(len_q, len_k, i, head, head // (asked.num_heads // asked.num_kv_heads), *starts)
            np.testing.assert_array_equal(program.verdicts(place, *asked[1:3]), found[i][head])
    _hold_rows(program, asked, found, run(mask, asked, **scheduling))
    if all(asked.tiles(axis) for axis in (0, 1)):
        _hold_columns(program, asked, found, run(mask, asked, backward=True, **scheduling))


def _hold_rows(program: Program, asked: Asked, found: list[list[np.ndarray]], got: Run) -> None:
    for i, of_sequence in enumerate(found):
        batch, first = i if program.by_batch and not asked.packed else 0, asked.first_slot(0, i)
        for head, tiles in enumerate(of_sequence):
            for row, verdicts_of_row in enumerate(tiles):
                at = batch, head if program.by_head else 0, first + row
                partial, full = (np.flatnonzero(verdicts_of_row == kind) for kind in (PARTIAL, FULL))
                assert got.counts[at].tolist() == [len(partial), len(full)]
                want = np.full(got.lists.shape[-1], -1)
                want[: len(partial)] = partial
                want[len(want) - len(full) :] = full[::-1]
                np.testing.assert_array_equal(got.lists[at], want)


def _hold_columns(program: Program, asked: Asked, found: list[list[np.ndarray]], got: Run) -> None:
    """Entries: the query tile, from the last to the first; twice the rank of the key tile in its row, and a flag."""
    group = asked.num_heads // asked.num_kv_heads if program.by_head else 1
    for i, of_sequence in enumerate(found):
        batch, first = i if program.by_batch and not asked.packed else 0, asked.first_slot(1, i)
        for kv_head in range(asked.num_kv_heads if program.by_head else 1):
            for column in range(of_sequence[0].shape[1]):
                at, want = (batch, kv_head, first + column), []
                for h in range(group):
                    tiles = of_sequence[kv_head * group + h]
                    for row in reversed(range(len(tiles))):
                        if tiles[row, column] != EMPTY:
                            turn = np.count_nonzero(tiles[row, :column])
                            want.append([h * asked.tiles(0) + row, 2 * turn + (tiles[row, column] == PARTIAL)])
                assert got.counts[at] == len(want)
                np.testing.assert_array_equal(got.lists[at][: len(want)], np.reshape(want, (-1, 2)))
                assert (got.lists[at][len(want) :] == -1).all()


SMALL = Asked(((70, 90),), 16, 16)


@pytest.mark.parametrize("name", CASES)
def test_built_in_masks(name: str) -> None:
    for asked in (SMALL, Asked(((97, 131),), 64, 32), Asked(((131, 97),), 13, 29)):
        mask = CASES[name].mask(*asked.lengths[0])
        np.testing.assert_array_equal(shown(mask, asked)[0][0], formula(CASES[name], *asked.lengths[0]))
        hold_to_pairs(mask, asked)


@pytest.mark.parametrize("lengths", [(1, 1), (1, 300), (300, 1), (16, 16), (17, 15), (64, 33), (5, 0)], ids=str)
@pytest.mark.parametrize("blocks", [(16, 16), (64, 32), (3, 5)], ids=str)
def test_lengths(lengths: tuple[int, int], blocks: tuple[int, int]) -> None:
    asked = Asked((lengths,), *blocks)
    hold_to_pairs(masks.SlidingWindow(20, 5) & ~masks.Dilated(7), asked)
    hold_to_pairs(masks.SlidingWindow(None, None), asked)


def test_more_tiles_than_threads() -> None:
    """Each turn of the kernels' loops decides 256, or 128, tiles: partial ones, full ones and empty ones in each."""
    mask = masks.where(lambda batch, head, q, k: (k // 3 % 3 < 2) & ((k // 9 + q // 2) % 4 != 1) | (k % 9 == 4))
    hold_to_pairs(mask, Asked(((7, 2000),), 2, 3))
    hold_to_pairs(mask, Asked(((900, 20),), 2, 3))


HEADS_OF = masks.where(lambda batch, head, q, k: (q + 3 * k + 5 * head + 7 * batch) // 8 % 3 == 0)
BY_HEAD = masks.where(lambda batch, head, q, k: (q // 16 + k // 16) % 4 == head)
BY_BATCH = masks.where(lambda batch, head, q, k: q // 16 * batch <= k // 16)


@pytest.mark.parametrize("mask", [HEADS_OF, BY_HEAD, BY_BATCH], ids=["both", "heads", "batch"])
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (4, 2), (3, 1)], ids=str)
def test_heads_and_entries(mask: masks.Mask, heads: tuple[int, int]) -> None:
    hold_to_pairs(mask, Asked(((70, 50),) * 2, 16, 16, *heads))


def test_kv_heads() -> None:
    class OfPairs(masks.Mask):
        def _visible(self, at: Any) -> Any:
            return (at.q // 16 + at.k // 16 + at.kv_head) % 3 == 0

    hold_to_pairs(OfPairs(), Asked(((70, 50),), 16, 16, 4, 2))


PACKED = (
    ((20, 40), (0, 5), (5, 0), (33, 17)),
    ((0, 0), (1, 130)),
    ((16, 16), (16, 32), (48, 1)),
    ((3, 0), (0, 3)),
)


@pytest.mark.parametrize("lengths", PACKED, ids=str)
@pytest.mark.parametrize("mask", [masks.Causal(), HEADS_OF, ~masks.SlidingWindow(3, 30)], ids=["causal", "own", "far"])
def test_packed(lengths: tuple[tuple[int, int], ...], mask: masks.Mask) -> None:
    for tail in ((0, 0), (3, 20)):
        hold_to_pairs(mask, Asked(lengths, 16, 16, 2, 1, True, tail))


def test_tokens_of_packed_sequences() -> None:
    """q_token and k_token count through all sequences."""

    class Chunks(masks.Mask):
        def _visible(self, at: Any) -> Any:
            return (at.q_token // 10 == at.k_token // 10) | (at.k == at.len_k - 1) & (at.q < at.len_q // 2)

    hold_to_pairs(Chunks(), Asked(PACKED[0], 8, 8, packed=True, tail=(3, 20)))


RNG = np.random.default_rng(5)
SIGNED, SIZES = RNG.integers(-50, 50, (70, 70)), RNG.integers(1, 5, (70, 70))
LARGE = RNG.integers(-(2**61), 2**61, (70, 70))
REALS = np.where(RNG.random((70, 70)) < 0.3, np.nan, RNG.normal(size=(70, 70)))
INFINITE = np.where(RNG.random((70, 70)) < 0.3, np.inf, REALS)
OF_HEADS = np.array([np.nan, 1.0])

# What intervals know too little of, or nothing: none of it may decide a tile wrongly.
HARD = {
    "squares of lookups": lambda batch, head, q, k: (SIGNED[q, k] - SIGNED[k, q]) ** 2 + SIGNED[k, k] ** 2 < 900,
    "square of lookups": lambda batch, head, q, k: (SIGNED[q, k] - SIGNED[k, q]) ** 2 < 900,
    "cubes of lookups": lambda batch, head, q, k: SIGNED[q, k] ** 3 - SIGNED[k, q] ** 3 < 5,
    "wide differences": lambda batch, head, q, k: LARGE[q, k] - LARGE[k, q] < 5,
    "wide sums": lambda batch, head, q, k: LARGE[q, k] + LARGE[k, q] < 5,
    "wide negation": lambda batch, head, q, k: abs(-LARGE[q, k]) < abs(LARGE[k, q]),
    "divisor of lookups": lambda batch, head, q, k: q // SIZES[q, k] == 5,
    "modulus of lookups": lambda batch, head, q, k: (q % SIZES[q, k]) * 2**40 <= 2**40,
    "shift by lookups": lambda batch, head, q, k: (q << SIZES[q, k]) < 70,
    "shift back by lookups": lambda batch, head, q, k: ((q - 40) >> SIZES[q, k]) < 3,
    "bits of either sign": lambda batch, head, q, k: ((q - k) | (k - q)) + 1 > -2,
    "bits of lookups": lambda batch, head, q, k: (SIGNED[q, k] & SIGNED[k, q]) + 2**31 > 2**31,
    "inverse": lambda batch, head, q, k: ~(q - k) + 1 < 3,
    "exclusive or": lambda batch, head, q, k: (q ^ k) - 16 < 16,
    "shift of a truth": lambda batch, head, q, k: ((q < k) << 40) < 5,
    "shift beyond an int": lambda batch, head, q, k: (q >> 40) + ((q & 0) << 40) == k // 50,
    "what cancels": lambda batch, head, q, k: ((q - k) + (k - q) == 0) & (k // 16 % 2 == 0),
    "magnitude of NaN": lambda batch, head, q, k: abs(OF_HEADS[head]) > -1,
    "choice of NaN": lambda batch, head, q, k: np.where(q < 5, OF_HEADS[head], 1.0) < 2,
    "least of NaN": lambda batch, head, q, k: np.minimum(OF_HEADS[head], q * 0.5) < 60,
    "most of NaN": lambda batch, head, q, k: np.maximum(OF_HEADS[head], q * 0.5) < 60,
    "not NaN": lambda batch, head, q, k: (REALS[q, k] <= np.inf) & (-np.inf <= REALS[k, q]),
    "neither": lambda batch, head, q, k: ~(REALS[q, k] <= 0) & ~(REALS[q, k] > 0) | (q == k),
    "sum of infinities": lambda batch, head, q, k: INFINITE[q, k] - INFINITE[k, q] < np.inf,
    "product of infinities": lambda batch, head, q, k: INFINITE[q, k] * (k - 30) * 0.0 < 1,
    "quotient": lambda batch, head, q, k: (q - 3) / (k - 30) <= np.inf,
    "quotient of lookups": lambda batch, head, q, k: 1 / INFINITE[q, k] < q / 30 - 1,
}


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("blocks", [(1, 16), (16, 16), (32, 32)], ids=str)  # of the last no array is looked at
def test_what_intervals_do_not_know(name: str, blocks: tuple[int, int]) -> None:
    hold_to_pairs(masks.where(HARD[name]), Asked(((50, 70),), *blocks, 2, 2))


LABELS, GRID = RNG.integers(0, 4, (50, 70)), RNG.random((4, 4)) < 0.6
WORDS, BUCKETS = RNG.integers(0, 2**30, (50, 70)), RNG.random(4) < 0.6


@pytest.mark.parametrize("block", [16, 32])
def test_lookups_of_lookups(block: int) -> None:
    """Of 256 elements a tile's bounds are known, of more nothing is: every index may be any."""
    for function in (
        lambda batch, head, q, k: GRID[LABELS[q, k], LABELS[49 - q, k]],
        lambda batch, head, q, k: GRID[LABELS[q, k] ** 3 // 9, 3 - LABELS[q, k]],
        lambda batch, head, q, k: BUCKETS[WORDS[q, k] >> 28],
        lambda batch, head, q, k: BUCKETS[np.maximum(LABELS[q, k], -2)],
        lambda batch, head, q, k: GRID[LABELS[q, k] // 2**24, abs(LABELS[q, k]) >> 24],  # of any number few indices
    ):
        hold_to_pairs(masks.where(function), Asked(((50, 70),), block, block))


@settings(max_examples=40)
@given(
    truth,
    st.tuples(st.integers(1, TABLE_LENGTH), st.integers(1, TABLE_LENGTH)),
    st.tuples(st.integers(1, 6), st.integers(1, 6)),
    st.sampled_from([(HEADS, HEADS), (HEADS, 1)]),
)
def test_random_functions(text: str, lengths: tuple[int, int], blocks: tuple[int, int], heads: tuple[int, int]) -> None:
    asked = Asked((lengths,) * BATCH, *blocks, *heads)
    try:
        mask = masks.where(compiled(text))
        mask.program.check(asked.problem(mask.program).lengths)
    except CuflashError:  # a number that leaves int64, too many constants
        assume(False)
    hold_to_pairs(mask, asked)


ONE_PAIR = {  # that differs from all others of the mask; intervals know of it, or nothing
    "known": lambda i, j: lambda batch, head, q, k: (q == i) & (k == j),
    "unknown": lambda i, j: lambda batch, head, q, k: abs(q - i) + abs(k - j) + (q - k) + (k - q) == 0,
}


@pytest.mark.parametrize("known", ONE_PAIR)
@pytest.mark.parametrize("blocks", [(128, 48), (64, 128), (128, 64), (32, 16), (13, 29), (2, 3), (16, 272)], ids=str)
def test_a_pair_of_a_tile(known: str, blocks: tuple[int, int]) -> None:
    """Wherever it lies in a tile, and in the last ones of either axis, it makes that tile partial and no other."""
    asked = Asked(((150, 300),), *blocks)
    rng = np.random.default_rng(0)
    for i, j in [(0, 0), (149, 299), (127, 47), *rng.integers((150, 300), size=(6, 2)).tolist()]:
        mask = masks.where(ONE_PAIR[known](i, j))
        hold_to_pairs(mask, asked)
        hold_to_pairs(~mask, asked)


def test_open_tiles_cost_little() -> None:
    """The edges of a window take less than half as many instructions as what intervals decide at once."""
    asked = Asked(((16384, 16384),), 128, 48)
    causal, window = (
        sum(run(mask, asked).reports[0].warp_instructions.values())
        for mask in (masks.Causal(), masks.SlidingWindow(511, 0))
    )
    assert window < 1.5 * causal


@pytest.mark.parametrize("warp_order", [None, 0, 1])
def test_any_order_of_warps(warp_order: int | None) -> None:
    """Masks that intervals decide nowhere, so that warps look at pairs for unlike times."""
    hold_to_pairs(masks.where(HARD["divisor of lookups"]), Asked(((40, 70),), 4, 3), warp_order=warp_order)
    hold_to_pairs(HEADS_OF, Asked(((70, 50),) * 2, 16, 16, 4, 2), warp_order=warp_order)


def test_arrays_are_read_where_intervals_need_them() -> None:
    """An element that decides a whole tile is read once a tile; a window and a butterfly read nothing."""
    asked = Asked(((80, 96),), 16, 16)
    (report,) = run(masks.Blocks(RNG.random((5, 6)) < 0.5, 16), asked).reports
    assert report.read_by_array == {"mask_matrix": 5 * 6}
    (report,) = run(masks.SlidingWindow(20, 3) | masks.Butterfly(16), asked).reports
    assert report.global_read == 0


def test_few_elements_of_an_array_bound_a_tile() -> None:
    """The documents of a tile's tokens decide it: no pair is looked at where none of its documents is another's."""
    asked = Asked(((128, 128),), 16, 16)
    (report,) = run(masks.Documents(np.repeat(np.arange(4), 32)), asked).reports
    assert report.read_by_array == {"mask_q_ids": 8 * 8 * (16 + 16) * 4}


def test_wide_masks_are_computed_in_64_bits() -> None:
    mask = masks.where(lambda batch, head, q, k: (q * 2**40 - k * 2**39) // 2**39 % 7 < 3)
    asked = Asked(((70, 50),), 16, 16)
    assert mask.program.wide(asked.problem(mask.program).lengths)
    assert "using Whole = i64" in asked.problem(mask.program).mask_code
    hold_to_pairs(mask, asked)
    assert not masks.Causal().program.wide(Lengths(1, 1, 1, 70, 50))
