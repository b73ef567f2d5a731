// All sweeps over one row, block by block and segment by segment: maxima and sums, sums of slopes,
// value and gradient. The loops are in scan.h, blocks.h and well_separated.h. Derivations:
// docs/maths.md, sections 2, 3 and 9.
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
  using FirstSweep<T>::grad_at;
  using FirstSweep<T>::end_of;
  using FirstSweep<T>::non_temporal;
  using FirstSweep<T>::with_storage;

  bool one_sweep() const { return is_one_sweep(in.divergence); }
  // Return true if the sweep that sums slopes caches the slopes for the sweep that centers slopes.
  bool caches_slopes() const { return !one_sweep() && !is_reverse(in.divergence); }

  // Return true if the first sweep has computed the row's value, so that the gradient is q - p
  // (row.h).
  bool is_difference(const ActiveRow<T>& r) const {
    return r.scales.mean > 0 && is_mean_log_ratio(in.divergence);
  }

  ActiveRow<T> activate(const Row<T>& row, const Scales<T>& s, double gain, int64_t index) const {
    ActiveRow<T> r{index, row, s, gain, make_coefficients(in, row, s, gain)};
    if (row.left_out >= 0) decouple(in, row, s, gain, &r.c);
    return r;
  }

  template <class S>
  void read_student(const ActiveRow<T>& r, RowBlock<T, S>* b, S* buffer) const {
    if (b->z.block != nullptr) return;
    b->z = fetch(student_of(in, r.index), b->at, b->classes, buffer, r.row.left_out);
  }
  template <class S>
  void read_teacher(const ActiveRow<T>& r, RowBlock<T, S>* b, S* buffer) const {
    if (b->w.block != nullptr) return;
    b->w = fetch(teacher_of(in, r.index), b->at, b->classes, buffer, r.row.left_out);
  }

  // Return true if add_extras() may have sums to add.
  bool has_extras() const {
    return terms || in.label_smoothing != 0 || in.divergence == Divergence::kSoftCrossEntropy;
  }
  // Add the label's part of Sums::student_logits (kernels.h), if this segment holds the label.
  void add_label_logit(const ActiveRow<T>& r, int64_t segment, Sums* sums) const {
    const int64_t begin = segment * kSegment, label = r.row.label;
    if (r.row.hard == ExpSource::kNone || !holds(begin, end_of(segment) - begin, label)) return;
    const double z = read_one<T>(student_of(in, r.index).base, in.student_dtype, label);
    sums->student_logits +=
        weighted(1 - in.label_smoothing, z - static_cast<double>(r.scales.student_max));
  }
  // Add a block's sums for label smoothing, `terms` and the soft cross entropy.
  template <class S>
  __attribute__((noinline)) void add_extras(const ActiveRow<T>& r, const RowBlock<T, S>& b,
                                            Sums* sums) const {
    if (r.row.hard != ExpSource::kNone && in.label_smoothing != 0) {
      alignas(64) T z[kLongest];
      const double share = in.label_smoothing / static_cast<double>(in.classes);
      copy_block(student_of(in, r.index), b.at, b.classes, z);
      sums->student_logits += share * sum_offsets(z, r.scales.student_max, b.classes);
    }
    if (!terms && in.divergence != Divergence::kSoftCrossEntropy) return;
    const Entropies e =
        terms ? sum_entropies<true>(r.c, r.scales, b) : sum_entropies<false>(r.c, r.scales, b);
    sums->student_entropy += e.student;
    sums->teacher_entropy += e.teacher;
    sums->agreement += e.agreement;
  }

  // Sum value and slopes of a block; of the reverse KL, only slopes. If caches_slopes(), the slopes
  // replace the teacher's exponentials.
  template <class S>
  SlopeSums sum_block(const ActiveRow<T>& r, const RowBlock<T, S>& b) const {
    const Coefficients<T>& c = r.c;
    if (is_reverse(in.divergence)) return {0, sum_reverse(c, b), 0};
    if constexpr (sizeof(T) == sizeof(float)) {
      if (c.is_comparable()) return find_even_slopes(c, b);
    }
    const ConstantsOf<T>& k = constants_in<T>(constants);
    if (r.row.unit) return find_slopes<Cosine>(c, k, b);
    return visit(in.divergence, [&](auto divergence) -> SlopeSums {
      using D = decltype(divergence);
      if constexpr (std::is_same<D, ForwardKL>::value || std::is_same<D, ReverseKL>::value) {
        return {};  // not reached
      } else {
        return find_slopes<D>(c, k, b);
      }
    });
  }

  // Sum value and slopes of one segment. In `cache`, slopes replace the teacher's exponentials as
  // in sum_block().
  void sum_segment(ActiveRow<T>* r, int64_t segment, const SegmentCache<T>& cache,
                   Sums* sums) const {
    if (!r->has_gradient()) return;
    add_label_logit(*r, segment, sums);
    with_storage([&](auto storage) {
      using S = decltype(storage);
      alignas(64) S student[kLongest];
      alignas(64) S teacher[kLongest];
      this->template for_exponentials<S>(r, segment, cache, [&](RowBlock<T, S> b) {
        read_student(*r, &b, student), read_teacher(*r, &b, teacher);
        if (has_extras()) add_extras(*r, b, sums);
        const SlopeSums of_block = sum_block(*r, b);
        sums->value += of_block.value;
        sums->slope += of_block.slope;
        sums->classes += of_block.classes;
      });
    });
    const double zero_row_value = segment == 0 ? r->scales.zero_row_value : 0;
    sums->value += zero_row_value, sums->slope += zero_row_value;
  }

  // Set the shares that center the slopes, and divide soft_gain by n for a mean. The sum of slopes
  // is rounded to T, as in `stats`.
  void set_shares(Coefficients<T>* c, const Sums& sums) const {
    const SlopeCentering centering = centering_of(in.divergence);
    const T slope = static_cast<T>(sums.slope);
    c->student_share =
        centering == SlopeCentering::kStudent || centering == SlopeCentering::kUnit ? slope : T(0);
    if (!is_mean(centering)) return;
    c->soft_gain = static_cast<T>(static_cast<double>(c->soft_gain) / sums.classes);
    if (centering == SlopeCentering::kCentered) {
      c->constant_share = static_cast<T>(static_cast<double>(slope) / sums.classes);
    }
  }

  Label<T> label_of(const ActiveRow<T>& r) const {
    const Row<T>& row = r.row;
    if (grad == nullptr) return {};
    if (row.left_out >= 0) return {row.label, true, r.c.label_gradient};
    // Read gradient_hard instead of hard, because backward does not know `terms`.
    if (row.gradient_hard == ExpSource::kNone) return {};
    return {row.label, false, static_cast<T>(r.gain * row.hard_weight * (1 - in.label_smoothing))};
  }

  // Write a block's gradient to b.grad. Return the sums that are computed in the same loop, and 0
  // for the remaining sums.
  template <ExpSource kSource, class S>
  SlopeSums write_block(const ActiveRow<T>& r, const RowBlock<T, S>& b) const {
    const Coefficients<T>& c = r.c;
    const Label<T> label = label_of(r);
    if (is_difference(r)) {
      write_difference<kSource>(c, b, label);
      return {};
    }
    if (is_reverse(in.divergence)) {
      return is_sum_of_slopes(c, c.student_share) ? write_reverse_kl<kSource, false>(c, b, label)
                                                  : write_reverse_kl<kSource, true>(c, b, label);
    }
    if (one_sweep()) {
      return r.row.left_out >= 0 ? write_forward_kl<kSource, true>(c, b, label)
                                 : write_forward_kl<kSource, false>(c, b, label);
    }
    leaves_out_masked(centering_of(in.divergence))
        ? center_slopes<kSource, true>(c, r.row.unit, b, label)
        : center_slopes<kSource, false>(c, r.row.unit, b, label);
    return {};
  }

  // Write the gradient of a segment, and add to `sums`, which is null in backward. `has_slopes`:
  // true if `cache` holds the slopes of sum_segment().
  void write(ActiveRow<T>* r, int64_t segment, const SegmentCache<T>& cache, bool has_slopes,
             Sums* sums) const {
    const bool difference = is_difference(*r);
    const bool extras = sums != nullptr && one_sweep() && has_extras();
    const bool is_value_summed =
        one_sweep() ? !difference
                    : is_reverse(in.divergence) && !is_sum_of_slopes(r->c, r->c.student_share);
    const bool writes = grad != nullptr || (sums != nullptr && is_value_summed);
    if (sums != nullptr && one_sweep()) add_label_logit(*r, segment, sums);
    if (!writes && !extras) return;
    const bool finds_slopes = caches_slopes() && !has_slopes;
    const bool reads_both = finds_slopes || extras || !(difference || caches_slopes());
    const ExpSource source = grad != nullptr ? r->row.gradient_hard : ExpSource::kNone;
    with_storage([&](auto storage) {
      using S = decltype(storage);
      alignas(64) S student[kLongest];
      alignas(64) S teacher[kLongest];
      alignas(64) S result[kLongest];
      this->template for_exponentials<S>(r, segment, cache, [&](RowBlock<T, S> b) {
        const bool reads_student = source == ExpSource::kSeparate || r->row.unit;
        if (reads_both || reads_student) read_student(*r, &b, student);
        if (reads_both) read_teacher(*r, &b, teacher);
        if (extras) add_extras(*r, b, sums);
        if (!writes) return;
        if (finds_slopes) sum_block(*r, b);
        void* const to = grad_at(r->index, b.at);
        b.grad = target(to, in.student_dtype, b.classes, result, non_temporal());
        const SlopeSums of_block = with_source(source, [&](auto constant_source) {
          return write_block<decltype(constant_source)::value>(*r, b);
        });
        put_result(b.grad, result, to, in.student_dtype, b.classes, non_temporal());
        if (sums != nullptr) sums->value += of_block.value, sums->slope += of_block.slope;
      });
    });
  }
};

}  // namespace
}  // namespace fastkd::cpu::FASTKD_ISA
