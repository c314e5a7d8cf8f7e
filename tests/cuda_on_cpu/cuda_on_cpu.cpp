// The coroutines behind cuda_on_cpu.h: one block of threads at a time.

#include "launch.h"
#include "cuda_on_cpu.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <unordered_map>
#include <vector>

#include <sys/mman.h>
#include <unistd.h>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace cuda_on_cpu {
namespace {

constexpr size_t STACK_BYTES = 256 << 10;
constexpr unsigned WARP = 32;
// What a block may have on sm_90; static arrays share 48 KiB.
constexpr size_t MOST_DYNAMIC_BYTES = 227 << 10, MOST_STATIC_BYTES = 48 << 10;

#if defined(__x86_64__)
// Saves what a call must keep and the stack pointer to `*from`, then takes up `to`'s.
extern "C" void cuda_on_cpu_switch(void** from, void* to);
asm(R"(
.text
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size cuda_on_cpu_switch, . - cuda_on_cpu_switch
)");

struct Context {
    void* stack_pointer = nullptr;

    void prepare(unsigned char* stack, void (*entry)()) {
        // As after a call: 8 bytes off a multiple of 16. The entry never returns.
        auto* top = reinterpret_cast<void**>(stack + STACK_BYTES - 64);
        *--top = nullptr;
        *--top = reinterpret_cast<void*>(entry);
        top -= 6;
        std::fill(top, top + 6, nullptr);
        stack_pointer = top;
    }
    static void go(Context& from, Context& to) { cuda_on_cpu_switch(&from.stack_pointer, to.stack_pointer); }
};
#else
struct Context {
    ucontext_t context;

    void prepare(unsigned char* stack, void (*entry)()) {
        getcontext(&context);
        context.uc_stack.ss_sp = stack;
        context.uc_stack.ss_size = STACK_BYTES;
        context.uc_link = nullptr;
        makecontext(&context, entry, 0);
    }
    static void go(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};
#endif

// Memory whose end is the end of what can be touched.
struct GuardedBytes {
    unsigned char* start;
    size_t bytes;

    explicit GuardedBytes(size_t bytes) : start(static_cast<unsigned char*>(cuda_on_cpu_allocate(bytes))), bytes(bytes) {
        if (start == nullptr) {
            fail("no memory for %zu bytes", bytes);
        }
    }
    GuardedBytes(const GuardedBytes&) = delete;
    ~GuardedBytes() { cuda_on_cpu_free(start, bytes); }
};

struct Copy {
    void* to;
    const void* from;
    bool valid;

    void arrive() const {
        if (valid) {
            std::memcpy(to, from, 16);
        } else {
            std::memset(to, 0, 16);
        }
    }
};

struct Thread {
    Context context;
    unsigned char* stack = nullptr;
    Position position;
    Meeting meeting;
    Exchange* exchange = nullptr;
    std::vector<Copy> uncommitted;
    std::vector<std::vector<Copy>> groups;
};

// Xorshift (Marsaglia 2003): which thread runs next.
struct Random {
    uint64_t state;

    explicit Random(uint64_t seed = 0) : state(seed * 0x9e3779b97f4a7c15 | 1) {}
    unsigned below(unsigned end) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        return unsigned((state >> 32) * end >> 32);
    }
};

// What the blocks of one OS thread use one after the other.
struct Machine {
    Context scheduler;
    std::vector<Thread> threads;
    std::vector<unsigned char*> stacks;
    Thread* current = nullptr;
    unsigned num_threads = 0, at_barrier = 0, done = 0;
    std::vector<unsigned> runnable;
    // Lanes of each warp that have come to its common instruction.
    unsigned met[32] = {};
    bool said = false, answer = false;
    const std::function<void()>* body = nullptr;
    Random random;
    GuardedBytes dynamic{MOST_DYNAMIC_BYTES}, statics{MOST_STATIC_BYTES};
    size_t dynamic_bytes = 0, static_bytes = 0;
    std::unordered_map<const void*, unsigned char*> static_arrays;

