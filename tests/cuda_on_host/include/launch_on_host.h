// Launches and shared memory of csrc/cuda on the host: the macros of csrc/cuda/launch.cuh, on the emulator.
#pragma once

#include <functional>

#include "cuda_runtime_api.h"

namespace on_host {

// Runs `thread` once for each thread of the grid, as fibers.
void run(const char* name, const void* kernel, dim3 grid, dim3 block, size_t shared_bytes,
         const std::function<void()>& thread);
// Shared memory of the running block; `owner` distinguishes the arrays of a kernel.
void* static_shared(const void* owner, size_t bytes, size_t alignment);
unsigned char* dynamic_shared(size_t alignment);

template <class... P>
struct Kernel {
  const char* name;
  void (*function)(P...);
  dim3 grid, block;
  size_t shared_bytes;

  __attribute__((no_sanitize("thread"))) void operator()(P... arguments) const {
    run(name, reinterpret_cast<const void*>(function), grid, block, shared_bytes,
        [&]() __attribute__((no_sanitize("thread"))) { function(arguments...); });
  }
};

template <class... P>
Kernel<P...> launch(const char* name, dim3 grid, dim3 block, size_t shared_bytes, void (*function)(P...)) {
  return {name, function, grid, block, shared_bytes};
}

}  // namespace on_host

#define UNICODE_FAST_LAUNCH(grid, block, shared_bytes, stream, ...) \
  (static_cast<void>(stream), ::on_host::launch(#__VA_ARGS__, grid, block, shared_bytes, __VA_ARGS__))

#define UNICODE_FAST_SHARED(type, name, extent) \
  static char name##_owner;                     \
  using name##_type = type extent;              \
  name##_type& name =                           \
      *static_cast<name##_type*>(::on_host::static_shared(&name##_owner, sizeof(name##_type), alignof(name##_type)))

#define UNICODE_FAST_DYNAMIC_SHARED(name, alignment) unsigned char* const name = ::on_host::dynamic_shared(alignment)
