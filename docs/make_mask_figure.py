"""`python docs/make_mask_figure.py [FILE]`: the masks of cuflash.masks, and what can be made of them.

Writes docs/images/masks.png unless told otherwise.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt

from cuflash import masks
from cuflash.masks import Mask

N = 256
COLUMNS = 5


def gallery() -> dict[str, Mask]:
    """Masks of 256 queries and keys by how they are written."""
    rng = np.random.default_rng(0)
    ids = np.repeat(np.arange(5), (70, 40, 66, 24, 56))
    blocks = rng.random((8, 8)) < 0.4
    array = np.add.outer(rng.random(N).cumsum(), -rng.random(N).cumsum()) % 23 < 9
    side = 16  # pixels of a square picture, row by row
    x, y = rng.random((2, N)).round(3)
    order = np.argsort((y * 4).astype(int) + x)  # points of a plane in four strips
    x, y = x[order], y[order]
    return {
        "Causal()": masks.Causal(),
        "SlidingWindow(48, 16)": masks.SlidingWindow(48, 16),
        "Documents(ids) & Causal()": masks.Documents(ids) & masks.Causal(),
        "PrefixLM(80)": masks.PrefixLM(80),
        "Dilated(8, 12, 0)": masks.Dilated(8, 12, 0),
        "SlidingWindow(20, 20)\n| GlobalTokens(16)": masks.SlidingWindow(20, 20) | masks.GlobalTokens(16),
        "Butterfly(16)": masks.Butterfly(16),
        "RandomBlocks(256, 256, 16,\nblocks_per_row=4)": masks.RandomBlocks(N, N, 16, blocks_per_row=4),
        "BigBird(256, 16, 3, 2, 2)": masks.BigBird(N, 16, 3, 2, 2),
        "Blocks(matrix, 32)": masks.Blocks(blocks, 32),
        "Dense(array)": masks.Dense(array),
        "~Butterfly(16) & Causal()": ~masks.Butterfly(16) & masks.Causal(),
        "where: near in a 16 x 16 picture": masks.where(
            lambda batch, head, q, k: (abs(q // side - k // side) <= 3) & (abs(q % side - k % side) <= 3)
        ),
        "where: near in a plane": masks.where(
            lambda batch, head, q, k: (x[q] - x[k]) ** 2 + (y[q] - y[k]) ** 2 < 0.04
        ),
        "where: the past, thinning out": masks.where(
            lambda batch, head, q, k: (k <= q) & (k % np.maximum((q - k) // 16, 1) == 0)
        ),
    }


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "images" / "masks.png"
    panels = gallery()
    figure, grid = plt.subplots(-(-len(panels) // COLUMNS), COLUMNS, figsize=(12.5, 9.2), layout="constrained")
    figure.get_layout_engine().set(hspace=0.06, h_pad=0.08)
    for axes, (name, mask) in zip(grid.flat, panels.items(), strict=True):
        mask.plot(N, ax=axes)
        axes.get_legend().remove()
        axes.set_title(name, fontsize=10, family="monospace" if not name.startswith("where") else None)
        axes.set(xlabel=f"{mask.density(N):.0%} visible", ylabel="", xticks=[], yticks=[])
    figure.supylabel("query")
    figure.supxlabel("key")
    figure.savefig(path, dpi=80, metadata={"Software": None}, pil_kwargs={"optimize": True})
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