    ~Machine() {
        for (auto* stack : stacks) {
            munmap(stack, STACK_BYTES);
        }
    }
};

thread_local std::unique_ptr<Machine> own_machine;
// The same, without a check at each use that it was made.
thread_local Machine* machine = nullptr;
thread_local const char* kernel_name = "no kernel";

void give_way() { Context::go(machine->current->context, machine->scheduler); }

void thread_entry() {
    (*machine->body)();
    if (!machine->current->uncommitted.empty()) {
        fail("a thread ended with copies that it never committed");
    }
    machine->done += 1;
    give_way();
    std::abort();
}

float half_value(bool is_f16, unsigned bits) {
    return is_f16 ? __half2float(__half{uint16_t(bits)}) : __bfloat162float(__nv_bfloat16{uint16_t(bits)});
}

void do_shuffle(Thread* warp) {
    for (unsigned lane = 0; lane < WARP; lane++) {
        const unsigned* in = warp[lane].exchange->in;
        const unsigned source = (in[2] ? lane ^ in[1] : in[1]) % WARP;
        warp[lane].exchange->out[0] = warp[source].exchange->in[0];
    }
}

// PTX ISA, "Warp-level matrix instructions: ldmatrix": row r of matrix i is at the address of lane 8i + r.
void do_ldmatrix(Thread* warp, bool transposed) {
    uint16_t matrices[4][8][8];
    for (unsigned lane = 0; lane < WARP; lane++) {
        const void* row = warp[lane].exchange->pointer;
        check_aligned(row, 16);
        std::memcpy(matrices[lane / 8][lane % 8], row, 16);
    }
    for (unsigned lane = 0; lane < WARP; lane++) {
        const unsigned row = lane / 4, column = lane % 4 * 2;
        for (unsigned i = 0; i < 4; i++) {
            const auto& m = matrices[i];
            const unsigned low = transposed ? m[column][row] : m[row][column];
            const unsigned high = transposed ? m[column + 1][row] : m[row][column + 1];
            warp[lane].exchange->out[i] = low | high << 16;
        }
    }
}

// PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type": where each lane's registers lie.
void do_mma(Thread* warp, bool is_f16) {
    float a[16][16], b[16][8], sums[16][8];
    for (unsigned lane = 0; lane < WARP; lane++) {
        const unsigned* in = warp[lane].exchange->in;
        const unsigned group = lane / 4, in_group = lane % 4;
        for (unsigned i = 0; i < 8; i++) {
            const unsigned row = (i % 4 < 2) ? group : group + 8;
            const unsigned column = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
            a[row][column] = half_value(is_f16, in[i / 2] >> (i & 1) * 16);
        }
        for (unsigned i = 0; i < 4; i++) {
            const unsigned row = in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0);
            b[row][group] = half_value(is_f16, in[4 + i / 2] >> (i & 1) * 16);
        }
        for (unsigned i = 0; i < 4; i++) {
            sums[i < 2 ? group : group + 8][in_group * 2 + (i & 1)] = bits<float>(in[6 + i]);
        }
    }
    for (unsigned row = 0; row < 16; row++) {
        for (unsigned k = 0; k < 16; k++) {
            for (unsigned column = 0; column < 8; column++) {
                sums[row][column] += a[row][k] * b[k][column];
            }
        }
    }
    for (unsigned lane = 0; lane < WARP; lane++) {
        for (unsigned i = 0; i < 4; i++) {
            const float sum = sums[i < 2 ? lane / 4 : lane / 4 + 8][lane % 4 * 2 + (i & 1)];
            warp[lane].exchange->out[i] = bits<unsigned>(sum);
        }
    }
}

void poison_shared(size_t dynamic_bytes) {
    machine->dynamic_bytes = dynamic_bytes;
    machine->static_bytes = 0;
    machine->static_arrays.clear();
    std::memset(machine->dynamic.start + machine->dynamic.bytes - dynamic_bytes, 0xff, dynamic_bytes);
}

