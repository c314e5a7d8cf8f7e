// Attention of one new token a sequence over its ring of keys and values in the block pool.
//
// The ring holds exactly the positions that the token sees, in any order, so nothing is masked. Keys are split over
// blocks of threads (Flash-Decoding, Dao et al. 2023) and the query heads of a group go together, so that a key is
// read once for all of them. A split is always 128 slots: a row's result depends on nothing but the row.

#include "cache.cuh"

constexpr u32 SPLIT_SLOTS = 128;
// Query heads of the group that are computed at a time.
constexpr u32 GROUP_HEADS = 4;
constexpr u32 WIDEST_HEAD = 256;

// Slots that `token` sees: all that are filled.
__device__ __forceinline__ u32 slots_seen(const u32* positions, const u32* capacities, u32 token, u32 sequence) {
    return min(positions[token] + 1, capacities[sequence]);
}

// Rows of 128 or 256 bytes come to shared memory all at once, by copies that do not wait; others are read in place.
// Chunk c (of 16 bytes) of row r lies at c ^ (r % 8), so that threads that each read a row find it in different banks.
template <typename T, bool STAGED> struct SlotRows {
    const T* values;
    u32 head_dim;

    __device__ __forceinline__ const T* at(u32 row, u32 column) const {
        const u32 chunk = column / WIDEST<T>;
        return values + row * head_dim + (STAGED ? (chunk ^ (row % 8)) * WIDEST<T> + column % WIDEST<T> : column);
    }

    // The same rows in shared memory, where `to` is, as soon as they have arrived; beyond `rows` they are zero.
    __device__ __forceinline__ SlotRows<T, true> stage(T* to, u32 rows) const {
        const u32 row_chunks = head_dim / WIDEST<T>;
        for (u32 item = threadIdx.x; item < SPLIT_SLOTS * row_chunks; item += blockDim.x) {
            const u32 row = item / row_chunks, chunk = item % row_chunks;
            const bool valid = row < rows;
            copy_async(to + row * head_dim + (chunk ^ (row % 8)) * WIDEST<T>,
                       values + (valid ? row : 0) * head_dim + chunk * WIDEST<T>, valid);
        }
        commit_copies();
        return {to, head_dim};
    }
};

// The scores of one slot against 4 query heads `[D, 4]`, unscaled.
template <u32 LEN, typename T, bool STAGED>
__device__ __forceinline__ void slot_scores(SlotRows<T, STAGED> keys, u32 slot, const float* queries,
                                            float (&scores)[GROUP_HEADS]) {
    for (u32 column = 0; column < keys.head_dim; column += LEN) {
        const Vector<T, LEN> key = load<LEN>(keys.at(slot, column));
#pragma unroll
        for (u32 i = 0; i < LEN; i++) {
            const float value = to_float(key.values[i]);
            const Floats<GROUP_HEADS> query(queries + (column + i) * GROUP_HEADS);
#pragma unroll
            for (u32 h = 0; h < GROUP_HEADS; h++) {
                scores[h] += query.values[h] * value;
            }
        }
    }
}

// One split of one row's slots, and where its results go.
struct Split {
    // Slots of this split that are filled.
    u32 rows;
    // Entry, head and split, in the order of `partial`'s dimensions, of the key head's first query head.
    u64 out;
    // From a head to the next in `partial`, in splits.
    u32 head_stride;
};

// Shared memory of a block.
struct Scratch {
    // `[D, 4]`
    float* queries;
    // `[slots, 4]`
    float* weights;
    // `[4, parts, D]`
    float* column_sums;
    // `[4, warps]`
    float* warp_parts;
};

