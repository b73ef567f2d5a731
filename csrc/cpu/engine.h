// All sweeps of a row, block by block and segment by segment.
#pragma once
#include "decoupled.h"
#include "first_sweep.h"
#include "well_separated.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

template <class T>
struct Engine : FirstSweep<T> {
  using FirstSweep<T>::in;
  using FirstSweep<T>::grad;
  using FirstSweep<T>::terms;
  using FirstSweep<T>::constants;
  using FirstSweep<T>::pairs;
  using FirstSweep<T>::grad_at;
  using FirstSweep<T>::end_of;
  using FirstSweep<T>::non_temporal;
  using FirstSweep<T>::numbers;
  using FirstSweep<T>::place;
  using FirstSweep<T>::put_pairs;
  using FirstSweep<T>::with_storage;
  using FirstSweep<T>::for_exponentials;

  bool one_sweep() const { return is_one_sweep(in.divergence); }
  // Return true if the sweep that sums slopes caches them for the sweep that centers them.
  bool caches_slopes() const { return !one_sweep() && !is_reverse(in.divergence); }

  // Return true if a row's gradient is q - p as it stands, and its value is known.
  bool is_difference(const ActiveRow<T>& r) const {
    return r.scales.mean > 0 && is_mean_log_ratio(in.divergence);
  }

  ActiveRow<T> activate(const Row<T>& row, const Scales<T>& s, double gain, int64_t index) const {
    ActiveRow<T> r{index, row, s, gain, make_coefficients(in, row, s, gain)};
    if (row.left_out >= 0) decouple(in, row, s, gain, &r.c);
    return r;
  }

  void read_student(const ActiveRow<T>& r, RowBlock<T>* b, T* buffer) const {
    b->z = numbers(student_of(in, r.index), b->at, b->classes, buffer, r.row.left_out);
  }
  void read_teacher(const ActiveRow<T>& r, RowBlock<T>* b, T* buffer) const {
    b->w = numbers(teacher_of(in, r.index), b->at, b->classes, buffer, r.row.left_out);
  }

  // Return true if the sweep after the first sums more than the divergence.
  bool has_extras() const {
    return terms || in.label_smoothing != 0 || in.divergence == Divergence::kSoftCrossEntropy;
  }
  // The label's logit, which the hard term is made of.
  void add_label_logit(const ActiveRow<T>& r, int64_t segment, Sums* sums) const {
    const int64_t begin = segment * kSegment, label = r.row.label;
    if (r.row.hard == ExpSource::kNone || !holds(begin, end_of(segment) - begin, label)) return;
    const double z = read_one<T>(student_of(in, r.index).base, in.student_dtype, label);
    sums->student_logits +=
        weighted(1 - in.label_smoothing, z - static_cast<double>(r.scales.student_max));
  }
  // Add a block's sums for label smoothing, `terms` and the soft cross entropy.
  __attribute__((noinline)) void add_extras(const ActiveRow<T>& r, RowBlock<T> b,
                                            Sums* sums) const {
    alignas(64) T z[kLongest];
    alignas(64) T w[kLongest];
    const Scales<T>& s = r.scales;
    if (r.row.hard != ExpSource::kNone && in.label_smoothing != 0) {
      const double share = in.label_smoothing / static_cast<double>(in.classes);
      copy_block(student_of(in, r.index), b.at, b.classes, z);
      sums->student_logits += share * sum_offsets(z, s.student_max, b.classes);
    }
    if (!terms && in.divergence != Divergence::kSoftCrossEntropy) return;
    const T teacher_log_scale = std::log(s.teacher_scale);
    read_teacher(r, &b, w);
    if (!terms) {
      sums->teacher_entropy += sum_teacher_entropy(r.c, teacher_log_scale, s.teacher_max, b);
      return;
    }
    read_student(r, &b, z);
    const Entropies<T> e = sum_entropies(r.c, std::log(s.student_scale), teacher_log_scale,
                                         s.student_max, s.teacher_max, b);
    sums->student_entropy += e.student;
    sums->teacher_entropy += e.teacher;
    sums->agreement += e.agreement;
  }

