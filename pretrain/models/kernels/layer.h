// What a layer is made of, as Python hands it over, and the memory of a thread.
//
// Legend: B images, N tokens (a multiple of 32, the first `valid` of them real), C channels, n components (at most 16),
// K = C/n oscillators (a multiple of 16), H heads, D = C/H (16, or a multiple of 32 up to 512), E the type of the
// operands of matrix products (float or bf16). State and sums are fp32.
//
// Heads are computed in groups of W = max(D, 64) channels (32 where 64 do not divide C): products of 64 columns are the
// fastest. What belongs to a group lies together, so that it stays in the second-level cache from its projection to its
// last gradient: beyond that cache even products wait for memory.

#pragma once
#include <omp.h>

#include <cstdlib>
#include <new>
#include <vector>

#include "products.h"

namespace {

constexpr int R = 32;     // queries of a block of attention
constexpr int ROWS = 64;  // tokens of a block of products with weights

// Rows of rotated queries, keys and values of a head: AMX's tiles are 32 deep, the rest of a narrow head is zero.
template <class E> int head_row(int D) {
#ifdef __AMX_BF16__
  if (sizeof(E) == 2 && D == 16) return 32;
#endif
  return D;
}

constexpr size_t SLACK = 320;  // of a buffer in the arena

// One block per thread, grown when needed and kept: fresh pages cost more than the arithmetic on them.
struct Arena {
  char* base = nullptr;
  size_t size = 0, used = 0;
  ~Arena() { free(base); }
  void reserve(size_t bytes) {
    used = 0;
    if (bytes <= size) return;
    free(base);
    size = (bytes + (1 << 21) - 1) >> 21 << 21;
    base = (char*)aligned_alloc(1 << 21, size);
  }
  template <class T> T* take(long count) {
    T* p = (T*)(base + used);
    used += (count * sizeof(T) + 255) / 256 * 256 + 64;  // 64: keeps equal buffers off the same cache sets
    return p;
  }
};
thread_local Arena arena;

inline void add_to(float* total, const float* part, long count) {
  for (long i = 0; i < count; i++) total[i] += part[i];
}

// Sums over parts of some items, each in memory of its own: threads take a part when they are ready for one, which
// matters where cores are not equally fast, and the result is the same every time.
struct Parts {
  const long items, size, count;  // size: floats of a part's sums
  float* const sums;
  Parts(long items, long threads, long size)
      : items(items), size((size + 15) / 16 * 16), count(parts(items, threads, size)), sums(space(count * this->size)) {}
  // The items of a part are those from first(part) to first(part + 1).
  long first(long part) const { return part * items / count; }
  float* zeroed(long part) const { return (float*)memset(sums + part * size, 0, size * sizeof(float)); }
  // Of all parts, in the place of the first one's.
  const float* total(int threads) const {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < size; i += 16)
      for (long part = 1; part < count; part++) store(sums + i, add(load(sums + i), load(sums + part * size + i)));
    return sums;
  }

 private:
  // Eight for each thread if there are items for them, and fewer where they would need more than 256 MiB.
  static long parts(long items, long threads, long size) {
    const long fitting = std::max(threads, std::min(8 * threads, (64L << 20) / size));
    return std::max(1L, std::min(items, fitting));
  }
  static float* space(long floats) {
    static thread_local Arena kept;
    kept.reserve(floats * sizeof(float) + SLACK);
    return kept.take<float>(floats);
  }
};

struct Layer {
  int64_t B, N, valid, C, n, H, steps;
  int64_t gta, update, projection, self_drift, keep, threads;  // update: of oscillators; 0: x <- c + J x, the coupling alone
  float gamma;
  const float *w_qkv, *b_qkv, *w_out, *b_out;  // [3C, C], [3C], [C, C], [C], as nn.Linear holds them
  const float *own, *other;                    // [4, N, D]: out[e] = own[e] u[e] + other[e] u[e +- D/2]; q, k, v, output
  const float* frequency;                      // [n/2, K] or null
  const float* stimulus;                       // [B, N, C], or null for none
  float* states;                               // keep: [steps + 1, B, N, C], first given; else [B, N, C], updated in place
  void *qkv, *mixed, *drive;                   // kept E: [steps, B, C/W, N, 3W], [steps, B, C/W, N, W], [steps, B, N, C]; or null
  float* lse;                                  // kept: [steps, B, H, N], base 2; or null
  // backward
  float* grad;            // [B, N, C]: in d final state, out d first state
  float *d_stimulus;      // [B, N, C] or null
  float *d_w_qkv, *d_b_qkv, *d_w_out;  // [C/W, 3, W, C], [C/W, 3, W], [C, C] transposed
  float *d_own, *d_other; // [4, N, D]
  float *d_frequency;     // [n/2, K] or null
  double* d_gamma;        // [1]

  int head() const { return C / H; }
  int group() const { return std::max<int>(head(), C % 64 ? 32 : 64); }
};

// A vector at the start of a cache line: one that lies across two is read twice each time.
template <class T> struct Lines {
  using value_type = T;
  T* allocate(size_t count) { return (T*)::operator new(count * sizeof(T), std::align_val_t(64)); }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
  bool operator==(const Lines&) const { return true; }
  bool operator!=(const Lines&) const { return false; }
};
template <class T> using Operand = std::vector<T, Lines<T>>;

// Weights as B operands, packed once per call.
template <class E> struct Weights {
  Operand<E> qkv, out, qkv_back, out_back;  // qkv: by group
  std::vector<float> bias;                  // of qkv, by group
  Weights(const Layer& l, bool backward) {
    const long C = l.C, W = l.group();
    std::vector<float> rows(3 * C * C);
    bias.resize(3 * C);
    for (long g = 0; g < C / W; g++)
      for (long which = 0; which < 3; which++) {
        const long from = which * C + g * W, to = (g * 3 + which) * W;
        memcpy(rows.data() + to * C, l.w_qkv + from * C, W * C * sizeof(float));
        memcpy(bias.data() + to, l.b_qkv + from, W * sizeof(float));
      }
    qkv.resize(3 * C * C);
    out.resize(C * C);
    pack_rows(rows.data(), C, 3 * C, qkv.data());
    pack_rows(l.w_out, C, C, out.data());
    if (!backward) return;
    qkv_back.resize(3 * C * C);
    out_back.resize(C * C);
    for (long g = 0; g < 3 * C * C; g += 3 * W * C) pack(rows.data() + g, C, 3 * W, C, qkv_back.data() + g);
    pack(l.w_out, C, C, C, out_back.data());
  }
  // weight [columns, depth] -> B of its transpose
  static void pack_rows(const float* w, int depth, int columns, E* dst) {
    if constexpr (sizeof(E) == 4) {
      pack_transposed(w, depth, depth, columns, dst);
    } else {
      std::vector<E> half((size_t)columns * depth);
      for (long i = 0; i < (long)columns * depth; i += 16) store(half.data() + i, load(w + i));
      pack_transposed(half.data(), depth, depth, columns, dst);
    }
  }
};

}  // namespace
