"""The faults that the tests of the backward kernels must catch, as faults.py has those of the forward kernel.

Name, file, what is replaced by what, the problem, how it shows and, where it matters, the architecture.
"""

from __future__ import annotations

from cuflash.emulator.faults import Deadlock, OutOfBounds, Race, Uninitialized
from tests.attention.cases import Case
from tests.gradients.test_tiles import tiled
from tests.mutations.mutate import BankConflicts, Mutation, WrongResult

SYNC = "__syncthreads();"

# Three tiles of queries by three of keys; the last of either is cut.
ONE = Case(batch=1, num_heads=1, num_kv_heads=1, seqlen_q=70, seqlen_k=150, head_dim=32, head_dim_v=32)
PLAIN = tiled(ONE)
ONE_STAGE = tiled(ONE, num_stages=1)
CAUSAL = tiled(ONE.but(causal=True))
WINDOW = tiled(ONE.but(window=(20, 9)))
LATE_START = tiled(ONE.but(seqlen_q=150, seqlen_k=70, causal=True))  # rows that see nothing
# Of the first 32 queries the last alone does not see the first key of the second tile.
LEFT_EDGE = tiled(ONE.but(window=(46, None)))
NEGATIVE = tiled(ONE.but(values="scores_negative"))  # lse < -88.7
NEGATIVE_WINDOW = tiled(ONE.but(values="scores_negative", window=(None, 9)))  # reaches past the last key
CAPPED = tiled(ONE.but(softcap=1.5))
NARROW = tiled(ONE.but(head_dim=40, head_dim_v=40))
WIDE = tiled(ONE.but(head_dim_v=128))
PACKED = tiled(ONE.but(num_heads=2, sequences=((40, 70), (5, 0), (17, 90)), tail=(3, 7)))
GROUPED = tiled(ONE.but(batch=2, num_heads=4, num_kv_heads=2, seqlen_q=40, seqlen_k=90))
BIASED = tiled(ONE.but(batch=2, num_heads=4, num_kv_heads=2, seqlen_q=40, seqlen_k=90, bias="bhqk"))
BIAS_OF_HEADS = tiled(ONE.but(batch=2, num_heads=2, seqlen_k=90, bias=".h.k"))
BIAS_OF_ROWS = tiled(ONE.but(num_heads=2, seqlen_k=90, bias="q."))
BIAS_OF_KEYS = tiled(ONE.but(window=(20, 9), bias="k"))
BIASED_PACKED = tiled(ONE.but(num_heads=2, sequences=((40, 70), (17, 90)), bias="bhqk"))
CHUNKS = tiled(ONE.but(head_dim=128, head_dim_v=160), block_d=64, block_dv=128)  # the second of dv is narrower
CHUNKS_OF_DV = tiled(ONE.but(head_dim=64, head_dim_v=128), block_dv=64)

LONG = ONE.but(seqlen_q=150, seqlen_k=90)  # three tiles of 64 queries
SHARED = tiled(LONG, block_m=64, key_warps=2)  # warps exchange P and dS
SHARED_ONE_STAGE = tiled(LONG, block_m=64, key_warps=2, num_stages=1)
SHARED_CHUNKS = tiled(LONG.but(head_dim=128, head_dim_v=128), block_m=64, key_warps=2, block_d=64, block_dv=64)
BIAS_LARGE_ROWS = tiled(LONG.but(num_heads=2, bias="qk"), block_m=128)

SMALL = ONE.but(seqlen_q=40, seqlen_k=50)
FLOAT32 = tiled(SMALL.but(dtype="float32", head_dim=16), block_n=32, num_warps=2, key_warps=2)
FLOAT32_NARROW = tiled(SMALL.but(dtype="float32", head_dim=48), block_n=32, num_warps=2, key_warps=2)
FLOAT64 = tiled(SMALL.but(dtype="float64"), block_n=32, num_warps=2, key_warps=2)

