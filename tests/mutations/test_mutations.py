"""Every planted fault is caught, each in the way that its entry in faults.py says; the kernels as they are pass."""

from __future__ import annotations

import pytest

from cuflash.jit import sources
from tests.attention.cases import Case
from tests.mutations import faults, wide_faults
from tests.mutations.mutate import Mutation, run

MUTATIONS = [*faults.MUTATIONS, *wide_faults.MUTATIONS]
CASES = list(dict.fromkeys(mutation.case for mutation in MUTATIONS))


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_mutation_is_caught(mutation: Mutation) -> None:
    with pytest.raises(mutation.caught):
        run(mutation.case, mutation.sources())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernels_as_they_are_pass(case: Case | None) -> None:
    run(case, sources.sources())


def test_names_are_unique() -> None:
    names = [mutation.name for mutation in MUTATIONS]
    assert len(set(names)) == len(names)
