"""Every fault planted in paged attention and in moves of a cache's rows is caught; the kernels as they are pass."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

import cuflash
from cuflash import Options
from cuflash.jit import sources
from cuflash.paging import moves
from tests.kernels.test_cache_moves import test_offsets_past_32_bits as move_far
from tests.mutations.mutate import Mutation, WrongResult, kernels_from
from tests.mutations.paged_faults import ATTENTION, EVEN_WORK, MOVES, OtherTraffic
from tests.paged.cases import check_paged, paged
from tests.test_io_model_paged import Case, model, shape_of_queries


def check_attention(case: Case) -> None:
    """Result and bytes of a call; sequences are as they come, queries that see no key apart."""
    rng = np.random.default_rng(0)
    cache = paged(rng, case.lengths, case.block_size, case.kv_heads, case.dim)
    shape, packing = shape_of_queries(case)
    packed = rng.standard_normal((int(np.prod(shape[:-2])), *shape[-2:])).astype(np.float16)
    keywords = dict(case.keywords) | {"return_lse": True}
    given = keywords | packing
    if case.bias is not None:
        given["bias"] = keywords["bias"] = rng.standard_normal(case.bias).astype(np.float32)
    options = None if case.splits is None else Options(num_splits=case.splits)
    with cuflash.emulate("sm_80") as device:
        out, lse = cuflash.paged_attention(packed.reshape(shape), *cache.arguments, **given, options=options)
    ends = packing.get("cu_seqlens_q") or list(range(0, len(packed) + 1, shape[1]))
    if not packing:
        lse = lse.swapaxes(0, 1).reshape(lse.shape[1], -1)
    queries = [packed[begin:end] for begin, end in pairwise(ends)]
    scores = {"causal": True} | {name: value for name, value in keywords.items() if name not in ("return_lse", "bias")}
    try:
        check_paged(cache, queries, out.reshape(packed.shape), lse, keywords.get("bias"), **scores)
    except AssertionError as error:
        raise WrongResult(str(error)) from None
    read: Counter[str] = Counter()
    for launch in device.launches:
        read.update(launch.read_by_array)
    if +read != Counter(dict(model(case).read)):
        raise OtherTraffic(f"{read}: must be {model(case).read}")


def check_moves() -> None:
    """All that moves bytes of a cache, against the CPU."""
    rng = np.random.default_rng(0)
    for order in (None, 1):
        caches = [rng.standard_normal((3, 7, 5, 2, dim)).astype(np.float16) for dim in (24, 40)]
        head_first = [np.ascontiguousarray(x.swapaxes(2, 3)).swapaxes(2, 3) for x in caches]
        for both in (caches, head_first):
            on_device = [x.copy(order="K") for x in both]
            k, v = (rng.standard_normal((40, 2, dim)).astype(np.float16) for dim in (24, 40))
            slots = np.concatenate([rng.permutation(35), [-1] * 5])
            with cuflash.emulate("sm_80", warp_order=order):
                moves.write_tokens(on_device[0][1], on_device[1][1], k, v, slots)
                moves.copy_blocks(on_device, [(0, 3), (0, 4), (6, 1)])
                moves.move_blocks(on_device, on_device, [(1, 2), (3, 5)])
                got = moves.gather_tokens(on_device[1][1], [2, 6, 5], 12)
            moves.write_tokens(both[0][1], both[1][1], k, v, slots)
            moves.copy_blocks(both, [(0, 3), (0, 4), (6, 1)])
            moves.move_blocks(both, both, [(1, 2), (3, 5)])
            want = moves.gather_tokens(both[1][1], [2, 6, 5], 12)
            for ours, theirs in zip([*on_device, got], [*both, want], strict=True):
                if not np.array_equal(ours, theirs):
                    raise WrongResult(f"{(ours != theirs).sum()} of {ours.size} elements differ")
    for whole_blocks in (False, True):
        try:
            move_far(whole_blocks)
        except AssertionError as error:
            raise WrongResult(str(error)) from None


@pytest.mark.parametrize("mutation", [*ATTENTION, *EVEN_WORK], ids=str)
def test_mutation_of_attention_is_caught(mutation: Mutation) -> None:
    with kernels_from(mutation.sources()), pytest.raises(mutation.caught):
        check_attention(mutation.case)


@pytest.mark.parametrize("mutation", MOVES, ids=str)
def test_mutation_of_moves_is_caught(mutation: Mutation) -> None:
    with kernels_from(mutation.sources()), pytest.raises(mutation.caught):
        check_moves()


@pytest.mark.parametrize("case", dict.fromkeys(mutation.case for mutation in (*ATTENTION, *EVEN_WORK)), ids=str)
def test_attention_as_it_is_passes(case: Case) -> None:
    with kernels_from(sources.sources()):
        check_attention(case)


def test_moves_as_they_are_pass() -> None:
    check_moves()


def test_names_are_unique() -> None:
    names = [mutation.name for mutation in (*ATTENTION, *EVEN_WORK, *MOVES)]
    assert len(set(names)) == len(names)
