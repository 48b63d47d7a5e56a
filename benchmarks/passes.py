"""The passes that are measured: who runs them, when their answer is right, what they must compute and move."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from benchmarks import contenders
from benchmarks.cases import ERROR_LIMITS, Case, sample_error, softmax
from benchmarks.contenders import Contender, Inputs
from cuflash.io_model import compulsory_bytes, useful_flops
from cuflash.problem import Problem

CHUNK = 256  # queries whose scores a thread of the float64 gradients holds


@dataclass(frozen=True)
class Pass:
    """Operations and bytes are the least for a problem: visible pairs, and each array once."""

    name: str
    find: Callable[[str], list[Contender]]  # contenders on "cpu" or "cuda", cuflash first
    error: Callable[[Case, Inputs, Any], float]  # of what Run.to_numpy gives, relative
    limits: dict[str, float]  # of the error, by dtype
    flops: Callable[[Problem], float]
    bytes: Callable[[Problem], float]


def gradient_error(case: Case, inputs: Inputs, gradients: tuple[np.ndarray, ...]) -> float:
    """Largest |gradient - exact| relative to the largest exact one, over samples of the last key/value head.

    The sample is 32 queries of dq and 32 keys of dk and dv; the cotangent is `contenders.cotangent(inputs)`.
    """
    exact = _exact_gradients(case)
    dq = gradients[0][-1][exact.sample, case.num_heads - exact.dq.shape[1] :].astype(np.float64)
    errors = [float(np.abs(dq - exact.dq).max()) / exact.largest_dq]
    for got, want in zip(gradients[1:], (exact.dk, exact.dv), strict=True):
        errors.append(float(np.abs(got[-1, exact.sample, -1].astype(np.float64) - want).max() / np.abs(want).max()))
    return max(errors)


class _Exact(NamedTuple):
    """Gradients in float64: of the sampled queries of a group of heads, of the sampled keys."""

    sample: np.ndarray
    dq: np.ndarray  # (sample, group, head_dim)
    largest_dq: float  # over all queries
    dk: np.ndarray  # (sample, head_dim)
    dv: np.ndarray


@lru_cache(maxsize=1)  # contenders come case by case
def _exact_gradients(case: Case) -> _Exact:
    inputs = case.inputs()
    q, k, v = (x[-1].astype(np.float64) for x in inputs)
    dout = contenders.cotangent(inputs)[-1].astype(np.float64)
    group = case.num_heads // case.num_kv_heads
    sample = np.random.default_rng(1).integers(0, case.seqlen, 32)
    dk, dv = np.zeros((32, case.head_dim)), np.zeros((32, case.head_dim))
    samples, largest = [], 0.0
    for head in range(case.num_heads - group, case.num_heads):

        def part(begin: int, head: int = head) -> tuple[np.ndarray, ...]:
            """dq of a chunk of queries, and what they add to dk and dv of the sample."""
            rows = slice(begin, begin + CHUNK)
            visible = case.visible(rows, head)
            seen = np.union1d(np.flatnonzero(visible.any(axis=0)), sample)  # the other keys have no part in anything
            keys, values = k[seen, -1], v[seen, -1]
            p = softmax(case.problem.scale * (q[rows, head] @ keys.T), visible[:, seen])
            dp = dout[rows, head] @ values.T
            ds = case.problem.scale * p * (dp - (p * dp).sum(axis=1, keepdims=True))
            sampled = np.searchsorted(seen, sample)
            return ds @ keys, ds[:, sampled].T @ q[rows, head], p[:, sampled].T @ dout[rows, head]

        with ThreadPoolExecutor() as pool:
            parts = list(pool.map(part, range(0, case.seqlen, CHUNK)))
        dq = np.concatenate([own for own, _, _ in parts])
        dk += sum(of_keys for _, of_keys, _ in parts)
        dv += sum(of_values for _, _, of_values in parts)
        samples.append(dq[sample])
        largest = max(largest, float(np.abs(dq).max()))
    return _Exact(sample, np.stack(samples, 1), largest, dk, dv)


def backward_flops(problem: Problem) -> float:
    """Five products to the forward's two: S, dQ and dK along head_dim, dP and dV along head_dim_v."""
    along_both = problem.head_dim + problem.head_dim_v
    return useful_flops(problem) * (3 * problem.head_dim + 2 * problem.head_dim_v) / along_both


def backward_bytes(problem: Problem) -> float:
    """Each of q, k, v, out and their cotangents once: twice what the forward moves."""
    return 2.0 * compulsory_bytes(problem)


GRADIENT_LIMITS = {dtype: 4 * limit for dtype, limit in ERROR_LIMITS.items()}

PASSES = {
    "forward": Pass(
        "forward", lambda device: contenders.find(device), sample_error, ERROR_LIMITS, useful_flops, compulsory_bytes
    ),
    "backward": Pass(
        "backward",
        lambda device: contenders.find_backward(device, with_forward=False),
        gradient_error,
        GRADIENT_LIMITS,
        backward_flops,
        backward_bytes,
    ),
    "forward_backward": Pass(
        "forward_backward",
        lambda device: contenders.find_backward(device, with_forward=True),
        gradient_error,
        GRADIENT_LIMITS,
        lambda problem: useful_flops(problem) + backward_flops(problem),
        lambda problem: compulsory_bytes(problem) + backward_bytes(problem),
    ),
}
