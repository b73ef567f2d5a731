// See README.md. What is global here is of the one grid that runs.
#include "simt.h"

#include <link.h>
#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "cuda_runtime.h"
#include "fiber.h"

emulation::Index threadIdx, blockIdx, blockDim, gridDim;
namespace fastkd::cuda {
// The ring's `extern __shared__`.
alignas(128) thread_local unsigned char dynamic[emulation::kMostDynamicBytes];
}  // namespace fastkd::cuda

namespace emulation {
namespace {

constexpr unsigned char kUndefined = 0xff;  // bytes of NaNs, and of -1
constexpr size_t kStackBytes = 256 * 1024;  // of which few pages are ever touched
constexpr int kIdleTurns = 200000;          // of threads that only sleep: then nothing will happen

// ---- chance

std::mt19937_64& random_numbers() {
  static const char* seed = std::getenv("EMULATION_SEED");
  static std::mt19937_64 numbers(seed == nullptr ? 1 : std::strtoull(seed, nullptr, 10));
  return numbers;
}
size_t draw(size_t below) { return below < 2 ? 0 : random_numbers()() % below; }

// ---- the state of a cluster

// Why a thread waits: until a counter leaves a value, or its last bit does.
struct Wait {
  const char* what = nullptr;
  Place place;
  const uint64_t* counter = nullptr;
  uint64_t value = 0, bits = ~uint64_t(0);
  bool sleeps = false;
  bool over() const { return counter == nullptr || (*counter & bits) != value; }
};

struct Cta;
struct Warp;
struct Thread {
  Fiber fiber;
  Cta* cta;
  Warp* warp;
  Index index;
  unsigned lane;
  bool ended = false;
  Wait wait;
};

// Threads that come together. The turn is over when as many have arrived as are expected.
struct Meeting {
  int arrived = 0;
  uint64_t turn = 0;
};
// Lanes that come together, and what they bring. A lane may be a turn ahead of those that still
// have to read: hence two of each.
struct WarpMeeting {
  const char* what = nullptr;
  unsigned mask = 0, arrived = 0;
  uint64_t turn = 0;
  uint64_t brought[2][32];
};
struct Warp {
  Thread* lanes[32];
  unsigned alive = ~0u;
  WarpMeeting meeting;
};
struct Barrier {
  int count = 0, missing = 0;
  int64_t bytes = 0;   // announced, and not yet here
  uint64_t phase = 0;  // how many are over
};
struct Cta {
  int rank, alive;
  Index index;
  std::deque<Thread> threads;
  std::deque<Warp> warps;
  Meeting all;
  std::map<int, Meeting> some;
  std::map<uint32_t, Barrier> barriers;  // by their addresses
  std::vector<unsigned char> shared;     // while another CTA's is in place
};
struct Copy {
  Cta* cta;
  uint32_t to;
  const void* from;
  uint32_t bytes;
  Barrier* barrier;
};

const Launch* launched = nullptr;
const std::function<void()>* kernel_of_threads = nullptr;
std::deque<Cta> cluster;
Meeting cluster_meeting;
int cluster_alive = 0;
std::vector<Copy> copies;
Cta* in_place = nullptr;  // whose shared memory the kernels see
Thread* running = nullptr;
Fiber scheduler;
uint64_t events = 0;  // whatever is no sleep

// ---- shared memory: the thread-local variables of the program, that is all `__shared__` ones

struct Block {
  unsigned char* begin = nullptr;
  size_t bytes = 0;
};
Block find_shared() {
  Block block;
  fastkd::cuda::dynamic[0] = kUndefined;  // makes it exist
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* found) {
        for (int i = 0; i < info->dlpi_phnum; i++)
          if (info->dlpi_phdr[i].p_type == PT_TLS)
            *static_cast<Block*>(found) = {static_cast<unsigned char*>(info->dlpi_tls_data),
                                           info->dlpi_phdr[i].p_memsz};
        return 1;  // the program comes first
      },
      &block);
  return block;
}
const Block& shared() {
  static const Block block = find_shared();
  return block;
}
// The parts in use: all but the end of the dynamic one.
template <class Fn>
void each_part(Fn&& fn) {
  const size_t dynamic = static_cast<size_t>(fastkd::cuda::dynamic - shared().begin);
  fn(size_t(0), dynamic + launched->dynamic_bytes);
  fn(dynamic + kMostDynamicBytes, shared().bytes);
}
void put_in_place(Cta& cta) {
  if (in_place == &cta) return;
  each_part([&](size_t begin, size_t end) {
    if (in_place != nullptr)
      std::memcpy(&in_place->shared[begin], shared().begin + begin, end - begin);
    std::memcpy(shared().begin + begin, &cta.shared[begin], end - begin);
  });
  in_place = &cta;
}
// An address is the offset in the block, and 1 + the rank of the CTA above it.
constexpr int kRankShift = 24;
Cta& cta_of(uint32_t address) {
  const size_t rank = address >> kRankShift;
  if (rank < 1 || rank > cluster.size()) fail("address %x is in no CTA's shared memory", address);
  return cluster[rank - 1];
}
unsigned char* bytes_at(uint32_t address, size_t bytes) {
  Cta& cta = cta_of(address);
  const size_t offset = address & ((1u << kRankShift) - 1);
  bool inside = false;
  each_part([&](size_t begin, size_t end) { inside |= offset >= begin && offset + bytes <= end; });
  if (!inside) fail("%zu bytes at address %x are outside of shared memory", bytes, address);
  return (in_place == &cta ? shared().begin : cta.shared.data()) + offset;
}
Barrier& barrier_at(uint32_t address) {
  Cta& cta = cta_of(address);
  const auto found = cta.barriers.find(address);
  if (found == cta.barriers.end()) fail("no barrier was made at address %x", address);
  return found->second;
}
void settle(Barrier& barrier) {
  if (barrier.missing < 0) fail("a barrier of %d had more arrivals", barrier.count);
  if (barrier.missing > 0 || barrier.bytes != 0) return;
  barrier.missing = barrier.count;
  barrier.phase++;
  events++;
}
void complete(size_t which) {
  const Copy copy = copies[which];
  copies[which] = copies.back();
  copies.pop_back();
  std::memcpy(bytes_at(copy.to, copy.bytes), copy.from, copy.bytes);
  copy.barrier->bytes -= copy.bytes;
  if (copy.barrier->bytes < 0) fail("more bytes arrived at a barrier than it expects");
  settle(*copy.barrier);
  events++;
}