EVEN = ONE.but(seqlen_q=64, seqlen_k=128, head_dim=16, head_dim_v=16)  # two tiles by two
FEW = tiled(EVEN)
FEW_SHARED = tiled(EVEN.but(seqlen_k=64), block_n=32, key_warps=2)
FEW_GROUPED = tiled(EVEN.but(num_heads=2))
FEW_WINDOW = tiled(EVEN.but(window=(20, 9)))
FEW_SEEN = tiled(EVEN.but(seqlen_q=20, window=(0, 0)))  # no query sees the first tile of keys
FEW_CAUSAL = tiled(EVEN.but(seqlen_q=128, causal=True), block_n=32, num_warps=2, key_warps=2)
FEW_CHUNKS = tiled(EVEN.but(head_dim=128), block_d=64)

MAIN, PREPARE, FINISH = "kernels/backward.cu", "kernels/prepare.cu", "kernels/finish.cu"
DBIAS = "kernels/bias_gradient.cu"
TILES, WORK, ROWS = "attention/query_tiles.cuh", "attention/query_work.cuh", "attention/gradient_rows.cuh"
PRODUCTS, DS = "attention/key_gradient.cuh", "attention/score_gradients.cuh"
WINDOWS, SCORES = "attention/key_tiles.cuh", "attention/scores.cuh"
COPY, OPERAND, PRODUCT = "ptx/copy.cuh", "tile/operand.cuh", "tile/product.cuh"

LANDED = f"{SYNC}          // everyone's has; everyone is done with the tile before and has added its dQ\n"
PASS = "        if (visit.head + visit.position > 0) pass_turn(visit.before(tiles.count));"
DONE = f"{SYNC}  // everyone is done with the inputs, whose places dK and dV take, and has added the last dQ\n"
PASS_LAST = "    if (tiles.count > 0) pass_turn(visit.before(tiles.count));"

SYNCHRONISATION = [
    Mutation("no wait for the query tile", MAIN, "ptx::cp_async_wait<0>();", "", PLAIN, Race),
    Mutation("a wait that is one group short", MAIN, "ptx::cp_async_wait<0>();", "ptx::cp_async_wait<1>();", PLAIN,
             Race),
    Mutation("the first copies not committed", MAIN, "load_queries(visit, 0);\n        ptx::cp_async_commit();",
             "load_queries(visit, 0);", PLAIN, Race),
    Mutation("later copies not committed", MAIN, "ptx::cp_async_commit();\n        visit = next;", "visit = next;",
             ONE_STAGE, Race),
    Mutation("no barrier before the tiles are known", MAIN, f"{SYNC}  // work and tiles", "//", PLAIN, Uninitialized),
    Mutation("no barrier behind the copies", MAIN, LANDED, "\n", PLAIN, Race),
    Mutation("no barrier behind dS", MAIN, f"{SYNC}  // P and dS are written", "//", PLAIN, Race),
    Mutation("no barrier behind P", MAIN, f"{SYNC}  // P and dS are written", "//", SHARED, Race),
    Mutation("no barrier before Q and dO are replaced", MAIN, f"{SYNC}  // everyone is done with Q and dO", "//",
             SHARED_ONE_STAGE, Race),
    Mutation("no barrier before the epilogue", MAIN, DONE, "\n", PLAIN, Race),
    Mutation("one buffer for two tiles", MAIN, "load_queries(next, stage ^ 1)", "load_queries(next, stage)", PLAIN,
             Race),
    Mutation("stages not swapped", MAIN, "stage ^= kStages - 1", "stage = 0", PLAIN, WrongResult),
    Mutation("lse of the other stage", MAIN, "shared.lse[stage] + column", "shared.lse[0] + column", PLAIN, Race),
    Mutation("delta of the other stage", MAIN, "shared.delta[stage] + column", "shared.delta[0] + column", PLAIN, Race),
]  # fmt: skip

