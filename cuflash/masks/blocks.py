"""Masks of blocks of positions, and of arrays: Blocks, Dense, Butterfly, RandomBlocks, BigBird."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from cuflash.errors import InvalidDtypeError, InvalidShapeError, InvalidTypeError, InvalidValueError
from cuflash.masks.expression import Expression
from cuflash.masks.mask import Mask, check_whole
from cuflash.masks.patterns import set_whole
from cuflash.masks.steps import Indices
from cuflash.masks.tables import Axis, Table, is_array, own_array

LEAST_BLOCK = 16


@dataclass(frozen=True, eq=False, repr=False)
class Blocks(Mask):
    """A pair is visible if its block of the matrix is on (block-sparse attention, Dao et al. 2022).

    Parameters
    ----------
    matrix : array (query blocks, key blocks), (num_heads, ...) or (batch, num_heads, ...)
        bool; leading axes of 1 broadcast. Its blocks must cover the lengths, with nothing to spare; the last block of
        an axis may be shorter.
    block_size : int or pair of int
        Queries and keys of a block, at least 16; need not be that of the kernels' tiles.

    Raises
    ------
    InvalidTypeError, InvalidDtypeError, InvalidShapeError, InvalidValueError
        The matrix is not boolean or has other axes, or a block is too small.

    Examples
    --------
    >>> import numpy as np
    >>> from cuflash import masks
    >>> mask = masks.Blocks(np.array([[True, False], [True, True]]), 64)
    >>> mask
    Blocks(matrix=<bool (2, 2)>, block_size=64)
    >>> mask.density(128)
    0.75
    """

    matrix: Any
    block_size: int | tuple[int, int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "matrix", _booleans("matrix", self.matrix, "(query blocks, key blocks)"))
        if isinstance(self.block_size, tuple | list):
            if len(self.block_size) != 2:
                raise InvalidTypeError(f"block_size = {self.block_size!r}: must be an integer or a pair of integers")
            pair = tuple(check_whole(f"block_size[{i}]", size, LEAST_BLOCK) for i, size in enumerate(self.block_size))
            object.__setattr__(self, "block_size", pair)
        else:
            set_whole(self, "block_size", LEAST_BLOCK)

    def _visible(self, at: Indices) -> Expression:
        size = self.block_size
        return _lookup("Blocks", "matrix", self.matrix, at, *(size if isinstance(size, tuple) else (size, size)))


@dataclass(frozen=True, eq=False, repr=False)
class Dense(Mask):
    """A pair is visible if its element of an array is true.

    The array has N x N elements: a pattern is better said by the other masks or by `where`.

    Parameters
    ----------
    array : array (seqlen_q, seqlen_k), (num_heads, ...) or (batch, num_heads, ...)
        bool; axes of 1 broadcast.

    Raises
    ------
    InvalidTypeError, InvalidDtypeError, InvalidShapeError
        The array is not boolean or has other axes.

    Examples
    --------
    >>> import numpy as np
    >>> from cuflash import masks
    >>> mask = masks.Dense(np.eye(3, dtype=bool))
    >>> bool((mask.visible(3)[0, 0] == np.eye(3)).all())
    True
    """

    array: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "array", _booleans("array", self.array, "(seqlen_q, seqlen_k)"))

    def _visible(self, at: Indices) -> Expression:
        return _lookup("Dense", "array", self.array, at, 1, 1)


def _booleans(name: str, value: Any, axes: str) -> Any:
    if not is_array(value):
        raise InvalidTypeError(f"{name} = {value!r}: must be a boolean array")
    array = own_array(name, value)
    if array.dtype != np.uint8:
        raise InvalidDtypeError(f"{name}.dtype = {value.dtype}: must be bool; scores are added by bias=")
    if not 2 <= array.ndim <= 4:
        raise InvalidShapeError(
            f"{name}.shape = {tuple(array.shape)}: must be {axes}, with num_heads or batch and num_heads before"
        )
    return array.view(np.bool_)


def _lookup(owner: str, name: str, array: Any, at: Indices, block_q: int, block_k: int) -> Expression:
    """The element of a pair; an axis of 1 is left out, so that it broadcasts."""
    blocks = tuple(index if size == 1 else index // size for index, size in ((at.q, block_q), (at.k, block_k)))
    indices = (at.batch, at.head, *blocks)[-array.ndim :]
    axes = (Axis("batch"), Axis("num_heads"), Axis("seqlen_q", block_q), Axis("seqlen_k", block_k))[-array.ndim :]
    # A single block does not broadcast: it covers its length only.
    kept = [i for i, size in enumerate(array.shape) if size != 1 or axes[i].block > 1]
    words = array.reshape([array.shape[i] for i in kept] or [1]).view(np.uint8)
    table = Table(name, words, fits=(tuple(axes[i] for i in kept),) if kept else (), owner=owner)
    return table[tuple(indices[i] for i in kept) or (0,)]


@dataclass(frozen=True, eq=False, repr=False)
class Butterfly(Mask):
    """Block (i, j) is on iff i = j or i XOR j is a power of two (Dao et al. 2022, the mask of FlashAttention 1).

    Of T blocks each row sees 1 + log2 T.

    Parameters
    ----------
    block_size : int
        At least 16.

    Examples
    --------
    >>> from cuflash import masks
    >>> masks.Butterfly(64).visible(512)[0, 0, ::64, ::64].astype(int)
    array([[1, 1, 1, 0, 1, 0, 0, 0],
           [1, 1, 0, 1, 0, 1, 0, 0],
           [1, 0, 1, 1, 0, 0, 1, 0],
           [0, 1, 1, 1, 0, 0, 0, 1],
           [1, 0, 0, 0, 1, 1, 1, 0],
           [0, 1, 0, 0, 1, 1, 0, 1],
           [0, 0, 1, 0, 1, 0, 1, 1],
           [0, 0, 0, 1, 0, 1, 1, 1]])
    """

    block_size: int

    def __post_init__(self) -> None:
        set_whole(self, "block_size", LEAST_BLOCK)

    def _visible(self, at: Indices) -> Expression:
        differing = at.q // self.block_size ^ at.k // self.block_size
        return differing & (differing - 1) == 0


@dataclass(frozen=True, eq=False, repr=False)
class RandomBlocks(Mask):
    """Each row of blocks sees as many blocks, drawn without replacement when the mask is made.

    Parameters
    ----------
    seqlen_q, seqlen_k : int
        The lengths that the mask is for.
    block_size : int
        At least 16.
    blocks_per_row : int, optional
        How many blocks each row of blocks sees.
    share : float, optional
        The same as a share of the row, 0 to 1, rounded to at least one block. Give one of the two.
    seed : int
        The same seed draws the same blocks.

    Examples
    --------
    >>> from cuflash import masks
    >>> masks.RandomBlocks(1024, 1024, 64, share=0.25).density(1024)
    0.25
    """

    seqlen_q: int
    seqlen_k: int
    block_size: int
    blocks_per_row: int | None = None
    share: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("seqlen_q", "seqlen_k"):
            set_whole(self, name, 1)
        set_whole(self, "block_size", LEAST_BLOCK)
        set_whole(self, "seed", 0)
        if (self.blocks_per_row is None) == (self.share is None):
            given = f"blocks_per_row = {self.blocks_per_row!r}, share = {self.share!r}"
            raise InvalidValueError(f"{given}: exactly one of them must be given")
        if self.blocks_per_row is not None:
            set_whole(self, "blocks_per_row", 0)
        elif isinstance(self.share, bool) or not isinstance(self.share, int | float) or not 0 <= self.share <= 1:
            raise InvalidValueError(f"share = {self.share!r}: must be a number, 0 to 1")

    @cached_property
    def matrix(self) -> np.ndarray:
        """The blocks that are on, bool (query blocks, key blocks)."""
        rows, columns = (-(-length // self.block_size) for length in (self.seqlen_q, self.seqlen_k))
        count = self.blocks_per_row if self.share is None else max(1, round(self.share * columns))
        order = np.random.default_rng(self.seed).random((rows, columns)).argsort(axis=1)
        matrix: np.ndarray = order < min(count or 0, columns)
        matrix.flags.writeable = False
        return matrix

    def _visible(self, at: Indices) -> Expression:
        words = own_array("matrix", self.matrix)
        return _lookup("RandomBlocks", "matrix", words, at, self.block_size, self.block_size)


@dataclass(frozen=True, eq=False, repr=False)
class BigBird(Mask):
    """A window of blocks, global blocks and random blocks (Zaheer et al. 2020, "Big Bird", the ITC pattern).

    Block (i, j) is on iff |i - j| <= (window_blocks - 1) / 2, or i or j is one of the first global_blocks, or j is
    one of the random_blocks drawn for row i. The defaults are the paper's.

    Parameters
    ----------
    seqlen : int
        The length that the mask is for, of queries and keys.
    block_size : int
        At least 16.
    window_blocks, global_blocks, random_blocks : int
        Blocks of each part in a row; window_blocks is odd.
    seed : int
        The same seed draws the same random blocks.

    Examples
    --------
    >>> from cuflash import masks
    >>> masks.BigBird(4096).density(4096) < 0.17
    True
    """

    seqlen: int
    block_size: int = 64
    window_blocks: int = 3
    global_blocks: int = 2
    random_blocks: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        set_whole(self, "seqlen", 1)
        set_whole(self, "block_size", LEAST_BLOCK)
        for name in ("window_blocks", "global_blocks", "random_blocks", "seed"):
            set_whole(self, name, 0)
        if self.window_blocks % 2 == 0:
            raise InvalidValueError(f"window_blocks = {self.window_blocks}: must be odd")

    def _visible(self, at: Indices) -> Expression:
        i, j = at.q // self.block_size, at.k // self.block_size
        window = abs(i - j) <= self.window_blocks // 2
        everywhere = np.minimum(i, j) < self.global_blocks
        drawn = RandomBlocks(self.seqlen, self.seqlen, self.block_size, self.random_blocks, seed=self.seed)
        return window | everywhere | drawn._visible(at)
