"""Faults of what float32 (split TF32) and float64 have for themselves, as in faults.py."""

from __future__ import annotations

from cuflash.emulator.faults import OutOfBounds
from tests.attention.cases import Case, tiled
from tests.mutations.mutate import BankConflicts, Mutation, WrongResult

ONE = Case(dtype="float32", batch=1, num_heads=1, num_kv_heads=1, seqlen_q=70, seqlen_k=150)
FLOAT32 = tiled(ONE)
FLOAT64 = tiled(ONE.but(dtype="float64"))
ONE_ROW_BLOCK = tiled(ONE.but(head_dim=48), block_m=64, block_n=16)
TWO_ROW_BLOCKS = tiled(ONE, block_m=128)
MANY_TILES = tiled(ONE.but(seqlen_q=20, seqlen_k=520), block_m=32, num_warps=2, block_n=16)  # 33: two levels of sums
LATE_START = tiled(ONE.but(dtype="float64", seqlen_q=150, seqlen_k=70, causal=True))  # rows that see nothing
COLUMNS_48 = tiled(ONE.but(head_dim_v=48))
SCALED_64 = tiled(ONE.but(dtype="float64", scale=0.3))
CAPPED_64 = tiled(ONE.but(dtype="float64", softcap=1.7, bias="..qk", bias_dtype="float64"))

OPERAND, PRODUCT, SHARED_TILE = "tile/operand.cuh", "tile/product.cuh", "tile/shared_tile.cuh"
FUNCTIONS, MATRIX, SETTLED = "tile/functions.cuh", "ptx/matrix.cuh", "attention/settled.cuh"
FORWARD, SCORES, EPILOGUE = "kernels/forward.cu", "attention/scores.cuh", "attention/epilogue.cuh"
ELEMENT = "tile/element.cuh"

SPLIT_PRODUCTS = [
    Mutation("a2 b1 dropped", OPERAND, "multiply_words<E>(sum, a + i + 4, b + i / 2);", "", FLOAT32, WrongResult),
    Mutation("a1 b2 dropped", OPERAND, "multiply_words<E>(sum, a + i, b + i / 2 + 2);", "", FLOAT32, WrongResult),
    Mutation("a2 b2 for a1 b2", OPERAND, "(sum, a + i, b + i / 2 + 2)", "(sum, a + i + 4, b + i / 2 + 2)", FLOAT32,
             WrongResult),
    Mutation("split operands in TF32", OPERAND, "return element == Element::float32; }", "return false; }", FLOAT32,
             WrongResult),
    Mutation("low parts of the sum", OPERAND, "__uint_as_float(x) - __uint_as_float(high)", "__uint_as_float(x)",
             FLOAT32, WrongResult),
    Mutation("products not added", OPERAND, "d[e] += sum[e];", "d[e] = sum[e];", FLOAT32, WrongResult),
]  # fmt: skip

