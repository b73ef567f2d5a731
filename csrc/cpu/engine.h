// The two sweeps of one row, block by block and segment by segment.
#pragma once
#include "label.h"
#include "operands.h"
#include "plain.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

// Makes q and p of exponentials that are relative to other maxima than the row's.
template <class T, class S>
void rescale_kept(const Row<T>& row, const Scales<T>& s, double student_max, double teacher_max,
                  Coefficients<T, S>* c) {
  const double student = row.rescale(student_max, s.student_max);
  const double teacher = row.teacher_rescale(teacher_max, s.teacher_max);
  c->student_scale = static_cast<T>(student * static_cast<double>(s.student_scale));
  c->teacher_scale = static_cast<T>(teacher * static_cast<double>(s.teacher_scale));
  double power = static_cast<double>(c->hard_gain);
  for (int i = 0; i < row.power; ++i) power *= static_cast<double>(c->student_scale);
  c->kept_hard_gain = static_cast<T>(power);
  const double soft_gain = c->soft_gain;
  c->kept_student_gain = static_cast<T>(soft_gain * student * static_cast<double>(s.student_scale));
  c->kept_teacher_gain = static_cast<T>(soft_gain * teacher * static_cast<double>(s.teacher_scale));
}

// T computes, S is what the loops read and write.
template <class T, class S>
struct Engine {
  const Inputs& in;
  void* grad;  // [rows, classes], or null
  RowStrides grad_stride;
  bool terms;
  Constants constants;

  bool one_sweep() const { return is_one_sweep(in.divergence); }
  // What the sweep that sums slopes leaves is found again by the one that balances them.
  bool keeps_slopes() const { return !one_sweep() && !is_reverse(in.divergence); }

  // Whether a row's gradient is q - p as it stands, and its value known.
  bool is_difference(const Scales<T>& s) const {
    return s.mean > 0 && is_mean_of_gaps(in.divergence);
  }

  bool past_caches() const {
    constexpr int64_t kLeastClasses = 2048;  // set by measurement
    return passes_caches(in, grad, kLeastClasses);
  }
  // After whatever is to be seen by other threads.
  void complete() const {
    if (past_caches()) complete_copies();
  }

  void* grad_at(int64_t row, int64_t index) const {
    return const_cast<void*>(
        at(grad, in.student_dtype, row_offset(row, in.group_rows, grad_stride) + index));
  }

  Coefficients<T, S> coefficients(const Row<T>& row, const Scales<T>& s, double gain) const {
    Coefficients<T, S> c = make_coefficients<S>(in, row, s, gain);
    if (row.left_out >= 0) decouple(in, row, s, gain, &c);
    return c;
  }

  // Whether the second sweep works with kept exponentials: its bits may not depend on who computes
  // a segment.
  bool keeps() const { return Kept<T>::kClasses > 0 && in.divergence != Divergence::kCosine; }

  int64_t segments() const { return (in.classes + kSegment - 1) / kSegment; }
  int64_t end_of(int64_t segment) const {
    const int64_t end = (segment + 1) * kSegment;
    return end < in.classes ? end : in.classes;
  }

  // Has the processor look up where the next pages are, many at once, before they are wanted: a
  // first access of a page, even to prefetch, waits for that, some 100 ns on a virtual machine.
  // Longer rows gain nothing. (Inlined also because GCC leaves out calls of functions that only
  // prefetch.)
  FASTKD_HOST_DEVICE void touch_pages(const Logits& student, const Logits& teacher, int64_t index,
                                      int64_t at, int64_t count) const {
    constexpr int64_t kPage = 4096, kAtOnce = 4 * kPage;  // bytes
    constexpr int64_t kClasses = kAtOnce / static_cast<int64_t>(sizeof(S));
    if (in.classes > kSegment || (index * in.classes + at) % kClasses >= count) return;
    for (int64_t ahead = kAtOnce; ahead < 2 * kAtOnce; ahead += kPage) {
      prefetch<Into::kL2>(static_cast<const char*>(student.at(at)), ahead);
      prefetch<Into::kL2>(static_cast<const char*>(teacher.at(at)), ahead);
      if (grad != nullptr) prefetch<Into::kL2>(static_cast<const char*>(grad_at(index, at)), ahead);
    }
  }

