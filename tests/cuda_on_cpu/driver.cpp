// A stand-in for libcuda: the part of CUDA's driver that candle, cudarc and this project call, over the emulation of
// cuda_on_cpu.h. It runs the whole `--features cuda` program where there is no GPU. It says nothing about speed.
//
// A stream's work is done as late as CUDA allows: when somebody waits for it. Pinned memory is read and written then, so
// a host that touches it too early finds out. Memory begins as NaN, ends at a page that nobody may touch, and is unmapped
// when it is freed. CUDA_ON_CPU_MEMORY (bytes, 8 GiB) is the device's memory, CUDA_ON_CPU_DEVICES (1) their number.
// Signatures and constants: cuda.h of CUDA 13.0.

#include "driver.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using namespace cuda_on_cpu;

enum Result {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    INVALID_DEVICE = 101,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    STREAM_CAPTURE_UNSUPPORTED = 900,
};

size_t setting(const char* name, size_t otherwise) {
    const char* value = std::getenv(name);
    return value == nullptr ? otherwise : std::strtoull(value, nullptr, 10);
}

struct Graph {
    std::vector<Work> work;
};

struct Event {
    // Records that are still to come true.
    int pending = 0;
    Stream* stream = nullptr;
};

struct Function {
    std::string name;
    size_t dynamic_shared_bytes = 48 << 10;
};

struct Module {
    std::map<std::string, Function> functions;
};

struct Allocation {
    size_t bytes;
    bool on_device;
};

Stream default_stream, per_thread_stream;
std::vector<Stream*> streams{&default_stream, &per_thread_stream};
std::map<void*, Allocation> allocations;
size_t allocated_bytes = 0;
uint64_t launches = 0;
thread_local void* current_context = nullptr;

// Contexts and devices are told apart by address.
int contexts[64];

void* allocate(size_t bytes, bool on_device) {
    void* memory = cuda_on_cpu_allocate(bytes);
    if (memory != nullptr) {
        allocations[memory] = {bytes, on_device};
        allocated_bytes += on_device ? bytes : 0;
    }
    return memory;
}

void release(void* memory) {
    const auto allocation = allocations.find(memory);
    if (allocation == allocations.end()) {
        fail("%p is freed but was not allocated", memory);
    }
    allocated_bytes -= allocation->second.on_device ? allocation->second.bytes : 0;
    cuda_on_cpu_free(memory, allocation->second.bytes);
    allocations.erase(allocation);
}

// Whether all of it is ours; `what` is for the message.
void check_range(const void* memory, size_t bytes, const char* what) {
    auto next = allocations.upper_bound(const_cast<void*>(memory));
    if (bytes == 0) {
        return;
    }
    if (next != allocations.begin()) {
        const auto& [start, allocation] = *--next;
        const size_t offset = static_cast<const char*>(memory) - static_cast<char*>(start);
        if (offset + bytes <= allocation.bytes) {
            return;
        }
    }
    fail("%s: %zu bytes at %p are not all allocated", what, bytes, memory);
}

bool is_pinned(const void* memory) {
    auto next = allocations.upper_bound(const_cast<void*>(memory));
    if (next == allocations.begin()) {
        return false;
    }
    const auto& [start, allocation] = *--next;
    return !allocation.on_device && static_cast<const char*>(memory) < static_cast<char*>(start) + allocation.bytes;
}

void drain_all() {
    for (Stream* stream : streams) {
        drain(stream);
    }
}

bool captures_here() {
    for (const Stream* stream : streams) {
        if (stream->is_capturing && stream->capturing_thread == std::this_thread::get_id()) {
            return true;
        }
    }
    return false;
}

}  // namespace

namespace cuda_on_cpu {

std::recursive_mutex driver_mutex;

Stream* stream_of(void* handle) {
    switch (reinterpret_cast<uintptr_t>(handle)) {
        case 0:
        case 1: return &default_stream;
        case 2: return &per_thread_stream;
        default: return static_cast<Stream*>(handle);
    }
}

void submit(Stream* stream, Work work) { (stream->is_capturing ? stream->captured : stream->work).push_back(std::move(work)); }

void drain(Stream* stream) {
    while (!stream->work.empty()) {
        // Taken out first: work may wait for an event of its own stream.
        const Work work = std::move(stream->work.front());
        stream->work.pop_front();
        work();
    }
}

void unknown(const char* name) { fail("%s is not emulated", name); }

}  // namespace cuda_on_cpu