  // Sums value and slopes of a block. Slopes that are cached replace the teacher's exponentials.
  SlopeSums sum_block(const ActiveRow<T>& r, RowBlock<T> b) const {
    alignas(64) T student[kLongest];
    alignas(64) T teacher[kLongest];
    const Coefficients<T>& c = r.c;
    read_student(r, &b, student);
    read_teacher(r, &b, teacher);
    if (is_reverse(in.divergence)) {
      return {0, c.shifted ? sum_reverse<true>(c, b) : sum_reverse<false>(c, b), 0};
    }
    if constexpr (sizeof(T) == sizeof(float)) {
      if (c.is_comparable()) return find_even_slopes(c, b);
    }
    const ConstantsOf<T>& k = constants_in<T>(constants);
    if (r.row.unit) return find_slopes<Cosine, false>(c, k, b);
    return visit(in.divergence, [&](auto divergence) -> SlopeSums {
      using D = decltype(divergence);
      if constexpr (std::is_same<D, ForwardKL>::value || std::is_same<D, ReverseKL>::value) {
        return {};  // not reached
      } else if constexpr (is_mean(D::kBalance)) {
        return find_slopes<D, false>(c, k, b);
      } else {
        return c.shifted ? find_slopes<D, true>(c, k, b) : find_slopes<D, false>(c, k, b);
      }
    });
  }

  // Sums value and slopes of one segment; in `cache` slopes replace the teacher's exponentials.
  void sum_segment(ActiveRow<T>* r, int64_t segment, const SegmentCache<T>& cache,
                   Sums* sums) const {
    if (!r->has_gradient()) return;
    add_label_logit(*r, segment, sums);
    for_exponentials(r, segment, cache, [&](const RowBlock<T>& b) {
      if (has_extras()) add_extras(*r, b, sums);
      const SlopeSums of_block = sum_block(*r, b);
      sums->value += of_block.value;
      sums->slope += of_block.slope;
      sums->classes += of_block.classes;
    });
    const double nothing = segment == 0 ? r->scales.nothing : 0;
    sums->value += nothing, sums->slope += nothing;
  }

  // Set the shares that center the slopes. The slope sum is rounded to T, as it is in `stats`.
  void set_shares(Coefficients<T>* c, const Sums& sums) const {
    const Balance balance = balance_of(in.divergence);
    const T slope = static_cast<T>(sums.slope);
    c->student_share = balance == Balance::kStudent || balance == Balance::kUnit ? slope : T(0);
    if (!is_mean(balance)) return;
    c->soft_gain = static_cast<T>(static_cast<double>(c->soft_gain) / sums.classes);
    if (balance == Balance::kCentered) {
      c->constant_share = static_cast<T>(static_cast<double>(slope) / sums.classes);
    }
  }

  // Update of the label's gradient: the amount that the one-hot target takes off, or a new value.
  struct Label {
    int64_t index = -1;  // in the row, or none
    bool replaces = false;
    T value = 0;
  };
  Label label_of(const ActiveRow<T>& r) const {
    const Row<T>& row = r.row;
    if (grad == nullptr) return {};
    if (row.left_out >= 0) return {row.label, true, r.c.label_gradient};
    // Not row.hard, because backward knows no terms.
    if (row.gradient_hard == ExpSource::kNone) return {};
    return {row.label, false, static_cast<T>(r.gain * row.hard_weight * (1 - in.label_smoothing))};
  }
  void put_label(const Label& label, const RowBlock<T>& b, const Vectors<T>& g) const {
    if (!holds(b.at, b.classes, label.index)) return;
    T* const element = g.element(place(label.index - b.at));
    *element = label.replaces ? label.value : *element - label.value;
  }

  // Writes the gradient of a block of a well-separated row.
  template <bool kSlopes, class S>
  void write_separated(const ActiveRow<T>& r, const RowBlock<T>& b, const Label& label) const {
    alignas(64) S student[kLongest];
    alignas(64) S result[kLongest];
    void* const to = grad_at(r.index, b.at);
    const Vectors<S> g = target(to, in.student_dtype, b.classes, result, non_temporal());
    const Logits logits = student_of(in, r.index);
    const ExpSource source = r.row.gradient_hard;
    Vectors<const S> z;
    if (source == ExpSource::kSeparate) z = fetch(logits, b.at, b.classes, student);
    // Before the student's logits may be overwritten, and before it is rounded.
    T of_label = 0;
    const bool recomputes = !std::is_same<S, T>::value && holds(b.at, b.classes, label.index);
    if (recomputes) {
      const int64_t i = place(label.index - b.at);
      const T logit = read_one<T>(logits.base, logits.dtype, label.index);
      of_label = well_separated_gradient(r.c, source, kSlopes, logit, b.student[i], b.teacher[i]) -
                 label.value;
    }
    with_source(source, [&](auto constant_source) {
      write_well_separated<decltype(constant_source)::value, kSlopes>(r.c, b, z, g);
    });
    if constexpr (std::is_same<S, T>::value) {
      put_label(label, b, g);
    } else if (recomputes) {
      *g.element(label.index - b.at) = narrow<S>(of_label);
    }
    put_result(g, result, to, in.student_dtype, b.classes, non_temporal());
  }

