// Causal grouped-query attention over sequences that stand end to end, on tensor cores.
//
// FlashAttention-2 (Dao, arXiv:2307.08691): a block holds 64 queries of one head, 16 a warp, in registers and passes
// over the keys that they see, 64 at a time, with the softmax kept up as it goes. Keys and values of the next 64 are on
// their way to shared memory meanwhile. Tiles outside the window are never read.

#include "varlen.cuh"

constexpr u32 TILE_KEYS = 64;
constexpr u32 FLASH_WARPS = 4;
// Values of a row of a matrix fragment: 16 bytes of halves.
constexpr u32 CHUNK = 8;

// A tile of `[64, D]` halves in shared memory. Chunk c of row r lies at c ^ (r % 8), so that the eight rows that
// ldmatrix reads at a time are in different banks.
template <typename T, u32 D> struct SharedTile {
    T* values;

    __device__ __forceinline__ T* chunk(u32 row, u32 chunk) const {
        return values + row * D + (chunk ^ (row % 8)) * CHUNK;
    }

    // Begins to copy 64 tokens' `D` values from `column` on; rows from `rows` on become zero, as the weights that would
    // multiply them are.
    __device__ __forceinline__ void begin_copy(const T* column, u64 width, u32 rows) const {
        constexpr u32 ROW_CHUNKS = D / CHUNK;
#pragma unroll
        for (u32 i = 0; i < TILE_KEYS * ROW_CHUNKS / (FLASH_WARPS * WARP); i++) {
            const u32 item = threadIdx.x + i * FLASH_WARPS * WARP;
            const u32 row = item / ROW_CHUNKS, column_chunk = item % ROW_CHUNKS;
            const bool valid = row < rows;
            copy_async(chunk(row, column_chunk), column + (valid ? row : 0) * width + column_chunk * CHUNK, valid);
        }
    }
};

// The softmax of a thread's two query rows as far as keys were seen, in powers of two. The scale is above 0.
struct RunningSoftmax {
    float largest[2] = {-INFINITY, -INFINITY};
    // Of the columns that this thread holds; the quad's sum is the row's.
    float total[2] = {0.0f, 0.0f};

    // Turns `scores`, which `to_log2` scales, into weights; gives what the sums so far are to be multiplied by.
    template <u32 COLUMNS>
    __device__ __forceinline__ void update(float (&scores)[COLUMNS][4], float to_log2, float (&corrections)[2]) {
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            float larger = largest[half];
#pragma unroll
            for (u32 n = 0; n < COLUMNS; n++) {
                larger = fmaxf(larger, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
            }
            larger = fmaxf(larger, __shfl_xor_sync(ALL_LANES, larger, 1));
            larger = fmaxf(larger, __shfl_xor_sync(ALL_LANES, larger, 2));
            // Until a query has seen a key there is no largest score to subtract.
            const float base = larger == -INFINITY ? 0.0f : larger * to_log2;
            corrections[half] = exp2_fast(largest[half] * to_log2 - base);
            largest[half] = larger;
            float sum = 0.0f;
#pragma unroll
            for (u32 n = 0; n < COLUMNS; n++) {
                sum += scores[n][2 * half] = exp2_fast(scores[n][2 * half] * to_log2 - base);
                sum += scores[n][2 * half + 1] = exp2_fast(scores[n][2 * half + 1] * to_log2 - base);
            }
            total[half] = total[half] * corrections[half] + sum;
        }
    }

    __device__ __forceinline__ float row_total(u32 half) const {
        float sum = total[half];
        sum += __shfl_xor_sync(ALL_LANES, sum, 1);
        sum += __shfl_xor_sync(ALL_LANES, sum, 2);
        return sum;
    }
};

