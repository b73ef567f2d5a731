// The two trades of the ring that compute: closers and consumers. See ring.cuh.
#pragma once
#include "ring.cuh"

namespace fastkd::cuda {

#if __CUDA_ARCH__ >= 900 || !defined(__CUDA_ARCH__)

// Merges what the warps of a group say about their row with what the peers say. Sums of the group's
// row before arrive at the first CTA alone. All lanes call it; `peeled` is this lane's own.
template <class W, bool kExtra, class Shared>
__device__ __forceinline__ typename Shared::Message exchange(
    Shared& shared, int group, uint32_t turn, int warps, typename Shared::Message peeled,
    const typename W::Temper& t, bool has_moments, int rank, int ranks) {
  using Message = typename Shared::Message;
  const int lane = threadIdx.x % 32, slot = turn & 1;
  barrier_wait(&shared.scanned[group], turn & 1);
  Message mine = lane < warps ? shared.warps[group][lane] : Message();
  Statistics<float>& own = peeled.statistics;
  const float student_max = max_of(mine.statistics.student_max, own.student_max);
  const float teacher_max = max_of(mine.statistics.teacher_max, own.teacher_max);
  mine.statistics.raise(student_max, teacher_max, t);
  own.raise(student_max, teacher_max, t);
  mine.statistics.student_sum += own.student_sum;
  mine.statistics.hard_sum += own.hard_sum;
  mine.statistics.teacher_sum += own.teacher_sum;
  mine.statistics.merge_lanes(t);
  if constexpr (W::kGeneral) {
    mine.sums.add(peeled.sums);
    if (has_moments) mine.moments.add(peeled.moments), mine.moments.merge_lanes();
  }
  mine.sums.template merge_lanes<32, kExtra>();
  if (ranks == 1) return mine;
  if (lane < ranks) {
    const uint32_t to = peer_address(shared_address(&shared.peers[group][slot][rank]), lane);
    const Statistics<float>& s = mine.statistics;
    const auto& p = mine.sums;
    peer_store(to, {s.student_max, s.student_sum, s.hard_sum, s.teacher_max});
    peer_store(to + 16, {s.teacher_sum, p.value, p.logits, p.student_entropy});
    if constexpr (W::kGeneral) {
      peer_store(to + 32, {p.teacher_entropy, p.agreement, p.slope, p.classes});
      if (has_moments) {
        struct Two {
          double student, teacher;
        };
        const Moments& m = mine.moments;
        peer_store(to + 48, bits_as<float4>(Two{m.student, m.teacher}));
        peer_store(to + 64, bits_as<float4>(Two{m.student_count, m.teacher_count}));
      }
    } else if (kExtra) {
      peer_store(to + 32, {p.teacher_entropy, p.agreement, 0, 0});
    }
    peer_arrive(peer_address(shared_address(&shared.exchanged[group][slot]), lane));
  }
  barrier_wait_cluster(&shared.exchanged[group][slot], (turn >> 1) & 1);
  Message all = lane < ranks ? shared.peers[group][slot][lane] : Message();
  all.statistics.merge_lanes(t);
  if (W::kGeneral || rank == 0) all.sums.template merge_lanes<32, kExtra>();
  if constexpr (W::kGeneral)
    if (has_moments) all.moments.merge_lanes();
  return all;
}

// What the closer of the first CTA takes of a row itself: the label's logit for the loss, and one
// class a lane of those that no vector covers. Read before anybody may write the row in place.
template <class T, bool kGeneral>
struct RingPeel {
  T* grad = nullptr;  // [classes], or null
  int64_t peeled = -1;
  LeftOut<kGeneral> left_out{-1};
  float student = 0, teacher = 0, label_logit = 0;

