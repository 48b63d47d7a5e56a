"""Faults of the kernels that sort tokens, find what sorted queries see and move rows, as in faults.py."""

from __future__ import annotations

from cuflash.emulator.faults import OutOfBounds, Race, Uninitialized
from tests.mutations.mutate import Mutation, WrongResult

SORT, RANGES, MOVE = "kernels/sort_tokens.cu", "kernels/visible_ranges.cu", "kernels/move_rows.cu"
BARRIER = "__syncthreads();  // "

MUTATIONS = [
    *(
        Mutation(f"no barrier before {what}", SORT, f"{BARRIER}{what}", "//", None, caught)
        for what, caught in {
            "everyone has counted": Race,
            "the digits are counted": Race,
            "the starts are there": Race,
            "everyone's places are there": (Race, OutOfBounds),
            "the tokens are moved": (Race, Uninitialized, WrongResult),
        }.items()
    ),
    Mutation("tokens of a digit in falling order", SORT, "position = next[digit] + __popc(peers & below);",
             "position = next[digit] + __popc(peers & ~below) - 1;", None, WrongResult),
    Mutation("signs as digits", SORT, "return key ^ static_cast<Key>(Key{1} << (8 * C.key_bytes - 1));", "return key;",
             None, WrongResult),
    Mutation("results in the workspace", SORT, "odd = left % 2 != 0;", "odd = left % 2 == 0;", None,
             (OutOfBounds, Uninitialized, WrongResult)),
    Mutation("dropped tokens in the order", SORT, "C.keep && key != 0 ? -1 :", "false ? -1 :", None, WrongResult),
    Mutation("kept tokens last", SORT, "return key == 0;", "return key != 0;", None, WrongResult),
    Mutation("tokens past the end", SORT, "if (token[i] >= end) continue;", "", None, (OutOfBounds, WrongResult)),
    Mutation("lanes past the end hold a digit", SORT, "ptx::match_any(valid ? digit : kDigits)",
             "ptx::match_any(digit)", None, (OutOfBounds, WrongResult)),
    Mutation("the first digit alone", SORT, "digits = max(sort.varying_digits(), 1u);",
             "digits = max(sort.varying_digits() & 1u, 1u);", None, WrongResult),
    Mutation("no inverse", SORT, "if (last) inverse", "if (!last) inverse", None, (Uninitialized, WrongResult)),
    Mutation("a digit of seven bits", SORT, "& (kDigits - 1);", "& 127;", None, WrongResult),
    Mutation("every query at its own position", RANGES, "token + params.shift", "token + 1", None, WrongResult),
    Mutation("buckets begin a key late", RANGES, "return k_keys[i] < key;", "return k_keys[i] <= key;", None,
             WrongResult),
    Mutation("keys at the bound", RANGES, "k_order[i] < bound", "k_order[i] <= bound", None, WrongResult),
    Mutation("the next bucket", RANGES, "k_keys[i] == key &&", "", None, WrongResult),
    Mutation("keys by query head", RANGES, "pair / params.group", "pair", None, (OutOfBounds, WrongResult)),
    Mutation("dropped queries see", RANGES, "if (token < 0) {", "if (false) {", None, WrongResult),
    Mutation("queries past the end", RANGES, "if (position >= len_q) return;", "", None, OutOfBounds),
    Mutation("rows of dropped tokens", MOVE, "return unit >= 0;", "return true;", None, OutOfBounds),
    Mutation("rows past the end", MOVE, "row < count &&", "", None, OutOfBounds),
    Mutation("a column short", MOVE, "column < params.columns[array];", "column < params.columns[array] - 1;", None,
             (Uninitialized, WrongResult)),
    Mutation("half of the columns", MOVE, "column += C.lanes", "column += 2 * C.lanes", None,
             (Uninitialized, WrongResult)),
    Mutation("strides of the source for the target", MOVE, "to = params.target_strides",
             "to = params.source_strides", None, (OutOfBounds, Race, Uninitialized, WrongResult)),
]  # fmt: skip