// Weighted sums of the split's values for all heads of its group, 4 at a time.
template <typename T, bool STAGED>
__device__ __forceinline__ void attend_split(const T* query, SlotRows<T, STAGED> keys, SlotRows<T, STAGED> values, Split split,
                                             u32 group, float to_log2, Scratch scratch, float* partial,
                                             float* partial_stats) {
    const auto [queries, weights, column_sums, warp_parts] = scratch;
    const u32 dim = keys.head_dim, thread = threadIdx.x;
    for (u32 first = 0; first < group; first += GROUP_HEADS) {
        const u32 group_heads = min(GROUP_HEADS, group - first);
        for (u32 i = thread; i < GROUP_HEADS * dim; i += blockDim.x) {
            const u32 h = i / dim, column = i % dim;
            queries[column * GROUP_HEADS + h] = h < group_heads ? to_float(query[first * dim + i]) : 0.0f;
        }
        wait_for_copies<1>();
        __syncthreads();

        // A thread a slot.
        float scores[GROUP_HEADS] = {}, largest[GROUP_HEADS];
        if (thread < split.rows) {
            if (STAGED || in_vectors(keys.values, dim)) {
                slot_scores<WIDEST<T>>(keys, thread, queries, scores);
            } else {
                slot_scores<1>(keys, thread, queries, scores);
            }
        }
#pragma unroll
        for (u32 h = 0; h < GROUP_HEADS; h++) {
            scores[h] = thread < split.rows ? scores[h] * to_log2 : -INFINITY;
            largest[h] = warp_max(scores[h]);
            if (thread % WARP == 0) {
                warp_parts[h * 4 + thread / WARP] = largest[h];
            }
        }
        __syncthreads();
        Vector<float, GROUP_HEADS> own_weights;
#pragma unroll
        for (u32 h = 0; h < GROUP_HEADS; h++) {
            const Floats<4> parts(warp_parts + h * 4);
            largest[h] = fmaxf(fmaxf(parts.values[0], parts.values[1]), fmaxf(parts.values[2], parts.values[3]));
            own_weights.values[h] = exp2f(scores[h] - largest[h]);
        }
        store<GROUP_HEADS>(weights + thread * GROUP_HEADS, own_weights);
        wait_for_copies<0>();
        __syncthreads();
#pragma unroll
        for (u32 h = 0; h < GROUP_HEADS; h++) {
            const float sum = warp_sum(own_weights.values[h]);
            if (thread % WARP == 0) {
                warp_parts[h * 4 + thread / WARP] = sum;
            }
        }

        // A thread two columns of every `parts`-th slot, then the parts together.
        const u32 pairs = dim / 2, parts = SPLIT_SLOTS / pairs, own_column = thread % pairs * 2, own_part = thread / pairs;
        if (own_part < parts) {
            float sums[GROUP_HEADS][2] = {};
            for (u32 row = own_part; row < split.rows; row += parts) {
                const Vector<T, 2> pair = load<2>(values.at(row, own_column));
                const float low = to_float(pair.values[0]), high = to_float(pair.values[1]);
                const Floats<GROUP_HEADS> weight(weights + row * GROUP_HEADS);
#pragma unroll
                for (u32 h = 0; h < GROUP_HEADS; h++) {
                    sums[h][0] += weight.values[h] * low;
                    sums[h][1] += weight.values[h] * high;
                }
            }
#pragma unroll
            for (u32 h = 0; h < GROUP_HEADS; h++) {
                column_sums[(h * parts + own_part) * dim + own_column] = sums[h][0];
                column_sums[(h * parts + own_part) * dim + own_column + 1] = sums[h][1];
            }
        }
        __syncthreads();
        const u64 out = split.out + u64(first) * split.head_stride;
        for (u32 i = thread; i < group_heads * dim; i += blockDim.x) {
            const u32 h = i / dim, column = i % dim;
            float sum = 0.0f;
            for (u32 part = 0; part < parts; part++) {
                sum += column_sums[(h * parts + part) * dim + column];
            }
            partial[(out + u64(h) * split.head_stride) * dim + column] = sum;
        }
#pragma unroll
        for (u32 h = 0; h < GROUP_HEADS; h++) {
            if (thread == h && h < group_heads) {
                const Floats<4> sums(warp_parts + h * 4);
                float* stats = partial_stats + (out + u64(h) * split.head_stride) * 2;
                stats[0] = largest[h];
                stats[1] = (sums.values[0] + sums.values[1]) + (sums.values[2] + sums.values[3]);
            }
        }
        __syncthreads();
    }
}

