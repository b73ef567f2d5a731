// The teacher's list of a row: the sums over the listed classes, and the gradients of these
// classes, in double. The threads of a CTA divide the list (docs/maths.md, section 13).
#pragma once
#include "forward_call.cuh"
#include "topk_rest.cuh"

namespace fastkd::cuda {

struct TopkCall {
  ForwardCall forward;
  const void* log_probs;    // acc [rows, k]
  const int64_t* indices;   // [rows, k]
  const void* grad_output;  // acc, one number or [rows]; null stands for 1
  bool grad_output_per_row;
  bool filled;  // grad holds the gradient for grad_output = 1
  topk::Comparison comparison;
  int64_t k;
};

// The teacher's list of one row, divided among the threads of a CTA.
template <class A>
struct List {
  const TopkCall& call;
  int64_t index;

  // Call fn(id, log_prob) for this thread's share of the listed classes.
  template <class Fn>
  __device__ __forceinline__ void for_each(Fn&& fn) const {
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < call.k; i += blockDim.x) {
      const int64_t id = call.indices[index * call.k + i];
      const A log_prob = static_cast<const A*>(call.log_probs)[index * call.k + i];
      if (id < 0 || log_prob == -__builtin_huge_val()) continue;  // padding (topk.h)
      fn(id, static_cast<double>(log_prob));
    }
  }
};

struct ListSums {
  double tempered = 0, hard = 0, teacher = 0;
  double count = 0;   // number of classes
  double labels = 0;  // number of entries with the row's label

  __device__ __forceinline__ void merge_lanes() {
    tempered = lanes_sum(tempered);
    hard = lanes_sum(hard);
    teacher = lanes_sum(teacher);
    count = lanes_sum(count);
    labels = lanes_sum(labels);
  }
};

// Sums and constants of a row, from which the second sweep writes the gradient.
template <class A>
struct Solution {
  bool valid, label_is_listed;
  topk::RowOptions row;
  topk::Summary summary;
  topk::Soft soft;
  topk::SoftSums sums;
  topk::Gains gains;
  RestWriter<A> rest;
};

// Return this thread's share of the list's sums, relative to `greatest`; entries with an invalid
// class are skipped.
template <class Row>
__device__ __forceinline__ ListSums sum_list(const Row& row, const List<typename Row::A>& list,
                                             double greatest, int64_t label,
                                             double inverse_temperature) {
  ListSums sums;
  const double near = topk::origin({greatest});
  list.for_each([&](int64_t id, double log_p) {
    if (id >= row.classes) return;
    const double offset = static_cast<double>(row.student_at(id)) - near;
    sums.tempered += exp(offset * inverse_temperature);
    sums.hard += exp(offset);
    sums.teacher += exp(log_p);
    sums.count += 1;
    if (id == label) sums.labels += 1;
  });
  return sums;
}

// Evaluate the divergence, or the estimator, at a listed class with the logit `z`. The function has
// two callers and most of the kernel's code, so it is not inlined.
template <class A>
__device__ __attribute__((noinline)) Evaluated<double> evaluate(const TopkCall& call,
                                                                const Solution<A>& s, double z,
                                                                double log_p) {
  const double log_e = (z - topk::origin(s.summary.list)) / s.row.temperature;
  const double p = s.soft.teacher_scale * exp(log_p), q = s.soft.student_scale * exp(log_e);
  const auto& constants = constants_in<double>(call.forward.constants);
  return visit(call.comparison.divergence, [&](auto divergence) {
    return topk::listed<decltype(divergence)>(call.comparison, s.soft, constants, p, q, log_p,
                                              log_e);
  });
}

// Return this thread's share of the sums over the listed classes.
template <class Row>
__device__ __forceinline__ topk::SoftSums sum_listed(const Row& row,
                                                     const List<typename Row::A>& list,
                                                     const Solution<typename Row::A>& s,
                                                     const TopkCall& call) {
  topk::SoftSums sums;
  list.for_each([&](int64_t id, double log_p) {
    sums.add(evaluate(call, s, static_cast<double>(row.student_at(id)), log_p));
    if (call.comparison.wants_entropy)
      sums.entropy -=
          times_log(s.soft.teacher_scale * exp(log_p), log_p + s.soft.teacher_log_scale);
  });
  return sums;
}

template <class Row>
__device__ __forceinline__ void write_list(const Row& row, const List<typename Row::A>& list,
                                           const Solution<typename Row::A>& s, const TopkCall& call,
                                           int64_t label) {
  const double near = topk::origin(s.summary.list), hard = s.gains.hard / s.summary.all.hard;
  list.for_each([&](int64_t id, double log_p) {
    const double z = static_cast<double>(row.student_at(id));
    double g = s.gains.uniform;
    if (s.gains.soft != 0) {
      const double q = s.soft.student_scale * exp((z - near) / s.row.temperature);
      g += s.gains.soft * (evaluate(call, s, z, log_p).slope - q * s.sums.slope);
    }
    if (s.row.hard) g += hard * exp(z - s.summary.all.max) - (id == label ? s.gains.onehot : 0.0);
    row.store_at(id, static_cast<typename Row::A>(g));
  });
}

}  // namespace fastkd::cuda
