/* Compute c = a + b with stores that bypass the caches where the processor is x86-64. A fused loss also reads two
 * arrays and writes one. stream.py compiles this file when the benchmarks run, and uses torch.add if there is no
 * compiler. The arrays are 64-byte aligned, and their length is a multiple of 16. */
#include <stddef.h>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
int stores_bypass_caches(void) { return 1; }
void stream(const float* a, const float* b, float* c, size_t n) {
  for (size_t i = 0; i < n; i += 4)
    _mm_stream_ps(c + i, _mm_add_ps(_mm_load_ps(a + i), _mm_load_ps(b + i)));
  _mm_sfence();
}
#else
int stores_bypass_caches(void) { return 0; }
void stream(const float* a, const float* b, float* c, size_t n) {
  for (size_t i = 0; i < n; ++i) c[i] = a[i] + b[i];
}
#endif
