// Test the arithmetic of the CUDA kernels (csrc/cuda/writer.cuh, general.cuh), compiled for the
// CPU. Single classes, and rows that several threads share, are compared with long double. The
// rounding of ex2.approx and rcp.approx, and the cooperation of threads on a device, are not
// tested.
#include "device_problem.h"

namespace {

// ---- one class

template <class A>
void elements() {
  const Real eps = std::numeric_limits<A>::epsilon();
  for (int power = 0; power >= -40; power -= 4) {
    const A p = static_cast<A>(std::ldexp(0.75, power));
    for (int sign = -1; sign <= 1; sign += 2) {
      for (double size = 1e-8; size < 30; size *= 1.07) {
        const A d = static_cast<A>(sign * size);
        const Real exact_p = p, exact_d = d;
        const A q = static_cast<A>(exact_p * std::exp(-exact_d));
        const Element<A> e = device_element(p, q, d);
        const Real diff = exact_p * std::expm1(-exact_d);
        // d + expm1(-d) cancels even in long double, so a small d uses the series.
        Real f = exact_d + std::expm1(-exact_d);
        if (size < 0.5) {
          Real term = exact_d * exact_d / 2;
          f = term;
          for (int n = 3; n < 30; ++n) f += term *= -exact_d / n;
        }
        // Above the limit of the series, p d and q - p have separate rounding errors.
        const Real noise = size < 0.125 ? Real(0) : 2 * eps * (exact_p * size + exact_p + q);
        const std::string at = "p " + std::to_string(p) + ", d " + std::to_string(d);
        check(std::fabs(e.diff - diff) <= 3 * eps * std::fabs(diff) + noise, "diff at " + at,
              e.diff, static_cast<double>(diff));
        check(std::fabs(e.excess - exact_p * f) <= 3 * eps * exact_p * f + noise, "value at " + at,
              e.excess, static_cast<double>(exact_p * f));
      }
    }
  }
  const A infinity = std::numeric_limits<A>::infinity(), nan = std::numeric_limits<A>::quiet_NaN();
  const A p(0.25), q(0.5), zero(0);
  const auto limit = [](Element<A> e, double value, double diff, const char* what) {
    check(close(e.excess, value, 0, 0), std::string(what) + ", value", e.excess, value);
    check(close(e.diff, diff, 0, 0), std::string(what) + ", diff", e.diff, diff);
  };
  limit(device_element(zero, q, -infinity), 0.5, 0.5, "masked by the teacher");
  limit(device_element(p, zero, infinity), kInfinity, -0.25, "masked by the student");
  limit(device_element(zero, zero, nan), 0, 0, "masked by both");
  limit(device_element(zero, zero, infinity), kNaN, 0, "masked by the student, p underflows");
  limit(device_element(zero, q, A(-1e4)), 0.5, 0.5, "p underflows");
  limit(device_element(zero, zero, A(-1e4)), 0, 0, "both underflow");
}

// ---- one row

// Compute a row as `threads` threads do, which take vectors of eight classes in turn (scan() of
// sweeps.cuh).
template <class A>
Answer answer_of(const Problem& in, int threads) {
  const int64_t classes = static_cast<int64_t>(in.z.size());
  A stats_of_row[kStats + 1], loss[1], terms[kTerms];
  ForwardCall call;
  ForwardArgs& args = call.args;
  args.rows = 1, args.classes = args.group_rows = classes;
  args.labels = &in.label, args.temperature = in.t, args.label_smoothing = in.smoothing;
  args.hard_weight = kHardWeight, args.soft_weight = kSoftWeight;
  args.loss = loss, args.terms = terms, args.stats = stats_of_row;
  const Temperature<A> t(args, 0);
  std::vector<Statistics<A>> parts(static_cast<size_t>(threads));
  for (int thread = 0; thread < threads; ++thread) {
    Statistics<A>& part = parts[static_cast<size_t>(thread)];
    A top_z = kLowest<A>, top_w = kLowest<A>;
    for (int64_t begin = thread * 8; begin < classes; begin += threads * 8) {
      const int64_t end = std::min<int64_t>(begin + 8, classes);
      for (int64_t i = begin; i < end; ++i) {
        top_z = max_of(top_z, static_cast<A>(in.z[static_cast<size_t>(i)]));
        top_w = max_of(top_w, static_cast<A>(in.w[static_cast<size_t>(i)]));
      }
      if (top_z > part.student_max + t.margin || top_w > part.teacher_max + t.margin)
        part.raise(top_z, top_w, t);
      for (int64_t i = begin; i < end; ++i) {
        const A z = static_cast<A>(in.z[static_cast<size_t>(i)]);
        const A w = static_cast<A>(in.w[static_cast<size_t>(i)]);
        part.template add<kAtRunTime>(z, w, t);
      }
    }
    part.raise(top_z, top_w, t);
  }
  Statistics<A> all;
  for (const Statistics<A>& part : parts) all.raise(part.student_max, part.teacher_max, t);
  for (Statistics<A> part : parts) {
    part.raise(all.student_max, all.teacher_max, t);
    all.student_sum += part.student_sum, all.hard_sum += part.hard_sum;
    all.teacher_sum += part.teacher_sum;
  }
  const RowStats<A> stats(args, 0, all, Moments());
  const Writer<A> writer(call, 0, t, stats, A(1));
  Sums<A> sums;
  Answer answer;
  for (int64_t i = 0; i < classes; ++i) {
    const A z = static_cast<A>(in.z[static_cast<size_t>(i)]);
    const A w = static_cast<A>(in.w[static_cast<size_t>(i)]);
    A g = writer.apart ? writer.template write_as<true, kAtRunTime, true, true>(z, w, sums)
                       : writer.template write_as<false, kAtRunTime, true, true>(z, w, sums);
    if (i == in.label) g = writer.at_label(g);
    answer.grad.push_back(g);
  }
  close_row(args, 0, writer, stats, sums, static_cast<A>(in.z[static_cast<size_t>(in.label)]));
  answer.loss = loss[0], answer.hard = terms[kHard], answer.soft = terms[kSoft];
  return answer;
}

template <class A>
void compare(const Problem& in, double loss_error, double grad_error) {
  const Answer want = exact_answer(in);
  double norm = 0;
  for (double g : want.grad) norm += g * g;
  norm = std::sqrt(norm);
  for (int threads : {4, 32}) {  // each thread sums a part of the classes, as on the device
    const Answer got = answer_of<A>(in, threads);
    const std::string at = in.name + ", t " + std::to_string(in.t) +
                           (sizeof(A) == 8 ? ", double" : "") + ", threads " +
                           std::to_string(threads);
    const double floor = std::numeric_limits<A>::epsilon();
    // p d and q - p are rounded at the size of p, and d at the size of the maxima's difference.
    const double noise = 0.5 + 0.1 * std::fmin(in.distance, 32);
    check(close(got.hard, want.hard, 2 * floor, loss_error), at + ", hard", got.hard, want.hard);
    check(close(got.soft, want.soft, noise * floor, loss_error), at + ", soft", got.soft,
          want.soft);
    check(close(got.loss, want.loss, 2 * floor, loss_error), at + ", loss", got.loss, want.loss);
    double error = 0;
    for (size_t i = 0; i < want.grad.size(); ++i) {
      error += (got.grad[i] - want.grad[i]) * (got.grad[i] - want.grad[i]);
    }
    error = std::sqrt(error);
    const double limit = grad_error * norm + 2 * floor * (1 + in.t);
    check(error <= limit, at + ", gradient's error", error, limit);
  }
}

void everywhere(const Problem& in) {
  // A low temperature multiplies the rounding errors of exponents, in any implementation.
  const double slack = in.t < 0.1 ? 8 : 1;
  compare<float>(in, 1.5e-6 * slack, 1.5e-6 * slack);
  if (has_truth_for_double()) compare<double>(in, 1e-14 * slack, 1e-14 * slack);
}

Problem problem(const std::string& name, int classes, double student_offset, double teacher_offset,
                double spread, double distance, double t) {
  std::mt19937_64 random(7);
  std::normal_distribution<double> normal;
  Problem in;
  in.name = name, in.t = t, in.label = classes / 3;
  in.distance = std::fabs(student_offset - teacher_offset);
  for (int i = 0; i < classes; ++i) {
    const double w = spread * normal(random), z = w + distance * normal(random);
    in.z.push_back(static_cast<float>(z + student_offset));
    in.w.push_back(static_cast<float>(w + teacher_offset));
  }
  return in;
}

void rows() {
  for (double t : {0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 20.0}) {
    for (double offset : {0.0, 30.0, -100.0, 1e4, -1e4, 3e6, -1e7, 1e38, -1e38, 3e38}) {
      const std::string at = " at " + std::to_string(static_cast<float>(offset));
      everywhere(problem("both" + at, 300, offset, offset, 3, 1, t));
      everywhere(problem("apart" + at, 300, offset, -offset, 3, 1, t));
      everywhere(problem("teacher" + at, 300, 0, offset, 3, 1, t));
    }
    for (double distance : {1e-1, 1e-3, 1e-4}) {
      Problem in = problem("near by " + std::to_string(distance), 3000, 0, 0, 3, distance, t);
      everywhere(in);
    }
    Problem smooth = problem("smoothing", 300, 1e4, -2e4, 3, 1, t);
    smooth.smoothing = 0.1;
    everywhere(smooth);
  }
  for (double size : {1e4, 1e30, 2.5e37}) {
    everywhere(problem("one-hot, " + std::to_string(static_cast<float>(size)), 100, 0, 0, size,
                       size / 3, 1));
  }
  for (double t : {1e-3, 1e-2, 100.0, 1e4}) everywhere(problem("extreme", 100, 0, 0, 3, 1, t));
}

// Test masked classes and invalid rows.
void limits() {
  for (double t : {1.0, 1.5, 2.0}) {
    Problem in = problem("the teacher masks", 300, 0, 0, 3, 1, t);
    for (size_t i = 0; i < 300; i += 3) in.w[i] = -kInfinity;
    everywhere(in);
    in.name = "both mask";
    for (size_t i = 0; i < 300; i += 3) in.z[i] = -kInfinity;
    in.label = 1;
    everywhere(in);
    in.name = "all but one masked by the teacher";
    for (size_t i = 0; i < 299; ++i) in.w[i] = -kInfinity;
    everywhere(in);

    in = problem("the student masks", 300, 0, 0, 3, 1, t);
    in.z[0] = -kInfinity;
    everywhere(in);
    in.name = "the student masks, and the teacher is almost sure";
    in.w[0] = -1e4;
    everywhere(in);

    const auto is_nan = [](const Problem& bad) {
      for (int threads : {1, 32}) {
        const Answer got = answer_of<float>(bad, threads);
        const Answer wide = answer_of<double>(bad, threads);
        for (const Answer* answer : {&got, &wide}) {
          check(std::isnan(answer->loss), bad.name + ", loss", answer->loss, kNaN);
          for (double g : answer->grad) check(std::isnan(g), bad.name + ", gradient", g, kNaN);
        }
      }
    };
    for (size_t where : {size_t(0), size_t(150), size_t(299)}) {
      for (double value : {kNaN, kInfinity}) {
        Problem bad = problem("a bad student logit", 300, 0, 0, 3, 1, t);
        bad.z[where] = value;
        is_nan(bad);
        bad = problem("a bad teacher logit", 300, 0, 0, 3, 1, t);
        bad.w[where] = value;
        is_nan(bad);
      }
    }
    Problem bad = problem("no student class", 300, 0, 0, 3, 1, t);
    for (double& z : bad.z) z = -kInfinity;
    is_nan(bad);
    bad = problem("no teacher class", 300, 0, 0, 3, 1, t);
    for (double& w : bad.w) w = -kInfinity;
    is_nan(bad);
  }
  for (double t : {0.0, -1.0, kInfinity, kNaN}) {
    const Answer got = answer_of<float>(problem("no temperature", 20, 0, 0, 3, 1, t), 2);
    check(std::isnan(got.loss) && std::isnan(got.grad[0]), "no temperature", got.loss, kNaN);
  }
}

// ---- divergences whose slopes are summed first, and teachers with a temperature of their own

struct Objective {
  Divergence divergence;
  double mix, t, teacher_t;
};

Answer exact_general(const Problem& in, const Objective& o) {
  const auto exact = truth::divergence(o.divergence, o.mix, in.z, in.w, o.t, o.teacher_t, in.label);
  Answer answer;
  Real top = -kInfinity, hard_sum = 0;
  for (double z : in.z) top = std::fmax(top, Real(z));
  for (double z : in.z) hard_sum += std::exp(z - top);
  const Real n = static_cast<Real>(in.z.size());
  for (size_t i = 0; i < in.z.size(); ++i) {
    const Real target =
        in.smoothing / n + (static_cast<int64_t>(i) == in.label ? 1 - in.smoothing : 0);
    answer.grad.push_back(
        static_cast<double>(kHardWeight * (std::exp(in.z[i] - top) / hard_sum - target) +
                            kSoftWeight * o.t * exact.grad[i]));
  }
  answer.soft = static_cast<double>(exact.value);
  return answer;
}

template <class A>
Answer general_of(const Problem& in, const Objective& o) {
  const int64_t classes = static_cast<int64_t>(in.z.size());
  A stats_of_row[kStats + 1], loss[1], terms[kTerms];
  // The row settings hold the tested numbers. The call's settings differ, and must not be used.
  const A settings[kRowSettings] = {static_cast<A>(o.t), static_cast<A>(o.teacher_t),
                                    static_cast<A>(kHardWeight), static_cast<A>(kSoftWeight)};
  ForwardCall call;
  call.constants = make_constants(o.divergence, o.mix);
  ForwardArgs& args = call.args;
  args.rows = 1, args.classes = args.group_rows = classes;
  args.labels = &in.label, args.label_smoothing = in.smoothing;
  args.row_settings = settings, args.hard_weight = args.soft_weight = 7, args.temperature = 3;
  args.divergence = o.divergence, args.mix = o.mix;
  args.loss = loss, args.terms = terms, args.stats = stats_of_row;
  const std::vector<A> student(in.z.begin(), in.z.end()), teacher(in.w.begin(), in.w.end());
  args.student = student.data(), args.teacher = teacher.data();
  args.student_dtype = args.teacher_dtype = sizeof(A) == 8 ? DType::kFloat64 : DType::kFloat32;
  const Temperature<A> t(args, 0, true);
  const int64_t left_out = o.divergence == Divergence::kDecoupled ? in.label : -1;
  const auto logits = [&](size_t i, A& z, A& w) { z = student[i], w = teacher[i]; };
  Statistics<A> statistics;
  for (size_t i = 0; i < in.z.size(); ++i) {
    A z, w;
    logits(i, z, w);
    if (static_cast<int64_t>(i) == left_out) continue;
    statistics.raise(z, w, t);
    statistics.template add<kAtRunTime>(z, w, t);
  }
  Moments moments;
  for (size_t i = 0; i < in.z.size(); ++i) moments.add(student[i], teacher[i], is_unit(args));
  const GeneralStats<A> stats(args, 0, statistics, moments);
  GeneralWriter<A> writer(call, 0, t, stats, A(1));
  Sums<A> sums;
  Answer answer;
  for (size_t i = 0; i < in.z.size(); ++i) {
    A z, w;
    logits(i, z, w);
    if (static_cast<int64_t>(i) == left_out) continue;
    visit_general(o.divergence,
                  [&](auto d) { writer.template sum_as<decltype(d)>(z, w, true, sums); });
  }
  writer.set_shares(stats, sums);
  for (size_t i = 0; i < in.z.size(); ++i) {
    A z, w;
    logits(i, z, w);
    A g = visit_general(o.divergence,
                        [&](auto d) { return writer.template write_as<decltype(d)>(z, w); });
    if (static_cast<int64_t>(i) == in.label) g = writer.at_label(g);
    answer.grad.push_back(g);
  }
  close_row(args, 0, writer, stats, sums, student[static_cast<size_t>(in.label)]);
  answer.soft = terms[kSoft];
  check(close(stats_of_row[kSlopeSum], sums.slope, 0, 0) &&
            close(stats_of_row[kClassCount], sums.classes, 0, 0),
        "stats of " + in.name, stats_of_row[kSlopeSum], sums.slope);
  return answer;
}

template <class A>
void compare_general(const Problem& in, const Objective& o) {
  const Answer want = exact_general(in, o), got = general_of<A>(in, o);
  const std::string at = in.name + ", " + kDivergenceNames[static_cast<int>(o.divergence)] +
                         ", t " + std::to_string(o.t) + " and " + std::to_string(o.teacher_t) +
                         (sizeof(A) == 8 ? ", double" : "");
  const double eps = std::numeric_limits<A>::epsilon();
  // Logits divided by two temperatures are rounded at their own size before they are compared.
  const double size = o.t == o.teacher_t ? 0 : 20;
  check(close(got.soft, want.soft, (8 + size) * eps, 40 * eps), at + ", value", got.soft,
        want.soft);
  double error = 0, norm = 0;
  for (size_t i = 0; i < want.grad.size(); ++i) {
    error += (got.grad[i] - want.grad[i]) * (got.grad[i] - want.grad[i]);
    norm += want.grad[i] * want.grad[i];
  }
  const double limit = 50 * eps * std::sqrt(norm) + 4 * eps * (1 + o.t);
  check(std::sqrt(error) <= limit, at + ", gradient's error", std::sqrt(error), limit);
}

void divergences() {
  for (int id = 0; id < kDivergences; ++id) {
    const Divergence which = static_cast<Divergence>(id);
    for (double mix : {0.1, 0.5, 0.9}) {
      for (double t : {1.0, 1.5, 4.0}) {
        for (double teacher_t : {1.0, t, 3.0}) {
          const Objective o = {which, mix, t, teacher_t};
          Problem in = problem("general", 300, 0, 0, 3, 1, t);
          const auto all = [&](const char* name) {
            in.name = name;
            compare_general<float>(in, o);
            if (has_truth_for_double()) compare_general<double>(in, o);
          };
          all("general");
          in.smoothing = 0.1;
          all("general, smoothing");
          in = problem("general, apart", 300, 200, -200, 3, 1, t);
          all("general, apart");
          if (!is_mean(centering_of(which))) continue;
          in = problem("general, outlier", 300, 0, 0, 3, 1, t);
          in.z[150] = 1e6;
          all("general, outlier");
        }
      }
    }
    // Test students near the teacher, for which the direct formulas would cancel in fp32.
    for (double distance : {1e-2, 1e-3}) {
      const Objective o = {which, 0.3, 2, 2};
      const Problem in = problem("near by " + std::to_string(distance), 3000, 0, 0, 3, distance, 2);
      const double want = exact_general(in, o).soft, got = general_of<float>(in, o).soft;
      // The relative error of the total variation and the cosine grows as 1 / distance.
      const double error = which == Divergence::kSoftCrossEntropy ? 1e-6 : 1e-6 / distance * 0.05;
      check(close(got, want, 1e-12, error), in.name + ", " + kDivergenceNames[id], got, want);
    }
  }
}

}  // namespace

int main() {
  elements<float>();
  elements<double>();
  rows();
  limits();
  divergences();
  std::printf("%s: %d of %d checks failed\n", failures ? "FAIL" : "PASS", failures, checks);
  return failures != 0;
}
