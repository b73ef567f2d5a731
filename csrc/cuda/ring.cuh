// The main kernel: a cluster of CTAs per row, each with its slice of the row in shared memory.
//
// A CTA's warps have four trades:
//   producer   one warp that keeps a ring of stages filled with bulk copies, row after row
//   consumers  groups of warps that take turns with the rows: while one group writes the gradient
//   of
//              a row, freeing its stages, others sweep the next rows as they arrive
//   closers    between a group's two sweeps, one warp merges its statistics with those of its peers
//              in the cluster and works out what the second sweep needs; it also takes what no
//              vector covers, and writes the loss. A row's chain of events is what limits small
//              slices, and a thousand instructions a consumer and row were most of it (H100,
//              2026-11)
//   filler     one warp that writes rows that are ignored or have a bad label, which nobody reads
// The sums of the second sweep ride in the exchange of the group's next row: a row costs one
// exchange, and nobody waits for its loss. With a GeneralWriter there is a sweep between the two,
// and its sums take an exchange of their own, since the gradient waits for them.
#pragma once
#include "launch.h"
#include "rows.cuh"

namespace fastkd::cuda {

struct RingShape {
  int stages;
  int chunks;  // stages that one slice takes
};

#if __CUDA_ARCH__ >= 900 || !defined(__CUDA_ARCH__)

// What a warp, and then a CTA, tells the others about its part of a row. `sums`: of the same
// group's row before; but with a GeneralWriter, of the row itself, which takes two exchanges.
template <class S>
struct alignas(16) RingMessage {
  Statistics<float> statistics;
  S sums;
};
template <>
struct alignas(16) RingMessage<GeneralSums<float>> {
  Statistics<float> statistics;
  GeneralSums<float> sums;
  Moments moments;  // in a row's first exchange, where has_moments()
};
template <class S>
__device__ __forceinline__ Moments moments_of(const RingMessage<S>&) {
  return {};
}
__device__ __forceinline__ Moments moments_of(const RingMessage<GeneralSums<float>>& message) {
  return message.moments;
}

// What the producer tells the consumers about a row in the ring, so that they need not work it out
// a thread at a time.
struct RingInfo {
  int64_t row;       // or -1: nothing follows
  int64_t sequence;  // the how-manieth of this CTA's rows
  int64_t label;
  uint4* grad;  // this CTA's slice, or null
  int vectors;  // in this CTA's slice
  int student_shift, teacher_shift;
  int label_vector;   // of the slice, or -1
  int label_element;  // of that vector
};

// What waits until its sums are known. Only the group's closer touches it.
struct RingPending {
  RowStats<float> stats;
  float label_logit;
  Sums<float> peeled;  // of the classes that the closer took itself
  int64_t row;         // or -1
};

constexpr int kLargestCluster = 16;

template <class W, int kGroups, int kWarps>
struct RingShared {
  uint64_t full[kRingMaxStages], empty[kRingMaxStages];
  uint64_t scanned[kGroups];       // consumers -> closer: a message of each warp is there
  uint64_t exchanged[kGroups][2];  // closers -> closer: a message of each CTA is there
  uint64_t ready[kGroups];         // closer -> consumers: the writer is there
  static constexpr int kGroupCount = kGroups;
  static constexpr int kPerCloser = (kGroups + kRingClosers<kGroups> - 1) / kRingClosers<kGroups>;
  W writers[kGroups];
  RingInfo infos[kRingMaxStages + 1];  // of the rows in the ring
  using Message = RingMessage<typename W::Sums>;
  Message warps[kGroups][kWarps];
  Message peers[kGroups][2][kLargestCluster];
  RingPending pending[kGroups];
  int count;
};

// A position in the ring that only moves forward.
struct RingCursor {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance(int by, int stages) {
    stage += by;
    while (stage >= stages) {
      stage -= stages;
      parity ^= 1;
    }
  }
};

template <class T, int kWarps, int kVectors>
struct RingStage {
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kCount = ring_stage_vectors(kWarps, kVectors);  // vectors of one input
  uint4 student[kCount + 1], teacher[kCount + 1];
};

// The vectors of a row that belong to one CTA of the cluster, of which there are a power of 2.
struct RingSlice {
  int low, count;
  __device__ __forceinline__ RingSlice(int64_t row_vectors, int rank, int ranks) {
    const int vectors = static_cast<int>(row_vectors), shift = __ffs(ranks) - 1;
    const int per = (vectors + ranks - 1) >> shift;
    low = min(vectors, rank * per);
    count = min(vectors, low + per) - low;
  }
};

// Walks the rows of this cluster, 32 at a time: lane i holds the label of the i-th. fn(row, label)
// is called by all lanes.
template <class Fn>
__device__ __forceinline__ void walk_rows(const Inputs& in, int64_t first, int64_t step, Fn&& fn) {
  const int lane = threadIdx.x % 32;
  for (int64_t base = first; base < in.rows; base += 32 * step) {
    const int64_t mine = base + lane * step;
    const int64_t label = mine < in.rows ? label_of(in, mine) : -1;
    for (int i = 0; i < 32 && base + i * step < in.rows; i++)
      fn(base + i * step, __shfl_sync(0xffffffffu, label, i));
  }
}

// The producer's place in the ring.
template <class T, class Shared, int kWarps, int kVectors>
struct RingProducer {
  using Stage = RingStage<T, kWarps, kVectors>;
  const RingShape& shape;
  Shared& shared;
  Stage* ring;
  RingCursor at;
  int slot = 0;  // of shared.infos
  int64_t sequence = 0;
  bool waits = false;  // the first turn of the ring finds it empty

