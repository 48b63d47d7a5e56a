"""Faults of the CPU executor: one snippet of its code replaced in memory; the comparison with the oracle finds each."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest import mock

import pytest

from cuflash import masks
from cuflash.masks.expression import Expression
from cuflash.masks.steps import Indices
from tests.attention.cases import Case, check
from tests.devices import CpuDevice

EXECUTOR, KEYS, VISIBILITY = "cuflash.cpu.forward", "cuflash.cpu.keys", "cuflash.cpu.visibility"

# Three tiles of keys; large scores, so that the running maximum is kept.
PLAIN = Case(dtype="float32", seqlen_q=70, seqlen_k=400, num_heads=4, num_kv_heads=2, values="scores_1e2")
CAUSAL = PLAIN.but(causal=True)
WINDOW = PLAIN.but(window=(90, 9))
LATE_START = PLAIN.but(seqlen_q=150, seqlen_k=70, causal=True)  # rows that see nothing
CAPPED = PLAIN.but(softcap=1.5)
BIASED = PLAIN.but(bias="bhqk")
PACKED = PLAIN.but(sequences=((40, 70), (5, 0), (17, 90)), tail=(3, 3))

# By head and batch entry: an item has two ranges of groups that see a tile; there are full tiles and edges.
MASKED = PLAIN.but(
    seqlen_q=240,
    mask=masks.where(lambda batch, head, q, k: ((q // 60 + k // 150 + head + batch) % 2 == 0) & (q + k != 320)),
)
# Partial and full groups in turn.
MASKED_IN_TURN = MASKED.but(mask=masks.where(lambda batch, head, q, k: (q // 60 % 2 == 1) | ((q + k) % 7 > 0)))


@dataclass(frozen=True, eq=False, repr=False)
class Tokens(masks.Mask):
    """By places in packed arrays."""

    def _visible(self, at: Indices) -> Expression:
        return (at.q_token + at.k_token + at.batch) % 11 > 3


MASKED_TOKENS = PACKED.but(mask=Tokens())


class Mutation(NamedTuple):
    name: str
    module: str
    before: str
    after: str
    case: Case


MUTATIONS = [
    Mutation("no scale", EXECUTOR, "q *= problem.scale / (", "q *= 1.0 / (", PLAIN),
    Mutation("l not rescaled", EXECUTOR, "l_i *= factor", "l_i *= 1", PLAIN),
    Mutation("O not rescaled", EXECUTOR, "o *= factor[:, :, None]", "o *= 1", PLAIN),
    Mutation("no running maximum for large scores", EXECUTOR, "bound <= SAFE_SCORE and ", "",
             PLAIN.but(values="scores_1e4")),
    Mutation("-inf minus -inf", EXECUTOR, "np.where(np.isneginf(m_i), 0, m_i)", "m_i", LATE_START),
    Mutation("empty rows divided", EXECUTOR, "np.where(self.l == 0, 1, self.l)", "self.l", LATE_START),
    Mutation("lse without the maximum", EXECUTOR, "self.m + np.log(self.l)", "np.log(self.l)", PLAIN),
    Mutation("left bound off by one", VISIBILITY, "- problem.left", "- problem.left + 1", WINDOW),
    Mutation("right bound off by one", VISIBILITY, "+ problem.right", "+ problem.right + 1", CAUSAL),
    Mutation("aligned to the top left", VISIBILITY, "len_k - len_q + problem.right", "problem.right", CAUSAL),
    Mutation("softcap without its scale", EXECUTOR, "s *= self.softcap", "s *= 1", CAPPED),
    Mutation("bias of the first head", EXECUTOR, "self.sequence.bias[self.head, ", "self.sequence.bias[0, ", BIASED),
    Mutation("bias of the first sequence", EXECUTOR, "own = None if bias is None else bias[b]\n            ",
             "own = None if bias is None else bias[0]\n            ", BIASED),
    Mutation("keys from the queries' places", EXECUTOR, "slice(*cu_seqlens_k[b", "slice(*cu_seqlens_q[b", PACKED),
    Mutation("tail left as it was", EXECUTOR, "out[tail] = 0", "out[tail] = 1", PACKED),
    Mutation("a tile dropped", VISIBILITY, "first:last].T)", "first:last].T)[1:]", MASKED),
    Mutation("a tile visited twice", VISIBILITY, "first:last].T)", "first:last].T)[:1] + _ranges(self.verdicts["
             "self._index(head), first:last].T)", MASKED),
    Mutation("partial tiles as full ones", VISIBILITY, "== PARTIAL", "> PARTIAL", MASKED),
    Mutation("the last partial group as a full one", VISIBILITY, "for groups in ranges:", "for groups in ranges[:-1]:",
             MASKED),
    Mutation("hidden from the first groups of a part", VISIBILITY, "hidden = hidden[count:]", "pass", MASKED_IN_TURN),
    Mutation("hidden from groups of the part", VISIBILITY, "part.first + np.flatnonzero", "np.flatnonzero", MASKED),
    Mutation("hidden from other queries", VISIBILITY, "groups[:, None] * self.rows", "groups[:, None]", MASKED),
    Mutation("the other of what is kept", VISIBILITY, "= ranges, bits", "= ranges, ~bits", MASKED_IN_TURN),
    Mutation("hidden before exp", EXECUTOR, "hide(s, hidden, -np.inf)", "pass", MASKED),
    Mutation("hidden after exp", EXECUTOR, "hide(s, hidden, 0)", "pass", MASKED.but(values="normal")),
    Mutation("mask of the first head", VISIBILITY, "return head % len(self._places)", "return 0", MASKED),
    Mutation("mask of the first batch entry", VISIBILITY, "if not mask.by_batch:", "if mask:", MASKED),
    Mutation("queries from the first token", EXECUTOR, "q_start=rows.start", "q_start=0", MASKED_TOKENS),
    Mutation("keys from the first token", EXECUTOR, "k_start=keys.start", "k_start=0", MASKED_TOKENS),
]  # fmt: skip


def _run(case: Case, name: str, change: tuple[str, str] = ("", "")) -> None:
    """The case with the changed module `name`, and those that import it loaded anew above it."""
    kept = {} if case.mask is None else case.mask.program.kept
    with mock.patch.dict(sys.modules), mock.patch.dict(kept, clear=True):
        for needed in (VISIBILITY, KEYS, EXECUTOR):
            path = Path(import_module(needed).__file__)
            source = path.read_text(encoding="utf-8")
            if needed == name and change[0]:
                if source.count(change[0]) != 1:
                    raise LookupError(f"{change[0]!r} occurs {source.count(change[0])} times, must occur once")
                source = source.replace(*change)
            sys.modules[needed] = module = ModuleType(needed)
            exec(compile(source, path, "exec"), module.__dict__)
        check(CpuDevice(), case)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_mutation_is_caught(mutation: Mutation) -> None:
    with pytest.raises(AssertionError, match=r"(out|lse): at"):
        _run(mutation.case, mutation.module, (mutation.before, mutation.after))


@pytest.mark.parametrize("case", dict.fromkeys(mutation.case for mutation in MUTATIONS), ids=str)
def test_the_executor_as_it_is_passes(case: Case) -> None:
    _run(case, EXECUTOR)
