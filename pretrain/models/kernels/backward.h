// The adjoint of one step of one image, by hand. Attention is computed again from queries and keys.

#pragma once
#include "forward.h"

namespace {

// What the backward of one thread holds beside Scratch; and the sums over its images and all steps.
template <class E> struct BackScratch {
  float *ds, *dx, *dp, *delta, *d_heads, *turned, *w_qkv, *b_qkv, *w_out, *own, *other, *frequency;
  E *dsa, *dsp, *xt, *d_qkv, *d_qkv_p, *kp, *vt, *qt, *dout, *doutt, *pp, *dspa, *dspp;
  int stride;  // of d_qkv: rows of a power of two would share few cache sets
  BackScratch(const Layer& l) {
    const long N = l.N, C = l.C, D = C / l.H, R = block<E>();
    stride = 3 * C + 32;
    ds = arena.take<float>(N * C);
    dx = arena.take<float>(N * C);
    dp = arena.take<float>(R * N);
    delta = arena.take<float>(l.H * N);
    d_heads = arena.take<float>(3 * N * D);
    turned = arena.take<float>(2 * N * D);
    dsa = arena.take<E>(N * C);
    dsp = arena.take<E>(N * C);
    xt = arena.take<E>(N * C);
    d_qkv = arena.take<E>(N * stride);
    d_qkv_p = arena.take<E>(N * 3 * C);
    kp = arena.take<E>(N * D);
    vt = arena.take<E>(N * D);
    qt = arena.take<E>(N * D);
    dout = arena.take<E>(N * C);
    doutt = arena.take<E>(N * D);
    pp = arena.take<E>(R * N);
    dspa = arena.take<E>(R * N);
    dspp = arena.take<E>(R * N);
    const size_t first = arena.used;
    w_qkv = arena.take<float>(3 * C * C);
    b_qkv = arena.take<float>(3 * C);
    w_out = arena.take<float>(C * C);
    own = arena.take<float>(4 * N * D);
    other = arena.take<float>(4 * N * D);
    frequency = arena.take<float>(C);
    memset(arena.base + first, 0, arena.used - first);
  }
  static size_t bytes(const Layer& l) {
    const long N = l.N, C = l.C, D = C / l.H, R = block<E>();
    return 4 * (2 * N * C + R * N + l.H * N + 5 * N * D) + sizeof(E) * (10 * N * C + 32 * N + 5 * N * D + 3 * R * N) +
           4 * (4 * C * C + 4 * C + 8 * N * D) + 32 * 4608;
  }
};

// Logits s and d p of a block of queries -> p in s, and ds = p (dp - delta) in dp or as A operand.
template <class E>
void softmax_back(const Layer& l, int count, float* s, float* dp, const float* lse, const float* delta, E* ds) {
  const int N = l.N;
  for (int r = 0; r < count; r++, s += N, dp += N, ds += N) {
    for (int j = l.valid; j < N; j++) s[j] = -INFINITY;
    const vec peak = splat(lse[r]), mean = splat(delta[r]);
    for (int j = 0; j < N; j += 16) {
      vec p = exp2v<E>(sub(load(s + j), peak));
      vec d = mul(p, sub(load(dp + j), mean));
      store(s + j, p);
      store(dp + j, d);
      if constexpr (sizeof(E) == 2) store(ds + j, d);
    }
  }
}

// Adjoint of the attention of one head: d_heads, the gradients of rotated q, k and v [3, N, D].
template <class E> void attention_back(const Layer& l, int h, Scratch<E>& z, BackScratch<E>& y) {
  const int N = l.N, D = l.C / l.H, R = block<E>();
  float *dq = y.d_heads, *dk = dq + N * D, *dv = dk + N * D;
  const E* dout = y.dout + (long)h * N * D;
  rotated_heads(l, h, z.qkv, z.q, z.k, z.v);
  pack_transposed(z.k, D, D, N, z.kt);
  pack(z.k, D, N, D, y.kp);
  pack_transposed(z.v, D, D, N, y.vt);
  if constexpr (sizeof(E) == 4) {
    pack(z.q, D, N, D, y.qt);
    pack(dout, D, N, D, y.doutt);
  } else {
    transpose(z.q, D, N, D, y.qt, N);
    transpose(dout, D, N, D, y.doutt, N);
  }
  for (int i = 0; i < N; i += R) {
    const int count = std::min(R, N - i);
    const Start start = i ? OUT : ZERO;
    product(count, N, D, z.q + (long)i * D, D, z.kt, z.s, N);
    product(count, N, D, dout + (long)i * D, D, y.vt, y.dp, N);
    softmax_back(l, count, z.s, y.dp, z.lse + h * N + i, y.delta + h * N + i, y.dspa);
    if constexpr (sizeof(E) == 4) {
      product_turned(N, D, count, z.s, N, y.doutt + i * 16, N * 16L, dv, D, start);
      product_turned(N, D, count, y.dp, N, y.qt + i * 16, N * 16L, dk, D, start);
      product(count, D, N, y.dp, N, y.kp, dq + (long)i * D, D);
    } else {  // tiles cannot be read transposed: d v^T = dout^T p, d k^T = q^T ds
      pack(z.s, N, count, N, y.pp);
      pack(y.dp, N, count, N, y.dspp);
      product(D, N, count, y.doutt + i, N, y.pp, y.turned, N, start);
      product(D, N, count, y.qt + i, N, y.dspp, y.turned + N * D, N, start);
      product(count, D, N, y.dspa, N, y.kp, dq + (long)i * D, D);
    }
  }
  if constexpr (sizeof(E) == 2) {
    transpose(y.turned, N, D, N, dv, D);
    transpose(y.turned + N * D, N, D, N, dk, D);
  }
}

// d_heads of one head -> its part of d_qkv; adds to the sums of GTA and of the bias.
template <class E> void heads_back(const Layer& l, int h, Scratch<E>& z, BackScratch<E>& y) {
  const int N = l.N, C = l.C, D = C / l.H;
  // s is in base 2 and q carries the scale: d q = ds k / sqrt(D), d k = ds^T q ln 2
  const float factors[3] = {1.f / std::sqrt((float)D), 0.6931471805599453f, 1.f};
  for (int which = 0; which < 3; which++) {
    const vec factor = splat(factors[which]);
    vec bias[32];
    for (int e = 0; e < D; e += 16) bias[e / 16] = splat(0.f);
    for (int i = 0; i < N; i++) {
      const long table = ((long)which * N + i) * D;
      const int column = which * C + h * D;
      E* out = y.d_qkv + (long)i * y.stride + column;
      if (l.gta)
        rotate_head_back(l.own + table, l.other + table, D, z.qkv + (long)i * 3 * C + column, y.d_heads + table, factor,
                         out, y.own + table, y.other + table);
      else
        scale_head(D, y.d_heads + table, factor, out);
      for (int e = 0; e < D; e += 16) bias[e / 16] = add(bias[e / 16], load(out + e));
    }
    float* sum = y.b_qkv + which * C + h * D;
    for (int e = 0; e < D; e += 16) store(sum + e, add(load(sum + e), bias[e / 16]));
  }
}

// d of the rotated output, tokens [first, first + count), in z.rows -> dout [H, N, D] and delta = <dout, mixed>.
template <class E> void output_back(const Layer& l, int first, int count, Scratch<E>& z, BackScratch<E>& y) {
  const int N = l.N, C = l.C, H = l.H, D = C / H;
  const vec one = splat(1.f);
  for (int i = first; i < first + count; i++)
    for (int h = 0; h < H; h++) {
      const long table = (3L * N + i) * D;
      const float* g = z.rows + (long)(i - first) * C + h * D;
      const E* u = z.mixed + (long)i * C + h * D;
      E* out = y.dout + ((long)h * N + i) * D;
      if (l.gta)
        rotate_head_back(l.own + table, l.other + table, D, u, g, one, out, y.own + table, y.other + table);
      else
        scale_head(D, g, one, out);
      vec sum = splat(0.f);
      for (int e = 0; e < D; e += 16) sum = fma(load(out + e), load(u + e), sum);
      y.delta[h * N + i] = _mm512_reduce_add_ps(sum);
    }
}

// Adjoint of forward_image: grad [N, C] of next becomes that of x; d_c accumulates.
template <class E>
void backward_image(const Layer& l, const Weights<E>& w, Scratch<E>& z, BackScratch<E>& y, const float* x, float* grad,
                    float* d_c, double& d_gamma) {
  const int N = l.N, C = l.C, H = l.H, R = block<E>();
  for (int i = 0; i < N; i++) {
    const long at = (long)i * C;
    vec turn = splat(0.f);  // a token's part of d gamma: parts of all tokens cancel, hence the double
    if (i >= l.valid) {
      for (int e = 0; e < C; e += 16) store(y.ds + at + e, splat(0.f)), store(y.dx + at + e, splat(0.f));
      continue;
    }
    update_row_back(l, x + at, z.drive + at, grad + at, y.ds + at, y.dx + at, turn, y.frequency);
    d_gamma += _mm512_reduce_add_ps(turn);
    for (int e = 0; e < C; e += 16) store(d_c + at + e, add(load(d_c + at + e), load(y.ds + at + e)));
  }
  // Output projection: d W = ds^T O' (bf16: its transpose O'^T ds), d O' = ds W
  if constexpr (sizeof(E) == 2) {
    pack(y.ds, C, N, C, y.dsp);
    operand(y.ds, (long)N * C, y.dsa);
  }
  for (int i = 0; i < N; i += R) {
    const int count = std::min(R, N - i);
    rotated_output(l, z.mixed, i, count, z.oa);
    if constexpr (sizeof(E) == 4) {
      pack(z.oa, C, count, C, y.dsp);
      product_turned(C, C, count, y.ds + (long)i * C, C, y.dsp, count * 16L, y.w_out, C, OUT);
      product(count, C, C, y.ds + (long)i * C, C, w.out_back.data(), z.rows, C);
    } else {
      transpose(z.oa, C, count, C, y.xt + i, N);
      product(count, C, C, y.dsa + (long)i * C, C, w.out_back.data(), z.rows, C);
    }
    output_back(l, i, count, z, y);
  }
  if constexpr (sizeof(E) == 2) product(C, C, N, y.xt, N, y.dsp, y.w_out, C, OUT);
  for (int h = 0; h < H; h++) {
    attention_back(l, h, z, y);
    heads_back(l, h, z, y);
  }
  // Input projection: d W = d_qkv^T x (bf16: its transpose), d x = d_qkv W
  if constexpr (sizeof(E) == 4) {
    pack(x, C, N, C, y.xt);
    product_turned(3 * C, C, N, y.d_qkv, y.stride, y.xt, N * 16L, y.w_qkv, C, OUT);
  } else {
    transpose(x, C, N, C, y.xt, N);
    pack(y.d_qkv, y.stride, N, 3 * C, y.d_qkv_p);
    product(C, 3 * C, N, y.xt, N, y.d_qkv_p, y.w_qkv, 3 * C, OUT);
  }
  product(N, C, 3 * C, y.d_qkv, y.stride, w.qkv_back.data(), grad, C);
  for (long i = 0; i < (long)N * C; i += 16) store(grad + i, add(load(grad + i), load(y.dx + i)));
}

}  // namespace
