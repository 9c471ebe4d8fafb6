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
    const long N = l.N, C = l.C, D = C / l.H, R = block<E>();
    xa = arena.take<E>(R * C);
    qkv = arena.take<E>(N * 3 * C);
    mixed = arena.take<E>(N * C);
    drive = arena.take<E>(N * C);
    q = arena.take<E>(N * D);
    k = arena.take<E>(N * D);
    v = arena.take<E>(N * D);
    kt = arena.take<E>(N * D);
    vp = arena.take<E>(N * D);
    p = arena.take<E>(R * N);
    oa = arena.take<E>(R * C);
    rows = arena.take<float>(R * 3 * C);
    s = arena.take<float>(R * N);
    o = arena.take<float>(R * D);
    lse = arena.take<float>(l.H * N);
  }
  static size_t bytes(const Layer& l) {
    const long N = l.N, C = l.C, D = C / l.H, R = block<E>();
    return sizeof(E) * (N * 5 * C + 5 * N * D + R * (N + 2 * C)) + 4 * (R * (3 * C + N + D) + l.H * N) +
           15 * 4608;
  }
};

// Rotated queries (scaled, base 2), keys and values of one head as A operands.
template <class E> void rotated_heads(const Layer& l, int h, const E* qkv, E* q, E* k, E* v) {
  const int N = l.N, C = l.C, D = C / l.H;
  const float scale = 1.4426950408889634f / std::sqrt((float)D);
  E* out[3] = {q, k, v};
  for (int which = 0; which < 3; which++) {
    const vec factor = splat(which ? 1.f : scale);
    const float *own = l.own + (long)which * N * D, *other = l.other + (long)which * N * D;
    const E* u = qkv + which * C + h * D;
    for (int i = 0; i < N; i++, u += 3 * C)
      if (l.gta)
        rotate_head<false>(own + i * D, other + i * D, D, u, factor, out[which] + (long)i * D);
      else
        scale_head(D, u, factor, out[which] + (long)i * D);
  }
}

// Values mixed by attention -> A operand of the output projection, tokens [first, first + count).
template <class E> void rotated_output(const Layer& l, const E* mixed, int first, int count, E* out) {
  const int N = l.N, C = l.C, D = C / l.H;
  const vec one = splat(1.f);
  for (int i = first; i < first + count; i++) {
    const float *own = l.own + (3L * N + i) * D, *other = l.other + (3L * N + i) * D;
    for (int e = 0; e < C; e += D, out += D)
      if (l.gta)
        rotate_head<false>(own, other, D, mixed + (long)i * C + e, one, out);
      else
        scale_head(D, mixed + (long)i * C + e, one, out);
  }
}

template <class E> void operand(const float* src, long count, E* dst) {
  for (long i = 0; i < count; i += 16) store(dst + i, load(src + i));
}

// Rows of logits s in base 2 -> 2^(s - peak) as A operand, 1 / their sums, and log2 of the sums of 2^s.
template <class E> void softmax(const Layer& l, int count, float* s, E* p, float* inverse, float* lse) {
  const int N = l.N;
  for (int r = 0; r < count; r++, s += N, p += N) {
    for (int j = l.valid; j < N; j++) s[j] = -INFINITY;
    vec top = load(s);
    for (int j = 16; j < N; j += 16) top = _mm512_max_ps(top, load(s + j));
    const float peak = _mm512_reduce_max_ps(top);
    vec sum = splat(0.f);
    for (int j = 0; j < N; j += 16) {
      vec e = exp2v<E>(sub(load(s + j), splat(peak)));
      sum = add(sum, e);
      store(p + j, e);
    }
    const float total = _mm512_reduce_add_ps(sum);
    inverse[r] = 1.f / total;
    lse[r] = peak + std::log2(total);
  }
}

// One step of one image: x -> next; leaves qkv, mixed, drive and lse where the scratch points.
template <class E>
void forward_image(const Layer& l, const Weights<E>& w, Scratch<E>& z, const float* x, const float* c, float* next) {
  const int N = l.N, C = l.C, H = l.H, D = C / H, R = block<E>();
  for (int i = 0; i < N; i += R) {
    const int count = std::min(R, N - i);
    if constexpr (sizeof(E) == 4) {
      product(count, 3 * C, C, x + (long)i * C, C, w.qkv.data(), z.qkv + (long)i * 3 * C, 3 * C, BIAS, l.b_qkv);
    } else {
      operand(x + (long)i * C, (long)count * C, z.xa);
      product(count, 3 * C, C, z.xa, C, w.qkv.data(), z.rows, 3 * C);
      for (int r = 0; r < count; r++)
        for (int e = 0; e < 3 * C; e += 16)
          store(z.qkv + (long)(i + r) * 3 * C + e, add(load(z.rows + (long)r * 3 * C + e), load(l.b_qkv + e)));
    }
  }
  for (int h = 0; h < H; h++) {
    rotated_heads(l, h, z.qkv, z.q, z.k, z.v);
    pack_transposed(z.k, D, D, N, z.kt);
    pack(z.v, D, N, D, z.vp);
    for (int i = 0; i < N; i += R) {
      const int count = std::min(R, N - i);
      product(count, N, D, z.q + (long)i * D, D, z.kt, z.s, N);
      alignas(64) float inverse[block<E>()];
      softmax(l, count, z.s, z.p, inverse, z.lse + h * N + i);
      product(count, D, N, z.p, N, z.vp, z.o, D);
      for (int r = 0; r < count; r++)
        scale_head(D, z.o + r * D, splat(inverse[r]), z.mixed + (long)(i + r) * C + h * D);
    }
  }
  for (int i = 0; i < N; i += R) {
    const int count = std::min(R, N - i);
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
        vec s = add(add(load(row + e), load(l.b_out + e)), load(c + at + e));
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