OPERANDS = [
    Mutation("keys of P in another order", PRODUCT, "{as_word(x[0]), as_word(x[2]), as_word(x[1]), as_word(x[3])}",
             "{as_word(x[0]), as_word(x[1]), as_word(x[2]), as_word(x[3])}", FLOAT32, WrongResult),
    Mutation("keys of V in another order", PRODUCT, "Tile::step(block, 8 * i + 1, h", "Tile::step(block, 8 * i, h",
             FLOAT32, WrongResult),
    Mutation("keys of V where 16-bit ones are", SHARED_TILE, "offset(lane % 4 * 2, lane / 4 * kBytes / 16)",
             "offset(lane % 4, lane / 4 * kBytes / 16)", FLOAT64, WrongResult),
    Mutation("second half of a step as the first", PRODUCT, "elements[0], elements[2], Tile::step(block, 0, i)",
             "elements[0], elements[2], Tile::step(block, 0, 0)", FLOAT64, WrongResult),
    Mutation("rows of K eight too early", PRODUCT, "elements[2], elements[3], Tile::step(block, 8, i)",
             "elements[2], elements[3], Tile::step(block, 0, i)", FLOAT64, WrongResult),
    Mutation("neighbouring chunks of float64", SHARED_TILE,
             "lane_of_left(int lane) {\n        if constexpr (sizeof(T) == 8) return offset(lane / 4, lane % 4 * 2)",
             "lane_of_left(int lane) {\n        if constexpr (sizeof(T) == 8) return offset(lane / 4, lane % 4)",
             FLOAT64, (WrongResult, BankConflicts)),
    Mutation("rows of V not padded", FORWARD, "sizeof(T) == 4 ? 32 : 16", "16", COLUMNS_48, BankConflicts),
    Mutation("lower rows of a product twice", MATRIX, "mma_m8n8k4_f64(d[2], d[3], a[3], b1);",
             "mma_m8n8k4_f64(d[2], d[3], a[1], b1);", FLOAT64, WrongResult),
    Mutation("depth not walked", FORWARD, "q += kPass, k += kPass) step(0), step(1);", "k += kPass) step(0), step(1);",
             ONE_ROW_BLOCK, WrongResult),
    Mutation("the odd step left out", FORWARD, "if constexpr (kD % 2 == 1) step(0);", "", ONE_ROW_BLOCK, WrongResult),
]  # fmt: skip

SUMS = [
    Mutation("settled sums not rescaled", SETTLED, "fma(old[e], decay[e / 2], x[i][n][e])", "old[e] + x[i][n][e]",
             MANY_TILES, WrongResult),
    Mutation("settled l not rescaled", SETTLED, "fma(old[h], decay[h], running.l[i][h])", "old[h] + running.l[i][h]",
             MANY_TILES, WrongResult),
    Mutation("running sums counted twice", SETTLED, "clear(x);", "", MANY_TILES, WrongResult),
    Mutation("running l counted twice", SETTLED, "running.l[i][0] = running.l[i][1] = 0.0f;", "", MANY_TILES,
             WrongResult),
    Mutation("settled sums left behind", FORWARD, "settled.take(softmax, O);", "", MANY_TILES, WrongResult),
    Mutation("a last tile on its own left out", FORWARD, "if (position == tiles.end) break;",
             "if (position + 1 >= tiles.end) break;", MANY_TILES, WrongResult),
]  # fmt: skip

NUMBERS_64 = [
    Mutation("a power too small", FUNCTIONS, "+ 1023) << 20", "+ 1022) << 20", FLOAT64, WrongResult),
    Mutation("one term of the exponential", FUNCTIONS, "q = fma(q, f, 1.0178062445845774e-7);", "", FLOAT64,
             WrongResult),
    Mutation("2^-inf", FUNCTIONS, "return x < -1022.0 ? 0.0 : power;", "return power;", LATE_START, WrongResult),
    Mutation("scale in float32", SCORES, "return params.scale64;", "return params.scale;", SCALED_64, WrongResult),
    Mutation("cap in float32", SCORES, "return params.softcap64;", "return params.softcap;", CAPPED_64, WrongResult),
    Mutation("bias in float32", ELEMENT, "if constexpr (bytes_of(E) == 8) return ptx::load_global_f64(element);",
             "if constexpr (bytes_of(E) == 8) return static_cast<float>(ptx::load_global_f64(element));", CAPPED_64,
             WrongResult),
    Mutation("log2 e in float32", SCORES, "constexpr T kLog2E = static_cast<T>(1.4426950408889634);",
             "constexpr T kLog2E = static_cast<T>(1.4426950408889634f);", FLOAT64, WrongResult),
]  # fmt: skip

STORES = [
    Mutation("rows past the end, unstaged", EPILOGUE, "if (row >= rows) continue;", "", FLOAT64, OutOfBounds),
    Mutation("second rows as the first", EPILOGUE, "store_global_v2(target, as_word(x[m][n][2 * h])",
             "store_global_v2(target, as_word(x[m][n][0])", FLOAT64, WrongResult),
]  # fmt: skip

MUTATIONS = [*SPLIT_PRODUCTS, *OPERANDS, *SUMS, *NUMBERS_64, *STORES]
