// The adjoint of one step of one image, by hand. Attention is computed again from queries and keys.

#pragma once
#include "forward.h"

namespace {

// What the backward of one thread holds beside Scratch; and where it adds to the sums over images and steps.
template <class E> struct BackScratch {
  float *ds, *dp, *d_oa, *d_heads, *w_qkv, *b_qkv, *w_out, *own, *other, *frequency;
  E *dsa, *dsp, *xp, *oa, *turned, *d_qkv, *keys, *dout, *doutp, *qb, *doutb, *pa, *da, *dsb;
  BackScratch(const Layer& l) {
    const long N = l.N, C = l.C, D = l.head(), W = l.group(), row = head_row<E>(D), heads = W / D;
    ds = arena.take<float>(N * C);
    dp = arena.take<float>(N * R);
    d_oa = arena.take<float>(N * W);
    d_heads = arena.take<float>(3 * N * W);
    dsa = arena.take<E>(N * C);
    dsp = arena.take<E>(N * C);
    xp = arena.take<E>(N * C);
    oa = arena.take<E>(N * W);
    turned = arena.take<E>(N * 3 * W);
    d_qkv = arena.take<E>(N * 3 * W);
    keys = arena.take<E>(N * D);
    dout = arena.take<E>(heads * N * row);
    doutp = arena.take<E>(N * row);
    qb = arena.take<E>(R * D);
    doutb = arena.take<E>(R * D);
    pa = arena.take<E>(N * R);
    da = arena.take<E>(N * R);
    dsb = arena.take<E>(N * R);
    memset(dout, 0, heads * N * row * sizeof(E));
  }
  // How many floats the sums over images are, where they lie from now on, and what they become in the end.
  static long sums(const Layer& l) { return 4 * l.C * l.C + 3 * l.C + 8 * l.N * l.head() + l.C / 2; }
  void sum_at(const Layer& l, float* at) {
    const long C = l.C, table = 4 * l.N * l.head();
    w_qkv = at, w_out = w_qkv + 3 * C * C, b_qkv = w_out + C * C, own = b_qkv + 3 * C, other = own + table;
    frequency = other + table;
  }
  static void deliver(const Layer& l, const float* at) {
    const long C = l.C, table = 4 * l.N * l.head();
    add_to(l.d_w_qkv, at, 3 * C * C);
    add_to(l.d_w_out, at += 3 * C * C, C * C);
    add_to(l.d_b_qkv, at += C * C, 3 * C);
    at += 3 * C;
    if (l.gta) {
      add_to(l.d_own, at, table);
      add_to(l.d_other, at + table, table);
    }
    if (l.frequency) add_to(l.d_frequency, at + 2 * table, C / 2);
  }
  static size_t bytes(const Layer& l) {
    const long N = l.N, C = l.C, D = l.head(), W = l.group(), row = head_row<E>(D), heads = W / D;
    return 4 * (N * (C + W) + N * R + 3 * N * W) +
           sizeof(E) * (N * (3 * C + 7 * W + D + (heads + 1) * row + 3 * R) + 2 * R * D) + 18 * SLACK;
  }
};

// Rows j and j + 1 of P or dS as rows of an A operand [N, R].
inline void store_rows(float* a, int j, const vec v[4]) { store_pair(a, 0, j, v[0], v[1], v[2], v[3]); }
#ifdef __AVX512BF16__
inline void store_rows(bf16* a, int j, const vec v[4]) {
  _mm512_storeu_si512(a + j * R, narrow(v[0], v[1]));
  _mm512_storeu_si512(a + (j + 1) * R, narrow(v[2], v[3]));
}
#endif

// Logits s and dP of a block -> P and dS = P (dP - <P, dP>) as A operands, and dS as `mix` takes it.
template <class E> void softmax_back(const Layer& l, float* s, float* dp, const float* lse, E* pa, E* da, E* dsb) {
  const int N = l.N;
  for (int j = l.valid; j < N; j++) store(s + j * R, splat(NEVER)), store(s + j * R + 16, splat(NEVER));
  const vec peak[2] = {load(lse), load(lse + 16)};
  vec sum[4] = {splat(0.f), splat(0.f), splat(0.f), splat(0.f)}, v[4];
  for (int j = 0; j < N; j += 2) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      v[i] = exp2v<E>(sub(load(s + j * R + i * 16), peak[i % 2]));
      sum[i] = fma(v[i], load(dp + j * R + i * 16), sum[i]);
      if (sizeof(E) == 2) store(s + j * R + i * 16, v[i]);
    }
    store_rows(pa, j, v);
  }
  const vec mean[2] = {add(sum[0], sum[2]), add(sum[1], sum[3])};
  for (int j = 0; j < N; j += 2) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
      v[i] = mul(load(s + j * R + i * 16), sub(load(dp + j * R + i * 16), mean[i % 2]));
    store_rows(da, j, v);
    if (sizeof(E) == 2) store_pair(dsb, N, j, v[0], v[1], v[2], v[3]);
  }
}

// Gradients d_oa of a group's outputs -> those before the output's matrices, dout, and of these matrices; oa again.
template <class E>
void outputs_back(const Layer& l, BackScratch<E>& y, const E* mixed, long head) {
  const int N = l.N, D = l.head(), W = l.group(), row = head_row<E>(D), heads = W / D;
  const vec one = splat(1.f);
  for (int i = 0; i < N; i++) {
    const long at = (long)i * W, table = (3L * N + i) * D;
    rotate<true>(l, 3, i, heads, y.d_oa + at, D, one, y.dout + (long)i * row, head);
    rotate<false>(l, 3, i, heads, mixed + at, D, one, y.oa + at, D);
    if (l.gta) matrix_grads(D, heads, mixed + at, y.d_oa + at, D, one, y.own + table, y.other + table);
  }
}