// One tile of 64 queries of one head. Grid (tiles, H), 128 threads, 5 · 64 · D halves of dynamic shared memory:
// queries, and two stages of keys and values. `qkv` begins at 16 bytes, and so does every head in it.
template <typename T, u32 D>
__device__ void flash_attention(const T* qkv, T* context, const u32* tiles, Heads heads, u32 window, float scale) {
    constexpr u32 TILE = TILE_KEYS * D, STEPS = D / 16, KEY_COLUMNS = TILE_KEYS / 8, OUT_COLUMNS = D / 8;
    DYNAMIC_SHARED(shared);
    T* tiles_of_halves = reinterpret_cast<T*>(shared);
    const SharedTile<T, D> queries{tiles_of_halves};
    const auto keys = [&](u32 stage) { return SharedTile<T, D>{tiles_of_halves + (1 + 2 * stage) * TILE}; };
    const auto values = [&](u32 stage) { return SharedTile<T, D>{tiles_of_halves + (2 + 2 * stage) * TILE}; };

    const QueryTile tile = query_tile(tiles, heads);
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const u64 width = heads.qkv_width();
    const T* q_column = qkv + tile.begin * width + tile.head * D;
    const T* k_column = qkv + tile.begin * width + heads.query_width() + tile.head / heads.group_size() * D;
    const T* v_column = k_column + heads.kv_width();
    const u32 end = min(tile.first + TILE_QUERIES, tile.length);
    const u32 begin = first_key(tile.first, window) / TILE_KEYS * TILE_KEYS;

    queries.begin_copy(q_column + tile.first * width, width, tile.length - tile.first);
    keys(0).begin_copy(k_column + begin * width, width, tile.length - begin);
    values(0).begin_copy(v_column + begin * width, width, tile.length - begin);
    commit_copies();

    u32 q[STEPS][4];
    float sums[OUT_COLUMNS][4] = {};
    RunningSoftmax softmax;
    const float to_log2 = scale * LOG2_E;
    // The two rows that this thread holds scores and sums of.
    const u32 first_row = tile.first + warp * 16 + lane / 4;
    u32 stage = 0;
    for (u32 block = begin; block < end; block += TILE_KEYS, stage ^= 1) {
        const u32 next = block + TILE_KEYS;
        if (next < end) {
            keys(stage ^ 1).begin_copy(k_column + next * width, width, tile.length - next);
            values(stage ^ 1).begin_copy(v_column + next * width, width, tile.length - next);
        }
        commit_copies();
        wait_for_copies<1>();
        __syncthreads();
        if (block == begin) {
#pragma unroll
            for (u32 step = 0; step < STEPS; step++) {
                ldmatrix(q[step], queries.chunk(warp * 16 + lane % 16, step * 2 + lane / 16));
            }
        }

        float scores[KEY_COLUMNS][4] = {};
#pragma unroll
        for (u32 step = 0; step < STEPS; step++) {
#pragma unroll
            for (u32 n = 0; n < KEY_COLUMNS; n += 2) {
                u32 k[4];
                ldmatrix(k, keys(stage).chunk(n * 8 + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
                mma(scores[n], q[step], k[0], k[1], T());
                mma(scores[n + 1], q[step], k[2], k[3], T());
            }
        }

        // All 64 queries see all 64 keys of a tile that is neither on the diagonal nor across the window's edge.
        const bool all_seen = block + TILE_KEYS <= tile.first + 1 && first_key(tile.first + TILE_QUERIES - 1, window) <= block;
        if (!all_seen) {
#pragma unroll
            for (u32 n = 0; n < KEY_COLUMNS; n++) {
#pragma unroll
                for (u32 i = 0; i < 4; i++) {
                    const u32 query = first_row + i / 2 * 8, key = block + n * 8 + lane % 4 * 2 + i % 2;
                    scores[n][i] = sees(query, key, window) ? scores[n][i] : -INFINITY;
                }
            }
        }
        float corrections[2];
        softmax.update(scores, to_log2, corrections);
#pragma unroll
        for (u32 n = 0; n < OUT_COLUMNS; n++) {
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                sums[n][i] *= corrections[i / 2];
            }
        }

#pragma unroll
        for (u32 step = 0; step < TILE_KEYS / 16; step++) {
            // Two columns of scores are, in the layout of the sums, what the left operand needs.
            const float(&low)[4] = scores[2 * step];
            const float(&high)[4] = scores[2 * step + 1];
            const u32 weights[4] = {pack(low[0], low[1], T()), pack(low[2], low[3], T()), pack(high[0], high[1], T()),
                                    pack(high[2], high[3], T())};
#pragma unroll
            for (u32 n = 0; n < OUT_COLUMNS; n += 2) {
                u32 v[4];
                ldmatrix_transposed(v, values(stage).chunk(step * 16 + lane % 16, n + lane / 16));
                mma(sums[n], weights, v[0], v[1], T());
                mma(sums[n + 1], weights, v[2], v[3], T());
            }
        }
        // The next round's copies overwrite this stage.
        __syncthreads();
    }

#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        const u32 query = first_row + half * 8;
        const float factor = 1.0f / softmax.row_total(half);
        if (query < tile.length) {
            T* out = context + u64(tile.begin + query) * heads.query_width() + tile.head * D + lane % 4 * 2;
#pragma unroll
            for (u32 n = 0; n < OUT_COLUMNS; n++) {
                *reinterpret_cast<u32*>(out + n * 8) =
                    pack(sums[n][2 * half] * factor, sums[n][2 * half + 1] * factor, T());
            }
        }
    }
}

#define ENTRY(T, suffix)                                                                                              \
    extern "C" __global__ void __launch_bounds__(128)                                                                 \
        flash_attention_d64_##suffix(const T* qkv, T* context, const u32* tiles, u32 num_heads, u32 num_kv_heads,     \
                                     u32 head_dim, u32 window, float scale) {                                         \
        flash_attention<T, 64>(qkv, context, tiles, Heads{num_heads, num_kv_heads, head_dim}, window, scale);         \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(128)                                                                 \
        flash_attention_d128_##suffix(const T* qkv, T* context, const u32* tiles, u32 num_heads, u32 num_kv_heads,    \
                                      u32 head_dim, u32 window, float scale) {                                        \
        flash_attention<T, 128>(qkv, context, tiles, Heads{num_heads, num_kv_heads, head_dim}, window, scale);        \
    }
HALF_DTYPES(ENTRY)
#undef ENTRY
