// Run-time parameters, passed by value. Mirrors cuflash/plan/params.py: the same fields, order and offsets.
// Strides are in elements.
#pragma once

#include "ptx/types.cuh"

namespace cuflash {

constexpr int kMaxSplits = 128;
constexpr int kMaxTables = 8, kMaxWholes = 16, kMaxReals = 8;  // of a mask

struct ForwardParams {
    const void* q;            // (batch, seqlen_q, num_heads, head_dim); packed: (total_q, num_heads, head_dim)
    const void* k;            // (batch, seqlen_k, num_kv_heads, head_dim); packed: (total_k, ...)
    const void* v;            // (batch, seqlen_k, num_kv_heads, head_dim_v); packed: (total_k, ...)
    void* o;                  // (batch, seqlen_q, num_heads, head_dim_v); split: sums, one more leading axis
    void* lse;                // (batch, num_heads, seqlen_q), packed: (num_heads, total_q), natural log; may be null
    const void* bias;         // (batch, num_heads, seqlen_q, seqlen_k), natural-log units
    const int* cu_seqlens_q;  // (batch + 1), packed only
    const int* cu_seqlens_k;
    const void* mask_tables[kMaxTables];  // arrays that the mask looks up
    const int* block_tables;  // (batch, table_pitch): of each sequence the blocks of the cache that hold its keys; paged only
    const int* seq_lens;      // (batch): its keys; paged only
    const int* tile_lists;   // of each query tile its key tiles: (batch or 1, num_heads or 1, q_tiles, list_pitch)
    const int* tile_counts;  // how many: (batch or 1, num_heads or 1, q_tiles, 2), partial and full ones
    int* shares;             // (batch, 2), written: of each sequence its first partial state, and how many; even work only
    i64 q_strides[3];  // batch, token, head
    i64 k_strides[3];
    i64 v_strides[3];
    i64 o_strides[3];
    i64 lse_strides[3];   // batch, head, token
    i64 bias_strides[4];  // batch, head, query, key; 0 where broadcast
    i64 o_split_stride;
    i64 lse_split_stride;
    i64 mask_strides[4 * kMaxTables];  // of each table
    i64 mask_wholes[kMaxWholes];       // its constants
    double mask_reals[kMaxReals];
    double scale64;  // for float64, which float32 would round
    double softcap64;
    float scale;
    float softcap;
    int batch;
    int num_heads;
    int group;     // query heads per key/value head
    int seqlen_q;  // packed: upper bound of a sequence's length
    int seqlen_k;
    int total_q;  // packed: number of tokens
    int total_k;
    int left;  // window; 2^31 - 1 where unbounded
    int right;
    int num_splits;   // partial states of a query; even work: of all sequences in all, at most
    int most_shares;  // even work: that are wanted
    int least_tiles;  // even work: key tiles of a share, if its sequence has as many
    int q_tiles;  // query tiles of one head of one batch entry; packed: of one head in all
    int list_pitch;  // key tiles that a list has room for
    int block_size;  // tokens of a block of the cache; paged, k_strides and v_strides are of block, token, head
    int table_pitch;
};

// Of the backward pass; R = q_tiles * block_m rows per head, in which each sequence begins a tile of its own. Workspaces
// are of the type of sums.
struct BackwardParams {
    const void* q;            // as in ForwardParams
    const void* k;
    const void* v;
    const void* o;            // what the forward pass gave
    const void* d_o;          // its cotangent, laid out by its own strides
    const void* lse;          // what the forward pass gave, natural log
    const void* d_lse;        // its cotangent; may be null
    const void* bias;         // (batch, num_heads, seqlen_q, seqlen_k), natural-log units
    void* dq;
    void* dk;
    void* dv;
    void* dbias;              // (batch, num_heads, seqlen_q, seqlen_k), each axis of that length or 1: see dbias_shape
    void* row_lse;            // workspace (batch, num_heads, R): lse in base 2; +inf for rows that see nothing
    void* row_delta;          // workspace (batch, num_heads, R): rowsum(do o) - d_lse
    void* dq_sum;             // workspace (batch, num_heads, q_tiles, chunks, block_m * block_d): dq / scale
    u32* turns;               // workspace (batch, num_heads, q_tiles, chunks): key tiles that have added to dq_sum; of the
                              // tiles that share a turn, that of the first
    const int* cu_seqlens_q;  // (batch + 1), packed only
    const int* cu_seqlens_k;
    const void* mask_tables[kMaxTables];  // arrays that the mask looks up
    const int* tile_lists;   // of each key tile its query tiles: (batch or 1, num_kv_heads or 1, k_tiles, list_pitch, 2)
    const int* tile_counts;  // how many: (batch or 1, num_kv_heads or 1, k_tiles)
    i64 q_strides[3];  // batch, token, head
    i64 k_strides[3];
    i64 v_strides[3];
    i64 o_strides[3];
    i64 d_o_strides[3];
    i64 dq_strides[3];
    i64 dk_strides[3];
    i64 dv_strides[3];
    i64 lse_strides[3];    // batch, head, token
    i64 d_lse_strides[3];
    i64 bias_strides[4];   // batch, head, query, key; 0 where broadcast
    i64 dbias_strides[4];
    i64 mask_strides[4 * kMaxTables];  // of each table
    i64 mask_lengths[4 * kMaxTables];  // of the axes of each table
    i64 mask_wholes[kMaxWholes];       // its constants
    double mask_reals[kMaxReals];
    int dbias_shape[4];    // packed: its last two axes may be longer than any sequence
    double scale64;        // for float64, which float32 would round
    double softcap64;
    float scale;
    float softcap;
    int batch;
    int num_heads;
    int group;     // query heads per key/value head
    int seqlen_q;  // packed: upper bound of a sequence's length
    int seqlen_k;
    int total_q;  // packed: number of tokens
    int total_k;
    int left;  // window; 2^31 - 1 where unbounded
    int right;
    int q_tiles;  // query tiles of one head of one batch entry; packed: of one head in all
    int k_tiles;  // the same of keys
    int list_pitch;  // query tiles that a list has room for
    int turn_tiles;  // query tiles that share a turn, a power of two
};

// Of the kernels that list the tiles which a mask shows.
struct TileListParams {
    const void* mask_tables[kMaxTables];
    int* lists;   // as tile_lists of ForwardParams; of the backward pass as those of BackwardParams
    int* counts;
    int* turns;   // of the backward pass: (batch or 1, num_heads or 1, q_tiles, turn_pitch), 0 where a tile is empty, else
                  // its turn times 4, plus 2 if it is partial, plus 1
    const int* cu_seqlens_q;  // (batch + 1), packed only
    const int* cu_seqlens_k;
    const int* seq_lens;  // (batch), paged only
    i64 mask_strides[4 * kMaxTables];
    i64 mask_lengths[4 * kMaxTables];  // of the axes of each table
    i64 mask_wholes[kMaxWholes];
    double mask_reals[kMaxReals];
    int batch;
    int num_heads;
    int group;
    int seqlen_q;
    int seqlen_k;
    int total_q;
    int total_k;
    int q_tiles;
    int k_tiles;
    int list_pitch;
    int turn_pitch;  // key tiles of a sequence at most
};

// Of the kernel that merges the partial states of splits, which lie in one workspace.
struct CombineParams {
    const void* states;  // partial outputs
    const void* lses;    // natural log
    const int* shares;   // (batch, 2): of each sequence its first state, and how many; null: num_states of each row
    void* o;
    void* lse;  // may be null
    i64 state_stride;          // from one state to the next
    i64 state_lse_stride;
    i64 state_strides[3];      // batch, token, head
    i64 state_lse_strides[3];  // batch, head, token
    i64 o_strides[3];
    i64 lse_strides[3];
    int num_states;
    int num_heads;
    int seqlen_q;
    i64 rows;  // batch * num_heads * seqlen_q
};

// Of the kernel that merges states which lie anywhere.
struct MergeParams {
    CombineParams rows;              // all but where states lie
    const void* states[kMaxSplits];  // each laid out by rows.state_strides
    const void* lses[kMaxSplits];    // each laid out by rows.state_lse_strides
};

struct SortTokensParams {
    const void* source;     // keys (batch, tokens, heads)
    void* keys;             // (batch, heads, tokens), sorted, in the order of unsigned numbers
    int* order;             // (batch, heads, tokens): of each position its token; -1 for dropped ones
    int* inverse;           // (batch, heads, tokens): of each token its position
    void* spare_keys;       // workspaces of the same shapes; null where one pass suffices
    int* spare_order;
    i64 source_strides[3];  // batch, token, head
    int num_heads;
    int tokens;
};

struct VisibleRangesParams {
    const void* q_keys;  // (batch, num_heads, len_q), sorted
    const int* q_order;
    const void* k_keys;  // (batch, num_kv_heads, len_k), sorted
    const int* k_order;
    int* begin;  // (batch, num_heads, len_q): sorted keys that the sorted query sees
    int* end;
    i64 shift;   // query token i sees key tokens before i + shift
    int group;   // query heads per key/value head
    int len_q;
    int len_k;
};

constexpr int kMovedArrays = 2;

struct MoveRowsParams {
    const void* source[kMovedArrays];  // each (batch, blocks, rows of a block, num_heads, columns)
    void* target[kMovedArrays];
    const void* sources;  // which rows or blocks of the source; negative: zeros; null: the first ones
    const void* targets;  // which rows or blocks of the target; negative: none; null: the first ones
    i64 source_strides[4 * kMovedArrays];  // of each: batch, block, row, head, in accesses
    i64 target_strides[4 * kMovedArrays];
    i64 list_pitch;  // from the list of a (batch, head) to the next one's; 0: one for all
    int columns[kMovedArrays];  // accesses of a row
    int batch;
    int num_heads;
    int num_rows;  // moved of each (batch, head)
};

}  // namespace cuflash
