// Vectors of 16 floats: loads and stores in fp32 and bf16, 2^x, transposition. Included once, by klayer.cpp.

#pragma once
#include <immintrin.h>

#include <cstdint>

#ifndef __AVX512F__
#error "needs AVX-512"
#endif

namespace {

typedef uint16_t bf16;
typedef __m512 vec;

inline vec splat(float a) { return _mm512_set1_ps(a); }
inline vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, vec v) { _mm512_storeu_ps(p, v); }
inline vec load(const bf16* p) {
  __m256i raw = _mm256_loadu_si256((const __m256i*)p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}
inline __m256i narrow(vec v) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(v);
#else
  __m512i bits = _mm512_castps_si512(v);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
#endif
}
inline void store(bf16* p, vec v) { _mm256_storeu_si256((__m256i*)p, narrow(v)); }
inline vec fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
inline vec add(vec a, vec b) { return _mm512_add_ps(a, b); }
inline vec sub(vec a, vec b) { return _mm512_sub_ps(a, b); }
inline vec mul(vec a, vec b) { return _mm512_mul_ps(a, b); }
inline vec swap_halves(vec a) { return _mm512_shuffle_f32x4(a, a, 0x4e); }
inline vec fnma(vec a, vec b, vec c) { return _mm512_fnmadd_ps(a, b, c); }

// 2^x; relative error 1e-7 (float) or 4e-5 (bf16, whose own rounding is 4e-3).
template <class E> inline vec exp2v(vec x) {
  x = _mm512_max_ps(x, splat(-200.f));
  vec whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  vec f = _mm512_sub_ps(x, whole);
  vec p;
  if (sizeof(E) == 4) {
    p = splat(1.54614475e-4f);
    p = fma(p, f, splat(1.33908674e-3f));
    p = fma(p, f, splat(9.61805667e-3f));
    p = fma(p, f, splat(5.5503571e-2f));
    p = fma(p, f, splat(2.40226509e-1f));
    p = fma(p, f, splat(6.93147188e-1f));
    p = fma(p, f, splat(1.0f));
  } else {
    p = splat(9.66637369e-3f);
    p = fma(p, f, splat(5.58383427e-2f));
    p = fma(p, f, splat(2.40223489e-1f));
    p = fma(p, f, splat(6.93136726e-1f));
    p = fma(p, f, splat(1.0f));
  }
  return _mm512_scalef_ps(p, whole);
}

inline void transpose16(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

}  // namespace
