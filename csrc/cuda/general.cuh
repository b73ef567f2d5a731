// The writer (writer.cuh) of the objectives that the hot kernels do not compute (is_hot(),
// launch.h). The gradient of most of these objectives needs a sum of slopes. An additional sweep of
// the same kernel computes the sum, because the row is then still in L1 or L2. The divergence is
// selected at run time, once a chunk, because a kernel for each divergence would multiply code and
// compile time. Derivations: docs/maths.md, sections 2 and 10. numerics.h defines the letters.
#pragma once
#include "vectors.cuh"
#include "writer.cuh"

namespace fastkd::cuda {

// Return the odds of a row's label against all other classes, given the logarithm of the odds.
template <class A>
__device__ __forceinline__ Odds<A> odds_of(A log) {
  return {log, exp2_of(mul_of(-magnitude_of(log), static_cast<A>(kLog2E)))};
}
// Return binary_kl() (divergences.h). The function is not inlined, because calls are rare, and
// forward and backward must compute equal bits.
template <class A>
__device__ __attribute__((noinline)) BinaryKL<A> binary_kl_of(A teacher_log, A student_log,
                                                              A difference) {
  return binary_kl(odds_of(teacher_log), odds_of(student_log), difference);
}

// The logits of a row's label; NaN if the row has no valid label.
template <class A>
struct LabelLogits {
  A student, teacher;

  __device__ __forceinline__ LabelLogits(const Inputs& in, int64_t row) {
    student = teacher = A(NAN);
    const int64_t label = label_of(in, row);
    if (label < 0 || label >= in.classes || label == in.ignore_index) return;
    const auto read = [&](const void* logits, DType dtype, const RowStrides& stride) {
      return load_any<A>(logits, dtype,
                         offset_of(row, in.group_rows, stride) + label * stride.classes);
    };
    student = read(in.student, in.student_dtype, in.student_stride);
    teacher = read(in.teacher, in.teacher_dtype, in.teacher_stride);
  }
};

// Statistics of a row from scan() and moments_of() (sweeps.cuh), for a GeneralWriter.
template <class A>
struct GeneralStats : RowStats<A> {
  // 1 / |z| and 1 / |w| for kCosine, the means of z and w for kCenteredSquaredError, else the
  // scales.
  A student_moment, teacher_moment;
  A zero_row_value = 0;  // what rows of zeros add to the divergence (kCosine)

  GeneralStats() = default;
  __device__ __forceinline__ GeneralStats(const Inputs& in, int64_t row,
                                          const Statistics<A>& statistics, const Moments& moments)
      : RowStats<A>(in, row, statistics, moments) {
    if (in.divergence == Divergence::kDecoupled) leave_out_label(in, row, statistics);
    student_moment = this->student_scale, teacher_moment = this->teacher_scale;
    if (is_unit(in)) set_inverses(in, row, moments);
    if (is_centered(in)) set_means(moments);
  }

  // Store the row's entry of `stats`, with the moments in place of the scales.
  __device__ __forceinline__ void store(A* stats, int64_t rows, int64_t row, A slope,
                                        A classes) const {
    RowStats<A> stored = *this;
    stored.student_scale = student_moment, stored.teacher_scale = teacher_moment;
    stored.store(stats, rows, row, slope, classes);
  }
  __device__ __forceinline__ void load(const A* stats, int64_t rows, int64_t row) {
    RowStats<A>::load(stats, rows, row);
    student_moment = this->student_scale, teacher_moment = this->teacher_scale;
  }

