// Small matrix products whose operands stay in cache, in fp32 (AVX-512) and bf16 (AMX), and the packing they need.
//
// A: rows x depth, row-major. B: panels of 16 columns, [columns/16][depth][16] floats or [columns/16][depth/2][16][2] bf16.
// Rows, depth and columns are multiples of 16.

#pragma once
#include <algorithm>
#include <cstring>

#include "vectors.h"

namespace {

// src [depth, columns] -> B.
inline void pack(const float* src, long ld, int depth, int columns, float* dst) {
  for (int p = 0; p < columns; p += 16)
    for (int k = 0; k < depth; k++, dst += 16) store(dst, load(src + k * ld + p));
}
template <class S> inline void pack(const S* src, long ld, int depth, int columns, bf16* dst) {
  for (int p = 0; p < columns; p += 16)
    for (int k = 0; k < depth; k += 2, dst += 32) {
      __m512i even, odd;
      if constexpr (sizeof(S) == 2) {
        even = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(src + k * ld + p)));
        odd = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(src + (k + 1) * ld + p)));
      } else {
        even = _mm512_cvtepu16_epi32(narrow(load(src + k * ld + p)));
        odd = _mm512_cvtepu16_epi32(narrow(load(src + (k + 1) * ld + p)));
      }
      _mm512_storeu_si512(dst, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
    }
}

// src [columns, depth] -> B of its transpose; words of 4 bytes are one float or two bf16 along the depth.
template <class E> inline void pack_transposed(const E* src, long ld, int depth, int columns, E* dst) {
  const int per_word = 4 / sizeof(E), words = depth / per_word;
  for (int p = 0; p < columns; p += 16, dst += depth * 16)
    for (int w = 0; w < words; w += 16) {
      const int take = std::min(16, words - w);
      __m512i r[16];
      for (int i = 0; i < 16; i++)
        r[i] = _mm512_maskz_loadu_epi32((__mmask16)((1u << take) - 1), src + (p + i) * ld + w * per_word);
      transpose16(r);
      for (int i = 0; i < take; i++) _mm512_storeu_si512(dst + (w + i) * 16 * per_word, r[i]);
    }
}

// src [columns, rows] -> A = its transpose [rows, columns].
template <class S, class E> inline void transpose(const S* src, long ld, int columns, int rows, E* dst, long ldd) {
  for (int i = 0; i < rows; i += 16)
    for (int j = 0; j < columns; j += 16) {
      __m512i r[16];
      for (int k = 0; k < 16; k++) r[k] = _mm512_castps_si512(load(src + (j + k) * ld + i));
      transpose16(r);
      for (int k = 0; k < 16; k++) store(dst + (i + k) * ldd + j, _mm512_castsi512_ps(r[k]));
    }
}

// Products: out [M, columns] (+)= A [M, depth] B.

// Where the sums start: at zero, at what `out` holds, or at a bias per column.
enum Start { ZERO, OUT, BIAS };

