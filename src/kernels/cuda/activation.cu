// The gated activation.

#include "device.cuh"

// Values that one thread takes.
constexpr u32 SILU_PER_THREAD = 8;

template <typename T, u32 LEN>
__device__ void silu_mul_row(const T* gate_up, T* gated, u32 width, u32 begin, u32 end) {
    for (u32 column = begin + threadIdx.x * LEN; column < end; column += blockDim.x * LEN) {
        const Vector<T, LEN> gate = load<LEN>(gate_up + column), up = load<LEN>(gate_up + width + column);
        Vector<T, LEN> out;
#pragma unroll
        for (u32 i = 0; i < LEN; i++) {
            const float x = to_float(gate.values[i]);
            // Of a large negative x the divisor is infinite and the quotient −0, as it should be.
            out.values[i] = from_float<T>(x / (1.0f + expf(-x)) * to_float(up.values[i]));
        }
        store<LEN>(gated + column, out);
    }
}

// `silu(gate) · up` of `gate_up [N, 2·width]`, gate first, to `gated [N, width]`. Grid (N, width / 2048, rounded up),
// 256 threads.
template <typename T>
__device__ void silu_mul(const T* gate_up, T* gated, u32 width) {
    gate_up += u64(blockIdx.x) * 2 * width;
    gated += u64(blockIdx.x) * width;
    const u32 begin = blockIdx.y * blockDim.x * SILU_PER_THREAD;
    const u32 end = min(width, begin + blockDim.x * SILU_PER_THREAD);
    if (in_vectors(gate_up, width) && in_vectors(gated, width)) {
        silu_mul_row<T, WIDEST<T>>(gate_up, gated, width, begin, end);
    } else {
        silu_mul_row<T, 1>(gate_up, gated, width, begin, end);
    }
}

#define ENTRY(T, suffix)                                                                                              \
    extern "C" __global__ void __launch_bounds__(256) silu_mul_##suffix(const T* gate_up, T* gated, u32 width) {      \
        silu_mul(gate_up, gated, width);                                                                              \
    }
EVERY_DTYPE(ENTRY)
#undef ENTRY
