"""What the lanes of a warp do together: shuffles, votes, matches, reductions. Arrays broadcast to (..., 32)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

LANES = np.arange(32)
BITS = np.uint32(1) << np.arange(32, dtype=np.uint32)


class WarpOperations:
    """Methods of lanes.Lanes; `shape` and `mask` are its fields, `wide` a method."""

    shape: tuple[int, int, int]
    mask: np.ndarray | None
    wide: Callable[[np.ndarray], np.ndarray]

    def shuffle(self, site: int, mode: str, value: np.ndarray, lane: np.ndarray, clamp: np.ndarray) -> tuple:
        """shfl.sync: the value of another lane, and whether that lane is in range (PTX ISA, shfl.sync).

        What comes from a lane that is not here is undefined; it reads as all ones.
        """
        offset, limit = np.asarray(lane).astype(np.int64) & 31, np.asarray(clamp).astype(np.int64)
        segment, limit = limit >> 8 & 31, limit & 31
        first = LANES & segment
        last = first | (limit & ~segment)
        if mode == "up":
            source = LANES - offset
            valid = source >= last
        else:
            source = {"down": LANES + offset, "bfly": LANES ^ offset, "idx": first | (offset & ~segment)}[mode]
            valid = source <= last
        source = np.where(valid, source, LANES)
        if self.mask is not None:
            value = np.where(self.mask, value, np.uint32(0xFFFFFFFF))
            value = np.take_along_axis(value, self.wide(source), -1)
            return value, valid.reshape((1,) * (3 - valid.ndim) + valid.shape)
        if np.ndim(value) == 0 or value.shape[-1] == 1:
            return value, valid.reshape((1,) * (3 - valid.ndim) + valid.shape)
        if source.ndim == 1 or source.size == 32:
            return value.take(source.reshape(-1), axis=-1), valid.reshape(1, 1, 32)
        return np.take_along_axis(self.wide(value), self.wide(source), -1), valid

    def vote(self, mode: str, predicate: np.ndarray) -> np.ndarray:
        """vote.sync over the lanes that are here."""
        votes = np.broadcast_to(predicate, self.shape)
        here = np.ones(self.shape, bool) if self.mask is None else self.mask
        if mode == "any":
            return (votes & here).any(-1, keepdims=True)
        if mode == "all":
            return (votes | ~here).all(-1, keepdims=True)
        if mode == "uni":
            some, every = (votes & here).any(-1, keepdims=True), (votes | ~here).all(-1, keepdims=True)
            return np.logical_or(every, ~some)
        return self._ballot(votes & here)

    def active_mask(self) -> np.ndarray:
        """The lanes that are here, as bits."""
        return self._ballot(np.ones(self.shape, bool) if self.mask is None else self.mask)

    def elect(self) -> np.ndarray:
        """True in the lowest lane that is here."""
        return self.elected() == LANES.astype(np.uint32)

    def elected(self) -> np.ndarray:
        """The number of the lowest lane that is here."""
        here = np.ones(self.shape, bool) if self.mask is None else self.mask
        return here.argmax(-1)[..., None].astype(np.uint32)

    def match(self, mode: str, value: np.ndarray) -> tuple:
        """match.sync: the lanes that hold the same value; for "all" also whether every lane does."""
        values = np.broadcast_to(value, self.shape)
        here = np.ones(self.shape, bool) if self.mask is None else self.mask
        same = (values[..., :, None] == values[..., None, :]) & here[..., None, :]
        masks = (same * BITS).sum(-1, dtype=np.uint32)
        if mode == "any":
            return (masks,)
        everyone = self._ballot(here)
        agree = masks == everyone
        return np.where(agree, everyone, np.uint32(0)), agree

    def reduce(self, mode: str, value: np.ndarray) -> np.ndarray:
        """redux.sync over the lanes that are here."""
        values = np.broadcast_to(value, self.shape)
        dtype = values.dtype
        ufunc = {
            "add": np.add,
            "min": np.minimum,
            "max": np.maximum,
            "and": np.bitwise_and,
            "or": np.bitwise_or,
            "xor": np.bitwise_xor,
        }
        if self.mask is not None:
            limits = np.iinfo(dtype)
            neutral = {
                "min": limits.max,
                "max": limits.min,
                "and": dtype.type(0) if dtype.kind == "i" else limits.max,
            }.get(mode, 0)
            neutral = ~dtype.type(0) if mode == "and" else dtype.type(neutral)
            values = np.where(self.mask, values, neutral)
        return ufunc[mode].reduce(values, axis=-1, keepdims=True, dtype=dtype)

    @staticmethod
    def _ballot(votes: np.ndarray) -> np.ndarray:
        return (votes * BITS).sum(-1, keepdims=True, dtype=np.uint32)
