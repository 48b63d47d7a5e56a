"""A picture of a mask by matplotlib, which is imported when the first one is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cuflash.errors import InvalidValueError
from cuflash.masks.steps import Lengths, Place

if TYPE_CHECKING:
    from cuflash.masks.mask import Mask

MOST_PAIRS = 256  # queries, and keys, that are drawn one by one
TILES = 128  # along the longer axis of a picture of tiles
COLOURS = ("#f4f4f2", "#9bb8d9", "#1f4e8c")  # empty, partial, full
LONGEST_TITLE = 60  # characters


def draw(mask: Mask, lengths: Lengths, batch: int, head: int, ax: Any) -> Any:
    """See `Mask.plot`; the lengths of batch and heads may be too small."""
    from matplotlib import pyplot
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    if not (lengths.seqlen_q and lengths.seqlen_k):
        given = f"seqlen_q = {lengths.seqlen_q}, seqlen_k = {lengths.seqlen_k}"
        raise InvalidValueError(f"{given}: must be >= 1 to be drawn")
    lengths = _all_entries(mask, lengths, batch, head)
    mask.program.check(lengths)
    place = Place(lengths.seqlen_q, lengths.seqlen_k, batch, head, head)
    if ax is None:
        ax = pyplot.subplots(layout="constrained")[1]
    longest = max(lengths.seqlen_q, lengths.seqlen_k)
    if longest <= MOST_PAIRS:
        q, k = np.ogrid[: lengths.seqlen_q, : lengths.seqlen_k]
        image, names = 2 * mask.program.visible(place.indices(q, k)), {0: "hidden", 2: "visible"}
        unit = 1
    else:
        unit = -(-longest // TILES)
        image = mask.program.verdicts(place, unit, unit)
        names = {0: f"empty tile of {unit} x {unit}", 1: "partial", 2: "full"}
    extent = (-0.5, image.shape[1] * unit - 0.5, image.shape[0] * unit - 0.5, -0.5)
    ax.imshow(image, cmap=ListedColormap(COLOURS), vmin=0, vmax=2, interpolation="nearest", extent=extent)
    ax.set(xlabel="key", ylabel="query", xlim=(-0.5, lengths.seqlen_k - 0.5), ylim=(lengths.seqlen_q - 0.5, -0.5))
    title = repr(mask)
    ax.set_title(title if len(title) <= LONGEST_TITLE else f"{title[: LONGEST_TITLE - 3]}...", fontsize="medium")
    handles = [Patch(facecolor=COLOURS[value], edgecolor="grey", label=name) for value, name in names.items()]
    ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3, frameon=False)
    return ax


def _all_entries(mask: Mask, lengths: Lengths, batch: int, head: int) -> Lengths:
    """As many entries of the batch and heads as the mask is for."""
    for name, number, field in (("batch", batch, "batch"), ("head", head, "num_heads")):
        sizes = [
            table.array.shape[i]
            for table, axes in mask.program.fits
            for i, axis in enumerate(axes)
            if axis.length == field
        ]
        if sizes and number >= sizes[0]:
            raise InvalidValueError(f"{name} = {number}: must be below {sizes[0]}, what the mask is for")
        lengths = lengths._replace(**{field: sizes[0] if sizes else number + 1})
    return lengths._replace(num_kv_heads=lengths.num_heads)
