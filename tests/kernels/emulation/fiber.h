// Threads of control that hand over to each other by name, on one thread of the system.
#pragma once
#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulation {

class Fiber {
 public:
  // Of what runs now; or one that will begin with `entry` on this stack, which must never return.
  Fiber() = default;
  Fiber(void* stack, size_t bytes, void (*entry)());
  void switch_to(Fiber& to);

 private:
#if defined(__x86_64__)
  void* left_at = nullptr;  // its stack's top
#else
  ucontext_t context;
#endif
  const void* stack = nullptr;
  size_t bytes = 0;
};

#if defined(__x86_64__)
// What a function must preserve goes on the stack that is left; it is found on the one that is
// taken up. swapcontext() does the same with two system calls.
extern "C" void emulation_switch(void** left_at, void* taken_up);
asm(R"(
.text
.weak emulation_switch
emulation_switch:
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
)");
#endif

}  // namespace emulation
