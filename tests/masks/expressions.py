"""Random masks' functions as Python text, and what they may use."""

from __future__ import annotations

import re
from collections.abc import Callable
from random import Random
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


# Texts by kind: w a whole number, r a real, t a truth, i a legal index; constants: n any, d divisor, s shift, f real.
_LEAVES = {
    "w": ["q", "k", "q", "k", "batch", "head", "{n}", "ids[{i}]", "sorted_ids[{i}]", "grid[batch, {i}]"],
    "r": ["x[q]", "x[k]", "y[q]", "y[k]", "{f}"],
    "t": ["(q < k)", "flags[q]", "flags[k]", "rows[head, q, k]", "(q == k)", "(ids[q] == ids[k])"],
    "i": ["q", "k", "head", "batch"],
}
_INNER = {
    "w": [
        "({w} + {w})", "({w} - {w})", "({w} * {w})", "np.minimum({w}, {w})", "np.maximum({w}, {w})", "({w} & {w})",
        "({w} | {w})", "({w} ^ {w})", "({w} // {d})", "({w} % {d})", "({w} // np.maximum({w}, 1))", "({w} << {s})",
        "({w} >> {s})", "abs({w})", "(-{w})", "(~{w})", "({w})**2", "({w})**3", "np.where({t}, {w}, {w})",
        "({t} * {w})", "ids[{i}]", "grid[{w} % 2, {i}]",
    ],
    "r": [
        "({r} + {r})", "({r} - {r})", "({r} * {r})", "({r} / {r})", "({w} / {w})", "np.minimum({r}, {r})",
        "np.maximum({r}, {w})", "({r} + {w})", "abs({r})", "(-{r})", "np.where({t}, {r}, {w})", "({r})**2",
    ],
    "t": [
        *[f"({{w}} {symbol} {{w}})" for symbol in ("<", "<=", ">", ">=", "==", "!=")],
        *[f"({{r}} {symbol} {{r}})" for symbol in ("<", "<=", "==", "!=")],
        "({r} >= {w})", "({t} & {t})", "({t} | {t})", "({t} ^ {t})", "np.logical_not({t})", "({t} == {t})",
        "({t} != {t})", "np.where({t}, {t}, {t})",
    ],
    "i": [f"np.minimum(np.maximum({{w}}, 0), {TABLE_LENGTH - 1})"],
}  # fmt: skip
_CONSTANTS: dict[str, Callable[[Random], object]] = {
    "n": lambda rng: rng.randint(-5, 20),
    "d": lambda rng: rng.randint(1, 9),
    "s": lambda rng: rng.randint(0, 3),
    "f": lambda rng: rng.choice([-1.5, 0.0, 0.25, 2.0]),
}


def write(rng: Random, kind: str, depth: int) -> str:
    """A random text of a kind, of operations within operations."""
    if kind in _CONSTANTS:
        return f"({_CONSTANTS[kind](rng)})"
    text = rng.choice(_INNER[kind] if depth > 0 else _LEAVES[kind])
    return re.sub(r"\{(\w)\}", lambda part: write(rng, part[1], depth - rng.randint(1, 2)), text)


truth = st.builds(lambda seed, depth: write(Random(seed), "t", depth), st.integers(0, 2**32), st.integers(1, 5))
