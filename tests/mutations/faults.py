"""The faults that the tests of the kernels must catch, what each breaks, and how it shows.

WrongResult: the comparison with the oracle fails. BankConflicts: the result is right, but slow to get. The others are
faults of the emulated device.
"""

from __future__ import annotations

from cuflash.emulator.faults import OutOfBounds, Race, Uninitialized
from tests.attention.cases import Case, tiled
from tests.mutations.mutate import BankConflicts, Mutation, WrongResult

BARRIER = "__syncthreads();"
BASE = Case(batch=2, num_heads=4, num_kv_heads=2, seqlen_q=70, seqlen_k=150)
ONE = Case(batch=1, num_heads=1, num_kv_heads=1, seqlen_q=70, seqlen_k=150)
CAUSAL = tiled(ONE.but(causal=True))
PLAIN = tiled(ONE)
ONE_STAGE = tiled(ONE, num_stages=1)
IN_REGISTERS = tiled(ONE, q_in_registers=True)
GROUPED = tiled(BASE)
BIASED = tiled(BASE.but(bias="bhqk"))
CAPPED = tiled(ONE.but(bias="..qk", softcap=1.5))
WINDOW = tiled(ONE.but(window=(20, 9)))
LATE_START = tiled(ONE.but(seqlen_q=150, seqlen_k=70, causal=True))  # rows that see nothing
SPLIT = tiled(ONE.but(seqlen_q=20), num_splits=3)
MANY_PARTS = tiled(ONE.but(seqlen_q=20, seqlen_k=70), num_splits=128)  # a block a row, 32 states a warp
PACKED = tiled(Case(num_heads=2, num_kv_heads=1, sequences=((40, 70), (5, 0), (17, 90))))
ODD = tiled(ONE.but(head_dim=33, head_dim_v=33), load_bytes=2, store_bytes=2)
NARROW = tiled(ONE.but(head_dim=40, head_dim_v=40))
WIDE_VALUES = tiled(ONE.but(head_dim_v=128))  # O takes the place of Q and of some of K
COLUMNS = tiled(ONE.but(head_dim_v=128), block_dv=64)

FORWARD, TILES, SCORES = "kernels/forward.cu", "attention/key_tiles.cuh", "attention/scores.cuh"
SOFTMAX, EPILOGUE, WORK = "attention/softmax.cuh", "attention/epilogue.cuh", "attention/work.cuh"
LOAD, PRODUCT, SHARED_TILE = "tile/load.cuh", "tile/product.cuh", "tile/shared_tile.cuh"
COPY, MATH = "ptx/copy.cuh", "ptx/math.cuh"
MERGE = "attention/merge.cuh"

WAIT_K = "ptx::cp_async_wait<0>();  // this thread's share of K(j)"
WAIT_V = "ptx::cp_async_wait<0>();  // this thread's share of V(j)"
WAIT_Q = "ptx::cp_async_wait<0>();  // this thread's share of Q"

SYNCHRONISATION = [
    Mutation("no wait for K and V", FORWARD, WAIT_K, "//", PLAIN, Race),
    Mutation("a wait that is one group short", FORWARD, WAIT_K, WAIT_K.replace("0", "1"), PLAIN, Race),
    Mutation("no wait for V, one stage", FORWARD, WAIT_V, "//", ONE_STAGE, Race),
    Mutation("no wait for Q in registers", FORWARD, WAIT_Q, "//", IN_REGISTERS, Race),
    Mutation(
        "copies not committed",
        FORWARD,
        "// where entries of position - 2 were\n        ptx::cp_async_commit();",
        "",
        PLAIN,
        Race,
    ),
    Mutation(
        "no barrier before the tile is known", FORWARD, f"{BARRIER}  // work and tiles", "//", PLAIN, Uninitialized
    ),
    Mutation(
        "no barrier at a tile's start",
        FORWARD,
        f"{BARRIER}          // everyone's has; everyone is done with V(j-1)",
        "//",
        PLAIN,
        Race,
    ),
    Mutation(
        "no barrier before V, one stage",
        FORWARD,
        f"{BARRIER}          // everyone's has; everyone is done with K(j)",
        "//",
        ONE_STAGE,
        Race,
    ),
    Mutation("no barrier behind Q", FORWARD, f"{BARRIER}          // everyone's has\n", "\n", IN_REGISTERS, Race),
    Mutation(
        "no barrier before the epilogue", FORWARD, f"{BARRIER}  // everyone is done with Q", ";  //", WIDE_VALUES, Race
    ),
    Mutation("no warp barrier in the epilogue", EPILOGUE, "__syncwarp();", "", PLAIN, Race),
    Mutation(
        "one buffer for two tiles of K",
        FORWARD,
        "tiles.cut_end(), ptx::shared_address(shared.k[position % kStages])",
        "tiles.cut_end(), ptx::shared_address(shared.k[0])",
        PLAIN,
        Race,
    ),
    Mutation(
        "one buffer for two tiles of V",
        FORWARD,
        "tiles.cut_end(), ptx::shared_address(shared.v[position % kStages])",
        "tiles.cut_end(), ptx::shared_address(shared.v[0])",
        PLAIN,
        Race,
    ),
]

