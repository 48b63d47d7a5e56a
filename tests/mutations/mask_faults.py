"""The faults that tests of masks must catch: in the kernels that list tiles, and where others follow the lists.

LISTS are held to a look at every pair (tests/kernels/test_tile_lists.py), the others to the oracle, as in faults.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cuflash import masks
from cuflash.emulator.faults import Deadlock, OutOfBounds, Race, Uninitialized
from tests.attention.cases import Case
from tests.attention.test_mask_objects import small
from tests.gradients.test_mask_objects import small as small_backward
from tests.kernels.test_tile_lists import GRID, HARD, LABELS, Asked
from tests.mutations.mutate import Mutation, WrongResult

ROWS, COLUMNS, LISTED = "kernels/tile_rows.cu", "kernels/tile_columns.cu", "attention/listed_tiles.cuh"
MASK, VALUES = "attention/mask.cuh", "attention/mask_values.cuh"
INTERVALS, SCORES = "attention/mask_intervals.cuh", "attention/scores.cuh"
FORWARD, BACKWARD, DBIAS = "kernels/forward.cu", "kernels/backward.cu", "kernels/bias_gradient.cu"
SYNC = "__syncthreads();"

WINDOW = masks.SlidingWindow(20, 30)  # empty, partial and full tiles
MIXED = masks.where(lambda batch, head, q, k: (k // 3 % 3 < 2) & ((k // 9 + q // 2) % 4 != 1) | (k % 9 == 4))
ROWS_END = masks.where(lambda batch, head, q, k: (q < 70) & (k >= 0))
FLAGS = np.random.default_rng(0).random((70, 90)) < 0.6
DENSE = masks.Dense(FLAGS)
OWN = masks.where(lambda batch, head, q, k: (q // 16 + k // 16 + head) % 3 == 0)
BOTH = masks.where(lambda batch, head, q, k: (q // 16 + k // 16 + head + batch) % 3 == 0)
LOOKED_UP = masks.where(lambda batch, head, q, k: GRID[LABELS[q, k], LABELS[49 - q, k]])
FIRST_KEYS = masks.where(lambda batch, head, q, k: k < 15)
BELOW = masks.where(lambda batch, head, q, k: (q - k) // 16 % 3 == 0)
# One pair in some tiles, that no sample is; intervals know the parts without it.
SPECKS = masks.where(lambda batch, head, q, k: (q % 16 == 6) & (k % 16 == 5))
SPARSE = masks.where(lambda batch, head, q, k: (q % 16 == 6) & (k % 16 == 9) | (q % 16 == 2) & (q - k + (k - q) != 0))
STRIPES = masks.where(lambda batch, head, q, k: k // 8 % 2 == 0)  # of a tile intervals know nothing, of parts all
ROWS_CANCEL = masks.where(lambda batch, head, q, k: ((q - k) + (k - q) == 0) & (q // 16 % 2 == 0))
TURNED = masks.where(lambda batch, head, q, k: ((q - k) % 32 < 16) & (q >= 0))


class _Tokens(masks.Mask):
    def _visible(self, at: Any) -> Any:
        return at.q_token // 10 == at.k_token // 10


def lists(mask: masks.Mask, **more: Any) -> tuple[masks.Mask, Asked]:
    """Tiles of 16 by 16 of 70 queries by 90 keys, but for what differs."""
    return mask, Asked(**{"lengths": ((70, 90),), "block_m": 16, "block_n": 16} | more)


def hard(name: str, block: int = 32) -> tuple[masks.Mask, Asked]:
    """Of 32 by 32 scores no array is looked at."""
    return masks.where(HARD[name]), Asked(((50, 70),), block, block, 2, 2)


LENGTHS = ((20, 40), (0, 5), (5, 0), (33, 17))
PLAIN, LARGE = lists(WINDOW), lists(MIXED, lengths=((6, 900),), block_m=2, block_n=3)
TALL = lists(MIXED, lengths=((400, 20),), block_m=2, block_n=3)
SPECK = lists(masks.where(lambda batch, head, q, k: (q % 64 == 30) & (k % 64 == 37)), block_m=64, block_n=64)
HEADS = lists(OWN, num_heads=4, num_kv_heads=2)
PACKED = lists(BOTH, lengths=LENGTHS, num_heads=4, num_kv_heads=2, packed=True, tail=(3, 20))

IN_LISTS = [
    Mutation("the last tile is dropped", ROWS, "ceil_div(work.len_k, C.block_n) : 0", "work.len_k / C.block_n : 0",
             PLAIN, WrongResult),
    Mutation("partial tiles are full", ROWS, "hidden ? kPartial : kFull", "kFull", PLAIN, WrongResult),
    Mutation("a tile is full without its last keys", ROWS, "(tile + 1) * C.block_n > work.len_k",
             "tile * C.block_n > work.len_k", lists(ROWS_END), WrongResult),
    Mutation("sight of one kind ends the search", ROWS, "!(visible && hidden); ++step", "!visible; ++step",
             lists(~SPECKS), WrongResult),
    Mutation("sight of one kind ends the look at a part", ROWS, "!(visible && hidden); --looks", "!hidden; --looks",
             SPECK, WrongResult),
    Mutation("keys of the next tile are looked at", ROWS, "min(key, tile.key_end - 1));", "key);",
             hard("what cancels", 12), WrongResult),
    Mutation("queries of the next tile are looked at", ROWS, "min(query, tile.query_end - 1), min", "query, min",
             lists(ROWS_CANCEL, block_m=10), WrongResult),
    Mutation("a part of its first query", ROWS, "min(query + kQueries, tile.query_end)", "query + 1", lists(SPECKS),
             WrongResult),
    Mutation("a part of its first key", ROWS, "min(key + kKeys, tile.key_end)}", "key + 1}", lists(SPECKS),
             WrongResult),
    Mutation("nothing of a part that intervals know", ROWS, "int part = lane,", "int part = 0,", lists(STRIPES),
             WrongResult),
    Mutation("a part of which intervals are sure is in doubt, others are not", ROWS, "!truth.all && !truth.none",
             "truth.none", SPECK, WrongResult),
    Mutation("one look at a part", ROWS, "looks = Parts::kLooks;", "looks = 1;", SPECK, WrongResult),
    Mutation("the first part in doubt alone", ROWS, "doubtful &= doubtful - 1;", "doubtful = 0;", lists(SPARSE),
             WrongResult),
    Mutation("tiles of the first threads are open", ROWS, "open.threads[i])", "i)", LARGE,
             (WrongResult, Uninitialized, Race)),
    Mutation("open tiles of other warps are not counted", ROWS, "place += w < warp ? counts[w] : 0;", ";", LARGE,
             (WrongResult, Race, Uninitialized)),
    Mutation("verdicts in the order of open tiles", ROWS, "open.verdicts[tile - first] =", "open.verdicts[i] =", LARGE,
             (WrongResult, Uninitialized)),
    Mutation("open tiles of the first turn alone", ROWS, "i += C.num_warps) {", "i += 99 * C.num_warps) {", LARGE,
             (WrongResult, Uninitialized)),
    Mutation("no barrier before the open tiles are read", ROWS, f"{SYNC}  // the open tiles are there", ";", LARGE,
             (Race, Uninitialized)),
    Mutation("no barrier before the verdicts are read", ROWS, f"{SYNC}  // the verdicts are there", ";", LARGE,
             (Race, Uninitialized)),
    Mutation("queries past the last decide", ROWS, "min(work.row_begin + C.block_m, work.len_q)",
             "work.row_begin + C.block_m", lists(ROWS_END), WrongResult),
    Mutation("full tiles of other warps are not counted", ROWS, ", fulls_before += counts[1][w]", "", LARGE,
             (WrongResult, Race)),
    Mutation("full tiles of the turn before are lost", ROWS, ", full += counts[1][w];", ", full = counts[1][w];", LARGE,
             (WrongResult, Race)),
    Mutation("full tiles begin behind the list", ROWS, "params.list_pitch - 1 - fulls_before",
             "params.list_pitch - fulls_before", PLAIN, (WrongResult, OutOfBounds, Race)),
    Mutation("no barrier before the counts are read", ROWS, f"{SYNC}  // the counts are there", ";", LARGE, Race),
    Mutation("counts are swapped", ROWS, "thread == 0 ? partial : full", "thread == 0 ? full : partial", PLAIN,
             WrongResult),
    Mutation("full tiles take no turn", ROWS, "partials_before + fulls_before", "partials_before", PLAIN, WrongResult),
    Mutation("the wrong tiles are marked partial", ROWS, "2 * (verdict == kPartial)", "2 * (verdict == kFull)", PLAIN,
             WrongResult),
    Mutation("the first query tile comes first", COLUMNS, "tile = tiles - 1 - i % max", "tile = i % max", PLAIN,
             WrongResult),
    Mutation("tiles of the slot, not the sequence", COLUMNS, "turn_pitch + key_begin / C.block_n", "turn_pitch + slot",
             PACKED, (WrongResult, OutOfBounds, Uninitialized)),
    Mutation("heads apart by tiles of a sequence", COLUMNS, "head * params.q_tiles + tile", "head * tiles + tile",
             PACKED, WrongResult),
    Mutation("rows of the first group", COLUMNS, "kv_head * heads + head, params.num_heads", "head, params.num_heads",
             HEADS, WrongResult),
    Mutation("one head of a group", COLUMNS, "Mask::kByHead ? params.group : 1", "1", HEADS, WrongResult),
    Mutation("no barrier before the columns' counts are read", COLUMNS, f"{SYNC}  // the counts are there", ";", TALL,
             Race),
    Mutation("no barrier before the columns' counts are replaced", COLUMNS, f"{SYNC}  // everyone has read the counts",
             ";", TALL, Race),
    Mutation("query tiles of other warps are not counted", COLUMNS, "if (w < warp) before += counts[w];", "", TALL,
             (WrongResult, Race)),
    Mutation("lists of other batch entries", LISTED, "Mask::kByBatch || kPaged ? batch_entry : 0", "0",
             lists(BOTH, lengths=((70, 90),) * 2, num_heads=2), (WrongResult, Race)),
    Mutation("lists of other heads", LISTED, "if constexpr (Mask::kByHead) index = index * heads + head;", "", HEADS,
             (WrongResult, Race)),
    Mutation("tokens of the sequence alone", MASK, "return sequence.q_start + query;", "return query;",
             lists(_Tokens(), lengths=LENGTHS, packed=True), WrongResult),
    Mutation("a tile of its first query", MASK, "{query_begin, query_end - 1}", "{query_begin, query_begin}", PLAIN,
             WrongResult),
    Mutation("the first element stands for all", MASK, "i < count; ++i) elements", "i < 1; ++i) elements", lists(DENSE),
             WrongResult),
    Mutation("indices leave the table", MASK,
             "if (span.low < 0 || span.high >= params.mask_lengths[4 * I + axis]) return anything<T>();", "",
             lists(LOOKED_UP, lengths=((50, 70),), block_m=32), OutOfBounds),
]  # fmt: skip

IN_EXPRESSIONS = [
    Mutation("quotients toward zero", VALUES, "a % b < 0 ? quotient - 1 : quotient", "quotient", lists(BELOW),
             WrongResult),
    Mutation("remainders of either sign", VALUES, "rest < 0 ? rest + b : rest", "rest", lists(TURNED), WrongResult),
    Mutation("the least of NaN and a number", VALUES, "a < b || a != a ? a : b", "a < b ? a : b",
             hard("least of NaN"), WrongResult),
    Mutation("bits shifted out of an int", VALUES, "(static_cast<i64>(a) << b)", "(a << b)", hard("shift of a truth"),
             WrongResult),
    Mutation("a bound overflows", INTERVALS, "__mul64hi(a, b) == product >> 63 ? product : cut((a ^ b) < 0)", "product",
             hard("square of lookups"), WrongResult),
    Mutation("a difference overflows", INTERVALS, "((a ^ b) & (a ^ difference)) < 0 ? cut(a < 0) : difference",
             "difference", hard("wide differences"), WrongResult),
    Mutation("divisors of either sign", INTERVALS, "return maximum(divisor, Interval{1, 1});", "return divisor;",
             hard("divisor of lookups"), WrongResult),
    Mutation("counts of any size", INTERVALS, "{max(a.low, 0ll), min(a.high, 62ll)}", "a",
             hard("shift by lookups"), WrongResult),
    Mutation("remainders that wrap keep their bounds", INTERVALS, "if (!wraps ||", "if (true ||", lists(TURNED),
             WrongResult),
    Mutation("bits of either sign are known", INTERVALS, "if (x >= 0 && y >= 0) return", "return",
             hard("bits of either sign"), WrongResult),
    Mutation("anything is no NaN", INTERVALS, "kAnyReal{kUndefinedReal, kUndefinedReal}",
             "kAnyReal{-kUnboundedReal, kUnboundedReal}", hard("not NaN"), WrongResult),
    Mutation("a choice hides a NaN", INTERVALS, "return bounds(minimum(a.low, b.low), maximum(a.high, b.high));",
             "return {fmin(a.low, b.low), fmax(a.high, b.high)};", hard("choice of NaN"), WrongResult),
    Mutation("the magnitude of a NaN", INTERVALS, "{maximum(maximum(a.low, -a.high), 0.0), maximum(a.high, -a.low)}",
             "{fmax(fmax(a.low, -a.high), 0.0), fmax(a.high, -a.low)}", hard("magnitude of NaN"), WrongResult),
    Mutation("a quotient by what may be zero", INTERVALS, "if (!(b.low > 0 || b.high < 0)) return kAnyReal;", "",
             hard("quotient"), WrongResult),
    Mutation("less or equal is less", INTERVALS, "less(Interval a, Interval b) { return {a.high < b.low,",
             "less(Interval a, Interval b) { return {a.high <= b.low,", lists(FIRST_KEYS), WrongResult),
    Mutation("either is both", INTERVALS, "{a.all || b.all, a.none && b.none}", "{a.all || b.all, a.none || b.none}",
             lists(WINDOW | masks.GlobalTokens(3)), WrongResult),
    Mutation("what is not surely true is false", INTERVALS, "{a.all, !a.none}", "{a.all, a.all}",
             lists(masks.where(lambda batch, head, q, k: (q < k) + (k < 40) == 1)), WrongResult),
]  # fmt: skip

ONE = Case(batch=1, num_heads=1, num_kv_heads=1, seqlen_q=70, seqlen_k=90, head_dim=16, head_dim_v=16)
OF_HEADS = ONE.but(batch=2, num_heads=4, num_kv_heads=2, mask=BOTH)
WINDOWED, DENSELY = ONE.but(mask=WINDOW), ONE.but(mask=DENSE)
SHORT = masks.where(lambda batch, head, q, k: (q < 70) & (k < 90))

IN_FORWARD = [
    Mutation("full tiles are dropped", LISTED, "count = tiles.partial + params.tile_counts[2 * index + 1];",
             "count = tiles.partial;", small(WINDOWED), WrongResult),
    Mutation("full tiles from a wrong place", LISTED, "last - (position - partial)", "last - position", small(WINDOWED),
             (WrongResult, Uninitialized, OutOfBounds)),
    Mutation("a ring of two", LISTED, "ptx::shared_address(&ring[position % 4])",
             "ptx::shared_address(&ring[position % 2])", small(WINDOWED), (Race, WrongResult, Uninitialized)),
    Mutation("entries are fetched a visit early", FORWARD, "tiles.fetch(position + 3)", "tiles.fetch(position + 4)",
             small(WINDOWED), (Race, WrongResult, Uninitialized)),
    Mutation("the first entry alone", LISTED, "const int position = tiles.begin + i;",
             "const int position = tiles.begin;", small(WINDOWED), (WrongResult, Uninitialized)),
    Mutation("partial tiles are not selected", LISTED, "{ return min(partial, end); }", "{ return 0; }",
             small(WINDOWED), (WrongResult, OutOfBounds)),
    Mutation("keys that do not exist are seen", SCORES, "shown && query_of(row) <= last_row && column <= last_column",
             "shown", small(ONE.but(mask=SHORT)), WrongResult),
    Mutation("indices are not clamped", SCORES, "min(query_of(row), last_row), c = min(column, last_column)",
             "query_of(row), c = column",
             small(DENSELY), OutOfBounds),
    Mutation("bits of other scores", SCORES, "visible >> (2 * n + e) & 1", "visible >> (n + e) & 1", small(DENSELY),
             WrongResult),
    Mutation("columns side by side", SCORES, "first + i / 2 * 8 + i % 2", "first + i", small(DENSELY), WrongResult),
    Mutation("the window is selected", SCORES, "if constexpr (C.mask) select", "if constexpr (false) select",
             small(DENSELY), WrongResult),
]  # fmt: skip

BIASED = small_backward(ONE.but(mask=WINDOW, bias="bhqk"))
IN_BACKWARD = [
    Mutation("queries are keys", SCORES, "kTransposed ? c : r, kTransposed ? r : c", "r, c", small_backward(WINDOWED),
             WrongResult),
    Mutation("partial tiles are full", LISTED, "return entry(visit).turn % 2 != 0 ||", "return",
             small_backward(WINDOWED), WrongResult),
    Mutation("a bias of queries that do not exist", LISTED,
             " || (C.bias_dtype != Element::none && begin + C.block_m > len_q)", "",
             small_backward(ONE.but(mask=SHORT, bias="bhqk")), OutOfBounds),
    Mutation("entries of the other head", LISTED, "return ring[(visit.head * count + visit.position) % 4];",
             "return ring[visit.position % 4];", small_backward(WINDOWED.but(num_heads=2, seqlen_q=90)),
             (WrongResult, Deadlock, Race, Uninitialized)),
    Mutation("a second entry of lists of one", LISTED, "tiles.list[1 % tiles.count]", "tiles.list[1]",
             small_backward(ONE.but(mask=WINDOW, num_heads=2, seqlen_q=16)),
             (WrongResult, Uninitialized, Deadlock, OutOfBounds)),
    Mutation("the turn with its flag", LISTED, "return entry(visit).turn / 2;", "return entry(visit).turn;",
             small_backward(WINDOWED), Deadlock),
    Mutation("entries are fetched a visit late", BACKWARD, "const Visit coming = next.after(tiles.count);",
             "const Visit coming = next;", small_backward(WINDOWED), (WrongResult, Deadlock, Race, Uninitialized)),
    Mutation("tiles of the first head", BACKWARD, "(Mask::kByHead ? tiles.tile(visit) / params.q_tiles : visit.head)",
             "visit.head", small_backward(OF_HEADS), (WrongResult, Deadlock)),
    Mutation("tiles of all heads for each head", BACKWARD, "const int repeats = Mask::kByHead ? 1 : params.group;",
             "const int repeats = params.group;", small_backward(OF_HEADS), (WrongResult, Deadlock, OutOfBounds)),
    Mutation("one head of a group", BACKWARD, "const int repeats = Mask::kByHead ? 1 : params.group;",
             "const int repeats = 1;", small_backward(WINDOWED.but(num_heads=2)), (WrongResult, Deadlock)),
    Mutation("lists of other key tiles", LISTED, "params.num_heads / params.group, work.slot,",
             "params.num_heads / params.group, 0,", small_backward(WINDOWED), (WrongResult, Deadlock)),
    Mutation("hidden tiles of dbias are added", DBIAS, "if (shown.none) continue;", "if (shown.all) continue;", BIASED,
             WrongResult),
    Mutation("partial tiles of dbias are full", DBIAS, "query, !shown.all, new_keys);", "query, false, new_keys);",
             BIASED, WrongResult),
    Mutation("keys of dbias stay where they are", DBIAS, "bool new_keys = true;", "bool new_keys = false;", BIASED,
             Uninitialized),
]  # fmt: skip