 private:
  __device__ __forceinline__ void set_inverses(const Inputs& in, int64_t row,
                                               const Moments& moments) {
    const A t = setting_of<A>(in, kTemperature, row, in.temperature);
    const Inverses<A> inverses = inverses_of<A>(moments.student, moments.teacher, t);
    student_moment = inverses.student, teacher_moment = inverses.teacher;
    zero_row_value = static_cast<A>(inverses.zero_row_value);
    const auto exists = [](A x) { return x > A(0) && x < A(INFINITY); };
    invalidate_unless(this->valid() && exists(student_moment) && exists(teacher_moment));
  }
  __device__ __forceinline__ void set_means(const Moments& moments) {
    student_moment = static_cast<A>(quotient_of(moments.student, moments.student_count));
    teacher_moment = static_cast<A>(quotient_of(moments.teacher, moments.teacher_count));
    invalidate_unless(this->valid() && student_moment - student_moment == A(0) &&
                      teacher_moment - teacher_moment == A(0));
  }
  __device__ __forceinline__ void invalidate_unless(bool good) {
    if (!good) this->student_scale = student_moment = A(NAN);
  }
  // If the student or the teacher masks all classes but the label, set its maximum and scales to 0.
  // Invalidate the row if the label is masked as well, or if a logit of the label is NaN or +inf.
  __device__ __forceinline__ void leave_out_label(const Inputs& in, int64_t row,
                                                  const Statistics<A>& statistics) {
    if (statistics.student_sum == A(0))
      this->student_max = this->student_scale = this->hard_scale = A(0);
    if (statistics.teacher_sum == A(0)) this->teacher_max = this->teacher_scale = A(0);
    const auto exists = [](A logit, A scale_of_others) {
      return logit < A(INFINITY) && (scale_of_others > A(0) || logit > A(-INFINITY));
    };
    const LabelLogits<A> label(in, row);
    if (!exists(label.student, this->student_scale) || !exists(label.teacher, this->teacher_scale))
      this->student_scale = A(NAN);
  }
};

// Call fn as visit() (divergences.h) does, and with Cosine for kCosine.
template <class Fn>
__device__ __forceinline__ auto visit_general(Divergence id, Fn&& fn) {
  return id == Divergence::kCosine ? fn(Cosine{}) : visit(id, fn);
}

template <class A>
struct alignas(16) GeneralWriter : Writer<A> {
  using Base = Writer<A>;
  using Stats = GeneralStats<A>;
  static constexpr bool kGeneral = true;

  Divergence divergence;
  ConstantsOf<A> constants;
  A student_share = 0,
    constant_share = 0;  // factors of q (kCosine: of u) and of 1, which center the slopes
  A rest_gain = 0;       // factor of q if the label is left out (kDecoupled)
  A student_moment, teacher_moment;  // as in GeneralStats

  template <class Call>
  __device__ __forceinline__ GeneralWriter(const Call& call, int64_t index,
                                           const Temperature<A>& temperature, const Stats& row,
                                           A scale)
      : Base(call, index, temperature, row, scale),
        divergence(call.args.divergence),
        constants(constants_in<A>(call.constants)),
        student_moment(row.student_moment),
        teacher_moment(row.teacher_moment) {
    // Comparisons drop NaN, so some classes of an invalid row would otherwise get a gradient other
    // than NaN.
    if (!row.valid()) this->soft = A(NAN);
    if (divergence == Divergence::kDecoupled) decouple(call.args, index);
    if (is_unit(call.args)) this->soft = mul_of(mul_of(this->soft, this->t.t), student_moment);
  }

  template <class D>
  __device__ __forceinline__ Element<A> element(A z, A w, A& hard_exponent) const {
    const auto& t = this->t;
    Element<A> e = Base::element(z, w, this->apart, hard_exponent);
    if constexpr (is_mean(D::kCentering)) {
      constexpr bool kCentered = D::kCentering == SlopeCentering::kCentered;
      const A from_z = kCentered ? z - student_moment : z;
      const A from_w = kCentered ? w - teacher_moment : w;
      e.gap = t.same ? mul_of(from_w - from_z, t.inverse)
                     : fma_of(from_w, t.teacher_inverse, -mul_of(from_z, t.inverse));
    }
    return e;
  }

