"""Memory spaces: what all of them check, and the global one, an arena with gaps that belong to nobody."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cuflash.emulator.atomics import apply_atomic
from cuflash.emulator.faults import EmulatorFault, Misaligned, OutOfBounds, Uninitialized

if TYPE_CHECKING:
    from cuflash.emulator.lanes import Lanes

SHARED_WINDOW, LOCAL_WINDOW, PARAM_WINDOW = 1 << 44, 1 << 45, 1 << 46
GLOBAL_BASE = 1 << 40
RED_ZONE = 256
OWNED, WRITTEN, CONSTANT = np.uint8(1), np.uint8(2), np.uint8(4)
WINDOWS = {"global": 0, "const": 0, "shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAM_WINDOW}


NOBODY = np.zeros(0, bool)  # a mask of no lanes


WORDS = {width: np.dtype(f"u{width}") for width in (1, 2, 4, 8)}


def words(state: int, width: int) -> np.integer:
    """The state byte repeated over an access of 1 to 8 bytes."""
    return np.frombuffer(bytes([state]) * width, f"u{width}")[0]


def word_view(data: np.ndarray, width: int) -> tuple[np.ndarray, int]:
    """A byte array as unsigned words of at most 8 bytes, and how many of them an access of `width` bytes has."""
    size = min(width, 8)
    return data.view(WORDS[size]), width // size


def gather(data: np.ndarray, offsets: np.ndarray, dtype: np.dtype, count: int) -> tuple:
    """`count` consecutive elements at each byte offset, each as an array shaped like offsets."""
    view = data.view(dtype)
    index = offsets >> (dtype.itemsize.bit_length() - 1)
    return tuple(view.take(index + k if k else index) for k in range(count))


def scatter(data: np.ndarray, offsets: np.ndarray, dtype: np.dtype, values: tuple) -> None:
    """The opposite of gather; of two lanes that write the same place the last wins."""
    view = data.view(dtype)
    index = offsets >> (dtype.itemsize.bit_length() - 1)
    for k, value in enumerate(values):
        view[index + k if k else index] = value


def check_alignment(
    lanes: Lanes, site: int, offsets: np.ndarray, width: int, mask: np.ndarray | None, describe: Callable[[int], str]
) -> None:
    """Raise Misaligned unless every offset is a multiple of the width. describe: an offset in words."""
    if width > 1 and int(np.bitwise_or.reduce(offsets, axis=None)) & (width - 1):
        bad = offsets & (width - 1) != 0
        flat = np.reshape(offsets, -1)
        raise lanes.fault(
            Misaligned,
            site,
            bad,
            mask,
            lambda k: f"access of {width} bytes at {describe(int(flat[k]))}: not a multiple of {width}",
        )


class FlatSpace:
    """A space that every block (or thread) has its own copy of: byte offsets below `size`, all copies in one array."""

    def __init__(self, name: str, size: int, copies: int) -> None:
        self.name, self.size = name, size
        self.stride = -(-size // 16) * 16
        self.data = np.zeros(max(1, copies) * self.stride, np.uint8)

    def check(self, lanes: Lanes, site: int, address: np.ndarray, width: int, mask: np.ndarray | None) -> None:
        """Raise OutOfBounds or Misaligned for offsets (int64, picked by mask) that this space does not have."""
        if address.view(np.uint64).max() + width > self.size:  # of what is negative, too
            bad = (address + width > self.size) | (address < 0)
            flat = np.reshape(address, -1)
            raise lanes.fault(
                OutOfBounds,
                site,
                bad,
                mask,
                lambda k: (
                    f"{self.name} address {int(flat[k]):#x} + {width} bytes lies outside the {self.size} bytes "
                    f"of the {self.owner()}"
                ),
            )
        check_alignment(lanes, site, address, width, mask, lambda offset: f"{self.name} address {offset:#x}")

    def owner(self) -> str:
        return "thread" if self.name == "local" else "kernel's parameters" if self.name == "param" else "block"


class LocalMemory(FlatSpace):
    """Every thread's own memory. Compilers read local bytes they never wrote (padding), so nothing checks
    initialisation."""

    def __init__(self, size: int, threads: int) -> None:
        super().__init__("local", size, threads)

    def _offsets(self, lanes: Lanes, site: int, address: np.ndarray, width: int, mask: np.ndarray | None) -> np.ndarray:
        address = lanes.pick(address.astype(np.int64), mask)
        self.check(lanes, site, address, width, mask)
        thread = lanes.pick(lanes.rows * (lanes.machine.warps * 32) + lanes.tid, mask)
        return address + thread * self.stride

    def load(
        self,
        lanes: Lanes,
        site: int,
        address: np.ndarray,
        guard: np.ndarray | None,
        dtype: np.dtype,
        count: int,
        strong: bool = False,
    ) -> tuple:
        mask = lanes.active(guard)
        if mask is NOBODY:
            return (np.zeros((), dtype),) * count
        values = gather(self.data, self._offsets(lanes, site, address, dtype.itemsize * count, mask), dtype, count)
        return values if mask is None else tuple(lanes.spread(v, mask) for v in values)

    def store(
        self,
        lanes: Lanes,
        site: int,
        address: np.ndarray,
        guard: np.ndarray | None,
        dtype: np.dtype,
        values: tuple,
        strong: bool = False,
    ) -> None:
        mask = lanes.active(guard)
        if mask is NOBODY:
            return
        offsets = self._offsets(lanes, site, address, dtype.itemsize * len(values), mask)
        scatter(self.data, offsets, dtype, tuple(lanes.pick(v, mask) for v in values))
        lanes.machine.changes += 1


class Parameters(FlatSpace):
    """The kernel's parameters: one copy, read only."""

    def __init__(self, data: bytes) -> None:
        super().__init__("param", len(data), 1)
        self.data[: len(data)] = np.frombuffer(data, np.uint8)

    def value(self, offset: int, dtype: np.dtype) -> np.generic:
        """A parameter at a constant offset."""
        return np.frombuffer(self.data.data, dtype, 1, offset)[0]

    def load(
        self,
        lanes: Lanes,
        site: int,
        address: np.ndarray,
        guard: np.ndarray | None,
        dtype: np.dtype,
        count: int,
        strong: bool = False,
    ) -> tuple:
        mask = lanes.active(guard)
        if mask is NOBODY:
            return (np.zeros((), dtype),) * count
        offsets = lanes.pick(address.astype(np.int64), mask)
        self.check(lanes, site, offsets, dtype.itemsize * count, mask)
        values = gather(self.data, offsets, dtype, count)
        return values if mask is None else tuple(lanes.spread(v, mask) for v in values)