#define LOCK const std::lock_guard<std::recursive_mutex> lock(driver_mutex)
// What the driver refuses to a thread that captures a stream (CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).
#define NOT_IN_CAPTURE                     \
    if (captures_here()) {                 \
        return STREAM_CAPTURE_UNSUPPORTED; \
    }

// Devices and contexts.

EXPORT int cuInit(unsigned) { return SUCCESS; }
EXPORT int cuDeviceGetCount(int* count) {
    *count = int(setting("CUDA_ON_CPU_DEVICES", 1));
    return SUCCESS;
}
EXPORT int cuDeviceGet(int* device, int ordinal) {
    if (ordinal < 0 || size_t(ordinal) >= setting("CUDA_ON_CPU_DEVICES", 1)) {
        return INVALID_DEVICE;
    }
    *device = ordinal;
    return SUCCESS;
}
EXPORT int cuDeviceGetName(char* name, int length, int) {
    std::snprintf(name, length, "CUDA on the CPU (no GPU)");
    return SUCCESS;
}
EXPORT int cuDeviceGetUuid_v2(char* uuid, int device) {
    std::memset(uuid, device, 16);
    return SUCCESS;
}
EXPORT int cuDeviceTotalMem_v2(size_t* bytes, int) {
    *bytes = setting("CUDA_ON_CPU_MEMORY", size_t(8) << 30);
    return SUCCESS;
}
EXPORT int cuDeviceGetAttribute(int* value, int attribute, int) {
    switch (attribute) {
        case 1: *value = 1024; break;           // threads a block
        case 10: *value = 32; break;            // lanes a warp
        case 16: *value = 132; break;           // multiprocessors
        case 75: *value = 9; break;             // compute capability
        case 76: *value = 0; break;
        case 97: *value = 227 << 10; break;     // shared memory a block, opted in
        case 115: *value = 1; break;            // memory pools
        default: fail("device attribute %d is not emulated", attribute);
    }
    return SUCCESS;
}
EXPORT int cuDevicePrimaryCtxRetain(void** context, int device) {
    *context = &contexts[device];
    return SUCCESS;
}
EXPORT int cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
EXPORT int cuCtxGetCurrent(void** context) {
    *context = current_context;
    return SUCCESS;
}
EXPORT int cuCtxSetCurrent(void* context) {
    current_context = context;
    return SUCCESS;
}
EXPORT int cuCtxSynchronize() {
    LOCK;
    NOT_IN_CAPTURE
    drain_all();
    return SUCCESS;
}
EXPORT int cuGetErrorName(int error, const char** name) {
    switch (error) {
        case SUCCESS: *name = "CUDA_SUCCESS"; break;
        case INVALID_VALUE: *name = "CUDA_ERROR_INVALID_VALUE"; break;
        case OUT_OF_MEMORY: *name = "CUDA_ERROR_OUT_OF_MEMORY"; break;
        case INVALID_DEVICE: *name = "CUDA_ERROR_INVALID_DEVICE"; break;
        case INVALID_HANDLE: *name = "CUDA_ERROR_INVALID_HANDLE"; break;
        case NOT_FOUND: *name = "CUDA_ERROR_NOT_FOUND"; break;
        case NOT_READY: *name = "CUDA_ERROR_NOT_READY"; break;
        case STREAM_CAPTURE_UNSUPPORTED: *name = "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"; break;
        default: return INVALID_VALUE;
    }
    return SUCCESS;
}
EXPORT int cuGetErrorString(int error, const char** name) { return cuGetErrorName(error, name); }

// Memory.

