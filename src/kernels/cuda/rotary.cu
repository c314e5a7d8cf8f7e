// Rotary position embedding on the fused query, key and value buffer, alone and with the write to the cache.

#include "cache.cuh"

// Rotates `LEN` pairs of one head: `x1[i]` and `x2[i]`, half a head apart, become x1·cos − x2·sin and x2·cos + x1·sin.
template <typename T, u32 LEN>
__device__ __forceinline__ void rotate(Vector<T, LEN>& first, Vector<T, LEN>& second, Floats<LEN> cos, Floats<LEN> sin) {
#pragma unroll
    for (u32 i = 0; i < LEN; i++) {
        const float x1 = to_float(first.values[i]), x2 = to_float(second.values[i]);
        first.values[i] = from_float<T>(x1 * cos.values[i] - x2 * sin.values[i]);
        second.values[i] = from_float<T>(x2 * cos.values[i] + x1 * sin.values[i]);
    }
}

// One token: `qkv [(H + 2K)·D]` in place; the rotated keys and the values also to `slot`, unless it is none.
template <typename T, u32 LEN>
__device__ void rotate_token(T* qkv, const float* cos, const float* sin, Heads heads, CacheSlot<T> slot) {
    const u32 half = heads.head_dim / 2, pieces = half / LEN;
    const u32 rotated = heads.num_heads + heads.num_kv_heads;
    for (u32 item = threadIdx.x; item < rotated * pieces; item += blockDim.x) {
        const u32 head = item / pieces, i = item % pieces * LEN;
        T* x = qkv + head * heads.head_dim + i;
        Vector<T, LEN> first = load<LEN>(x), second = load<LEN>(x + half);
        rotate(first, second, Floats<LEN>(cos + i), Floats<LEN>(sin + i));
        store<LEN>(x, first);
        store<LEN>(x + half, second);
        if (slot.keys != nullptr && head >= heads.num_heads) {
            T* key = slot.keys + u64(head - heads.num_heads) * slot.head_stride + i;
            store<LEN>(key, first);
            store<LEN>(key + half, second);
        }
    }
    if (slot.keys == nullptr) {
        return;
    }
    const u32 per_head = heads.head_dim / LEN;
    for (u32 item = threadIdx.x; item < heads.num_kv_heads * per_head; item += blockDim.x) {
        const u32 head = item / per_head, i = item % per_head * LEN;
        const T* value = qkv + (rotated + head) * heads.head_dim + i;
        store<LEN>(slot.values + u64(head) * slot.head_stride + i, load<LEN>(value));
    }
}

// Grid (N), 128 threads. `cos` and `sin [positions, D/2]` are tables.
template <typename T>
__device__ void rotary(T* qkv, const u32* positions, const float* cos, const float* sin, Heads heads, CacheSlot<T> slot) {
    const u32 half = heads.head_dim / 2;
    qkv += u64(blockIdx.x) * heads.qkv_width();
    cos += u64(positions[blockIdx.x]) * half;
    sin += u64(positions[blockIdx.x]) * half;
    // Pools begin at 16 bytes, so what holds for half a head in qkv holds in the cache.
    if (in_vectors(qkv, half)) {
        rotate_token<T, WIDEST<T>>(qkv, cos, sin, heads, slot);
    } else {
        rotate_token<T, 1>(qkv, cos, sin, heads, slot);
    }
}

// `rotary_cache_write` also writes the token's key and value to slot position mod capacity of its sequence. Of a step
// with more tokens than slots (`sequence_ends`: tokens of each sequence after the step) only the last are written, so
// no slot is written twice. A sequence of capacity 0 is a place in a captured step that nobody has: its tokens are left as
// they are, and their positions may be beyond the tables.
#define ENTRY(T, suffix)                                                                                              \
    extern "C" __global__ void __launch_bounds__(128)                                                                 \
        rotary_##suffix(T* qkv, const u32* positions, const float* cos, const float* sin, u32 num_heads,              \
                        u32 num_kv_heads, u32 head_dim) {                                                             \
        rotary(qkv, positions, cos, sin, Heads{num_heads, num_kv_heads, head_dim}, CacheSlot<T>{});                   \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(128)                                                                 \
        rotary_cache_write_##suffix(T* qkv, const u32* positions, const float* cos, const float* sin, u32 num_heads,  \
                                    u32 num_kv_heads, u32 head_dim, T* key_cache, T* value_cache,                     \
                                    const u32* token_sequences, const u32* block_tables, const u32* capacities,       \
                                    const u32* sequence_ends, u32 max_blocks) {                                       \
        const Heads heads{num_heads, num_kv_heads, head_dim};                                                         \
        const u32 position = positions[blockIdx.x], sequence = token_sequences[blockIdx.x];                           \
        const u32 capacity = capacities[sequence];                                                                    \
        if (capacity == 0) {                                                                                          \
            return;                                                                                                   \
        }                                                                                                             \
        CacheSlot<T> slot{};                                                                                          \
        if (u64(position) + capacity >= sequence_ends[sequence]) {                                    \
            const u32* blocks = block_tables + u64(sequence) * max_blocks;                                            \
            slot = cache_slot(key_cache, value_cache, blocks, position % capacity, heads);                            \
        }                                                                                                             \
        rotary(qkv, positions, cos, sin, heads, slot);                                                                \
    }
EVERY_DTYPE(ENTRY)
#undef ENTRY