// ---- meetings

// Whoever runs gives way until the wait is over.
void wait_for(Wait wait) {
  running->wait = wait;
  do {
    running->fiber.switch_to(scheduler);
  } while (!running->wait.over());
  running->wait = Wait();
}
void end_turn(Meeting& meeting, int expected) {
  if (meeting.arrived < expected || meeting.arrived == 0) return;
  meeting.arrived = 0;
  meeting.turn++;
  events++;
}
void meet(const char* what, Meeting& meeting, int expected, Place place) {
  const uint64_t turn = meeting.turn;
  meeting.arrived++;
  end_turn(meeting, expected);
  if (meeting.turn == turn) wait_for({what, place, &meeting.turn, turn});
}
void end_turn(Warp& warp) {
  WarpMeeting& meeting = warp.meeting;
  if (meeting.arrived == 0 || (meeting.mask & warp.alive & ~meeting.arrived) != 0) return;
  meeting.arrived = 0;
  meeting.turn++;
  events++;
}

// A thread, from beginning to end.
void live() {
  (*kernel_of_threads)();
  Thread& self = *running;
  self.ended = true;
  self.warp->alive &= ~(1u << self.lane);
  // Who has ended is waited for by nobody.
  end_turn(*self.warp);
  end_turn(self.cta->all, --self.cta->alive);
  end_turn(cluster_meeting, --cluster_alive);
  events++;
  self.fiber.switch_to(scheduler);
}

// ---- the scheduler

