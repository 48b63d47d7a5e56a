"""Random masks' functions as Python text, and what they may use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st

TABLE_LENGTH = 16  # no index is larger
BATCH, HEADS = 2, 3

_random = np.random.default_rng(7)
TABLES: dict[str, np.ndarray] = {
    "ids": _random.integers(-4, 5, TABLE_LENGTH),
    "sorted_ids": np.sort(_random.integers(-4, 5, TABLE_LENGTH)),
    "flags": _random.random(TABLE_LENGTH) < 0.5,
    "grid": _random.integers(0, TABLE_LENGTH, (BATCH, TABLE_LENGTH)),
    "x": np.where(_random.random(TABLE_LENGTH) < 0.2, np.nan, _random.normal(size=TABLE_LENGTH)).astype(np.float32),
    "y": np.array([np.inf, -np.inf, 0.0, *_random.normal(size=TABLE_LENGTH - 3)]),
    "rows": _random.random((HEADS, TABLE_LENGTH, TABLE_LENGTH)) < 0.3,
}


def compiled(text: str) -> Callable[..., Any]:
    """The function, whose globals are the arrays."""
    return eval(f"lambda batch, head, q, k: {text}", {"np": np, "abs": abs, **TABLES})


def _wrap(texts: list[str], *parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """One of several texts, with a part in each place {}."""
    return st.tuples(st.sampled_from(texts), *parts).map(lambda drawn: drawn[0].format(*drawn[1:]))


_INDEX = st.sampled_from(["q", "k", "batch", "head"])
_SMALL = st.integers(-5, 20).map(lambda n: f"({n})")
_DIVISOR = st.integers(1, 9).map(str)

whole = st.deferred(lambda: _whole)
real = st.deferred(lambda: _real)
truth = st.deferred(lambda: _truth)

_lookup = _wrap(
    ["ids[{}]", "sorted_ids[{}]", "grid[batch, {}]", "grid[{} % 2, q]"],
    st.one_of(_INDEX, whole.map(lambda text: f"np.minimum(np.maximum({text}, 0), {TABLE_LENGTH - 1})")),
)
_whole = st.one_of(
    _INDEX,
    _SMALL,
    _lookup,
    _wrap(["({} + {})", "({} - {})", "({} * {})", "np.minimum({}, {})", "np.maximum({}, {})"], whole, whole),
    _wrap(["({} & {})", "({} | {})", "({} ^ {})"], whole, whole),
    _wrap(["({} // {})", "({} % {})"], whole, _DIVISOR),
    _wrap(["({} << {})", "({} >> {})"], whole, st.integers(0, 3).map(str)),
    _wrap(["abs({})", "(-{})", "(~{})", "({})**2", "({})**3"], whole),
    _wrap(["np.where({}, {}, {})"], truth, whole, whole),
    _wrap(["({} * {})"], truth, whole),
)
_real = st.one_of(
    _wrap(["x[{}]", "y[{}]"], st.sampled_from(["q", "k"])),
    st.floats(-4, 4).map(lambda x: f"({x!r})"),
    _wrap(["({} + {})", "({} - {})", "({} * {})", "({} / {})", "np.minimum({}, {})", "np.maximum({}, {})"], real, real),
    _wrap(["({} / {})"], whole, whole),
    _wrap(["({} + {})", "({} * {})"], real, whole),
    _wrap(["abs({})", "(-{})"], real),
    _wrap(["np.where({}, {}, {})"], truth, real, whole),
)
_COMPARISONS = [f"({{}} {symbol} {{}})" for symbol in ("<", "<=", ">", ">=", "==", "!=")]
_truth = st.one_of(
    _wrap(_COMPARISONS, whole, whole),
    _wrap(_COMPARISONS, whole, whole),
    _wrap(_COMPARISONS, real, real),
    _wrap(_COMPARISONS, real, whole),
    st.sampled_from(["flags[q]", "flags[k]", "rows[head, q, k]"]),
    _wrap(["({} & {})", "({} | {})", "({} ^ {})", "np.logical_xor({}, {})", "({} == {})", "({} != {})"], truth, truth),
    _wrap(["np.logical_not({})"], truth),
    _wrap(["np.where({}, {}, {})"], truth, truth, truth),
)
