// How heads lie in the fused projection, and keys and values in the cache.

#pragma once

#include "device.cuh"

// The columns of the fused `[N, (H + 2K)·D]` projection: H query heads, then K key heads, then K value heads.
struct Heads {
    u32 num_heads;
    u32 num_kv_heads;
    u32 head_dim;

    __device__ u32 qkv_width() const { return (num_heads + 2 * num_kv_heads) * head_dim; }
    __device__ u32 query_width() const { return num_heads * head_dim; }
    __device__ u32 kv_width() const { return num_kv_heads * head_dim; }
    __device__ u32 group_size() const { return num_heads / num_kv_heads; }
};

// Slots of one block of the pool.
constexpr u32 BLOCK_SLOTS = 256;

// Where one slot of a sequence's ring is, for its first key head; the next head's is `head_stride` values on.
template <typename T> struct CacheSlot {
    T* keys;
    T* values;
    u32 head_stride;
};

// A layer's pool is `[blocks, K, 256, D]`, for keys and for values; a sequence's slot s is row s mod 256 of block
// `blocks[s / 256]`.
template <typename T>
__device__ __forceinline__ CacheSlot<T> cache_slot(T* keys, T* values, const u32* blocks, u32 slot, Heads heads) {
    const u64 block = u64(blocks[slot / BLOCK_SLOTS]) * heads.num_kv_heads * BLOCK_SLOTS * heads.head_dim;
    const u64 start = block + slot % BLOCK_SLOTS * heads.head_dim;
    return {keys + start, values + start, BLOCK_SLOTS * heads.head_dim};
}
