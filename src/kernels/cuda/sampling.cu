// Greedy choice and log-probabilities over rows of logits.

#include "device.cuh"

// A candidate for the largest logit.
struct Best {
    float logit;
    u32 token;
};

// The larger, of equal ones the first: so any order of comparisons gives the same.
__device__ __forceinline__ Best better(Best a, Best b) {
    return b.logit > a.logit || (b.logit == a.logit && b.token < a.token) ? b : a;
}

__device__ __forceinline__ Best warp_best(Best best) {
#pragma unroll
    for (u32 distance = WARP / 2; distance > 0; distance /= 2) {
        const Best other{__shfl_xor_sync(ALL_LANES, best.logit, distance), __shfl_xor_sync(ALL_LANES, best.token, distance)};
        best = better(best, other);
    }
    return best;
}

// The row's likeliest token in every thread; NO_TOKEN where a logit is NaN or infinite.
__device__ Best row_best(const float* logits, u32 vocab_size, float* partial_logits, u32* partial_tokens) {
    Best best{-INFINITY, NO_TOKEN};
    bool finite = true;
    for (u32 token = threadIdx.x; token < vocab_size; token += blockDim.x) {
        const float logit = logits[token];
        finite = finite && fabsf(logit) < INFINITY;
        best = better(best, Best{logit, token});
    }
    best = warp_best(best);
    if (threadIdx.x % WARP == 0) {
        partial_logits[threadIdx.x / WARP] = best.logit;
        partial_tokens[threadIdx.x / WARP] = best.token;
    }
    if (__syncthreads_or(!finite)) {
        return Best{NAN, NO_TOKEN};
    }
    for (u32 warp = 0; warp < blockDim.x / WARP; warp++) {
        best = better(best, Best{partial_logits[warp], partial_tokens[warp]});
    }
    return best;
}

// ln Σ exp(logit − largest) of the row, in every thread.
__device__ float row_log_sum(const float* logits, float largest, u32 vocab_size, float* partial) {
    float sum = 0.0f;
    for (u32 token = threadIdx.x; token < vocab_size; token += blockDim.x) {
        sum += expf(logits[token] - largest);
    }
    return logf(block_sum(sum, partial));
}

// The first of each row's largest `logits [B, vocab_size]`, and the logarithm of its probability where `logprobs` is not
// null. A row with a logit that is NaN or infinite has NO_TOKEN. Grid (B), 512 threads.
extern "C" __global__ void __launch_bounds__(512)
    argmax_logprob(const float* logits, u32* tokens, float* logprobs, u32 vocab_size) {
    SHARED_ARRAY(float, partial_logits, 32);
    SHARED_ARRAY(u32, partial_tokens, 32);
    logits += u64(blockIdx.x) * vocab_size;
    const Best best = row_best(logits, vocab_size, partial_logits, partial_tokens);
    const float log_sum =
        logprobs == nullptr || best.token == NO_TOKEN ? 0.0f : row_log_sum(logits, best.logit, vocab_size, partial_logits);
    if (threadIdx.x == 0) {
        tokens[blockIdx.x] = best.token;
        if (logprobs != nullptr) {
            logprobs[blockIdx.x] = best.token == NO_TOKEN ? NAN : -log_sum;
        }
    }
}

// The logarithm of the probability of each row's `targets [B]`; NaN where a logit is NaN or infinite. Grid (B), 512 threads.
extern "C" __global__ void __launch_bounds__(512)
    target_logprobs(const float* logits, const u32* targets, float* logprobs, u32 vocab_size) {
    SHARED_ARRAY(float, partial_logits, 32);
    SHARED_ARRAY(u32, partial_tokens, 32);
    logits += u64(blockIdx.x) * vocab_size;
    const Best best = row_best(logits, vocab_size, partial_logits, partial_tokens);
    if (best.token == NO_TOKEN) {
        if (threadIdx.x == 0) {
            logprobs[blockIdx.x] = NAN;
        }
        return;
    }
    const float log_sum = row_log_sum(logits, best.logit, vocab_size, partial_logits);
    if (threadIdx.x == 0) {
        logprobs[blockIdx.x] = logits[targets[blockIdx.x]] - best.logit - log_sum;
    }
}

// One token on: each of n positions, and the end of each sequence. Grid (n / 256, rounded up), 256 threads.
extern "C" __global__ void __launch_bounds__(256) advance_positions(u32* positions, u32* sequence_ends, u32 n) {
    const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) {
        positions[i] += 1;
        sequence_ends[i] += 1;
    }
}