# Where additions to dq are ordered by turns alone.
TURNS = [
    Mutation("turns not awaited", MAIN, "while (served != turn(visit)) served", "served", FEW, Race),
    Mutation("turns not awaited where P and dS are exchanged", MAIN, "while (served != turn(visit)) served", "served",
             FEW_SHARED, Race),
    Mutation("turn passed before the additions", MAIN, LANDED + PASS, PASS + "\n" + SYNC, FEW, Race),
    Mutation("last turn passed before the additions", MAIN, DONE + PASS_LAST, PASS_LAST + "\n" + SYNC, FEW, Race),
    Mutation("turn passed without a release", COPY, "st.release.gpu", "st.relaxed.gpu", FEW, Race),
    Mutation("turn not passed", MAIN, "turn(done) + 1", "turn(done)", FEW, Deadlock),
    Mutation("last turn not passed", MAIN, PASS_LAST, "", FEW, Deadlock),
    Mutation("turn of the next tile passed", MAIN, PASS, PASS.replace("visit.before(tiles.count)", "visit"), FEW,
             Deadlock),
    Mutation("turn of another head passed", TILES, "Visit{head - 1, tiles - 1}", "Visit{head, tiles - 1}", FEW_GROUPED,
             Deadlock),
    Mutation("turns counted from the first key", TILES, "C.windowed ? Window(params, work).begin(first_query) : 0", "0",
             FEW_WINDOW, Deadlock),
    Mutation("turn begun at the last of its tiles alone", MAIN,
             "visit.position == 0 || ((tile_of(visit) + 1)", "((tile_of(visit) + 1)", FEW, Race),
    Mutation("turn ended at the first of its tiles alone", MAIN, "visit.position + 1 == tiles.count || (tile_of(visit)",
             "(tile_of(visit)", FEW_CAUSAL, Deadlock),
    Mutation("turns of shared tiles counted from each tile", MAIN, "shared_turn(visit) * C.block_m",
             "tile_of(visit) * C.block_m", FEW_WINDOW, (Deadlock, Race)),
    Mutation("turns of another chunk", MAIN, "head_of(visit), slot) * Query::kChunks + work.chunk;\n    };",
             "head_of(visit), slot) + work.chunk;\n    };", FEW_CHUNKS, Deadlock),
    Mutation("turns of keys that no query sees awaited", TILES, " || tiles.queries.begin >= tiles.queries.end", "",
             FEW_SEEN, Deadlock),
    Mutation("turns not set to zero", PREPARE, "params.turns[tile * Query::kChunks + ptx::thread_index()] = 0;", ";",
             FEW, Uninitialized),
]  # fmt: skip

MEMORY = [
    Mutation("tail queries loaded", MAIN, "begin < tiles.queries.begin || begin + C.block_m > tiles.queries.end",
             "false", PLAIN, OutOfBounds),
    Mutation("queries that see nothing loaded", MAIN,
             "params.d_o_strides[1], C.head_dim_v, begin,\n                      tiles.queries.begin",
             "params.d_o_strides[1], C.head_dim_v, begin,\n                      0", LATE_START, WrongResult),
    Mutation("tail keys loaded", MAIN, "work.key_begin + C.block_n > tiles.keys.end;", "false;", PLAIN, OutOfBounds),
    Mutation("hidden keys loaded", MAIN, "work.key_begin, tiles.keys.begin, tiles.keys.end);\n        VLoader",
             "work.key_begin, 0, tiles.keys.end);\n        VLoader", WINDOW, WrongResult),
    Mutation("columns past head_dim_v loaded", MAIN,
             "using OLoader = TileLoader<typename Tiles::O, kThreads, C.load_bytes, C.head_dim_v % Tiles::kUnit != 0>",
             "using OLoader = TileLoader<typename Tiles::O, kThreads, C.load_bytes, false>", NARROW, OutOfBounds),
    Mutation("rows past the last key stored", TILES, "work.rows = min(C.block_n, work.len_k - work.key_begin)",
             "work.rows = C.block_n", PLAIN, OutOfBounds),
    Mutation("keys past the last sequence left as they were", TILES, "min(C.block_n, tokens - work.key_begin)",
             "min(C.block_n, work.len_k - work.key_begin)", PACKED, Uninitialized),
    Mutation("rows past the last query stored", FINISH, "min(C.block_m, work.len_q - work.row_begin)", "C.block_m",
             PLAIN, OutOfBounds),
    Mutation("rows past the last query prepared", PREPARE, "if (row < work.len_q) {", "{", PLAIN, OutOfBounds),
    Mutation("sums of dq not set to zero", PREPARE, "i < kSums / kPerStore", "i < 0", PLAIN, Uninitialized),
    Mutation("bias past the last query read", TILES, "C.bias_dtype != Element::none ? begin + C.block_m : ", "", BIASED,
             OutOfBounds),
    Mutation("bias past the last key read", SCORES, "query_of(row) < (kTransposed ? sequence.len_k",
             "query_of(row) < (kTransposed ? sequence.len_k + 64", BIASED, OutOfBounds),
    Mutation("bias not transposed", SCORES, "params.bias_strides[kTransposed ? 3 : 2]", "params.bias_strides[2]",
             BIASED, OutOfBounds),
    Mutation("the last chunk reads past its tile", PRODUCTS, "Right::kCols % (8 * kColumns) != 0;", "false;", CHUNKS,
             Race),
    Mutation("columns past the last block read", PRODUCTS, "min(first_block + n, blocks - 1)", "first_block + n",
             CHUNKS, Race),
    Mutation("dQ of a chunk that has none", MAIN, "if (!(Tiles::kExchange && C.deterministic) && has_dk)",
             "if (!(Tiles::kExchange && C.deterministic))", CHUNKS_OF_DV, Uninitialized),
    Mutation("narrow rows of float32", PRODUCTS, "sizeof(T) == 4 ? 32 : 16", "16", FLOAT32_NARROW, BankConflicts),
]  # fmt: skip

