// What the attention kernels over fresh sequences share: their work list and the window.

#pragma once

#include "cache.cuh"

constexpr u32 TILE_QUERIES = 64;

// Up to 64 queries of one sequence and one head.
struct QueryTile {
    // First token of the sequence in qkv.
    u32 begin;
    // Tokens of the sequence.
    u32 length;
    // First query, counted from the sequence's first token.
    u32 first;
    u32 head;
};

// The block's entry of the work list `tiles [gridDim.x, 4]`: a sequence's first token, one past its last, the tile's
// first, nothing. Blocks that run together take the heads of one tile, which share keys.
__device__ __forceinline__ QueryTile query_tile(const u32* tiles, Heads heads) {
    const u64 block = u64(blockIdx.y) * gridDim.x + blockIdx.x;
    const u32* tile = tiles + block / heads.num_heads * 4;
    return {tile[0], tile[1] - tile[0], tile[2] - tile[0], u32(block % heads.num_heads)};
}

// The first key that `query` sees.
__device__ __forceinline__ u32 first_key(u32 query, u32 window) { return query >= window ? query - window + 1 : 0; }

// Whether `query` sees `key`: 0 ≤ query − key < window.
__device__ __forceinline__ bool sees(u32 query, u32 key, u32 window) { return key <= query && query - key < window; }
