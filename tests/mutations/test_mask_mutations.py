"""Every planted fault of masks is caught as mask_faults.py says; the kernels as they are pass."""

from __future__ import annotations

from unittest import mock

import pytest

import cuflash.jit
from cuflash import masks
from cuflash.jit import sources
from tests.attention.cases import Case
from tests.kernels.test_tile_lists import Asked, hold_to_pairs
from tests.mutations.mask_faults import IN_BACKWARD, IN_EXPRESSIONS, IN_FORWARD, IN_LISTS
from tests.mutations.mutate import Mutation, WrongResult, kernels_from, run, run_backward

LISTS = [*IN_LISTS, *IN_EXPRESSIONS]


def run_lists(case: tuple[masks.Mask, Asked], texts: dict[str, str]) -> None:
    """List tiles with the kernels of these sources; raises what is wrong, or the emulator's fault."""
    with (
        kernels_from(texts),
        mock.patch("tests.kernels.launch.compile_ptx", lambda *of: cuflash.jit.compile_ptx(*of)),
    ):
        try:
            hold_to_pairs(*case)
        except AssertionError as error:
            raise WrongResult(str(error)) from None


@pytest.mark.parametrize("mutation", LISTS, ids=str)
def test_mutation_of_lists_is_caught(mutation: Mutation) -> None:
    with pytest.raises(mutation.caught):
        run_lists(mutation.case, mutation.sources())


@pytest.mark.parametrize("mutation", IN_FORWARD, ids=str)
def test_mutation_of_the_forward_pass_is_caught(mutation: Mutation) -> None:
    with pytest.raises(mutation.caught):
        run(mutation.case, mutation.sources())


@pytest.mark.parametrize("mutation", IN_BACKWARD, ids=str)
def test_mutation_of_the_backward_pass_is_caught(mutation: Mutation) -> None:
    with pytest.raises(mutation.caught):
        run_backward(mutation.case, mutation.sources(), mutation.arch)


def test_lists_as_they_are_pass() -> None:
    for case in dict.fromkeys(mutation.case for mutation in LISTS):
        run_lists(case, sources.sources())


@pytest.mark.parametrize("case", dict.fromkeys(mutation.case for mutation in IN_FORWARD), ids=str)
def test_the_forward_pass_as_it_is_passes(case: Case) -> None:
    run(case, sources.sources())


@pytest.mark.parametrize("case", dict.fromkeys(mutation.case for mutation in IN_BACKWARD), ids=str)
def test_the_backward_pass_as_it_is_passes(case: Case) -> None:
    run_backward(case, sources.sources(), "sm_80")


def test_names_are_unique() -> None:
    for mutations in (LISTS, IN_FORWARD, IN_BACKWARD):
        assert len({mutation.name for mutation in mutations}) == len(mutations)