// TURNED: A is given as its transpose [depth, M]. `panel` is the distance of two panels of B.
template <int MR, int NR, bool TURNED>
inline void block_product(int depth, const float* A, long lda, const float* B, long panel, float* out, long ldo,
                          Start start, const float* bias) {
  vec sum[MR][NR];
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
    for (int j = 0; j < NR; j++)
      sum[i][j] = start == ZERO ? splat(0.f) : load(start == OUT ? out + i * ldo + j * 16 : bias + j * 16);
  for (int k = 0; k < depth; k++) {
    vec b[NR];
#pragma GCC unroll 4
    for (int j = 0; j < NR; j++) b[j] = load(B + j * panel + k * 16);
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++) {
      vec a = splat(TURNED ? A[k * lda + i] : A[i * lda + k]);
#pragma GCC unroll 4
      for (int j = 0; j < NR; j++) sum[i][j] = fma(a, b[j], sum[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
    for (int j = 0; j < NR; j++) store(out + i * ldo + j * 16, sum[i][j]);
}

template <bool TURNED>
inline void float_product(int M, int columns, int depth, const float* A, long lda, const float* B, long panel, float* out,
                          long ldo, Start start, const float* bias) {
  const long row = TURNED ? 1 : lda;
  int j = 0;
  for (; j + 32 <= columns; j += 32)
    for (int i = 0; i < M; i += 8)
      block_product<8, 2, TURNED>(depth, A + i * row, lda, B + j / 16 * panel, panel, out + i * ldo + j, ldo, start,
                                  bias + j);
  for (; j < columns; j += 16)
    for (int i = 0; i < M; i += 16)
      block_product<16, 1, TURNED>(depth, A + i * row, lda, B + j / 16 * panel, panel, out + i * ldo + j, ldo, start,
                                   bias + j);
}

inline void product(int M, int columns, int depth, const float* A, long lda, const float* B, float* out, long ldo,
                    Start start = ZERO, const float* bias = nullptr) {
  float_product<false>(M, columns, depth, A, lda, B, depth * 16L, out, ldo, start, bias);
}

// The same with A given as its transpose [depth, M], and B as a part of longer panels.
inline void product_turned(int M, int columns, int depth, const float* A, long lda, const float* B, long panel,
                           float* out, long ldo, Start start) {
  float_product<true>(M, columns, depth, A, lda, B, panel, out, ldo, start, nullptr);
}

#ifdef __AMX_BF16__
struct TileConfig {
  uint8_t palette, start, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
} __attribute__((packed));

thread_local int tile_depth = 0;

// Tiles 0-3 sums (16 x 16 floats), 4-5 A (16 x depth bf16), 6-7 B (depth/2 x 32 bf16).
inline void configure(int depth) {
  if (tile_depth == depth) return;
  TileConfig config;
  memset(&config, 0, sizeof config);
  config.palette = 1;
  for (int t = 0; t < 8; t++) {
    config.bytes[t] = t == 4 || t == 5 ? depth * 2 : 64;
    config.rows[t] = t >= 6 ? depth / 2 : 16;
  }
  _tile_loadconfig(&config);
  tile_depth = depth;
}
inline void release() {
  if (tile_depth) _tile_release();
  tile_depth = 0;
}

inline void product(int M, int columns, int depth, const bf16* A, long lda, const bf16* B, float* out, long ldo,
                    Start start = ZERO) {
  const int step = depth % 32 ? 16 : 32;
  configure(step);
  const long la = lda * 2, lo = ldo * 4, panel = (long)depth * 16;
  for (int j = 0; j < columns; j += 32) {
    const bool wide = j + 32 <= columns;
    for (int i = 0; i < M; i += 32) {
      const bool tall = i + 32 <= M;
      float* o = out + i * ldo + j;
      const bf16 *a = A + i * lda, *b = B + (j / 16) * panel;
      if (start == OUT) {
        _tile_loadd(0, o, lo);
        if (wide) _tile_loadd(1, o + 16, lo);
        if (tall) _tile_loadd(2, o + 16 * ldo, lo);
        if (wide && tall) _tile_loadd(3, o + 16 * ldo + 16, lo);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      if (wide && tall) {
        for (int k = 0; k < depth; k += step) {
          _tile_loadd(4, a + k, la);
          _tile_loadd(6, b + k * 16, 64);
          _tile_loadd(7, b + panel + k * 16, 64);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
          _tile_loadd(5, a + 16 * lda + k, la);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
      } else {
        for (int k = 0; k < depth; k += step) {
          _tile_loadd(4, a + k, la);
          _tile_loadd(6, b + k * 16, 64);
          _tile_dpbf16ps(0, 4, 6);
          if (wide) {
            _tile_loadd(7, b + panel + k * 16, 64);
            _tile_dpbf16ps(1, 4, 7);
          }
          if (tall) {
            _tile_loadd(5, a + 16 * lda + k, la);
            _tile_dpbf16ps(2, 5, 6);
          }
        }
      }
      _tile_stored(0, o, lo);
      if (wide) _tile_stored(1, o + 16, lo);
      if (tall) _tile_stored(2, o + 16 * ldo, lo);
      if (wide && tall) _tile_stored(3, o + 16 * ldo + 16, lo);
    }
  }
}
#else
inline void release() {}
#endif

}  // namespace