MASKS = [
    Mutation("tail keys unmasked, lse < -88.7", TILES,
             "if (work.key_begin + C.block_n > work.len_k) tiles.full.end = 0;", "", NEGATIVE, WrongResult),
    Mutation("tail keys of a cut tile unmasked", SCORES, "row >= sequence.len_k ? 0 : C.windowed", "C.windowed",
             NEGATIVE_WINDOW, WrongResult),
    Mutation("diagonal tiles taken for full", TILES, "tiles.full = {window.begin_query(key_end - 1)",
             "tiles.full = {window.begin_query(work.key_begin)", CAUSAL, WrongResult),
    Mutation("tiles at the left edge taken for full", TILES, "window.end_query(work.key_begin)}",
             "window.end_query(key_end - 1)}", LEFT_EDGE, WrongResult),
    Mutation("a query too few looked at for the mask", TILES, "end > full.end;", "end - 1 > full.end;", LEFT_EDGE,
             WrongResult),
    Mutation("window's sides exchanged", WINDOWS, "clamp(key - shift - right, len_q)",
             "clamp(key - shift - left, len_q)", WINDOW, WrongResult),
    Mutation("right bound off by one", WINDOWS, "clamp(key - shift - right, len_q)",
             "clamp(key - shift - right + 1, len_q)", CAUSAL, WrongResult),
    Mutation("left bound off by one", WINDOWS, "key - shift + left + 1", "key - shift + left", WINDOW, WrongResult),
    Mutation("first tile of queries left out", TILES, "tiles.first = tiles.queries.begin / C.block_m",
             "tiles.first = (tiles.queries.begin + C.block_m - 1) / C.block_m", CAUSAL, WrongResult),
    Mutation("last tile of queries left out", TILES, "1 + (tiles.queries.end - 1) / C.block_m",
             "tiles.queries.end / C.block_m", PLAIN, WrongResult),
    Mutation("mask of queries for keys", SCORES, "if constexpr (C.windowed) begin = window.begin_query(row);",
             "if constexpr (C.windowed) begin = window.begin(row);", CAUSAL, WrongResult),
    Mutation("lse of rows that see nothing", PREPARE, "if (natural != -kInfinity) {", "{", LATE_START, WrongResult),
]  # fmt: skip

