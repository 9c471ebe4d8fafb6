// All T steps of a Kuramoto layer with attention coupling, and the readout, forward and backward, on CPUs with AVX-512
// (fp32) and AMX (bf16 products). The equations are those of kuramoto.py and connectivity.py, which stay the reference.
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
#pragma omp for schedule(static)
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
  const long size = l.N * l.C, C = l.C, D = C / l.H;
#pragma omp parallel num_threads(l.threads)
  {
    arena.reserve(Scratch<E>::bytes(l) + BackScratch<E>::bytes(l));
    Scratch<E> z(l);
    BackScratch<E> y(l);
    double d_gamma = 0;
    if (sizeof(E) == 2) configure();
#pragma omp for schedule(static)
    for (long b = 0; b < l.B; b++) {
      if (l.d_stimulus) memset(l.d_stimulus + b * size, 0, size * 4);
      for (long t = l.steps - 1; t >= 0; t--) {
        point(l, z, t, b);
        const float* x = l.states + (t * l.B + b) * size;
        if (!l.qkv) forward_image(l, w, z, x, of_image(l, l.stimulus, b), y.ds);
        backward_image(l, w, z, y, x, l.grad + b * size, of_image(l, l.d_stimulus, b), d_gamma);
      }
    }
    if (sizeof(E) == 2) release();
    const int me = omp_get_thread_num(), all = omp_get_num_threads();
    for (int turn = 0; turn < all; turn++) {  // in order of the threads, so that sums are the same every time
#pragma omp barrier
      if (turn != me) continue;
      add_to(l.d_w_qkv, y.w_qkv, 3 * C * C);
      add_to(l.d_b_qkv, y.b_qkv, 3 * C);
      add_to(l.d_w_out, y.w_out, C * C);
      if (l.gta) {
        add_to(l.d_own, y.own, 4 * l.N * D);
        add_to(l.d_other, y.other, 4 * l.N * D);
      }
      if (l.frequency) add_to(l.d_frequency, y.frequency, C / 2);
      *l.d_gamma += d_gamma;
    }
  }
}

}  // namespace

extern "C" {
void forward_float(const Layer* l) { forward<float>(*l); }
void backward_float(const Layer* l) { backward<float>(*l); }
void readout_forward_float(const Readout* l) { readout_forward<float>(*l); }
void readout_backward_float(const Readout* l) { readout_backward<float>(*l); }
#ifdef __AMX_BF16__
void forward_bf16(const Layer* l) { forward<bf16>(*l); }
void backward_bf16(const Layer* l) { backward<bf16>(*l); }
void readout_forward_bf16(const Readout* l) { readout_forward<bf16>(*l); }
void readout_backward_bf16(const Readout* l) { readout_backward<bf16>(*l); }
#endif
int has_bf16() {
#ifdef __AMX_BF16__
  const int request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return 0;
#endif
}
}
