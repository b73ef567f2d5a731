// Logits of a mixture of teachers, or of one teacher's probabilities, row by row, compiled once for
// each instruction set. The first sweep computes the normalization of each teacher. The second
// sweep mixes the logits, which are then in the processor's cache. A mean of logits, or one
// teacher, needs no first sweep. Formulas: docs/maths.md, section 12.
#include "../mixture.h"

#include <limits>
#include <vector>

#include "blocks.h"
#include "fp64.h"
#include "logarithm.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

template <class T>
class Mixer {
 public:
  explicit Mixer(const MixtureArgs& args)
      : args_(args),
        normal_(static_cast<size_t>(args.count)),
        blocks_(static_cast<size_t>((args.count + 2) * kBlock)) {}

  void mix(int64_t row) {
    double t = args_.temperature, teacher_t = args_.teacher_temperature;
    if (args_.row_temperatures != nullptr) {
      const T* const of_row = static_cast<const T*>(args_.row_temperatures) + row;
      t = static_cast<double>(of_row[0]), teacher_t = static_cast<double>(of_row[args_.rows]);
    }
    const bool linear = args_.count == 1 || args_.ensemble == Ensemble::kLogits;
    const T factor = static_cast<T>(kLog2E / teacher_t);
    for (int64_t k = 0; k < args_.count && !linear; ++k) normal_[k] = scan(k, row, factor);
    for (int64_t at = 0; at < args_.classes; at += kBlock) {
      const int64_t remaining = args_.classes - at, count = remaining < kBlock ? remaining : kBlock;
      T* const sums = block(args_.count);
      linear ? average(row, at, count, static_cast<T>(t / teacher_t), sums)
             : mix_block(row, at, count, factor, static_cast<T>(t), sums);
      std::memcpy(static_cast<T*>(args_.mixed) + (row - args_.first_row) * args_.classes + at, sums,
                  static_cast<size_t>(count) * sizeof(T));
    }
  }

 private:
  // Normalization of a teacher: for a logit z, 2^((z - max) * factor + log_scale) is the teacher's
  // share times the teacher's softmax.
  struct Normal {
    T max, log_scale;
  };

  T* block(int64_t i) { return blocks_.data() + i * kBlock; }

  // Load `count` logits of a teacher, or logarithms of its probabilities, padded with -inf to a
  // multiple of kLanes; return that multiple.
  int64_t load(int64_t k, int64_t row, int64_t at, int64_t count, T* to) const {
    const MixedTeacher& teacher = args_.teachers[k];
    const int64_t start = row_offset(row, teacher.group_rows, teacher.stride);
    read(FASTKD_ISA::at(teacher.logits, teacher.dtype, start + at), teacher.dtype, count, to);
    const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
    if (args_.probabilities) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) to[i] = log_of(to[i]);
    }
    for (int64_t i = count; i < padded; ++i) to[i] = -kInfinity<T>;
    return padded;
  }

  Normal scan(int64_t k, int64_t row, T factor) {
    T max = std::numeric_limits<T>::lowest();
    double sum = 0;
    T* const logits = block(k);
    for (int64_t at = 0; at < args_.classes; at += kBlock) {
      const int64_t remaining = args_.classes - at, count = remaining < kBlock ? remaining : kBlock;
      const int64_t padded = load(k, row, at, count, logits);
      const Vectors<const T> vectors{logits};
      const T top = maximum(vectors, padded);
      if (top > max) {
        sum *= std::exp2(static_cast<double>(max - top) * static_cast<double>(factor));
        max = top;
      }
      const Exponential<T> exponential(factor, max, 1.0);
      const ExponentialSums sums = sum_exponentials<ExpSource::kNone, LogRatioSum::kNone>(
          vectors, padded, exponential, exponential, 0, static_cast<T*>(nullptr), CacheLevel::kL1);
      sum += sums.tempered;
    }
    return {max, static_cast<T>(std::log2(args_.teachers[k].share / sum))};
  }

  void average(int64_t row, int64_t at, int64_t count, T scale, T* sums) {
    T* const logits = block(args_.count + 1);
    for (int64_t k = 0; k < args_.count; ++k) {
      const int64_t padded = load(k, row, at, count, logits);
      const T share = static_cast<T>(args_.teachers[k].share * static_cast<double>(scale));
#pragma omp simd
      for (int64_t i = 0; i < padded; ++i) {
        const T before = k == 0 ? T(0) : sums[i];
        sums[i] = mul_add(share, logits[i], before);
      }
    }
  }

  // Compute the mixed logits of a block: the temperature times the logarithm of the weighted sum of
  // the teachers' probabilities. The sum is relative to the greatest probability of each class, so
  // that the sum does not underflow.
  void mix_block(int64_t row, int64_t at, int64_t count, T factor, T temperature, T* sums) {
    T* const greatest = block(args_.count + 1);
    const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
    for (int64_t i = 0; i < padded; ++i) greatest[i] = -kInfinity<T>, sums[i] = 0;
    for (int64_t k = 0; k < args_.count; ++k) {
      T* const logs = block(k);
      load(k, row, at, count, logs);
      const Normal normal = normal_[static_cast<size_t>(k)];
#pragma omp simd
      for (int64_t i = 0; i < padded; ++i) {
        const T log = mul_add(logs[i] - normal.max, factor, normal.log_scale);
        logs[i] = log;
        greatest[i] = log > greatest[i] ? log : greatest[i];
      }
    }
    const Exponential<T> power(T(1), T(0), 1.0);
    const T ln_2 = static_cast<T>(kLn2);
    for (int64_t k = 0; k < args_.count; ++k) {
      const T* const logs = block(k);
#pragma omp simd
      for (int64_t i = 0; i < padded; ++i) {
        // If every teacher masks the class, base is 0, and the mixed logit is -inf.
        const T base = greatest[i] > -kInfinity<T> ? greatest[i] : T(0);
        sums[i] += power(logs[i] - base);
      }
    }
#pragma omp simd
    for (int64_t i = 0; i < padded; ++i) {
      const T nan_or_0 = sums[i] - sums[i];  // keeps NaN, which log_of() would drop
      sums[i] = mul_add(greatest[i], ln_2, fastkd::log_of(sums[i])) * temperature + nan_or_0;
    }
  }

  const MixtureArgs& args_;
  std::vector<Normal> normal_;
  std::vector<T> blocks_;  // a block for each teacher, for the sums, and for maxima or logits
};

template <class T>
void mix_rows(const MixtureArgs& args, int64_t begin, int64_t end) {
  Mixer<T> mixer(args);
  for (int64_t row = begin; row < end; ++row) mixer.mix(row);
}

}  // namespace

#if defined(FASTKD_FP64)
void fp64::mixture(const MixtureArgs& args, int64_t begin, int64_t end) {
  mix_rows<double>(args, begin, end);
}
#endif

void run_mixture(const MixtureArgs& args, int64_t begin, int64_t end);
void run_mixture(const MixtureArgs& args, int64_t begin, int64_t end) {
  args.in_double ? baseline::fp64::mixture(args, begin, end) : mix_rows<float>(args, begin, end);
}

}  // namespace fastkd::cpu::FASTKD_ISA
