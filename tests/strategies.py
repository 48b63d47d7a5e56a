"""Hypothesis strategies for attention problems: lengths, masks, memory layouts, whole cases."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from tests.attention.cases import BIAS_VALUES, VALUES, Case, Layout

LENGTHS = st.one_of(st.integers(0, 20), st.integers(0, 150), st.sampled_from([15, 16, 17, 63, 64, 65, 127, 128, 129]))
BOUNDS = st.one_of(st.none(), st.integers(0, 5), st.integers(0, 160))
HEADS = st.sampled_from([(1, 1), (2, 2), (2, 1), (4, 2), (6, 2), (5, 1)])
BIASES = st.sampled_from(["", "", "k", "q.", "qk", "h.k", "hqk", ".hq.", "b..k", "b.qk", "bhqk", "b...", "..qk"])


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Any order of the first three axes, steps of either sign, gaps around, and an offset and padding of the rows."""
    order = draw(st.permutations(range(3)))
    steps = draw(st.tuples(*[st.sampled_from([1, 1, 2, 3, -1, -2])] * 3))
    before = draw(st.tuples(*[st.integers(0, 2)] * 3))
    left, right = draw(st.integers(0, 9)), draw(st.integers(0, 9))

    def shape(*sizes: int) -> tuple[int, ...]:
        return (*(sizes[axis] * abs(steps[axis]) + before[axis] for axis in order), sizes[3] + left + right)

    def view(buffer: Any) -> Any:
        rows = buffer[..., left : buffer.shape[-1] - right]
        rows = rows.transpose(*(order.index(axis) for axis in range(3)), 3)
        for axis in range(3):
            cut = (slice(None),) * axis
            rows = rows[(*cut, slice(before[axis], None))][(*cut, slice(None, None, steps[axis]))]
        return rows

    return Layout(shape, view)


@st.composite
def sequences(draw: st.DrawFn) -> tuple[tuple[int, int], ...]:
    """Lengths (seqlen_q, seqlen_k) of one to six packed sequences."""
    lengths = st.integers(0, 70) | st.integers(0, 3)
    return tuple(draw(st.lists(st.tuples(lengths, lengths), min_size=1, max_size=6)))


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[str, ...], head_dims: tuple[int, ...], packed: bool = False) -> Case:
    """A case of any feature; few dtypes and head dims keep the number of kernel configurations small."""
    num_heads, num_kv_heads = draw(HEADS)
    head_dim = draw(st.sampled_from(head_dims))
    return Case(
        dtype=draw(st.sampled_from(dtypes)),
        seqlen_q=draw(LENGTHS),
        seqlen_k=draw(LENGTHS),
        head_dim=head_dim,
        head_dim_v=head_dim,
        batch=draw(st.integers(1, 3)),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        causal=draw(st.booleans()),
        window=draw(st.none() | st.tuples(BOUNDS, BOUNDS)),
        softcap=draw(st.sampled_from([None, None, 3.0])),
        bias=draw(BIASES),
        values=draw(st.sampled_from(sorted(VALUES))),
        bias_values=draw(st.sampled_from(sorted(BIAS_VALUES))),
        sequences=draw(sequences()) if packed else None,
        tail=draw(st.tuples(st.integers(0, 9), st.integers(0, 9))) if packed else (0, 0),
    )
