// Switch between fibers by saving and restoring their registers (fiber.h).
#include "fiber.h"

namespace emulation {
#if defined(__x86_64__)

// Push the registers that a function must preserve, switch stacks, and pop the registers of the
// other stack. swapcontext() would also make a system call, for the signal mask.
extern "C" void emulation_switch(void** stack_top, void* other_top);
asm(R"(
.text
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

void Fiber::start(void* stack, size_t bytes, void (*entry)()) {
  // emulation_switch() leaves a stack of six registers and a return address. `entry` expects the
  // stack to be aligned as after a call.
  void** top = reinterpret_cast<void**>(static_cast<char*>(stack) + bytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  stack_top = top;
}
void Fiber::switch_to(Fiber& to) { emulation_switch(&stack_top, to.stack_top); }

#else

void Fiber::start(void* stack, size_t bytes, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack, context.uc_stack.ss_size = bytes;
  makecontext(&context, entry, 0);
}
void Fiber::switch_to(Fiber& to) { swapcontext(&context, &to.context); }

#endif
}  // namespace emulation
