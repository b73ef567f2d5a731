// The arithmetic that the CPU and the CUDA engines share: f(d) = d + expm1(-d) and q - p without
// cancellation, and logarithms. Derivations: docs/maths.md, section 3.
//
// Letters here and in all kernels:
//   z, w   student and teacher logits of one row        q = softmax(z / t), p = softmax(w / t)
//   t      temperature of the student for z, of the teacher for w
//   d      log p - log q
//   diff   q - p, computed without cancellation
//   S      sum of slopes (docs/maths.md, section 2)
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__CUDACC__)
#define FASTKD_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define FASTKD_HOST_DEVICE inline __attribute__((always_inline))
#else
#define FASTKD_HOST_DEVICE inline
#endif

namespace fastkd {
// The namespace is anonymous, because these functions are compiled once per instruction set. The
// linker must never replace a baseline copy by an AVX-512 copy.
namespace {

constexpr double kLog2E = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;

// If |d| is below this limit, f(d) is computed by its series, and otherwise directly
// (docs/maths.md, section 3). device_element() of CUDA has a smaller limit in fp32.
constexpr double kSeriesLimit = 0.25;

// T is float, double, or, in the CPU kernels, a vector of floats (GCC's vector extension), one for
// each of several classes or rows. Comparisons of vectors are masks, which `?:` and `&` take.
template <class T, class = void>
struct NumberOf {
  using Scalar = T;
  using Integer = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  using Unsigned = std::make_unsigned_t<Integer>;
};
template <class T>
struct NumberOf<T, std::void_t<decltype(std::declval<T&>()[0])>> {
  using Scalar = std::remove_reference_t<decltype(std::declval<T&>()[0])>;
  using Integer = decltype(std::declval<T>() < std::declval<T>());
  typedef std::make_unsigned_t<std::remove_reference_t<decltype(std::declval<Integer&>()[0])>>
      Unsigned __attribute__((vector_size(sizeof(T))));
};
template <class T>
using Scalar = typename NumberOf<T>::Scalar;
template <class T>
using Integer = typename NumberOf<T>::Integer;
template <class T>
using Unsigned = typename NumberOf<T>::Unsigned;
template <class T>
using Mask = decltype(std::declval<T>() < std::declval<T>());
template <class T>
constexpr bool kIsScalar = std::is_same<T, Scalar<T>>::value;

template <class To, class From>
FASTKD_HOST_DEVICE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// Return x as T: a vector of copies of x if T is a vector and x is a number.
template <class T, class X>
FASTKD_HOST_DEVICE constexpr T broadcast(X x) {
  if constexpr (kIsScalar<T> || std::is_same<T, X>::value) {
    return static_cast<T>(x);
  } else {
    return static_cast<Scalar<T>>(x) - T{};
  }
}

#if defined(__CUDACC__) || defined(__FMA__) || defined(__aarch64__)
constexpr bool kHasFma = true;
#else
constexpr bool kHasFma = false;  // the x86 baseline, and the emulation of CUDA
#endif

// Return a * b + c for the vectors of the CPU kernels; defined in cpu/registers.h.
template <class V>
FASTKD_HOST_DEVICE V mul_add_vectors(V a, V b, V c);

// Return a * b + c, by one instruction and with one rounding if the instruction set has FMA. On
// CPUs only this function fuses products with sums (-ffp-contract=off): the bits of a result do not
// depend on what a compiler inlines. Numbers are broadcast to vectors.
template <class A, class B, class C>
FASTKD_HOST_DEVICE auto mul_add(A a, B b, C c) {
  using T = decltype(a * b + c);
  if constexpr (!kIsScalar<T>) {
    return mul_add_vectors(broadcast<T>(a), broadcast<T>(b), broadcast<T>(c));
  } else if constexpr (kHasFma) {
    return std::fma(broadcast<T>(a), broadcast<T>(b), broadcast<T>(c));
  } else {
    return a * b + c;
  }
}

// Return c[0] + c[1] x + c[2] x^2 + ..., by Horner's rule. The function is a recursion, because GCC
// 12 does not unroll loops that call std::fma.
template <int kFrom = 0, class T, int kCount>
FASTKD_HOST_DEVICE T polynomial(T x, const Scalar<T> (&c)[kCount]) {
  if constexpr (kFrom == kCount - 1) {
    return broadcast<T>(c[kFrom]);
  } else {
    return mul_add(polynomial<kFrom + 1>(x, c), x, c[kFrom]);
  }
}

template <class T>
FASTKD_HOST_DEVICE T magnitude_of(T x) {
  if constexpr (kIsScalar<T>) {
    return std::fabs(x);
  } else {
    return bits_as<T>(bits_as<Integer<T>>(x) & 0x7fffffff);
  }
}

// Return n as a float. If T is a vector, |n| must be below 2^22.
template <class T>
FASTKD_HOST_DEVICE T float_of(Integer<T> n) {
  if constexpr (kIsScalar<T>) {
    return static_cast<T>(n);
  } else {
    // Adding n to the bits of 1.5 * 2^23 adds n to the number.
    return bits_as<T>(n + 0x4b400000) - 12582912.0f;
  }
}

// The quantities of one class that a divergence reads.
template <class T>
struct Element {
  T p;       // teacher probability
  T q;       // student probability
  T d;       // log p - log q
  T diff;    // q - p
  T excess;  // p * f(d) = p * d + (q - p), where f(d) = d + expm1(-d) >= 0
  T gap{};   // w / t - z / t, for divergences that compare logits (centered or not)
};

// Return true if f(d) is computed by its series.
template <class T>
FASTKD_HOST_DEVICE auto is_small(T d) {
  return magnitude_of(d) < static_cast<Scalar<T>>(kSeriesLimit);
}

// Return f(d) / d^2 = 1/2 - d/6 + d^2/24 - ... for |d| <= 1/4.
template <class T>
FASTKD_HOST_DEVICE T series_of(T d) {
  static_assert(sizeof(Scalar<T>) == sizeof(float), "");
  // The polynomial is minimax, with a relative error of 2.8e-8.
  return polynomial(d, {0.5f, -1.6666642e-1f, 4.1666716e-2f, -8.3488394e-3f, 1.3895343e-3f});
}
FASTKD_HOST_DEVICE double series_of(double d) {
  // The series of f is truncated after d^14 / 14!, with an error below 1e-19 of f at |d| = 1/4.
  return polynomial(d, {0.5, -1.0 / 6.0, 1.0 / 24.0, -1.0 / 120.0, 1.0 / 720.0, -1.0 / 5040.0,
                        1.0 / 40320.0, -1.0 / 362880.0, 1.0 / 3628800.0, -1.0 / 39916800.0,
                        1.0 / 479001600.0, -1.0 / 6227020800.0, 1.0 / 87178291200.0});
}

// Return d, bounded below or above by `bound`. NaN becomes the bound. The default bounds keep p d
// at 0 if the teacher masks the class, and q d at 0 if the student does: d is then infinite or NaN.
template <class T>
FASTKD_HOST_DEVICE T bounded_below(T d, Scalar<T> bound = Scalar<T>(-1e30)) {
  return d > bound ? d : broadcast<T>(bound);
}
template <class T>
FASTKD_HOST_DEVICE T bounded_above(T d, Scalar<T> bound = Scalar<T>(1e30)) {
  return d < bound ? d : broadcast<T>(bound);
}

// Return an Element such that neither `excess` nor `diff` cancels where p is near q. `direct` is
// q - p.
//   |d| <  1/4: f(d) by its series, and q - p = p f(d) - p d
//   |d| >= 1/4: f(d) p = p d + (q - p) directly
// A masked class has a logit of -inf. If the teacher masks the class, p d = 0 and `excess` is q. If
// only the student masks the class, d and `excess` are +inf, and `diff` = -p stays finite. If p of
// that class has underflowed to 0, `excess` is NaN, which means +inf in a row with finite sums.
template <class T>
FASTKD_HOST_DEVICE Element<T> element(T p, T q, T d, T direct) {
  const T product = p * bounded_below(d);
  const T near = product * (d * series_of(d));
  const auto small = is_small(d);
  return {p, q, d, small ? near - product : direct, small ? near : product + direct};
}
template <class T>
FASTKD_HOST_DEVICE Element<T> element(T p, T q, T d) {
  return element(p, q, d, q - p);
}

// Return log(1 + r) for 1 + r in [1/sqrt 2, sqrt 2), by a polynomial that is minimax for the
// relative error.
template <class T>
FASTKD_HOST_DEVICE T log1p_of_mantissa(T r) {
  static_assert(sizeof(Scalar<T>) == sizeof(float), "");
  return r * polynomial(r, {1.0f, -4.9999988e-1f, 3.33341856e-1f, -2.50020741e-1f, 1.99568333e-1f,
                            -1.65623927e-1f, 1.49522693e-1f, -1.43668474e-1f, 8.72235374e-2f});
}

// A normal x > 0 as 2^exponent (1 + fraction), with 1 + fraction in [1/sqrt 2, sqrt 2).
template <class T>
struct PowerOfTwo {
  Integer<T> exponent;
  T fraction;
};
template <class T>
FASTKD_HOST_DEVICE PowerOfTwo<T> power_of_two(T x) {
  // Unsigned arithmetic lets the bits of zero and negative numbers wrap around.
  const Unsigned<T> shifted = bits_as<Unsigned<T>>(x) - 0x3f3504f3u;
  return {bits_as<Integer<T>>(shifted) >> 23,
          bits_as<T>((shifted & 0x7fffffu) + 0x3f3504f3u) - 1.0f};
}

// Return log(1 + y) for y > -1 with a normal 1 + y. Error in fp32: 2e-7 of the mantissa's logarithm
// plus an ulp of the result.
template <class T>
FASTKD_HOST_DEVICE T log1p_of(T y) {
  const PowerOfTwo<T> x = power_of_two(1.0f + y);
  const T r = x.exponent == 0 ? y : x.fraction;
  return mul_add(float_of<T>(x.exponent), static_cast<float>(kLn2), log1p_of_mantissa(r));
}
FASTKD_HOST_DEVICE double log1p_of(double y) { return std::log1p(y); }

// Return log x for a normal x > 0; some finite number for 0 and NaN. Error in fp32: 2e-7 of the
// mantissa's logarithm plus an ulp of the result.
template <class T>
FASTKD_HOST_DEVICE T log_of(T x) {
  const PowerOfTwo<T> parts = power_of_two(x);
  return mul_add(float_of<T>(parts.exponent), static_cast<float>(kLn2),
                 log1p_of_mantissa(parts.fraction));
}
FASTKD_HOST_DEVICE double log_of(double x) { return x > 0 ? std::log(x) : 0.0; }

// Return weight * value; 0 if the weight is 0 and the value infinite. NaN stays NaN.
template <class T>
FASTKD_HOST_DEVICE T weighted(T weight, T value) {
  const auto infinite = (value - value != T{}) & (value == value);
  return (weight == T{}) & infinite ? T{} : weight * value;
}

// Return weight * value + sum for one term of a valid row, or for the term's slope. A weight of 0
// adds 0 even for NaN: in a valid row NaN comes from infinities only.
template <class T, class W>
FASTKD_HOST_DEVICE T weighted_part(W weight, T value, T sum = T{}) {
  const T result = mul_add(weight, value, sum);
  return weight == W{} ? sum : result;
}

// Return x log y, given log y; 0 if x is 0, for any y.
template <class T>
FASTKD_HOST_DEVICE T times_log(T x, T log_x) {
  return x == T{} ? T{} : x * log_x;
}

}  // namespace
}  // namespace fastkd
