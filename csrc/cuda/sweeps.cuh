// The sweeps over a row, a chunk of classes at a time (row_views.cuh). scan() sums statistics, and
// write() computes the gradient, with a Writer also the value. With a GeneralWriter, sum() computes
// the value before write(), and for some divergences moments_of() runs before sum(). Forward and
// backward kernels share write(), because both must compute equal bits. Derivations: docs/maths.md,
// sections 2, 3 and 10.
#pragma once
#include "row_views.cuh"

namespace fastkd::cuda {

// Return the statistics of this thread's classes. During the sweep, the maxima are raised only if a
// logit exceeds a maximum by more than t.margin. In almost every vector some lane of a warp has a
// new maximum, and rescaling the sums costs as much as two classes. `left_out(chunk)`: the position
// of the class that the sums leave out, or -1.
template <int kPower, class Row, class LeftOut>
__device__ __forceinline__ Statistics<typename Row::A> scan(const Row& row,
                                                            const Temperature<typename Row::A>& t,
                                                            const LeftOut& left_out) {
  using A = typename Row::A;
  Statistics<A> statistics;
  A student_top = kLowest<A>, teacher_top = kLowest<A>;
  row.template for_chunks<false, 2>([&](const auto& chunk) {
    const int out = left_out(chunk);
    chunk.for_each(out, [&](A z, A w, int) {
      student_top = max_of(student_top, z);
      teacher_top = max_of(teacher_top, w);
    });
    if (student_top > statistics.student_max + t.margin ||
        teacher_top > statistics.teacher_max + t.margin)
      statistics.raise(student_top, teacher_top, t);
    chunk.for_each(out, [&](A z, A w, int) { statistics.template add<kPower>(z, w, t); });
  });
  statistics.raise(student_top, teacher_top, t);
  return statistics;
}

// Return the moments of this thread's classes, for divergences with has_moments().
template <class Row>
__device__ __forceinline__ Moments moments_of(const Row& row, bool squared) {
  using A = typename Row::A;
  Moments moments;
  row.template for_chunks<false, 1>([&](const auto& chunk) {
    chunk.for_each(-1, [&](A z, A w, int) { moments.add(z, w, squared); });
  });
  return moments;
}

// Return the sums of values and slopes over this thread's classes, for a GeneralWriter. With
// `extra`, also compute the sums of add_extra().
template <class Row, class W, class LeftOut>
__device__ __forceinline__ Sums<typename Row::A> sum(const Row& row, const W& writer,
                                                     const LeftOut& left_out, bool extra) {
  using A = typename Row::A;
  Sums<A> sums;
  row.template for_chunks<false, 1>([&](const auto& chunk) {
    const int out = left_out(chunk);
    visit_general(writer.divergence, [&](auto d) {
      using D = decltype(d);
      chunk.for_each(D::kCentering == SlopeCentering::kNone ? out : -1,
                     [&](A z, A w, int) { writer.template sum_as<D>(z, w, extra, sums); });
    });
  });
  return sums;
}

// Write the gradient of this thread's classes. Unless W::kGeneral, also add the classes to `sums`.
template <int kPower, bool kExtra, bool kUniform, class Row, class W>
__device__ __forceinline__ void write(const Row& row, const W& writer, int64_t label,
                                      Sums<typename Row::A>& sums) {
  using A = typename Row::A;
  row.template for_chunks<true, W::kGeneral ? 1 : 2>([&](const auto& chunk) {
    A g[std::decay_t<decltype(chunk)>::kMost];
    const auto for_each = [&](auto&& gradient_of) {
      chunk.for_each(-1, [&](A z, A w, int i) { g[i] = gradient_of(z, w); });
    };
    if constexpr (W::kGeneral) {
      visit_general(writer.divergence, [&](auto d) {
        for_each([&](A z, A w) { return writer.template write_as<decltype(d)>(z, w); });
      });
    } else if (writer.apart) {
      for_each([&](A z, A w) {
        return writer.template write_as<true, kAtRunTime, kExtra, kUniform>(z, w, sums);
      });
    } else {
      for_each([&](A z, A w) {
        return writer.template write_as<false, kPower, kExtra, kUniform>(z, w, sums);
      });
    }
    const int place = chunk.place_of(label);
    if (place >= 0) {
#pragma unroll
      for (int i = 0; i < std::decay_t<decltype(chunk)>::kMost; i++)
        if (i == place) g[i] = writer.at_label(g[i]);
    }
    row.store(chunk, g);
  });
}

}  // namespace fastkd::cuda
