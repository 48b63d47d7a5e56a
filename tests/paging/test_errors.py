"""Bad input: a typed error that says what, and a cache whose every byte and count is as before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import cuflash
from cuflash import (
    BlockPool,
    DeviceError,
    InvalidDtypeError,
    InvalidShapeError,
    InvalidTypeError,
    InvalidValueError,
    OutOfBlocksError,
    PagedKVCache,
    UnknownSequenceError,
)
from cuflash.paging import moves
from tests.fake_cupy import ndarray as on_gpu
from tests.paging.cases import new_cache, started
from tests.paging.state import check_books, snapshot

PROMPT = list(range(20))
FREED, FIRST, FORK, OTHER, HOST = range(5)  # ids of `cache`


@pytest.fixture
def cache() -> PagedKVCache:
    """16 blocks of 4: FIRST has 7 tokens in blocks 0 and 1, FORK the same, OTHER 3 in block 2; HOST is swapped out."""
    cache = new_cache(16, host_blocks=4)
    cache.free(started(cache, PROMPT[:2]))
    started(cache, PROMPT[:7])
    cache.fork(FIRST)
    started(cache, PROMPT[10:13])
    started(cache, PROMPT[15:20])
    cache.swap_out([HOST])
    assert [list(row) for row in cache.block_tables([FIRST, FORK, OTHER])] == [[0, 1], [0, 1], [2, -1]]
    return cache


def tokens(n: int, dtype: Any = np.float32, heads: int = 2, dim: int = 16) -> np.ndarray:
    return np.ones((n, heads, dim), dtype)


SLOTS = np.array([8, 9, 10])  # of OTHER

CALLS: dict[type[Exception], list[tuple[Callable[[PagedKVCache], Any], str]]] = {
    UnknownSequenceError: [
        (lambda c: c.reserve([FIRST, FREED]), "sequence 0: must be one of this cache"),
        (lambda c: c.reserve([99]), "sequence 99: must be one of this cache"),
        (lambda c: c.commit([7], [[1]]), "sequence 7"),
        (lambda c: c.fork(FREED), "sequence 0"),
        (lambda c: c.free(FREED), "^sequence 0: must be one of this cache, not freed$"),
        (lambda c: c.block_tables([3, 5]), "sequence 5"),
        (lambda c: c.seq_lens([FREED]), "sequence 0"),
    ],
    InvalidTypeError: [
        (lambda c: c.reserve(FIRST), "seq_ids = 1: must be a sequence of ids"),
        (lambda c: c.reserve([1], [1.5]), "counts = .*must be a sequence of integers"),
        (lambda c: c.append(0, tokens(3), tokens(3), [8, 9, 10]), "slots is a list: must be a NumPy or CuPy"),
        (lambda c: c.commit([1], [[0.5]]), r"tokens\[0\] = \[0.5\]: must be a sequence of int"),
        (lambda c: c.add_sequence(5), "tokens = 5: must be a sequence of integers"),
        (lambda c: c.add_sequence("prompt"), "tokens = 'prompt': must be a sequence of integers"),
        (lambda c: c.add_sequence(b"12345678"), "must be a sequence of integers"),
        (lambda c: c.add_sequence([2**63]), "must be a sequence of integers of 64 bits"),
        (lambda c: c.add_sequence([1], 5), "extra = 5: must be str, bytes or None"),
        (lambda c: c.truncate(1, 2.0), "length = 2.0: must be an integer"),
        (lambda c: c.seq_lens([[1]]), r"seq_ids = \[\[1\]\]: must be a sequence of ids"),
        (lambda c: c.gather("0", 1), "layer = '0': must be an integer"),
    ],
    InvalidValueError: [
        (lambda c: c.reserve([1, 2, 1]), r"seq_ids = \[1, 2, 1\]: must name each sequence"),
        (lambda c: c.reserve([1, 2], [1, -1]), r"counts\[1\] = -1: must be >= 0"),
        (lambda c: c.reserve([1, 2], -3), "counts = -3: must be >= 0"),
        (lambda c: c.reserve([1, 2], [1]), "counts has 1 entries: must have 2"),
        (lambda c: c.reserve([1, HOST]), "sequence 4 is swapped out: must be swapped in"),
        (
            lambda c: c.append(0, tokens(1), tokens(1), np.array([12])),
            r"slots\[0\] = 12: 0 sequences hold block 3: must be one, as after reserve",
        ),
        (lambda c: c.append(0, tokens(3), tokens(3), np.array([8, 7, 9])), r"slots\[1\] = 7: 2 sequences hold block 1"),
        (lambda c: c.append(0, tokens(2), tokens(2), np.array([8, 64])), r"slots\[1\] = 64: must be 0 to 63"),
        (lambda c: c.append(0, tokens(1), tokens(1), np.array([-1])), r"slots\[0\] = -1: must be 0 to 63"),
        (lambda c: c.append(0, tokens(2), tokens(2), np.array([8, 8])), r"slots\[1\] = 8: must occur once"),
        (lambda c: c.append(2, tokens(3), tokens(3), SLOTS), "layer = 2: must be 0 to 1"),
        (lambda c: c.commit([OTHER, FIRST], [[], [1]]), r"tokens\[1\] has 1 entries: must have at most 0"),
        (lambda c: c.commit([1, 2], [[1]]), "must be 2 sequences, one for each of"),
        (lambda c: c.fork(HOST), "sequence 4 is swapped out"),
        (lambda c: c.truncate(1, 8), "length = 8: must be at most 7, that of the sequence"),
        (lambda c: c.truncate(1, -1), "length = -1: must be >= 0"),
        (lambda c: c.truncate(HOST, 1), "sequence 4 is swapped out"),
        (lambda c: c.swap_out([1, HOST]), "sequence 4 is already swapped out"),
        (lambda c: c.swap_out([1, 1]), "must name each sequence once"),
        (lambda c: c.swap_in([1]), "sequence 1 is not swapped out"),
        (lambda c: c.block_tables([HOST]), "sequence 4 is swapped out"),
        (lambda c: c.k_cache(-1), "layer = -1: must be >= 0"),
    ],
    OutOfBlocksError: [
        (
            lambda c: c.reserve([FIRST, FORK, OTHER], [1, 2, 60]),
            "17 blocks are needed: must be at most 13, the free ones",
        ),
        (lambda c: c.swap_out([FIRST, FORK, OTHER]), "3 host blocks are needed: must be at most 2"),
    ],
    InvalidDtypeError: [
        (lambda c: c.append(0, tokens(3), tokens(3), SLOTS * 1.0), "slots.dtype = float64: must be an integer"),
        (
            lambda c: c.append(0, tokens(3, np.float16), tokens(3), SLOTS),
            "k.dtype = float16: must be float32, that of the cache",
        ),
        (lambda c: c.append(0, tokens(3), tokens(3, np.float64), SLOTS), "v.dtype = float64: must be float32"),
    ],
    InvalidShapeError: [
        (lambda c: c.append(0, tokens(3), tokens(3), SLOTS[None]), r"slots.shape = \(1, 3\): must be \(tok"),
        (lambda c: c.append(0, tokens(2), tokens(3), SLOTS), r"k, v and slots have \[2, 3, 3\] tokens"),
        (
            lambda c: c.append(0, tokens(3, heads=3), tokens(3), SLOTS),
            r"k.shape = \(3, 3, 16\): must be \(tokens, 2, 16\)",
        ),
        (lambda c: c.append(0, tokens(3), tokens(3, dim=8), SLOTS), r"v.shape = \(3, 2, 8\): must be \(tokens"),
    ],
    DeviceError: [
        (lambda c: c.append(0, on_gpu(tokens(3)), tokens(3), SLOTS), "k is on a GPU: must be on the host, as the"),
    ],
}


@pytest.mark.parametrize(
    ("error", "call", "message"),
    [(error, *case) for error, cases in CALLS.items() for case in cases],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_error_changes_nothing(
    cache: PagedKVCache, error: type[Exception], call: Callable[[PagedKVCache], Any], message: str
) -> None:
    before = snapshot(cache)
    with pytest.raises(error, match=message):
        call(cache)
    assert snapshot(cache) == before
    check_books(cache)


def test_a_device_that_fails_changes_nothing(cache: PagedKVCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise DeviceError("no compiler")

    monkeypatch.setattr(moves, "copy_blocks", fail)
    monkeypatch.setattr(moves, "move_blocks", fail)
    before = snapshot(cache)
    for function, ids in ((cache.reserve, [FIRST, OTHER]), (cache.swap_out, [OTHER]), (cache.swap_in, [HOST])):
        with pytest.raises(DeviceError, match="no compiler"):
            function(ids)
        assert snapshot(cache) == before


def test_errors_are_what_a_caller_expects() -> None:
    for error, builtin in ((OutOfBlocksError, MemoryError), (UnknownSequenceError, KeyError)):
        assert issubclass(error, builtin)
        assert issubclass(error, cuflash.CuflashError)
    assert str(UnknownSequenceError("no quotes")) == "no quotes"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_layers": 0}, InvalidValueError, "num_layers = 0: must be >= 1"),
        ({"num_blocks": 0}, InvalidValueError, "num_blocks = 0: must be >= 1"),
        ({"block_size": 0}, InvalidValueError, "block_size = 0: must be >= 1"),
        ({"block_size": 2.0}, InvalidTypeError, "block_size = 2.0: must be an integer"),
        ({"num_kv_heads": True}, InvalidTypeError, "num_kv_heads = True: must be an integer"),
        ({"head_dim_v": 0}, InvalidValueError, "head_dim_v = 0: must be >= 1"),
        ({"dtype": "int8"}, InvalidDtypeError, "dtype = 'int8': must be one of float16, bfloat16, float32, float64"),
        ({"dtype": "bfloat61"}, InvalidDtypeError, "dtype = 'bfloat61': must be one of"),
        ({"window": -1}, InvalidValueError, "window = -1: must be >= 0"),
        ({"prefix_cache": 1}, InvalidTypeError, "prefix_cache = 1: must be True or False"),
        ({"host_blocks": -1}, InvalidValueError, "host_blocks = -1: must be >= 0"),
        ({"like": [1]}, InvalidTypeError, "like is a list: must be a NumPy or CuPy array"),
    ],
)
def test_arguments_of_a_cache(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    sizes = {"num_layers": 1, "num_blocks": 4, "block_size": 4, "num_kv_heads": 1, "head_dim": 8}
    with pytest.raises(error, match=message):
        PagedKVCache(**{**sizes, **arguments})


def test_jax_arrays_cannot_be_written() -> None:
    jax = pytest.importorskip("jax")
    with pytest.raises(InvalidTypeError, match="must be writeable, which JAX arrays are not"):
        PagedKVCache(1, 4, 4, 1, 8, like=jax.numpy.zeros(1))


class TestPool:
    @pytest.mark.parametrize(
        ("call", "error", "message"),
        [
            (lambda p: p.allocate(3), OutOfBlocksError, "n = 3: must be at most 2, the free of 5 blocks"),
            (lambda p: p.allocate(-1), InvalidValueError, "n = -1: must be >= 0"),
            (lambda p: p.allocate(1.0), InvalidTypeError, "n = 1.0: must be an integer"),
            (lambda p: p.incref([0, 3]), InvalidValueError, "block 3 is free: must be held, or have a hash"),
            (lambda p: p.incref([0, 5]), InvalidValueError, "block 5: must be 0 to 4"),
            (lambda p: p.incref([0, -1]), InvalidValueError, "block -1: must be 0 to 4"),
            (lambda p: p.incref([0, 0.5]), InvalidTypeError, "blocks = .*must be a sequence of integers"),
            (lambda p: p.decref([0, 1, 1, 2]), InvalidValueError, "block 1 is free: must be held, to be freed"),
            (lambda p: p.decref([0, 4]), InvalidValueError, "block 4 is free"),
            (lambda p: p.register(3, "x"), InvalidValueError, "block 3 is not held: must be, to have a hash"),
            (lambda p: p.forget(9), InvalidValueError, "block 9 is not held"),
        ],
    )
    def test_an_error_changes_nothing(self, call: Any, error: type[Exception], message: str) -> None:
        pool = BlockPool(5)
        blocks = pool.allocate(3)
        pool.register(blocks[0], "first")
        before = str(vars(pool))
        with pytest.raises(error, match=message):
            call(pool)
        assert str(vars(pool)) == before

    @pytest.mark.parametrize(("n", "error"), [(-1, InvalidValueError), ("5", InvalidTypeError)])
    def test_size(self, n: Any, error: type[Exception]) -> None:
        with pytest.raises(error, match="num_blocks = "):
            BlockPool(n)