  // A barrier tells only odd turns from even ones: before a row is announced, what was in its
  // stages a turn ago must have arrived, or its consumers could take that turn for theirs.
  __device__ __forceinline__ void settle() {
    RingCursor next = at;
    for (int c = 0; c < shape.chunks; c++, next.advance(1, shape.stages))
      if (waits || next.parity != at.parity)
        barrier_wait(&shared.full[next.stage], next.parity ^ 1);
  }
  // One row's slice, stage by stage. One thread.
  __device__ __forceinline__ void put(RingInfo info, const uint4* student, const uint4* teacher) {
    settle();
    for (int c = 0; c < shape.chunks; c++) {
      if (waits) barrier_wait(&shared.empty[at.stage], at.parity ^ 1);
      if (c == 0) {
        info.sequence = sequence++;
        shared.infos[slot] = info;
      }
      uint64_t* full = &shared.full[at.stage];
      const int vectors = min(info.vectors - c * Stage::kCount, Stage::kCount);
      if (vectors > 0) {
        const int students = (vectors + (info.student_shift != 0)) * kVectorBytes;
        const int teachers = (vectors + (info.teacher_shift != 0)) * kVectorBytes;
        barrier_expect(full, students + teachers);
        bulk_copy(ring[at.stage].student, student + c * Stage::kCount, students, full);
        bulk_copy(ring[at.stage].teacher, teacher + c * Stage::kCount, teachers, full);
      } else {
        barrier_arrive(full);
      }
      at.advance(1, shape.stages);
      if (at.stage == 0) waits = true;
    }
    slot = slot == kRingMaxStages ? 0 : slot + 1;
  }
};

template <class T, class Shared, int kWarps, int kVectors>
__device__ __forceinline__ void produce(const ForwardArgs& args, const RingShape& shape,
                                        Shared& shared, RingStage<T, kWarps, kVectors>* ring,
                                        int rank, int ranks, int64_t first, int64_t step) {
  const bool leader = threadIdx.x % 32 == 0;
  RingProducer<T, Shared, kWarps, kVectors> producer{shape, shared, ring, {}};
  walk_rows(args, first, step, [&](int64_t index, int64_t label) {
    if (!leader || kind_of(args, label) != RowKind::kReal) return;
    const RowOf<T> row(args, args.grad, args.grad_stride, index);
    const RingSlice slice(row.layout.vectors, rank, ranks);
    RingInfo info;
    info.row = index, info.label = label;
    info.grad = row.grad == nullptr ? nullptr : row.grad_vectors + slice.low;
    info.vectors = slice.count;
    info.student_shift = row.layout.student_shift, info.teacher_shift = row.layout.teacher_shift;
    const int inside = static_cast<int>(label) - row.layout.begin;
    info.label_vector = inside / Vector<T>::kElements - slice.low;
    info.label_element = inside % Vector<T>::kElements;
    if (label < 0 || inside < 0 || info.label_vector < 0 || info.label_vector >= slice.count)
      info.label_vector = -1;
    producer.put(info, row.student_vectors + slice.low, row.teacher_vectors + slice.low);
  });
  // Each group is told that nothing follows.
  if (!leader) return;
  RingInfo end = {};
  end.row = -1;
  for (int group = 0; group < Shared::kGroupCount; group++) producer.put(end, nullptr, nullptr);
}

template <class T>
__device__ __forceinline__ void fill(const ForwardArgs& args, int rank, int ranks, int64_t first,
                                     int64_t step) {
  if (args.labels == nullptr) return;
  const int lane = threadIdx.x % 32;
  walk_rows(args, first, step, [&](int64_t index, int64_t label) {
    const RowKind kind = kind_of(args, label);
    if (kind == RowKind::kReal) return;
    const RowOf<T> row(args, args.grad, args.grad_stride, index);
    const RingSlice slice(row.layout.vectors, rank, ranks);
    fill_row(row, fill_value(kind), slice.low, slice.low + slice.count, rank == 0, lane, 32,
             args.classes);
    if (rank == 0 && lane == 0) close_row_as(args, index, fill_value(kind));
  });
}

// Follows the rows of one group through the ring, for its consumers and its closer.
template <class Shared>
struct RingFollower {
  Shared& shared;
  const RingShape& shape;
  RingCursor start;  // of the row
  int slot;          // of shared.infos
  int64_t sequence;
  uint32_t turn = 0;  // the how-manieth exchange of the group

  __device__ __forceinline__ RingFollower(Shared& s, const RingShape& of, int group)
      : shared(s), shape(of), slot(group), sequence(group) {
    start.advance(group * shape.chunks, shape.stages);
  }
  // A group can be early by a turn of the ring, where the barrier's parity means nothing yet: the
  // sequence number tells, and from then on the barrier can be trusted.
  __device__ __forceinline__ RingInfo info() {
    barrier_wait(&shared.full[start.stage], start.parity);
    while (*static_cast<const volatile int64_t*>(&shared.infos[slot].sequence) != sequence)
      __nanosleep(64);
    barrier_wait(&shared.full[start.stage], start.parity);
    return shared.infos[slot];
  }
  __device__ __forceinline__ void next() {
    start.advance(Shared::kGroupCount * shape.chunks, shape.stages);
    slot += Shared::kGroupCount;
    if (slot > kRingMaxStages) slot -= kRingMaxStages + 1;
    sequence += Shared::kGroupCount;
    turn++;
  }
};

#endif

}  // namespace fastkd::cuda