bool is_ready(const Thread& thread) { return !thread.ended && thread.wait.over(); }
bool is_ready(const Warp& warp) {
  for (const Thread* lane : warp.lanes)
    if (lane != nullptr && is_ready(*lane)) return true;
  return false;
}
// A warp of this CTA that can go on: the first from a random one on, or null.
Warp* ready_warp(Cta& cta) {
  const size_t count = cta.warps.size(), first = draw(count);
  for (size_t i = 0; i < count; i++) {
    Warp& warp = cta.warps[(first + i) % count];
    if (warp.alive != 0 && is_ready(warp)) return &warp;
  }
  return nullptr;
}
Warp* ready_warp() {
  const size_t count = cluster.size();
  // To go on with the same CTA is cheap.
  size_t first = draw(8) == 0 ? draw(count) : static_cast<size_t>(in_place->rank);
  for (size_t i = 0; i < count; i++) {
    Cta& cta = cluster[(first + i) % count];
    Warp* warp = cta.alive > 0 ? ready_warp(cta) : nullptr;
    if (warp != nullptr) return warp;
  }
  return nullptr;
}
// Every lane that can, from a random one on, upwards or downwards.
void run(Warp& warp) {
  const unsigned first = static_cast<unsigned>(draw(64));
  for (unsigned i = 0; i < 32; i++) {
    Thread* thread = warp.lanes[(first & 32 ? first - i : first + i) % 32];
    if (thread == nullptr || !is_ready(*thread)) continue;
    put_in_place(*thread->cta);
    running = thread;
    threadIdx = thread->index;
    blockIdx = thread->cta->index;
    scheduler.switch_to(thread->fiber);
    running = nullptr;
  }
}
[[noreturn]] void report_deadlock(const char* what) {
  std::printf("FAIL %s: these wait\n", what);
  std::map<std::tuple<unsigned, std::string, int, std::string>, std::vector<unsigned>> waiting;
  for (const Cta& cta : cluster)
    for (const Thread& t : cta.threads)
      if (!t.ended)
        waiting[{cta.index.x, t.wait.place.file, t.wait.place.line,
                 t.wait.what == nullptr ? "" : t.wait.what}]
            .push_back(t.index.x);
  for (const auto& [at, threads] : waiting)
    std::printf("  CTA %u: %zu threads from %u to %u in %s, %s:%d\n", std::get<0>(at),
                threads.size(), threads.front(), threads.back(), std::get<3>(at).c_str(),
                std::get<1>(at).c_str(), std::get<2>(at));
  std::fflush(stdout);
  std::_Exit(98);
}
void run_cluster() {
  int idle = 0;
  while (cluster_alive > 0) {
    if (!copies.empty() && draw(16) == 0) complete(draw(copies.size()));
    const uint64_t before = events;
    Warp* warp = ready_warp();
    if (warp != nullptr) {
      run(*warp);
    } else if (!copies.empty()) {
      complete(draw(copies.size()));
    } else {
      report_deadlock("deadlock");
    }
    idle = events == before ? idle + 1 : 0;
    if (idle > kIdleTurns) report_deadlock("nothing happens any more");
  }
  if (!copies.empty()) fail("a CTA has ended before a copy into it");
  for (const Cta& cta : cluster)
    for (const auto& [address, barrier] : cta.barriers)
      if (barrier.bytes != 0) fail("a barrier still expects bytes at the end");
}

// Stacks are kept from launch to launch.
void* stack_of(size_t thread) {
  static std::vector<void*> stacks;
  while (stacks.size() <= thread) {
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) fail("no memory for a stack");
    mprotect(stack, 4096, PROT_NONE);  // what overflows, ends
    stacks.push_back(stack);
  }
  return stacks[thread];
}
void make_cluster(Index first) {
  cluster.clear();
  cluster_meeting = Meeting();
  in_place = nullptr;
  const int threads = static_cast<int>(launched->block.x);
  cluster_alive = threads * launched->cluster;
  size_t stack = 0;
  for (int rank = 0; rank < launched->cluster; rank++) {
    Cta& cta = cluster.emplace_back();
    cta.rank = rank, cta.alive = threads;
    cta.index = {first.x + static_cast<unsigned>(rank), first.y, 0};
    cta.shared.assign(shared().bytes, kUndefined);
    for (int i = 0; i < threads; i++) {
      if (i % 32 == 0) cta.warps.push_back({});
      Warp& warp = cta.warps.back();
      const unsigned lane = static_cast<unsigned>(i % 32);
      cta.threads.push_back({Fiber(stack_of(stack++), kStackBytes, live), &cta, &warp,
                             Index{static_cast<unsigned>(i), 0, 0}, lane, false, Wait()});
      warp.lanes[lane] = &cta.threads.back();
    }
    if (threads % 32 != 0) cta.warps.back().alive = (1u << threads % 32) - 1;
  }
  put_in_place(cluster[draw(cluster.size())]);
}

}  // namespace

void run(const Launch& launch, const std::function<void()>& kernel) {
  launched = &launch, kernel_of_threads = &kernel;
  blockDim = launch.block, gridDim = launch.grid;
  // The clusters of a grid know nothing of each other: one after the other, in any order.
  std::vector<Index> firsts;
  for (unsigned y = 0; y < launch.grid.y; y++)
    for (unsigned x = 0; x < launch.grid.x; x += static_cast<unsigned>(launch.cluster))
      firsts.push_back({x, y, 0});
  std::shuffle(firsts.begin(), firsts.end(), random_numbers());
  for (const Index& first : firsts) {
    make_cluster(first);
    run_cluster();
  }
  cluster.clear();
  in_place = nullptr, launched = nullptr;
  check_guards();
}

void fail(const char* format, ...) {
  std::va_list arguments;
  va_start(arguments, format);
  std::printf("FAIL ");
  std::vprintf(format, arguments);
  va_end(arguments);
  if (running != nullptr)
    std::printf(" (thread %u of CTA %u, last seen at %s:%d)", running->index.x,
                running->cta->index.x, running->wait.place.file, running->wait.place.line);
  std::printf("\n");
  std::fflush(stdout);
  std::_Exit(97);
}

int rank_in_cluster() { return running->cta->rank; }
int ranks_in_cluster() { return launched->cluster; }