MEMORY = [
    Mutation(
        "tail keys loaded", LOAD, "(begin <= array_row && array_row < end)", "begin <= array_row", PLAIN, OutOfBounds
    ),
    Mutation(
        "hidden keys loaded", LOAD, "(begin <= array_row && array_row < end)", "array_row < end", WINDOW, WrongResult
    ),
    Mutation(
        "tail queries loaded",
        FORWARD,
        "work.row_begin, 0,\n                          work.rows);",
        "work.row_begin, 0,\n                          work.row_begin + C.block_m);",
        PLAIN,
        OutOfBounds,
    ),
    Mutation(
        "columns past head_dim loaded",
        LOAD,
        "const int valid = in_range ? row_left : 0;",
        "const int valid = in_range ? 16 : 0;",
        NARROW,
        OutOfBounds,
    ),
    Mutation(
        "one element past an odd row",
        LOAD,
        "2 * at + 2 < valid ? source[at + 1] : 0",
        "source[at + 1]",
        ODD,
        OutOfBounds,
    ),
    Mutation(
        "zero fill without a size",
        COPY,
        '"cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared)',
        '"cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared)',
        PLAIN,
        OutOfBounds,
    ),
    Mutation(
        "a tile past the last prefetched",
        FORWARD,
        "if (position + 1 >= tiles.end) return;",
        "if (position + 1 > tiles.end) return;",
        PLAIN,
        OutOfBounds,
    ),
    Mutation("rows past the end stored", EPILOGUE, "if (row >= rows) break;", "", PLAIN, OutOfBounds),
    Mutation("partial rows past the end stored", EPILOGUE, "if (row >= rows) continue;", "", SPLIT, OutOfBounds),
    Mutation("lse past the end stored", EPILOGUE, "if (row < rows) *to", "*to", PLAIN, OutOfBounds),
    Mutation("columns past head_dim_v stored", EPILOGUE, "if (columns > 0) ptx", "ptx", NARROW, Race),
    Mutation("bias of rows past the end read", SCORES, "exists && ", "", BIASED, (OutOfBounds, Uninitialized)),
    Mutation(
        "bias strides swapped",
        SCORES,
        "query_of(row) * row_stride + first * column_stride",
        "query_of(row) * column_stride + first * row_stride",
        BIASED,
        (OutOfBounds, Uninitialized),
    ),
]

MASKS = [
    Mutation(
        "diagonal off by one",
        TILES,
        "(sequence.len_k) - sequence.len_q)",
        "(sequence.len_k) - sequence.len_q + 1)",
        CAUSAL,
        WrongResult,
    ),
    Mutation(
        "aligned to the top left",
        TILES,
        "shift(static_cast<i64>(sequence.len_k) - sequence.len_q)",
        "shift(0)",
        CAUSAL,
        WrongResult,
    ),
    Mutation("left bound off by one", TILES, "row + shift - left,", "row + shift - left + 1,", WINDOW, WrongResult),
    Mutation("right bound off by one", TILES, "row + shift + right + 1,", "row + shift + right,", WINDOW, WrongResult),
    Mutation(
        "window in 32 bits",
        TILES,
        "row + shift - left,",
        "static_cast<int>(row + shift) - left,",
        LATE_START,
        WrongResult,
    ),
    Mutation(
        "last tile of keys left out",
        TILES,
        "1 + (keys.end - 1) / block",
        "keys.end / block",
        PLAIN,
        WrongResult,
    ),
    Mutation(
        "tail tile taken for full",
        TILES,
        "tiles.right_cut = tiles.last - full_last;",
        "tiles.right_cut = 0;",
        PLAIN,
        OutOfBounds,
    ),
    Mutation(
        "right edge unmasked",
        SCORES,
        "if (!cut) return;",
        "return;",
        CAUSAL,
        WrongResult,
    ),
    Mutation(
        "left edge unmasked",
        TILES,
        "tiles.left_cut = min(full_first, full_last) - tiles.first;",
        "tiles.left_cut = 0;",
        tiled(ONE.but(window=(20, None))),
        WrongResult,
    ),
    Mutation(
        "tail keys unmasked",
        SCORES,
        "if (!cut) return;",
        "return;",
        PLAIN,
        WrongResult,
    ),
    Mutation(
        "diagonal tiles taken for full",
        TILES,
        "const int full_end = C.windowed ? window.end(row_first)",
        "const int full_end = C.windowed ? window.end(row_last)",
        CAUSAL,
        WrongResult,
    ),
    Mutation(
        "one hidden key seen", SCORES, "visible = 8 * n + e < end", "visible = 8 * n + e <= end", CAUSAL, WrongResult
    ),
    Mutation(
        "mask inverted",
        SCORES,
        "visible ? S[n][2 * h + e] : static_cast<T>(-kInfinity)",
        "visible ? static_cast<T>(-kInfinity) : S[n][2 * h + e]",
        CAUSAL,
        WrongResult,
    ),
]