EXPORT int cuMemGetInfo_v2(size_t* free_bytes, size_t* total_bytes) {
    LOCK;
    cuDeviceTotalMem_v2(total_bytes, 0);
    *free_bytes = *total_bytes - allocated_bytes;
    return SUCCESS;
}
EXPORT int cuDeviceGetDefaultMemPool(void** pool, int device) {
    *pool = &contexts[device];
    return SUCCESS;
}
EXPORT int cuMemPoolSetAttribute(void*, int, void*) { return SUCCESS; }
EXPORT int cuMemPoolGetAttribute(void*, int, void* value) {
  *static_cast<uint64_t*>(value) = 0;  // nothing is held back
  return SUCCESS;
}
EXPORT int cuMemAlloc_v2(uint64_t* address, size_t bytes) {
    LOCK;
    NOT_IN_CAPTURE
    size_t free_bytes, total_bytes;
    cuMemGetInfo_v2(&free_bytes, &total_bytes);
    if (bytes == 0) {
        return INVALID_VALUE;
    }
    if (bytes > free_bytes) {
        // What is freed on a stream counts until the stream gets there; the driver waits for it as well.
        drain_all();
        cuMemGetInfo_v2(&free_bytes, &total_bytes);
    }
    void* memory = bytes > free_bytes ? nullptr : allocate(bytes, true);
    *address = reinterpret_cast<uint64_t>(memory);
    return memory == nullptr ? OUT_OF_MEMORY : SUCCESS;
}
EXPORT int cuMemAllocAsync(uint64_t* address, size_t bytes, void* stream) {
    LOCK;
    if (stream_of(stream)->is_capturing) {
        fail("memory is allocated while the stream is captured");
    }
    return cuMemAlloc_v2(address, bytes);
}
EXPORT int cuMemFree_v2(uint64_t address) {
    LOCK;
    NOT_IN_CAPTURE
    drain_all();
    release(reinterpret_cast<void*>(address));
    return SUCCESS;
}
EXPORT int cuMemFreeAsync(uint64_t address, void* stream) {
    LOCK;
    if (stream_of(stream)->is_capturing) {
        fail("memory is freed while the stream is captured");
    }
    submit(stream_of(stream), [=] { release(reinterpret_cast<void*>(address)); });
    return SUCCESS;
}
EXPORT int cuMemHostAlloc(void** memory, size_t bytes, unsigned) {
    LOCK;
    NOT_IN_CAPTURE
    *memory = allocate(bytes, false);
    return *memory == nullptr ? OUT_OF_MEMORY : SUCCESS;
}
EXPORT int cuMemFreeHost(void* memory) {
    LOCK;
    NOT_IN_CAPTURE
    drain_all();
    release(memory);
    return SUCCESS;
}
EXPORT int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void* stream) {
    LOCK;
    check_range(reinterpret_cast<void*>(to), bytes, "copy to the device");
    if (stream_of(stream)->is_capturing) {
        fail("a copy from the host is captured: it would be the same bytes each time");
    }
    if (is_pinned(from)) {
        submit(stream_of(stream), [=] { std::memcpy(reinterpret_cast<void*>(to), from, bytes); });
    } else {
        // Pageable memory is the caller's again when the call returns.
        const auto* begin = static_cast<const char*>(from);
        const auto copy = std::make_shared<std::vector<char>>(begin, begin + bytes);
        submit(stream_of(stream), [=] { std::memcpy(reinterpret_cast<void*>(to), copy->data(), bytes); });
    }
    return SUCCESS;
}
EXPORT int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void* stream) {
    LOCK;
    check_range(reinterpret_cast<void*>(from), bytes, "copy to the host");
    if (stream_of(stream)->is_capturing) {
        fail("a copy to the host is captured");
    }
    submit(stream_of(stream), [=] { std::memcpy(to, reinterpret_cast<void*>(from), bytes); });
    if (!is_pinned(to)) {
        drain(stream_of(stream));
    }
    return SUCCESS;
}
EXPORT int cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t bytes) {
    LOCK;
    NOT_IN_CAPTURE
    drain_all();
    check_range(reinterpret_cast<void*>(to), bytes, "copy to the device");
    std::memcpy(reinterpret_cast<void*>(to), from, bytes);
    return SUCCESS;
}
EXPORT int cuMemcpyDtoH_v2(void* to, uint64_t from, size_t bytes) {
    LOCK;
    NOT_IN_CAPTURE
    drain_all();
    check_range(reinterpret_cast<void*>(from), bytes, "copy to the host");
    std::memcpy(to, reinterpret_cast<void*>(from), bytes);
    return SUCCESS;
}
EXPORT int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void* stream) {
    LOCK;
    check_range(reinterpret_cast<void*>(from), bytes, "copy on the device");
    check_range(reinterpret_cast<void*>(to), bytes, "copy on the device");
    submit(stream_of(stream), [=] { std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes); });
    return SUCCESS;
}
EXPORT int cuMemsetD8Async(uint64_t to, unsigned char value, size_t bytes, void* stream) {
    LOCK;
    check_range(reinterpret_cast<void*>(to), bytes, "memset");
    submit(stream_of(stream), [=] { std::memset(reinterpret_cast<void*>(to), value, bytes); });
    return SUCCESS;
}

