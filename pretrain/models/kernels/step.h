// What a step does to one token: the matrices of GTA and the update of the oscillators, with their adjoints.

#pragma once
#include <cmath>

#include "layer.h"

namespace {

// What is done for a token to the heads of a group together: they share their matrices. Heads lie D apart in u and the
// gradients' operands, `apart` in the results.

// factor * M u for the pairs of each head, or with the adjoint of M.
template <bool ADJOINT, class S, class T>
inline void rotate_heads(const float* own, const float* other, int D, int heads, const S* u, long from, vec factor,
                         T* out, long to) {
  if (D == 16) {
    const vec m = mul(factor, load(own)), o = mul(factor, load(other)), turned = swap_halves(o);
    for (int h = 0; h < heads; h++, u += from, out += to) {
      const vec x = load(u), y = swap_halves(x);
      store(out, fma(m, x, mul(ADJOINT ? turned : o, y)));
    }
    return;
  }
  const int half = D / 2;
  for (int e = 0; e < half; e += 16) {
    const vec m = mul(factor, load(own + e)), n = mul(factor, load(own + half + e));
    vec p = mul(factor, load(other + e)), q = mul(factor, load(other + half + e));
    if (ADJOINT) std::swap(p, q);
    for (int h = 0; h < heads; h++) {
      const vec a = load(u + h * from + e), b = load(u + h * from + half + e);
      store(out + h * to + e, fma(m, a, mul(p, b)));
      store(out + h * to + half + e, fma(n, b, mul(q, a)));
    }
  }
}

// Gradients of the matrices of rotate_heads at u for gradients g of its results: own += factor g u, other += factor g
// swap(u).
template <class S, class G>
inline void matrix_grads(int D, int heads, const S* u, const G* g, long apart, vec factor, float* d_own,
                         float* d_other) {
  if (D == 16) {
    vec m = splat(0.f), o = splat(0.f);
    for (int h = 0; h < heads; h++, u += D, g += apart) {
      const vec x = load(u), y = load(g);
      m = fma(y, x, m);
      o = fma(y, swap_halves(x), o);
    }
    store(d_own, fma(factor, m, load(d_own)));
    store(d_other, fma(factor, o, load(d_other)));
    return;
  }
  const int half = D / 2;
  for (int e = 0; e < half; e += 16) {
    vec m = splat(0.f), n = splat(0.f), p = splat(0.f), q = splat(0.f);
    for (int h = 0; h < heads; h++) {
      const vec a = load(u + h * D + e), b = load(u + h * D + half + e);
      const vec y = load(g + h * apart + e), z = load(g + h * apart + half + e);
      m = fma(y, a, m), n = fma(z, b, n), p = fma(y, b, p), q = fma(z, a, q);
    }
    store(d_own + e, fma(factor, m, load(d_own + e)));
    store(d_own + half + e, fma(factor, n, load(d_own + half + e)));
    store(d_other + e, fma(factor, p, load(d_other + e)));
    store(d_other + half + e, fma(factor, q, load(d_other + half + e)));
  }
}

// The same by the layer's matrices of queries, keys, values or output (`which`) of a token; without GTA the factor alone.
template <bool ADJOINT, class S, class T>
inline void rotate(const Layer& l, int which, int token, int heads, const S* u, long from, vec factor, T* out,
                   long to) {
  const int D = l.C / l.H;
  const long table = ((long)which * l.N + token) * D;
  if (l.gta)
    rotate_heads<ADJOINT>(l.own + table, l.other + table, D, heads, u, from, factor, out, to);
  else
    for (int h = 0; h < heads; h++)
      for (int e = 0; e < D; e += 16) store(out + h * to + e, mul(factor, load(u + h * from + e)));
}

// One token of the update: x, s -> next x, which may be x itself.
inline void update_row(const Layer& l, const float* x, const float* s, float* next) {
  const int n = l.n, K = l.C / n;
  const vec gamma = splat(l.gamma);
  vec u[16], xs[16];
  for (int k = 0; k < K; k += 16) {
    vec dot = splat(0.f), square = splat(0.f);
    for (int m = 0; m < n; m++) {
      xs[m] = load(x + m * K + k);
      if (l.projection) dot = fma(xs[m], load(s + m * K + k), dot);
    }
    if (l.self_drift) dot = _mm512_sub_ps(dot, splat(1.f));  // x - <x, s> x = -(<x, s> - 1) x
    for (int m = 0; m < n; m++) {
      vec drift = fnma(dot, xs[m], load(s + m * K + k));
      if (l.frequency) {
        vec w = load(l.frequency + (m / 2) * K + k);
        drift = m % 2 ? fnma(w, xs[m ^ 1], drift) : fma(w, xs[m ^ 1], drift);
      }
      u[m] = fma(gamma, drift, xs[m]);
      square = fma(u[m], u[m], square);
    }
    vec inverse = _mm512_div_ps(splat(1.f), _mm512_sqrt_ps(_mm512_max_ps(square, splat(1e-24f))));
    for (int m = 0; m < n; m++) store(next + m * K + k, mul(u[m], inverse));
  }
}

// Adjoint of update_row at x, s: g = d next -> ds, and in its place dx (of the update alone); accumulates d gamma and d
// frequency.
template <class E>
inline void update_row_back(const Layer& l, const float* x, const E* s, float* g, float* ds, vec& d_gamma,
                            float* d_frequency) {
  const int n = l.n, K = l.C / n;
  const vec gamma = splat(l.gamma);
  vec drift[16], u[16], xs[16];
  for (int k = 0; k < K; k += 16) {
    vec dot = splat(0.f), square = splat(0.f), along = splat(0.f), radial = splat(0.f);
    for (int m = 0; m < n; m++) {
      xs[m] = load(x + m * K + k);
      if (l.projection) dot = fma(xs[m], load(s + m * K + k), dot);
    }
    vec pull = l.self_drift ? _mm512_sub_ps(dot, splat(1.f)) : dot;
    for (int m = 0; m < n; m++) {
      drift[m] = fnma(pull, xs[m], load(s + m * K + k));
      if (l.frequency) {
        vec w = load(l.frequency + (m / 2) * K + k);
        drift[m] = m % 2 ? fnma(w, xs[m ^ 1], drift[m]) : fma(w, xs[m ^ 1], drift[m]);
      }
      u[m] = fma(gamma, drift[m], xs[m]);
      square = fma(u[m], u[m], square);
      radial = fma(u[m], load(g + m * K + k), radial);
    }
    square = _mm512_max_ps(square, splat(1e-24f));
    vec inverse = _mm512_div_ps(splat(1.f), _mm512_sqrt_ps(square));
    radial = _mm512_div_ps(radial, square);
    for (int m = 0; m < n; m++) {  // u becomes d u
      u[m] = mul(inverse, fnma(radial, u[m], load(g + m * K + k)));
      if (l.projection) along = fma(xs[m], u[m], along);
      d_gamma = fma(u[m], drift[m], d_gamma);
    }
    // drift = s - pull x + Omega x, pull = <x, s> [- 1]
    for (int m = 0; m < n; m++) {
      vec d_drift = mul(gamma, u[m]);
      vec d_along = mul(gamma, along);
      store(ds + m * K + k, fnma(d_along, xs[m], d_drift));
      vec d = fnma(pull, d_drift, u[m]);
      d = fnma(d_along, load(s + m * K + k), d);
      if (l.frequency) {  // transpose of Omega
        vec w = load(l.frequency + (m / 2) * K + k), other = mul(gamma, u[m ^ 1]);
        d = m % 2 ? fma(w, other, d) : fnma(w, other, d);
        if (m % 2 == 0) {
          float* dw = d_frequency + (m / 2) * K + k;
          vec turn = mul(d_drift, xs[m + 1]);
          turn = fnma(other, xs[m], turn);
          store(dw, _mm512_add_ps(load(dw), turn));
        }
      }
      store(g + m * K + k, d);
    }
  }
}

}  // namespace
