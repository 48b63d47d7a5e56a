"""Built-in masks against their formulas: pairs, tiles, densities; what they look like and that they do not change."""

from __future__ import annotations

import dataclasses
import doctest
import inspect

import numpy as np
import pytest

from cuflash import masks
from cuflash.masks.steps import Place
from tests.masks.cases import CASES, LENGTHS, drawn, formula, ids, reduced

each_case = pytest.mark.parametrize("name", CASES)
each_length = pytest.mark.parametrize("lengths", LENGTHS, ids=lambda pair: f"{pair[0]}x{pair[1]}")


@each_case
@each_length
def test_pairs_and_density(name: str, lengths: tuple[int, int]) -> None:
    mask = CASES[name].mask(*lengths)
    want = formula(CASES[name], *lengths)
    np.testing.assert_array_equal(mask.visible(*lengths)[0, 0], want)
    assert mask.density(*lengths) == pytest.approx(want.mean(), rel=1e-12)


@each_case
@each_length
def test_tiles(name: str, lengths: tuple[int, int]) -> None:
    mask = CASES[name].mask(*lengths)
    want = formula(CASES[name], *lengths)
    for blocks in ((16, 16), (64, 32), (13, 29), (200, 8), (1, 200)):
        np.testing.assert_array_equal(mask.program.verdicts(Place(*lengths), *blocks), reduced(want, *blocks))


