// The sweeps of whatever the hot kernels leave out: divergences whose slopes must be summed before
// their gradient is known, and a teacher with a temperature of its own. One more sweep of the
// resident row, which costs arithmetic and no memory traffic. The divergence is looked up at run
// time, once a vector, and whether logits are taken relative to the maxima is no branch here: a
// kernel for each would be twenty times the code, and take as long to compile.
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

// Calls fn with the struct of a divergence; all weighted sums of the two KLs are one.
template <class Fn>
__device__ __forceinline__ auto visit_general(Divergence id, Fn&& fn) {
  switch (id) {
    case Divergence::kJensenShannon:
      return fn(JensenShannon{});
    case Divergence::kSkewedForwardKL:
      return fn(SkewedForwardKL{});
    case Divergence::kSkewedReverseKL:
      return fn(SkewedReverseKL{});
    case Divergence::kTotalVariation:
      return fn(TotalVariation{});
    case Divergence::kSquaredError:
      return fn(SquaredError{});
    case Divergence::kCenteredSquaredError:
      return fn(CenteredSquaredError{});
    default:
      return fn(SymmetricKL{});
  }
}

template <class A>
struct alignas(16) GeneralWriter : Writer<A, false, TwoTemperatures<A>> {
  using Base = Writer<A, false, TwoTemperatures<A>>;
  using Sums = GeneralSums<A>;
  static constexpr bool kGeneral = true;

  Divergence divergence;
  ConstantsOf<A> constants;
  A student_base, teacher_base;             // taken off the logits first
  A student_share = 0, constant_share = 0;  // of q, and of 1, which balance the slopes

  template <class Call>
  __device__ __forceinline__ GeneralWriter(const Call& call, int64_t index,
                                           const TwoTemperatures<A>& temperature,
                                           const RowStats<A>& row, A scale)
      : Base(call, index, temperature, row, scale),
        divergence(call.args.divergence),
        constants(constants_in<A>(call.constants)),
        student_base(this->apart ? row.student_max : A(0)),
        teacher_base(this->apart ? row.teacher_max : A(0)) {
    if (is_one_sweep(divergence)) constants.mix = A(1), constants.rest = A(0);
    if (divergence == Divergence::kReverseKL) constants.mix = A(0), constants.rest = A(1);
    // Comparisons drop NaN: a row that holds no answer shall have it in every class.
    if (!row.valid()) this->soft = static_cast<A>(__int_as_float(0x7fc00000));
    if (!this->apart) return;
    this->student_bias = this->teacher_bias = A(0);
    this->hard_bias = A(0);
  }

  template <class D>
  __device__ __forceinline__ Element<A> element(A z, A w, A& hard_exponent) const {
    const auto& t = this->t;
    const A zs = z - student_base, ws = w - teacher_base;
    const A apart = fma_of(ws, t.teacher_inverse(), fma_of(-zs, t.inverse, this->shift));
    const A d = t.same() ? fma_of(ws - zs, t.inverse, this->shift) : apart;
    const A q = exp2_of(fma_of(zs, t.slope, this->student_bias));
    const A p = exp2_of(fma_of(ws, t.teacher_slope(), this->teacher_bias));
    hard_exponent = fma_of(zs, static_cast<A>(kLog2E), this->hard_bias);
    Element<A> e = device_element(mul_of(p, this->stats.teacher_scale),
                                  mul_of(q, this->stats.student_scale), d);
    if (D::kBalance == Balance::kMean)
      e.gap = t.same() ? mul_of(w - z, t.inverse)
                       : fma_of(w, t.teacher_inverse(), -mul_of(z, t.inverse));
    return e;
  }

  // Value and slope of one class. The extras ride along.
  template <class D>
  __device__ __forceinline__ void sum_as(A z, A w, bool extra, Sums& sums) const {
    A unused;
    const Element<A> e = element<D>(z, w, unused);
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
  template <class D>
  __device__ __forceinline__ A write_as(A z, A w) const {
    A hard_exponent;
    const Element<A> e = element<D>(z, w, hard_exponent);
    A slope = D::at(e, constants).slope - e.q * student_share - constant_share;
    if (is_mean(D::kBalance) && slope != slope) slope = A(0);
    return soft_part(this->soft, slope) +
           this->template hard_part<kAtRunTime, true>(e.q, hard_exponent);
  }

  // The same for callers that have one class at a time.
  __device__ __forceinline__ void sum(A z, A w, bool extra, Sums& sums) const {
    visit_general(divergence,
                  [&](auto d) { this->template sum_as<decltype(d)>(z, w, extra, sums); });
  }
  template <int kPower, bool kExtra, bool kUniform = kExtra>
  __device__ __forceinline__ A write(A z, A w, Sums&) const {
    return visit_general(divergence,
                         [&](auto d) { return this->template write_as<decltype(d)>(z, w); });
  }
};

}  // namespace fastkd::cuda
