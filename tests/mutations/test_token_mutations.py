"""Every fault planted in the kernels that sort and move tokens is caught; the kernels as they are pass."""

from __future__ import annotations

import numpy as np
import pytest

from cuflash import tokens
from cuflash.device.emulated import EmulatedDevice
from cuflash.jit import sources
from tests.mutations.mutate import Mutation, WrongResult, kernels_from
from tests.mutations.token_faults import MUTATIONS


def check() -> None:
    """Sorts of one digit and of two, signed and by keeping, the ranges that follow, and moves; two orders of warps."""
    rng = np.random.default_rng(0)
    signed = [rng.integers(-300, 300, (1, n, heads)).astype(np.int16) for n, heads in ((150, 2), (700, 1))]
    kept = [rng.random((1, n, heads)) < 0.5 for n, heads in ((150, 2), (90, 1))]
    rows = rng.standard_normal((1, 700, 1, 256)).astype(np.float32)[..., :200]
    for order in (None, 1):
        device = EmulatedDevice("sm_80", warp_order=order)
        for marks in (signed, kept):
            by, on_cpu = ([tokens.sort(d, x) for x in marks] for d in (device, None))
            for ours, theirs in zip(by, on_cpu, strict=True):
                same(ours.order, theirs.order)
                same(ours.inverse, theirs.inverse)
            shift = marks[1].shape[1] - marks[0].shape[1] + 1
            for ours, theirs in zip(
                tokens.visible_ranges(device, *by, shift), tokens.visible_ranges(None, *on_cpu, shift), strict=True
            ):
                same(ours, theirs)
            part = rows[:, : marks[1].shape[1]]
            same(tokens.gather(device, part, by[1].order), tokens.gather(None, part, by[1].order))


def same(got: np.ndarray, want: np.ndarray) -> None:
    if not np.array_equal(got, want):
        raise WrongResult(f"{(got != want).sum()} of {want.size} elements differ")


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_mutation_is_caught(mutation: Mutation) -> None:
    with kernels_from(mutation.sources()), pytest.raises(mutation.caught):
        check()


def test_the_kernels_as_they_are_pass() -> None:
    with kernels_from(sources.sources()):
        check()


def test_names_are_unique() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)