  // The teacher's sums, with those that show whether the row is plain.
  template <bool kKeep>
  ExponentialSums sum_gaps(const Vectors<const S>& z, const Vectors<const S>& w, int64_t count,
                           const Exponential<T, S>& teachers, T student_max, T* kept,
                           Into next) const {
    if constexpr (sizeof(T) == sizeof(float)) {
      const auto sum = [&](auto gaps) {
        return sum_exponentials<Hard::kNone, kKeep, decltype(gaps)::value>(
            w, count, teachers, teachers, kept, next, z, student_max);
      };
      if (is_even_jsd(in)) return sum(constant<GapSum::kBounded>);
      return sum(constant<GapSum::kWhole>);
    }
    return {};
  }

  // Maxima and sums in one go: the sums so far are rescaled when a block raises a maximum. With
  // kKeep, `into` receives the exponentials and what each block's are relative to.
  template <Hard kHard, bool kKeep>
  Statistics scan_blocks(const Row<T>& row, int64_t index, int64_t begin, int64_t end,
                         const Left<T>& into) const {
    alignas(64) S student_buffer[kLongest];
    alignas(64) S teacher_buffer[kLongest];
    const Logits student = student_of(in, index), teacher = teacher_of(in, index);
    Exponential<T, S> tempered(row.factor, 0, 1), own(row.hard_factor, 0, 1);
    Exponential<T, S> teachers(row.teacher_factor, 0, 1);
    Statistics result = kNoStatistics;
    T *student_kept = into.student, *teacher_kept = into.teacher;
    double *student_max = into.student_max, *teacher_max = into.teacher_max;
    bool gaps = row.gaps;
    for_blocks(begin, end, row.left_out, [&](int64_t at, int64_t count) {
      const Vectors<const S> z = fetch(student, at, count, student_buffer, row.left_out);
      const Vectors<const S> w = fetch(teacher, at, count, teacher_buffer, row.left_out);
      touch_pages(student, teacher, index, at, count);
      const double top = maximum(z, count), teacher_top = maximum(w, count);
      const bool raised = top > result.student_max || teacher_top > result.teacher_max;
      if (gaps && raised && at > begin) {
        result.gap_sum = moved_gaps(row, result, std::fmax(top, result.student_max),
                                    std::fmax(teacher_top, result.teacher_max));
      }
      if (top > result.student_max) {
        if (result.student_max > kLowest) {
          result.student_sum *= row.rescale(result.student_max, top);
          result.hard_sum *= row.hard_rescale(result.student_max, top);
        }
        tempered.max = own.max = static_cast<T>(top);
        result.student_max = top;
      }
      if (teacher_top > result.teacher_max) {
        if (result.teacher_max > kLowest) {
          result.teacher_sum *= row.teacher_rescale(result.teacher_max, teacher_top);
        }
        teachers.max = static_cast<T>(teacher_top);
        result.teacher_max = teacher_top;
      }
      const Into next = next_of<S>(at, in.classes);
      const ExponentialSums sums = sum_exponentials<kHard, kKeep, GapSum::kNone>(
          z, count, tempered, own, student_kept, next);
      const ExponentialSums teacher_sums =
          gaps ? sum_gaps<kKeep>(z, w, count, teachers, tempered.max, teacher_kept, next)
               : sum_exponentials<Hard::kNone, kKeep, GapSum::kNone>(w, count, teachers, own,
                                                                     teacher_kept, next);
      if constexpr (kKeep) {
        student_kept += count, teacher_kept += count;
        *student_max++ = result.student_max, *teacher_max++ = result.teacher_max;
      }
      result.student_sum += sums.tempered;
      result.hard_sum += sums.hard;
      result.teacher_sum += teacher_sums.tempered;
      result.gap_sum += teacher_sums.gaps;
      // A row that is not plain by its first classes is not worth the gaps of the others.
      if (gaps && at == begin && at + count < end && mean_of(row, result) == 0) {
        gaps = false;
        result.gap_sum = kNaN<double>;
      }
    });
    return result;
  }

