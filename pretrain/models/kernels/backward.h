// The adjoint of one step of one image, by hand. Attention is computed again from queries and keys.

#pragma once
#include "forward.h"

namespace {

// What the backward of one thread holds beside Scratch; and the sums over its images and all steps.
template <class E> struct BackScratch {
  float *ds, *dp, *d_oa, *d_heads, *w_qkv, *b_qkv, *w_out, *own, *other, *frequency;
  E *dsa, *dsp, *turned, *d_qkv, *d_qkv_p, *keys, *dout, *doutp, *qb, *doutb, *pa, *da, *dsb;
  int stride;  // of d_qkv: rows of a power of two would share few cache sets
  BackScratch(const Layer& l) {
    const long N = l.N, C = l.C, D = C / l.H, row = head_row<E>(D);
    stride = 3 * C + 32;
    ds = arena.take<float>(N * C);
    dp = arena.take<float>(N * R);
    d_oa = arena.take<float>(N * C);
    d_heads = arena.take<float>(3 * N * D);
    dsa = arena.take<E>(N * C);
    dsp = arena.take<E>(N * C);
    turned = arena.take<E>(N * C);
    d_qkv = arena.take<E>(N * stride);
    d_qkv_p = arena.take<E>(N * 3 * C);
    keys = arena.take<E>(N * D);
    dout = arena.take<E>(N * row);
    doutp = arena.take<E>(N * row);
    qb = arena.take<E>(R * D);
    doutb = arena.take<E>(R * D);
    pa = arena.take<E>(N * R);
    da = arena.take<E>(N * R);
    dsb = arena.take<E>(N * R);
    memset(dout, 0, N * row * sizeof(E));
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
    const long N = l.N, C = l.C, D = C / l.H, row = head_row<E>(D);
    return 4 * (2 * N * C + N * R + 3 * N * D) + sizeof(E) * (N * (9 * C + 32 + D + 2 * row + 3 * R) + 2 * R * D) +
           4 * (4 * C * C + 4 * C + 8 * N * D) + 23 * SLACK;
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
  for (int j = l.valid; j < N; j++) store(s + j * R, splat(-INFINITY)), store(s + j * R + 16, splat(-INFINITY));
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

// Adjoint of the attention of one head: d_heads, the gradients of rotated q, k and v [3, N, D], from d_oa; its part of oa
// again, and of the gradients of the output's matrices.
template <class E> void attention_back(const Layer& l, int h, Scratch<E>& z, BackScratch<E>& y) {
  const int N = l.N, C = l.C, D = C / l.H, row = head_row<E>(D);
  float *dq = y.d_heads, *dk = dq + N * D, *dv = dk + N * D;
  E *pa = sizeof(E) == 4 ? (E*)z.s : y.pa, *da = sizeof(E) == 4 ? (E*)y.dp : y.da, *dsb = sizeof(E) == 4 ? da : y.dsb;
  const vec one = splat(1.f);
  rotated_heads(l, h, z.qkv, z.q, z.k, z.v);
  pack_transposed(z.q, row, row, N, z.qp);
  mixable(l, z.k, y.keys);
  for (int i = 0; i < N; i++) {
    const long at = (long)i * C + h * D, table = (3L * N + i) * D;
    rotate<true>(l, 3, i, y.d_oa + at, one, y.dout + (long)i * row);
    rotate<false>(l, 3, i, z.mixed + at, one, z.oa + at);
    if (l.gta) matrix_grads(D, z.mixed + at, y.d_oa + at, one, y.own + table, y.other + table);
  }
  pack_transposed(y.dout, row, row, N, y.doutp);
  for (int i = 0; i < N; i += R) {
    const Start start = i ? OUT : ZERO;
    product(N, R, row, z.k, row, z.qp + (long)i * row, z.s, R);
    product(N, R, row, z.v, row, y.doutp + (long)i * row, y.dp, R);
    softmax_back(l, z.s, y.dp, z.lse + h * N + i, pa, da, dsb);
    pack(y.dout + (long)i * row, row, R, D, y.doutb);
    pack(z.q + (long)i * row, row, R, D, y.qb);
    product(N, D, R, pa, R, y.doutb, dv, D, start);
    product(N, D, R, da, R, y.qb, dk, D, start);
    mix(l, dsb, y.keys, z.turned, dq + (long)i * D);
  }
}

// d_heads of one head -> its part of d_qkv; adds to the sums of GTA and of the bias.
template <class E> void heads_back(const Layer& l, int h, Scratch<E>& z, BackScratch<E>& y) {
  const int N = l.N, C = l.C, D = C / l.H;
  // s is in base 2 and q carries the scale: d q = ds k / sqrt(D), d k = ds^T q ln 2
  const float factors[3] = {1.f / std::sqrt((float)D), 0.6931471805599453f, 1.f};
  for (int which = 0; which < 3; which++) {
    const vec factor = splat(factors[which]);
    const int column = which * C + h * D;
    vec bias[32];
    for (int e = 0; e < D; e += 16) bias[e / 16] = splat(0.f);
    for (int i = 0; i < N; i++) {
      const long table = ((long)which * N + i) * D;
      E* out = y.d_qkv + (long)i * y.stride + column;
      rotate<true>(l, which, i, y.d_heads + table, factor, out);
      if (l.gta)
        matrix_grads(D, z.qkv + (long)i * 3 * C + column, y.d_heads + table, factor, y.own + table, y.other + table);
      for (int e = 0; e < D; e += 16) bias[e / 16] = add(bias[e / 16], load(out + e));
    }
    float* sum = y.b_qkv + which * C + h * D;
    for (int e = 0; e < D; e += 16) store(sum + e, add(load(sum + e), bias[e / 16]));
  }
}

// Adjoint of forward_image: grad [N, C] of next becomes that of x; d_c (if wanted) accumulates.
template <class E>
void backward_image(const Layer& l, const Weights<E>& w, Scratch<E>& z, BackScratch<E>& y, const float* x, float* grad,
                    float* d_c, double& d_gamma) {
  const int N = l.N, C = l.C;
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
  product(N, C, C, operand(y.ds, (long)N * C, y.dsa), C, w.out_back.data(), y.d_oa, C);
  for (int h = 0; h < l.H; h++) {
    attention_back(l, h, z, y);
    heads_back(l, h, z, y);
  }
  weight_grads(N, y.ds, C, C, z.oa, C, y.dsp, y.turned, y.w_out);
  weight_grads(N, y.d_qkv, y.stride, 3 * C, x, C, y.d_qkv_p, y.turned, y.w_qkv);
  product(N, C, 3 * C, y.d_qkv, y.stride, w.qkv_back.data(), grad, C, OUT);
}

}  // namespace
