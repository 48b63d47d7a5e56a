"""Random functions as compiled kernels on the emulated GPU: attention is that of the pairs that they show."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

import cuflash
from cuflash import masks
from tests.masks.expressions import BATCH, HEADS, compiled, write

SEQLEN_Q, SEQLEN_K = 13, 11


def random_mask(seed: int) -> masks.Mask:
    """The first that traces and shows some pairs, not all."""
    rng = Random(seed)
    while True:
        try:
            mask = masks.where(compiled(write(rng, "t", rng.randint(2, 5))))
            visible = mask.visible(SEQLEN_Q, SEQLEN_K, batch=BATCH, num_heads=HEADS)
        except (cuflash.CuflashError, ZeroDivisionError):
            continue
        if visible.any() and not visible.all():
            return mask


@pytest.mark.parametrize("seed", range(8))
def test_emulated(seed: int) -> None:
    mask = random_mask(seed)
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((BATCH, SEQLEN_Q, HEADS, 16)).astype(np.float32)
    k, v = rng.standard_normal((2, BATCH, SEQLEN_K, HEADS, 16)).astype(np.float32)
    with cuflash.emulate("sm_80"):
        out = cuflash.attention(q, k, v, mask=mask)
    visible = mask.visible(SEQLEN_Q, SEQLEN_K, batch=BATCH, num_heads=HEADS)
    p = visible * np.exp(np.einsum("bqhd,bkhd->bhqk", q, k) / 4)
    total = p.sum(axis=-1, keepdims=True)
    want = np.einsum("bhqk,bkhd->bqhd", p / np.where(total, total, 1), v)
    np.testing.assert_allclose(out, want, atol=1e-5)
