// The leading eigenvectors of many small symmetric matrices, an image a thread.
//
// Householder reduction to tridiagonal form, bisection by Sturm sequences, twisted factorisations, back-transformation:
// G. H. Golub, C. F. Van Loan, "Matrix Computations", 4th edition, 8.3 and 8.4; I. S. Dhillon, B. N. Parlett, "Multiple
// representations to compute orthogonal eigenvectors of symmetric tridiagonal matrices", Linear Algebra Appl. 387, 2004.
//
// LAPACK finds all n eigenvectors, and in blocks that matrices of a few hundred rows are too small for. Here half of the
// matrix is read and written once per column of the reduction (the update of the last reflector and the product with the
// next share a pass), and only the eigenvectors asked for are computed, a vector's lane each. The reduction is float, its
// tridiagonal matrix is treated in double: what is lost is what rounding the matrix to float loses. Eigenvalues so close
// that their vectors are not orthogonal are left to the caller to notice (downstream/eigen.py).
//
// n rows, m eigenvectors. Plain C interface, called through ctypes.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

using Index = int64_t;
constexpr Index kFloats = 16, kDoubles = 8;  // in a vector
constexpr Index kPanel = 32;                 // eigenvectors transformed at a time: n of them fit the first cache
constexpr Index kRows = 4;                   // of the matrix, reduced at a time
constexpr Index kReflectors = 8;             // applied at a time
constexpr Index kRescale = 16;               // steps of a Sturm sequence between two scalings
constexpr int kHalvings = 46;                // of the interval [-1, 1]: to 3e-14 of the norm
constexpr double kTiny = 1e-15;              // of the norm: smaller couplings count as this much
constexpr double kNothing = 1e-18;           // in a unit vector: 0, since subnormal floats take a hundred times as long

using Floats = float __attribute__((vector_size(64)));
using HalfFloats = float __attribute__((vector_size(32), aligned(4)));
using Doubles = double __attribute__((vector_size(64)));
using Integers = int64_t __attribute__((vector_size(64)));

Index round_up(Index value, Index multiple) { return (value + multiple - 1) / multiple * multiple; }
Floats& at(float* values) { return *reinterpret_cast<Floats*>(values); }
const Floats& at(const float* values) { return *reinterpret_cast<const Floats*>(values); }
Doubles absolute(Doubles values) { return values < 0 ? -values : values; }

