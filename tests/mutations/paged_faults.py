"""Faults of attention over a paged cache, and of the kernel that moves a cache's rows, as in faults.py.

OtherTraffic: the result is right, but the kernels read what they must not, or write elsewhere too.
"""

from __future__ import annotations

from cuflash.emulator.faults import BarrierDivergence, OutOfBounds, Race, Uninitialized
from tests.mutations.mutate import Mutation, WrongResult
from tests.test_io_model_paged import Case


class OtherTraffic(Exception):
    """Bytes by array are not those of the IO model."""


FORWARD, ROWS, LOAD = "kernels/forward.cu", "attention/paged_rows.cuh", "tile/load.cuh"
SHARES, COMBINE, MERGE = "attention/shares.cuh", "kernels/combine.cu", "attention/merge.cuh"
WORK, TILES, SCORES = "attention/work.cuh", "attention/key_tiles.cuh", "attention/scores.cuh"
MOVE = "kernels/move_rows.cu"

DECODE = Case(dim=32, lengths=(300, 5, 130, 0), splits=1)
SPLIT = Case(dim=32, lengths=(300, 77), splits=3)
SMALL_BLOCKS = Case(dim=32, lengths=(300, 77), block_size=5)
ONE_STAGE = Case(dim=256, lengths=(200, 77), heads=2)
TWO_WARPS = Case(dim=32, lengths=(300, 77), heads=64)
SEVERAL = Case(dim=32, lengths=(300, 77), queries=4, keywords={"return_lse": True})
TWO_TILES = Case(dim=32, lengths=(258, 77), queries=16, heads=32)  # the last queries' keys end behind a tile's end
PACKED = Case(dim=32, lengths=(300, 77, 40), queries=(16, 9, 16), heads=16)
MANY = Case(dim=32, lengths=(300, 77), queries=40, heads=4)  # each head a tile of its own
WINDOW = Case(dim=32, lengths=(300, 77), keywords={"window": (90, 0)})
BIASED = Case(dim=32, lengths=(300, 77), bias=(2, 8, 1, 21 * 16))

UNEVEN = Case(dim=32, lengths=(900, 3, 0, 41, 300))
MANY_SEQUENCES = Case(dim=32, lengths=(*range(37), 500))
BUSY = Case(64, 64, dim=32, lengths=(1500, 200, 0, 41, 1300, 77))  # shares of more than the least
MANY_STATES = Case(2, 1, dim=32, lengths=(17000, 5))
LONG_WINDOW = Case(dim=32, lengths=(900, 3, 0, 500), keywords={"window": (300, 0)})

WRONG = (OtherTraffic, WrongResult, OutOfBounds, Uninitialized, Race)
EVEN_WORK = [
    Mutation("shares rounded down", SHARES, "ceil_div(visible_tiles<C>(params, b), size)",
             "visible_tiles<C>(params, b) / size", BUSY, WRONG),
    Mutation("no share for a sequence without keys", SHARES, "return max(1, ceil_div", "return max(0, ceil_div", UNEVEN,
             WRONG),
    Mutation("the smallest shares", SHARES, "int size = max(params.least_tiles, ceil_div(",
             "int size = min(params.least_tiles, ceil_div(", BUSY, WRONG),
    Mutation("tiles of one lane's sequences alone", SHARES, "all = warp_sum(tiles)", "all = tiles", BUSY,
             BarrierDivergence),
    Mutation("more shares than are wanted", SHARES, "<= params.most_shares)", "<= 2 * params.most_shares)", BUSY,
             WRONG),
    Mutation("shares counted of one lane's sequences", SHARES, "warp_sum(counts[i])", "counts[i]", BUSY, WRONG),
    Mutation("sequences past a warp's lanes left out", SHARES, "row = ceil_div(params.batch, 32);", "row = 1;",
             MANY_SEQUENCES, WRONG),
    Mutation("slots counted from the lane's own", SHARES, "if (lane >= step) before += other;", "", UNEVEN, WRONG),
    Mutation("a lane's own shares before it", SHARES, "    before -= own;\n", "", UNEVEN, WRONG),
    Mutation("tiles outside the window counted", SHARES, "C.windowed ? Span{window.begin(0)",
             "false ? Span{window.begin(0)", LONG_WINDOW, WRONG),
    Mutation("every share from the beginning", WORK, "tiles * index / count", "0", UNEVEN, WRONG),
    Mutation("states where the first slot's are", WORK,
             "if constexpr (C.even) work.split = static_cast<int>(digits.rest);", "", UNEVEN, WRONG),
    Mutation("nobody says whose the states are", FORWARD, "share.index == 0 && blockIdx.x % blocks == 0", "false",
             UNEVEN, Uninitialized),
    Mutation("states of the first sequence", COMBINE, "shfl_idx(entry, 0), ptx", "shfl_idx(entry, 0) * 0, ptx", UNEVEN,
             WRONG),
    Mutation("a state short", COMBINE, "shfl_idx(entry, 1)", "shfl_idx(entry, 1) - 1", UNEVEN, WRONG),
    Mutation("the sum before in its own scale", MERGE, "l = l * decay", "l = l * 1", MANY_STATES, WrongResult),
]  # fmt: skip

