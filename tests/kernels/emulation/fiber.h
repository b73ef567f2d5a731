// Fibers: threads of control that switch to each other explicitly, on one thread of the operating
// system.
#pragma once
#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulation {

class Fiber {
 public:
  // Start at `entry`, which must never return. A fiber that is not started represents the running
  // code.
  void start(void* stack, size_t bytes, void (*entry)());
  void switch_to(Fiber& to);  // from this fiber, which must be running

 private:
#if defined(__x86_64__)
  void* stack_top = nullptr;  // top of the stack while the fiber waits
#else
  ucontext_t context;
#endif
};

}  // namespace emulation