@dataclass(frozen=True, slots=True)
class Allocation:
    """Bytes [start, start + size) of the arena."""

    start: int
    size: int
    name: str


class GlobalMemory:
    """Global memory of a device: one arena; every byte has a state (owned by an array, written, constant).

    Addresses are GLOBAL_BASE + offset. Allocations stand at least RED_ZONE bytes apart, so a small overrun meets
    nobody's memory.
    """

    def __init__(self) -> None:
        self.data = np.zeros(1 << 20, np.uint8)
        self.state = np.zeros(1 << 20, np.uint8)
        self.allocations: dict[int, Allocation] = {}
        self.starts: list[int] = []

    # --- for the host

    def allocate(self, size: int, name: str, phase: int = 0) -> Allocation:
        """Reserve bytes whose first stands `phase` bytes after a multiple of 256. They belong to nobody until
        marked."""
        start, place = RED_ZONE, 0
        for begin in self.starts:  # first fit
            if start + phase + size + RED_ZONE <= begin:
                break
            block = self.allocations[begin]
            start = -(-(block.start + block.size + RED_ZONE) // 256) * 256
            place += 1
        allocation = Allocation(start + phase, size, name)
        self.starts.insert(place, allocation.start)
        self.allocations[allocation.start] = allocation
        need = allocation.start + size + RED_ZONE
        if need > len(self.data):
            capacity = max(need + need // 2, 2 * len(self.data)) // 256 * 256
            for key in ("data", "state"):
                grown = np.zeros(capacity, np.uint8)
                old = getattr(self, key)
                grown[: len(old)] = old
                setattr(self, key, grown)
        return allocation

    def free(self, allocation: Allocation) -> None:
        """Give bytes back: they belong to nobody again."""
        del self.allocations[allocation.start]
        self.starts.remove(allocation.start)
        self.state[allocation.start : allocation.start + allocation.size] = 0

    def describe(self, offset: int) -> str:
        """A byte of the arena in terms of the nearest array."""
        address = f"global address {GLOBAL_BASE + offset:#x}"
        if not self.starts:
            return address
        near = bisect_right(self.starts, offset)
        around = [self.allocations[s] for s in self.starts[max(0, near - 1) : near + 1]]

        def distance(a: Allocation) -> int:
            return max(a.start - offset, offset - a.start - a.size + 1, 0)

        nearest = min(around, key=distance)
        where = offset - nearest.start
        if distance(nearest) > 1 << 30:
            return address
        return f"{address}, byte {where} of {nearest.name!r} ({nearest.size} bytes)"

    # --- for lanes

    def load(
        self,
        lanes: Lanes,
        site: int,
        address: np.ndarray,
        guard: np.ndarray | None,
        dtype: np.dtype,
        count: int,
        strong: bool = False,
    ) -> tuple:
        """Read `count` elements per lane; lanes without access get zero."""
        mask = lanes.active(guard)
        if mask is NOBODY:
            return (np.zeros((), dtype),) * count
        width = dtype.itemsize * count
        offsets = self.locate(lanes, site, lanes.pick(address, mask), width, mask, OWNED | WRITTEN, "read")
        lanes.machine.counters.global_access(lanes, offsets, width, mask, False)
        values = gather(self.data, offsets, dtype, count)
        return values if mask is None else tuple(lanes.spread(v, mask) for v in values)

    def store(
        self,
        lanes: Lanes,
        site: int,
        address: np.ndarray,
        guard: np.ndarray | None,
        dtype: np.dtype,
        values: tuple,
        strong: bool = False,
    ) -> None:
        """Write elements per lane."""
        mask = lanes.active(guard)
        if mask is NOBODY:
            return
        width = dtype.itemsize * len(values)
        offsets = self.locate(lanes, site, lanes.flat(address, mask), width, mask, OWNED, "write", flat=True)
        lanes.machine.counters.global_access(lanes, offsets, width, mask, True)
        if not strong:
            lanes.machine.writers.write(lanes, site, offsets, width, mask)
        lanes.machine.changes += 1
        scatter(self.data, offsets, dtype, tuple(lanes.flat(v, mask) for v in values))
        self._mark_written(offsets, width)

    def atomic(
        self,
        lanes: Lanes,
        site: int,
        address: np.ndarray,
        guard: np.ndarray | None,
        dtype: np.dtype,
        operation: str,
        values: tuple,
        t: str,
    ) -> np.ndarray:
        """Read-modify-write one element per lane, lane after lane; returns the old values. Here, unlike in shared
        memory, float32 sums flush subnormals. A vector of values to add is added to as many elements; nobody asks
        what they were."""
        mask = lanes.active(guard)
        if mask is NOBODY:
            return np.zeros((), dtype)
        count = len(values) if operation == "add" else 1
        width = dtype.itemsize * count
        offsets = self.locate(lanes, site, lanes.flat(address, mask), width, mask, OWNED | WRITTEN, "update", flat=True)
        lanes.machine.counters.global_access(lanes, offsets, width, mask, False)
        lanes.machine.counters.global_access(lanes, offsets, width, mask, True)
        view = self.data.view(dtype)
        index = offsets >> (dtype.itemsize.bit_length() - 1)
        t = "f32.ftz" if (t, operation) == ("f32", "add") else t
        of_lanes = tuple(lanes.flat(v, mask) for v in values)
        if count > 1:
            index = (index[:, None] + np.arange(count)).reshape(-1)
            of_lanes = (np.stack(of_lanes, axis=1).reshape(-1),)
        old, changed = apply_atomic(view, index, operation, of_lanes, t)
        lanes.machine.changes += changed
        if count > 1:
            return np.zeros((), dtype)
        return old.reshape(lanes.shape) if mask is None else lanes.spread(old, mask)

    def locate(
        self,
        lanes: Lanes,
        site: int,
        address: np.ndarray,
        width: int,
        mask: np.ndarray | None,
        need: np.uint8,
        verb: str,
        flat: bool = False,
    ) -> np.ndarray:
        """Arena offsets (int64) of addresses; raises unless every byte of every access has the needed state."""
        offsets = address.view(np.int64) - GLOBAL_BASE
        if offsets.size == 0:
            return offsets
        inside = offsets.min() >= 0 and offsets.max() + width <= len(self.data)
        if inside:
            check_alignment(lanes, site, offsets, width, mask if not flat else _all(mask, lanes), self.describe)
            state, parts = word_view(self.state, width)
            index = offsets >> (min(width, 8).bit_length() - 1)
            pattern = words(int(need), min(width, 8))
            forbidden = words(int(CONSTANT), min(width, 8)) if verb != "read" else pattern.dtype.type(0)
            good = np.ones((), bool)
            for k in range(parts):
                found = state.take(index + k)
                good = good & ((found & (pattern | forbidden)) == pattern)
            if np.all(good):
                return offsets
        else:
            good = np.zeros(offsets.shape, bool)
        raise self._fault(lanes, site, offsets, width, mask, need, verb, flat, good)

    def _fault(
        self,
        lanes: Lanes,
        site: int,
        offsets: np.ndarray,
        width: int,
        mask: np.ndarray | None,
        need: np.uint8,
        verb: str,
        flat: bool,
        good: np.ndarray,
    ) -> EmulatorFault:
        """Which fault it was, from the state of the first bad access."""
        if not np.any(good) and np.ndim(good):
            inside = (offsets >= 0) & (offsets + width <= len(self.data))
            clipped = np.clip(offsets, 0, len(self.data) - width)
            states = self.state[clipped[..., None] + np.arange(width)]
            good = inside & ((states & need) == need).all(-1)
        bad = ~np.asarray(good)
        shaped = bad.reshape(lanes.shape) if flat and mask is None else bad
        flat_offsets = np.reshape(offsets, -1)
        first = int(flat_offsets[np.flatnonzero(bad.reshape(-1))[0]])
        states = (
            self.state[first : first + width] if 0 <= first <= len(self.data) - width else np.zeros(width, np.uint8)
        )
        kind: type[EmulatorFault]
        if (states & OWNED).all() and (states & CONSTANT).any() and verb != "read":
            kind, what = OutOfBounds, "constant memory"
        elif (states & OWNED).all():
            kind, what = Uninitialized, "bytes that nothing has written"
        else:
            kind, what = OutOfBounds, "bytes that belong to no array element"
        return lanes.fault(
            kind,
            site,
            shaped,
            mask,
            lambda k: f"{verb} of {width} bytes at {self.describe(int(flat_offsets[k]))}: {what}",
        )

    def _mark_written(self, offsets: np.ndarray, width: int) -> None:
        state, parts = word_view(self.state, width)
        index = offsets >> (min(width, 8).bit_length() - 1)
        pattern = words(int(OWNED | WRITTEN), min(width, 8))
        for k in range(parts):
            state[index + k] = pattern


def _all(mask: np.ndarray | None, lanes: Lanes) -> np.ndarray | None:
    """The mask that turns a flat list of lanes back into the selection's shape."""
    return np.ones(lanes.shape, bool) if mask is None else mask
