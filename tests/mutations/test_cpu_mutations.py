"""Faults of the CPU executor: one snippet of its loop replaced in memory; the comparison with the oracle finds each."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest import mock

import pytest

import cuflash.cpu.forward as executor
from tests.attention.cases import Case, check
from tests.devices import CpuDevice

# Three tiles of keys; large scores, so that the running maximum is kept.
PLAIN = Case(dtype="float32", seqlen_q=70, seqlen_k=400, num_heads=4, num_kv_heads=2, values="scores_1e2")
CAUSAL = PLAIN.but(causal=True)
WINDOW = PLAIN.but(window=(90, 9))
LATE_START = PLAIN.but(seqlen_q=150, seqlen_k=70, causal=True)  # rows that see nothing
CAPPED = PLAIN.but(softcap=1.5)
BIASED = PLAIN.but(bias="bhqk")
PACKED = PLAIN.but(sequences=((40, 70), (5, 0), (17, 90)), tail=(3, 3))


class Mutation(NamedTuple):
    name: str
    before: str
    after: str
    case: Case


MUTATIONS = [
    Mutation("no scale", "q *= problem.scale / (", "q *= 1.0 / (", PLAIN),
    Mutation("l not rescaled", "l_i *= factor", "l_i *= 1", PLAIN),
    Mutation("O not rescaled", "o *= factor[:, :, None]", "o *= 1", PLAIN),
    Mutation("no running maximum for large scores", "bound <= SAFE_SCORE and ", "", PLAIN.but(values="scores_1e4")),
    Mutation("-inf minus -inf", "np.where(np.isneginf(m_i), 0, m_i)", "m_i", LATE_START),
    Mutation("empty rows divided", "np.where(self.l == 0, 1, self.l)", "self.l", LATE_START),
    Mutation("lse without the maximum", "self.m + np.log(self.l)", "np.log(self.l)", PLAIN),
    Mutation("left bound off by one", "diagonal - problem.left", "diagonal - problem.left + 1", WINDOW),
    Mutation("right bound off by one", "diagonal + problem.right", "diagonal + problem.right + 1", CAUSAL),
    Mutation("aligned to the top left", "begin + sequence.k.shape[0] - sequence.q.shape[0]", "begin", CAUSAL),
    Mutation("softcap without its scale", "s *= self.softcap", "s *= 1", CAPPED),
    Mutation("bias of the first head", "self.sequence.bias[self.head, ", "self.sequence.bias[0, ", BIASED),
    Mutation("bias of the first sequence", "own = None if bias is None else bias[b]\n            ",
             "own = None if bias is None else bias[0]\n            ", BIASED),
    Mutation("keys from the queries' places", "slice(*cu_seqlens_k[b", "slice(*cu_seqlens_q[b", PACKED),
    Mutation("tail left as it was", "out[tail] = 0", "out[tail] = 1", PACKED),
]  # fmt: skip


def _run(case: Case, source: str) -> None:
    module = ModuleType(executor.__name__)
    with mock.patch.dict(sys.modules, {executor.__name__: module}):
        exec(compile(source, executor.__file__, "exec"), module.__dict__)
        check(CpuDevice(), case)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_mutation_is_caught(mutation: Mutation) -> None:
    source = Path(executor.__file__).read_text(encoding="utf-8")
    if source.count(mutation.before) != 1:
        pytest.fail(f"{mutation.before!r} occurs {source.count(mutation.before)} times, must occur once")
    with pytest.raises(AssertionError, match=r"(out|lse): at"):
        _run(mutation.case, source.replace(mutation.before, mutation.after))


@pytest.mark.parametrize("case", dict.fromkeys(mutation.case for mutation in MUTATIONS), ids=str)
def test_the_executor_as_it_is_passes(case: Case) -> None:
    _run(case, Path(executor.__file__).read_text(encoding="utf-8"))