ATTENTION = [
    Mutation("entries from the table's beginning", ROWS, "table + first + i, 4", "table + i, 4", DECODE,
             (OtherTraffic, WrongResult, OutOfBounds)),
    Mutation("an entry past the last token", ROWS, "last = (end - 1) / block_size", "last = end / block_size",
             Case(dim=32, lengths=(304, 80)), OtherTraffic),
    Mutation("an entry short", ROWS, "i <= last - first", "i < last - first", DECODE,
             (Uninitialized, OutOfBounds, Race)),
    Mutation("entries of whole tiles", FORWARD, "min((tiles.tile(position) + 1) * C.block_n, tiles.keys.end)",
             "(tiles.tile(position) + 1) * C.block_n", DECODE, OtherTraffic),
    Mutation("entries before the window", FORWARD, "max(shared.tiles.tile(position) * Shared::kKeys, "
             "shared.tiles.keys.begin)", "shared.tiles.tile(position) * Shared::kKeys", WINDOW, OtherTraffic),
    Mutation("one part of the table for all tiles", FORWARD, "shared.table.entries[position % 4],\n",
             "shared.table.entries[0],\n", DECODE, (Race, WrongResult, OutOfBounds, Uninitialized)),
    Mutation("parts in the place of those in use", FORWARD, "(shared.table.entries[position % 4], table",
             "(shared.table.entries[position % 2], table", DECODE, (Race, WrongResult, OutOfBounds, Uninitialized)),
    Mutation("entries a tile late", FORWARD, "fetch_table(position + 2);", "fetch_table(position + 1);", DECODE,
             (Race, WrongResult, OutOfBounds, Uninitialized)),
    Mutation("entries of the second tile not fetched", FORWARD, "fetch_table(tiles.begin + 1);", "", DECODE,
             (Race, OutOfBounds, Uninitialized)),
    Mutation("no barrier behind the first entries", FORWARD, "__syncthreads();  // the entries", "//", TWO_WARPS,
             (Race, Uninitialized)),
    Mutation("no wait for the first entries", FORWARD,
             "ptx::cp_async_wait<0>();\n            __syncthreads();  // the entries",
             "__syncthreads();  // the entries", DECODE, (Race, Uninitialized)),
    Mutation("the first sequence's table", FORWARD, "work.sequence * i64{params.table_pitch}",
             "0 * i64{params.table_pitch}", DECODE, (WrongResult, OtherTraffic, OutOfBounds)),
    Mutation("a batch entry of the cache", FORWARD, "C.paged ? 0 : work.batch_entry", "work.batch_entry", DECODE,
             (OutOfBounds, WrongResult)),
    Mutation("keys by query head", FORWARD, "kv_head = work.head / params.group", "kv_head = work.head", DECODE,
             (OutOfBounds, WrongResult)),
    Mutation("offsets from the sequence's beginning", ROWS, "(offset - entry * block_size) * token_stride",
             "row * token_stride", DECODE, (OutOfBounds, WrongResult)),
    Mutation("entries counted from the table's beginning", ROWS, "offset = row - begin;", "offset = row;", DECODE,
             (OutOfBounds, Uninitialized, Race, WrongResult)),
    Mutation("tokens by the stride of blocks", ROWS, "* block_stride", "* token_stride", DECODE,
             (OutOfBounds, WrongResult)),
    Mutation("rows counted from the tile's beginning", ROWS, "begin(first_key - first_key % block_size)",
             "begin(first_key)", SMALL_BLOCKS, (OutOfBounds, WrongResult, OtherTraffic)),
    Mutation("a reciprocal rounded down", ROWS, "/ block_size + 1)", "/ block_size)", SMALL_BLOCKS,
             (OutOfBounds, WrongResult)),
    Mutation("no second block", ROWS, "? offset >= block_size :", "? 0 :", Case(dim=32, lengths=(300,), block_size=200),
             (OutOfBounds, WrongResult)),
    Mutation("places of rows past the end", LOAD, "in_range ? rows.at(array_row) : nullptr", "rows.at(array_row)",
             SMALL_BLOCKS, (OutOfBounds, Uninitialized, Race)),
    Mutation("a row that another lane copies", LOAD, "n % 32 + lane / Tile::kSpan", "n % 32", DECODE, WrongResult),
    Mutation("rows past the end", LOAD, "array != nullptr ? row_left : 0", "row_left", DECODE,
             (OtherTraffic, OutOfBounds)),
    Mutation("room instead of length", WORK, "if constexpr (C.paged) work.len_k = cached_keys(params, work.sequence);",
             "", DECODE, (OutOfBounds, WrongResult, OtherTraffic)),
    Mutation("the first sequence's length", WORK, "min(max(params.seq_lens[b], 0), params.seqlen_k)",
             "min(max(params.seq_lens[0], 0), params.seqlen_k)", DECODE, (OutOfBounds, WrongResult, OtherTraffic)),
    Mutation("lengths of the tokens behind the last sequence", WORK, "b < params.batch ? cached_keys(params, b) : 0",
             "cached_keys(params, b)", PACKED, OutOfBounds),
    Mutation("a group's rows a head further", LOAD, "(first + row) % group * head_stride",
             "(first + row + 1) % group * head_stride", BIASED, WrongResult),
    Mutation("rows of a second tile as of the first", LOAD, "(first + row) / group * token_stride",
             "row / group * token_stride", TWO_TILES, (WrongResult, Race, Uninitialized)),
    Mutation("rows of a group by the number of tokens", WORK, "work.q_start * each, b, C.block_m, work.rows",
             "work.q_start, b, C.block_m, work.rows", PACKED, (WrongResult, Race, Uninitialized)),
    Mutation("slots by the number of tokens", WORK, "C.block_m, slot, each);", "C.block_m, slot);", PACKED,
             (WrongResult, Race, Uninitialized, OtherTraffic)),
    Mutation("heads of a group one by one", WORK, "params.num_heads / each : params.num_heads) * each",
             "params.num_heads / each : params.num_heads)", SEVERAL, (WrongResult, OutOfBounds, Race, Uninitialized)),
    Mutation("rows as queries in the range of keys", TILES, "row_first = work.row_begin / each",
             "row_first = work.row_begin", TWO_TILES, (WrongResult, OtherTraffic)),
    Mutation("the last row as a query", TILES, "(work.row_end(C.block_m) - 1) / each", "work.row_end(C.block_m) - 1",
             TWO_TILES, (OtherTraffic, WrongResult)),
    Mutation("rows as queries under the window", SCORES, "kGrouped ? row / params.group : row", "row", SEVERAL,
             WrongResult),
    Mutation("the bias of a group's first head", SCORES,
             "row % params.group * params.bias_strides[1] * bytes_of", "0 * params.bias_strides[1] * bytes_of",
             BIASED, (WrongResult, OtherTraffic)),
    Mutation("one stage: values of the tile before", FORWARD, "if constexpr (kStages == 1) load_v(position);",
             "if constexpr (kStages == 1) load_v(max(position - 1, 0));", ONE_STAGE,
             (WrongResult, Race, OtherTraffic, OutOfBounds, Uninitialized)),
    Mutation("every split writes the first one's state", FORWARD, "o += work.split * params.o_split_stride;", "", SPLIT,
             (Race, Uninitialized)),
    Mutation("strides of tokens and heads exchanged", FORWARD, "strides[1], strides[2], params.group, first}",
             "strides[2], strides[1], params.group, first}", SEVERAL, (OutOfBounds, WrongResult, Race)),
    Mutation("keys as if they lay in their own order", FORWARD, "if constexpr (C.paged) {\n            KLoader",
             "if constexpr (false) {\n            KLoader", MANY, (OutOfBounds, WrongResult)),
]  # fmt: skip