NUMBERS = [
    Mutation("O not rescaled", SOFTMAX, "O[i][n][e] *= decay[i][h];", "O[i][n][e] *= 1.0f;", PLAIN, WrongResult),
    Mutation("l not rescaled", SOFTMAX, "l[i][h] *= decay[i][h];", "", PLAIN, WrongResult),
    Mutation("m not kept", SOFTMAX, "m[i][h] = grown;", "", PLAIN, WrongResult),
    Mutation("-inf minus -inf", SOFTMAX, "m[i][h] = kLowest<T>", "m[i][h] = -kInfinity", LATE_START, WrongResult),
    Mutation(
        "empty rows divided",
        SOFTMAX,
        "total == 0 ? 0 : reciprocal(total)",
        "reciprocal(total)",
        LATE_START,
        WrongResult,
    ),
    Mutation("lse in base 2", SOFTMAX, "natural_log(m[i][h], total)", "m[i][h] + log2_of(total)", PLAIN, WrongResult),
    Mutation(
        "lse without the maximum", SOFTMAX, "natural_log(m[i][h], total)", "natural_log(T(), total)", PLAIN, WrongResult
    ),
    Mutation("lse without the low part", SOFTMAX, "rest * kLn2<T>)", "T{0})", PLAIN, WrongResult),
    Mutation(
        "shuffle dropped from the maximum", PRODUCT, "x = larger(x, ptx::shfl_bfly<1>(x));", "", PLAIN, WrongResult
    ),
    Mutation("shuffle dropped from the sum", PRODUCT, "x += ptx::shfl_bfly<1>(x);", "", PLAIN, WrongResult),
    Mutation(
        "scale in natural units",
        SCORES,
        "kRaw ? scale_of<T>(params) * kLog2E<T>",
        "kRaw ? scale_of<T>(params)",
        PLAIN,
        WrongResult,
    ),
    Mutation(
        "bias in natural units", SCORES, "stride)), kLog2E<T>, score)", "stride)), T{1}, score)", BIASED, WrongResult
    ),
    Mutation(
        "bias capped with the score",
        SCORES,
        "score = fma(static_cast<T>(load_element<C.bias_dtype>(bias, e * column_stride)), kLog2E<T>, score);",
        "score = softcap * kLog2E<T> * tanh_accurate((score / kLog2E<T> + "
        "static_cast<T>(load_element<C.bias_dtype>(bias, e * column_stride))) / softcap);",
        CAPPED,
        WrongResult,
    ),
    Mutation(
        "softcap without its scale",
        SCORES,
        "score = softcap * kLog2E<T> * t;",
        "score = kLog2E<T> * t;",
        CAPPED,
        WrongResult,
    ),
    Mutation(
        "wrong fragments of K",
        SHARED_TILE,
        "offset(lane / 16 * 8 + lane % 8, lane / 8 % 2)",
        "offset(lane % 16, lane / 16)",
        PLAIN,
        WrongResult,
    ),
    Mutation(
        "V not transposed", PRODUCT, "ptx::ldmatrix_x4_trans(elements", "ptx::ldmatrix_x4(elements", PLAIN, WrongResult
    ),
    Mutation(
        "swapped halves of P",
        PRODUCT,
        "a[m][1] = pack<E>(sums[m][2 * k][2]",
        "a[m][1] = pack<E>(sums[m][2 * k][0]",
        PLAIN,
        WrongResult,
    ),
    Mutation(
        "swapped pair in a conversion",
        MATH,
        '"cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low)',
        '"cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(low), "f"(high)',
        PLAIN,
        WrongResult,
    ),
    Mutation("chunks not swizzled", SHARED_TILE, "16 * (chunk ^ swizzle(row))", "16 * chunk", PLAIN, BankConflicts),
    Mutation(
        "rows read without their swizzle",
        SHARED_TILE,
        "else return offset(lane % 16, lane / 16);",
        "else return lane % 16 * kPitch + lane / 16 * 16;",
        PLAIN,
        WrongResult,
    ),
]