  // Return value and slope of one class. Cosine takes elements of two unit vectors as p and q.
  template <class D>
  __device__ __forceinline__ Evaluated<A> evaluated(const Element<A>& e, A z, A w) const {
    if constexpr (D::kCentering == SlopeCentering::kUnit)
      return D::at(Element<A>{mul_of(w, teacher_moment), mul_of(z, student_moment), 0, 0, 0},
                   constants);
    return D::at(e, constants);
  }

  // Add value and slope of one class; with kUnit, the value in place of the slope. With `extra`,
  // also add the class to the sums of add_extra().
  template <class D>
  __device__ __forceinline__ void sum_as(A z, A w, bool extra, Sums<A>& sums) const {
    A unused;
    const Element<A> e = element<D>(z, w, unused);
    const Evaluated<A> here = evaluated<D>(e, z, w);
    // Classes that student and teacher both mask count neither for a mean nor for a norm.
    const bool counts = !leaves_out_masked(D::kCentering) || here.slope == here.slope;
    const A summed = D::kCentering == SlopeCentering::kUnit ? here.value : here.slope;
    sums.value += counts ? here.value : A(0);
    sums.slope += counts ? summed : A(0);
    if (is_mean(D::kCentering)) sums.classes += counts ? A(1) : A(0);
    if (extra) Base::add_extra(z, w, e.p, e.q, sums);
  }

  // Set the factors that center the slopes, from the sums over the row. write_as() needs these
  // factors.
  __device__ __forceinline__ void set_shares(const Stats& row, Sums<A>& sums) {
    sums.value += row.zero_row_value, sums.slope += row.zero_row_value;
    set_shares(sums.slope, sums.classes);
  }
  __device__ __forceinline__ void set_shares(A slope, A classes) {
    const SlopeCentering formula = centering_of(divergence);
    if (formula == SlopeCentering::kStudent || formula == SlopeCentering::kUnit)
      student_share = slope;
    if (!is_mean(formula)) return;
    this->soft = quotient_of(this->soft, classes);
    if (formula == SlopeCentering::kCentered) constant_share = quotient_of(slope, classes);
  }

  // Return the gradient of one class without the label's part.
  template <class D>
  __device__ __forceinline__ A write_as(A z, A w) const {
    A hard_exponent;
    const Element<A> e = element<D>(z, w, hard_exponent);
    const A hard = this->template hard_part<kAtRunTime, true>(e.q, hard_exponent);
    const A uncentered = evaluated<D>(e, z, w).slope;
    if constexpr (D::kCentering == SlopeCentering::kNone)
      return weighted_part(this->soft, uncentered) + fma_of(rest_gain, e.q, hard);
    const A q = D::kCentering == SlopeCentering::kUnit ? mul_of(z, student_moment) : e.q;
    // A divergence with a mean must not use q: for kCenteredSquaredError, backward has no scale of
    // q.
    A slope = is_mean(D::kCentering) ? uncentered - constant_share : uncentered - q * student_share;
    if (leaves_out_masked(D::kCentering) && uncentered != uncentered) slope = A(0);
    return weighted_part(this->soft, slope) + hard;
  }
  __device__ __forceinline__ A at_label(A g) const {
    return divergence == Divergence::kDecoupled ? this->label : Base::at_label(g);
  }