NUMBERS = [
    Mutation("delta of rows that see nothing", PREPARE,
             "if (natural != -kInfinity) {\n                lse = natural * kLog2E<T>;\n                delta = sum;",
             "delta = sum;\n            if (natural != -kInfinity) {\n                lse = natural * kLog2E<T>;",
             LATE_START, WrongResult),
    Mutation("dk without scale", MAIN, "scale_by(dK, scale_of<T>(params));", "", PLAIN, WrongResult),
    Mutation("dq without scale", FINISH, "scale_by(dQ, scale_of<Sum<C.dtype>>(params));", "", PLAIN, WrongResult),
    Mutation("delta without dlse", PREPARE, "if (params.d_lse != nullptr) {", "if (false) {", PLAIN, WrongResult),
    Mutation("dlse added", PREPARE, "delta -= at<T>(params.d_lse", "delta += at<T>(params.d_lse", PLAIN, WrongResult),
    Mutation("delta of the wrong row", PREPARE, "row_delta)[tile * C.block_m + i]",
             "row_delta)[tile * C.block_m + (i ^ 1)]", PLAIN, WrongResult),
    Mutation("lse in natural units", PREPARE, "lse = natural * kLog2E<T>;", "lse = natural;", PLAIN, WrongResult),
    Mutation("delta of half the columns", PREPARE, "j += 32 * kWidth", "j += 64 * kWidth", WIDE, WrongResult),
    Mutation("shuffle dropped from delta", PRODUCT, "x += ptx::shfl_bfly<8>(x);", "", PLAIN, WrongResult),
    Mutation("delta not subtracted", DS, "(dP[m][n][at] - column)", "dP[m][n][at]", PLAIN, WrongResult),
    Mutation("delta of a neighbour", DS, "delta[8 * n + e]", "delta[8 * n + 1 - e]", PLAIN, WrongResult),
    Mutation("lse of a neighbour", DS, "lse[8 * n + e]", "lse[8 * n + 1 - e]", PLAIN, WrongResult),
    Mutation("dS without P", DS, "P[m][n][at] * (", "(", PLAIN, WrongResult),
    Mutation("dS without the soft cap's slope", DS, " * slope.at(m, n, at)", "", CAPPED, WrongResult),
    Mutation("slope of the soft cap in base 2", SCORES, "fma(-t, t, T{1})", "kLog2E<T> * fma(-t, t, T{1})", CAPPED,
             WrongResult),
    Mutation("dK from P", MAIN, "multiply_sums<C, typename Tiles::Q>(dK, dS,",
             "multiply_sums<C, typename Tiles::Q>(dK, S,", PLAIN, WrongResult),
    Mutation("dV from dS", MAIN, "(dV, shared.p, ", "(dV, shared.ds, ", SHARED, WrongResult),
    Mutation("dV from Q", MAIN, "multiply_sums<C, typename Tiles::O>(dV, S, shared.d_o[stage]",
             "multiply_sums<C, typename Tiles::O>(dV, S, shared.q[stage]", PLAIN, WrongResult),
    Mutation("dS not transposed in dQ", PRODUCT, "ptx::ldmatrix_x4_trans(words, block)",
             "ptx::ldmatrix_x4(words, block)", PLAIN, WrongResult),
    Mutation("additions lost", COPY, "red.relaxed.gpu.global.add.f32 [", "st.relaxed.gpu.global.f32 [", PLAIN,
             WrongResult),
    Mutation("elements of an addition exchanged", COPY, '"l"(memory), "f"(x[0]), "f"(x[1])',
             '"l"(memory), "f"(x[1]), "f"(x[0])', PLAIN, WrongResult, "sm_90"),
]  # fmt: skip

WIDE_ELEMENTS = [
    Mutation("correction of the left operand dropped", OPERAND, "multiply_words<E>(sum, a + i + 4, b + i / 2);", "",
             FLOAT32, WrongResult),
    Mutation("correction of the right operand dropped", OPERAND, "multiply_words<E>(sum, a + i, b + i / 2 + 2);", "",
             FLOAT32, WrongResult),
    Mutation("P numbered as it lies", PRODUCT, "{as_word(x[0]), as_word(x[2]), as_word(x[1]), as_word(x[3])}",
             "{as_word(x[0]), as_word(x[1]), as_word(x[2]), as_word(x[3])}", FLOAT32, WrongResult),
    Mutation("keys of dQ numbered otherwise", PRODUCT, "8 * i + j / 2, j % 2 * bytes_of(E) / 2",
             "8 * i + 1 - j / 2, j % 2 * bytes_of(E) / 2", FLOAT32, WrongResult),
    Mutation("dS of float32 by rows", MAIN, "(bytes_of(C.dtype) == 2 ? Tiles::S::lane_by_rows",
             "(bytes_of(C.dtype) <= 4 ? Tiles::S::lane_by_rows", FLOAT32, Uninitialized),
    Mutation("wrong columns of float64", PRODUCT, "Tile::step(block, 8 * i, h * bytes_of(E) / 2)",
             "Tile::step(block, 8 * i, h * bytes_of(E) / 4)", FLOAT64, WrongResult),
    Mutation("dS of float32 at the start of a chunk", PRODUCTS,
             "byte / 16) + byte % 16;\n#pragma unroll\n    for (int m", "byte / 16);\n#pragma unroll\n    for (int m",
             FLOAT32, Race),
]  # fmt: skip

