"""cuflash.masks: which keys each query sees.

A mask is an expression of the indices of a score, traced once. Kernels and the CPU evaluate the same expression; with
intervals in the place of indices it tells which tiles are empty, full or partial, so that only tiles that matter are
visited. Masks are immutable and combine by `&`, `|` and `~`; made once, a mask is reused across calls and layers.
"""

from cuflash.masks.blocks import BigBird, Blocks, Butterfly, Dense, RandomBlocks
from cuflash.masks.mask import Mask
from cuflash.masks.patterns import Causal, Dilated, Documents, GlobalTokens, PrefixLM, SlidingWindow
from cuflash.masks.tracing import where

__all__ = [
    "BigBird",
    "Blocks",
    "Butterfly",
    "Causal",
    "Dense",
    "Dilated",
    "Documents",
    "GlobalTokens",
    "Mask",
    "PrefixLM",
    "RandomBlocks",
    "SlidingWindow",
    "where",
]
