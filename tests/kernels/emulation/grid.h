// The state of the one grid that runs. For the emulator's own files.
#pragma once
#include <deque>
#include <map>
#include <vector>

#include "fiber.h"
#include "simt.h"

namespace emulation {

constexpr unsigned char kUndefined = 0xff;  // bytes of NaNs, and of -1

// Why a thread waits: until a counter leaves a value, or its last bit does.
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
  Thread* lanes[32] = {};
  unsigned alive = 0;
  WarpMeeting meeting;
};
struct Barrier {
  int count = 0, missing = 0;
  int64_t bytes = 0;   // announced, and not yet here
  uint64_t phase = 0;  // how many are over
};
struct Cta {
  int rank = 0, alive = 0;
  Index index;
  std::deque<Thread> threads;
  std::deque<Warp> warps;
  Meeting all;
  std::map<int, Meeting> some;
  std::map<uint32_t, Barrier> barriers;  // by their addresses
  std::vector<unsigned char> shared;     // while another CTA's is in place
};

extern const Launch* launched;
extern std::deque<Cta> cluster;  // the one that runs
extern Cta* in_place;            // whose shared memory the kernels see
extern Thread* running;
extern uint64_t events;  // counts whatever others may have waited for

size_t draw(size_t below);  // at random
void wait_for(Wait wait);   // whoever runs gives way until the wait is over

// shared.cpp
size_t shared_bytes();
void put_in_place(Cta& cta);
bool copies_are_left();
void complete_a_copy();

}  // namespace emulation