  // Add the label to `sums` and `log_sum`, which cover the other classes (kDecoupled). Set
  // sums.value to the divergence, and `cross_entropy` to the label's cross entropy. `z`: the
  // label's logit, which the gradient may have overwritten in memory. Only one thread of a row
  // calls this function.
  __device__ __forceinline__ void include_label(const Inputs& in, int64_t row, A z, A& log_sum,
                                                A& cross_entropy, Sums<A>& sums) const {
    if (divergence != Divergence::kDecoupled) return;
    const auto& stats = this->stats;
    const A w = LabelLogits<A>(in, row).teacher, above = z - stats.student_max;
    const Odds<A> hard = odds_of(hard_log_odds(z));
    cross_entropy = -hard.log_label();
    log_sum = (hard.log > A(0) ? above : log_sum) + log1p_of(hard.minor);
    sums.logits = fma_of(above, this->share, sums.logits);

    const A log = log_odds(z), teacher_log = teacher_log_odds(w);
    // The exact sum of q - p is 0, so that the computed sum measures the rounding error of the odds
    // (docs/maths.md, section 10).
    const A apart = odds_difference(z, w) + log1p_of(sums.slope);
    // NaN comes from 0 * inf, and means an infinite divergence, as in close_row()
    // (forward_call.cuh).
    const A within = sums.value == sums.value ? sums.value : A(INFINITY);
    sums.value = binary_kl_of(teacher_log, log, apart).value + weighted(mix_of(in), within);
    const Odds<A> student = odds_of(log), teacher = odds_of(teacher_log);
    sums.student_entropy = student.entropy() + student.rest() * sums.student_entropy;
    sums.teacher_entropy = teacher.entropy() + teacher.rest() * sums.teacher_entropy;
    const bool student_others = stats.student_scale > A(0);
    const bool teacher_others = stats.teacher_scale > A(0);
    const bool label_is_greatest =
        (!student_others || z >= stats.student_max) && (!teacher_others || w >= stats.teacher_max);
    const bool others_are = student_others && teacher_others && stats.student_max >= z &&
                            stats.teacher_max >= w && sums.agreement > A(0);
    sums.agreement = label_is_greatest || others_are ? A(1) : A(0);
  }

 private:
  // Set the label's gradient, and the factors of the other classes' gradient.
  __device__ __forceinline__ void decouple(const Inputs& in, int64_t row) {
    // d is infinite if the student or the teacher masks all classes other than the label.
    if (this->stats.student_scale == A(0)) {
      this->shift = A(INFINITY);
    } else if (this->stats.teacher_scale == A(0)) {
      this->shift = A(-INFINITY);
    }
    const LabelLogits<A> logits(in, row);
    const A z = logits.student, w = logits.teacher;
    const A diff = mul_of(
        this->soft, binary_kl_of(teacher_log_odds(w), log_odds(z), odds_difference(z, w)).diff);
    const A rest = odds_of(hard_log_odds(z)).rest();
    const A others = static_cast<A>(in.classes - 1);
    const A weight = fma_of(this->uniform, others + A(1), this->label);
    rest_gain = -diff;
    this->label = fma_of(-weight, rest, fma_of(this->uniform, others, diff));
    this->hard = mul_of(this->hard, rest);
    this->soft = mul_of(this->soft, mix_of(in));
  }

  // Return the weight of the KL among the classes other than the label: `mix`, or 0 if the teacher
  // masks all of these classes.
  __device__ __forceinline__ A mix_of(const Inputs& in) const {
    return this->stats.teacher_scale > A(0) ? static_cast<A>(in.mix) : A(0);
  }
  // Return the logarithms of the label's odds against the other classes: of the student, of the
  // teacher, and of the student at temperature 1.
  __device__ __forceinline__ A log_odds(A z) const {
    const A log = fma_of(z - this->stats.student_max, this->t.inverse, this->student_log);
    return this->stats.student_scale == A(0) ? A(INFINITY) : log;
  }
  __device__ __forceinline__ A teacher_log_odds(A w) const {
    const A log = fma_of(w - this->stats.teacher_max, this->t.teacher_inverse, this->teacher_log);
    return this->stats.teacher_scale == A(0) ? A(INFINITY) : log;
  }
  __device__ __forceinline__ A hard_log_odds(A z) const {
    const A log = (z - this->stats.student_max) - log_sum_of(this->stats);
    return this->stats.hard_scale == A(0) ? A(INFINITY) : log;
  }
  // Return teacher_log_odds(w) - log_odds(z), with the rounding error of Writer::shift.
  __device__ __forceinline__ A odds_difference(A z, A w) const {
    if (this->stats.student_scale == A(0) || this->stats.teacher_scale == A(0))
      return teacher_log_odds(w) - log_odds(z);
    return this->difference(z, w, z - this->stats.student_max, w - this->stats.teacher_max,
                            this->apart);
  }
};

}  // namespace fastkd::cuda
