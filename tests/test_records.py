"""From layouts to strides, alignment and parameter records."""

from __future__ import annotations

import numpy as np
import pytest

from cuflash import records
from cuflash.errors import InvalidValueError
from cuflash.layout import Layout, contiguous_strides, layout
from cuflash.plan.params import COMBINE_PARAMS, FORWARD_PARAMS


def of(shape: tuple[int, ...], strides: tuple[int, ...] | None = None, misalignment: int = 0) -> Layout:
    return Layout(shape, strides or contiguous_strides(shape, 2), np.dtype(np.float16), misalignment)


@pytest.mark.parametrize(
    ("array", "width"),
    [
        (of((2, 9, 4, 64)), 16),
        (of((2, 9, 4, 60)), 8),  # rows of 120 bytes
        (of((2, 9, 4, 33)), 2),
        (of((9, 2)), 4),
        (of((2, 9, 4, 64), misalignment=8), 8),
        (of((2, 9, 4, 64), misalignment=6), 2),
        (of((2, 9, 1, 64), (1152, 128, 2, 2)), 16),  # the stride of an axis of one does not matter
        (of((2, 9, 4, 64), (4612, 512, 128, 2)), 4),
        (of((2, 9, 4, 64), (4608, -512, 128, 2)), 16),
    ],
)
def test_access_bytes(array: Layout, width: int) -> None:
    assert records.access_bytes(array) == width
    assert records.access_bytes(of((1, 1, 1, 8)), array) == width


def test_token_strides_of_every_rank() -> None:
    assert records.token_strides("q", of((2, 9, 4, 8))) == (288, 32, 8)
    assert records.token_strides("q", of((9, 4, 8))) == (0, 32, 8)
    assert records.token_strides("q", of((9, 8))) == (0, 8, 0)
    assert records.lse_strides((9, 1)) == (0, 9, 1)
    assert records.lse_strides((1,)) == (0, 0, 1)


def test_bias_strides_are_0_where_it_is_broadcast() -> None:
    assert records.bias_strides(of((2, 1, 9, 7))) == (63, 0, 7, 1)
    assert records.bias_strides(of((7,))) == (0, 0, 0, 1)
    assert records.bias_strides(of(())) == (0, 0, 0, 0)
    assert records.bias_strides(layout(np.broadcast_to(np.zeros(7, np.float16), (4, 9, 7)))) == (0, 0, 0, 1)


def test_elements_must_be_aligned() -> None:
    packed = np.zeros(9, np.dtype([("flag", np.uint8), ("row", np.float16, 8)]))["row"]
    with pytest.raises(InvalidValueError, match=r"k.strides = \(17, 2\): elements must be aligned to their 2 bytes"):
        records.token_strides("k", layout(packed))


def test_records_in_words() -> None:
    """Addresses are whole words, and writing a word writes the field."""
    for params in (FORWARD_PARAMS, COMBINE_PARAMS):
        assert params.itemsize % 8 == 0
        record = np.zeros((), params)
        words = records.as_words(record)
        for number, (field, where) in enumerate(records.address_words(params).items(), start=1):
            words[where] = number
            assert (record[field] == number).all()
    assert list(records.address_words(FORWARD_PARAMS)) == [
        "q", "k", "v", "o", "lse", "bias", "cu_seqlens_q", "cu_seqlens_k", "mask_tables", "block_tables", "seq_lens",
        "tile_lists", "tile_counts", "shares",
    ]
