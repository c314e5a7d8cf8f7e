// The project's kernels, compiled for the CPU and found by name.

#define CUDA_ON_CPU
#include "launch.h"

#include "../../src/kernels/cuda/kernels.cu"

#include <cstring>
#include <tuple>
#include <utility>

namespace {

using Bind = std::function<void()> (*)(const char* name, const cuda_on_cpu::Launch& launch, void** arguments);

template <auto KERNEL> struct Binder;

template <typename... Arguments, void (*KERNEL)(Arguments...)> struct Binder<KERNEL> {
    template <size_t... I> static std::tuple<Arguments...> copy(void** arguments, std::index_sequence<I...>) {
        return {*static_cast<Arguments*>(arguments[I])...};
    }
    static std::function<void()> bind(const char* name, const cuda_on_cpu::Launch& launch, void** arguments) {
        const auto values = copy(arguments, std::index_sequence_for<Arguments...>());
        return [=] { cuda_on_cpu::run(name, launch, [&] { std::apply(KERNEL, values); }); };
    }
};

struct Entry {
    const char* name;
    Bind bind;
};

#define KERNEL(name) Entry{#name, Binder<name>::bind},
#define IN_HALVES(name) KERNEL(name##_bf16) KERNEL(name##_f16)
#define IN_ALL(name) IN_HALVES(name) KERNEL(name##_f32)

const Entry ENTRIES[] = {
    IN_ALL(gather_rows) IN_HALVES(to_f32) IN_HALVES(from_f32) IN_ALL(mean_pool) IN_ALL(rms_norm) IN_ALL(add_rms_norm)
    IN_ALL(silu_mul) IN_ALL(rotary) IN_ALL(rotary_cache_write) IN_ALL(varlen_attention)
    IN_HALVES(flash_attention_d64) IN_HALVES(flash_attention_d128) IN_ALL(decode_attention) IN_ALL(decode_combine)
    KERNEL(argmax_logprob) KERNEL(target_logprobs) KERNEL(advance_positions)
};

const Entry* find(const char* name) {
    for (const Entry& entry : ENTRIES) {
        if (std::strcmp(entry.name, name) == 0) {
            return &entry;
        }
    }
    return nullptr;
}

}  // namespace

int cuda_on_cpu_has(const char* name) { return find(name) != nullptr; }

std::function<void()> cuda_on_cpu::bind(const char* name, const Launch& launch, void** arguments) {
    const Entry* entry = find(name);
    return entry == nullptr ? nullptr : entry->bind(entry->name, launch, arguments);
}

int cuda_on_cpu_launch(const char* name, const unsigned int grid[3], const unsigned int block[3],
                       size_t dynamic_shared_bytes, void** arguments, uint64_t seed) {
    const auto launch = cuda_on_cpu::bind(
        name, {{grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, dynamic_shared_bytes, seed}, arguments);
    if (launch == nullptr) {
        return 0;
    }
    launch();
    return 1;
}
