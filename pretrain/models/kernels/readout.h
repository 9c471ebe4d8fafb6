// The readout: norms over the n planes of a linear map, forward and backward. The map is kept, or stays in cache and is
// computed again by the backward.

#pragma once
#include <cmath>

#include "layer.h"

namespace {

constexpr float TINY = 1e-24f;  // of kuramoto.py
constexpr int TOKENS = 128;     // a block: enough depth for the products that sum gradients of weights

// Legend: M tokens (a multiple of 32), C channels in, O channels out (multiples of 32 and 16), S = n O sums.
struct Readout {
  int64_t M, C, O, n, threads;
  const float *x, *w, *b, *bias;  // [M, C], [S, C], [S], [O]
  float* out;                     // [M, O]
  void* kept;                     // E: the map with its bias [M, S]; or null
  // backward
  const float* grad;        // [M, O]
  float *d_x, *d_w, *d_b;   // [M, C], [S, C], [S]
};

template <class E> struct ReadoutScratch {
  float* y;
  E *xa, *dy, *packed, *turned;
  long stride;  // of y and dy: rows of a power of two would share few cache sets
  ReadoutScratch(const Readout& l) {
    const long C = l.C, S = l.n * l.O;
    stride = S + 32;
    y = arena.take<float>(TOKENS * stride);
    memset(y, 0, TOKENS * stride * sizeof(float));
    xa = arena.take<E>(TOKENS * C);
    dy = arena.take<E>(TOKENS * stride);
    packed = arena.take<E>(TOKENS * C);
    turned = arena.take<E>(TOKENS * S);
  }
  static size_t bytes(const Readout& l) {
    const long C = l.C, S = l.n * l.O;
    return sizeof(E) * TOKENS * (2 * C + 2 * S + 32) + 4 * TOKENS * (S + 32) + 5 * SLACK;
  }
};

template <class E> Operand<E> packed_weight(const Readout& l) {
  Operand<E> w((size_t)l.n * l.O * l.C);
  Weights<E>::pack_rows(l.w, l.C, l.n * l.O, w.data());
  return w;
}

template <class E> void readout_forward(const Readout& l) {
  const long C = l.C, O = l.O, S = l.n * O;
  const Operand<E> w = packed_weight<E>(l);
#pragma omp parallel num_threads(l.threads)
  {
    arena.reserve(ReadoutScratch<E>::bytes(l));
    ReadoutScratch<E> z(l);
    if (sizeof(E) == 2) configure();
#pragma omp for schedule(dynamic)
    for (long i = 0; i < l.M; i += ROWS) {
      const int count = std::min<long>(ROWS, l.M - i);
      E* kept = l.kept ? (E*)l.kept + i * S : nullptr;
      product(count, S, C, operand(l.x + i * C, count * C, z.xa), C, w.data(), z.y, z.stride);
      for (int r = 0; r < count; r++)
        for (int k = 0; k < O; k += 16) {
          vec square = splat(TINY);
          for (int m = 0; m < l.n; m++) {
            const vec y = add(load(z.y + r * z.stride + m * O + k), load(l.b + m * O + k));
            square = fma(y, y, square);
            if (kept) store(kept + r * S + m * O + k, y);
          }
          store(l.out + (i + r) * O + k, add(_mm512_sqrt_ps(square), load(l.bias + k)));
        }
    }
    if (sizeof(E) == 2) release();
  }
}

// y of a token (with its bias, or `b` to be added) and the gradient g of its norms -> that of y; adds to the sums of the
// bias. d_y may be y.
template <class E>
inline void norms_back(const Readout& l, const E* y, const float* b, const float* g, float* d_y, float* d_b) {
  for (int k = 0; k < l.O; k += 16) {
    vec square = splat(TINY);
    for (int m = 0; m < l.n; m++) {
      vec v = load(y + m * l.O + k);
      if (b) v = add(v, load(b + m * l.O + k));
      square = fma(v, v, square);
      store(d_y + m * l.O + k, v);
    }
    const vec factor = _mm512_div_ps(load(g + k), _mm512_sqrt_ps(square));
    for (int m = 0; m < l.n; m++) {
      const vec v = mul(factor, load(d_y + m * l.O + k));
      store(d_y + m * l.O + k, v);
      store(d_b + m * l.O + k, add(load(d_b + m * l.O + k), v));
    }
  }
}

template <class E> void readout_backward(const Readout& l) {
  const long C = l.C, S = l.n * l.O;
  const Operand<E> w = l.kept ? Operand<E>() : packed_weight<E>(l);
  Operand<E> back(S * C);
  pack(l.w, C, S, C, back.data());
  const Parts parts((l.M + TOKENS - 1) / TOKENS, l.threads, S * C + S);
#pragma omp parallel num_threads(l.threads)
  {
    arena.reserve(ReadoutScratch<E>::bytes(l));
    ReadoutScratch<E> z(l);
    if (sizeof(E) == 2) configure();
#pragma omp for schedule(dynamic)
    for (long part = 0; part < parts.count; part++) {
      float *d_w = parts.zeroed(part), *d_b = d_w + S * C;
      for (long i = parts.first(part) * TOKENS; i < std::min<long>(l.M, parts.first(part + 1) * TOKENS); i += TOKENS) {
        const int count = std::min<long>(TOKENS, l.M - i);
        const float *x = l.x + i * C, *g = l.grad + i * l.O;
        if (!l.kept) product(count, S, C, operand(x, count * C, z.xa), C, w.data(), z.y, z.stride);
        for (int r = 0; r < count; r++, g += l.O) {
          float* y = z.y + r * z.stride;
          if (l.kept)
            norms_back(l, (const E*)l.kept + (i + r) * S, nullptr, g, y, d_b);
          else
            norms_back(l, y, l.b, g, y, d_b);
        }
        product(count, C, S, operand(z.y, count * z.stride, z.dy), z.stride, back.data(), l.d_x + i * C, C);
        pack(x, C, count, C, z.packed);
        weight_grads(count, z.y, z.stride, S, z.packed, C, z.turned, d_w);
      }
    }
    if (sizeof(E) == 2) release();
  }
  const float* total = parts.total(l.threads);
  add_to(l.d_w, total, S * C);
  add_to(l.d_b, total + S * C, S);
}

}  // namespace
