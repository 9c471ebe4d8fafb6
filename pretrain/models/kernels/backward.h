// The adjoint of one step of one image, by hand. Attention is computed again from queries and keys.

#pragma once
#include "forward.h"

namespace {

// What the backward of one thread holds beside Scratch; sums over its images and all steps.
template <class E> struct BackScratch {
  float *ds, *dx, *dp, *delta, *d_heads, *dvt, *dkt, *dq, *d_mixed;
  E *dsa, *dsp, *xt, *d_qkv, *d_qkv_p, *kp, *vt, *qt, *dout, *doutt, *pp, *dspa, *dspp;
  float *w_qkv, *b_qkv, *w_out, *own, *other, *frequency;
  long first, last;  // the sums, in bytes of the arena
  BackScratch(const Layer& l) {
    const long N = l.N, C = l.C, D = C / l.H;
    ds = arena.take<float>(N * C);
    dx = arena.take<float>(N * C);
    d_mixed = arena.take<float>(N * C);
    dp = arena.take<float>(ROWS * N);
    delta = arena.take<float>(l.H * N);
    d_heads = arena.take<float>(3 * N * D);
    dvt = arena.take<float>(N * D);
    dkt = arena.take<float>(N * D);
    dq = arena.take<float>(ROWS * D);
    dsa = arena.take<E>(N * C);
    dsp = arena.take<E>(N * C);
    xt = arena.take<E>(N * C);
    d_qkv = arena.take<E>(N * 3 * C);
    d_qkv_p = arena.take<E>(N * 3 * C);
    kp = arena.take<E>(N * D);
    vt = arena.take<E>(N * D);
    qt = arena.take<E>(N * D);
    dout = arena.take<E>(N * D);
    doutt = arena.take<E>(N * D);
    pp = arena.take<E>(ROWS * N);
    dspa = arena.take<E>(ROWS * N);
    dspp = arena.take<E>(ROWS * N);
    first = arena.used;
    w_qkv = arena.take<float>(3 * C * C);
    b_qkv = arena.take<float>(3 * C);
    w_out = arena.take<float>(C * C);
    own = arena.take<float>(4 * N * D);
    other = arena.take<float>(4 * N * D);
    frequency = arena.take<float>(C);
    last = arena.used;
    memset(arena.base + first, 0, last - first);
  }
  static size_t bytes(const Layer& l) {
    const long N = l.N, C = l.C, D = C / l.H;
    return 4 * (3 * N * C + ROWS * N + l.H * N + 5 * N * D + ROWS * D) +
           sizeof(E) * (9 * N * C + 5 * N * D + 3 * ROWS * N) + 4 * (4 * C * C + 4 * C + 8 * N * D) + 32 * 4608;
  }
};

// Adjoint of the attention of one head. In: d_mixed. Out: its part of d_qkv; adds to the sums of GTA.
template <class E> void head_back(const Layer& l, int h, Scratch<E>& z, BackScratch<E>& y) {
  const int N = l.N, C = l.C, D = C / l.H;
  rotated_heads(l, h, z.qkv, z.q, z.k, z.v);
  for (int i = 0; i < N; i++)
    for (int e = 0; e < D; e += 16) store(y.dout + (long)i * D + e, load(y.d_mixed + (long)i * C + h * D + e));
  pack_transposed(z.k, D, D, N, z.kt);
  pack(z.k, D, N, D, y.kp);
  pack_transposed(z.v, D, D, N, y.vt);
  transpose(z.q, D, N, D, y.qt, N);
  transpose(y.dout, D, N, D, y.doutt, N);
  for (int i = 0; i < N; i += ROWS) {
    const int count = std::min(ROWS, N - i);
    product(count, N, D, z.q + (long)i * D, D, z.kt, z.s, N);
    product(count, N, D, y.dout + (long)i * D, D, y.vt, y.dp, N);
    for (int r = 0; r < count; r++) {
      float *row = z.s + (long)r * N, *dp = y.dp + (long)r * N;
      for (int j = l.valid; j < N; j++) row[j] = -INFINITY;
      const vec lse = splat(z.lse[h * N + i + r]), delta = splat(y.delta[h * N + i + r]);
      for (int j = 0; j < N; j += 16) {
        vec p = exp2v<E>(_mm512_sub_ps(load(row + j), lse));
        vec d = _mm512_mul_ps(p, _mm512_sub_ps(load(dp + j), delta));
        store(row + j, p);
        store(dp + j, d);
        store(y.dspa + (long)r * N + j, d);
      }
    }
    pack(z.s, N, count, N, y.pp);
    pack(y.dp, N, count, N, y.dspp);
    product(D, N, count, y.doutt + i, N, y.pp, y.dvt, N, i > 0);
    product(D, N, count, y.qt + i, N, y.dspp, y.dkt, N, i > 0);
    product(count, D, N, y.dspa, N, y.kp, y.d_heads + (long)i * D, D);
  }
  transpose(y.dkt, N, D, N, y.d_heads + (long)N * D, D);
  transpose(y.dvt, N, D, N, y.d_heads + 2L * N * D, D);
  // S is in base 2 and q carries the scale: d q = dS K / sqrt(D), d k = dS^T q ln 2
  const float factors[3] = {1.f / std::sqrt((float)D), 0.6931471805599453f, 1.f};
  alignas(64) float u[512], g[512], back[512];
  for (int which = 0; which < 3; which++) {
    const vec factor = splat(factors[which]);
    for (int i = 0; i < N; i++) {
      const long table = (long)which * N * D + (long)i * D;
      const float* d = y.d_heads + table;
      for (int e = 0; e < D; e += 16) store(g + e, _mm512_mul_ps(factor, load(d + e)));
      if (l.gta) {
        const E* src = z.qkv + (long)i * 3 * C + which * C + h * D;
        for (int e = 0; e < D; e += 16) store(u + e, load(src + e));
        rotate_head_weights(D, g, u, y.own + table, y.other + table);
        rotate_head<true>(l.own + table, l.other + table, D, g, back);
      }
      const float* r = l.gta ? back : g;
      float* bias = y.b_qkv + which * C + h * D;
      for (int e = 0; e < D; e += 16) {
        store(y.d_qkv + (long)i * 3 * C + which * C + h * D + e, load(r + e));
        store(bias + e, _mm512_add_ps(load(bias + e), load(r + e)));
      }
    }
  }
}

// Adjoint of forward_image: grad [N, C] of next becomes that of x; d_c accumulates.
template <class E>
void backward_image(const Layer& l, const Weights<E>& w, Scratch<E>& z, BackScratch<E>& y, const float* x, float* grad,
                    float* d_c, double& d_gamma) {
  const int N = l.N, C = l.C, H = l.H, D = C / H;
  for (int i = 0; i < N; i++) {
    const long at = (long)i * C;
    vec turn = splat(0.f);  // a token's part of d gamma: parts of all tokens cancel, hence the double
    if (i >= l.valid) {
      for (int e = 0; e < C; e += 16) store(y.ds + at + e, splat(0.f)), store(y.dx + at + e, splat(0.f));
      continue;
    }
    update_row_back(l, x + at, z.drive + at, grad + at, y.ds + at, y.dx + at, turn, y.frequency);
    d_gamma += _mm512_reduce_add_ps(turn);
    for (int e = 0; e < C; e += 16) store(d_c + at + e, _mm512_add_ps(load(d_c + at + e), load(y.ds + at + e)));
  }
  // Output projection: d_w_out^T [in, out] += O'^T dS, d O' = dS W
  pack(y.ds, C, N, C, y.dsp);
  const E* dsa;
  if constexpr (sizeof(E) == 4) {
    dsa = y.ds;
  } else {
    operand(y.ds, (long)N * C, y.dsa);
    dsa = y.dsa;
  }
  alignas(64) float u[512], back[512];
  for (int i = 0; i < N; i += ROWS) {
    const int count = std::min(ROWS, N - i);
    rotated_output(l, z.mixed, i, count, z.oa);
    transpose(z.oa, C, count, C, y.xt + i, N);
    product(count, C, C, dsa + (long)i * C, C, w.out_back.data(), z.rows, C);
    for (int r = 0; r < count; r++)
      for (int h = 0; h < H; h++) {
        const long table = 3L * N * D + (long)(i + r) * D;
        const float* g = z.rows + (long)r * C + h * D;
        const E* src = z.mixed + (long)(i + r) * C + h * D;
        for (int e = 0; e < D; e += 16) store(u + e, load(src + e));
        if (l.gta) {
          rotate_head_weights(D, g, u, y.own + table, y.other + table);
          rotate_head<true>(l.own + table, l.other + table, D, g, back);
        }
        const float* d = l.gta ? back : g;
        vec sum = splat(0.f);
        for (int e = 0; e < D; e += 16) {
          store(y.d_mixed + (long)(i + r) * C + h * D + e, load(d + e));
          sum = fma(load(d + e), load(u + e), sum);
        }
        y.delta[h * N + i + r] = _mm512_reduce_add_ps(sum);
      }
  }
  product(C, C, N, y.xt, N, y.dsp, y.w_out, C, true);
  for (int h = 0; h < H; h++) head_back(l, h, z, y);
  // Input projection
  transpose(x, C, N, C, y.xt, N);
  pack(y.d_qkv, 3 * C, N, 3 * C, y.d_qkv_p);
  product(C, 3 * C, N, y.xt, N, y.d_qkv_p, y.w_qkv, 3 * C, true);
  product(N, C, 3 * C, y.d_qkv, 3 * C, w.qkv_back.data(), grad, C);
  for (long i = 0; i < (long)N * C; i += 16) store(grad + i, _mm512_add_ps(load(grad + i), load(y.dx + i)));
}

}  // namespace
