// All T steps of a Kuramoto layer with attention coupling, and the readout, forward and backward, on CPUs with AVX-512
// (with products in bf16 too, if possible by AMX). The equations are those of kuramoto.py and connectivity.py, which
// stay the reference.
//
// One thread takes one image at a time through all steps, so that queries, keys, attention and the update stay in its
// second-level cache; only what the backward needs goes to memory. Called through ctypes by native.py: no torch here.

#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "backward.h"
#include "readout.h"

namespace {

template <class E> void forward(const Layer& l) {
  const Weights<E> w(l, false);
  const long size = l.N * l.C;
#pragma omp parallel num_threads(l.threads)
  {
    arena.reserve(Scratch<E>::bytes(l));
    if (sizeof(E) == 2) configure();
    Scratch<E> z(l);
#pragma omp for schedule(dynamic)
    for (long b = 0; b < l.B; b++)
      for (long t = 0; t < l.steps; t++) {
        point(l, z, t, b);
        float *x = l.states + (l.keep * t * l.B + b) * size, *next = x + l.keep * l.B * size;
        forward_image(l, w, z, x, of_image(l, l.stimulus, b), next);
      }
    if (sizeof(E) == 2) release();
  }
}

template <class E> void backward(const Layer& l) {
  const Weights<E> w(l, true);
  const long size = l.N * l.C;
  const Parts parts(l.B, l.threads, BackScratch<E>::sums(l));
  std::vector<double> d_gamma(parts.count);
#pragma omp parallel num_threads(l.threads)
  {
    arena.reserve(Scratch<E>::bytes(l) + BackScratch<E>::bytes(l));
    Scratch<E> z(l);
    BackScratch<E> y(l);
    if (sizeof(E) == 2) configure();
#pragma omp for schedule(dynamic)
    for (long part = 0; part < parts.count; part++) {
      y.sum_at(l, parts.zeroed(part));
      for (long b = parts.first(part); b < parts.first(part + 1); b++) {
        if (l.d_stimulus) memset(l.d_stimulus + b * size, 0, size * 4);
        for (long t = l.steps - 1; t >= 0; t--) {
          point(l, z, t, b);
          const float* x = l.states + (t * l.B + b) * size;
          if (!l.qkv) forward_image(l, w, z, x, of_image(l, l.stimulus, b), y.ds);
          backward_image(l, w, z, y, x, l.grad + b * size, of_image(l, l.d_stimulus, b), d_gamma[part]);
        }
      }
    }
    if (sizeof(E) == 2) release();
  }
  BackScratch<E>::deliver(l, parts.total(l.threads));
  for (double each : d_gamma) *l.d_gamma += each;
}

}  // namespace

extern "C" {
void forward_float(const Layer* l) { forward<float>(*l); }
void backward_float(const Layer* l) { backward<float>(*l); }
void readout_forward_float(const Readout* l) { readout_forward<float>(*l); }
void readout_backward_float(const Readout* l) { readout_backward<float>(*l); }
#ifdef __AVX512BF16__
void forward_bf16(const Layer* l) { forward<bf16>(*l); }
void backward_bf16(const Layer* l) { backward<bf16>(*l); }
void readout_forward_bf16(const Readout* l) { readout_forward<bf16>(*l); }
void readout_backward_bf16(const Readout* l) { readout_backward<bf16>(*l); }
#endif
int has_bf16() {
#ifdef __AMX_BF16__
  const int request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#elif defined(__AVX512BF16__)
  return 1;
#else
  return 0;
#endif
}
}