SHARES = [
    Mutation("wrong query head", MAIN,
             "const int head = head_of(visit);\n        const bool partial",
             "const int head = work.kv_head + 2 * visit.head;\n        const bool partial", GROUPED, WrongResult),
    Mutation("dq of the key/value head", MAIN,
             "const i64 index = query_tile_index(params, work.batch_entry, head_of(visit), slot)",
             "const i64 index = query_tile_index(params, work.batch_entry, work.kv_head, slot)", GROUPED, WrongResult),
    Mutation("bias of the key/value head", MAIN, "rule(params, work, head_of(visit)",
             "rule(params, work, work.kv_head", BIASED, WrongResult),
    Mutation("only one head of a group", MAIN, "tiles.count > 0 && visit.head < repeats",
             "tiles.count > 0 && visit.head < 1", GROUPED, WrongResult),
    Mutation("lse of the first head", PREPARE, "+ head * strides[1] +", "+", GROUPED, WrongResult),
    Mutation("dq of the first batch entry", ROWS, "static_cast<i64>(batch_entry) * params.num_heads", "0ll", GROUPED,
             Race),
    Mutation("sequences share a tile of queries", TILES, "sequence.q_start / C.block_m + sequence.sequence",
             "sequence.q_start / C.block_m", PACKED, WrongResult),
    Mutation("keys from the queries' slots", TILES,
             "sequence_of_slot(params.cu_seqlens_k, params.batch, params.total_k",
             "sequence_of_slot(params.cu_seqlens_q, params.batch, params.total_k", PACKED, Uninitialized),
    Mutation("slot of queries in tiles of keys", WORK, "work.q_start, b, C.block_m, work.len_q",
             "work.q_start, b, C.block_n, work.len_q", PACKED, Uninitialized),
    Mutation("dq's first columns for every chunk", FINISH, "chunk * C.block_d + 16 * column", "16 * column", CHUNKS,
             Race),
    Mutation("sums of the first chunk", FINISH, "(tile * Query::kChunks + chunk)", "(tile * Query::kChunks)", CHUNKS,
             WrongResult),
    Mutation("dQ of the chunk before", MAIN, "shared.k, work.chunk * (C.block_d / 16) + column,", "shared.k, column,",
             CHUNKS, WrongResult),
    Mutation("columns of a chunk off by one block", PRODUCTS, "chunk * (kColumns / 2), Right",
             "chunk * (kColumns / 2) - chunk, Right", CHUNKS, WrongResult),
    Mutation("first columns of every chunk multiplied", PRODUCTS, "+ chunk * (8 * kColumns * bytes_of(C.dtype))", "",
             CHUNKS, WrongResult),
    Mutation("dk in a chunk that has none", MAIN, "work.chunk * C.block_d < C.head_dim",
             "work.chunk * C.block_d <= C.head_dim", CHUNKS_OF_DV, OutOfBounds),
    Mutation("queries of the first share", PRODUCTS, "here.query * Right::kPitch", "0", SHARED, WrongResult),
    Mutation("scores of a share in the first's place", PRODUCTS, "here.query / 8 * kChunks", "0", SHARED, Race),
    Mutation("columns of the first share", PRODUCTS, "chunk_block + here.share * (kColumns / 2)", "chunk_block", SHARED,
             WrongResult),
    Mutation("dk of the first share", MAIN, "work.chunk * C.block_d + here.share * Tiles::Dk::kCols",
             "work.chunk * C.block_d", SHARED, Race),
    Mutation("dv staged in the first share's place", MAIN, "shared.dv[here.share]", "shared.dv[0]", SHARED, Race),
    Mutation("first columns for every chunk of a share", MAIN,
             "shared.p, shared.d_o[stage], work.chunk * (C.block_dv / 16)", "shared.p, shared.d_o[stage], 0",
             SHARED_CHUNKS, WrongResult),
    Mutation("rows of the first warp in dQ", MAIN, "Tiles::S::block(lane_address, 0, Query::first_row_block(warp))",
             "lane_address", PLAIN, WrongResult),
    Mutation("dQ added twice", MAIN, "if (!(Tiles::kExchange && C.deterministic) && has_dk)", "if (has_dk)", SHARED,
             WrongResult),
    Mutation("sums of dq in another order", ROWS, "(sums, offset(warp, lane, m, n, e))",
             "(sums, offset(warp, lane, m, n, e ^ 1))", PLAIN, WrongResult),
]  # fmt: skip

