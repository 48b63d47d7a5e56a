"""A fault: one snippet of the CUDA sources replaced in memory, and a small problem run through the faulty kernel."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest import mock

import numpy as np

import cuflash.jit
from cuflash.jit import compiler, sources
from cuflash.jit.build import Unit
from tests.attention.cases import Case, Inputs, call, hold_to_oracle, make
from tests.attention.far import check_far
from tests.devices import EmulatedDevice
from tests.gradients import cases as gradient_cases
from tests.gradients.cases import forward_on_cpu


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
    case: Any  # a Case; None: tests/attention/far.py
    caught: type[Exception] | tuple[type[Exception], ...]
    arch: str = "sm_80"  # of the backward kernels

    def __str__(self) -> str:
        return self.name

    def sources(self) -> dict[str, str]:
        texts = sources.sources()
        try:
            return texts | {self.file: _replace_once(texts[self.file], self.before, self.after)}
        except LookupError as error:
            raise LookupError(f"{self.name}: {self.file}: {error}") from None


def _replace_once(text: str, before: str, after: str) -> str:
    if text.count(before) != 1:
        raise LookupError(
            f"{before!r} occurs {text.count(before)} times, must occur once; the kernel changed, change this with it"
        )
    return text.replace(before, after)


def _included(texts: dict[str, str], text: str, known: frozenset[str] = frozenset()) -> frozenset[str]:
    """Names of the sources that a text includes, and that they include, beside the known ones."""
    for name in re.findall(r'#include "(.+)"', text):
        if name not in known:
            known = _included(texts, texts[name], known | {name})
    return known


@contextmanager
def kernels_from(texts: dict[str, str]) -> Iterator[None]:
    """Within the block the emulated device compiles what these sources change, past every cache."""
    cached, originals = cuflash.jit.compile_ptx, sources.sources()
    changed = {name for name, text in texts.items() if text != originals[name]}

    def compile_ptx(config: Unit, arch: str) -> str:
        if changed.isdisjoint(_included(texts, config.unit())):
            return cached(config, arch)
        return compiler.compile_unit(config.unit(), f"{config.entry}.cu", arch, "ptx").code.decode()

    with (
        mock.patch.object(compiler, "sources", return_value=texts),
        mock.patch.object(cuflash.jit, "compile_ptx", compile_ptx),
    ):
        yield


class _Device(EmulatedDevice):
    """An emulated device that keeps the bank conflicts of its launches; `scheduling` as of `cuflash.emulate`."""

    bank_conflicts = 0

    def __init__(self, arch: str = "sm_80", **scheduling: Any) -> None:
        super().__init__(arch)
        self.scheduling = scheduling

    def run(self, function: Callable[..., Any], *arrays: Any, **keywords: Any) -> Any:
        with cuflash.emulate(self.arch, **self.scheduling) as device:
            result = function(*arrays, **keywords)
        self.bank_conflicts = sum(launch.bank_conflicts for launch in device.launches)
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


def run_backward(case: Case, texts: dict[str, str], arch: str) -> None:
    """Compute a case's gradients with the kernels of these sources; raises what is wrong, or the emulator's fault."""
    device = _Device(arch)
    _check_gradients(device, case, texts)
    if texts != sources.sources() and device.bank_conflicts > _bank_conflicts(case, arch):
        raise BankConflicts(f"{device.bank_conflicts} passes through shared memory too many")


@cache
def _bank_conflicts(case: Case, arch: str) -> int:
    """Of the kernels as they are."""
    device = _Device(arch)
    _check_gradients(device, case, sources.sources())
    return device.bank_conflicts


# Additions to dq as atomic operations, and as plain ones, which nothing but turns orders.
ATOMIC = 'asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(memory), "f"(x) : "memory");'
PLAIN = "*memory += x;"


def run_turns(case: Case, texts: dict[str, str], orders: Iterable[int | None] = (None, 0, 1)) -> None:
    """As `run_backward`, with one and several query tiles to a turn and in several orders of warps.

    Any two additions to dq that no turn orders are a race.
    """
    copy = _replace_once(texts["ptx/copy.cuh"], ATOMIC, PLAIN)
    for lag, order in [(0, None), *((1e3, order) for order in orders)]:
        with mock.patch("cuflash.plan.backward.MAX_LAG", lag):
            _check_gradients(_Device("sm_80", warp_order=order), case, texts | {"ptx/copy.cuh": copy})


def _check_gradients(device: _Device, case: Case, texts: dict[str, str]) -> None:
    inputs = make(case)
    given = gradient_cases.cotangent(case, inputs)
    hidden, dout = hide(case, inputs), given[0]
    if case.causal and not case.packed:  # NaN in queries that see nothing
        unseen = slice(max(0, case.seqlen_q - case.seqlen_k))
        hidden, dout = hidden._replace(q=hidden.q.copy()), dout.copy()
        hidden.q[:, unseen] = dout[:, unseen] = np.nan
    with kernels_from(texts), forward_on_cpu():
        got = gradient_cases.gradients(device, case, hidden, (dout, given[1]))
    try:
        gradient_cases.hold_to_oracle(case, inputs, given, got)
    except AssertionError as error:
        raise WrongResult(str(error)) from None


def hide(case: Case, inputs: Inputs) -> Inputs:
    """NaN in the keys that no query sees, those left of the first query's window."""
    if case.packed or case.window is None or case.window[0] is None:
        return inputs
    k, v = inputs.k.copy(), inputs.v.copy()
    unseen = slice(max(0, case.seqlen_k - case.seqlen_q - case.window[0]))
    k[:, unseen] = v[:, unseen] = np.nan
    return inputs._replace(k=k, v=v)