  // Not inlined, for most divergences have none.
  template <bool kSquares>
  __attribute__((noinline)) void add_moments(int64_t index, int64_t begin, int64_t end,
                                             Statistics* result) const {
    alignas(64) S student[kLongest];
    alignas(64) S teacher[kLongest];
    for_blocks(begin, end, -1, [&](int64_t at, int64_t count) {
      const Vectors<const S> z = fetch(student_of(in, index), at, count, student);
      const Vectors<const S> w = fetch(teacher_of(in, index), at, count, teacher);
      const Moments moments = sum_moments<kSquares, T>(z, w, count);
      result->student_moment += moments.student, result->teacher_moment += moments.teacher;
      result->student_count += moments.student_count;
      result->teacher_count += moments.teacher_count;
    });
  }

  template <bool kKeep>
  Statistics scan_range(const Row<T>& row, int64_t index, int64_t segment,
                        const Left<T>& into) const {
    const int64_t begin = segment * kSegment, end = end_of(segment);
    Statistics result = with_hard<T>(row.hard, [&](auto hard) {
      return scan_blocks<decltype(hard)::value, kKeep>(row, index, begin, end, into);
    });
    if (row.unit) add_moments<true>(index, begin, end, &result);
    if (row.centered) add_moments<false>(index, begin, end, &result);
    if (holds(begin, end - begin, row.left_out)) {
      const Logits student = student_of(in, index), teacher = teacher_of(in, index);
      result.student_label = read_one<double>(student.base, student.dtype, row.left_out);
      result.teacher_label = read_one<double>(teacher.base, teacher.dtype, row.left_out);
    }
    return result;
  }

  // Leaves the exponentials in `into` where that is room for them.
  Statistics scan(const Row<T>& row, int64_t index, int64_t segment, const Left<T>& into) const {
    if (row.state != State::kNormal) return kNoStatistics;
    return into.any() ? scan_range<true>(row, index, segment, into)
                      : scan_range<false>(row, index, segment, into);
  }

  // What scan() leaves of a segment, once more, for who has only the statistics.
  Left<T> keep(const Row<T>& row, const Scales<T>& s, int64_t index, int64_t segment,
               Kept<T>* kept) const {
    if (!keeps() || row.state != State::kNormal || !s.valid()) return {};
    const bool needed = grad != nullptr || in.divergence == Divergence::kSoftCrossEntropy;
    if (is_difference(s) && !needed) return {};
    Row<T> tempered_only = row;
    tempered_only.hard = Hard::kNone;
    tempered_only.gaps = tempered_only.centered = false;
    scan_range<true>(tempered_only, index, segment, kept->left());
    return kept->left();
  }

  void fill(int64_t index, int64_t begin, int64_t end, T value) const {
    if (grad == nullptr) return;
    alignas(64) T block[kBlock];
    for (T& x : block) x = value;
    for (int64_t at = begin; at < end; at += kBlock) {
      const int64_t count = end - at < kBlock ? end - at : kBlock;
      FASTKD_ISA::write(block, in.student_dtype, count, grad_at(index, at));
    }
  }

  // What only `terms` and label smoothing ask for, of the block that starts at `at`.
  void sum_extras(const Row<T>& row, const Coefficients<T, S>& c, const Scales<T>& s, int64_t index,
                  int64_t at, int64_t count, Sums* sums) const {
    alignas(64) T z[kLongest];
    alignas(64) T w[kLongest];
    copy_block(student_of(in, index), at, count, z);
    if (row.hard != Hard::kNone && in.label_smoothing != 0) {
      const double share = in.label_smoothing / static_cast<double>(in.classes);
      sums->student_logits += share * sum_offsets(z, s.student_max, count);
    }
    if (!terms) return;
    copy_block(teacher_of(in, index), at, count, w);
    if (holds(at, count, row.left_out)) {
      z[row.left_out - at] = w[row.left_out - at] = -kInfinity<T>;
    }
    const Entropies<T> e = sum_entropies(c, std::log(s.student_scale), std::log(s.teacher_scale),
                                         s.student_max, s.teacher_max, z, w, count);
    sums->student_entropy += e.student;
    sums->teacher_entropy += e.teacher;
    sums->agreement += e.agreement;
  }

