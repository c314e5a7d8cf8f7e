// Launches of kernels on the CPU.

#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "cuda_on_cpu.h"

namespace cuda_on_cpu {

struct Launch {
    Index3 grid, block;
    size_t dynamic_shared_bytes;
    // Of the order in which threads run.
    uint64_t seed;
};

// Runs `body` once for every thread of every block.
void run(const char* name, const Launch& launch, const std::function<void()>& body);

// The launch of the kernel `name` with copies of what `arguments` point to, or nothing if there is no such kernel.
std::function<void()> bind(const char* name, const Launch& launch, void** arguments);

}  // namespace cuda_on_cpu

// Runs the kernel `name` with pointers to its arguments, as cuLaunchKernel takes them; whether there is such a kernel.
extern "C" int cuda_on_cpu_launch(const char* name, const unsigned int grid[3], const unsigned int block[3],
                                  size_t dynamic_shared_bytes, void** arguments, uint64_t seed);
extern "C" int cuda_on_cpu_has(const char* name);

// Memory that begins at 16 bytes and whose last byte is followed by a page that nobody may touch (but for the padding to
// 16 bytes), filled with 0xff: NaN in every dtype.
extern "C" void* cuda_on_cpu_allocate(size_t bytes);
extern "C" void cuda_on_cpu_free(void* memory, size_t bytes);
