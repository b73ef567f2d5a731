// Threads of a grid: their waits, and the choice of the next warp to run. See README.md.
#include "simt.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <tuple>

#include "cuda_runtime.h"
#include "grid.h"

emulation::Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

const Launch* launched = nullptr;
std::deque<Cta> cluster;
Cta* in_place = nullptr;
Thread* running = nullptr;
uint64_t events = 0;

namespace {

constexpr size_t kStackBytes = 256 * 1024;  // a thread touches few pages
constexpr int kIdleTurns = 200000;          // warp runs without an event that count as a deadlock

const std::function<void()>* kernel_of_threads = nullptr;
Meeting cluster_meeting;
int cluster_alive = 0;
Fiber scheduler;

std::mt19937_64& random_numbers() {
  static const char* seed = std::getenv("EMULATION_SEED");
  static std::mt19937_64 numbers(seed == nullptr ? 1 : std::strtoull(seed, nullptr, 10));
  return numbers;
}

// ---- barriers and warp operations

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

// The entry of every thread's fiber.
void run_thread() {
  (*kernel_of_threads)();
  Thread& self = *running;
  self.ended = true;
  self.warp->alive &= ~(1u << self.lane);
  // Complete the operations that waited only for this thread.
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
// Return a warp of this CTA that can run, starting the search at a random warp; null if there is
// none.
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
  // In most draws, start with the current CTA, whose shared memory is in place.
  size_t first = draw(8) == 0 ? draw(count) : static_cast<size_t>(in_place->rank);
  for (size_t i = 0; i < count; i++) {
    Cta& cta = cluster[(first + i) % count];
    Warp* warp = cta.alive > 0 ? ready_warp(cta) : nullptr;
    if (warp != nullptr) return warp;
  }
  return nullptr;
}
// Run every lane that can run, starting at a random lane, upwards or downwards. Sometimes run only
// some of the lanes, so that the lanes of a warp diverge.
void run(Warp& warp) {
  const unsigned first = static_cast<unsigned>(draw(64));
  const unsigned lanes = static_cast<unsigned>(draw(8) == 0 ? 1 + draw(31) : 32);
  for (unsigned i = 0; i < lanes; i++) {
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
    if (draw(16) == 0 && copies_are_left()) complete_a_copy();
    const uint64_t before = events;
    Warp* warp = ready_warp();
    if (warp != nullptr) {
      run(*warp);
    } else if (copies_are_left()) {
      complete_a_copy();
    } else {
      report_deadlock("deadlock");
    }
    idle = events == before ? idle + 1 : 0;
    if (idle > kIdleTurns) report_deadlock("nothing happens any more");
  }
  if (copies_are_left()) fail("a CTA has ended before a copy into it");
  for (const Cta& cta : cluster)
    for (const auto& [address, barrier] : cta.barriers)
      if (barrier.bytes != 0) fail("a barrier still expects bytes at the end");
}

// Return the stack of a thread, which later launches reuse.
void* stack_of(size_t thread) {
  static std::vector<void*> stacks;
  while (stacks.size() <= thread) {
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) fail("no memory for a stack");
    mprotect(stack, 4096, PROT_NONE);  // a stack overflow ends the program
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
    cta.shared.assign(shared_bytes(), kUndefined);
    for (int i = 0; i < threads; i++) {
      if (i % 32 == 0) cta.warps.emplace_back();
      Thread& thread = cta.threads.emplace_back();
      thread.cta = &cta, thread.warp = &cta.warps.back();
      thread.index.x = static_cast<unsigned>(i), thread.lane = thread.index.x % 32;
      thread.warp->lanes[thread.lane] = &thread;
      thread.warp->alive |= 1u << thread.lane;
      thread.fiber.start(stack_of(stack++), kStackBytes, run_thread);
    }
  }
  put_in_place(cluster[draw(cluster.size())]);
}

}  // namespace

size_t draw(size_t below) { return below < 2 ? 0 : random_numbers()() % below; }
void wait_for(Wait wait) {
  running->wait = wait;
  do {
    running->fiber.switch_to(scheduler);
  } while (!running->wait.over());
  running->wait.counter = nullptr;
}
void run(const Launch& launch, const std::function<void()>& kernel) {
  launched = &launch, kernel_of_threads = &kernel;
  blockDim = launch.block, gridDim = launch.grid;
  // The clusters of a grid are independent, so they run one after the other, in random order.
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

void yield(const char* what, Place place) { wait_for({what, place}); }

const uint64_t* meet_warp(const char* what, unsigned mask, uint64_t value, Place place) {
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
  brought[running->lane] = value;
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

}  // namespace emulation
