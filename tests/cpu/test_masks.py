"""Masks on the CPU executor: which tiles are computed and masked, what is kept, what is not read, threads, memory."""

from __future__ import annotations

import gc
import itertools
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import cuflash
from cuflash import CuflashError, masks
from cuflash.cpu import backward, forward, visibility
from cuflash.cpu.visibility import Masked, Part, sight_of
from cuflash.masks.program import Program
from cuflash.masks.steps import Lengths, Place
from cuflash.masks.tiles import PARTIAL
from cuflash.problem import Problem
from tests.attention.cases import Case, call, check, hold_to_oracle, make, seen
from tests.devices import CpuDevice
from tests.gradients import cases as gradient_cases
from tests.masks.cases import CASES, reduced
from tests.masks.expressions import BATCH, HEADS, TABLE_LENGTH, compiled, truth

CPU = CpuDevice()
ROWS, TILE = 4, 8  # within `small_tiles`

# Four groups of 50 queries, three tiles of 80 keys.
CASE = Case(dtype="float32", batch=1, seqlen_q=197, seqlen_k=203, head_dim=128, head_dim_v=16)
OF_BOTH = masks.where(lambda batch, head, q, k: (q + 3 * k + 5 * head + 7 * batch) // 8 % 3 == 0)
ISLANDS = masks.where(lambda batch, head, q, k: (q // 8 + k // 16 + head) % 3 == 0)
STRIPES = masks.Dilated(3, 20, 0) | masks.GlobalTokens(2)
MASKS = {"both": OF_BOTH, "islands": ISLANDS, "stripes": STRIPES}

by_dtype = pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
by_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


@contextmanager
def small_tiles() -> Iterator[None]:
    """Groups of up to 4 queries, tiles of 8 keys, items of 4 groups: few tokens are many tiles."""
    tiles = {"keys_of_a_tile": lambda rows, dim: TILE}
    with (
        mock.patch.multiple(forward, MAX_ROWS=ROWS, MIN_ITEM_ROWS=16, MAX_ITEM_ROWS=16, **tiles),
        mock.patch.multiple(backward, MAX_BLOCK_GROUPS=2, **tiles),
    ):
        yield


def check_both(case: Case) -> None:
    check(CPU, case)
    gradient_cases.check(case)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("lengths", [(1, 1), (1, 203), (197, 1), (197, 203), (191, 113), (64, 128)], ids=str)
def test_built_in_masks(name: str, lengths: tuple[int, int]) -> None:
    check_both(CASE.of_lengths(*lengths).but(mask=CASES[name].mask(*lengths)))


@by_dtype
@by_mask
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_heads": 6, "num_kv_heads": 2, "batch": 2},
        {"bias": "bhqk"},
        {"bias": ".h.k", "softcap": 2.0},
        {"softcap": 3.0, "values": "scores_1e2"},
        {"causal": True, "window": (60, None)},
        {"sequences": ((70, 90), (5, 0), (0, 7), (101, 57), (1, 1)), "tail": (3, 20)},
    ],
    ids=str,
)
def test_with_everything_else(dtype: str, mask: masks.Mask, changes: dict[str, Any]) -> None:
    check_both(CASE.but(mask=mask, dtype=dtype, **changes))


@given(
    truth,
    st.tuples(st.integers(1, TABLE_LENGTH), st.integers(1, TABLE_LENGTH)),
    st.sampled_from([(HEADS, HEADS), (HEADS, 1)]),
    st.sampled_from(["float32", "float64"]),
)
def test_random_functions(text: str, lengths: tuple[int, int], heads: tuple[int, int], dtype: str) -> None:
    case = Case(dtype, *lengths, 8, 8, BATCH, *heads)
    try:
        case = case.but(mask=masks.where(compiled(text)))
        case.mask.program.check(Lengths(BATCH, *heads, *lengths))
    except CuflashError:  # a number that leaves int64, too many constants
        assume(False)
    with small_tiles():
        check_both(case)


class _Groups:
    """Counts how often an executor computes each group of queries against each tile of keys of each head."""

    def __init__(self, module: Any) -> None:
        self.computed: Counter[tuple[int, int, int]] = Counter()
        self._module, self._add = module, module._Item._add

    def __enter__(self) -> _Groups:
        def add(item: Any, tile: Any, part: Part, *more: Any) -> None:
            self.computed.update((item.head, group, part.tile) for group in range(part.first, part.last))
            self._add(item, tile, part, *more)

        self._patch = mock.patch.object(self._module._Item, "_add", add)
        self._patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.stop()

    def verdicts(self, case: Case) -> np.ndarray:
        """Of all heads: 1 or 2 where a product is needed."""
        shown = np.broadcast_to(seen(case), (1, case.num_heads, case.seqlen_q, case.seqlen_k))[0]
        return np.array([reduced(head, ROWS, TILE) for head in shown])


@pytest.mark.parametrize("name", [*MASKS, "causal", "documents", "nothing", "blocks"])
def test_every_tile_that_is_seen_is_computed_once_and_no_other(name: str) -> None:
    lengths = (76, 111)
    mask = MASKS[name] if name in MASKS else CASES[name].mask(*lengths)
    case = CASE.of_lengths(*lengths).but(num_heads=3, mask=mask)
    inputs = make(case)
    with small_tiles(), _Groups(forward) as forwards, _Groups(backward) as backwards:
        _, pullback = gradient_cases.vjp(case, inputs)
        pullback(gradient_cases.cotangent(case, inputs))
    needed = np.argwhere(forwards.verdicts(case) > 0)
    assert forwards.computed == Counter(map(tuple, needed.tolist()))
    assert backwards.computed == forwards.computed


@by_mask
def test_only_tiles_that_are_seen_in_part_are_evaluated(mask: masks.Mask) -> None:
    """And each of them once, whatever number of heads, entries of the batch, calls and passes needs it."""
    case = CASE.of_lengths(60, 80).but(mask=mask & masks.SlidingWindow(30, 30), num_heads=3, batch=2)
    evaluated: Counter[tuple[int, ...]] = Counter()
    evaluate = Masked._evaluate

    def count(self: Masked, index: int, groups: np.ndarray, keys: slice) -> np.ndarray:
        place = self._places[index]
        evaluated.update((place.batch, place.head, group, keys.start // TILE) for group in groups.tolist())
        return evaluate(self, index, groups, keys)

    with small_tiles(), mock.patch.object(Masked, "_evaluate", count):
        for _ in range(2):
            call(CPU, case, make(case))
    shown = seen(case)
    needed = {
        (batch, head, *at)
        for batch in range(shown.shape[0] if case.mask.program.by_batch else 1)
        for head in range(shown.shape[1] if case.mask.program.by_head else 1)
        for at in np.argwhere(reduced(shown[batch, head], ROWS, TILE) == PARTIAL).tolist()
    }
    assert evaluated == Counter(needed)


def test_verdicts_are_kept_with_the_mask() -> None:
    case = CASE.but(mask=masks.Causal() & STRIPES, num_heads=4, batch=3)
    inputs = make(case)
    with mock.patch.object(Program, "verdicts", autospec=True, side_effect=Program.verdicts) as verdicts:
        for _ in range(2):
            call(CPU, case, inputs)
        assert verdicts.call_count == 1
        call(CPU, case.of_lengths(100, 203), make(case.of_lengths(100, 203)))
        assert verdicts.call_count == 2
        packed = case.but(sequences=((90, 150), (33, 40), (90, 150)), batch=1)
        call(CPU, packed, make(packed))
        assert verdicts.call_count == 4


def test_what_is_kept_is_bounded() -> None:
    """Verdicts of many lengths, and bits of a mask every tile of which is seen in part."""
    mask = masks.where(lambda batch, head, q, k: (q + k + head + batch) % 2 == 0)
    case = CASE.but(mask=mask, num_heads=2, num_kv_heads=2)
    sizes = []
    with mock.patch.object(visibility, "MAX_KEPT", 10**5), mock.patch.object(visibility, "HIDDEN_BYTES", 16):
        for seqlen_q in range(160, 190):
            check(CPU, case.but(seqlen_q=seqlen_q))
            kept = mask.program.kept["cpu"].values()
            for sight in kept:
                bits = sum(bits.nbytes for _, bits in sight._kept.values())
                assert 0 < bits <= 16 * (seqlen_q + case.seqlen_k)
                assert bits + sight.verdicts.nbytes == sight.nbytes
            sizes.append(sum(sight.nbytes for sight in kept))
    assert max(sizes) < 10**5 + 2 * 16 * (190 + 203)  # what is made last grows once it is there
    assert sum(after < before for before, after in itertools.pairwise(sizes)) > 1


def test_nothing_is_kept_longer_than_the_mask() -> None:
    inputs = make(CASE)
    gc.disable()
    try:
        mask = masks.Documents(np.arange(197) // 50, np.arange(203) // 50) & STRIPES
        _, pullback = cuflash.vjp(cuflash.attention, *inputs[:3], mask=mask)
        pullback(np.ones((1, 197, 2, 16), np.float32))
        program = weakref.ref(mask.program)
        assert program().kept["cpu"]
        del mask, pullback
        assert program() is None
    finally:
        gc.enable()


@by_dtype
@pytest.mark.parametrize("spoilt", [np.nan, np.inf, -np.inf])
def test_unseen_keys_and_values_may_be_anything(dtype: str, spoilt: float) -> None:
    """Whole tiles of them, and some of tiles of which others are seen."""
    case = CASE.but(dtype=dtype, mask=masks.where(lambda batch, head, q, k: (k // 100 != 1) & (k % 3 > 0)))
    inputs = make(case)
    unseen = ~seen(case).any(axis=(0, 1, 2))
    k, v = inputs.k.copy(), inputs.v.copy()
    k[:, unseen] = v[:, unseen] = spoilt
    poisoned = inputs._replace(k=k, v=v)
    hold_to_oracle(case, inputs, *call(CPU, case, poisoned))
    given = gradient_cases.cotangent(case, inputs)
    gradient_cases.hold_to_oracle(case, inputs, given, gradient_cases.gradients(CPU, case, poisoned, given))


@by_dtype
def test_rows_that_see_nothing(dtype: str) -> None:
    """Whole groups of them, and some of groups of which others see keys."""
    case = CASE.but(dtype=dtype, mask=masks.where(lambda batch, head, q, k: (q // 60 != 1) & (q % 5 > 0) & (k > 8)))
    inputs = make(case)
    hidden = ~seen(case).any(axis=-1)[0, 0]
    out, lse = call(CPU, case, inputs)
    assert not out[:, hidden].any()
    assert np.isneginf(lse[..., hidden]).all()
    dq, dk, dv = gradient_cases.gradients(CPU, case, inputs, gradient_cases.cotangent(case, inputs))
    assert not dq[:, hidden].any()
    assert not dk[:, :9].any()
    assert not dv[:, :9].any()
    check_both(case)


@by_dtype
@pytest.mark.parametrize("changes", [{"batch": 2}, {"sequences": ((300, 200), (0, 9), (170, 301))}], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(dtype: str, changes: dict[str, Any], monkeypatch: Any) -> None:
    results = []
    for count in ("1", "2", "7"):
        monkeypatch.setenv("OMP_NUM_THREADS", count)
        mask = masks.where(lambda batch, head, q, k: (q + 3 * k + 5 * head) // 8 % 3 == 0)  # nothing of it is kept
        case = CASE.but(dtype=dtype, mask=mask, seqlen_q=500, seqlen_k=400, num_heads=4, bias="qk", **changes)
        inputs = make(case)
        given = gradient_cases.cotangent(case, inputs)
        results.append((*call(CPU, case, inputs), *gradient_cases.gradients(CPU, case, inputs, given)))
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            np.testing.assert_array_equal(got, want)


def test_calls_at_the_same_time_share_a_mask() -> None:
    case = CASE.but(mask=masks.where(lambda batch, head, q, k: (q + 3 * k + 5 * head) // 8 % 3 == 0), num_heads=4)
    inputs = make(case)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: call(CPU, case, inputs), range(12)))
    hold_to_oracle(case, inputs, *results[0])
    for out, lse in results[1:]:
        np.testing.assert_array_equal(out, results[0][0])
        np.testing.assert_array_equal(lse, results[0][1])


@pytest.mark.parametrize(
    ("mask", "window"), [(masks.Causal(), (None, 0)), (masks.SlidingWindow(13, 4), (13, 4))], ids=["causal", "window"]
)
def test_a_window_gives_the_same_parts(mask: masks.Mask, window: tuple[int | None, int]) -> None:
    """Groups and tiles that are computed, and what is hidden of them, as the mask of the window has them."""
    for len_q, len_k in ((40, 56), (56, 40), (41, 55)):
        problem = Problem(1, len_q, len_k, 1, 1, 8, 8, "float32", 1.0, left=window[0], right=window[1])
        by_window = sight_of(problem, Place(len_q, len_k), 0, ROWS, TILE)
        shown = mask.visible(len_q, len_k)[0, 0]
        got = np.zeros_like(shown)
        for part in by_window.parts(0, 0, -(-len_q // ROWS)):
            own: np.ndarray = np.ones((part.last - part.first, ROWS, part.keys.stop - part.keys.start), bool)
            for groups, hidden in by_window.hidden(0, part):
                own[groups][hidden] = False
            rows = slice(part.first * ROWS, min(part.last * ROWS, len_q))
            assert not got[rows, part.keys].any()
            got[rows, part.keys] = own.reshape(-1, own.shape[2])[: rows.stop - rows.start]
        np.testing.assert_array_equal(got, shown)


def test_arrays_on_a_gpu_are_an_error_before_anything_is_written() -> None:
    mask = masks.Documents(np.zeros(197, np.int32), np.zeros(203, np.int32))
    inputs = make(CASE)
    out = np.full((1, 197, 2, 16), 7, np.float32)
    table = type("cupy", (), {"on_host": False, "name": "k_ids"})()
    with (
        mock.patch.object(mask.program, "tables", (mask.program.tables[0], table)),
        mock.patch.object(Program, "check"),
        pytest.raises(cuflash.DeviceError, match="captured array 'k_ids' is on a GPU: must be a NumPy array"),
    ):
        cuflash.attention(*inputs[:3], mask=mask, out=out)
    assert (out == 7).all()


MEMORY = """
import resource
import numpy as np
import cuflash

length, heads, dim = 32768, 4, 64
rng = np.random.default_rng(0)
q = rng.standard_normal((1, 64, heads, dim), dtype=np.float32)
q = np.ascontiguousarray(np.broadcast_to(q, (length // 64, 64, heads, dim))).reshape(1, length, heads, dim)
k, v, out = (q.copy() for _ in range(3))
mask = cuflash.masks.SlidingWindow(1023, 0) | cuflash.masks.GlobalTokens(64) & cuflash.masks.Causal()
small = slice(None), slice(64)
cuflash.attention(q[small], k[small], v[small], mask=mask)  # BLAS takes its own buffers when it is first used
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
cuflash.attention(q, k, v, mask=mask, out=out)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_memory_is_linear() -> None:
    """Beyond inputs and outputs under 64 MB at 32768 tokens, 4 heads of 64 and 2 threads."""
    command = [sys.executable, "-c", MEMORY]
    environment = {"OMP_NUM_THREADS": "2", "PYTHONPATH": ":".join(sys.path)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert float(result.stdout) < 64
