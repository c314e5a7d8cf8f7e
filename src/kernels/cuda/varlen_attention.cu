// Causal grouped-query attention over sequences that stand end to end: the plain kernel, for any dtype and head.
//
// flash_attention.cu does the same on tensor cores where their shapes fit.

#include "varlen.cuh"

// Keys that are in shared memory at a time: one a lane.
constexpr u32 PLAIN_KEYS = WARP;
// Queries that a warp takes at a time.
constexpr u32 WARP_QUERIES = 4;
constexpr u32 PLAIN_WARPS = 4;
constexpr u32 PASS_QUERIES = WARP_QUERIES * PLAIN_WARPS;
// The widest head, in values a lane.
constexpr u32 LANE_VALUES = 8;

// One tile of 64 queries of one head, 16 at a time. A lane scores one key for its warp's queries, then sums the values
// of every 32nd column over all keys. Everything is in f32. Grid (tiles, H), 128 threads,
// 4·(80·D + 32) bytes of dynamic shared memory; D ≤ 256.
template <typename T>
__device__ void varlen_attention(const T* qkv, T* context, const u32* tiles, Heads heads, u32 window, float scale) {
    DYNAMIC_SHARED(shared);
    const u32 dim = heads.head_dim, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    float* queries = reinterpret_cast<float*>(shared);    // [16, D]
    float* keys = queries + PASS_QUERIES * dim;           // [32, D + 1]: lanes read a column from different banks
    float* values = keys + PLAIN_KEYS * (dim + 1);        // [32, D]
    const QueryTile tile = query_tile(tiles, heads);
    const u32 q_column = tile.head * dim;
    const u32 k_column = heads.query_width() + tile.head / heads.group_size() * dim;
    const u32 v_column = k_column + heads.kv_width();
    const u64 width = heads.qkv_width();
    const float to_log2 = scale * LOG2_E;

    for (u32 first = tile.first; first < min(tile.first + TILE_QUERIES, tile.length); first += PASS_QUERIES) {
        __syncthreads();
        for (u32 i = threadIdx.x; i < PASS_QUERIES * dim; i += blockDim.x) {
            const u32 query = first + i / dim;
            queries[i] = query < tile.length ? to_float(qkv[(tile.begin + query) * width + q_column + i % dim]) : 0.0f;
        }
        float largest[WARP_QUERIES], total[WARP_QUERIES], sums[WARP_QUERIES][LANE_VALUES];
#pragma unroll
        for (u32 r = 0; r < WARP_QUERIES; r++) {
            largest[r] = -INFINITY;
            total[r] = 0.0f;
#pragma unroll
            for (u32 i = 0; i < LANE_VALUES; i++) {
                sums[r][i] = 0.0f;
            }
        }
        const u32 end = min(first + PASS_QUERIES, tile.length);
        for (u32 block = first_key(first, window) / PLAIN_KEYS * PLAIN_KEYS; block < end; block += PLAIN_KEYS) {
            __syncthreads();
            for (u32 i = threadIdx.x; i < PLAIN_KEYS * dim; i += blockDim.x) {
                const u32 row = i / dim, column = i % dim;
                // What a masked score would multiply has to be a number too.
                const bool valid = block + row < tile.length;
                const T* token = qkv + (tile.begin + block + row) * width + column;
                keys[row * (dim + 1) + column] = valid ? to_float(token[k_column]) : 0.0f;
                values[i] = valid ? to_float(token[v_column]) : 0.0f;
            }
            __syncthreads();

            const float* own_queries = queries + warp * WARP_QUERIES * dim;
            float scores[WARP_QUERIES] = {};
            for (u32 column = 0; column < dim; column++) {
                const float key = keys[lane * (dim + 1) + column];
#pragma unroll
                for (u32 r = 0; r < WARP_QUERIES; r++) {
                    scores[r] += own_queries[r * dim + column] * key;
                }
            }
#pragma unroll
            for (u32 r = 0; r < WARP_QUERIES; r++) {
                const u32 query = first + warp * WARP_QUERIES + r;
                const float score = sees(query, block + lane, window) ? scores[r] * to_log2 : -INFINITY;
                const float larger = fmaxf(largest[r], warp_max(score));
                // Until a query has seen a key there is no largest score to subtract.
                const float base = larger == -INFINITY ? 0.0f : larger;
                const float correction = exp2f(largest[r] - base);
                scores[r] = exp2f(score - base);
                total[r] = total[r] * correction + warp_sum(scores[r]);
                largest[r] = larger;
#pragma unroll
                for (u32 i = 0; i < LANE_VALUES; i++) {
                    sums[r][i] *= correction;
                }
            }
            for (u32 key = 0; key < PLAIN_KEYS; key++) {
                float weights[WARP_QUERIES];
#pragma unroll
                for (u32 r = 0; r < WARP_QUERIES; r++) {
                    weights[r] = __shfl_sync(ALL_LANES, scores[r], key);
                }
#pragma unroll
                for (u32 i = 0; i < LANE_VALUES; i++) {
                    const u32 column = lane + i * WARP;
                    if (column < dim) {
                        const float value = values[key * dim + column];
#pragma unroll
                        for (u32 r = 0; r < WARP_QUERIES; r++) {
                            sums[r][i] += weights[r] * value;
                        }
                    }
                }
            }
        }
#pragma unroll
        for (u32 r = 0; r < WARP_QUERIES; r++) {
            const u32 query = first + warp * WARP_QUERIES + r;
            T* out = context + u64(tile.begin + query) * heads.query_width() + q_column;
#pragma unroll
            for (u32 i = 0; i < LANE_VALUES; i++) {
                const u32 column = lane + i * WARP;
                if (query < tile.length && column < dim) {
                    out[column] = from_float<T>(sums[r][i] / total[r]);
                }
            }
        }
    }
}

#define ENTRY(T, suffix)                                                                                              \
    extern "C" __global__ void __launch_bounds__(128)                                                                 \
        varlen_attention_##suffix(const T* qkv, T* context, const u32* tiles, u32 num_heads, u32 num_kv_heads,        \
                                  u32 head_dim, u32 window, float scale) {                                            \
        varlen_attention(qkv, context, tiles, Heads{num_heads, num_kv_heads, head_dim}, window, scale);               \
    }
EVERY_DTYPE(ENTRY)
#undef ENTRY
