"""A fault: one snippet of the CUDA sources replaced in memory, and a small problem run through the faulty kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np

import cuflash.jit
from cuflash.jit import compiler, sources
from cuflash.jit.build import Unit
from tests.attention.cases import Case, Inputs, call, hold_to_oracle, make
from tests.attention.far import check_far
from tests.devices import EmulatedDevice


class WrongResult(Exception):
    """The faulty kernel ran, and the comparison with the oracle found its result wrong."""


class BankConflicts(Exception):
    """The result is right, but shared memory is read or written in more passes than it needs."""


@dataclass(frozen=True)
class Mutation:
    """`before`, found exactly once in `file`, becomes `after`; running `case` then raises `caught`."""

    name: str
    file: str
    before: str
    after: str
    case: Case | None  # None: tests/attention/far.py
    caught: type[Exception] | tuple[type[Exception], ...]

    def __str__(self) -> str:
        return self.name

    def sources(self) -> dict[str, str]:
        texts = sources.sources()
        if texts[self.file].count(self.before) != 1:
            raise LookupError(
                f"{self.name}: {self.before!r} occurs {texts[self.file].count(self.before)} times in {self.file}, "
                f"must occur once; the kernel changed, change the mutation with it"
            )
        return texts | {self.file: texts[self.file].replace(self.before, self.after)}


@contextmanager
def kernels_from(texts: dict[str, str]) -> Iterator[None]:
    """Within the block the emulated device compiles from these sources, past every cache."""

    def compile_ptx(config: Unit, arch: str) -> str:
        return compiler.compile_unit(config.unit(), f"{config.entry}.cu", arch, "ptx").code.decode()

    with (
        mock.patch.object(compiler, "sources", return_value=texts),
        mock.patch.object(cuflash.jit, "compile_ptx", compile_ptx),
    ):
        yield


class _Device(EmulatedDevice):
    """An emulated device that keeps the bank conflicts of its launches."""

    bank_conflicts = 0

    def run(self, function: Callable[..., Any], *arrays: Any, **keywords: Any) -> Any:
        result = super().run(function, *arrays, **keywords)
        self.bank_conflicts = sum(launch.bank_conflicts for launch in self.launches)
        return result


def run(case: Case | None, texts: dict[str, str]) -> None:
    """Run a case (None: the far one) on the kernels of these sources; raises what is wrong, or the emulator's fault."""
    device = _Device()
    with kernels_from(texts):
        try:
            if case is None:
                check_far()
            else:
                inputs = make(case)
                hold_to_oracle(case, inputs, *call(device, case, hide(case, inputs)))
        except AssertionError as error:
            raise WrongResult(str(error)) from None
    if device.bank_conflicts:
        raise BankConflicts(f"{device.bank_conflicts} passes through shared memory too many")


def hide(case: Case, inputs: Inputs) -> Inputs:
    """NaN in the keys that no query sees, those left of the first query's window."""
    if case.packed or case.window is None or case.window[0] is None:
        return inputs
    k, v = inputs.k.copy(), inputs.v.copy()
    unseen = slice(max(0, case.seqlen_k - case.seqlen_q - case.window[0]))
    k[:, unseen] = v[:, unseen] = np.nan
    return inputs._replace(k=k, v=v)