void run_block(const Launch& launch, Index3 block) {
    const auto [x, y, z] = launch.block;
    const unsigned num_threads = machine->num_threads = x * y * z;
    machine->threads.resize(std::max<size_t>(machine->threads.size(), num_threads));
    while (machine->stacks.size() < num_threads) {
        void* stack = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (stack == MAP_FAILED) {
            fail("no memory for a thread's stack");
        }
        machine->stacks.push_back(static_cast<unsigned char*>(stack));
    }
    poison_shared(launch.dynamic_shared_bytes);
    auto& runnable = machine->runnable;
    for (unsigned i = 0; i < num_threads; i++) {
        Thread& thread = machine->threads[i];
        thread.position = {{i % x, i / x % y, i / (x * y)}, block, launch.block, launch.grid};
        thread.groups.clear();
        thread.context.prepare(machine->stacks[i], thread_entry);
        runnable.push_back(i);
    }
    machine->done = machine->at_barrier = 0;
    while (machine->done < num_threads) {
        while (!runnable.empty()) {
            std::swap(runnable[machine->random.below(runnable.size())], runnable.back());
            machine->current = &machine->threads[runnable.back()];
            runnable.pop_back();
            Context::go(machine->scheduler, machine->current->context);
        }
        if (machine->at_barrier == num_threads) {
            machine->at_barrier = 0;
            machine->answer = machine->said;
            machine->said = false;
            for (unsigned i = 0; i < num_threads; i++) {
                runnable.push_back(i);
            }
        } else if (machine->done < num_threads) {
            fail("%u threads ended, %u wait at a barrier, and the rest for lanes of their warps that are elsewhere",
                 machine->done, machine->at_barrier);
        }
    }
}

}  // namespace

const Position& position() { return machine->current->position; }

bool barrier(bool said) {
    machine->said = machine->said || said;
    machine->at_barrier += 1;
    give_way();
    return machine->answer;
}

void meet(Meeting meeting, Exchange& exchange) {
    Thread* own = machine->current;
    const unsigned index = own - machine->threads.data();
    Thread* warp = machine->threads.data() + index / WARP * WARP;
    own->meeting = meeting;
    own->exchange = &exchange;
    unsigned& met = machine->met[index / WARP];
    met += 1;
    if (met < WARP) {
        give_way();
        return;
    }
    met = 0;
    for (unsigned lane = 0; lane < WARP; lane++) {
        if (warp[lane].meeting != meeting) {
            fail("lanes of a warp meet at different instructions");
        }
    }
    switch (meeting) {
        case Meeting::Shuffle: do_shuffle(warp); break;
        case Meeting::Ldmatrix: do_ldmatrix(warp, false); break;
        case Meeting::LdmatrixTransposed: do_ldmatrix(warp, true); break;
        case Meeting::MmaBf16: do_mma(warp, false); break;
        case Meeting::MmaF16: do_mma(warp, true); break;
    }
    for (unsigned lane = 0; lane < WARP; lane++) {
        if (warp + lane != own) {
            machine->runnable.push_back(index / WARP * WARP + lane);
        }
    }
}

void* static_shared(const void* site, size_t bytes) {
    auto [entry, is_new] = machine->static_arrays.try_emplace(site, nullptr);
    if (is_new) {
        machine->static_bytes += (bytes + 15) / 16 * 16;
        if (machine->static_bytes > MOST_STATIC_BYTES) {
            fail("%zu bytes of static shared memory", machine->static_bytes);
        }
        entry->second = machine->statics.start + machine->statics.bytes - machine->static_bytes;
        std::memset(entry->second, 0xff, (bytes + 15) / 16 * 16);
    }
    return entry->second;
}

unsigned char* dynamic_shared() {
    return machine->dynamic.start + machine->dynamic.bytes - machine->dynamic_bytes;
}

void copy_async(void* to, const void* from, bool valid) {
    check_aligned(to, 16);
    check_aligned(from, 16);
    const Copy copy{to, from, valid};
    if (machine->random.below(2) == 0) {
        copy.arrive();
    } else {
        machine->current->uncommitted.push_back(copy);
    }
}

void commit_copies() {
    machine->current->groups.push_back(std::move(machine->current->uncommitted));
    machine->current->uncommitted.clear();
}

