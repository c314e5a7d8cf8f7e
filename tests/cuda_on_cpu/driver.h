// What the stand-ins for CUDA's libraries share: streams of work that is done when somebody waits.

#pragma once

#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "launch.h"

namespace cuda_on_cpu {

using Work = std::function<void()>;

struct Stream {
    std::deque<Work> work;
    bool is_capturing = false;
    std::thread::id capturing_thread;
    std::deque<Work> captured;
};

// One call at a time.
extern std::recursive_mutex driver_mutex;

// A stream by its handle, the default streams' small numbers included.
Stream* stream_of(void* handle);

// Adds work to a stream, or to what it captures.
void submit(Stream* stream, Work work);

// Does all of a stream's work.
void drain(Stream* stream);

[[noreturn]] void unknown(const char* name);

}  // namespace cuda_on_cpu
