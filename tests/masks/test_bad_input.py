"""Arguments of masks and combinations that cannot be: typed errors that say what to write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import cuflash
from cuflash import InvalidDtypeError, InvalidShapeError, InvalidTypeError, InvalidValueError, masks

ids = np.arange(5)
on = np.ones((2, 2), bool)

CONSTRUCTORS: list[tuple[Callable[[], Any], type, str]] = [
    (lambda: masks.SlidingWindow(-1, 0), InvalidValueError, "left = -1: must be >= 0 or None"),
    (lambda: masks.SlidingWindow(0, 1.5), InvalidTypeError, "right = 1.5: must be an integer >= 0 or None"),
    (lambda: masks.SlidingWindow(True, 0), InvalidTypeError, "left = True: must be an integer >= 0 or None"),
    (lambda: masks.SlidingWindow(2**62, 0), InvalidValueError, "left = 4611686018427387904: must be below 2"),
    (lambda: masks.Documents([0, 1]), InvalidTypeError, "q_ids is a list: must be an array"),
    (lambda: masks.Documents(ids * 1.5), InvalidDtypeError, "q_ids.dtype = float64: must be an integer dtype"),
    (lambda: masks.Documents(ids, ids * 1j), InvalidDtypeError, "k_ids.dtype = complex128: must be bool, an"),
    (lambda: masks.Documents(np.zeros((1, 1, 5), int)), InvalidShapeError,
     r"q_ids.shape = \(1, 1, 5\): must be \(seqlen,\) or \(batch, seqlen\)"),
    (lambda: masks.Documents(np.array(3)), InvalidShapeError, r"q_ids.shape = \(\): must have 1 to 4 axes"),
    (lambda: masks.Documents(np.ma.array(ids)), InvalidTypeError, "q_ids is a .*MaskedArray: must be a plain array"),
    (lambda: masks.PrefixLM(-1), InvalidValueError, "length = -1: must be >= 0"),
    (lambda: masks.PrefixLM(ids / 2), InvalidDtypeError, "length.dtype = float64: must be an integer dtype"),
    (lambda: masks.PrefixLM(ids[None]), InvalidShapeError, r"length.shape = \(1, 5\): must be \(batch,\)"),
    (lambda: masks.Dilated(0), InvalidValueError, "step = 0: must be >= 1"),
    (lambda: masks.Dilated(2, -1), InvalidValueError, "left = -1: must be >= 0 or None"),
    (lambda: masks.Dilated(2, 2**61), InvalidValueError, "left . step = 4611686018427387904: must be below 2"),
    (lambda: masks.GlobalTokens(-1), InvalidValueError, "tokens = -1: must be >= 0 or an array of positions"),
    (lambda: masks.GlobalTokens([1, 2]), InvalidTypeError, r"tokens = \[1, 2\]: must be an integer"),
    (lambda: masks.GlobalTokens(ids - 1), InvalidValueError, r"tokens = .*: must be \(number of tokens,\), each >= 0"),
    (lambda: masks.GlobalTokens(ids[None]), InvalidValueError, r"tokens = .*: must be \(number of tokens,\), each"),
    (lambda: masks.GlobalTokens(ids > 2), InvalidTypeError, "tokens = <bool .*: must be a host array of integers"),
    (lambda: masks.Butterfly(15), InvalidValueError, "block_size = 15: must be >= 16"),
    (lambda: masks.Butterfly(64.0), InvalidTypeError, "block_size = 64.0: must be an integer >= 16"),
    (lambda: masks.RandomBlocks(64, 64, 16), InvalidValueError,
     "blocks_per_row = None, share = None: exactly one of them must be given"),
    (lambda: masks.RandomBlocks(64, 64, 16, 1, 0.5), InvalidValueError, "exactly one of them must be given"),
    (lambda: masks.RandomBlocks(64, 64, 16, share=1.5), InvalidValueError, "share = 1.5: must be a number, 0 to 1"),
    (lambda: masks.RandomBlocks(64, 64, 16, share="a"), InvalidValueError, "share = 'a': must be a number, 0 to 1"),
    (lambda: masks.RandomBlocks(64, 64, 16, share=float("nan")), InvalidValueError, "share = nan: must be a number"),
    (lambda: masks.RandomBlocks(0, 64, 16, 1), InvalidValueError, "seqlen_q = 0: must be >= 1"),
    (lambda: masks.RandomBlocks(64, 64, 8, 1), InvalidValueError, "block_size = 8: must be >= 16"),
    (lambda: masks.RandomBlocks(64, 64, 16, 1, seed=-1), InvalidValueError, "seed = -1: must be >= 0"),
    (lambda: masks.BigBird(0), InvalidValueError, "seqlen = 0: must be >= 1"),
    (lambda: masks.BigBird(64, 8), InvalidValueError, "block_size = 8: must be >= 16"),
    (lambda: masks.BigBird(64, window_blocks=2), InvalidValueError, "window_blocks = 2: must be odd"),
    (lambda: masks.BigBird(64, random_blocks=-1), InvalidValueError, "random_blocks = -1: must be >= 0"),
    (lambda: masks.Blocks([[True]], 16), InvalidTypeError, r"matrix = \[\[True\]\]: must be a boolean array"),
    (lambda: masks.Blocks(on * 1, 16), InvalidDtypeError, "matrix.dtype = int64: must be bool; scores are added"),
    (lambda: masks.Blocks(on[0], 16), InvalidShapeError, r"matrix.shape = \(2,\): must be \(query blocks, key blocks"),
    (lambda: masks.Blocks(on, 8), InvalidValueError, "block_size = 8: must be >= 16"),
    (lambda: masks.Blocks(on, (16, 8)), InvalidValueError, r"block_size\[1\] = 8: must be >= 16"),
    (lambda: masks.Blocks(on, (16,)), InvalidTypeError, r"block_size = \(16,\): must be an integer or a pair of"),
    (lambda: masks.Dense(np.zeros((5, 5))), InvalidDtypeError, "array.dtype = float64: must be bool; scores are added"),
    (lambda: masks.Dense(lambda b, h, q, k: q < k), InvalidTypeError, "array = <function .*: must be a boolean array"),
    (lambda: masks.Dense(np.ones(5, bool)), InvalidShapeError, r"array.shape = \(5,\): must be \(seqlen_q, seqlen_k\)"),
]


@pytest.mark.parametrize(("make", "error", "message"), CONSTRUCTORS)
def test_constructors(make: Callable[[], Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        make()
    assert type(caught.value) is error


@pytest.mark.parametrize(
    ("combine", "text"),
    [
        (lambda mask: mask & on, r"mask & <bool \(2, 2\)>: must be a mask; a boolean array is one as masks.Dense"),
        (lambda mask: on & mask, r"mask & <bool \(2, 2\)>: must be a mask"),
        (lambda mask: mask | True, r"mask \| True: must be a mask"),
        (lambda mask: None | mask, r"mask \| None: must be a mask"),
        (lambda mask: mask & (lambda b, h, q, k: q < k), r"mask & <function .*a function of indices as masks.where"),
        (lambda mask: mask and mask, "a mask is neither true nor false: combine masks by &, | and ~"),
        (lambda mask: not mask, "a mask is neither true nor false"),
    ],
)
def test_combinations(combine: Callable[[Any], Any], text: str) -> None:
    with pytest.raises(InvalidTypeError, match=text):
        combine(masks.Causal())


@pytest.mark.parametrize(
    ("look", "error", "message"),
    [
        (lambda mask: mask.visible(-1), InvalidValueError, "seqlen_q = -1: must be >= 0"),
        (lambda mask: mask.visible(2.0), InvalidTypeError, "seqlen_q = 2.0: must be an integer >= 0"),
        (lambda mask: mask.density(2, batch=True), InvalidTypeError, "batch = True: must be an integer >= 0"),
        (lambda mask: mask.plot(0), InvalidValueError, "seqlen_q = 0, seqlen_k = 0: must be >= 1 to be drawn"),
        (lambda mask: mask.plot(5, head=-1), InvalidValueError, "head = -1: must be >= 0"),
    ],
)
def test_looking(look: Callable[[Any], Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        look(masks.Causal())


def test_a_head_that_the_mask_has_not() -> None:
    with pytest.raises(InvalidValueError, match="head = 2: must be below 2, what the mask is for"):
        masks.Dense(np.ones((2, 5, 5), bool)).plot(5, head=2)


def test_an_abstract_mask() -> None:
    with pytest.raises(cuflash.InvalidTypeError, match=r"Mask is abstract: use one of the masks of cuflash\.masks"):
        masks.Mask().visible(3)
