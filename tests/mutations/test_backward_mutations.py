"""Every planted fault of the backward kernels is caught as backward_faults.py says; the kernels as they are pass."""

from __future__ import annotations

import pytest

from cuflash.jit import sources
from tests.attention.cases import Case
from tests.mutations.backward_faults import MUTATIONS, TURNS
from tests.mutations.mutate import Mutation, run_backward, run_turns


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_mutation_is_caught(mutation: Mutation) -> None:
    with pytest.raises(mutation.caught):
        run_backward(mutation.case, mutation.sources(), mutation.arch)


@pytest.mark.parametrize("mutation", TURNS, ids=str)
def test_mutation_of_turns_is_caught(mutation: Mutation) -> None:
    with pytest.raises(mutation.caught):
        run_turns(mutation.case, mutation.sources())


@pytest.mark.parametrize(("case", "arch"), dict.fromkeys((m.case, m.arch) for m in MUTATIONS), ids=str)
def test_the_kernels_as_they_are_pass(case: Case, arch: str) -> None:
    run_backward(case, sources.sources(), arch)


@pytest.mark.parametrize("case", dict.fromkeys(m.case for m in TURNS), ids=str)
def test_the_turns_as_they_are_pass(case: Case) -> None:
    run_turns(case, sources.sources())


def test_names_are_unique() -> None:
    names = [mutation.name for mutation in (*MUTATIONS, *TURNS)]
    assert len(set(names)) == len(names)