// Streams, events and graphs.

EXPORT int cuStreamCreate(void** stream, unsigned) {
    LOCK;
    streams.push_back(new Stream);
    *stream = streams.back();
    return SUCCESS;
}
EXPORT int cuStreamDestroy_v2(void* handle) {
    LOCK;
    Stream* stream = stream_of(handle);
    drain(stream);
    for (size_t i = 0; i < streams.size(); i++) {
        if (streams[i] == stream) {
            streams.erase(streams.begin() + i);
            delete stream;
            return SUCCESS;
        }
    }
    return INVALID_HANDLE;
}
EXPORT int cuStreamSynchronize(void* stream) {
    LOCK;
    if (stream_of(stream)->is_capturing) {
        return STREAM_CAPTURE_UNSUPPORTED;
    }
    drain(stream_of(stream));
    return SUCCESS;
}
EXPORT int cuEventCreate(void** event, unsigned) {
    *event = new Event;
    return SUCCESS;
}
EXPORT int cuEventDestroy_v2(void* handle) {
    LOCK;
    auto* event = static_cast<Event*>(handle);
    if (event->pending > 0) {
        drain(event->stream);
    }
    delete event;
    return SUCCESS;
}
EXPORT int cuEventRecord(void* handle, void* stream) {
    LOCK;
    auto* event = static_cast<Event*>(handle);
    if (stream_of(stream)->is_capturing) {
        fail("an event is recorded while the stream is captured");
    }
    event->pending += 1;
    event->stream = stream_of(stream);
    submit(event->stream, [=] { event->pending -= 1; });
    return SUCCESS;
}
EXPORT int cuEventQuery(void* handle) {
    LOCK;
    auto* event = static_cast<Event*>(handle);
    if (event->pending == 0) {
        return SUCCESS;
    }
    // The next time it is asked: work goes on while nobody waits.
    drain(event->stream);
    return NOT_READY;
}
EXPORT int cuEventSynchronize(void* handle) {
    LOCK;
    auto* event = static_cast<Event*>(handle);
    if (event->pending > 0) {
        drain(event->stream);
    }
    return SUCCESS;
}
EXPORT int cuEventElapsedTime(float* milliseconds, void*, void*) {
    *milliseconds = 1.0f;
    return SUCCESS;
}
EXPORT int cuEventElapsedTime_v2(float* milliseconds, void*, void*) {
    *milliseconds = 1.0f;
    return SUCCESS;
}
EXPORT int cuStreamWaitEvent(void* stream, void* handle, unsigned) {
    LOCK;
    auto* event = static_cast<Event*>(handle);
    if (stream_of(stream)->is_capturing) {
        fail("a captured stream waits for an event");
    }
    if (event->pending > 0 && event->stream != stream_of(stream)) {
        drain(event->stream);
    }
    return SUCCESS;
}
EXPORT int cuStreamBeginCapture_v2(void* handle, int mode) {
    LOCK;
    Stream* stream = stream_of(handle);
    if (mode != 1) {
        fail("capture mode %d is not emulated", mode);
    }
    if (stream->is_capturing || stream == &default_stream) {
        return STREAM_CAPTURE_UNSUPPORTED;
    }
    stream->is_capturing = true;
    stream->capturing_thread = std::this_thread::get_id();
    return SUCCESS;
}
EXPORT int cuStreamIsCapturing(void* stream, int* status) {
    LOCK;
    *status = stream_of(stream)->is_capturing ? 1 : 0;
    return SUCCESS;
}
EXPORT int cuStreamEndCapture(void* handle, void** graph) {
    LOCK;
    Stream* stream = stream_of(handle);
    if (!stream->is_capturing) {
        return INVALID_VALUE;
    }
    stream->is_capturing = false;
    *graph = new Graph{{stream->captured.begin(), stream->captured.end()}};
    stream->captured.clear();
    return SUCCESS;
}
EXPORT int cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long) {
    *executable = new Graph(*static_cast<Graph*>(graph));
    return SUCCESS;
}
EXPORT int cuGraphUpload(void*, void*) { return SUCCESS; }
EXPORT int cuGraphLaunch(void* executable, void* stream) {
    LOCK;
    for (const Work& work : static_cast<Graph*>(executable)->work) {
        submit(stream_of(stream), work);
    }
    return SUCCESS;
}
EXPORT int cuGraphDestroy(void* graph) {
    delete static_cast<Graph*>(graph);
    return SUCCESS;
}
EXPORT int cuGraphExecDestroy(void* executable) {
    LOCK;
    drain_all();
    delete static_cast<Graph*>(executable);
    return SUCCESS;
}

