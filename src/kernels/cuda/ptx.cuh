// Instructions that C++ has no words for, each in a function of its own: matrix fragments, tensor cores and copies
// that do not wait (PTX ISA 8.x: "Matrix multiply-accumulate", "ldmatrix", "cp.async"). The tests' emulation has the
// same functions.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

__device__ __forceinline__ unsigned int shared_address(const void* pointer) {
    return static_cast<unsigned int>(__cvta_generic_to_shared(pointer));
}

// Four matrices of 8 × 8 halves from shared memory: lanes 8i to 8i+7 name the rows (16 bytes) of matrix i, and lane l
// gets of each row l / 4 the values 2·(l % 4) and the next.
__device__ __forceinline__ void ldmatrix(unsigned int (&fragments)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragments[0]), "=r"(fragments[1]), "=r"(fragments[2]), "=r"(fragments[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// The same of the transposed matrices: lane l gets of column l / 4 the rows 2·(l % 4) and the next.
__device__ __forceinline__ void ldmatrix_transposed(unsigned int (&fragments)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragments[0]), "=r"(fragments[1]), "=r"(fragments[2]), "=r"(fragments[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// sums [16, 8] += a [16, 16] · b [16, 8], in f32. With g = lane / 4 and c = 2·(lane % 4), a lane holds of `a` rows g and
// g + 8 at columns c (registers 0 and 1) and c + 8 (2 and 3), of `b` column g at rows c and c + 8, of `sums` row g at
// columns c and c + 1, then row g + 8.
__device__ __forceinline__ void mma(float (&sums)[4], const unsigned int (&a)[4], unsigned int b0, unsigned int b1, __nv_bfloat16) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma(float (&sums)[4], const unsigned int (&a)[4], unsigned int b0, unsigned int b1, __half) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two values as the halves of a register, the first in the low one.
__device__ __forceinline__ unsigned int pack(float low, float high, __nv_bfloat16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const unsigned int*>(&pair);
}

__device__ __forceinline__ unsigned int pack(float low, float high, __half) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const unsigned int*>(&pair);
}

// Begins to copy 16 bytes to shared memory, or zeros where `valid` is false (nothing is read then).
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid) {
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
}

// Ends a group of copies.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until no more than the last `PENDING` groups of this thread are still on their way.
template <int PENDING> __device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// 2^x to about 2 units in the last place; of −∞ it is 0.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