  // The teacher's entropy, where the divergence has it and nobody asks for more.
  void sum_entropy(const Coefficients<T, S>& c, const Scales<T>& s, int64_t index, int64_t at,
                   int64_t count, const Left<T>& left, Sums* sums) const {
    alignas(64) S teacher[kLongest];
    const Vectors<const S> w = fetch(teacher_of(in, index), at, count, teacher);
    const T log_scale = std::log(s.teacher_scale);
    sums->teacher_entropy -= left.any() ? sum_p_log_p<true>(c, log_scale, w, left.teacher, count)
                                        : sum_p_log_p<false>(c, log_scale, w, left.teacher, count);
  }

  // Calls fn for the form of the loops that write gradients that the row asks for.
  template <class Fn>
  auto with_form(const Row<T>& row, const Coefficients<T, S>& c, const Left<T>& left,
                 Fn&& fn) const {
    const auto apart = [&](auto hard) {
      if (c.way == Way::kApart) return fn(hard, constant<Way::kApart>);
      return fn(hard, constant<Way::kSeparate>);
    };
    const bool hard = row.gradient_hard != Hard::kNone;
    if (c.apart()) return hard ? apart(constant<Hard::kOwn>) : apart(constant<Hard::kNone>);
    return with_hard<T>(row.gradient_hard, [&](auto has_hard) {
      return left.any() ? fn(has_hard, constant<Way::kKept>) : fn(has_hard, constant<Way::kAnew>);
    });
  }

  // One block of the forward KL's second sweep.
  template <class L>
  SlopeSums differentiate(const Row<T>& row, const Coefficients<T, S>& c, const Left<T>& left,
                          const Vectors<const L>& z, const Vectors<const L>& w, const Vectors<L>& g,
                          int64_t count) const {
    return with_form(row, c, left, [&](auto has_hard, auto way) {
      constexpr Hard kHard = decltype(has_hard)::value;
      constexpr Way kWay = decltype(way)::value;
      return row.left_out < 0
                 ? write_gradient<kHard, kWay, false>(c, z, w, left.student, left.teacher, g, count)
                 : write_gradient<kHard, kWay, true>(c, z, w, left.student, left.teacher, g, count);
    });
  }

  // The same for the others: their slopes, then the gradient from these.
  template <class L>
  SlopeSums slopes(const Coefficients<T, S>& c, const Left<T>& left, const Vectors<const L>& z,
                   const Vectors<const L>& w, T* q, T* slope, int64_t count) const {
    if constexpr (sizeof(T) == sizeof(float) && std::is_same<L, S>::value) {
      if (c.plain_here() && left.any()) {
        return sum_plain_jsd(c, z, w, left.student, left.teacher, slope, count);
      }
    }
    const auto sum = [&](auto divergence, auto way) {
      return sum_slopes<decltype(divergence), decltype(way)::value>(
          c, constants, z, w, left.student, left.teacher, q, slope, count);
    };
    if (in.divergence == Divergence::kCosine) return sum(Cosine{}, constant<Way::kUnit>);
    const auto in_its_way = [&](auto divergence) {
      if (c.way == Way::kApart) return sum(divergence, constant<Way::kApart>);
      if (c.way == Way::kSeparate) return sum(divergence, constant<Way::kSeparate>);
      return left.any() ? sum(divergence, constant<Way::kKept>)
                        : sum(divergence, constant<Way::kAnew>);
    };
    if constexpr (sizeof(T) == sizeof(float)) {
      if (is_even_jsd(in)) return in_its_way(EvenJensenShannon{});
    }
    return visit(in.divergence, in_its_way);
  }
  // `q`: what was kept of the student, if anything was.
  template <class L>
  void balance(const Row<T>& row, const Coefficients<T, S>& c, const Left<T>& left,
               const Vectors<const L>& z, const T* q, const T* slope, const Vectors<L>& g,
               int64_t count) const {
    const T q_scale = left.any() ? c.student_scale : T(1);
    const Hard hard =
        c.apart() && row.gradient_hard != Hard::kNone ? Hard::kOwn : row.gradient_hard;
    const bool any = leaves_out_masked(balance_of(in.divergence)) || c.soft_gain == T(0);
    with_hard<T>(hard, [&](auto has_hard) {
      constexpr Hard kHard = decltype(has_hard)::value;
      if constexpr (sizeof(T) == sizeof(float) && std::is_same<L, S>::value) {
        if (c.plain_here() && left.any()) {
          return write_plain_gradient<kHard, true>(c, z, q, slope, g, count);
        }
      }
      any ? balance_gradient<kHard, true>(c, z, q, q_scale, slope, g, count)
          : balance_gradient<kHard, false>(c, z, q, q_scale, slope, g, count);
    });
  }

