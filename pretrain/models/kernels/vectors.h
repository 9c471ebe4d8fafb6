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

constexpr float NEVER = -1e30f;  // a logit whose power of 2 is zero, finite for exp2v

inline vec splat(float a) { return _mm512_set1_ps(a); }
inline vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, vec v) { _mm512_storeu_ps(p, v); }
inline vec load(const bf16* p) {
  __m256i raw = _mm256_loadu_si256((const __m256i*)p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}
#ifdef __AVX512BF16__
inline __m256i narrow(vec v) { return (__m256i)_mm512_cvtneps_pbh(v); }
inline __m512i narrow(vec low, vec high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }
// [a 0..15, b 0..15] -> a0 b0 a1 b1 ...
inline __m512i interleave(__m512i pair) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(pair));
  const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(pair, 1));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}
inline void store(bf16* p, vec v) { _mm256_storeu_si256((__m256i*)p, narrow(v)); }
#endif
inline vec fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
inline vec add(vec a, vec b) { return _mm512_add_ps(a, b); }
inline vec sub(vec a, vec b) { return _mm512_sub_ps(a, b); }
inline vec mul(vec a, vec b) { return _mm512_mul_ps(a, b); }
inline vec swap_halves(vec a) { return _mm512_shuffle_f32x4(a, a, 0x4e); }
inline vec fnma(vec a, vec b, vec c) { return _mm512_fnmadd_ps(a, b, c); }

// 2^x of finite x; relative error 1e-7 (float) or 4e-5 (bf16, whose own rounding is 4e-3).
template <class E> inline vec exp2v(vec x) {
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

// log2 x of positive normal numbers; error 1e-7.
inline vec log2v(vec x) {
  const vec one = splat(1.f), mantissa = _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src);
  const vec exponent = _mm512_getexp_ps(x);
  const vec whole = _mm512_mask_add_ps(exponent, _mm512_cmp_ps_mask(mantissa, one, _CMP_LT_OQ), exponent, one);
  const vec t = _mm512_div_ps(sub(mantissa, one), add(mantissa, one)), square = mul(t, t);  // log m = 2 atanh t
  vec p = splat(0.3205989f);
  p = fma(p, square, splat(0.4121986f));
  p = fma(p, square, splat(0.5770780f));
  p = fma(p, square, splat(0.9617967f));
  p = fma(p, square, splat(2.8853901f));
  return fma(p, t, whole);
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