COMBINING = [
    Mutation("weights in natural units", MERGE, "reference)) * kLog2E<T>", "reference))", SPLIT, WrongResult),
    Mutation("weights not normalised", MERGE, "part.o[j][e] * inverse", "part.o[j][e]", SPLIT, WrongResult),
    Mutation("parts of warps not normalised", MERGE, ", o * inverse", ", o", MANY_PARTS, WrongResult),
    Mutation("lse of the greatest part", MERGE, "m + kLn2<T> * log2_of(l)", "m", SPLIT, WrongResult),
    Mutation("a warp's part in its own scale", MERGE, "weight_of(peaks[i], m)", "1", MANY_PARTS, WrongResult),
    Mutation(
        "no barrier before the parts are merged",
        MERGE,
        f"{BARRIER}  // the parts",
        "//",
        MANY_PARTS,
        (Race, Uninitialized, WrongResult),
    ),
    Mutation(
        "parts that two warps take",
        MERGE,
        "warp % kWarps, row.token_offset",
        "0, row.token_offset",
        MANY_PARTS,
        WrongResult,
    ),
    Mutation("shuffle dropped", PRODUCT, "return x + ptx::shfl_bfly<2>(x);", "return x;", SPLIT, WrongResult),
    Mutation(
        "weight of the next part",
        MERGE,
        "shfl_idx(weight, begin + i)",
        "shfl_idx(weight, begin + i + 1)",
        SPLIT,
        WrongResult,
    ),
    Mutation(
        "last part left out",
        MERGE,
        "ceil_div(states.count - first, kStride)",
        "ceil_div(states.count - first - 1, kStride)",
        SPLIT,
        WrongResult,
    ),
]

OFFSETS = [
    Mutation(
        "offset of a token in 32 bits",
        WORK,
        "token * strides[1]",
        "static_cast<int>(token * strides[1])",
        None,
        OutOfBounds,
    ),
]

WORK_SHARES = [
    Mutation(
        "wrong key/value head", FORWARD, "work.head / params.group", "work.head % params.group", GROUPED, WrongResult
    ),
    Mutation(
        "bias of the key/value head",
        SCORES,
        "head * params.bias_strides[1]",
        "head / params.group * params.bias_strides[1]",
        BIASED,
        WrongResult,
    ),
    Mutation(
        "bias of the first sequence", SCORES, "sequence.sequence * params.bias_strides[0]", "0", BIASED, WrongResult
    ),
    Mutation(
        "first columns for every chunk",
        FORWARD,
        " +\n                    work.chunk * C.block_dv;",
        ";",
        COLUMNS,
        WrongResult,
    ),
    Mutation(
        "lse of the first tile only",
        FORWARD,
        "rows_of<C>(target, strides, work, params, work.row_begin)",
        "rows_of<C>(target, strides, work, params, 0)",
        PLAIN,
        Race,
    ),
    Mutation(
        "splits overlap",
        WORK,
        "(tiles * index / count)",
        "(max(tiles * index / count - 1, 0ll))",
        SPLIT,
        WrongResult,
    ),
    Mutation(
        "splits leave keys out",
        WORK,
        "(tiles * (index + 1) / count)",
        "(max(tiles * (index + 1) / count - 1, 0ll))",
        SPLIT,
        WrongResult,
    ),
    Mutation("all splits in one place", FORWARD, "work.split * params.o_split_stride", "0", SPLIT, Race),
    Mutation(
        "keys from the queries' start",
        WORK,
        "to.k_start = token_at(params.cu_seqlens_k, b",
        "to.k_start = token_at(params.cu_seqlens_q, b",
        PACKED,
        WrongResult,
    ),
    Mutation("slot of the sequence before", WORK, "middle <= slot) low", "middle < slot) low", PACKED, Uninitialized),
    Mutation(
        "tiles not counted per sequence",
        WORK,
        "slot - (start / block + sequence)",
        "slot - start / block",
        PACKED,
        Uninitialized,
    ),
]

MUTATIONS = [*SYNCHRONISATION, *MEMORY, *MASKS, *NUMBERS, *WORK_SHARES, *COMBINING, *OFFSETS]
