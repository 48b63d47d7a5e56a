"""Every feature against every other: all pairs of compile-time features, each meeting many run-time ones.

A row of `COMPILED` is one kernel configuration, compiled once; its repeats differ in what a kernel takes at run time.
"""

from __future__ import annotations

from typing import Any

import pytest

from cuflash import Options
from tests.attention.cases import Case, check
from tests.attention.pairwise import Row, covering, spread
from tests.devices import ALL_DTYPES

HEAD_DIMS = (
    (1, 1), (7, 7), (33, 33), (40, 40), (64, 64), (65, 65), (100, 100), (128, 128), (200, 200), (256, 256), (320, 320),
    (512, 512), (64, 32), (192, 128), (7, 130), (130, 7),
)  # fmt: skip
COMPILED: dict[str, Any] = {
    "dims": HEAD_DIMS,
    "bias_dtype": (None, None, *ALL_DTYPES),
    "dtype": ALL_DTYPES,
    "windowed": (False, True),
    "softcap": (None, 1.5),
    "packed": (False, True),
    "few_queries": (False, True),  # a plan gives them tiles of their own
    "split": (False, True),
}
RUN_TIME: dict[str, Any] = {
    "lengths": ((33, 65), (64, 64), (65, 63), (17, 127), (129, 31), (31, 0)),
    "few_lengths": ((1, 131), (16, 64), (16, 1), (7, 65), (1, 0), (3, 33)),
    "sequences": (
        ((33, 65), (1, 1)), ((5, 0), (17, 40), (0, 7)), ((64, 64),), ((9, 3), (20, 80)), ((40, 7), (40, 70), (40, 33)),
        ((16, 16), (15, 17), (1, 0), (0, 0), (31, 33)),
    ),
    "few_sequences": (
        ((1, 70), (1, 3), (1, 33)), ((16, 65), (1, 1)), ((5, 0), (7, 40), (0, 7)), ((16, 64),), ((9, 3), (2, 80)),
        ((1, 16),) * 9,
    ),
    "batch": (1, 2, 3),
    "heads": ((1, 1), (2, 2), (4, 2), (3, 1), (6, 2)),
    "window": (None, (9, None), (None, 5), (20, 13), (0, 0), (40, -1)),
    "bias": ("bhqk", "...k", "..q.", ".h..", "b..k", "qk", "k", ".hqk", "b.q."),
    "splits": (2, 3, 7, 4),
    "layout": ("dense", "interleaved", "heads_first", "padded_rows", "tokens_first", "every_other_token", "page"),
    "values": ("normal", "normal", "scores_1e2", "scores_negative"),
    "scale": (None, 0.3),
}  # fmt: skip


def case_of(row: Row) -> Case:
    """The case of one row of both tables; a negative right bound stands for causal and a window."""
    window = row["window"] if row["windowed"] else None
    causal = row["windowed"] and (window is None or window[1] == -1)
    if causal and window is not None:
        window = (window[0], None)
    few = "few_" * row["few_queries"]
    seqlen_q, seqlen_k = row[f"{few}lengths"]
    return Case(
        dtype=row["dtype"], seqlen_q=seqlen_q, seqlen_k=seqlen_k,
        head_dim=row["dims"][0], head_dim_v=row["dims"][1], batch=row["batch"],
        num_heads=row["heads"][0], num_kv_heads=row["heads"][1], causal=causal, window=window,
        softcap=row["softcap"], scale=row["scale"], bias=row["bias"] if row["bias_dtype"] else "",
        bias_dtype=row["bias_dtype"] or "float32", values=row["values"], layout=row["layout"],
        options=Options(num_splits=row["splits"] if row["split"] else 1),
        sequences=row[f"{few}sequences"] if row["packed"] else None,
    )  # fmt: skip


CASES = [case_of(row) for row in spread(covering(COMPILED), RUN_TIME, times=6)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matrix(device: Any, case: Case) -> None:
    check(device, case)