void wait_for_copies(int pending) {
    auto& groups = machine->current->groups;
    while (groups.size() > size_t(pending)) {
        for (const Copy& copy : groups.front()) {
            copy.arrive();
        }
        groups.erase(groups.begin());
    }
}

void fail(const char* format, ...) {
    std::fprintf(stderr, "CUDA on the CPU: %s: ", kernel_name);
    va_list arguments;
    va_start(arguments, format);
    std::vfprintf(stderr, format, arguments);
    va_end(arguments);
    std::fprintf(stderr, "\n");
    std::abort();
}

void run(const char* name, const Launch& launch, const std::function<void()>& body) {
    kernel_name = name;
    const unsigned threads = launch.block.x * launch.block.y * launch.block.z;
    if (threads == 0 || threads > 1024 || threads % WARP != 0) {
        fail("%u threads a block", threads);
    }
    if (launch.grid.x == 0 || launch.grid.y == 0 || launch.grid.z == 0 || launch.grid.y > 65535 || launch.grid.z > 65535) {
        fail("a grid of %u x %u x %u", launch.grid.x, launch.grid.y, launch.grid.z);
    }
    if (launch.dynamic_shared_bytes > MOST_DYNAMIC_BYTES || launch.dynamic_shared_bytes % 16 != 0) {
        fail("%zu bytes of dynamic shared memory", launch.dynamic_shared_bytes);
    }
    if (own_machine == nullptr) {
        own_machine = std::make_unique<Machine>();
        machine = own_machine.get();
    }
    machine->random = Random(launch.seed);
    machine->body = &body;
    for (unsigned z = 0; z < launch.grid.z; z++) {
        for (unsigned y = 0; y < launch.grid.y; y++) {
            for (unsigned x = 0; x < launch.grid.x; x++) {
                run_block(launch, {x, y, z});
            }
        }
    }
    machine->current = nullptr;
}

}  // namespace cuda_on_cpu

namespace {
size_t page_bytes() { return sysconf(_SC_PAGESIZE); }
size_t padded(size_t bytes) { return (bytes + 15) / 16 * 16; }
size_t mapped(size_t bytes) { return (padded(bytes) + page_bytes() - 1) / page_bytes() * page_bytes(); }
}  // namespace

void* cuda_on_cpu_allocate(size_t bytes) {
    void* pages = mmap(nullptr, mapped(bytes) + page_bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED) {
        return nullptr;
    }
    auto* end = static_cast<unsigned char*>(pages) + mapped(bytes);
    mprotect(end, page_bytes(), PROT_NONE);
    std::memset(end - padded(bytes), 0xff, padded(bytes));
    return end - padded(bytes);
}

void cuda_on_cpu_free(void* memory, size_t bytes) {
    munmap(static_cast<unsigned char*>(memory) + padded(bytes) - mapped(bytes), mapped(bytes) + page_bytes());
}

float __half2float(__half x) {
    const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, exponent = x.bits >> 10 & 0x1f, fraction = x.bits & 0x3ff;
    if (exponent == 0) {
        const float value = std::ldexp(float(fraction), -24);
        return sign ? -value : value;
    }
    const uint32_t wide = exponent == 31 ? 0xff : exponent + 112;
    return cuda_on_cpu::bits<float>(sign | wide << 23 | fraction << 13);
}

__half __float2half_rn(float x) {
    const uint32_t bits = cuda_on_cpu::bits<uint32_t>(x);
    const uint16_t sign = bits >> 16 & 0x8000;
    if (x != x) {
        return {0x7fff};
    }
    const float magnitude = std::fabs(x);
    if (magnitude >= 65520.0f) {
        return {uint16_t(sign | 0x7c00)};
    }
    if (magnitude < 6.103515625e-05f) {
        // Subnormal: whole multiples of 2^-24, which nearbyint rounds to nearest, ties to even.
        return {uint16_t(sign | uint16_t(std::nearbyint(std::ldexp(magnitude, 24))))};
    }
    const uint32_t rounded = (bits & 0x7fffffff) + 0xfff + (bits >> 13 & 1);
    return {uint16_t(sign | ((rounded - (112u << 23)) >> 13))};
}
