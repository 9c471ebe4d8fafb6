// One step of one image.

#pragma once
#include "step.h"

namespace {

// Buffers of one thread.
template <class E> struct Scratch {
  E *xa, *qkv, *mixed, *q, *k, *v, *kt, *vp, *p, *oa;
  float *rows, *s, *lse, *o;
  E* drive;
  Scratch(const Layer& l) {
    const long N = l.N, C = l.C, D = C / l.H;
    xa = arena.take<E>(ROWS * C);
    qkv = arena.take<E>(N * 3 * C);
    mixed = arena.take<E>(N * C);
    drive = arena.take<E>(N * C);
    q = arena.take<E>(N * D);
    k = arena.take<E>(N * D);
    v = arena.take<E>(N * D);
    kt = arena.take<E>(N * D);
    vp = arena.take<E>(N * D);
    p = arena.take<E>(ROWS * N);
    oa = arena.take<E>(ROWS * C);
    rows = arena.take<float>(ROWS * 3 * C);
    s = arena.take<float>(ROWS * N);
    o = arena.take<float>(ROWS * D);
    lse = arena.take<float>(l.H * N);
  }
  static size_t bytes(const Layer& l) {
    const long N = l.N, C = l.C, D = C / l.H;
    return sizeof(E) * (N * 5 * C + 5 * N * D + ROWS * (N + 2 * C)) + 4 * (ROWS * (3 * C + N + D) + l.H * N) +
           15 * 4608;
  }
};

// Rotated queries (scaled, base 2), keys and values of one head as A operands.
template <class E> void rotated_heads(const Layer& l, int h, const E* qkv, E* q, E* k, E* v) {
  const int N = l.N, C = l.C, D = C / l.H;
  const float scale = 1.4426950408889634f / std::sqrt((float)D);
  E* out[3] = {q, k, v};
  alignas(64) float u[512], turned[512];
  for (int which = 0; which < 3; which++) {
    if (!out[which]) continue;
    const vec factor = splat(which ? 1.f : scale);
    const float *own = l.own + (long)which * N * D, *other = l.other + (long)which * N * D;
    for (int i = 0; i < N; i++) {
      const E* src = qkv + (long)i * 3 * C + which * C + h * D;
      for (int e = 0; e < D; e += 16) store(u + e, load(src + e));
      if (l.gta) rotate_head<false>(own + i * D, other + i * D, D, u, turned);
      const float* r = l.gta ? turned : u;
      for (int e = 0; e < D; e += 16) store(out[which] + (long)i * D + e, _mm512_mul_ps(factor, load(r + e)));
    }
  }
}

// Values mixed by attention -> A operand of the output projection, rows [first, first + ROWS).
template <class E> void rotated_output(const Layer& l, const E* mixed, int first, int count, E* out) {
  const int N = l.N, C = l.C, D = C / l.H;
  const float *own = l.own + 3L * N * D, *other = l.other + 3L * N * D;
  alignas(64) float u[512], turned[512];
  for (int i = 0; i < count; i++)
    for (int h = 0; h < (int)l.H; h++) {
      const E* src = mixed + (long)(first + i) * C + h * D;
      for (int e = 0; e < D; e += 16) store(u + e, load(src + e));
      if (l.gta) rotate_head<false>(own + (first + i) * D, other + (first + i) * D, D, u, turned);
      const float* r = l.gta ? turned : u;
      for (int e = 0; e < D; e += 16) store(out + (long)i * C + h * D + e, load(r + e));
    }
}

template <class E> void operand(const float* src, long count, E* dst) {
  for (long i = 0; i < count; i += 16) store(dst + i, load(src + i));
}

// One step of one image: x -> next; leaves qkv, mixed, drive and lse where the scratch points.
template <class E>
void forward_image(const Layer& l, const Weights<E>& w, Scratch<E>& z, const float* x, const float* c, float* next) {
  const int N = l.N, C = l.C, H = l.H, D = C / H;
  for (int i = 0; i < N; i += ROWS) {
    const int count = std::min(ROWS, N - i);
    const E* a;
    if constexpr (sizeof(E) == 4) {
      a = x + (long)i * C;
    } else {
      operand(x + (long)i * C, (long)count * C, z.xa);
      a = z.xa;
    }
    product(count, 3 * C, C, a, C, w.qkv.data(), z.rows, 3 * C);
    for (int r = 0; r < count; r++)
      for (int e = 0; e < 3 * C; e += 16)
        store(z.qkv + (long)(i + r) * 3 * C + e, _mm512_add_ps(load(z.rows + (long)r * 3 * C + e), load(l.b_qkv + e)));
  }
  for (int h = 0; h < H; h++) {
    rotated_heads(l, h, z.qkv, z.q, z.k, z.v);
    pack_transposed(z.k, D, D, N, z.kt);
    pack(z.v, D, N, D, z.vp);
    for (int i = 0; i < N; i += ROWS) {
      const int count = std::min(ROWS, N - i);
      product(count, N, D, z.q + (long)i * D, D, z.kt, z.s, N);
      alignas(64) float inverse[ROWS];
      for (int r = 0; r < count; r++) {
        float* row = z.s + (long)r * N;
        for (int j = l.valid; j < N; j++) row[j] = -INFINITY;
        vec top = load(row);
        for (int j = 16; j < N; j += 16) top = _mm512_max_ps(top, load(row + j));
        const float peak = _mm512_reduce_max_ps(top);
        vec sum = splat(0.f);
        for (int j = 0; j < N; j += 16) {
          vec e = exp2v<E>(_mm512_sub_ps(load(row + j), splat(peak)));
          sum = _mm512_add_ps(sum, e);
          store(z.p + (long)r * N + j, e);
        }
        const float total = _mm512_reduce_add_ps(sum);
        inverse[r] = 1.f / total;
        z.lse[h * N + i + r] = peak + std::log2(total);
      }
      product(count, D, N, z.p, N, z.vp, z.o, D);
      for (int r = 0; r < count; r++)
        for (int e = 0; e < D; e += 16)
          store(z.mixed + (long)(i + r) * C + h * D + e, _mm512_mul_ps(splat(inverse[r]), load(z.o + r * D + e)));
    }
  }
  for (int i = 0; i < N; i += ROWS) {
    const int count = std::min(ROWS, N - i);
    rotated_output(l, z.mixed, i, count, z.oa);
    product(count, C, C, z.oa, C, w.out.data(), z.rows, C);
    for (int r = 0; r < count; r++) {
      float* row = z.rows + (long)r * C;
      const long at = (long)(i + r) * C;
      if (i + r >= l.valid) {
        for (int e = 0; e < C; e += 16) store(next + at + e, splat(0.f));
        continue;
      }
      for (int e = 0; e < C; e += 16) {
        vec s = _mm512_add_ps(_mm512_add_ps(load(row + e), load(l.b_out + e)), load(c + at + e));
        store(row + e, s);
        store(z.drive + at + e, s);
      }
      update_row(l, x + at, row, next + at);
    }
  }
}

template <class E> void point(const Layer& l, Scratch<E>& z, long t, long b) {
  const long at = t * l.B + b, tokens = l.N * l.C;
  if (l.qkv) z.qkv = (E*)l.qkv + at * 3 * tokens;
  if (l.mixed) z.mixed = (E*)l.mixed + at * tokens;
  if (l.drive) z.drive = (E*)l.drive + at * tokens;
  if (l.lse) z.lse = l.lse + at * l.H * l.N;
}

}  // namespace