MOVES = [
    Mutation("slots as blocks", MOVE, "place / C.block_size;", "place;", None, (OutOfBounds, WrongResult)),
    Mutation("a slot's block alone", MOVE, "(C.whole_blocks ? row : place) % C.block_size", "row % C.block_size", None,
             (OutOfBounds, WrongResult, Race)),
    Mutation("an entry for each row of a block", MOVE, "C.whole_blocks ? row / C.block_size : row",
             "C.whole_blocks ? row : row", None, (OutOfBounds, WrongResult)),
    Mutation("values to where keys lie", MOVE, "to = params.target_strides + 4 * array", "to = params.target_strides",
             None, (OutOfBounds, WrongResult, Race)),
    Mutation("values from where keys lie", MOVE, "params.source_strides + 4 * array", "params.source_strides", None,
             (OutOfBounds, WrongResult)),
    Mutation("keys twice", MOVE, "(params.source[array])", "(params.source[0])", None, (OutOfBounds, WrongResult)),
    Mutation("every layer into the first", MOVE, "batch * to[0]", "0 * to[0]", None, (WrongResult, Race)),
    Mutation("every layer from the first", MOVE, "batch * from[0]", "0 * from[0]", None, WrongResult),
    Mutation("the first head alone", MOVE, "head * to[3]", "0 * to[3]", None, (WrongResult, Race)),
    Mutation("as many columns as keys have", MOVE, "params.columns[array]", "params.columns[0]", None,
             (OutOfBounds, Uninitialized, WrongResult)),
    Mutation("tokens to nowhere", MOVE, "return unit >= 0;", "return true;", None, OutOfBounds),
    Mutation("entries of half their width", MOVE, "Conditional<C.index_bytes == 8, i64, int>;", "int;", None,
             (OutOfBounds, Race, WrongResult)),
    Mutation("rows of the first turn alone", MOVE, "first + i * kGroups;", "first;", None,
             (Race, Uninitialized, WrongResult)),
    Mutation("offsets of 32 bits", MOVE, "at = block * block_stride", "at = static_cast<int>(block * block_stride)",
             None, (OutOfBounds, WrongResult)),
]  # fmt: skip
