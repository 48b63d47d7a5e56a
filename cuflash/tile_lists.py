"""Lists of the tiles that a mask shows, made on the device that reads them.

Of a dense problem they depend on the mask and the lengths alone: the first call that wants them makes them, and they
are kept with the mask for all later ones on the same stream. Of a packed problem, whose lengths only the device knows,
every call makes them, and so does every call that is captured in a graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from cuflash import records
from cuflash.device import Call, Device, Kernel, check_placed
from cuflash.masks.program import MAX_TABLES, Program
from cuflash.plan.params import TILE_LIST_PARAMS
from cuflash.plan.tile_lists import TileListPlan
from cuflash.problem import Problem

LIST_BYTES, AT = records.as_bytes(TILE_LIST_PARAMS), records.address_words(TILE_LIST_PARAMS)
INT32 = np.dtype(np.int32)
MAX_KEPT = 256  # lists of one mask: a length that grows makes new ones at each step


class Lengths(NamedTuple):
    """Addresses of what says how long sequences are; 0 of what a problem has not."""

    cu_seqlens_q: int = 0
    cu_seqlens_k: int = 0
    seq_lens: int = 0


@dataclass(frozen=True, slots=True)
class ListLaunches:
    """Kernels that make the lists of one problem, their parameters complete but for the addresses."""

    kernels: tuple[Kernel, ...]
    words: np.ndarray
    plan: TileListPlan
    dense: bool


def prepare(device: Device, problem: Problem, plan: TileListPlan) -> ListLaunches:
    words = records.as_words(records.tile_list_record(problem, plan))
    return ListLaunches(tuple(map(device.load, plan.launches)), words, plan, not problem.lengths_are_data)


def table_addresses(call: Call, device: Device, mask: Program) -> list[int]:
    """Of the arrays that the mask looks up; those on the host are brought to the device once."""
    addresses = [0] * MAX_TABLES
    for i, table in enumerate(mask.tables):
        array = table.array
        if not device.holds(array):
            if not isinstance(array, np.ndarray):
                check_placed(device, f"mask array {table.name!r}", array)
            array = mask.kept.get((device, i))
            if array is None:
                array = mask.kept[device, i] = device.constant(table.array)
        addresses[i] = call.read(array, f"mask_{table.name}")
    return addresses


def tile_lists(
    call: Call, device: Device, launches: ListLaunches, mask: Program, tables: list[int], lengths: Lengths
) -> tuple[int, int]:
    """Addresses of lists and counts, on the device once its stream gets there."""
    plan = launches.plan
    queue = device.queue() if launches.dense else None
    if queue is None:
        lists = call.workspace(plan.list_shape, INT32, "tile_lists")
        counts = call.workspace(plan.count_shape, INT32, "tile_counts")
        _launch(call, launches, tables, lengths, lists, counts)
        return lists, counts
    lists_kept: dict[Any, Any] = mask.kept.setdefault("lists", {})
    kept = lists_kept.get((queue, plan))
    if kept is None:
        if len(lists_kept) >= MAX_KEPT:
            del lists_kept[next(iter(lists_kept))]  # the oldest; a graph never reads what is kept
        kept = device.keep(plan.list_shape, INT32, "tile_lists"), device.keep(plan.count_shape, INT32, "tile_counts")
        _launch(call, launches, tables, lengths, kept[0].address, kept[1].address)
        lists_kept[queue, plan] = kept
    return kept[0].address, kept[1].address


def _launch(call: Call, launches: ListLaunches, tables: list[int], lengths: Lengths, lists: int, counts: int) -> None:
    words = launches.words.copy()
    words[AT["mask_tables"]] = tables
    words[AT["lists"]], words[AT["counts"]] = lists, counts
    words[AT["cu_seqlens_q"]], words[AT["cu_seqlens_k"]], words[AT["seq_lens"]] = lengths
    if launches.plan.turn_shape is not None:
        words[AT["turns"]] = call.workspace(launches.plan.turn_shape, INT32, "tile_turns")
    record = words.view(LIST_BYTES)
    for kernel in launches.kernels:
        kernel(record)