float total(const Floats& values) {
  using Quarter = float __attribute__((vector_size(16)));
  const auto* part = reinterpret_cast<const Quarter*>(&values);
  const Quarter sum = (part[0] + part[1]) + (part[2] + part[3]);
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

class Decomposition {
 public:
  Decomposition(Index n, Index m)
      : n_(n), m_(m), stride_(round_up(n, kFloats)), matrix_(round_up(n, kRows) * stride_ / kFloats),
        vectors_(round_up(m, kPanel) * stride_ / kFloats), w_(stride_ / kFloats), p_(w_.size()), zero_(w_.size()),
        diagonal_(n), off_(n), square_(n), ahead_(n), lower_(n), upper_(n), z_(n), values_(round_up(m, kPanel)) {}

  // matrix [n, n] -> vectors [n, m], values [m], rising.
  void solve(const float* matrix, float* vectors, float* values) {
    reduce(matrix);
    const double norm = scale();
    for (Index first = 0; first < m_; first += kPanel) {
      bisect(first);
      for (Index lane = first; lane < first + kPanel; lane += kDoubles) invert(lane);
    }
    transform();
    for (Index j = 0; j < m_; ++j) values[j] = static_cast<float>(values_[j] * norm);
    for (Index i = 0; i < n_; ++i)
      for (Index first = 0; first < m_; first += kPanel)
        std::copy_n(panel(first) + i * kPanel, std::min(kPanel, m_ - first), vectors + i * m_ + first);
  }

 private:
  float* row(Index i) { return reinterpret_cast<float*>(matrix_.data()) + i * stride_; }
  float* panel(Index first) { return reinterpret_cast<float*>(vectors_.data()) + first * stride_; }

  // Q'AQ tridiagonal, Q the product of reflections 1 - v v' with v'v = 2, which take the place of the matrix's rows. Of
  // those only what lies right of the diagonal, and its block, is kept up to date.
  void reduce(const float* matrix) {
    float *w = reinterpret_cast<float*>(w_.data()), *p = reinterpret_cast<float*>(p_.data());
    const float* last = reinterpret_cast<float*>(zero_.data());  // the reflector before, whose update is due
    std::fill(w, w + stride_, 0.0f);
    for (Index i = 0; i < n_; ++i) {
      std::copy(matrix + i * n_, matrix + (i + 1) * n_, row(i));
      std::fill(row(i) + n_, row(i) + stride_, 0.0f);
    }
    for (Index k = 0; k + 1 < n_; ++k) {
      float* v = row(k);
      for (Index j = k; j < n_; ++j) v[j] -= last[k] * w[j] + w[k] * last[j];
      diagonal_[k] = v[k];
      off_[k] = reflect(v, k + 1);
      std::fill(p, p + stride_, 0.0f);
      Index i = k + 1;
      for (; i % kRows != 0; ++i) update<1>(i, last, w, v, p);
      for (; i < n_; i += kRows) update<kRows>(i, last, w, v, p);
      float share = 0;
      for (Index j = k + 1; j < n_; ++j) share += p[j] * v[j];
      std::fill(w, w + k + 1, 0.0f);
      for (Index j = k + 1; j < n_; ++j) w[j] = p[j] - share / 2 * v[j];
      last = v;
    }
    diagonal_[n_ - 1] = row(n_ - 1)[n_ - 1];
  }

  // Row v from `first` on -> the reflector that turns it into a multiple of its first unit vector; returns the multiple.
  double reflect(float* v, Index first) {
    double sum = 0;
    for (Index j = first; j < n_; ++j) sum += double(v[j]) * v[j];
    const double head = v[first], image = head > 0 ? -std::sqrt(sum) : std::sqrt(sum), pivot = head - image;
    const double length = sum - head * head + pivot * pivot, factor = length > 0 ? std::sqrt(2 / length) : 0.0;
    std::fill(v, v + first, 0.0f);
    for (Index j = first; j < n_; ++j) v[j] = static_cast<float>(v[j] * factor);
    v[first] = static_cast<float>(pivot * factor);
    return image;
  }

  // R rows of A - last w' - w last', from their diagonal block on, and what they and their mirror image add to the
  // product p with the next reflector.
  template <Index R>
  void update(Index i, const float* last, const float* w, const float* v, float* p) {
    float* x = row(i);
    Floats sum[R] = {};
    const Index block = i / kFloats * kFloats;
    for (Index j = block; j < stride_; j += kFloats) {
      const Floats last_j = at(last + j), w_j = at(w + j), v_j = at(v + j);
      Floats mirrored = {};
#pragma GCC unroll 8
      for (Index r = 0; r < R; ++r) {
        Floats& y = at(x + r * stride_ + j);
        y -= last[i + r] * w_j + w[i + r] * last_j;
        sum[r] += y * v_j;
        mirrored += y * v[i + r];
      }
      if (j > block) at(p + j) += mirrored;
    }
    for (Index r = 0; r < R; ++r) p[i + r] += total(sum[r]);
  }

  // Scales the tridiagonal matrix to a norm of 1, which is returned.
  double scale() {
    double norm = 0;
    off_[n_ - 1] = 0;
    for (Index i = 0; i < n_; ++i)
      norm = std::max(norm, std::fabs(diagonal_[i]) + std::fabs(off_[i]) + (i > 0 ? std::fabs(off_[i - 1]) : 0));
    for (Index i = 0; i < n_; ++i) {
      diagonal_[i] /= std::max(norm, 1e-300);
      off_[i] /= std::max(norm, 1e-300);
      if (std::fabs(off_[i]) < kTiny) off_[i] = kTiny;
      square_[i] = off_[i] * off_[i];
    }
    return norm;
  }

  // Eigenvalues n-m+first.. of the tridiagonal matrix, a panel of them, by halving intervals.
  void bisect(Index first) {
    constexpr Index kVectors = kPanel / kDoubles;
    Doubles low[kVectors], high[kVectors], middle[kVectors];
    Integers wanted[kVectors], below[kVectors];
    for (Index l = 0; l < kPanel; ++l) wanted[l / kDoubles][l % kDoubles] = n_ - m_ + std::min(first + l, m_ - 1);
    for (Index g = 0; g < kVectors; ++g) { low[g] = Doubles{} - 1.001; high[g] = Doubles{} + 1.001; }
    for (int step = 0; step < kHalvings; ++step) {
      for (Index g = 0; g < kVectors; ++g) middle[g] = 0.5 * (low[g] + high[g]);
      count_below(middle, below);
      for (Index g = 0; g < kVectors; ++g) {
        high[g] = below[g] > wanted[g] ? middle[g] : high[g];
        low[g] = below[g] > wanted[g] ? low[g] : middle[g];
      }
    }
    for (Index l = 0; l < kPanel; ++l) values_[first + l] = 0.5 * (low[l / kDoubles] + high[l / kDoubles])[l % kDoubles];
  }

  // How many eigenvalues lie below each x: changes of sign in the sequence of leading minors of T - x.
  void count_below(const Doubles* x, Integers* below) {
    constexpr Index kVectors = kPanel / kDoubles;
    Doubles before[kVectors], now[kVectors];
    for (Index g = 0; g < kVectors; ++g) {
      before[g] = Doubles{} + 1.0;
      now[g] = diagonal_[0] - x[g];
      below[g] = -((Integers)now[g] >> 63);
    }
    for (Index i = 1; i < n_; ++i) {
      for (Index g = 0; g < kVectors; ++g) {
        const Doubles next = (diagonal_[i] - x[g]) * now[g] - square_[i - 1] * before[g];
        below[g] -= ((Integers)next ^ (Integers)now[g]) >> 63;
        before[g] = now[g];
        now[g] = next;
      }
      if (i % kRescale != 0) continue;
      for (Index g = 0; g < kVectors; ++g) {
        const Doubles one = absolute(before[g]), other = absolute(now[g]), factor = 1.0 / (one > other ? one : other);
        before[g] *= factor;
        now[g] *= factor;
      }
    }
  }

  // Eigenvectors of the tridiagonal matrix, a vector of them: T - x factored from both ends, joined where |gamma| is least.
  void invert(Index first) {
    Doubles x, smallest = Doubles{} + 1e300, size = {};
    Integers twist = {};
    for (Index l = 0; l < kDoubles; ++l) x[l] = values_[first + l];
    Doubles pivot = diagonal_[0] - x;
    for (Index i = 0; i + 1 < n_; ++i) {
      ahead_[i] = pivot;
      lower_[i] = off_[i] / guarded(pivot);
      pivot = diagonal_[i + 1] - x - lower_[i] * off_[i];
    }
    ahead_[n_ - 1] = pivot;
    pivot = diagonal_[n_ - 1] - x;
    for (Index i = n_ - 1; i >= 0; --i) {
      const Doubles gamma = absolute(ahead_[i] + pivot - (diagonal_[i] - x));
      twist = gamma < smallest ? Integers{} + i : twist;
      smallest = gamma < smallest ? gamma : smallest;
      if (i == 0) break;
      upper_[i] = off_[i - 1] / guarded(pivot);
      pivot = diagonal_[i - 1] - x - upper_[i] * off_[i - 1];
    }
    Doubles z = {};
    const Doubles none = {}, one = none + 1.0;
    for (Index i = n_ - 1; i >= 0; --i) z_[i] = z = twist == i ? one : (i + 1 < n_ ? -lower_[i] * z : none);
    z = none;
    for (Index i = 0; i < n_; ++i) {
      z = twist == i ? one : (i > 0 ? -upper_[i] * z : none);
      z_[i] = twist == i ? one : z_[i] + z;
      size += z_[i] * z_[i];
    }
    for (Index l = 0; l < kDoubles; ++l) size[l] = 1 / std::sqrt(size[l]);
    float* out = panel(first / kPanel * kPanel) + first % kPanel;
    for (Index i = 0; i < n_; ++i) {
      const Doubles x = z_[i] * size, kept = absolute(x) < kNothing ? Doubles{} : x;
      *reinterpret_cast<HalfFloats*>(out + i * kPanel) = __builtin_convertvector(kept, HalfFloats);
    }
  }

  static Doubles guarded(Doubles pivot) { return absolute(pivot) < 1e-30 ? Doubles{} + 1e-30 : pivot; }

  // Q times the vectors: kReflectors reflections at a time, Y - V W, where V'Y gives W.
  void transform() {
    for (Index last = n_ - 2; last >= 0; last -= kReflectors) {
      const float* v[kReflectors];  // in the order in which they apply; zero up to `first`, and from n on
      for (Index r = 0; r < kReflectors; ++r) v[r] = last >= r ? row(last - r) : reinterpret_cast<float*>(zero_.data());
      const Index first = std::max(last - kReflectors + 2, Index{0});
      float products[kReflectors][kReflectors];
      for (Index r = 1; r < kReflectors; ++r)
        for (Index s = 0; s < r; ++s) {
          Floats sum = {};
          for (Index i = 0; i < stride_; i += kFloats) sum += at(v[r] + i) * at(v[s] + i);
          products[r][s] = total(sum);
        }
      for (Index j = 0; j < m_; j += kPanel) reflect_panel(v, products, first, panel(j));
    }
  }

  // Rows from `first` on of a panel of vectors; products: v'v of the reflectors.
  void reflect_panel(const float* const* v, const float (*products)[kReflectors], Index first, float* vectors) {
    Floats w[kReflectors][2] = {};
    for (Index i = first; i < n_; ++i) {
      const Floats y = at(vectors + i * kPanel), z = at(vectors + i * kPanel + kFloats);
#pragma GCC unroll 8
      for (Index r = 0; r < kReflectors; ++r) {
        w[r][0] += v[r][i] * y;
        w[r][1] += v[r][i] * z;
      }
    }
    for (Index r = 1; r < kReflectors; ++r)
      for (Index s = 0; s < r; ++s)
        for (Index half = 0; half < 2; ++half) w[r][half] -= products[r][s] * w[s][half];
    for (Index i = first; i < n_; ++i) {
      Floats &y = at(vectors + i * kPanel), &z = at(vectors + i * kPanel + kFloats);
#pragma GCC unroll 8
      for (Index r = 0; r < kReflectors; ++r) {
        y -= v[r][i] * w[r][0];
        z -= v[r][i] * w[r][1];
      }
    }
  }

  Index n_, m_, stride_;
  std::vector<Floats> matrix_, vectors_, w_, p_, zero_;
  std::vector<double> diagonal_, off_, square_;
  std::vector<Doubles> ahead_, lower_, upper_, z_;
  std::vector<double> values_;
};

}  // namespace

// matrices [count, n, n], symmetric -> vectors [count, n, m] and values [count, m] of the m largest, rising.
extern "C" void leading_eigenvectors(const float* matrices, int64_t count, int64_t n, int64_t m, float* vectors,
                                     float* values, int64_t threads) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    Decomposition decomposition(n, m);
    for (int64_t i = next++; i < count; i = next++)
      decomposition.solve(matrices + i * n * n, vectors + i * n * m, values + i * m);
  };
  std::vector<std::thread> pool;
  for (int64_t t = 1; t < std::min(threads, count); ++t) pool.emplace_back(work);
  work();
  for (auto& thread : pool) thread.join();
}
