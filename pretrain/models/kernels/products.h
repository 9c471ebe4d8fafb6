// Small matrix products whose operands stay in cache, in fp32 (AVX-512) and bf16 (AMX, or AVX-512's own), and the
// packing they need.
//
// A: rows x depth, row-major. B: panels of 16 columns, [columns/16][depth][16] floats or [columns/16][depth/2][16][2] bf16.
// Rows and columns are multiples of 16, depths of 16, or of 32 for AMX.

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

// x as A operand: itself, or rounded into `space`.
inline const float* operand(const float* x, long, float*) { return x; }
#ifdef __AVX512BF16__
inline const bf16* operand(const float* x, long count, bf16* space) {
  for (long i = 0; i < count; i += 16) store(space + i, load(x + i));
  return space;
}
#endif

// Products: out [M, columns] (+)= A [M, depth] B.

// Where the sums start: at zero, at what `out` holds, or at a bias per column.
enum Start { ZERO, OUT, BIAS };

// Words of 4 bytes along the depth, one float or two bf16: 16 times the same one, and products of 16 with their sums.
inline vec spread(const float* a) { return splat(*a); }
inline vec word(const float* b) { return load(b); }
inline vec multiply_add(const float*, vec a, vec b, vec sum) { return fma(a, b, sum); }
#ifdef __AVX512BF16__
inline vec spread(const bf16* a) {
  int32_t pair;
  memcpy(&pair, a, 4);
  return _mm512_castsi512_ps(_mm512_set1_epi32(pair));
}
inline vec word(const bf16* b) { return _mm512_castsi512_ps(_mm512_loadu_si512(b)); }
inline vec multiply_add(const bf16*, vec a, vec b, vec sum) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
#endif

