// A stand-in for what is called of libcublas and libcurand: products as plain loops with sums in f32, and generators that
// generate nothing. Signatures and constants: cublas_api.h, library_types.h and curand.h of CUDA 13.0.

#include "driver.h"

#include <cstdlib>
#include <memory>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using namespace cuda_on_cpu;

constexpr int R_32F = 0, R_16F = 2, R_16BF = 14;
constexpr int COMPUTE_32F = 68;
constexpr int SUCCESS = 0;

struct Handle {
    void* stream = nullptr;
};

float read(const void* matrix, int dtype, size_t index) {
    switch (dtype) {
        case R_32F: return static_cast<const float*>(matrix)[index];
        case R_16F: return __half2float(static_cast<const __half*>(matrix)[index]);
        case R_16BF: return __bfloat162float(static_cast<const __nv_bfloat16*>(matrix)[index]);
        default: fail("cublas: matrices of type %d are not emulated", dtype);
    }
}

void write(void* matrix, int dtype, size_t index, float value) {
    switch (dtype) {
        case R_32F: static_cast<float*>(matrix)[index] = value; break;
        case R_16F: static_cast<__half*>(matrix)[index] = __float2half_rn(value); break;
        case R_16BF: static_cast<__nv_bfloat16*>(matrix)[index] = __float2bfloat16_rn(value); break;
        default: fail("cublas: matrices of type %d are not emulated", dtype);
    }
}

const char* offset(const void* matrix, int dtype, long long values) {
    return static_cast<const char*>(matrix) + values * (dtype == R_32F ? 4 : 2);
}

// Column-major C [m, n] = alpha · op(A) [m, k] · op(B) [k, n] + beta · C.
struct Gemm {
    bool transpose_a, transpose_b;
    int m, n, k;
    float alpha, beta;
    const void* a;
    int a_type, lda;
    const void* b;
    int b_type, ldb;
    void* c;
    int c_type, ldc;

    void run() const {
        std::vector<float> rows(size_t(m) * k), columns(size_t(n) * k);
        for (int i = 0; i < m; i++) {
            for (int l = 0; l < k; l++) {
                rows[size_t(i) * k + l] = read(a, a_type, transpose_a ? size_t(i) * lda + l : size_t(l) * lda + i);
            }
        }
        for (int j = 0; j < n; j++) {
            for (int l = 0; l < k; l++) {
                columns[size_t(j) * k + l] = read(b, b_type, transpose_b ? size_t(l) * ldb + j : size_t(j) * ldb + l);
            }
        }
        for (int j = 0; j < n; j++) {
            for (int i = 0; i < m; i++) {
                float sum = 0.0f;
                for (int l = 0; l < k; l++) {
                    sum += rows[size_t(i) * k + l] * columns[size_t(j) * k + l];
                }
                const size_t index = size_t(j) * ldc + i;
                // With a beta of zero C is not read: it may be NaN.
                write(c, c_type, index, alpha * sum + (beta == 0.0f ? 0.0f : beta * read(c, c_type, index)));
            }
        }
    }
};

}  // namespace

#define LOCK const std::lock_guard<std::recursive_mutex> lock(driver_mutex)

EXPORT int cublasCreate_v2(void** handle) {
    *handle = new Handle;
    return SUCCESS;
}
EXPORT int cublasDestroy_v2(void* handle) {
    delete static_cast<Handle*>(handle);
    return SUCCESS;
}
EXPORT int cublasSetStream_v2(void* handle, void* stream) {
    static_cast<Handle*>(handle)->stream = stream;
    return SUCCESS;
}
EXPORT int cublasSetWorkspace_v2(void*, void*, size_t) { return SUCCESS; }
EXPORT int cublasSetMathMode(void*, int) { return SUCCESS; }

EXPORT int cublasGemmStridedBatchedEx(void* handle, int transpose_a, int transpose_b, int m, int n, int k,
                                      const void* alpha, const void* a, int a_type, int lda, long long a_stride,
                                      const void* b, int b_type, int ldb, long long b_stride, const void* beta, void* c,
                                      int c_type, int ldc, long long c_stride, int batches, int compute_type, int) {
    LOCK;
    if (compute_type != COMPUTE_32F) {
        fail("cublas: compute type %d is not emulated", compute_type);
    }
    const float factor = *static_cast<const float*>(alpha), keep = *static_cast<const float*>(beta);
    for (int batch = 0; batch < batches; batch++) {
        const Gemm gemm{transpose_a != 0,
                        transpose_b != 0,
                        m,
                        n,
                        k,
                        factor,
                        keep,
                        offset(a, a_type, batch * a_stride),
                        a_type,
                        lda,
                        offset(b, b_type, batch * b_stride),
                        b_type,
                        ldb,
                        const_cast<char*>(offset(c, c_type, batch * c_stride)),
                        c_type,
                        ldc};
        submit(stream_of(static_cast<Handle*>(handle)->stream), [=] { gemm.run(); });
    }
    return SUCCESS;
}
EXPORT int cublasGemmEx(void* handle, int transpose_a, int transpose_b, int m, int n, int k, const void* alpha,
                        const void* a, int a_type, int lda, const void* b, int b_type, int ldb, const void* beta, void* c,
                        int c_type, int ldc, int compute_type, int algorithm) {
    return cublasGemmStridedBatchedEx(handle, transpose_a, transpose_b, m, n, k, alpha, a, a_type, lda, 0, b, b_type, ldb,
                                      0, beta, c, c_type, ldc, 0, 1, compute_type, algorithm);
}

EXPORT int curandCreateGenerator(void** generator, int) {
    static int any;
    *generator = &any;
    return SUCCESS;
}
EXPORT int curandDestroyGenerator(void*) { return SUCCESS; }
EXPORT int curandSetStream(void*, void*) { return SUCCESS; }
EXPORT int curandSetPseudoRandomGeneratorSeed(void*, unsigned long long) { return SUCCESS; }
EXPORT int curandSetGeneratorOffset(void*, unsigned long long) { return SUCCESS; }
