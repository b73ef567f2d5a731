// State of the running grid, for the emulator's own files.
#pragma once
#include <deque>
#include <map>
#include <vector>

#include "fiber.h"
#include "simt.h"

namespace emulation {

constexpr unsigned char kUndefined = 0xff;  // bytes of NaNs, and of -1

// A wait ends when the chosen bits of a counter differ from a value. Without a counter, a wait has
// ended.
struct Wait {
  const char* what = nullptr;
  Place place;
  const uint64_t* counter = nullptr;
  uint64_t value = 0, bits = ~uint64_t(0);
  bool over() const { return counter == nullptr || (*counter & bits) != value; }
};

struct Cta;
struct Warp;
struct Thread {
  Fiber fiber;
  Cta* cta = nullptr;
  Warp* warp = nullptr;
  Index index;
  unsigned lane = 0;
  bool ended = false;
  Wait wait;
};

// Threads at a barrier. When the expected number of threads has arrived, `turn` is incremented.
struct Meeting {
  int arrived = 0;
  uint64_t turn = 0;
};
// Lanes at a warp operation, and their values. A lane may be one turn ahead of lanes that still
// have to read, so there are two arrays of values.
struct WarpMeeting {
  const char* what = nullptr;
  unsigned mask = 0, arrived = 0;
  uint64_t turn = 0;
  uint64_t brought[2][32];
};
struct Warp {
  Thread* lanes[32] = {};
  unsigned alive = 0;
  WarpMeeting meeting;
};
struct Barrier {
  int count = 0, missing = 0;
  int64_t bytes = 0;   // expected and not yet arrived
  uint64_t phase = 0;  // number of completed phases
};
struct Cta {
  int rank = 0, alive = 0;
  Index index;
  std::deque<Thread> threads;
  std::deque<Warp> warps;
  Meeting all;
  std::map<int, Meeting> some;
  std::map<uint32_t, Barrier> barriers;  // by address
  std::vector<unsigned char> shared;     // contents while another CTA's memory is in place
};

extern const Launch* launched;
extern std::deque<Cta> cluster;  // the running cluster
extern Cta* in_place;            // the CTA whose shared memory the kernels see
extern Thread* running;
extern uint64_t events;  // incremented by every event that threads may wait for

size_t draw(size_t below);  // return a random number below `below`
void wait_for(Wait wait);   // yield until the wait is over

// defined in shared.cpp
size_t shared_bytes();
void put_in_place(Cta& cta);
bool copies_are_left();
void complete_a_copy();

}  // namespace emulation
