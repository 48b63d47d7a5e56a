// Tiles that a mask shows, taken from lists (kernels/tile_rows.cu, kernels/tile_columns.cu). They stand in the place of
// KeyTiles and QueryTiles in shared memory: entries of the list come by asynchronous copies, some visits ahead.
#pragma once

#include "attention/mask.cuh"
#include "attention/query_tiles.cuh"
#include "ptx/copy.cuh"

namespace cuflash {

// Index of a list: of the batch entry and head, as far as the mask depends on them, and the tile's slot. Slots of a packed
// problem say which sequence it is; over a paged cache all sequences have lengths of their own.
template <class Mask, bool kPaged = false>
__device__ __forceinline__ i64 list_index(int batch_entry, int head, int heads, int slot, int slots) {
    i64 index = Mask::kByBatch || kPaged ? batch_entry : 0;
    if constexpr (Mask::kByHead) index = index * heads + head;
    return index * slots + slot;
}

// Forward pass: the key tiles of a query tile. Positions as in KeyTiles: the partial tiles, from the front of the list,
// then the full ones, from its back.
struct ListedKeyTiles {
    Span keys;  // that exist
    int partial;
    int begin, end;  // positions [begin, end) are this block's
    int last;        // index of the list's last place
    const int* list;
    int ring[4];  // entries of positions p to p + 2 while p is visited

    template <ForwardConfig C, class Mask>
    static __device__ __forceinline__ ListedKeyTiles of(const ForwardParams& params, const Work& work,
                                                       const Share& share) {
        static_assert(!C.grouped);  // lists are of tiles of queries
        const i64 index = list_index<Mask, C.paged>(work.batch_entry, work.head, params.num_heads, work.slot, params.q_tiles);
        ListedKeyTiles tiles;
        tiles.keys = {0, work.len_k};
        tiles.partial = 0;
        int count = 0;
        if (work.row_begin < work.len_q) {
            tiles.partial = params.tile_counts[2 * index];
            count = tiles.partial + params.tile_counts[2 * index + 1];
        }
        tiles.begin = share.begin(count);
        tiles.end = share.end(count);
        tiles.list = params.tile_lists + index * params.list_pitch;
        tiles.last = params.list_pitch - 1;
#pragma unroll
        for (int i = 0; i < 3; ++i) {
            const int position = tiles.begin + i;
            if (position < tiles.end) tiles.ring[position % 4] = *tiles.entry(position);
        }
        return tiles;
    }

    __device__ __forceinline__ const int* entry(int position) const {
        return list + (position < partial ? position : last - (position - partial));
    }
    __device__ __forceinline__ int cut_end() const { return min(partial, end); }
    __device__ __forceinline__ int tile(int position) const { return ring[position % 4]; }

    // Start the copy of the entry of a position three visits ahead; one thread does. Its place was read last a visit ago.
    __device__ __forceinline__ void fetch(int position) const {
        if (position < end) ptx::cp_async_narrow<4>(ptx::shared_address(&ring[position % 4]), entry(position), 4);
    }
};

// Backward pass: the query tiles of a key tile. If the mask depends on the head, those of all heads of the group.
struct ListedQueryTiles {
    struct Entry {
        int tile;  // plus, if the mask depends on the head, q_tiles times the head within the group
        int turn;  // times 2, plus 1 if the tile is partial
    };
    Span queries;  // that exist
    Span keys;     // that exist
    int count;
    const Entry* list;
    Entry ring[4];  // entries of visits n - 1 to n + 2 while n is visited

    template <auto C, class Mask>
    static __device__ __forceinline__ ListedQueryTiles of(const BackwardParams& params, const KeyWork& work) {
        const i64 index = list_index<Mask>(work.batch_entry, work.kv_head, params.num_heads / params.group, work.slot,
                                           params.k_tiles);
        ListedQueryTiles tiles;
        tiles.queries = {0, work.len_q};
        tiles.keys = {0, work.len_k};
        tiles.count = work.key_begin < work.len_k && work.len_q > 0 ? params.tile_counts[index] : 0;
        tiles.list = reinterpret_cast<const Entry*>(params.tile_lists) + index * params.list_pitch;
        if (tiles.count > 0) {
            tiles.ring[0] = tiles.list[0];
            tiles.ring[1] = tiles.list[1 % tiles.count];
        }
        return tiles;
    }

    __device__ __forceinline__ const Entry& entry(Visit visit) const {
        return ring[(visit.head * count + visit.position) % 4];
    }
    __device__ __forceinline__ int tile(Visit visit) const { return entry(visit).tile; }
    __device__ __forceinline__ u32 turn(Visit visit) const { return entry(visit).turn / 2; }

    // Whether a mask hides a key of the tile from one of the block_m queries from `begin` on; as QueryTiles::cut.
    template <auto C>
    __device__ __forceinline__ bool cut(Visit visit, int begin, int len_q) const {
        return entry(visit).turn % 2 != 0 || (C.bias_dtype != Element::none && begin + C.block_m > len_q);
    }

    // Start the copy of the entry of the visit after the next; one thread does. Its place was read last a visit ago.
    __device__ __forceinline__ void fetch(Visit visit) const {
        const u32 place = ptx::shared_address(&ring[(visit.head * count + visit.position) % 4]);
        ptx::cp_async_narrow<8>(place, list + visit.position, 8);
    }
};

}  // namespace cuflash