  // The reverse KL's two loops.
  template <class L>
  double reverse_slopes(const Coefficients<T, S>& c, const Left<T>& left, const Vectors<const L>& z,
                        const Vectors<const L>& w, int64_t count) const {
    const auto sum = [&](auto way) {
      return sum_reverse<decltype(way)::value>(c, z, w, left.student, count);
    };
    if (c.way == Way::kApart) return sum(constant<Way::kApart>);
    if (c.way == Way::kSeparate) return sum(constant<Way::kSeparate>);
    return left.any() ? sum(constant<Way::kKept>) : sum(constant<Way::kAnew>);
  }
  template <class L>
  double balance_reverse(const Row<T>& row, const Coefficients<T, S>& c, const Left<T>& left,
                         const Vectors<const L>& z, const Vectors<const L>& w, const Vectors<L>& g,
                         int64_t count) const {
    // In backward, too, where nobody asks for it: other loops might arrive at other bits.
    const bool value = !is_sum_of_slopes(c, c.student_share);
    return with_form(row, c, left, [&](auto has_hard, auto way) {
      constexpr Hard kHard = decltype(has_hard)::value;
      constexpr Way kWay = decltype(way)::value;
      return value
                 ? write_reverse<kHard, kWay, true>(c, z, w, left.student, left.teacher, g, count)
                 : write_reverse<kHard, kWay, false>(c, z, w, left.student, left.teacher, g, count);
    });
  }

  // Sums value and slopes of one segment. Where `left` holds exponentials, the teacher's make way
  // for the slopes.
  void sum_segment(const Row<T>& row, Coefficients<T, S>* c, const Scales<T>& s, int64_t index,
                   int64_t segment, const Left<T>& left, Sums* sums) const {
    if (row.state != State::kNormal || !s.valid()) return;
    alignas(64) S student[kLongest];
    alignas(64) S teacher[kLongest];
    alignas(64) T q[kLongest];
    alignas(64) T slope[kLongest];
    const int64_t begin = segment * kSegment;
    int64_t block = 0;
    for_blocks(begin, end_of(segment), -1, [&](int64_t at, int64_t count) {
      const Vectors<const S> z = fetch(student_of(in, index), at, count, student);
      const Vectors<const S> w = fetch(teacher_of(in, index), at, count, teacher);
      const Left<T> here = left.at(at - begin);
      if (here.any()) rescale_kept(row, s, left.student_max[block], left.teacher_max[block], c);
      const SlopeSums of_block =
          is_reverse(in.divergence)
              ? SlopeSums{0, reverse_slopes(*c, here, z, w, count), 0}
              : slopes(*c, here, z, w, q, here.any() ? here.teacher : slope, count);
      sums->value += of_block.value;
      sums->slope += of_block.slope;
      sums->classes += of_block.classes;
      ++block;
    });
    if (begin == 0) sums->value += s.nothing, sums->slope += s.nothing;
  }