@each_case
def test_nothing_to_see(name: str) -> None:
    """Axes of no entries, and of one where the mask has as many."""
    if name in ("blocks", "dense", "dense column", "dense row", "documents"):
        return  # an array of that length; below
    for lengths in ((0, 5), (5, 0), (0, 0)):
        mask = CASES[name].mask(*lengths)
        assert mask.visible(*lengths).shape == (1, 1, *lengths)
        assert mask.density(*lengths) == 0
        assert mask.program.verdicts(Place(*lengths), 16, 16).shape == tuple(-(-n // 16) for n in lengths)


def test_arrays_of_no_entries() -> None:
    assert masks.Documents(np.zeros(0, int), ids(5)).visible(0, 5).shape == (1, 1, 0, 5)
    assert masks.Dense(np.zeros((0, 5), bool)).visible(0, 5).shape == (1, 1, 0, 5)
    assert masks.Blocks(np.zeros((0, 1), bool), 16).visible(0, 5).shape == (1, 1, 0, 5)


class TestHeadsAndEntries:
    """Arrays with axes of heads and of entries of the batch."""

    def test_documents(self) -> None:
        q_ids, k_ids = np.array([[0, 0, 1], [0, 1, 1]]), np.array([[0, 1, 1, 0], [1, 1, 0, 0]])
        want = q_ids[:, None, :, None] == k_ids[:, None, None, :]
        mask = masks.Documents(q_ids, k_ids)
        np.testing.assert_array_equal(mask.visible(3, 4, batch=2), want)
        own = masks.Documents(q_ids).visible(3, batch=2)
        np.testing.assert_array_equal(own[1, 0], [[1, 0, 0], [0, 1, 1], [0, 1, 1]])
        assert (mask.program.by_batch, mask.program.by_head) == (True, False)
        assert mask.density(3, 4, batch=2) == want.mean()

    def test_documents_of_mixed_rank(self) -> None:
        mask = masks.Documents(np.array([[0, 1], [1, 1]]), np.array([1, 0, 1]))
        np.testing.assert_array_equal(mask.visible(2, 3, batch=2)[:, 0, 0], [[0, 1, 0], [1, 0, 1]])

    def test_prefixes(self) -> None:
        mask = masks.PrefixLM(np.array([0, 3]))
        np.testing.assert_array_equal(mask.visible(3, batch=2)[1], np.ones((1, 3, 3)))
        np.testing.assert_array_equal(mask.visible(3, batch=2)[0, 0], np.tri(3))

    @pytest.mark.parametrize("shape", [(3, 5, 7), (1, 5, 7), (2, 3, 5, 7), (2, 1, 5, 7), (1, 3, 5, 1), (1, 1, 1, 1)])
    def test_dense(self, shape: tuple[int, ...]) -> None:
        array = np.random.default_rng(0).random(shape) < 0.5
        mask = masks.Dense(array)
        np.testing.assert_array_equal(mask.visible(5, 7, batch=2, num_heads=3), np.broadcast_to(array, (2, 3, 5, 7)))
        four = (1,) * (4 - len(shape)) + shape
        assert (mask.program.by_batch, mask.program.by_head) == (four[0] > 1, four[1] > 1)

    @pytest.mark.parametrize("heads", [1, 3])
    def test_blocks(self, heads: int) -> None:
        matrix = np.random.default_rng(0).random((2, heads, 2, 3)) < 0.5
        whole = np.broadcast_to(matrix.repeat(20, 2).repeat(16, 3)[:, :, :30, :40], (2, 3, 30, 40))
        mask = masks.Blocks(matrix, (20, 16))
        np.testing.assert_array_equal(mask.visible(30, 40, batch=2, num_heads=3), whole)
        for entry in range(2):
            for head in range(3):
                got = mask.program.verdicts(Place(30, 40, entry, head, head), 16, 16)
                np.testing.assert_array_equal(got, reduced(whole[entry, head], 16, 16))


class TestDrawnBlocks:
    def test_rows_have_as_many_blocks(self) -> None:
        mask = masks.RandomBlocks(1000, 500, 64, 3, seed=5)
        assert mask.matrix.shape == (16, 8)
        assert (mask.matrix.sum(axis=1) == 3).all()
        np.testing.assert_array_equal(mask.matrix, masks.RandomBlocks(1000, 500, 64, 3, seed=5).matrix)
        assert (mask.matrix != masks.RandomBlocks(1000, 500, 64, 3, seed=6).matrix).any()
        np.testing.assert_array_equal(mask.visible(1000, 500)[0, 0, ::64, ::64], mask.matrix)

    @pytest.mark.parametrize(("share", "blocks"), [(0, 1), (0.25, 2), (1, 8)])
    def test_share(self, share: float, blocks: int) -> None:
        assert (masks.RandomBlocks(512, 512, 64, share=share).matrix.sum(axis=1) == blocks).all()

    def test_more_blocks_than_there_are(self) -> None:
        assert masks.RandomBlocks(64, 64, 32, 9).matrix.all()

    def test_big_bird(self) -> None:
        mask = masks.BigBird(1024, 32, window_blocks=5, global_blocks=1, random_blocks=2, seed=3)
        i, j = np.ogrid[:32, :32]
        drawn = masks.RandomBlocks(1024, 1024, 32, 2, seed=3).matrix
        want = (abs(i - j) <= 2) | (i < 1) | (j < 1) | drawn
        np.testing.assert_array_equal(mask.visible(1024)[0, 0, ::32, ::32], want)
        np.testing.assert_array_equal(mask.program.verdicts(Place(1024, 1024), 32, 32), 2 * want)

    def test_butterfly_density(self) -> None:
        """Rows of T blocks see 1 + log2 T: 31 %, 10.9 % and 3.5 % for 16, 64 and 256 blocks."""
        for blocks, density in ((16, 0.3125), (64, 7 / 64), (256, 9 / 256)):
            assert masks.Butterfly(16).density(16 * blocks) == density


class TestReadable:
    @pytest.mark.parametrize(
        ("mask", "text"),
        [
            (masks.Causal(), "Causal()"),
            (masks.SlidingWindow(128, 0), "SlidingWindow(128, 0)"),
            (masks.SlidingWindow(None, 0), "SlidingWindow(None, 0)"),
            (masks.SlidingWindow(128, 0) & ~masks.Documents(np.zeros(5)[:3].astype(int)),
             "SlidingWindow(128, 0) & ~Documents(q_ids=<int32 (3,)>)"),
            (masks.Documents(np.zeros((1, 3), int), np.zeros(5, int)),
             "Documents(q_ids=<int32 (1, 3)>, k_ids=<int32 (5,)>)"),
            (masks.PrefixLM(4), "PrefixLM(4)"),
            (masks.PrefixLM(np.array([4, 5])), "PrefixLM(length=<int32 (2,)>)"),
            (masks.Dilated(2), "Dilated(2)"),
            (masks.Dilated(2, right=1), "Dilated(2, right=1)"),
            (masks.GlobalTokens(2), "GlobalTokens(2)"),
            (masks.Butterfly(64), "Butterfly(64)"),
            (masks.RandomBlocks(64, 64, 16, share=0.5), "RandomBlocks(64, 64, 16, share=0.5)"),
            (masks.BigBird(64, 16, seed=2), "BigBird(64, 16, seed=2)"),
            (masks.Blocks(np.ones((2, 2), bool), (16, 32)), "Blocks(matrix=<bool (2, 2)>, block_size=(16, 32))"),
            (masks.Dense(np.ones((2, 2), bool)), "Dense(array=<bool (2, 2)>)"),
            ((masks.Causal() | masks.Dilated(2)) & masks.PrefixLM(1), "(Causal() | Dilated(2)) & PrefixLM(1)"),
            (masks.Causal() & (masks.Dilated(2) & masks.PrefixLM(1)), "Causal() & (Dilated(2) & PrefixLM(1))"),
            (masks.Causal() & masks.Dilated(2) & masks.PrefixLM(1), "Causal() & Dilated(2) & PrefixLM(1)"),
            (~(masks.Causal() | masks.Dilated(2)), "~(Causal() | Dilated(2))"),
            (~~masks.Causal(), "~~Causal()"),
        ],
    )
    def test_repr(self, mask: masks.Mask, text: str) -> None:
        assert repr(mask) == text

    def test_docstrings(self) -> None:
        """Every public name has an example that runs; parameters are explained."""
        for name in masks.__all__:
            value = getattr(masks, name)
            runner = doctest.DocTestRunner()
            for test in doctest.DocTestFinder().find(value, name, globs={}):
                runner.run(test)
            assert runner.tries > 0, name
            assert runner.failures == 0, name
            if name != "Mask":
                for parameter in inspect.signature(value).parameters:
                    assert parameter in inspect.getdoc(value), (name, parameter)


class TestImmutable:
    @each_case
    def test_fields(self, name: str) -> None:
        mask = CASES[name].mask(64, 64)
        field = dataclasses.fields(mask)[0].name if dataclasses.fields(mask) else "left"
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(mask, field, 1)

    def test_arrays_of_the_caller(self) -> None:
        """A mask keeps what an array was; its own cannot be written."""
        array = drawn(9, 9)
        kept = array.copy()
        mask = masks.Dense(array)
        array[:] = True
        np.testing.assert_array_equal(mask.visible(9)[0, 0], kept)
        with pytest.raises(ValueError, match="read-only"):
            mask.array[0, 0] = True
        with pytest.raises(ValueError, match="read-only"):
            masks.RandomBlocks(64, 64, 16, 1).matrix[0, 0] = True

    def test_an_array_that_nobody_can_change_is_not_copied(self) -> None:
        array = np.arange(5, dtype=np.int32)
        array.flags.writeable = False
        assert masks.Documents(array).q_ids is array
        assert masks.Documents(array) == masks.Documents(array)


class TestEquality:
    def test_same_structure_and_constants(self) -> None:
        def window() -> masks.Mask:
            return masks.SlidingWindow(5, 0) & ~masks.Dilated(3)

        assert window() == window()
        assert hash(window()) == hash(window())
        assert len({window(), window(), masks.Causal()}) == 2

    @pytest.mark.parametrize(
        "other",
        [
            masks.SlidingWindow(5, 1), masks.SlidingWindow(None, 5), masks.Causal(), ~masks.SlidingWindow(5, 0),
            masks.Dilated(5, 0), "SlidingWindow(5, 0)", None,
        ],
    )
    def test_others(self, other: object) -> None:
        assert masks.SlidingWindow(5, 0) != other

    def test_arrays(self) -> None:
        """Equal contents of other arrays make another mask."""
        mask = masks.Documents(ids(9))
        assert mask == mask & masks.SlidingWindow(None, None)
        assert mask != masks.Documents(ids(9))

    def test_causal_is_the_window_to_the_right(self) -> None:
        assert masks.Causal() == masks.SlidingWindow(None, 0)


class TestPicture:
    @pytest.mark.parametrize(("lengths", "image"), [((50, 70), (50, 70)), ((1000, 400), (125, 50))])
    def test_pairs_or_tiles(self, lengths: tuple[int, int], image: tuple[int, int]) -> None:
        import matplotlib

        matplotlib.use("Agg")
        ax = masks.SlidingWindow(10, 3).plot(*lengths)
        assert ax.images[0].get_array().shape == image
        assert ax.get_title() == "SlidingWindow(10, 3)"
        assert ax.get_xlim() == (-0.5, lengths[1] - 0.5)
        matplotlib.pyplot.close(ax.figure)

    def test_entry_and_head(self) -> None:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        array = drawn(6, 20).reshape(3, 2, 4, 5)
        ax = pyplot.subplots()[1]
        assert masks.Dense(array).plot(4, 5, batch=2, head=1, ax=ax) is ax
        np.testing.assert_array_equal(ax.images[0].get_array(), 2 * array[2, 1])
        pyplot.close(ax.figure)

    def test_matplotlib_is_imported_late(self) -> None:
        import subprocess
        import sys

        code = "import sys; from cuflash import masks; masks.Causal().visible(3); print('matplotlib' in sys.modules)"
        assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
