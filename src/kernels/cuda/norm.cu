// Root-mean-square norm, alone and joined with the residual sum before it.

#include "device.cuh"

// Vectors of a row that a thread keeps in registers between its two passes; of wider rows the rest is read again.
constexpr u32 KEPT = 4;

// x += y where `ADD`, then y = x / sqrt(mean(x²) + eps) · weight, of one row. Sums are in f32 whatever T is, and the sum
// x + y is normed as it was rounded, so that both entries give the same norm of the same x.
template <typename T, u32 LEN, bool ADD>
__device__ void norm_row(T* x, T* y, const float* weight, float eps, u32 width) {
    SHARED_ARRAY(float, partial, 32);
    const u32 step = blockDim.x * LEN;
    Vector<T, LEN> kept[KEPT];
    float squares = 0.0f;
    const auto take = [&](u32 column) {
        Vector<T, LEN> values = load<LEN>(x + column);
        if constexpr (ADD) {
            const Vector<T, LEN> more = load<LEN>(y + column);
#pragma unroll
            for (u32 i = 0; i < LEN; i++) {
                values.values[i] = from_float<T>(to_float(values.values[i]) + to_float(more.values[i]));
            }
            store<LEN>(x + column, values);
        }
#pragma unroll
        for (u32 i = 0; i < LEN; i++) {
            const float value = to_float(values.values[i]);
            squares += value * value;
        }
        return values;
    };
#pragma unroll
    for (u32 k = 0; k < KEPT; k++) {
        const u32 column = threadIdx.x * LEN + k * step;
        if (column < width) {
            kept[k] = take(column);
        }
    }
    for (u32 column = threadIdx.x * LEN + KEPT * step; column < width; column += step) {
        take(column);
    }

    const float scale = 1.0f / sqrtf(block_sum(squares, partial) / float(width) + eps);
    const auto give = [&](u32 column, const Vector<T, LEN>& values) {
        const Floats<LEN> weights(weight + column);
        Vector<T, LEN> normed;
#pragma unroll
        for (u32 i = 0; i < LEN; i++) {
            normed.values[i] = from_float<T>(to_float(values.values[i]) * scale * weights.values[i]);
        }
        store<LEN>(y + column, normed);
    };
#pragma unroll
    for (u32 k = 0; k < KEPT; k++) {
        const u32 column = threadIdx.x * LEN + k * step;
        if (column < width) {
            give(column, kept[k]);
        }
    }
    for (u32 column = threadIdx.x * LEN + KEPT * step; column < width; column += step) {
        give(column, load<LEN>(x + column));
    }
}

// Rows of `x` and `y [N, width]`. Grid (N), 256 threads.
template <bool ADD, typename T>
__device__ void norm_rows(T* x, T* y, const float* weight, float eps, u32 width) {
    x += u64(blockIdx.x) * width;
    y += u64(blockIdx.x) * width;
    if (in_vectors(x, width) && in_vectors(y, width)) {
        norm_row<T, WIDEST<T>, ADD>(x, y, weight, eps, width);
    } else {
        norm_row<T, 1, ADD>(x, y, weight, eps, width);
    }
}

// `rms_norm`: `normed` = the norm of `x`, which stays. `add_rms_norm`: `x` = x + y, then `y` = its norm.
#define ENTRY(T, suffix)                                                                                              \
    extern "C" __global__ void __launch_bounds__(256)                                                                 \
        rms_norm_##suffix(const T* x, T* normed, const float* weight, float eps, u32 width) {                         \
        norm_rows<false>(const_cast<T*>(x), normed, weight, eps, width);                                              \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(256)                                                                 \
        add_rms_norm_##suffix(T* x, T* y, const float* weight, float eps, u32 width) {                                \
        norm_rows<true>(x, y, weight, eps, width);                                                                    \
    }
EVERY_DTYPE(ENTRY)
#undef ENTRY
