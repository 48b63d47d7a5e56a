"""`where`: what a function may do, what it may capture, and every error of what it may not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cuflash
from cuflash import TraceError, masks
from cuflash.masks.program import MAX_REALS, MAX_TABLES, MAX_WHOLES

N = 12
GLOBAL_IDS = np.arange(N) // 5
GLOBAL_FLAGS = np.arange(N) % 2 == 0
GLOBAL_WIDTH = 4


def by_pairs(function: Callable[..., Any], batch: int = 1, heads: int = 1) -> np.ndarray:
    """bool (batch, heads, N, N), of one call for each pair."""
    result = np.empty((batch, heads, N, N), bool)
    for indices in np.ndindex(result.shape):
        result[indices] = function(*map(np.int64, indices))
    return result


def agrees(function: Callable[..., Any], batch: int = 1, heads: int = 1) -> masks.Mask:
    mask = masks.where(function)
    visible = mask.visible(N, batch=batch, num_heads=heads)
    np.testing.assert_array_equal(visible, by_pairs(function, batch, heads))
    return mask


def near(q: Any, k: Any) -> Any:
    return abs(GLOBAL_IDS[q] - GLOBAL_IDS[k]) < 2


class TestOperations:
    @pytest.mark.parametrize(
        "function",
        [
            lambda batch, head, q, k: q >= k,
            lambda batch, head, q, k: (q >= k) & ~(q - k > 3),
            lambda batch, head, q, k: 3 < k,  # noqa: SIM300
            lambda batch, head, q, k: (5 - q) * 2 + -k == +k - 7,
            lambda batch, head, q, k: (q ^ k) & (k | 3) < (100 >> 3) - (1 << 2) ^ 1,
            lambda batch, head, q, k: q / 3 < k * 0.5 + 1,
            lambda batch, head, q, k: 7.5 / (1 + q) > 3 - k / 2.0,
            lambda batch, head, q, k: (k - q) // 3 % 2 == 0,
            lambda batch, head, q, k: divmod(q, 4)[0] == divmod(k, 4)[1],
            lambda batch, head, q, k: (q - k) ** 2 + (q - 5) ** 3 < 11,
            lambda batch, head, q, k: 100 // (k + 1) % (q + 2) < 3,
            lambda batch, head, q, k: (q << (k % 4)) >> (q % 3) < 9,
            lambda batch, head, q, k: True,
            lambda batch, head, q, k: np.bool_(False),
            lambda batch, head, q, k: (q < k) | True,
            lambda batch, head, q, k: (q < k) ^ True,
            lambda batch, head, q, k: (q < k) == (q < 5),
            lambda batch, head, q, k: (q < k) != (k > 5),
            lambda batch, head, q, k: (1 * (q < k)) + (k < 7) * 2 == 3,
            lambda batch, head, q, k: sum(abs(q // n - k // n) for n in (1, 2, 3)) < 5,
        ],
    )
    def test_operators(self, function: Callable[..., Any]) -> None:
        agrees(function)

    @pytest.mark.parametrize(
        "function",
        [
            lambda batch, head, q, k: np.abs(np.subtract(q, k)) < np.int64(3),
            lambda batch, head, q, k: np.minimum(q, 4) + np.maximum(k, np.int32(6)) < 11,
            lambda batch, head, q, k: np.logical_and(q < k, np.logical_or(q > 2, np.logical_not(k > 5))),
            lambda batch, head, q, k: np.logical_xor(np.equal(q, k), np.greater_equal(q, 4)),
            lambda batch, head, q, k: np.where(q > k, q - k, 2 * (k - q)) <= 4,
            lambda batch, head, q, k: np.where(q > k, q < 8, k < 3),
            lambda batch, head, q, k: np.where(q > k, 1.5, q) < 3,
            lambda batch, head, q, k: np.where(np.bool_(True), q, k) < 3,
            lambda batch, head, q, k: np.bitwise_and(q, 6) == np.bitwise_or(k, np.bitwise_xor(q, 1)),
            lambda batch, head, q, k: np.floor_divide(q, 3) == np.mod(k, 3),
            lambda batch, head, q, k: np.not_equal(np.left_shift(q, 1), np.right_shift(k, 1)),
            lambda batch, head, q, k: np.less(np.square(q - k), np.add(2, np.multiply(k, 1))),
            lambda batch, head, q, k: np.true_divide(q, 2) < np.negative(np.positive(k)) + 9,
            lambda batch, head, q, k: np.power(q, 2) < np.invert(k) + 50,
            lambda batch, head, q, k: np.float32(2.5) > q - np.float64(0.5),
            lambda batch, head, q, k: np.array(5) > q,
        ],
    )
    def test_functions_of_numpy(self, function: Callable[..., Any]) -> None:
        agrees(function)

    def test_batch_and_head(self) -> None:
        mask = agrees(lambda batch, head, q, k: (q + batch > k) & (k > head), batch=2, heads=3)
        assert (mask.program.by_batch, mask.program.by_head) == (True, True)

    def test_whole_numbers_are_exact_and_reals_are_float64(self) -> None:
        large = 2**53 + 1
        assert not masks.where(lambda batch, head, q, k: q + large == 2**53).visible(1).any()
        assert masks.where(lambda batch, head, q, k: q + float(large) == 2.0**53).visible(1).all()
        assert masks.where(lambda batch, head, q, k: (q + 1) / 3 == 1 / 3).visible(1).all()

    def test_the_function_is_called_once(self) -> None:
        calls = []

        def function(batch: Any, head: Any, q: Any, k: Any) -> Any:
            calls.append(q)
            return q > k

        mask = masks.where(function)
        mask.visible(3)
        (mask & masks.Causal()).density(5)
        assert len(calls) == 1

    def test_deep_expressions(self) -> None:
        """A graph of any depth, whatever Python's recursion limit."""

        def function(batch: Any, head: Any, q: Any, k: Any) -> Any:
            x = q
            for _ in range(5000):
                x = np.maximum(x, k)
            return x == q

        agrees_with = np.tri(N, dtype=bool)
        np.testing.assert_array_equal(masks.where(function).visible(N)[0, 0], agrees_with)
        assert "..." in repr(masks.where(function))