  // Writes a block's gradient, or sums alone.
  SlopeSums write_block(const ActiveRow<T>& r, RowBlock<T> b, const Label& label) const {
    alignas(64) T student[kLongest];
    alignas(64) T teacher[kLongest];
    alignas(64) T result[kLongest];
    alignas(64) T buffer[kLongest];
    T* const hard_part = pairs ? result : buffer;  // one buffer less in L1
    const Coefficients<T>& c = r.c;
    void* const to = grad_at(r.index, b.at);
    const Vectors<T> g = pairs ? Vectors<T>{result}
                               : target(to, in.student_dtype, b.classes, result, non_temporal());
    read_student(r, &b, student);
    with_source(r.row.gradient_hard,
                [&](auto source) { write_hard_part<decltype(source)::value>(c, b, hard_part); });
    SlopeSums sums;
    if (caches_slopes()) {
      const bool any = leaves_out_masked(balance_of(in.divergence)) || c.soft_gain == T(0);
      const auto center = any ? &center_gradient<true, T> : &center_gradient<false, T>;
      const Vectors<const T> q = r.row.unit ? b.z : Vectors<const T>{b.student};
      center(c, b, q, r.row.unit ? c.student_inverse : c.student_scale, hard_part, g);
    } else {
      read_teacher(r, &b, teacher);
      sums = is_reverse(in.divergence) ? write_reverse(c, b, hard_part, g)
                                       : write_forward(r, b, hard_part, g);
    }
    put_label(label, b, g);
    if (grad == nullptr) return sums;
    pairs ? put_pairs(result, to, b.classes)
          : put_result(g, result, to, in.student_dtype, b.classes, non_temporal());
    return sums;
  }
  SlopeSums write_forward(const ActiveRow<T>& r, const RowBlock<T>& b, const T* hard_part,
                          const Vectors<T>& g) const {
    if (r.row.left_out >= 0) {
      return r.c.shifted ? write_gradient<true, true>(r.c, b, hard_part, g)
                         : write_gradient<false, true>(r.c, b, hard_part, g);
    }
    return r.c.shifted ? write_gradient<true, false>(r.c, b, hard_part, g)
                       : write_gradient<false, false>(r.c, b, hard_part, g);
  }
  SlopeSums write_reverse(const Coefficients<T>& c, const RowBlock<T>& b, const T* hard_part,
                          const Vectors<T>& g) const {
    // In backward, too, where nobody asks for the value: other loops might have other bits.
    if (c.shifted) return {write_reverse_kl<true, true>(c, b, hard_part, g), 0, 0};
    const bool value = !is_sum_of_slopes(c, c.student_share);
    return {value ? write_reverse_kl<false, true>(c, b, hard_part, g)
                  : write_reverse_kl<false, false>(c, b, hard_part, g),
            0, 0};
  }

  // The gradient of a segment. Sums are wanted by forward alone; null in backward. `has_slopes`:
  // sum_segment() left them in `cache`.
  void write(ActiveRow<T>* r, int64_t segment, const SegmentCache<T>& cache, bool has_slopes,
             Sums* sums) const {
    const bool difference = is_difference(*r), extras = sums != nullptr && one_sweep();
    const bool is_value_summed =
        one_sweep() ? !difference
                    : is_reverse(in.divergence) && !is_sum_of_slopes(r->c, r->c.student_share);
    const bool writes = grad != nullptr || (sums != nullptr && is_value_summed);
    if (extras) add_label_logit(*r, segment, sums);
    if (!writes && !(extras && has_extras())) return;
    const Label label = label_of(*r);
    for_exponentials(r, segment, cache, [&](const RowBlock<T>& b) {
      if (extras && has_extras()) add_extras(*r, b, sums);
      if (!writes) return;
      if (caches_slopes() && !has_slopes) sum_block(*r, b);
      if (difference || r->c.is_comparable()) {
        return with_storage([&](auto storage) {
          using S = decltype(storage);
          difference ? write_separated<false, S>(*r, b, label)
                     : write_separated<true, S>(*r, b, label);
        });
      }
      const SlopeSums of_block = write_block(*r, b, label);
      if (sums != nullptr) sums->value += of_block.value, sums->slope += of_block.slope;
    });
  }
};

}  // namespace
}  // namespace fastkd::cpu::FASTKD_ISA
