// CUDA's execution model for the host's compiler, so that the kernels' own sources run in tests without a GPU.
//
// A block's threads are coroutines of one OS thread that give way at barriers and wherever a warp acts as one (shuffles,
// matrix fragments, tensor cores), in an order that a seed decides. Checked on the way: barriers that not
// all threads reach, lanes of a warp that meet at different instructions, addresses that are not aligned as the device wants
// them, accesses beyond the dynamic shared memory. Shared memory begins as NaN. An asynchronous copy
// arrives at once or, by chance, only when it is waited for.
//
// Not shown: races between threads that no order of whole stretches between barriers brings out, memory ordering, speed,
// occupancy, and the device's own rounding of sums inside an `mma`.

#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

struct uint2 { unsigned int x, y; };
struct uint4 { unsigned int x, y, z, w; };
struct Index3 { unsigned int x, y, z; };

namespace cuda_on_cpu {

// What identifies the place of a warp's common instruction, so that lanes that meet at different ones are noticed.
enum class Meeting { Shuffle, Ldmatrix, LdmatrixTransposed, MmaBf16, MmaF16 };

// What a lane brings to a common instruction, and takes from it.
struct Exchange {
    unsigned int in[16];
    const void* pointer;
    unsigned int out[4];
};

struct Position {
    Index3 thread_idx, block_idx, block_dim, grid_dim;
};

// Of the thread that is running.
const Position& position();

// Waits for the other threads of the block; whether any of them said so.
bool barrier(bool said);

// Waits for the other lanes of the warp; what they do together is done when it returns.
void meet(Meeting meeting, Exchange& exchange);

// The block's static array of the given site, and its dynamic shared memory.
void* static_shared(const void* site, size_t bytes);
unsigned char* dynamic_shared();

void copy_async(void* to, const void* from, bool valid);
void commit_copies();
void wait_for_copies(int pending);

[[noreturn]] void fail(const char* format, ...);

inline void check_aligned(const void* pointer, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) {
        fail("%p is not aligned to %zu bytes", pointer, bytes);
    }
}

template <typename To, typename From> To bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

template <typename T> T shuffle(T value, unsigned int source_xor, bool is_xor) {
    Exchange exchange{};
    exchange.in[0] = bits<unsigned int>(value);
    exchange.in[1] = source_xor;
    exchange.in[2] = is_xor;
    meet(Meeting::Shuffle, exchange);
    return bits<T>(exchange.out[0]);
}

}  // namespace cuda_on_cpu

#define threadIdx (cuda_on_cpu::position().thread_idx)
#define blockIdx (cuda_on_cpu::position().block_idx)
#define blockDim (cuda_on_cpu::position().block_dim)
#define gridDim (cuda_on_cpu::position().grid_dim)

// A function's own static tells one array from another.
#define SHARED_ARRAY(type, name, count)         \
    static const char name##_site = 0;          \
    type* const name = static_cast<type*>(cuda_on_cpu::static_shared(&name##_site, sizeof(type) * (count)))
#define DYNAMIC_SHARED(name) unsigned char* const name = cuda_on_cpu::dynamic_shared()
#define CHECK_ALIGNED(pointer, bytes) cuda_on_cpu::check_aligned(pointer, bytes)

inline void __syncthreads() { cuda_on_cpu::barrier(false); }
inline int __syncthreads_or(int said) { return cuda_on_cpu::barrier(said != 0); }
template <typename T> T __shfl_xor_sync(unsigned int, T value, unsigned int distance) {
    return cuda_on_cpu::shuffle(value, distance, true);
}
template <typename T> T __shfl_sync(unsigned int, T value, unsigned int lane) {
    return cuda_on_cpu::shuffle(value, lane, false);
}
template <typename T> T min(T a, T b) { return b < a ? b : a; }
template <typename T> T max(T a, T b) { return a < b ? b : a; }
using std::isfinite;

// Half precision: the bits and their roundings, to nearest with ties to even.

struct __nv_bfloat16 { uint16_t bits; };
struct __half { uint16_t bits; };

inline float __bfloat162float(__nv_bfloat16 x) { return cuda_on_cpu::bits<float>(uint32_t(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    const uint32_t bits = cuda_on_cpu::bits<uint32_t>(x);
    if (x != x) {
        return {0x7fff};
    }
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

float __half2float(__half x);
__half __float2half_rn(float x);

// What ptx.cuh has for the device.

inline void ldmatrix(unsigned int (&fragments)[4], const void* row) {
    cuda_on_cpu::Exchange exchange{};
    exchange.pointer = row;
    cuda_on_cpu::meet(cuda_on_cpu::Meeting::Ldmatrix, exchange);
    std::memcpy(fragments, exchange.out, sizeof exchange.out);
}

inline void ldmatrix_transposed(unsigned int (&fragments)[4], const void* row) {
    cuda_on_cpu::Exchange exchange{};
    exchange.pointer = row;
    cuda_on_cpu::meet(cuda_on_cpu::Meeting::LdmatrixTransposed, exchange);
    std::memcpy(fragments, exchange.out, sizeof exchange.out);
}

template <typename T>
void mma(float (&sums)[4], const unsigned int (&a)[4], unsigned int b0, unsigned int b1, T) {
    using cuda_on_cpu::Meeting;
    cuda_on_cpu::Exchange exchange{};
    std::memcpy(exchange.in, a, sizeof a);
    exchange.in[4] = b0;
    exchange.in[5] = b1;
    std::memcpy(exchange.in + 6, sums, sizeof sums);
    cuda_on_cpu::meet(std::is_same<T, __half>::value ? Meeting::MmaF16 : Meeting::MmaBf16, exchange);
    std::memcpy(sums, exchange.out, sizeof sums);
}

inline unsigned int pack(float low, float high, __nv_bfloat16) {
    return __float2bfloat16_rn(low).bits | unsigned(__float2bfloat16_rn(high).bits) << 16;
}
inline unsigned int pack(float low, float high, __half) {
    return __float2half_rn(low).bits | unsigned(__float2half_rn(high).bits) << 16;
}

inline void copy_async(void* to, const void* from, bool valid) { cuda_on_cpu::copy_async(to, from, valid); }
inline void commit_copies() { cuda_on_cpu::commit_copies(); }
template <int PENDING> void wait_for_copies() { cuda_on_cpu::wait_for_copies(PENDING); }

inline float exp2_fast(float x) { return exp2f(x); }