BIAS_GRADIENT = [
    Mutation("dbias: no wait", DBIAS, "ptx::cp_async_wait<0>();", "", BIASED, Race),
    Mutation("dbias: no barrier before the copies", DBIAS, f"{SYNC}  // everyone is done with the tiles before", "//",
             BIAS_OF_HEADS, Race),
    Mutation("dbias: no barrier behind the copies", DBIAS, f"{SYNC}  // the tiles have landed", "//", BIASED, Race),
    Mutation("dbias: no barrier before the sums", DBIAS, f"{SYNC}  // everyone is done with the inputs", "//", BIASED,
             Race),
    Mutation("dbias: no barrier behind the sums", DBIAS, f"{SYNC}  // the sums are there", "//", BIASED, Race),
    Mutation("dbias of one batch entry", DBIAS, "added(shape[0], own_batch, 1, params.batch)",
             "Span{own_batch, own_batch + 1}", BIAS_OF_HEADS, WrongResult),
    Mutation("dbias of one head", DBIAS, "added(shape[1], own_head, 1, params.num_heads)",
             "Span{own_head, own_head + 1}", BIAS_OF_ROWS, WrongResult),
    Mutation("dbias of the first tile of queries", DBIAS, "added(shape[2], query_begin, C.block_m, work.len_q)",
             "Span{query_begin, min(query_begin + C.block_m, work.len_q)}", BIAS_OF_HEADS, WrongResult),
    Mutation("dbias of the first tile of keys", DBIAS, "added(shape[3], key_begin, C.block_n, work.len_k)",
             "Span{key_begin, min(key_begin + C.block_n, work.len_k)}", BIAS_OF_ROWS, WrongResult),
    Mutation("dbias of a tile's first query", DBIAS, "added(shape[2], query, 1, C.block_m)", "Span{query, query + 1}",
             BIAS_OF_HEADS, WrongResult),
    Mutation("dbias of a tile's first key", DBIAS, "added(shape[3], key, 1, C.block_n)", "Span{key, key + 1}",
             BIAS_OF_ROWS, WrongResult),
    Mutation("dbias: tiles replaced, not added", DBIAS, "sums[m][n][e] += dS[m][n][e]", "sums[m][n][e] = dS[m][n][e]",
             BIAS_OF_HEADS, WrongResult),
    Mutation("dbias: keys loaded once", DBIAS, "!shown.all, new_keys)", "!shown.all, query == queries.begin)",
             BIAS_OF_KEYS, Uninitialized),
    Mutation("dbias: key/value head of the first group", DBIAS, "work.kv_head = head / params.group",
             "work.kv_head = 0", BIASED, WrongResult),
    Mutation("dbias: rows in steps of its own tiles", DBIAS, "* C.row_block + first_query", "* C.block_m + first_query",
             BIAS_LARGE_ROWS, WrongResult),
    Mutation("dbias: sequences share a tile of queries", DBIAS, "work.q_start / C.row_block + work.sequence",
             "work.q_start / C.row_block", BIASED_PACKED, WrongResult),
    Mutation("dbias: packed sequences taken for dense", DBIAS, "if constexpr (C.varlen) locate_packed",
             "if constexpr (false) locate_packed", BIASED_PACKED, OutOfBounds),
    Mutation("dbias: rows in the wrong places", DBIAS, "(query_begin + query) * params.dbias_strides[2]",
             "query * params.dbias_strides[2]", BIASED, Race),
    Mutation("dbias: sums not padded", DBIAS, "sums[C.block_n][C.block_m + 1]", "sums[C.block_n][C.block_m]", BIASED,
             BankConflicts),
]  # fmt: skip

MUTATIONS = [
    *SYNCHRONISATION, *MEMORY, *MASKS, *NUMBERS, *WIDE_ELEMENTS, *SHARES, *BIAS_GRADIENT,
]  # fmt: skip
