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
template <typename T> struct SlotRows {
    const T* values;
    u32 head_dim;
    bool staged;

    __device__ __forceinline__ const T* at(u32 row, u32 column) const {
        const u32 chunk = column / WIDEST<T>;
        return values + row * head_dim + (staged ? (chunk ^ (row % 8)) * WIDEST<T> + column % WIDEST<T> : column);
    }

    // Begins to copy `rows` rows from `from` to `to`; the rest become zero.
    __device__ __forceinline__ static void begin_copy(T* to, const T* from, u32 head_dim, u32 rows) {
        const u32 row_chunks = head_dim / WIDEST<T>;
        for (u32 item = threadIdx.x; item < SPLIT_SLOTS * row_chunks; item += blockDim.x) {
            const u32 row = item / row_chunks, chunk = item % row_chunks;
            const bool valid = row < rows;
            copy_async(to + row * head_dim + (chunk ^ (row % 8)) * WIDEST<T>,
                       from + (valid ? row : 0) * head_dim + chunk * WIDEST<T>, valid);
        }
    }
};

// The scores of one slot against up to 4 query heads `[4, D]`, unscaled.
template <typename T, u32 LEN>
__device__ __forceinline__ void slot_scores(SlotRows<T> keys, u32 slot, const float* queries, float (&scores)[GROUP_HEADS]) {
    for (u32 column = 0; column < keys.head_dim; column += LEN) {
        const Vector<T, LEN> key = load<LEN>(keys.at(slot, column));
#pragma unroll
        for (u32 i = 0; i < LEN; i++) {
            const float value = to_float(key.values[i]);
#pragma unroll
            for (u32 h = 0; h < GROUP_HEADS; h++) {
                scores[h] += queries[h * keys.head_dim + column + i] * value;
            }
        }
    }
}