  // What balances the slopes. Their sum is rounded to T, because backward reads it from `stats`.
  void set_shares(Coefficients<T, S>* c, const Sums& sums) const {
    const Balance balance = balance_of(in.divergence);
    const T slope = static_cast<T>(sums.slope);
    c->student_share = balance == Balance::kStudent || balance == Balance::kUnit ? slope : T(0);
    if (!is_mean(balance)) return;
    c->soft_gain = static_cast<T>(static_cast<double>(c->soft_gain) / sums.classes);
    if (balance == Balance::kCentered) {
      c->constant_share = static_cast<T>(static_cast<double>(slope) / sums.classes);
    }
  }

  // What is to become of the label's element: what the one-hot target takes off, or another value.
  struct Label {
    int64_t index = -1;  // in the row, or none
    bool exact = false;
    T value = 0;
  };
  void put_label(const Label& label, int64_t at, int64_t count, const Vectors<S>& g) const {
    if (!holds(at, count, label.index)) return;
    S* const element = g.element(label.index - at);
    if constexpr (std::is_same<S, T>::value) {
      *element = label.exact ? *element - label.value : label.value;
    } else {
      *element = narrow<S>(label.value);
    }
  }

  // One block of a plain row's gradient.
  void write_plain(const Row<T>& row, const Coefficients<T, S>& c, int64_t index, int64_t at,
                   int64_t count, const Left<T>& left, const Label& label) const {
    alignas(64) S student[kLongest];
    alignas(64) S result[kLongest];
    void* const place = grad_at(index, at);
    const Vectors<S> g = target(place, in.student_dtype, count, result, past_caches());
    Vectors<const S> z;
    if (row.gradient_hard == Hard::kOwn) z = fetch(student_of(in, index), at, count, student);
    with_hard<T>(row.gradient_hard, [&](auto has_hard) {
      constexpr Hard kHard = decltype(has_hard)::value;
      write_plain_gradient<kHard, false>(c, z, left.student, left.teacher, g, count);
    });
    put_label(label, at, count, g);
    put_result(g, result, place, in.student_dtype, count, past_caches());
  }

  SlopeSums write_block(const Row<T>& row, const Coefficients<T, S>& c, int64_t index, int64_t at,
                        int64_t count, const Left<T>& left, const Label& label) const {
    alignas(64) S student[kLongest];
    alignas(64) S teacher[kLongest];
    alignas(64) S result[kLongest];
    alignas(64) T q[kLongest];
    alignas(64) T slope[kLongest];
    const Vectors<const S> z = fetch(student_of(in, index), at, count, student, row.left_out);
    void* const place = grad == nullptr ? nullptr : grad_at(index, at);
    const Vectors<S> g = target(place, in.student_dtype, count, result, past_caches());
    SlopeSums sums = {};
    if (left.slopes) {
      balance(row, c, left, z, left.student, left.teacher, g, count);
    } else {
      const Vectors<const S> w = fetch(teacher_of(in, index), at, count, teacher, row.left_out);
      if (one_sweep()) {
        sums = differentiate(row, c, left, z, w, g, count);
      } else if (is_reverse(in.divergence)) {
        sums.value = balance_reverse(row, c, left, z, w, g, count);
      } else {
        slopes(c, left, z, w, q, slope, count);
        balance(row, c, left, z, left.any() ? left.student : q, slope, g, count);
      }
    }
    put_label(label, at, count, g);
    put_result(g, result, place, in.student_dtype, count, past_caches());
    return sums;
  }

