// Compile-time constants of each kernel family. Mirrors cuflash/plan/config.py: the same fields in the same order.
#pragma once

#include "tile/element.cuh"

namespace cuflash {

struct ForwardConfig {
    Element dtype;       // q, k, v and (unless split) o
    Element bias_dtype;  // none: no bias
    int head_dim;
    int head_dim_v;
    int block_m;   // queries of a block
    int block_n;   // keys of a tile
    int block_dv;  // output columns of a block
    int num_warps;
    int num_stages;  // 1: V(j) and K(j+1) arrive under the products of tile j; 2: K(j+1) and V(j+1) do
    bool q_in_registers;
    int load_bytes;   // widest access that every row of q, k and v is aligned to
    int store_bytes;  // the same for o
    bool windowed;
    bool softcapped;
    bool varlen;
    bool split;  // writes float32 partial states for the combine kernel
    bool mask;   // the unit defines one; key tiles come from lists
    bool paged;    // keys and values lie in the blocks that a table names
    bool grouped;  // rows of a tile are the query heads of a group, token after token
    bool even;     // split; blocks take shares of about the same size of all sequences' keys
};

// Rows of a tile that a query has: grouped, one per head of the group.
constexpr bool has_grouped_rows(const ForwardConfig& config) { return config.grouped; }

// The three kernels of the backward pass: prepare, backward, finish.
struct BackwardConfig {
    Element dtype;       // q, k, v, o, their cotangents and gradients
    Element bias_dtype;  // none: no bias
    int head_dim;
    int head_dim_v;
    int block_m;   // queries of a tile
    int block_n;   // keys of a block
    int block_d;   // columns of dq and dk of a block, and
    int block_dv;  // of dv: all of them or a multiple of 64
    int num_warps;
    int key_warps;    // of the warps, side by side along the keys; the others share queries, then columns
    int num_stages;   // 2: the next query tile arrives under the products of this one
    int load_bytes;   // widest access that every row of q, k, v, o and do is aligned to
    int store_bytes;  // the same for dq, dk and dv
    bool windowed;
    bool softcapped;
    bool varlen;
    bool deterministic;  // key tiles add to dq in their order
    bool mask;           // the unit defines one; query tiles come from lists
};

constexpr bool has_grouped_rows(const BackwardConfig&) { return false; }

struct BiasGradientConfig {
    Element dtype;       // q, k, v, do
    Element bias_dtype;  // and dbias
    int head_dim;
    int head_dim_v;
    int block_m;     // queries, and
    int block_n;     // keys of a tile of scores; where the bias has both axes, a block owns such a tile of it
    int row_block;   // block_m of the backward pass, by which rows lie in its workspaces; a multiple of this one's
    int num_warps;
    int load_bytes;  // widest access that every row of q, k, v and do is aligned to
    bool windowed;
    bool softcapped;
    bool varlen;
    bool mask;  // the unit defines one
};

constexpr bool has_grouped_rows(const BiasGradientConfig&) { return false; }

// Which tiles a mask shows: lists of them by query tile, and from these by key tile.
struct TileListConfig {
    int block_m;  // queries and
    int block_n;  // keys of a tile
    int num_warps;
    bool varlen;
    bool turns;  // of the backward pass: rows of turns in the place of lists
    bool mask;   // the unit defines one
    bool paged;  // as in ForwardConfig
};

struct CombineConfig {
    Element state_dtype;
    Element out_dtype;
    int head_dim_v;
    int load_bytes;  // widest access that every row of the states is aligned to
    int row_warps;   // that share the states of a row: one, or all of the block
    int num_warps;
};
using MergeConfig = CombineConfig;

// Sorting tokens by a key, for sparse attention.
struct SortTokensConfig {
    int key_bytes;
    bool is_signed;
    bool keep;  // keys are truths: kept tokens first, then dropped ones, which the order names -1
    int num_warps;
};

struct VisibleRangesConfig {
    int key_bytes;
    int num_warps;
};

// Moving rows: into an order, and into, within and out of the blocks of a cache.
struct MoveRowsConfig {
    int access_bytes;   // widest access that every row of all arrays is aligned to
    int lanes;          // threads that share a row
    int rows;           // of a thread
    int num_warps;
    int index_bytes;    // of an entry of the lists
    int block_size;     // rows of a block
    bool whole_blocks;  // lists name blocks, not rows
};

}  // namespace cuflash
