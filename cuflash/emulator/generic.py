"""Generic addresses: every access goes to the space in whose window its address lies."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cuflash.emulator.faults import OutOfBounds
from cuflash.emulator.memory import LOCAL_WINDOW, NOBODY, PARAM_WINDOW, SHARED_WINDOW

if TYPE_CHECKING:
    from cuflash.emulator.lanes import Lanes
    from cuflash.emulator.machine import Machine

WINDOWS = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAM_WINDOW}
WINDOW_SIZE = np.uint64(1 << 32)


def in_space(address: np.ndarray, space: str) -> np.ndarray:
    """Whether generic addresses lie in a space (isspacep)."""
    if space in WINDOWS:
        return (address - np.uint64(WINDOWS[space])) < WINDOW_SIZE
    return ~(in_space(address, "shared") | in_space(address, "local") | in_space(address, "param"))


class GenericSpace:
    """All spaces behind one kind of address."""

    def __init__(self, machine: Machine) -> None:
        self.spaces = {
            "shared": machine.shared,
            "local": machine.local,
            "param": machine.parameters,
            "global": machine.memory,
        }

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
        """Read `count` elements per lane."""
        result: tuple | None = None
        for space, local, part in self._split(lanes, site, "load", address, guard):
            values = space.load(lanes, site, local, part, dtype, count, strong)
            if result is None:
                result = values
            else:
                result = tuple(np.where(part, new, old) for new, old in zip(values, result, strict=True))
        return (np.zeros((), dtype),) * count if result is None else result

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
        for space, local, part in self._split(lanes, site, "store", address, guard):
            space.store(lanes, site, local, part, dtype, values, strong)

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
        """Read-modify-write one element per lane; returns the old values."""
        result = None
        for space, local, part in self._split(lanes, site, "atomic", address, guard):
            old = space.atomic(lanes, site, local, part, dtype, operation, values, t)
            result = old if result is None else np.where(part, old, result)
        return np.zeros((), dtype) if result is None else result

    def _split(
        self, lanes: Lanes, site: int, access: str, address: np.ndarray, guard: np.ndarray | None
    ) -> list[tuple]:
        """The spaces that the active lanes' addresses lie in: (space, address in the space, guard of its lanes)."""
        mask = lanes.active(guard)
        if mask is NOBODY:
            return []
        seen = lanes.pick(address, mask)
        parts = []
        for name, space in self.spaces.items():
            inside = in_space(seen, name)
            if not np.any(inside):
                continue
            if not hasattr(space, access):
                raise lanes.fault(OutOfBounds, site, inside, mask, lambda _, name=name: f"{access} in {name} memory")  # type: ignore[misc]
            local = address if name == "global" else (address - np.uint64(WINDOWS[name])).astype(np.uint32)
            if np.all(inside):
                return [(space, local, guard)]
            here = in_space(address, name)
            parts.append((space, local, here if guard is None else here & guard))
        return parts