  // The label's element, where the one-hot target is taken off before the gradient is rounded; of a
  // plain row from what was kept of it.
  T plain_label_gradient(const Row<T>& row, const Coefficients<T, S>& c, T student,
                         int64_t of_block, const Left<T>& left, double gain) const {
    const int64_t index = unpacked_place<S>(of_block);
    const T g = with_hard<T>(row.gradient_hard, [&](auto has_hard) {
      constexpr Hard kHard = decltype(has_hard)::value;
      return plain_gradient_of<kHard>(c, student, left.student[index], left.teacher[index]);
    });
    return g - onehot(row, gain);
  }
  T label_gradient(const Row<T>& row, const Coefficients<T, S>& c, T student, T teacher,
                   double gain) const {
    alignas(64) T z[kLanes];
    alignas(64) T w[kLanes];
    alignas(64) T q[kLanes];
    alignas(64) T slope[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) z[i] = student, w[i] = teacher;
    if (one_sweep()) {
      differentiate<T>(row, c, {}, {z}, {w}, {z}, kLanes);
    } else if (is_reverse(in.divergence)) {
      balance_reverse<T>(row, c, {}, {z}, {w}, {z}, kLanes);
    } else {
      slopes<T>(c, {}, {z}, {w}, q, slope, kLanes);
      balance<T>(row, c, {}, {z}, q, slope, {z}, kLanes);
    }
    return z[0] - onehot(row, gain);
  }
  T onehot(const Row<T>& row, double gain) const {
    return static_cast<T>(gain * row.hard_weight * (1 - in.label_smoothing));
  }

  // Sums are wanted by forward alone; null in backward.
  void write(const Row<T>& row, Coefficients<T, S>* c, const Scales<T>& s, double gain,
             int64_t index, int64_t segment, const Left<T>& left, Sums* sums) const {
    const int64_t begin = segment * kSegment, end = end_of(segment);
    const bool decoupled = row.left_out >= 0;
    const bool labelled =
        (row.hard != Hard::kNone || decoupled) && holds(begin, end - begin, row.label);
    // As backward sees it, which knows no terms.
    const bool differs = labelled && (row.gradient_hard != Hard::kNone || decoupled);
    Label label;
    label.exact = in.student_dtype == kStorage<T> && !decoupled;
    const bool plain = is_difference(s);
    T z = 0;
    if (labelled) {
      z = read_one<T>(student_of(in, index).base, in.student_dtype, row.label);
      if (sums != nullptr && row.hard != Hard::kNone) {
        const double share = 1 - in.label_smoothing;
        sums->student_logits +=
            weighted(share, static_cast<double>(z) - static_cast<double>(s.student_max));
      }
    }
    if (differs && grad != nullptr) {
      label.index = row.label;
      if (decoupled) {
        label.value = c->label_gradient;
      } else if (label.exact) {
        label.value = onehot(row, gain);
      } else if (!plain) {
        const T w = read_one<T>(teacher_of(in, index).base, in.teacher_dtype, row.label);
        label.value = label_gradient(row, *c, z, w, gain);
      }
    }
    const bool extras = sums != nullptr && (terms || in.label_smoothing != 0);
    const bool entropy =
        sums != nullptr && !terms && in.divergence == Divergence::kSoftCrossEntropy;
    const bool summed =
        one_sweep() || (is_reverse(in.divergence) && !is_sum_of_slopes(*c, c->student_share));
    double value = 0, slope = 0;
    int64_t block = 0;
    for_blocks(begin, end, row.left_out, [&](int64_t at, int64_t count) {
      if (extras) sum_extras(row, *c, s, index, at, count, sums);
      const Left<T> here = left.at(at - begin);
      if (here.any()) rescale_kept(row, s, left.student_max[block], left.teacher_max[block], c);
      if (entropy) sum_entropy(*c, s, index, at, count, here, sums);
      if (plain) {
        if (grad != nullptr) {
          if (!label.exact && holds(at, count, label.index))
            label.value = plain_label_gradient(row, *c, z, label.index - at, here, gain);
          write_plain(row, *c, index, at, count, here, label);
        }
      } else if (grad != nullptr || summed) {
        const SlopeSums of_block = write_block(row, *c, index, at, count, here, label);
        value += of_block.value, slope += of_block.slope;
      }
      ++block;
    });
    if (sums != nullptr) sums->value += value, sums->slope += slope;
  }
};

}  // namespace
}  // namespace fastkd::cpu::FASTKD_ISA
