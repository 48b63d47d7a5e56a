"""`Program`: what kernels and plans depend on, the checks of lengths, tables on a GPU and ascending ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import cuflash
from cuflash import masks
from cuflash.masks.mask import Mask
from cuflash.masks.patterns import with_window
from cuflash.masks.program import Program
from cuflash.masks.steps import Indices, Lengths, Place
from cuflash.masks.tables import Table
from tests.masks.cases import CASES, LENGTHS, reduced
from tests.masks.cpp import evaluate

N = 40
ids = np.arange(N) // 7
x = np.linspace(0, 1, N)


def lengths(seqlen_q: int = N, seqlen_k: int = N, batch: int = 1, heads: int = 1, **more: int) -> Lengths:
    return Lengths(batch, heads, heads, seqlen_q, seqlen_k, **more)


class TestCode:
    def test_window(self) -> None:
        assert masks.SlidingWindow(128, 0).program.code(False) == (
            "struct Mask {\n"
            "    static constexpr bool kByBatch = false, kByHead = false;\n"
            "    using Whole = int;\n"
            "    template <class At>\n"
            "    static __device__ __forceinline__ auto visible(const At& at) {\n"
            "        const auto t0 = sub(at.k(), add(at.q(), sub(at.len_k(), at.len_q())));\n"
            "        return logical_and(less_equal(at.whole(0), t0), less_equal(t0, at.whole(1)));\n"
            "    }\n"
            "};\n"
        )

    def test_tables_literals_and_reals(self) -> None:
        flags, words = np.ones((2, N), bool), np.full(N, 2**40)
        mask = masks.where(
            lambda batch, head, q, k: flags[batch, q]
            & (words[k] != head)
            & (x[q] * 0.5 < ids[k] // 3)
            & (k % 8 << 2 == ~q)
        )
        code = mask.program.code(True)
        assert "kByBatch = true, kByHead = true" in code
        assert "using Whole = i64;" in code
        assert (
            "logical_and(logical_and(logical_and(at.template table<0, u8>(at.batch(), at.q()), "
            "not_equal(at.template table<1, i64>(at.k()), at.head())), "
            "less(mul(at.template table<2, double>(at.q()), at.real(0)), "
            "to_real(floor_div(at.template table<3, int>(at.k()), at.literal(3))))), "
            "equal(shift_left(floor_mod(at.k(), at.literal(8)), at.literal(2)), bit_xor(at.q(), at.literal(-1))))"
        ) in code

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            (masks.SlidingWindow(128, 0), masks.SlidingWindow(77, 77)),
            (masks.Causal(), masks.SlidingWindow(None, 1)),
            (masks.Dilated(4, 3), masks.Dilated(4, 9)),
            (masks.PrefixLM(3), masks.PrefixLM(2**40)),
            (masks.GlobalTokens(1), masks.GlobalTokens(99)),
            (masks.GlobalTokens(np.array([1])), masks.GlobalTokens(np.array([7, 5]))),
            (masks.Documents(ids), masks.Documents(ids[:9])),
            (masks.RandomBlocks(64, 64, 16, 1), masks.RandomBlocks(128, 64, 16, 2, seed=3)),
            (masks.BigBird(64, 16, window_blocks=3), masks.BigBird(640, 16, window_blocks=5)),
            (masks.where(lambda b, h, q, k: x[q] - x[k] < 2.5), masks.where(lambda b, h, q, k: x[q] - x[k] < 0.0)),
            (masks.where(lambda b, h, q, k: q - 5 < k * 5), masks.where(lambda b, h, q, k: q - 4 < k * 5)),
        ],
    )
    def test_constants_and_arrays_change_no_code(self, one: Mask, other: Mask) -> None:
        assert one != other
        assert one.program.code(False) == other.program.code(False)
        assert one.program.structure == other.program.structure
        assert one.program.key != other.program.key

    @pytest.mark.parametrize("name", CASES)
    def test_no_constant_is_in_the_code(self, name: str) -> None:
        """But for divisors and -1: numbers of the text are those of literals, slots and types."""
        import re

        program = CASES[name].mask(97, 131).program
        text = re.sub(r"at\.literal\(-?\d+\)|at\.(whole|real)\(\d+\)|table<\d+, \w+>|\bt\d+\b", "", program.code(False))
        assert not re.findall(r"\d", text)

    def test_divisors_are_in_the_code(self) -> None:
        assert "at.literal(48)" in masks.Butterfly(48).program.code(False)
        assert masks.Butterfly(48).program.structure != masks.Butterfly(64).program.structure

    def test_wide_changes_the_type_alone(self) -> None:
        program = masks.BigBird(64, 16).program
        assert program.code(True) == program.code(False).replace("using Whole = int;", "using Whole = i64;")

    def test_what_is_used_twice_is_computed_once(self) -> None:
        code = masks.where(lambda b, h, q, k: ((q - k) * 3 < 9) & ((q - k) * 3 > -4)).program.code(False)
        assert code.count("sub(") == 1
        assert code.count("mul(") == 2  # each 3 is a constant of its own

    @pytest.mark.parametrize("name", CASES)
    def test_built_in_masks_as_code(self, name: str) -> None:
        for seqlen_q, seqlen_k in LENGTHS[3:7]:
            mask = CASES[name].mask(seqlen_q, seqlen_k)
            q, k = np.ogrid[:seqlen_q, :seqlen_k]
            got = evaluate(mask.program, False, Place(seqlen_q, seqlen_k).indices(q, k))
            want = mask.visible(seqlen_q, seqlen_k)[0, 0]
            np.testing.assert_array_equal(np.broadcast_to(got, want.shape), want)


class TestText:
    @pytest.mark.parametrize(
        "text",
        [
            "q - (k - 3) < q - k - 3",
            "q * (k + 2) // (k // 2 + 1) * 2 < -(q + k)",
            "(q < k) & (k < 5) | (q == 3) & ~((k < 2) ^ (q < 1))",
            "((q < k) | (k < 5)) & (q != -2)",
            "(q & 3 | k) ^ 1 < (q << 2) + (k >> 1)",
            "abs(q - k) % 7 == np.minimum(q, np.maximum(k, 2))",
            "ids[np.where(q < k, k, q)] / 2.0 * 0.5 <= x[k] - -1.5",
            "1.0 - abs(q - k) / (q + 1) < 0.5",
        ],
    )
    def test_it_is_written_as_python_has_it(self, text: str) -> None:
        function = eval(f"lambda batch, head, q, k: {text}", {"np": np, "ids": ids, "x": x})
        assert masks.where(function).program.text == text


class TestKey:
    def test_structure_constants_and_arrays(self) -> None:
        mask = masks.where(lambda b, h, q, k: (ids[q] == ids[k]) & (x[q] < 0.5) & (q - 3 < k))
        program = mask.program
        assert (program.wholes, program.reals) == ((3,), (0.5,))
        assert [table.name for table in program.tables] == ["ids", "x"]
        assert program == Program(mask._node)
        assert hash(program) == hash(Program(mask._node))
        assert len({program, Program(mask._node)}) == 1
        assert repr(program) == "Program((ids[q] == ids[k]) & (x[q] < 0.5) & (q - 3 < k))"

    def test_constants_that_only_compare_equal(self) -> None:
        """-0.0 is 0.0, NaN is not NaN: bits count."""
        masks_of = [masks.where(lambda b, h, q, k, c=c: 1.0 / (q * c) > k) for c in (0.0, -0.0)]  # type: ignore[misc]
        assert masks_of[0] != masks_of[1]
        nan = float("nan")
        assert masks.where(lambda b, h, q, k: q > nan) == masks.where(lambda b, h, q, k: q > nan)

    def test_tables_live_as_long_as_the_program(self) -> None:
        program = masks.Documents(np.arange(9)).program
        np.testing.assert_array_equal(program.tables[0].array, np.arange(9))


class TestWindow:
    def test_it_is_combined_once(self) -> None:
        mask = masks.Documents(ids)
        causal = with_window(mask, None, 0)
        assert with_window(mask, None, 0) is causal
        assert with_window(mask, 5, 0) is not causal
        assert with_window(mask, None, None) is mask
        assert causal == mask & masks.Causal()
        assert repr(causal) == "Documents(q_ids=<int32 (40,)>) & SlidingWindow(None, 0)"


class TestCheck:
    @pytest.mark.parametrize(
        ("mask", "at", "message"),
        [
            (masks.where(lambda b, h, q, k: ids[q] == ids[k]), lengths(4096),
             r"captured array 'ids' has 40 entries along axis 0, q reaches 4095: must stay below; np.minimum bounds"),
            (masks.where(lambda b, h, q, k: ids[q] == ids[k + 1]), lengths(),
             r"captured array 'ids' has 40 entries along axis 0, k \+ 1 reaches 40: must stay below"),
            (masks.where(lambda b, h, q, k: ids[q] == ids[k - 3]), lengths(),
             r"has 40 entries along axis 0, k - 3 reaches -3: must be >= 0, nothing wraps around; np.maximum"),
            (masks.where(lambda b, h, q, k: ids[ids[q] * 8] == k), lengths(),
             r"has 40 entries along axis 0, ids\[q\] \* 8 reaches 40"),
            (masks.Documents(ids), lengths(39), r"Documents: q_ids.shape = \(40,\): must be \(39,\), for seqlen_q"),
            (masks.Documents(ids), lengths(40, 41), r"Documents: q_ids.shape = \(40,\): must be \(41,\), for seqlen_k"),
            (masks.Documents(ids, ids[:5]), lengths(), r"k_ids.shape = \(5,\): must be \(40,\), for seqlen_k = 40"),
            (masks.Documents(ids[None]), lengths(batch=2),
             r"q_ids.shape = \(1, 40\): must be \(2, 40\), for batch = 2 and seqlen_q = 40"),
            (masks.PrefixLM(ids), lengths(), r"PrefixLM: length.shape = \(40,\): must be \(1,\), for batch = 1"),
            (masks.Dense(np.ones((N, 5), bool)), lengths(),
             r"Dense: array.shape = \(40, 5\): must be \(40, 40\), for seqlen_q = 40 and seqlen_k = 40"),
            (masks.Dense(np.ones((3, N, N), bool)), lengths(heads=2),
             r"array.shape = \(3, 40, 40\): must be \(2, 40, 40\), for num_heads = 2 and seqlen_q = 40 and seqlen_k"),
            (masks.Blocks(np.ones((3, 3), bool), 16), lengths(50),
             r"Blocks: matrix.shape = \(3, 3\): must be \(4, 3\), for seqlen_q = 50 in blocks of 16 and seqlen_k = 40"),
            (masks.Blocks(np.ones((3, 3), bool), 16), lengths(30), r"matrix.shape = \(3, 3\): must be \(2, 3\)"),
            (masks.Blocks(np.ones((1, 1), bool), 16), lengths(), r"matrix.shape = \(1, 1\): must be \(3, 3\)"),
            (masks.RandomBlocks(N, N, 16, 1), lengths(64), r"RandomBlocks: matrix.shape = \(3, 3\): must be \(4, 3\)"),
            (masks.BigBird(N, 16), lengths(64, 64), r"RandomBlocks: matrix.shape = \(3, 3\): must be \(4, 4\)"),
            (masks.Documents(ids), lengths(seqlen_q=50, total_q=90, total_k=90),
             r"q_ids.shape = \(40,\): must be at least \(50,\), for seqlen_q = 50"),
        ],
    )
    def test_arrays(self, mask: Mask, at: Lengths, message: str) -> None:
        with pytest.raises(cuflash.InvalidShapeError, match=message):
            mask.program.check(at)

    @pytest.mark.parametrize(
        ("mask", "message"),
        [
            (masks.where(lambda b, h, q, k: q // k < 3), "the divisor k in the mask reaches 0: must be >= 1; np"),
            (masks.where(lambda b, h, q, k: q % (k - 2) < 3), "the divisor k - 2 in the mask reaches -2: must be >= 1"),
            (masks.where(lambda b, h, q, k: q << k * 2 < 3), r"the shift count k \* 2 in the mask reaches 0 to 78: m"),
            (masks.where(lambda b, h, q, k: (q + 2**40) ** 2 < k),
             r"in the mask reaches 1208925819614629174706176 to .* at batch = 1, num_heads = 1, num_kv_heads = 1, "
             r"seqlen_q = 40, seqlen_k = 40: must fit int64"),
        ],
    )
    def test_numbers(self, mask: Mask, message: str) -> None:
        with pytest.raises(cuflash.InvalidValueError, match=message):
            mask.program.check(lengths())

    def test_what_bounds_an_index(self) -> None:
        def function(batch: Any, head: Any, q: Any, k: Any) -> Any:
            return (ids[np.minimum(k + 1, N - 1)] > ids[np.maximum(q - 3, 0)]) & (q % (k + 1) > 0)

        want = function(0, 0, *np.ogrid[:N, :N])
        np.testing.assert_array_equal(masks.where(function).visible(N)[0, 0], want)

    def test_looking_is_checked_as_well(self) -> None:
        for look in (masks.Documents(ids).visible, masks.Documents(ids).density, masks.Documents(ids).plot):
            with pytest.raises(cuflash.InvalidShapeError, match=r"q_ids\.shape"):
                look(41)

    def test_nothing_to_evaluate_needs_no_indices(self) -> None:
        mask = masks.where(lambda b, h, q, k: ids[q + 1000] == k)
        for none in (lengths(0), lengths(seqlen_k=0), lengths(batch=0), lengths(heads=0)):
            mask.program.check(none)

    def test_packed(self) -> None:
        """Tokens are bounded by the totals, lengths by the longest sequence."""

        class ByToken(Mask):
            def _visible(self, at: Indices) -> Any:
                table = Table("ids", ids.astype(np.int32))
                return table[at.q_token] == table[at.k_token]

        packed = lengths(10, 10, batch=4, total_q=N, total_k=N)
        ByToken().program.check(packed)
        with pytest.raises(cuflash.InvalidShapeError, match="q_token reaches 40"):
            ByToken().program.check(packed._replace(total_q=N + 1))
        masks.Documents(ids).program.check(packed)
        visible = ByToken().program.visible(Place(5, 5, 1, 0, 0, 10, 20).indices(*np.ogrid[:5, :5]))
        np.testing.assert_array_equal(visible, ids[10:15, None] == ids[20:25])


class TestWide:
    @pytest.mark.parametrize(
        ("mask", "at", "wide"),
        [
            (masks.Causal(), lengths(2**31 - 1, 2**31 - 1), False),
            (masks.Causal(), lengths(2**31 - 1, 5), False),
            (masks.Causal(), lengths(2**31, 5), True),
            (masks.Causal(), lengths(2**30, 2**30, total_q=2**30, total_k=2**30), False),
            (masks.Causal(), lengths(2**30 + 1, 2**30 + 1, total_q=2**31, total_k=2**30), True),
            (masks.SlidingWindow(2**31, 0), lengths(), True),
            (masks.SlidingWindow(2**31 - 1, 0), lengths(), False),
            (masks.where(lambda b, h, q, k: q * k < 7), lengths(46341, 46341), False),
            (masks.where(lambda b, h, q, k: q * k < 7), lengths(46342, 46342), True),
            (masks.where(lambda b, h, q, k: q << 26 > k), lengths(32), False),
            (masks.where(lambda b, h, q, k: q << 26 > k), lengths(33), True),
            (masks.Documents(np.full(N, 2**31)), lengths(), True),
            (masks.Documents(np.full(N, 2**31 - 1)), lengths(), False),
            (masks.Documents(np.full(N, -(2**31))), lengths(), True),
            (masks.where(lambda b, h, q, k: ids[q] * 2**29 < k), lengths(), True),
            (masks.where(lambda b, h, q, k: ids[q] * 2**28 < k), lengths(), False),
        ],
    )
    def test_exactly_where_int32_ends(self, mask: Mask, at: Lengths, wide: bool) -> None:
        assert mask.program.wide(at) == wide


class _Gpu:
    """As much of a CuPy array as masks use; its elements are counted when they are read."""

    __module__ = "cupy"
    __cuda_array_interface__ = None

    def __init__(self, host: np.ndarray) -> None:
        self.host, self.shape, self.ndim, self.dtype, self.size = host, host.shape, host.ndim, host.dtype, host.size
        self.flags = SimpleNamespace(c_contiguous=host.flags.c_contiguous)
        self.data = SimpleNamespace(ptr=host.__array_interface__["data"][0])
        self.reads = 0

    def __dlpack__(self, **_: object) -> object:
        raise AssertionError("must not be exported")

    def __array__(self, *_: object, **__: object) -> np.ndarray:
        raise AssertionError("must not be read back")

    def min(self) -> np.generic:
        self.reads += 1
        return self.host.min()

    def max(self) -> np.generic:
        self.reads += 1
        return self.host.max()

    def view(self, dtype: Any) -> _Gpu:
        return _Gpu(self.host.view(dtype))

    def astype(self, dtype: Any, order: str = "K") -> _Gpu:
        return _Gpu(self.host.astype(dtype, order=order))

    def reshape(self, shape: Any) -> _Gpu:
        return _Gpu(self.host.reshape(shape))


class TestTablesOnAGpu:
    def test_it_is_taken_as_it_is(self) -> None:
        array = _Gpu(np.arange(N, dtype=np.int32))
        for mask in (masks.Documents(array), masks.where(lambda b, h, q, k: array[q] == array[k])):
            assert len(mask.program.tables) == 1
            assert mask.program.tables[0].array is array
            before = array.reads
            mask.program.check(lengths())
            assert array.reads == before  # such as within a CUDA graph that is captured
        assert masks.Documents(array) == masks.Documents(array)

    def test_booleans_and_wide_numbers(self) -> None:
        flags, words = _Gpu(np.ones((N, N), bool)), _Gpu(np.full(N, 2**40))
        table = masks.Dense(flags).program.tables[0]
        assert table.array.dtype == np.uint8
        assert table.array.data.ptr == flags.data.ptr
        assert masks.Documents(words).program.tables[0].array is words
        assert masks.Documents(words).program.wide(lengths())

    def test_the_cpu_cannot_read_it(self) -> None:
        mask = masks.Documents(_Gpu(np.arange(N, dtype=np.int32)))
        with pytest.raises(cuflash.DeviceError, match="captured array 'q_ids' is on a GPU: must be a NumPy array"):
            mask.visible(N)
        with pytest.raises(cuflash.DeviceError, match="captured array 'q_ids' is on a GPU: must be a NumPy array"):
            mask.density(N)

    def test_global_positions_are_of_the_host(self) -> None:
        with pytest.raises(cuflash.InvalidTypeError, match=r"tokens = .*: must be a host array of integers"):
            masks.GlobalTokens(_Gpu(np.arange(3, dtype=np.int32)))

    def test_other_arrays_on_a_gpu(self) -> None:
        array: Any = type("Tensor", (), {
            "shape": (N,), "ndim": 1, "__dlpack__": None, "__dlpack_device__": lambda self: (2, 0),
        })()
        with pytest.raises(cuflash.InvalidTypeError, match=r"Tensor on a GPU: must be a CuPy array, which cupy\.from"):
            masks.where(lambda b, h, q, k: array[q] < k)


class TestAscending:
    def test_sorted_indices(self) -> None:
        """Of sparse sequences: bounds of a lookup are those of its ends, per head."""
        rng = np.random.default_rng(0)
        q_index = np.sort(rng.choice(1000, (2, 90), replace=False), axis=1).astype(np.int32)
        k_index = np.sort(rng.choice(1000, (2, 70), replace=False), axis=1).astype(np.int32)

        class Kept(Mask):
            def _visible(self, at: Indices) -> Any:
                queries = Table("q_index", q_index, ascending=True, bounds=(0, 2**31 - 1))
                keys = Table("k_index", k_index, ascending=True, bounds=(0, 2**31 - 1))
                return queries[at.head, at.q] >= keys[at.head, at.k]

        program = Kept().program
        assert "at.template ascending_table<1, int>(at.head(), at.q())" in program.code(False)
        program.check(lengths(90, 70, heads=2))
        assert not program.wide(lengths(90, 70, heads=2))
        for head in range(2):
            want = reduced(q_index[head, :, None] >= k_index[head], 16, 8)
            np.testing.assert_array_equal(program.verdicts(Place(90, 70, 0, head, head), 16, 8), want)

    def test_bounds_need_no_reading(self) -> None:
        array = _Gpu(np.arange(N, dtype=np.int32))
        table = Table("order", array, bounds=(0, N - 1))
        assert table.limits == (0, N - 1)
        assert array.reads == 0
