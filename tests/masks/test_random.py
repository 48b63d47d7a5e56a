"""Random functions: what is traced is what Python computes pair by pair, in tiles, in intervals, as text and as C++."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cuflash import CuflashError, masks
from cuflash.masks.program import ELEMENTS, Program
from cuflash.masks.steps import Lengths, Place
from cuflash.masks.tiles import bounds
from tests.masks.cases import reduced
from tests.masks.cpp import evaluate
from tests.masks.expressions import BATCH, HEADS, TABLE_LENGTH, compiled, truth

lengths = st.tuples(st.integers(1, TABLE_LENGTH), st.integers(1, TABLE_LENGTH))
blocks = st.integers(1, TABLE_LENGTH)
many = settings(max_examples=300)


def traced(text: str, seqlen_q: int, seqlen_k: int) -> masks.Mask:
    """The mask, unless a number leaves int64, Python divides constants by zero, or there are too many of them."""
    try:
        mask = masks.where(compiled(text))
        mask.program.check(Lengths(BATCH, HEADS, HEADS, seqlen_q, seqlen_k))
    except (CuflashError, ZeroDivisionError):
        assume(False)
    return mask


def by_pairs(text: str, seqlen_q: int, seqlen_k: int) -> np.ndarray:
    """bool (BATCH, HEADS, seqlen_q, seqlen_k), of one call for each pair."""
    function = compiled(text)
    result = np.empty((BATCH, HEADS, seqlen_q, seqlen_k), bool)
    with np.errstate(all="ignore"):
        for indices in np.ndindex(result.shape):
            result[indices] = function(*map(np.int64, indices))
    return result


@many
@given(truth, lengths)
def test_pairs(text: str, lengths: tuple[int, int]) -> None:
    mask = traced(text, *lengths)
    visible = mask.visible(*lengths, batch=BATCH, num_heads=HEADS)
    np.testing.assert_array_equal(visible, by_pairs(text, *lengths))
    assert mask.program.by_batch or (visible == visible[:1]).all()
    assert mask.program.by_head or (visible == visible[:, :1]).all()
    assert mask.density(*lengths, batch=BATCH, num_heads=HEADS) == np.float64(visible.mean())


@many
@given(truth, lengths, blocks, blocks)
def test_tiles(text: str, lengths: tuple[int, int], block_m: int, block_n: int) -> None:
    mask = traced(text, *lengths)
    visible = mask.visible(*lengths, batch=BATCH, num_heads=HEADS)
    for batch in range(BATCH):
        for head in range(HEADS):
            got = mask.program.verdicts(Place(*lengths, batch, head, head), block_m, block_n)
            np.testing.assert_array_equal(got, reduced(visible[batch, head], block_m, block_n))


@many
@given(truth, lengths, st.lists(st.tuples(*[st.integers(0, TABLE_LENGTH - 1)] * 4), min_size=1, max_size=20))
def test_intervals_are_sound(text: str, lengths: tuple[int, int], corners: list[tuple[int, ...]]) -> None:
    """A box that is surely visible is, one that is surely not is not; one of a single pair without NaN is decided."""
    mask = traced(text, *lengths)
    visible = mask.visible(*lengths, batch=BATCH, num_heads=HEADS)[1, 2]
    q, k = (np.sort(np.minimum(np.array(corners)[:, i : i + 2], n - 1)) for i, n in ((0, lengths[0]), (2, lengths[1])))
    sides = bounds(mask.program, Place(*lengths, 1, 2, 2), (q[:, 0], q[:, 1]), (k[:, 0], k[:, 1]))
    surely, possibly = (np.broadcast_to(side, len(q)) for side in sides)
    assert (surely <= possibly).all()
    for i in range(len(q)):
        box = visible[q[i, 0] : q[i, 1] + 1, k[i, 0] : k[i, 1] + 1]
        assert box.all() or not surely[i]
        assert not box.any() or possibly[i]


@many
@given(truth, lengths)
def test_narrow_numbers_are_narrow(text: str, lengths: tuple[int, int]) -> None:
    """Unless the program says that it is wide, no number of any step leaves int32."""
    mask = traced(text, *lengths)
    values = zip(mask.program.steps, steps_of(mask.program, lengths), strict=True)
    largest = max((abs(value).max() for step, value in values if step.kind == "whole"), default=0)
    assert largest < 2**31 or mask.program.wide(Lengths(BATCH, HEADS, HEADS, *lengths))


def steps_of(program: Program, lengths: tuple[int, int]) -> list[Any]:
    """The values of all steps at all pairs."""
    b, h, q, k = np.ogrid[:BATCH, :HEADS, : lengths[0], : lengths[1]]
    at = Place(*lengths, b, h, h).indices(q, k)
    values: list[Any] = []
    for step in program.steps:
        arguments = [values[i] for i in step.arguments]
        if step.operation == "variable":
            values.append(np.asarray(getattr(at, step.value), np.int64))
        elif step.operation == "table":
            values.append(program.tables[step.value].array[tuple(arguments)])
        elif step.operation in ELEMENTS:
            with np.errstate(all="ignore"):
                values.append(ELEMENTS[step.operation](*arguments))
        else:
            values.append(program.constant(step))
    return values


@many
@given(truth, lengths)
def test_text(text: str, lengths: tuple[int, int]) -> None:
    """The text of a program, read as Python, is the same mask."""
    mask = traced(text, *lengths)
    assume("..." not in mask.program.text)
    again = traced(mask.program.text, *lengths)
    size = {"batch": BATCH, "num_heads": HEADS}
    np.testing.assert_array_equal(again.visible(*lengths, **size), mask.visible(*lengths, **size))


@many
@given(truth, lengths, st.booleans())
def test_code(text: str, lengths: tuple[int, int], wide: bool) -> None:
    """The C++ text, read operation by operation, shows the same pairs."""
    mask = traced(text, *lengths)
    visible = mask.visible(*lengths, batch=BATCH, num_heads=HEADS)
    b, h, q, k = np.ogrid[:BATCH, :HEADS, : lengths[0], : lengths[1]]
    got = evaluate(mask.program, wide, Place(*lengths, b, h, h).indices(q, k))
    np.testing.assert_array_equal(np.broadcast_to(got, visible.shape), visible)


NAMED = {
    "causal": masks.Causal(),
    "window": masks.SlidingWindow(3, 1),
    "dilated": masks.Dilated(3),
    "first": masks.GlobalTokens(2),
    "documents": masks.Documents(np.arange(20) // 3, np.arange(13) // 2),
    "function": masks.where(lambda batch, head, q, k: (q + k + head) % 3 == 0),
}
combinations = st.recursive(
    st.sampled_from(sorted(NAMED)),
    lambda inner: st.one_of(
        inner.map(lambda a: f"~({a})"), st.tuples(inner, st.sampled_from("&|"), inner).map(lambda t: f"({' '.join(t)})")
    ),
    max_leaves=6,
)


@many
@given(combinations, combinations)
def test_combinations(a: str, b: str) -> None:
    """Of masks as of their arrays, and the laws that follow."""
    arrays = {name: mask.visible(20, 13, num_heads=2) for name, mask in NAMED.items()}
    left, right = eval(a, dict(NAMED)), eval(b, dict(NAMED))

    def visible(mask: masks.Mask) -> np.ndarray:
        return mask.visible(20, 13, num_heads=2)

    np.testing.assert_array_equal(visible(left), eval(a, dict(arrays)))
    np.testing.assert_array_equal(visible(~(left & right)), visible(~left | ~right))
    np.testing.assert_array_equal(visible(~(left | right)), visible(~left & ~right))
    assert ~~left == left
    assert left & masks.SlidingWindow(None, None) == left
