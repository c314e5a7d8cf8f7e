// What every kernel builds on: dtypes, vectors of 16 bytes, sums over a warp and a block.
//
// The same sources are compiled by nvcc for the device and, for the tests, by the host's compiler against
// tests/cuda_on_cpu/cuda_on_cpu.h, which stands in for what the device and CUDA's headers supply.

#pragma once

#ifdef CUDA_ON_CPU
#include "cuda_on_cpu.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include "ptx.cuh"

#define SHARED_ARRAY(type, name, count) __shared__ __align__(16) type name[count]
// One name for all kernels: CUDA gives every `extern __shared__` array the same address.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#define CHECK_ALIGNED(pointer, bytes)
#endif

using u32 = unsigned int;
using u64 = unsigned long long;
using bf16 = __nv_bfloat16;
using f16 = __half;

constexpr u32 WARP = 32;
constexpr u32 ALL_LANES = 0xffffffff;
// An id that is none: its row of embeddings is zero.
constexpr u32 NO_TOKEN = 0xffffffff;
constexpr float LOG2_E = 1.4426950408889634f;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }

template <typename T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }
template <> __device__ __forceinline__ f16 from_float<f16>(float x) { return __float2half_rn(x); }

// `LEN` neighbouring values that are loaded and stored at once.
template <typename T, u32 LEN> struct alignas(LEN * sizeof(T)) Vector {
    T values[LEN];
};

// Values of 16 bytes, the widest load there is.
template <typename T> constexpr u32 WIDEST = 16 / sizeof(T);

template <u32 BYTES> struct Bits;
template <> struct Bits<2> { using Type = unsigned short; };
template <> struct Bits<4> { using Type = u32; };
template <> struct Bits<8> { using Type = uint2; };
template <> struct Bits<16> { using Type = uint4; };

template <u32 LEN, typename T> __device__ __forceinline__ Vector<T, LEN> load(const T* from) {
    CHECK_ALIGNED(from, LEN * sizeof(T));
    using Type = typename Bits<LEN * sizeof(T)>::Type;
    union {
        Type bits;
        Vector<T, LEN> vector;
    } both{*reinterpret_cast<const Type*>(from)};
    return both.vector;
}

template <u32 LEN, typename T> __device__ __forceinline__ void store(T* to, const Vector<T, LEN>& vector) {
    CHECK_ALIGNED(to, LEN * sizeof(T));
    *reinterpret_cast<Vector<T, LEN>*>(to) = vector;
}

// `LEN` floats, in loads of 16 bytes where they make whole ones.
template <u32 LEN> struct Floats {
    float values[LEN];

    __device__ __forceinline__ explicit Floats(const float* from) {
        constexpr u32 PIECE = LEN % 4 == 0 ? 4 : 1;
#pragma unroll
        for (u32 i = 0; i < LEN; i += PIECE) {
            const Vector<float, PIECE> piece = load<PIECE>(from + i);
#pragma unroll
            for (u32 j = 0; j < PIECE; j++) {
                values[i + j] = piece.values[j];
            }
        }
    }
};

// Whether rows of `width` values that begin at `pointer` can be read in vectors of 16 bytes.
template <typename T> __device__ __forceinline__ bool in_vectors(const T* pointer, u32 width) {
    return width % WIDEST<T> == 0 && reinterpret_cast<u64>(pointer) % 16 == 0;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (u32 distance = WARP / 2; distance > 0; distance /= 2) {
        x += __shfl_xor_sync(ALL_LANES, x, distance);
    }
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (u32 distance = WARP / 2; distance > 0; distance /= 2) {
        x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, distance));
    }
    return x;
}

// The sum of every thread's `x`, the same to the last bit in all of them. `partial` has room for a float a warp.
__device__ __forceinline__ float block_sum(float x, float* partial) {
    x = warp_sum(x);
    const u32 warps = blockDim.x / WARP;
    __syncthreads();
    if (threadIdx.x % WARP == 0) {
        partial[threadIdx.x / WARP] = x;
    }
    __syncthreads();
    x = 0.0f;
    for (u32 warp = 0; warp < warps; warp++) {
        x += partial[warp];
    }
    return x;
}

// One entry a dtype: `EVERY_DTYPE(ENTRY)` expands ENTRY(T, suffix) three times, `HALF_DTYPES` twice.
#define HALF_DTYPES(ENTRY) ENTRY(bf16, bf16) ENTRY(f16, f16)
#define EVERY_DTYPE(ENTRY) HALF_DTYPES(ENTRY) ENTRY(float, f32)
