"""Faults of the backward on the CPU: one snippet replaced in memory; the comparison with the oracle finds each."""

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
from tests.attention.cases import Case
from tests.gradients.cases import check

EXECUTOR, SUMS, VISIBILITY = "cuflash.cpu.backward", "cuflash.cpu.sums", "cuflash.cpu.visibility"

# More than one tile of keys and, of a head, more than one item of queries.
PLAIN = Case(dtype="float32", seqlen_q=300, seqlen_k=400, num_heads=4, num_kv_heads=2)
MANY = PLAIN.but(batch=4, num_heads=16, num_kv_heads=8, seqlen_k=130)  # more than one block of queries an item
CAUSAL = PLAIN.but(causal=True)
WINDOW = PLAIN.but(window=(90, 9))
LATE_START = PLAIN.but(seqlen_q=150, seqlen_k=70, causal=True)  # rows that see nothing
NO_KEYS_BY_BIAS = PLAIN.but(seqlen_q=70, bias="bhqk", bias_values="inf_rows")
CAPPED = PLAIN.but(softcap=1.5)
BIASED, SHARED_BIAS = PLAIN.but(bias="bhqk"), PLAIN.but(bias="qk")
BIAS_OF_ROWS = PLAIN.but(bias="b.q.")
PACKED = PLAIN.but(sequences=((40, 70), (5, 0), (17, 90)), tail=(3, 3))
# An item has two ranges of groups that see a tile.
MASKED = PLAIN.but(mask=masks.where(lambda batch, head, q, k: (q // 60 + k // 150 + head + batch) % 2 == 0))


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
    Mutation("no scale in the scores", EXECUTOR, "q *= problem.scale / (", "q *= 1 / (", PLAIN),
    Mutation("no scale in dq", EXECUTOR, "dq *= problem.scale / total", "dq *= 1 / total", PLAIN),
    Mutation("no lse", EXECUTOR, "c - lse.astype(np.float64)", "c", PLAIN),
    Mutation("nothing subtracted", EXECUTOR, "p -= self.c[", "p -= 0 * self.c[", BIASED),
    Mutation("weights of 1", EXECUTOR, "c - lse.astype(np.float64)", "0 * c", BIASED),
    Mutation("row sums of the last tile", EXECUTOR, "self.row_sums[own] +=", "self.row_sums[own] =", PLAIN),
    Mutation("no delta", EXECUTOR, "dout[:, -1] = -delta", "dout[:, -1] = 0", PLAIN),
    Mutation("delta added", EXECUTOR, "dout[:, -1] = -delta", "dout[:, -1] = delta", PLAIN),
    Mutation("dlse added", EXECUTOR, "delta[:count] -= sequence.dlse", "delta[:count] += sequence.dlse", PLAIN),
    Mutation("dlse of the first head", EXECUTOR, "sequence.dlse[self.head, ", "sequence.dlse[0, ", PLAIN),
    Mutation("dq replaced", EXECUTOR, "dq += np.matmul(", "dq[...] = np.matmul(", PLAIN),
    Mutation("dk, dv of the last block", EXECUTOR, "total += product", "total[...] = product", MANY),
    Mutation("dk, dv of the first group", EXECUTOR, "in products:", "in products[:1]:", PLAIN),
    Mutation("dS without P", EXECUTOR, "ds *= p  # dS", "ds *= 1  # dS", PLAIN),
    Mutation("P not hidden", EXECUTOR, "hide(p, hidden, 0)", "pass", CAUSAL),
    Mutation("left bound off by one", VISIBILITY, "- problem.left", "- problem.left + 1", WINDOW),
    Mutation("right bound off by one", VISIBILITY, "+ problem.right", "+ problem.right + 1", CAUSAL),
    Mutation("aligned to the top left", VISIBILITY, "len_k - len_q + problem.right", "problem.right", CAUSAL),
    Mutation("dk and dv at the first keys", EXECUTOR, "= part.keys, dk, dv", "= slice(n), dk, dv", WINDOW),
    Mutation("dk and dv of the last part of a tile", EXECUTOR, "if part.tile not in gradients:", "if part:", MASKED),
    Mutation("groups before a part", EXECUTOR, "max(begin, part.first), min(", "begin, min(", MASKED),
    Mutation("groups behind a part", EXECUTOR, "min(begin + self.block, part.last)", "min(begin + self.block, "
             "self.last)", MASKED),
    Mutation("every other block", EXECUTOR, "part.last, self.block)", "part.last, 2 * self.block)", MANY),
    Mutation("queries from the first token", EXECUTOR, "q_start=q_start", "q_start=0", MASKED_TOKENS),
    Mutation("keys from the first token", EXECUTOR, "k_start=k_start", "k_start=0", MASKED_TOKENS),
    Mutation("lse of empty rows", EXECUTOR, "lse[empty], q[empty], dout[empty] = np.inf", "lse[empty], q[empty], "
             "dout[empty] = -np.inf", NO_KEYS_BY_BIAS),
    Mutation("softcap without its slope", EXECUTOR, "ds *= slope[0]", "ds *= 1", CAPPED),
    Mutation("dk without the cap", EXECUTOR, "dk *= (problem.softcap or 1)", "dk *= 1", CAPPED),
    Mutation("bias of the first head", EXECUTOR, "self.sequence.bias[self.head, ", "self.sequence.bias[0, ", BIASED),
    Mutation("bias of the first rows", EXECUTOR, "bias[self.head, queries,", "bias[self.head, : queries.stop - "
             "queries.start,", BIASED),
    Mutation("slope in dbias", EXECUTOR, "self.exp(p, out=p)  # E", "self.exp(p, out=p); ds, slope = p, [p]  # E",
             CAPPED.but(bias="qk")),
    Mutation("keys from the queries' places", EXECUTOR, "slice(*cu_seqlens_k[i", "slice(*cu_seqlens_q[i", PACKED),
    Mutation("dbias of one head", SUMS, "head if self._per_head else 0", "0", BIASED),
    Mutation("dbias of one batch entry", SUMS, "batch if self._per_batch else 0", "0", BIASED),
    Mutation("parts of dbias replaced", SUMS, "np.add(self._at(place), part, ", "np.add(0, part, ", SHARED_BIAS),
    Mutation("dbias of the last block of queries", SUMS, "key : key + ds.shape[1]] += ds", "key : key + ds.shape[1]] "
             "= ds", MANY.but(bias="h.k")),
    Mutation("dbias averaged over keys", SUMS, "ds.sum(axis=1, keep", "ds.mean(axis=1, keep", BIAS_OF_ROWS),
    Mutation("parts of dk and dv replaced", SUMS, "total[keys] += part", "total[keys] = part", PLAIN),
]  # fmt: skip


def _run(case: Case, name: str, change: tuple[str, str] = ("", "")) -> None:
    """The case with the changed module `name`, and the executor loaded anew above it."""
    modules = {}
    with mock.patch.dict(sys.modules):
        for needed in dict.fromkeys([name, EXECUTOR]):
            path = Path(import_module(needed).__file__)
            modules[needed] = sys.modules[needed] = ModuleType(needed)
            source = path.read_text(encoding="utf-8")
            if needed == name and change[0]:
                if source.count(change[0]) != 1:
                    raise LookupError(f"{change[0]!r} occurs {source.count(change[0])} times, must occur once")
                source = source.replace(*change)
            exec(compile(source, path, "exec"), modules[needed].__dict__)
        check(case)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_mutation_is_caught(mutation: Mutation) -> None:
    with pytest.raises(AssertionError, match=r"(dq|dk|dv|dbias): at"):
        _run(mutation.case, mutation.module, (mutation.before, mutation.after))


@pytest.mark.parametrize("case", dict.fromkeys(mutation.case for mutation in MUTATIONS), ids=str)
def test_the_executor_as_it_is_passes(case: Case) -> None:
    _run(case, EXECUTOR)
