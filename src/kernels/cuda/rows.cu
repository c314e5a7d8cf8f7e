// Rows gathered by index, casts, and means over a sequence's rows.

#include "device.cuh"

// Copies row `rows[n]` of `source [V, width]` to row n of `out [N, width]`: embeddings, and the tokens that a head reads.
// The row of NO_TOKEN is zero. Grid (N), 128 threads.
template <typename T, u32 LEN>
__device__ void gather_row(const T* source, u32 row, T* out, u32 width) {
    const T* from = source + u64(row) * width;
    for (u32 i = threadIdx.x * LEN; i < width; i += blockDim.x * LEN) {
        store<LEN>(out + i, row == NO_TOKEN ? Vector<T, LEN>{} : load<LEN>(from + i));
    }
}

template <typename T>
__device__ void gather_rows(const T* source, const u32* rows, T* out, u32 width) {
    const u32 row = rows[blockIdx.x];
    out += u64(blockIdx.x) * width;
    if (in_vectors(source, width) && in_vectors(out, width)) {
        gather_row<T, WIDEST<T>>(source, row, out, width);
    } else {
        gather_row<T, 1>(source, row, out, width);
    }
}

#define ENTRY(T, suffix)                                                                                              \
    extern "C" __global__ void __launch_bounds__(128)                                                                 \
        gather_rows_##suffix(const T* source, const u32* rows, T* out, u32 width) {                                   \
        gather_rows(source, rows, out, width);                                                                        \
    }
EVERY_DTYPE(ENTRY)
#undef ENTRY

// Values of a cast that one thread takes.
constexpr u32 CAST_PER_THREAD = 8;

// `out[i] = x[i]` for `count` values, to f32 or from it (to nearest, ties to even). Grid (count / 2048, rounded up),
// 256 threads.
template <typename From, typename To>
__device__ void cast(const From* x, To* out, u64 count) {
    const u64 first = u64(blockIdx.x) * blockDim.x * CAST_PER_THREAD + threadIdx.x;
#pragma unroll
    for (u32 i = 0; i < CAST_PER_THREAD; i++) {
        const u64 index = first + i * blockDim.x;
        if (index < count) {
            out[index] = from_float<To>(to_float(x[index]));
        }
    }
}

#define ENTRY(T, suffix)                                                                                              \
    extern "C" __global__ void __launch_bounds__(256) to_f32_##suffix(const T* x, float* out, u64 count) {            \
        cast(x, out, count);                                                                                          \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(256) from_f32_##suffix(const float* x, T* out, u64 count) {          \
        cast(x, out, count);                                                                                          \
    }
HALF_DTYPES(ENTRY)
#undef ENTRY

// The mean of each sequence's rows of `x [N, width]`, to `out [B, width]`, summed in their order. Grid (B, width / 256,
// rounded up), 256 threads.
template <typename T>
__device__ void mean_pool(const T* x, const u32* cu_seq_lens, float* out, u32 width) {
    const u32 column = blockIdx.y * blockDim.x + threadIdx.x;
    const u32 begin = cu_seq_lens[blockIdx.x], end = cu_seq_lens[blockIdx.x + 1];
    if (column >= width) {
        return;
    }
    float sum = 0.0f;
    for (u32 row = begin; row < end; row++) {
        sum += to_float(x[u64(row) * width + column]);
    }
    out[u64(blockIdx.x) * width + column] = sum / float(end - begin);
}

#define ENTRY(T, suffix)                                                                                              \
    extern "C" __global__ void __launch_bounds__(256)                                                                 \
        mean_pool_##suffix(const T* x, const u32* cu_seq_lens, float* out, u32 width) {                               \
        mean_pool(x, cu_seq_lens, out, width);                                                                        \
    }
EVERY_DTYPE(ENTRY)
#undef ENTRY