class TestCaptures:
    def test_closure_global_and_default(self) -> None:
        ids = np.arange(N) % 3

        def function(batch: Any, head: Any, q: Any, k: Any, flags: Any = GLOBAL_FLAGS) -> Any:
            return (ids[q] == GLOBAL_IDS[k]) & flags[k]

        mask = agrees(function)
        assert repr(mask) == "where(lambda batch, head, q, k: (ids[q] == GLOBAL_IDS[k]) & flags[k])"

    def test_functions_that_it_calls(self) -> None:
        x = np.linspace(0, 3, N)
        width = 1.25

        def distance(q: Any, k: Any) -> Any:
            return abs(x[q] - x[k])

        agrees(lambda batch, head, q, k: (distance(q, k) < width) & near(q, k))

    def test_keyword_defaults_and_inner_functions(self) -> None:
        def function(batch: Any, head: Any, q: Any, k: Any, *, ids: Any = GLOBAL_IDS) -> Any:
            def inner(i: Any) -> Any:
                return GLOBAL_IDS[i] + ids[i]

            return inner(q) == inner(k)

        agrees(function)

    def test_two_and_more_axes(self) -> None:
        grid = np.random.default_rng(0).random((3, 3)) < 0.5
        table = np.random.default_rng(0).integers(0, 5, (2, 3, N, N))
        points = np.random.default_rng(0).random((N, 2))
        agrees(lambda batch, head, q, k: grid[q // GLOBAL_WIDTH, k // GLOBAL_WIDTH])
        agrees(lambda batch, head, q, k: table[batch, head, q, k] > 2, batch=2, heads=3)
        agrees(lambda batch, head, q, k: table[batch][head][q][k] > 2, batch=2, heads=3)
        agrees(lambda batch, head, q, k: sum((points[q, i] - points[k][i]) ** 2 for i in range(points.shape[1])) < 0.2)

    def test_an_index_that_is_looked_up(self) -> None:
        order = np.random.default_rng(0).permutation(N)
        agrees(lambda batch, head, q, k: order[order[q]] <= order[k])

    @pytest.mark.parametrize(
        ("dtype", "kept"),
        [
            ("bool", "uint8"), ("int8", "int32"), ("uint16", "int32"), ("int32", "int32"), ("int64", "int32"),
            ("uint64", "int32"), (">i4", "int32"), ("float16", "float32"), (ml_dtypes.bfloat16, "float32"),
            ("float32", "float32"), ("float64", "float64"), (">f8", "float64"),
        ],
    )
    def test_dtypes(self, dtype: Any, kept: str) -> None:
        values = (np.arange(N) % 4 % 3).astype(dtype)
        mask = agrees(lambda batch, head, q, k: values[q] == values[k])
        assert mask.program.tables[0].array.dtype == kept

    def test_large_whole_numbers_stay(self) -> None:
        values = np.array([2**40, -(2**40)] * (N // 2))
        mask = agrees(lambda batch, head, q, k: values[q] < values[k])
        assert mask.program.tables[0].array.dtype == np.int64

    def test_strides(self) -> None:
        values = np.arange(4 * N).reshape(2, 2 * N)[::-1, ::-2] % 5
        agrees(lambda batch, head, q, k: values[batch, q] == values[1, k], batch=2)

    @pytest.mark.parametrize("module", ["torch", "jax.numpy"])
    def test_arrays_of_frameworks(self, module: str) -> None:
        asarray = pytest.importorskip(module).asarray
        ids, limit = asarray([0, 1, 1, 2] * 3), asarray(2)
        mask = masks.where(lambda batch, head, q, k: (ids[q] == ids[k]) & (q - k < limit))
        host = np.array([0, 1, 1, 2] * 3)
        want = by_pairs(lambda batch, head, q, k: (host[q] == host[k]) & (q - k < 2))
        np.testing.assert_array_equal(mask.visible(N), want)

    def test_host_arrays_are_of_the_time_of_the_call(self) -> None:
        ids = np.zeros(N, int)
        mask = masks.where(lambda batch, head, q, k: ids[q] == ids[k])
        ids[0] = 1
        assert mask.visible(N).all()

    def test_one_array_is_one_table(self) -> None:
        ids = np.arange(N)
        other = ids
        assert len(masks.where(lambda batch, head, q, k: ids[q] + ids[k] < other[k]).program.tables) == 1

    def test_the_function_stays_as_it_is(self) -> None:
        ids = np.arange(N)

        def function(batch: Any, head: Any, q: Any, k: Any) -> Any:
            return ids[q] < GLOBAL_IDS[k]

        masks.where(function)
        assert function(0, 0, 3, 1) is np.False_
        assert GLOBAL_IDS[7] == 1


ids = np.arange(N)
scores = np.ones((N, N), np.float32)
grid = np.ones((3, 4), bool)


class Holder:
    ids = np.arange(N)


def causal_branch(batch: Any, head: Any, q: Any, k: Any) -> Any:
    if q < k:
        return False
    return k < 5


def assigns(batch: Any, head: Any, q: Any, k: Any) -> Any:
    ids[q] = 0
    return q < k


def assigns_to_an_index(batch: Any, head: Any, q: Any, k: Any) -> Any:
    q[0] = 3
    return q < k


def no_return(batch: Any, head: Any, q: Any, k: Any) -> Any:
    pass


BRANCHES = r"cannot branch on an index: instead of if, and, or, not, in, min, max or a chained comparison write &, \|"

ERRORS: list[tuple[Callable[..., Any], str]] = [
    (causal_branch, BRANCHES),
    (lambda batch, head, q, k: q < k and k < 5, BRANCHES),
    (lambda batch, head, q, k: q < k or k < 5, BRANCHES),
    (lambda batch, head, q, k: not q < k, BRANCHES),
    (lambda batch, head, q, k: 2 < q < 5, BRANCHES),
    (lambda batch, head, q, k: min(q, k) < 5, BRANCHES),
    (lambda batch, head, q, k: q in (1, 2), BRANCHES),
    (lambda batch, head, q, k: q in {1, 2}, "unhashable"),
    (lambda batch, head, q, k: any(q == i for i in range(3)), BRANCHES),
    (lambda batch, head, q, k: int(q) < 5, "must not be turned into one Python number"),
    (lambda batch, head, q, k: float(q) < 5, "must not be turned into one Python number"),
    (lambda batch, head, q, k: math.sqrt(q) < 5, "must not be turned into one Python number"),
    (lambda batch, head, q, k: math.floor(q / 2) < 5, "must not be turned into one Python number"),
    (lambda batch, head, q, k: range(q), "can pick only from an array that the mask's function captures"),
    (lambda batch, head, q, k: [1, 2, 3][q] < k, "can pick only from an array that the mask's function captures"),
    (lambda batch, head, q, k: Holder.ids[q] < k, "can pick only from an array that the mask's function captures"),
    (lambda batch, head, q, k: np.asarray(q) < k, "can pick only from an array that the mask's function captures"),
    (lambda batch, head, q, k: q[0] < k, "must not be indexed, iterated or assigned to"),
    (assigns_to_an_index, "must not be indexed, iterated or assigned to"),
    (lambda batch, head, q, k: sum(q) < k, "must not be indexed, iterated or assigned to"),
    (assigns, "captured array 'ids': must not be assigned to"),
    (lambda batch, head, q, k: ids < k, "captured array 'ids': a mask's function must index it down to one element"),
    (lambda batch, head, q, k: q < ids, r"an array of shape \(12,\) in a mask's function: must be indexed"),
    (lambda batch, head, q, k: q < np.arange(3), r"an array of shape \(3,\) in a mask's function: must be indexed"),
    (lambda batch, head, q, k: ids.max() < k, "captured array 'ids': a mask's function must index it down"),
    (lambda batch, head, q, k: np.max(ids) < k, "captured array 'ids': a mask's function must index it down"),
    (lambda batch, head, q, k: scores[q] < k, "captured array 'scores': a mask's function must index it down"),
    (lambda batch, head, q, k: ids[q, k] < k, "captured array 'ids': must have 1 indices, has 2"),
    (lambda batch, head, q, k: ids[1:][q] < k, "captured array 'ids': index slice.* must be a whole number"),
    (lambda batch, head, q, k: ids[q < k] < k, "captured array 'ids': index along axis 0 must be whole, is a truth"),
    (lambda batch, head, q, k: ids[q / 2] < k, "captured array 'ids': index along axis 0 must be whole, is a real"),
    (lambda batch, head, q, k: ids[-1] < k, "captured array 'ids': index -1 along axis 0 must be 0 to 11"),
    (lambda batch, head, q, k: grid[q, 4], "captured array 'grid': index 4 along axis 1 must be 0 to 3"),
    (lambda batch, head, q, k: q - k, r"gives a whole number: must give a truth; write != 0"),
    (lambda batch, head, q, k: -0.1 * abs(q - k), "gives a real number: must give a truth; scores are added by bias="),
    (lambda batch, head, q, k: scores[q, k], "gives a real number: must give a truth; scores are added by bias="),
    (no_return, "gives None: must return a truth"),
    (lambda batch, head, q, k: "q", "gives 'q': must return a truth"),
    (lambda batch, head, q, k: 1, "gives 1: must return a truth"),
    (lambda batch, head, q, k: (q < k, k < q), "must return a truth"),
    (lambda batch, head, q, k: ids, "gives an array: must give a truth of one pair"),
    (lambda batch, head, q, k: np.ones((3, 3), bool), "gives an array: must give a truth of one pair"),
    (lambda batch, head, q, k: masks.Causal(), "gives a mask: must give a truth"),
    (lambda batch, head, q, k: (q - k) & (q < 2.5 * k) == 0.5 & q, "where a mask's function needs a whole one"),
    (lambda batch, head, q, k: q / 2 // 3 < k, "a real number where a mask's function needs a whole one"),
    (lambda batch, head, q, k: q % 2.0 < k, "a real number where a mask's function needs a whole one"),
    (lambda batch, head, q, k: q // 0 < k, "divisor 0 in a mask's function: must be 1 to"),
    (lambda batch, head, q, k: q % -3 < k, "divisor -3 in a mask's function: must be 1 to"),
    (lambda batch, head, q, k: q << 63 < k, "shift count 63 in a mask's function: must be 0 to 62"),
    (lambda batch, head, q, k: q >> -1 < k, "shift count -1 in a mask's function: must be 0 to 62"),
    (lambda batch, head, q, k: q**0.5 < k, "the exponent must be a whole constant, 1 to 8"),
    (lambda batch, head, q, k: 2**q < k, "the exponent must be a whole constant, 1 to 8"),
    (lambda batch, head, q, k: q**9 < k, "the exponent must be a whole constant, 1 to 8"),
    (lambda batch, head, q, k: np.sqrt(q) < k, "np.sqrt in a mask's function: must be one of absolute, add"),
    (lambda batch, head, q, k: np.minimum.reduce(q) < 3, "np.minimum.reduce in a mask's function: must be one of"),
    (lambda batch, head, q, k: np.add(q, k, dtype=int) < 3, "np.add in a mask's function: .*, without keywords"),
    (lambda batch, head, q, k: np.clip(q, 0, 3) < k, "np.clip in a mask's function: must be one of"),
    (lambda batch, head, q, k: np.where(q < k), "np.where in a mask's function"),
    (lambda batch, head, q, k: np.where(q, q, k) < 3, "a whole number where a mask's function needs a truth: write"),
    (lambda batch, head, q, k: np.logical_and(q, k < 3), "a whole number where a mask's function needs a truth"),
    (lambda batch, head, q, k: q < 2**63, "must fit int64"),
    (lambda batch, head, q, k: q < 1j, "must be an index, a number or a truth"),
    (lambda batch, head, q, k: q == None, "None, a NoneType, in a mask's function: must be an index"),  # noqa: E711
    (lambda batch, head, q, k: q + "a" < k, "'a', a str, in a mask's function: must be an index"),
    (lambda batch, head, q, k: q @ k < 3, "cannot be traced into an expression of its indices: unsupported operand"),
    (lambda q, k: q < k, r"must take \(batch, head, q, k\)"),
    (lambda batch, head, q, k, more: q < k, r"must take \(batch, head, q, k\)"),
]


@pytest.mark.parametrize(("function", "message"), ERRORS)
def test_what_cannot_be_traced(function: Callable[..., Any], message: str) -> None:
    with pytest.raises(TraceError, match=message) as caught:
        masks.where(function)
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value, cuflash.CuflashError)


def test_nothing_was_written() -> None:
    np.testing.assert_array_equal(ids, np.arange(N))


@pytest.mark.parametrize("value", [3, None, np.ones((3, 3), bool), masks.Causal()])
def test_no_function(value: object) -> None:
    with pytest.raises(cuflash.InvalidTypeError, match=r"function is a .*: must be a function of \(batch, head, q"):
        masks.where(value)


@pytest.mark.parametrize(
    ("array", "error", "message"),
    [
        (np.ones(N, complex), cuflash.InvalidDtypeError, "values.dtype = complex128: must be bool, an integer or a"),
        (np.array(["a"] * N), cuflash.InvalidDtypeError, "values.dtype = <U1: must be bool"),
        (np.full(N, 2**63, np.uint64), cuflash.InvalidDtypeError, "values.dtype = uint64: its values must fit int64"),
        (np.ones((1,) * 5), cuflash.InvalidShapeError, r"values.shape = \(1, 1, 1, 1, 1\): must have 1 to 4 axes"),
        (np.ma.array(np.ones(N)), cuflash.InvalidTypeError, "values is a .*MaskedArray: must be a plain array"),
    ],
)
def test_arrays_that_cannot_be_tables(array: Any, error: type, message: str) -> None:
    values = array
    with pytest.raises(error, match=message):
        masks.where(lambda batch, head, q, k: values[q] > 0)


class TestLimits:
    def test_constants(self) -> None:
        def many(count: int, factor: float) -> masks.Mask:
            return masks.where(lambda batch, head, q, k: sum(abs(q - factor * i) for i in range(1, count + 1)) < k)

        assert len(many(MAX_WHOLES - 1, 3).program.wholes) == MAX_WHOLES
        with pytest.raises(TraceError, match="the mask has 17 different constant whole numbers: must have at most 16"):
            many(MAX_WHOLES, 3)
        assert len(many(MAX_REALS - 1, 0.5).program.reals) == MAX_REALS  # sum begins with a zero
        with pytest.raises(TraceError, match="the mask has 9 different constant reals: must have at most 8"):
            many(MAX_REALS, 0.5)

    def test_arrays(self) -> None:
        def of(value: int) -> masks.Mask:
            array = np.full(N, value)
            return masks.where(lambda batch, head, q, k: array[q] == array[k])

        mask = of(0)
        for value in range(1, MAX_TABLES):
            mask &= of(value)
        assert len(mask.program.tables) == MAX_TABLES
        with pytest.raises(TraceError, match="the mask has 9 captured arrays: must have at most 8"):
            (mask & of(9)).visible(N)
