// Threads of control that hand over to each other by name, on one thread of the system.
#pragma once
#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulation {

class Fiber {
 public:
  // Makes it begin with `entry`, which must never return. Without, it stands for what runs already.
  void start(void* stack, size_t bytes, void (*entry)());
  void switch_to(Fiber& to);  // from this one, which runs

 private:
#if defined(__x86_64__)
  void* left_at = nullptr;  // its stack's top
#else
  ucontext_t context;
#endif
};

}  // namespace emulation