// Grid (splits, K, M), 128 threads, and 256·D·sizeof(T) bytes of dynamic shared memory where D·sizeof(T) is 128 or 256.
// Writes weighted sums of values relative to the split's largest score to `partial [M, H, splits, D]`, that score (in
// units of log₂) and the sum of weights to `partial_stats [M, H, splits, 2]`; nothing for splits beyond the row's slots.
template <typename T>
__device__ void decode_attention(const T* qkv, const T* key_cache, const T* value_cache, float* partial,
                                 float* partial_stats, const u32* tokens, const u32* positions,
                                 const u32* token_sequences, const u32* block_tables, const u32* capacities,
                                 u32 max_blocks, Heads heads, float scale) {
    DYNAMIC_SHARED(shared);
    SHARED_ARRAY(float, queries, GROUP_HEADS * WIDEST_HEAD);
    SHARED_ARRAY(float, weights, GROUP_HEADS * SPLIT_SLOTS);
    SHARED_ARRAY(float, column_sums, GROUP_HEADS * 2 * SPLIT_SLOTS);
    SHARED_ARRAY(float, warp_parts, GROUP_HEADS * 4);
    const u32 split = blockIdx.x, kv_head = blockIdx.y, entry = blockIdx.z, splits = gridDim.x;
    const u32 token = tokens[entry], sequence = token_sequences[token];
    const u32 count = slots_seen(positions, capacities, token, sequence);
    if (split * SPLIT_SLOTS >= count) {
        return;
    }
    const u32 dim = heads.head_dim, group = heads.group_size(), thread = threadIdx.x;
    const u32 rows = min(SPLIT_SLOTS, count - split * SPLIT_SLOTS);
    const u32* blocks = block_tables + u64(sequence) * max_blocks;
    const auto slot = cache_slot(key_cache, value_cache, blocks, split * SPLIT_SLOTS, heads);
    const u32 row_bytes = dim * sizeof(T);
    SlotRows<T> keys{slot.keys + kv_head * slot.head_stride, dim, false};
    SlotRows<T> values{slot.values + kv_head * slot.head_stride, dim, false};
    if (row_bytes == 128 || row_bytes == 256) {
        T* shared_keys = reinterpret_cast<T*>(shared);
        T* shared_values = shared_keys + SPLIT_SLOTS * dim;
        SlotRows<T>::begin_copy(shared_keys, keys.values, dim, rows);
        commit_copies();
        SlotRows<T>::begin_copy(shared_values, values.values, dim, rows);
        commit_copies();
        keys = {shared_keys, dim, true};
        values = {shared_values, dim, true};
    }

    for (u32 first_head = 0; first_head < group; first_head += GROUP_HEADS) {
        const u32 group_heads = min(GROUP_HEADS, group - first_head);
        const u32 head = kv_head * group + first_head;
        const T* query = qkv + u64(token) * heads.qkv_width() + head * dim;
        for (u32 i = thread; i < GROUP_HEADS * dim; i += blockDim.x) {
            queries[i] = i < group_heads * dim ? to_float(query[i]) : 0.0f;
        }
        wait_for_copies<1>();
        __syncthreads();

        // A thread a slot.
        float scores[GROUP_HEADS] = {};
        if (thread < rows) {
            if (in_vectors(keys.values, dim)) {
                slot_scores<T, WIDEST<T>>(keys, thread, queries, scores);
            } else {
                slot_scores<T, 1>(keys, thread, queries, scores);
            }
        }
        float largest[GROUP_HEADS];
#pragma unroll
        for (u32 h = 0; h < GROUP_HEADS; h++) {
            scores[h] = thread < rows ? scores[h] * scale * LOG2_E : -INFINITY;
            largest[h] = warp_max(scores[h]);
            if (thread % WARP == 0) {
                warp_parts[h * 4 + thread / WARP] = largest[h];
            }
        }
        __syncthreads();
#pragma unroll
        for (u32 h = 0; h < GROUP_HEADS; h++) {
            const float* parts = warp_parts + h * 4;
            largest[h] = fmaxf(fmaxf(parts[0], parts[1]), fmaxf(parts[2], parts[3]));
            scores[h] = exp2f(scores[h] - largest[h]);
            weights[h * SPLIT_SLOTS + thread] = scores[h];
        }
        wait_for_copies<0>();
        __syncthreads();
#pragma unroll
        for (u32 h = 0; h < GROUP_HEADS; h++) {
            const float sum = warp_sum(scores[h]);
            if (thread % WARP == 0) {
                warp_parts[h * 4 + thread / WARP] = sum;
            }
        }

        // A thread two columns of every `parts`-th slot, then the parts together.
        const u32 pairs = dim / 2, parts = SPLIT_SLOTS / pairs, column = thread % pairs * 2, part = thread / pairs;
        if (part < parts) {
            float sums[GROUP_HEADS][2] = {};
            for (u32 row = part; row < rows; row += parts) {
                const Vector<T, 2> pair = load<2>(values.at(row, column));
                const float low = to_float(pair.values[0]), high = to_float(pair.values[1]);
#pragma unroll
                for (u32 h = 0; h < GROUP_HEADS; h++) {
                    const float weight = weights[h * SPLIT_SLOTS + row];
                    sums[h][0] += weight * low;
                    sums[h][1] += weight * high;
                }
            }
#pragma unroll
            for (u32 h = 0; h < GROUP_HEADS; h++) {
                column_sums[(h * parts + part) * dim + column] = sums[h][0];
                column_sums[(h * parts + part) * dim + column + 1] = sums[h][1];
            }
        }
        __syncthreads();
        const u64 out = (u64(entry) * heads.num_heads + head) * splits + split;
        for (u32 i = thread; i < group_heads * dim; i += blockDim.x) {
            const u32 h = i / dim, column = i % dim;
            float sum = 0.0f;
            for (u32 part = 0; part < parts; part++) {
                sum += column_sums[(h * parts + part) * dim + column];
            }
            partial[(out + u64(h) * splits) * dim + column] = sum;
        }
        if (thread < group_heads) {
            const float* sums = warp_parts + thread * 4;
            float base = largest[0];
#pragma unroll
            for (u32 h = 1; h < GROUP_HEADS; h++) {
                base = thread == h ? largest[h] : base;
            }
            float* stats = partial_stats + (out + u64(thread) * splits) * 2;
            stats[0] = base;
            stats[1] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        }
        __syncthreads();
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
                                  u32 max_blocks, u32 num_heads, u32 num_kv_heads, u32 head_dim, float scale) {       \
        decode_attention(qkv, key_cache, value_cache, partial, partial_stats, tokens, positions, token_sequences,     \
                         block_tables, capacities, max_blocks, Heads{num_heads, num_kv_heads, head_dim}, scale);      \
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