void yield(bool sleeps, Place place) {
  if (running == nullptr) return;
  Wait wait;
  wait.what = sleeps ? "__nanosleep" : "no wait", wait.place = place, wait.sleeps = sleeps;
  wait_for(wait);
  if (!sleeps) events++;
}

const uint64_t* meet_warp(const char* what, unsigned mask, uint64_t mine, Place place) {
  Warp& warp = *running->warp;
  WarpMeeting& meeting = warp.meeting;
  if (!(mask >> running->lane & 1))
    fail("%s at %s:%d by a lane outside of its mask", what, place.file, place.line);
  if (meeting.arrived != 0 && (std::strcmp(meeting.what, what) != 0 || meeting.mask != mask))
    fail("%s at %s:%d meets %s", what, place.file, place.line, meeting.what);
  const uint64_t turn = meeting.turn;
  meeting.what = what, meeting.mask = mask;
  meeting.arrived |= 1u << running->lane;
  uint64_t* brought = meeting.brought[turn % 2];
  brought[running->lane] = mine;
  end_turn(warp);
  if (meeting.turn == turn) wait_for({what, place, &meeting.turn, turn});
  return brought;
}
void meet_block(Place place) {
  meet("__syncthreads", running->cta->all, running->cta->alive, place);
}
void meet_some(int barrier, int threads, Place place) {
  meet("a named barrier", running->cta->some[barrier], threads, place);
}
void meet_cluster(Place place) {
  meet("the cluster's barrier", cluster_meeting, cluster_alive, place);
}

uint32_t shared_address_of(const void* p) {
  const auto* byte = static_cast<const unsigned char*>(p);
  if (byte < shared().begin || byte >= shared().begin + shared().bytes)
    fail("%p is not in shared memory", p);
  return static_cast<uint32_t>(byte - shared().begin) |
         static_cast<uint32_t>(running->cta->rank + 1) << kRankShift;
}
uint32_t address_in(uint32_t address, int rank) {
  return (address & ((1u << kRankShift) - 1)) | static_cast<uint32_t>(rank + 1) << kRankShift;
}
void store_to_peer(uint32_t address, const void* from, size_t bytes, Place place) {
  yield(false, place);
  if (cta_of(address).alive == 0) fail("a store into a CTA that has ended");
  std::memcpy(bytes_at(address, bytes), from, bytes);
}

void barrier_init(uint32_t barrier, int count, Place) {
  bytes_at(barrier, sizeof(uint64_t));
  cta_of(barrier).barriers[barrier] = {count, count, 0, 0};
}
void barrier_arrive(uint32_t barrier, Place place) {
  if (draw(4) == 0) yield(false, place);
  if (cta_of(barrier).alive == 0) fail("an arrival in a CTA that has ended");
  Barrier& at = barrier_at(barrier);
  at.missing--;
  settle(at);
  if (draw(4) == 0) yield(false, place);
}
void barrier_expect(uint32_t barrier, uint32_t bytes, Place place) {
  barrier_at(barrier).bytes += bytes;
  barrier_arrive(barrier, place);
}
void barrier_wait(uint32_t barrier, uint32_t parity, Place place) {
  const Barrier& at = barrier_at(barrier);
  if ((at.phase & 1) == parity) wait_for({"barrier_wait", place, &at.phase, parity, 1});
}
void copy_later(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier, Place place) {
  if (bytes == 0 || bytes % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0 ||
      reinterpret_cast<uintptr_t>(bytes_at(to, bytes)) % 16 != 0)
    fail("a bulk copy of %u bytes, from %p: not in units of 16", bytes, from);
  check_device_memory(from, bytes, place);
  std::memset(bytes_at(to, bytes), kUndefined, bytes);
  copies.push_back({&cta_of(to), to, from, bytes, &barrier_at(barrier)});
  if (draw(4) == 0) yield(false, place);
}

}  // namespace emulation

// ---- fibers

namespace emulation {
#if defined(__x86_64__)
Fiber::Fiber(void* of_stack, size_t of_bytes, void (*entry)()) : stack(of_stack), bytes(of_bytes) {
  // As emulation_switch leaves it: six registers, and where to go on; on entry the stack is aligned
  // as after a call.
  void** top = reinterpret_cast<void**>(static_cast<char*>(of_stack) + of_bytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  left_at = top;
}
#else
Fiber::Fiber(void* of_stack, size_t of_bytes, void (*entry)()) : stack(of_stack), bytes(of_bytes) {
  getcontext(&context);
  context.uc_stack.ss_sp = of_stack, context.uc_stack.ss_size = of_bytes;
  makecontext(&context, entry, 0);
}
#endif
void Fiber::switch_to(Fiber& to) {
#if defined(__x86_64__)
  emulation_switch(&left_at, to.left_at);
#else
  swapcontext(&context, &to.context);
#endif
}
}  // namespace emulation
