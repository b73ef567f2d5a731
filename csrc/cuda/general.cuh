// The sweeps of whatever the hot kernels leave out: divergences whose slopes must be summed before
// their gradient is known, and a teacher with a temperature of its own. One more sweep of the
// resident row, which costs arithmetic and no memory traffic. The divergence is looked up at run
// time, once a vector: a kernel for each would be ten times the code.
// Derivations: docs/maths.md, section 2. Letters: numerics.h.
#pragma once
#include "writer.cuh"

namespace fastkd::cuda {

// Running sums of the sweep between: the value is D's, and the slopes balance its gradient.
template <class A>
struct GeneralSums : Sums<A> {
  A slope = 0;
  A classes = 0;  // that count for a mean: n of Balance (divergences.h), or 0

  template <int kLanes, bool kExtra>
  __device__ __forceinline__ void merge_lanes() {
    Sums<A>::template merge_lanes<kLanes, kExtra>();
    slope = lanes_sum<kLanes>(slope);
    classes = lanes_sum<kLanes>(classes);
  }
  __device__ __forceinline__ void add(const GeneralSums& other) {
    Sums<A>::add(other);
    slope += other.slope;
    classes += other.classes;
  }
};

// Constants of divergences.h in the compute type.
template <class A>
struct ConstantsOf {
  A mix, series[kSeriesTerms<A>];

  __device__ __forceinline__ explicit ConstantsOf(const Constants& k)
      : mix(static_cast<A>(k.mix)) {
#pragma unroll
    for (int i = 0; i < kSeriesTerms<A>; i++) series[i] = static_cast<A>(k.series[i]);
  }
};

template <class A>
struct alignas(16) GeneralWriter : Writer<A, false, TwoTemperatures<A>> {
  using Base = Writer<A, false, TwoTemperatures<A>>;
  using Sums = GeneralSums<A>;
  static constexpr bool kGeneral = true;

  Divergence divergence;
  ConstantsOf<A> constants;
  A student_share = 0, constant_share = 0;  // of q, and of 1, which balance the slopes

  template <class Call>
  __device__ __forceinline__ GeneralWriter(const Call& call, int64_t index,
                                           const TwoTemperatures<A>& temperature,
                                           const RowStats<A>& row, A scale)
      : Base(call, index, temperature, row, scale),
        divergence(call.args.divergence),
        constants(call.constants) {}

  template <bool kApart, class D>
  __device__ __forceinline__ Element<A> element(A z, A w, A& hard_exponent) const {
    Element<A> e = Base::template element<kApart>(z, w, hard_exponent);
    if (D::kBalance == Balance::kMean)
      e.gap = this->t.same() ? mul_of(w - z, this->t.inverse)
                             : fma_of(w, this->t.teacher_inverse(), -mul_of(z, this->t.inverse));
    return e;
  }

  // Value and slope of one class. The extras ride along.
  template <bool kApart, class D>
  __device__ __forceinline__ void sum_as(A z, A w, bool extra, Sums& sums) const {
    A unused;
    const Element<A> e = element<kApart, D>(z, w, unused);
    const Evaluated<A> here = D::at(e, constants);
    // Classes that both mask take no part in a mean.
    const bool counts = !is_mean(D::kBalance) || here.slope == here.slope;
    sums.value += counts ? here.value : A(0);
    sums.slope += counts ? here.slope : A(0);
    if (is_mean(D::kBalance)) sums.classes += counts ? A(1) : A(0);
    if (extra) Base::add_extra(z, w, e.p, e.q, sums);
  }

  // Once all slopes are summed: from here on the gradient can be written.
  __device__ __forceinline__ void balance(A slope, A classes) {
    const Balance how = balance_of(divergence);
    if (how == Balance::kStudent) student_share = slope;
    if (!is_mean(how)) return;
    this->soft = quotient_of(this->soft, classes);
    if (how == Balance::kCentered) constant_share = quotient_of(slope, classes);
  }

  // The gradient of one class, but for what belongs to the label.
  template <bool kApart, class D>
  __device__ __forceinline__ A write_as(A z, A w) const {
    A hard_exponent;
    const Element<A> e = element<kApart, D>(z, w, hard_exponent);
    A slope = D::at(e, constants).slope - e.q * student_share - constant_share;
    if (is_mean(D::kBalance) && slope != slope) slope = A(0);
    return fma_of(this->soft, slope,
                  this->template hard_part<kAtRunTime, true>(e.q, hard_exponent));
  }

  // The same for callers that have one class at a time.
  __device__ __forceinline__ void sum(A z, A w, bool extra, Sums& sums) const {
    visit(divergence, [&](auto d) {
      using D = decltype(d);
      this->apart ? sum_as<true, D>(z, w, extra, sums) : sum_as<false, D>(z, w, extra, sums);
    });
  }
  template <int kPower, bool kExtra, bool kUniform = kExtra>
  __device__ __forceinline__ A write(A z, A w, Sums&) const {
    return visit(divergence, [&](auto d) {
      using D = decltype(d);
      return this->apart ? write_as<true, D>(z, w) : write_as<false, D>(z, w);
    });
  }
};

}  // namespace fastkd::cuda