  RingPeel() = default;
  __device__ __forceinline__ RingPeel(const ForwardArgs& args, const RingInfo& info)
      : left_out(args, info.label) {
    const RowOf<T> row(args, args.grad, args.grad_stride, info.row);
    grad = row.grad;
    peeled = row.layout.peeled(threadIdx.x % 32, args.classes);
    if (info.label >= 0) label_logit = to_acc(row.student[info.label]);
    if (peeled < 0) return;
    student = to_acc(row.student[peeled]);
    teacher = to_acc(row.teacher[peeled]);
  }
  template <class Temper>
  __device__ __forceinline__ Statistics<float> scan(const Temper& t) const {
    Statistics<float> stats;
    if (peeled < 0 || left_out.is(peeled)) return stats;
    stats.raise(student, teacher, t);
    stats.add_any<kAtRunTime>(student, teacher, t);
    return stats;
  }
  __device__ __forceinline__ Moments moments(bool squared) const {
    Moments moments;
    if (peeled >= 0) moments.add(student, teacher, squared);
    return moments;
  }
  template <class W>
  __device__ __forceinline__ typename W::Sums sum(const W& writer, bool extra) const {
    typename W::Sums sums;
    if (peeled >= 0 && !left_out.is(peeled)) writer.sum(student, teacher, extra, sums);
    return sums;
  }
  template <bool kExtra, class W>
  __device__ __forceinline__ typename W::Sums write(const W& writer, int64_t label) const {
    typename W::Sums sums;
    if (peeled >= 0) {
      float g = writer.template write<kAtRunTime, kExtra>(student, teacher, sums);
      if (peeled == label) g = writer.at_label(g);
      if (grad != nullptr) grad[peeled] = from_acc<T>(g);
    }
    if (!W::kGeneral) sums.template merge_lanes<32, kExtra>();
    return sums;
  }
};

template <bool kExtra, class Shared>
__device__ __forceinline__ void close_pending(const ForwardArgs& args, Shared& shared, int group,
                                              const RingPending& pending, Sums<float> sums) {
  if (pending.row < 0) return;
  sums.add(pending.peeled);
  close_row<Temperature<float>>(args, pending.row, pending.stats, sums, pending.label_logit,
                                [](auto&...) {});
}

template <class W, class Shared>
__device__ __forceinline__ void publish(Shared& shared, int group, const W& writer) {
  if (threadIdx.x % 32 != 0) return;
  shared.writers[group] = writer;
  barrier_arrive(&shared.ready[group]);
}

// One row of one group; false when nothing follows.
template <class T, class W, bool kExtra, class Shared>
__device__ __forceinline__ bool close_one(const ForwardCall& call, Shared& shared,
                                          RingFollower<Shared>& rows, int group, int warps,
                                          int rank, int ranks, float scale) {
  const ForwardArgs& args = call.args;
  const bool leader = rank == 0 && threadIdx.x % 32 == 0;
  const RingInfo info = rows.info();
  const bool ends = info.row < 0;
  const typename W::Temper t(args, ends ? 0 : info.row);
  using Peel = RingPeel<T, W::kGeneral>;
  const Peel peel = rank == 0 && !ends ? Peel(args, info) : Peel();
  const bool with_moments = W::kGeneral && has_moments(args);
  const auto merged = [&](const Statistics<float>& statistics, const typename W::Sums& sums,
                          const Moments& moments) {
    typename Shared::Message own;
    own.statistics = statistics, own.sums = sums;
    if constexpr (W::kGeneral) own.moments = moments;
    return exchange<W, kExtra>(shared, group, rows.turn, warps, own, t, with_moments, rank, ranks);
  };
  auto all = merged(peel.scan(t), {}, with_moments ? peel.moments(is_unit(args)) : Moments());
  const RingPending before = shared.pending[group];
  if (ends) {
    if (threadIdx.x % 32 == 0) barrier_arrive(&shared.ready[group]);
    if constexpr (!W::kGeneral)
      if (leader) close_pending<kExtra>(args, shared, group, before, all.sums);
    return false;
  }
  const typename W::Stats stats = W::stats_of(args, info.row, all.statistics, moments_of(all));
  W writer(call, info.row, t, stats, scale);
  publish(shared, group, writer);
  if constexpr (W::kGeneral) {
    rows.turn++;
    all = merged({}, peel.sum(writer, wants_extra(args)), {});
    writer.balance(stats, all.sums);
    publish(shared, group, writer);
  }
  if (rank != 0) return true;
  const auto peeled = peel.template write<kExtra>(writer, info.label);
  if (leader) {
    if constexpr (W::kGeneral) {
      close_row(args, info.row, writer, stats, all.sums, peel.label_logit);
    } else {
      close_pending<kExtra>(args, shared, group, before, all.sums);
      shared.pending[group] = {stats, peel.label_logit, peeled, info.row};
    }
  }
  __syncwarp();
  return true;
}

// Closer number `closer` of `closers`: the groups closer, closer + closers, ..., in the order of
// their rows.
template <class T, class W, bool kExtra, class Shared>
__device__ __forceinline__ void close_rows(const ForwardCall& call, const RingShape& shape,
                                           Shared& shared, int closer, int closers, int warps,
                                           int rank, int ranks, float scale) {
  static_assert(Shared::kPerCloser <= 2);
  const int first = closer, second = closer + closers;
  bool first_runs = true, second_runs = second < Shared::kGroupCount;
  RingFollower<Shared> first_rows(shared, shape, first);
  RingFollower<Shared> second_rows(shared, shape, second_runs ? second : 0);
  while (first_runs || second_runs) {
    if (first_runs)
      first_runs =
          close_one<T, W, kExtra>(call, shared, first_rows, first, warps, rank, ranks, scale);
    first_rows.next();
    if (second_runs)
      second_runs =
          close_one<T, W, kExtra>(call, shared, second_rows, second, warps, rank, ranks, scale);
    second_rows.next();
  }
}

// The class that is left out, in a slice's numbers of classes.
template <class T, bool kGeneral>
__device__ __forceinline__ LeftOut<kGeneral> left_out_of(const ForwardArgs& args,
                                                         const RingInfo& info) {
  if (info.label_vector < 0) return LeftOut<kGeneral>(-1);
  return {args, info.label_vector * Vector<T>::kElements + info.label_element};
}

// First sweep over one slice, as its stages arrive: the statistics of this thread's vectors.
template <class T, int kPower, int kWarps, int kVectors, class Shared, class Temper, class Out>
__device__ __forceinline__ Statistics<float> scan_slice(const RingStage<T, kWarps, kVectors>* ring,
                                                        const RingFollower<Shared>& rows,
                                                        const RingInfo& info, const Temper& t,
                                                        const Out& left_out, int thread) {
  using Stage = RingStage<T, kWarps, kVectors>;
  Statistics<float> stats;
  Tops tops;
  const bool plain = (info.student_shift | info.teacher_shift) == 0;
  RingCursor at = rows.start;
  for (int left = info.vectors, c = 0; c < rows.shape.chunks; c++, left -= Stage::kCount) {
    barrier_wait(&rows.shared.full[at.stage], at.parity);
    const Stage& stage = ring[at.stage];
    if (plain && left >= Stage::kCount) {
      uint4 students[kVectors], teachers[kVectors];
#pragma unroll
      for (int k = 0; k < kVectors; k++) {
        students[k] = stage.student[thread + k * Stage::kThreads];
        teachers[k] = stage.teacher[thread + k * Stage::kThreads];
        const int i = c * Stage::kCount + thread + k * Stage::kThreads;
        left_out.template mask<T>(students[k], i * Vector<T>::kElements);
        left_out.template mask<T>(teachers[k], i * Vector<T>::kElements);
      }
      add_vectors<T, kPower>(stats, tops, students, teachers, t);
    } else {
#pragma unroll 1
      for (int i = thread; i < min(left, Stage::kCount); i += Stage::kThreads) {
        uint4 z = fetch(stage.student, i, info.student_shift);
        uint4 w = fetch(stage.teacher, i, info.teacher_shift);
        left_out.template mask<T>(z, (c * Stage::kCount + i) * Vector<T>::kElements);
        left_out.template mask<T>(w, (c * Stage::kCount + i) * Vector<T>::kElements);
        add_vector<T, kPower>(stats, tops, z, w, t);
      }
    }
    at.advance(1, rows.shape.stages);
  }
  stats.raise(tops.student, tops.teacher, t);
  return stats;
}

// The moments of this thread's vectors.
template <class T, int kWarps, int kVectors, class Shared>
__device__ __forceinline__ Moments moments_of_slice(const RingStage<T, kWarps, kVectors>* ring,
                                                    const RingFollower<Shared>& rows,
                                                    const RingInfo& info, bool squared,
                                                    int thread) {
  using Stage = RingStage<T, kWarps, kVectors>;
  Moments moments;
  RingCursor at = rows.start;
  for (int left = info.vectors, c = 0; c < rows.shape.chunks; c++, left -= Stage::kCount) {
    const Stage& stage = ring[at.stage];
#pragma unroll 1
    for (int i = thread; i < min(left, Stage::kCount); i += Stage::kThreads)
      add_moments<T>(fetch(stage.student, i, info.student_shift),
                     fetch(stage.teacher, i, info.teacher_shift), squared, moments);
    at.advance(1, rows.shape.stages);
  }
  return moments;
}

// The sweep between.
template <class T, int kWarps, int kVectors, class W, class Shared>
__device__ __forceinline__ typename W::Sums sum_slice(const RingStage<T, kWarps, kVectors>* ring,
                                                      const RingFollower<Shared>& rows,
                                                      const RingInfo& info, const W& writer,
                                                      const LeftOut<true>& left_out, bool extra,
                                                      int thread) {
  using Stage = RingStage<T, kWarps, kVectors>;
  typename W::Sums sums;
  RingCursor at = rows.start;
  for (int left = info.vectors, c = 0; c < rows.shape.chunks; c++, left -= Stage::kCount) {
    const Stage& stage = ring[at.stage];
#pragma unroll 1
    for (int i = thread; i < min(left, Stage::kCount); i += Stage::kThreads)
      sum_vector<T>(
          writer, fetch(stage.student, i, info.student_shift),
          fetch(stage.teacher, i, info.teacher_shift),
          left_out.among((c * Stage::kCount + i) * Vector<T>::kElements, Vector<T>::kElements),
          extra, sums);
    at.advance(1, rows.shape.stages);
  }
  return sums;
}

// Last sweep: the whole slice is still there. Each stage is freed as it is done.
template <class T, int kPower, bool kExtra, int kWarps, int kVectors, class W, class Shared>
__device__ __forceinline__ typename W::Sums write_slice(const RingStage<T, kWarps, kVectors>* ring,
                                                        const RingFollower<Shared>& rows,
                                                        const RingInfo& info, const W& writer,
                                                        int thread) {
  using Stage = RingStage<T, kWarps, kVectors>;
  constexpr int kUnroll = kExtra ? 1 : kVectors;  // two vectors at once would spill with terms
  typename W::Sums sums;
  const bool plain = (info.student_shift | info.teacher_shift) == 0 && info.grad != nullptr;
  RingCursor at = rows.start;
  uint4* grad = info.grad;
  for (int left = info.vectors, c = 0; c < rows.shape.chunks; c++, left -= Stage::kCount) {
    const Stage& stage = ring[at.stage];
    if (plain && left >= Stage::kCount) {
#pragma unroll kUnroll
      for (int k = 0; k < kVectors; k++) {
        const int i = thread + k * Stage::kThreads;
        __stcs(grad + i,
               write_vector<T, kPower, kExtra>(writer, stage.student[i], stage.teacher[i], sums));
      }
    } else {
#pragma unroll 1
      for (int i = thread; i < min(left, Stage::kCount); i += Stage::kThreads) {
        const uint4 g =
            write_vector<T, kPower, kExtra>(writer, fetch(stage.student, i, info.student_shift),
                                            fetch(stage.teacher, i, info.teacher_shift), sums);
        if (info.grad != nullptr) __stcs(grad + i, g);
      }
    }
    __syncwarp();
    if (thread % 32 == 0) barrier_arrive(&rows.shared.empty[at.stage]);
    at.advance(1, rows.shape.stages);
    grad += Stage::kCount;
  }
  return sums;
}

// Student and teacher logit of the label, for the thread that owns its vector.
template <class T, int kWarps, int kVectors, class Shared>
__device__ __forceinline__ float2 label_logits(const RingStage<T, kWarps, kVectors>* ring,
                                               const RingFollower<Shared>& rows,
                                               const RingInfo& info) {
  using Stage = RingStage<T, kWarps, kVectors>;
  RingCursor at = rows.start;
  at.advance(info.label_vector / Stage::kCount, rows.shape.stages);
  const int byte = info.label_vector % Stage::kCount * kVectorBytes +
                   info.label_element * static_cast<int>(sizeof(T));
  const char* student = reinterpret_cast<const char*>(ring[at.stage].student);
  const char* teacher = reinterpret_cast<const char*>(ring[at.stage].teacher);
  return {to_acc(*reinterpret_cast<const T*>(student + byte + info.student_shift)),
          to_acc(*reinterpret_cast<const T*>(teacher + byte + info.teacher_shift))};
}

template <class T, class W, bool kExtra, int kWarps, int kVectors, class Shared>
__device__ __forceinline__ void consume(const ForwardArgs& args, const RingShape& shape,
                                        Shared& shared,
                                        const RingStage<T, kWarps, kVectors>* ring) {
  using Stage = RingStage<T, kWarps, kVectors>;
  const int group = threadIdx.x / Stage::kThreads, thread = threadIdx.x % Stage::kThreads;
  RingFollower<Shared> rows(shared, shape, group);
  typename Shared::Message message;
  typename W::Temper t(args, 0);
  const auto send = [&] {
    message.statistics.merge_lanes(t);
    message.sums.template merge_lanes<32, kExtra>();
    if constexpr (W::kGeneral)
      if (has_moments(args)) message.moments.merge_lanes();
    if (thread % 32 != 0) return;
    shared.warps[group][thread / 32] = message;
    barrier_arrive(&shared.scanned[group]);
  };
  const auto received = [&] {
    barrier_wait(&shared.ready[group], rows.turn & 1);
    return shared.writers[group];
  };
  // Copies of the loops for each power, where their speed is all that counts.
  const auto sweep = [&](auto&& fn) {
    if constexpr (W::kGeneral) {
      fn(PowerConstant<kAtRunTime>());
    } else {
      with_power(t.power, fn);
    }
  };
  while (true) {
    const RingInfo info = rows.info();
    if (info.row < 0) break;
    if (args.row_settings != nullptr) t = typename W::Temper(args, info.row);
    const LeftOut<W::kGeneral> left_out = left_out_of<T, W::kGeneral>(args, info);
    sweep([&](auto power) {
      message.statistics = scan_slice<T, power.value>(ring, rows, info, t, left_out, thread);
    });
    if constexpr (W::kGeneral) {
      message.sums = {};
      if (has_moments(args))
        message.moments = moments_of_slice<T>(ring, rows, info, is_unit(args), thread);
    }
    send();
    if constexpr (W::kGeneral) {
      message.sums =
          sum_slice<T>(ring, rows, info, received(), left_out, wants_extra(args), thread);
      message.statistics = {};
      rows.turn++;
      send();
    }
    // The label's class is written again at the end, by the thread that wrote its vector.
    const bool has_label = info.label_vector >= 0 && info.grad != nullptr &&
                           info.label_vector % Stage::kThreads == thread;
    const float2 label = has_label ? label_logits(ring, rows, info) : float2{0, 0};
    const W writer = received();
    sweep([&](auto power) {
      message.sums = write_slice<T, power.value, kExtra>(ring, rows, info, writer, thread);
    });
    if (has_label) {
      typename W::Sums unused;
      const float g = writer.template write<kAtRunTime, kExtra>(label.x, label.y, unused);
      reinterpret_cast<T*>(info.grad + info.label_vector)[info.label_element] =
          from_acc<T>(writer.at_label(g));
    }
    rows.next();
  }
  // Nothing follows: the sums of the last row, and the stages of the row that is none. They are
  // freed when the closer has seen it too: other groups' last rows may take them, a turn later.
  message.statistics = Statistics<float>();
  send();
  barrier_wait(&shared.ready[group], rows.turn & 1);
  for (int c = 0; c < shape.chunks; c++, rows.start.advance(1, shape.stages)) {
    barrier_wait(&shared.full[rows.start.stage], rows.start.parity);
    __syncwarp();  // a lane that is behind would take the stage's next turn for this one, and wait
    if (thread % 32 == 0) barrier_arrive(&shared.empty[rows.start.stage]);
  }
}

#endif

}  // namespace fastkd::cuda