// Adjoint of the attention of one head from its rotated queries, keys and values: their gradients [3, N, D].
template <class E>
void attention_back(const Layer& l, int h, Scratch<E>& z, BackScratch<E>& y, const E* q, const E* k, const E* v,
                    const E* dout, float* d_heads) {
  const int N = l.N, D = l.head(), row = head_row<E>(D);
  float *dq = d_heads, *dk = dq + N * D, *dv = dk + N * D;
  E *pa = sizeof(E) == 4 ? (E*)z.s : y.pa, *da = sizeof(E) == 4 ? (E*)y.dp : y.da, *dsb = sizeof(E) == 4 ? da : y.dsb;
  pack_transposed(q, row, row, N, z.qp);
  mixable(l, k, y.keys);
  pack_transposed(dout, row, row, N, y.doutp);
  for (int i = 0; i < N; i += R) {
    const Start start = i ? OUT : ZERO;
    product(N, R, row, k, row, z.qp + (long)i * row, z.s, R);
    product(N, R, row, v, row, y.doutp + (long)i * row, y.dp, R);
    softmax_back(l, z.s, y.dp, z.lse + h * N + i, pa, da, dsb);
    pack(dout + (long)i * row, row, R, D, y.doutb);
    pack(q + (long)i * row, row, R, D, y.qb);
    product(N, D, R, pa, R, y.doutb, dv, D, start);
    product(N, D, R, da, R, y.qb, dk, D, start);
    mix(l, dsb, y.keys, z.turned, dq + (long)i * D);
  }
}

// d_heads of a group -> d_qkv; adds to the sums of GTA and of the bias.
template <class E> void heads_back(const Layer& l, BackScratch<E>& y, const E* qkv, float* d_bias) {
  const int N = l.N, D = l.head(), W = l.group(), heads = W / D;
  const long head = 3L * N * D;
  // s is in base 2 and q carries the scale: d q = ds k / sqrt(D), d k = ds^T q ln 2
  const float factors[3] = {1.f / std::sqrt((float)D), 0.6931471805599453f, 1.f};
  for (int which = 0; which < 3; which++) {
    const vec factor = splat(factors[which]);
    vec bias[32];
    for (int e = 0; e < W; e += 16) bias[e / 16] = splat(0.f);
    for (int i = 0; i < N; i++) {
      const long table = ((long)which * N + i) * D, at = 3L * i * W + which * W;
      const float* grads = y.d_heads + table;
      E* out = y.d_qkv + at;
      rotate<true>(l, which, i, heads, grads, head, factor, out, D);
      if (l.gta) matrix_grads(D, heads, qkv + at, grads, head, factor, y.own + table, y.other + table);
      for (int e = 0; e < W; e += 16) bias[e / 16] = add(bias[e / 16], load(out + e));
    }
    float* sum = d_bias + which * W;
    for (int e = 0; e < W; e += 16) store(sum + e, add(load(sum + e), bias[e / 16]));
  }
}

// Adjoint of forward_image: grad [N, C] of next becomes that of x; d_c (if wanted) accumulates.
template <class E>
void backward_image(const Layer& l, const Weights<E>& w, Scratch<E>& z, BackScratch<E>& y, const float* x, float* grad,
                    float* d_c, double& d_gamma) {
  const int N = l.N, C = l.C, D = l.head(), W = l.group();
  for (int i = 0; i < N; i++) {
    const long at = (long)i * C;
    if (i >= l.valid) {
      memset(y.ds + at, 0, C * sizeof(float));
      memset(grad + at, 0, C * sizeof(float));
      continue;
    }
    if (l.update) {
      vec turn = splat(0.f);  // a token's part of d gamma: parts of all tokens cancel, hence the double
      update_row_back(l, x + at, z.drive + at, grad + at, y.ds + at, turn, y.frequency);
      d_gamma += _mm512_reduce_add_ps(turn);
    } else {
      memcpy(y.ds + at, grad + at, C * sizeof(float));
      memset(grad + at, 0, C * sizeof(float));
    }
    if (!d_c) continue;
    for (int e = 0; e < C; e += 16) store(d_c + at + e, add(load(d_c + at + e), load(y.ds + at + e)));
  }
  const E* ds = operand(y.ds, (long)N * C, y.dsa);
  pack(ds, C, N, C, y.dsp);
  pack(x, C, N, C, y.xp);
  for (int g = 0; g < C / W; g++) {
    const E *qkv = z.qkv + 3L * g * N * W, *mixed = z.mixed + (long)g * N * W;
    product(N, W, C, ds, C, w.out_back.data() + (long)g * W * C, y.d_oa, W);
    rotated_heads(l, qkv, z);
    outputs_back(l, y, mixed, z.head);
    for (int h = 0; h < W / D; h++)
      attention_back(l, g * W / D + h, z, y, z.q + h * z.head, z.k + h * z.head, z.v + h * z.head, y.dout + h * z.head,
                     y.d_heads + 3L * h * N * D);
    heads_back(l, y, qkv, y.b_qkv + 3 * g * W);
    product(N, C, 3 * W, y.d_qkv, 3 * W, w.qkv_back.data() + 3L * g * W * C, grad, C, OUT);
    weight_grads(N, y.d_qkv, 3 * W, 3 * W, y.xp, C, y.turned, y.w_qkv + 3L * g * W * C);
    weight_grads(N, y.oa, W, W, y.dsp, C, y.turned, y.w_out + (long)g * W * C);
  }
}

}  // namespace
