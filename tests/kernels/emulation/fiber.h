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
  // Let the first switch to this fiber run `entry`, which must never return. A fiber without
  // start() represents the code that runs already.
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