// Grid (1 to splits, K, M), 128 threads, and 256·D·sizeof(T) bytes of dynamic shared memory where D·sizeof(T) is 128 or 256.
// Writes weighted sums of values relative to the split's largest score to `partial [M, H, splits, D]`, that score (in
// units of log₂) and the sum of weights to `partial_stats [M, H, splits, 2]`; nothing for splits beyond the row's slots.
// A block takes every gridDim.x-th split: which block does what changes no result, and a captured step that has to
// allow for long rows costs short ones no idle blocks.
template <typename T>
__device__ void decode_attention(const T* qkv, const T* key_cache, const T* value_cache, float* partial,
                                 float* partial_stats, const u32* tokens, const u32* positions,
                                 const u32* token_sequences, const u32* block_tables, const u32* capacities,
                                 u32 max_blocks, u32 num_splits, Heads heads, float scale) {
    DYNAMIC_SHARED(shared);
    SHARED_ARRAY(float, queries, GROUP_HEADS * WIDEST_HEAD);
    SHARED_ARRAY(float, weights, GROUP_HEADS * SPLIT_SLOTS);
    SHARED_ARRAY(float, column_sums, GROUP_HEADS * 2 * SPLIT_SLOTS);
    SHARED_ARRAY(float, warp_parts, GROUP_HEADS * 4);
    const Scratch scratch{queries, weights, column_sums, warp_parts};
    const u32 kv_head = blockIdx.y, entry = blockIdx.z;
    const u32 token = tokens[entry], sequence = token_sequences[token];
    const u32 count = slots_seen(positions, capacities, token, sequence);
    const u32 dim = heads.head_dim, group = heads.group_size(), first_head = kv_head * group;
    const T* query = qkv + u64(token) * heads.qkv_width() + first_head * dim;
    const u32* blocks = block_tables + u64(sequence) * max_blocks;
    const u32 row_bytes = dim * sizeof(T);
    for (u32 index = blockIdx.x; index * SPLIT_SLOTS < count; index += gridDim.x) {
        const u32 first_slot = index * SPLIT_SLOTS;
        const Split split{min(SPLIT_SLOTS, count - first_slot),
                          (u64(entry) * heads.num_heads + first_head) * num_splits + index, num_splits};
        const auto slot = cache_slot(key_cache, value_cache, blocks, first_slot, heads);
        const SlotRows<T, false> keys{slot.keys + u64(kv_head) * slot.head_stride, dim};
        const SlotRows<T, false> values{slot.values + u64(kv_head) * slot.head_stride, dim};
        if (row_bytes == 128 || row_bytes == 256) {
            T* staged = reinterpret_cast<T*>(shared);
            const auto staged_keys = keys.stage(staged, split.rows);
            const auto staged_values = values.stage(staged + SPLIT_SLOTS * dim, split.rows);
            attend_split(query, staged_keys, staged_values, split, group, scale * LOG2_E, scratch, partial, partial_stats);
        } else {
            attend_split(query, keys, values, split, group, scale * LOG2_E, scratch, partial, partial_stats);
        }
    }
}

// Joins the splits of `decode_attention`, in their order, to row `tokens[m]` of `context [N, H·D]`; a row without slots is
// zero. Grid (H, M), 128 threads.
template <typename T>
__device__ void decode_combine(const float* partial, const float* partial_stats, T* context, const u32* tokens,
                               const u32* positions, const u32* token_sequences, const u32* capacities, u32 num_splits,
                               u32 head_dim) {
    const u32 head = blockIdx.x, num_heads = gridDim.x, entry = blockIdx.y;
    const u32 token = tokens[entry];
    const u32 count = slots_seen(positions, capacities, token, token_sequences[token]);
    const u32 splits = (count + SPLIT_SLOTS - 1) / SPLIT_SLOTS;
    const u64 first = (u64(entry) * num_heads + head) * num_splits;
    float largest = -INFINITY;
    for (u32 split = 0; split < splits; split++) {
        largest = fmaxf(largest, partial_stats[(first + split) * 2]);
    }
    float total = 0.0f;
    for (u32 split = 0; split < splits; split++) {
        total += exp2f(partial_stats[(first + split) * 2] - largest) * partial_stats[(first + split) * 2 + 1];
    }
    for (u32 column = threadIdx.x; column < head_dim; column += blockDim.x) {
        float sum = 0.0f;
        for (u32 split = 0; split < splits; split++) {
            sum += exp2f(partial_stats[(first + split) * 2] - largest) * partial[(first + split) * head_dim + column];
        }
        context[(u64(token) * num_heads + head) * head_dim + column] = from_float<T>(splits == 0 ? 0.0f : sum / total);
    }
}

#define ENTRY(T, suffix)                                                                                              \
    extern "C" __global__ void __launch_bounds__(128)                                                                 \
        decode_attention_##suffix(const T* qkv, const T* key_cache, const T* value_cache, float* partial,             \
                                  float* partial_stats, const u32* tokens, const u32* positions,                      \
                                  const u32* token_sequences, const u32* block_tables, const u32* capacities,         \
                                  u32 max_blocks, u32 num_splits, u32 num_heads, u32 num_kv_heads, u32 head_dim,      \
                                  float scale) {                                                                      \
        decode_attention(qkv, key_cache, value_cache, partial, partial_stats, tokens, positions, token_sequences,     \
                         block_tables, capacities, max_blocks, num_splits, Heads{num_heads, num_kv_heads, head_dim},  \
                         scale);                                                                                      \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(128)                                                                 \
        decode_combine_##suffix(const float* partial, const float* partial_stats, T* context, const u32* tokens,      \
                                const u32* positions, const u32* token_sequences, const u32* capacities,              \
                                u32 num_splits, u32 head_dim) {                                                       \
        decode_combine(partial, partial_stats, context, tokens, positions, token_sequences, capacities, num_splits,   \
                       head_dim);                                                                                     \
    }
EVERY_DTYPE(ENTRY)
#undef ENTRY