// TURNED: A is given as its transpose [depth, M] (floats only). `panel` is the distance of two panels of B.
template <int MR, int NR, bool TURNED, class E, class T>
inline void block_product(int depth, const E* A, long lda, const E* B, long panel, T* out, long ldo, Start start,
                          const float* bias) {
  constexpr int WORD = 4 / sizeof(E);
  vec sum[MR][NR];
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
    for (int j = 0; j < NR; j++)
      sum[i][j] = start == ZERO ? splat(0.f) : start == OUT ? load(out + i * ldo + j * 16) : load(bias + j * 16);
  for (int k = 0; k < depth; k += WORD) {
    vec b[NR];
#pragma GCC unroll 4
    for (int j = 0; j < NR; j++) b[j] = word(B + j * panel + k * 16);
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++) {
      const vec a = spread(TURNED ? A + k * lda + i : A + i * lda + k);
#pragma GCC unroll 4
      for (int j = 0; j < NR; j++) sum[i][j] = multiply_add(A, a, b[j], sum[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
    for (int j = 0; j < NR; j++) store(out + i * ldo + j * 16, sum[i][j]);
}

template <bool TURNED, class E, class T>
inline void vector_product(int M, int columns, int depth, const E* A, long lda, const E* B, long panel, T* out,
                           long ldo, Start start, const float* bias) {
  const long row = TURNED ? 1 : lda;
  int j = 0;
  for (; j + 64 <= columns; j += 64) {
    const E* b = B + j / 16 * panel;
    for (int i = 0; i < M;) {
      const int rest = M - i;  // a multiple of 4, or of 16 less sixes
      if (rest == 4 || rest == 8) {
        block_product<4, 4, TURNED>(depth, A + i * row, lda, b, panel, out + i * ldo + j, ldo, start, bias + j);
        i += 4;
      } else {
        block_product<6, 4, TURNED>(depth, A + i * row, lda, b, panel, out + i * ldo + j, ldo, start, bias + j);
        i += 6;
      }
    }
  }
  // A turned gives 16 rows in one cache line.
  for (; !TURNED && j + 32 <= columns; j += 32)
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
  vector_product<false>(M, columns, depth, A, lda, B, depth * 16L, out, ldo, start, bias);
}

// The same with A given as its transpose [depth, M], and B as a part of longer panels.
inline void product_turned(int M, int columns, int depth, const float* A, long lda, const float* B, long panel,
                           float* out, long ldo, Start start) {
  vector_product<true>(M, columns, depth, A, lda, B, panel, out, ldo, start, nullptr);
}

#ifdef __AMX_BF16__
struct TileConfig {
  uint8_t palette, start, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
} __attribute__((packed));

// Tiles 0-3 sums (16 x 16 floats), 4-5 A (16 x 32 bf16), 6-7 B (16 x 32 bf16). Costs as much as a small product: a thread
// does it once per call, hence depths are multiples of 32.
inline void configure() {
  TileConfig config;
  memset(&config, 0, sizeof config);
  config.palette = 1;
  for (int t = 0; t < 8; t++) config.bytes[t] = 64, config.rows[t] = 16;
  asm volatile("ldtilecfg %0" ::"m"(config));  // GCC 12's _tile_loadconfig reads but 8 bytes of it: the rest is optimised away
}
inline void release() { _tile_release(); }

// Sums of a block of 32 x 32 (not wide: 16 columns; not tall: 16 rows), in tiles 0-3.
inline void accumulate(int depth, const bf16* a, long lda, const bf16* b, long panel, bool wide, bool tall) {
  const long la = lda * 2;
  if (wide && tall) {
    for (int k = 0; k < depth; k += 32) {
      _tile_loadd(4, a + k, la);
      _tile_loadd(6, b + k * 16, 64);
      _tile_loadd(7, b + panel + k * 16, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, a + 16 * lda + k, la);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    return;
  }
  for (int k = 0; k < depth; k += 32) {
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

inline void product(int M, int columns, int depth, const bf16* A, long lda, const bf16* B, float* out, long ldo,
                    Start start = ZERO) {
  const long lo = ldo * 4, panel = (long)depth * 16;
  for (int j = 0; j < columns; j += 32) {
    const bool wide = j + 32 <= columns;
    for (int i = 0; i < M; i += 32) {
      const bool tall = i + 32 <= M;
      float* o = out + i * ldo + j;
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
      accumulate(depth, A + i * lda, lda, B + j / 16 * panel, panel, wide, tall);
      _tile_stored(0, o, lo);
      if (wide) _tile_stored(1, o + 16, lo);
      if (tall) _tile_stored(2, o + 16 * ldo, lo);
      if (wide && tall) _tile_stored(3, o + 16 * ldo + 16, lo);
    }
  }
}

// The same with a bias per column, rounded to bf16. M and columns are multiples of 32.
inline void product(int M, int columns, int depth, const bf16* A, long lda, const bf16* B, bf16* out, long ldo,
                    Start, const float* bias) {
  alignas(64) float sums[32 * 32];
  const long panel = (long)depth * 16;
  for (int j = 0; j < columns; j += 32)
    for (int i = 0; i < M; i += 32) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      accumulate(depth, A + i * lda, lda, B + j / 16 * panel, panel, true, true);
      _tile_stored(0, sums, 128);
      _tile_stored(1, sums + 16, 128);
      _tile_stored(2, sums + 16 * 32, 128);
      _tile_stored(3, sums + 16 * 32 + 16, 128);
      const vec low = load(bias + j), high = load(bias + j + 16);
      for (int r = 0; r < 32; r++)
        _mm512_storeu_si512(out + (i + r) * ldo + j,
                            narrow(add(load(sums + r * 32), low), add(load(sums + r * 32 + 16), high)));
    }
}
#else
inline void configure() {}
inline void release() {}
#ifdef __AVX512BF16__
// `out` in floats, or rounded to bf16.
template <class T>
inline void product(int M, int columns, int depth, const bf16* A, long lda, const bf16* B, T* out, long ldo,
                    Start start = ZERO, const float* bias = nullptr) {
  vector_product<false>(M, columns, depth, A, lda, B, depth * 16L, out, ldo, start, bias);
}
#endif
#endif

// total [rows, columns] += a' b with a [N, rows], and b [N, columns] as B operand.
inline void weight_grads(int N, const float* a, long lda, int rows, const float* b, int columns, float*, float* total) {
  product_turned(rows, columns, N, a, lda, b, N * 16L, total, columns, OUT);
}
#ifdef __AVX512BF16__
template <class A>
inline void weight_grads(int N, const A* a, long lda, int rows, const bf16* b, int columns, bf16* turned, float* total) {
  transpose(a, lda, N, rows, turned, N);
  product(rows, columns, N, turned, N, b, total, columns, OUT);
}
#endif

}  // namespace
