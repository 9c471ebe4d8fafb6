// One step of one image. Attention works on transposed logits, keys x queries: the softmax then runs down the rows, 16
// queries at a time, and never across a vector.

#pragma once
#include "step.h"

namespace {

// Buffers of one thread. P are the weights of attention for R queries: as [N, R] floats (fp32: in place of the logits) or
// as B operand (bf16).
template <class E> struct Scratch {
  E *xa, *qkv, *mixed, *drive, *q, *k, *v, *qp, *values, *p, *oa;
  float *rows, *s, *lse, *o, *turned;
  long qkv_group;  // distance of two groups of qkv: none where no backward follows
  long head;       // of two heads of q, k, v
  Scratch(const Layer& l) {
    const long N = l.N, C = l.C, D = C / l.H, row = head_row<E>(D), heads = l.group() / D;
    xa = arena.take<E>(sizeof(E) == 4 ? 0 : N * C);
    qkv_group = l.keep ? N * 3 * l.group() : 0;
    qkv = arena.take<E>(N * 3 * C);
    drive = arena.take<E>(N * C);
    head = N * row;
    q = arena.take<E>(heads * head);
    k = arena.take<E>(heads * head);
    v = arena.take<E>(heads * head);
    qp = arena.take<E>(N * row);
    values = arena.take<E>(N * D);
    mixed = arena.take<E>(N * C);
    oa = arena.take<E>(N * C);
    rows = arena.take<float>(ROWS * C);
    s = arena.take<float>(N * R);
    p = sizeof(E) == 4 ? (E*)s : arena.take<E>(N * R);
    o = arena.take<float>(R * D);
    turned = arena.take<float>(R * D);
    lse = arena.take<float>(l.H * N);
    for (E* rotated : {q, k, v}) memset(rotated, 0, heads * head * sizeof(E));
  }
  static size_t bytes(const Layer& l) {
    const long N = l.N, C = l.C, D = C / l.H, row = head_row<E>(D), heads = l.group() / D;
    return sizeof(E) * N * (7 * C + (3 * heads + 1) * row + D + R) + 4 * (ROWS * C + N * R + 2 * R * D + l.H * N) +
           16 * SLACK;
  }
};

// Rotated queries (scaled, base 2), keys and values of a group.
template <class E> void rotated_heads(const Layer& l, const E* qkv, Scratch<E>& z) {
  const int N = l.N, D = l.head(), W = l.group(), row = head_row<E>(D);
  const float scale = 1.4426950408889634f / std::sqrt((float)D);
  E* out[3] = {z.q, z.k, z.v};
  for (int which = 0; which < 3; which++) {
    const vec factor = splat(which ? 1.f : scale);
    const E* u = qkv + which * W;
    for (int i = 0; i < N; i++, u += 3 * W)
      rotate<false>(l, which, i, W / D, u, D, factor, out[which] + (long)i * row, z.head);
  }
}

// What `mix` multiplies P with: u [N, D] in rows as B operand (fp32), or its transpose (bf16).
inline void mixable(const Layer& l, const float* u, float* out) {
  const int D = l.C / l.H;
  pack(u, D, l.N, D, out);
}
#ifdef __AVX512BF16__
inline void mixable(const Layer& l, const bf16* u, bf16* out) {
  const int D = l.C / l.H;
  transpose(u, head_row<bf16>(D), l.N, D, out, l.N);
}
#endif

// P' u of a block: [R, D].
inline void mix(const Layer& l, const float* p, const float* u, float*, float* out) {
  const int D = l.C / l.H;
  product_turned(R, D, l.N, p, R, u, l.N * 16L, out, D, ZERO);
}
#ifdef __AVX512BF16__
inline void mix(const Layer& l, const bf16* p, const bf16* u, float* turned, float* out) {
  const int D = l.C / l.H;
  product(D, R, l.N, u, l.N, p, turned, R);
  transpose(turned, R, D, R, out, D);
}
#endif

// Two rows of P, each of R queries: as they are, or as B operand [R/16][N/2][16][2].
inline void store_pair(float* p, int, int j, vec a, vec b, vec c, vec d) {
  store(p + j * R, a), store(p + j * R + 16, b), store(p + (j + 1) * R, c), store(p + (j + 1) * R + 16, d);
}
#ifdef __AVX512BF16__
inline void store_pair(bf16* p, int N, int j, vec a, vec b, vec c, vec d) {
  _mm512_storeu_si512(p + j * 16, interleave(narrow(a, c)));
  _mm512_storeu_si512(p + (N + j) * 16, interleave(narrow(b, d)));
}
#endif

// Logits [N, R] in base 2 -> P = 2^(s - peak), 1 / its sums over keys, and log2 of the sums of 2^s.
template <class E> void softmax(const Layer& l, float* s, E* p, float* inverse, float* lse) {
  const int N = l.N;
  for (int j = l.valid; j < N; j++) store(s + j * R, splat(NEVER)), store(s + j * R + 16, splat(NEVER));
  vec a = load(s), b = load(s + 16), c = load(s + R), d = load(s + R + 16);
  for (int j = 2; j < N; j += 2) {
    a = _mm512_max_ps(a, load(s + j * R)), b = _mm512_max_ps(b, load(s + j * R + 16));
    c = _mm512_max_ps(c, load(s + (j + 1) * R)), d = _mm512_max_ps(d, load(s + (j + 1) * R + 16));
  }
  const vec low = _mm512_max_ps(a, c), high = _mm512_max_ps(b, d);
  vec sum[4] = {splat(0.f), splat(0.f), splat(0.f), splat(0.f)};
  for (int j = 0; j < N; j += 2) {
    a = exp2v<E>(sub(load(s + j * R), low)), b = exp2v<E>(sub(load(s + j * R + 16), high));
    c = exp2v<E>(sub(load(s + (j + 1) * R), low)), d = exp2v<E>(sub(load(s + (j + 1) * R + 16), high));
    sum[0] = add(sum[0], a), sum[1] = add(sum[1], b), sum[2] = add(sum[2], c), sum[3] = add(sum[3], d);
    store_pair(p, N, j, a, b, c, d);
  }
  for (int half = 0; half < 2; half++) {
    const vec total = add(sum[half], sum[half + 2]);
    store(inverse + half * 16, _mm512_div_ps(splat(1.f), total));
    store(lse + half * 16, add(half ? high : low, log2v(total)));
  }
}

// The part of image b of something [B, N, C], which may be missing.
template <class T> T* of_image(const Layer& l, T* all, long b) { return all ? all + b * l.N * l.C : nullptr; }

// Attention of one head from its rotated queries, keys and values -> mixed and, turned by the output's matrices, oa.
template <class E> void attend(const Layer& l, int h, Scratch<E>& z, const E* q, const E* k, const E* v, E* mixed) {
  const int N = l.N, C = l.C, D = l.head(), W = l.group(), row = head_row<E>(D);
  pack_transposed(q, row, row, N, z.qp);
  mixable(l, v, z.values);
  for (int i = 0; i < N; i += R) {
    product(N, R, row, k, row, z.qp + (long)i * row, z.s, R);
    alignas(64) float inverse[R];
    softmax(l, z.s, z.p, inverse, z.lse + h * N + i);
    mix(l, z.p, z.values, z.turned, z.o);
    for (int r = 0; r < R; r++) {
      const vec share = splat(inverse[r]);
      for (int e = 0; e < D; e += 16) store(mixed + (long)(i + r) * W + e, mul(share, load(z.o + r * D + e)));
      rotate<false>(l, 3, i + r, 1, z.o + r * D, D, share, z.oa + (long)(i + r) * C + h * D, 0);
    }
  }
}

// One step of one image under c (or none): x -> next; leaves qkv, mixed, drive and lse where the scratch points.
template <class E>
void forward_image(const Layer& l, const Weights<E>& w, Scratch<E>& z, const float* x, const float* c, float* next) {
  const int N = l.N, C = l.C, D = l.head(), W = l.group();
  const E* xa = operand(x, (long)N * C, z.xa);
  for (int g = 0; g < C / W; g++) {
    E *qkv = z.qkv + g * z.qkv_group, *mixed = z.mixed + (long)g * N * W;
    for (int i = 0; i < N; i += ROWS)
      product(std::min(ROWS, N - i), 3 * W, C, xa + (long)i * C, C, w.qkv.data() + 3L * g * W * C, qkv + (long)i * 3 * W,
              3 * W, BIAS, w.bias.data() + 3 * g * W);
    rotated_heads(l, qkv, z);
    for (int h = 0; h < W / D; h++)
      attend(l, g * W / D + h, z, z.q + h * z.head, z.k + h * z.head, z.v + h * z.head, mixed + h * D);
  }
  for (int i = 0; i < N; i += ROWS) {
    const int count = std::min(ROWS, N - i);
    product(count, C, C, z.oa + (long)i * C, C, w.out.data(), z.rows, C);
    for (int r = 0; r < count; r++) {
      float* row = z.rows + (long)r * C;
      const long at = (long)(i + r) * C;
      if (i + r >= l.valid) {
        memset(next + at, 0, C * sizeof(float));
        continue;
      }
      for (int e = 0; e < C; e += 16) {
        vec s = add(load(row + e), load(l.b_out + e));
        if (c) s = add(s, load(c + at + e));
        store(row + e, s);
        store(z.drive + at + e, s);
      }
      if (l.update)
        update_row(l, x + at, row, next + at);
      else
        memcpy(next + at, row, C * sizeof(float));
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