// Kernels.

EXPORT int cuModuleLoadData(void** module, const void* image) {
    if (image == nullptr) {
        return INVALID_VALUE;
    }
    *module = new Module;
    return SUCCESS;
}
EXPORT int cuModuleUnload(void* module) {
    LOCK;
    drain_all();
    delete static_cast<Module*>(module);
    return SUCCESS;
}
EXPORT int cuModuleGetFunction(void** function, void* module, const char* name) {
    LOCK;
    if (!cuda_on_cpu_has(name)) {
        std::fprintf(stderr, "CUDA on the CPU: no kernel is called %s\n", name);
        return NOT_FOUND;
    }
    auto [entry, is_new] = static_cast<Module*>(module)->functions.try_emplace(name);
    entry->second.name = name;
    *function = &entry->second;
    return SUCCESS;
}
EXPORT int cuFuncSetAttribute(void* function, int attribute, int value) {
    LOCK;
    if (attribute != 8) {
        fail("function attribute %d is not emulated", attribute);
    }
    if (value < 0 || value > 227 << 10) {
        return INVALID_VALUE;
    }
    static_cast<Function*>(function)->dynamic_shared_bytes = value;
    return SUCCESS;
}
EXPORT int cuLaunchKernel(void* handle, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                          unsigned block_y, unsigned block_z, unsigned shared_bytes, void* stream, void** arguments,
                          void**) {
    LOCK;
    const auto* function = static_cast<Function*>(handle);
    if (shared_bytes > function->dynamic_shared_bytes || grid_x == 0 || grid_y == 0 || grid_z == 0) {
        std::fprintf(stderr, "CUDA on the CPU: %s: a grid of %u x %u x %u, %u bytes of shared memory\n",
                     function->name.c_str(), grid_x, grid_y, grid_z, shared_bytes);
        return INVALID_VALUE;
    }
    launches += 1;
    submit(stream_of(stream), bind(function->name.c_str(),
                                   {{grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared_bytes, launches}, arguments));
    return SUCCESS;
}

// The runtime library: candle's quantized and mixture-of-experts kernels register themselves when a program starts. Nothing here
// calls them, so they are not kept, and to launch one ends the program (`__cudaLaunchKernel` is only a name).

EXPORT void** __cudaRegisterFatBinary(void*) {
    static void* handle;
    return &handle;
}

EXPORT void __cudaRegisterFatBinaryEnd(void**) {}

EXPORT void __cudaUnregisterFatBinary(void**) {}

EXPORT void __cudaRegisterFunction(void**, const char*, char*, const char*, int, void*, void*, void*, void*, int*) {}

EXPORT void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
