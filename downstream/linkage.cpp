// Average linkage (UPGMA) of many images at once by nearest-neighbour chains, over full distance matrices.
//
// The chains are exact because average linkage is reducible: merging two clusters that are each other's nearest never
// brings them closer to a third. F. Murtagh, "A survey of recent advances in hierarchical clustering algorithms", The
// Computer Journal 26(4), 1983; D. Muellner, arXiv 1109.2378.
//
// What the textbook algorithm spends its time on is writing the *column* of each new cluster: one cache line and one
// page per row for 4 bytes. Here new clusters take new columns at the end of the rows, and columns are written sixteen
// at a time, a whole cache line per row. Rows are searched by whole vectors, distances computed in register tiles, in
// double; they are kept in float, since reading and writing them is all that the rest of the algorithm does.
//
// Plain C interface without the interpreter's headers, called through ctypes (downstream/linkage.py).

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <numeric>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace {

using Index = int64_t;
constexpr float kFar = 1e30f;    // the distance of a cluster to itself, and to columns that stand for no cluster
constexpr Index kTile = 8;       // tokens whose distances are computed together: a vector of doubles
constexpr Index kLine = 16;      // floats in a cache line: columns written at a time
constexpr Index kBlock = 64;     // distances compared at a time: four vectors of AVX-512
constexpr Index kPanel = 64;     // tokens that stay in the second cache while all others pass by

Index round_up(Index value, Index multiple) { return (value + multiple - 1) / multiple * multiple; }

using Vector = double __attribute__((vector_size(kTile * sizeof(double)), aligned(8)));
using Column = float __attribute__((vector_size(kTile * sizeof(float)), aligned(4)));  // of a tile

// Inner products of a tile of tokens [channels, kTile] with two others. Written with vectors, since compilers do not
// find the 16 accumulators by themselves. Every pair is summed in the same order: equal tokens lie at exactly 0.
void products(const double* rows, const double* first, const double* second, Index channels,
              double out[kTile][2 * kTile]) {
  Vector low[kTile] = {}, high[kTile] = {};
  for (Index c = 0; c < channels; ++c, rows += kTile, first += kTile, second += kTile) {
    const Vector one = *reinterpret_cast<const Vector*>(first), two = *reinterpret_cast<const Vector*>(second);
#pragma GCC unroll 8
    for (Index i = 0; i < kTile; ++i) {
      low[i] += one * rows[i];
      high[i] += two * rows[i];
    }
  }
  for (Index i = 0; i < kTile; ++i) {
    *reinterpret_cast<Vector*>(out[i]) = low[i];
    *reinterpret_cast<Vector*>(out[i] + kTile) = high[i];
  }
}

struct Merge {
  Index first, second;  // a leaf of each of the two clusters
  double height;
};

// The clusters of one image. A cluster is a column of the matrix and a row somewhere in it.
class Clusters {
 public:
  explicit Clusters(Index tokens)
      : tokens_(tokens), stride_(round_up(tokens + tokens / 4 + 2 * kBlock, kLine) + kLine) {
    const size_t bytes = round_up(tokens_ * stride_ * sizeof(float), 1 << 21);
    matrix_ = static_cast<float*>(std::aligned_alloc(1 << 21, bytes));
#ifdef __linux__
    madvise(matrix_, bytes, MADV_HUGEPAGE);
#endif
    row_.resize(stride_);
    size_.resize(stride_);
    leaf_.resize(stride_);
    dead_.resize(stride_ + kBlock);
  }
  ~Clusters() { std::free(matrix_); }
  Clusters(const Clusters&) = delete;

  // features [tokens, channels] -> tokens - 1 merges, in no order.
  const std::vector<Merge>& link(const float* features, Index channels) {
    start(features, channels);
    std::vector<Index> chain;
    Index first = 0;
    for (live_ = tokens_; live_ > 1; --live_) {
      if (columns_ + kLine > stride_ - kLine || (2 * live_ < columns_ && live_ > kBlock)) {
        compact(chain);
        first = 0;
      }
      if (chain.empty()) {
        while (dead_[first] != 0) ++first;
        chain.push_back(first);
      }
      for (;;) {
        const Index before = chain.size() > 1 ? chain[chain.size() - 2] : -1;
        const Index next = nearest(chain.back(), before);
        if (next == before) break;
        chain.push_back(next);
      }
      const Index a = chain.back(), b = chain[chain.size() - 2];
      chain.resize(chain.size() - 2);
      merge(a, b);
    }
    return merges_;
  }

 private:
  float* row(Index cluster) { return matrix_ + row_[cluster] * stride_; }
  float distance(Index a, Index b) { return b < columns_ ? row(a)[b] : row(b)[a]; }

  // Euclidean distances of features [tokens, channels]. Tiles of 8 x 16 pairs stay in registers; each is written to
  // its place and, transposed, to the mirrored one.
  void start(const float* features, Index channels) {
    const Index n = tokens_, tile = channels * kTile;
    std::vector<double> mean(channels);  // tokens are centred: smaller norms, less cancellation in the distances
    for (Index t = 0; t < n; ++t)
      for (Index c = 0; c < channels; ++c) mean[c] += features[t * channels + c];
    for (double& value : mean) value /= n;
    std::vector<double> packed(round_up(n, 2 * kTile) * channels);  // [tiles, channels, kTile]
    for (Index t = 0; t < n; ++t)
      for (Index c = 0; c < channels; ++c)
        packed[t / kTile * tile + c * kTile + t % kTile] = features[t * channels + c] - mean[c];
    std::vector<double> norm(round_up(n, 2 * kTile));
    double pairs[kTile][2 * kTile];
    float near[kTile][2 * kTile];
    for (Index t = 0; t < n; t += kTile) {
      const double* own = packed.data() + t / kTile * tile;
      products(own, own, own, channels, pairs);
      for (Index i = 0; i < kTile; ++i) norm[t + i] = pairs[i][i];
    }
    for (Index panel = 0; panel < n; panel += kPanel)
      for (Index i0 = 0; i0 < std::min(panel + kPanel, n); i0 += kTile)
        for (Index j0 = std::max(panel, i0 / (2 * kTile) * 2 * kTile); j0 < std::min(panel + kPanel, n); j0 += 2 * kTile) {
          const double* columns = packed.data() + j0 / kTile * tile;
          products(packed.data() + i0 / kTile * tile, columns, columns + tile, channels, pairs);
          for (Index i = 0; i < kTile; ++i)
            for (Index j = 0; j < 2 * kTile; ++j)
              near[i][j] = std::sqrt(float(std::max(norm[i0 + i] + norm[j0 + j] - 2 * pairs[i][j], 0.0)));
          for (Index i = 0; i < std::min(kTile, n - i0); ++i)
            std::copy(near[i], near[i] + 2 * kTile, matrix_ + (i0 + i) * stride_ + j0);
          for (Index j = 0; j < std::min(2 * kTile, n - j0); ++j)
            *reinterpret_cast<Column*>(matrix_ + (j0 + j) * stride_ + i0) =
                Column{near[0][j], near[1][j], near[2][j], near[3][j], near[4][j], near[5][j], near[6][j], near[7][j]};
        }
    columns_ = next_ = round_up(n, kLine);
    for (Index i = 0; i < n; ++i) {
      float* own = matrix_ + i * stride_;
      own[i] = kFar;
      std::fill(own + n, own + columns_, kFar);
      row_[i] = leaf_[i] = i;
      size_[i] = 1;
    }
    std::fill(dead_.begin(), dead_.end(), kFar);
    std::fill(dead_.begin(), dead_.begin() + n, 0.0f);
    merges_.clear();
  }

  // The nearest cluster to i; of equals `prefer` if it is among them, else the first column.
  Index nearest(Index i, Index prefer) {
    const float *own = row(i), *off = dead_.data();
    float best = kFar;
    Index block = 0, j = 0;
    for (; j + kBlock <= columns_; j += kBlock) {
      float low = kFar;
      for (Index lane = 0; lane < kBlock; ++lane) low = std::min(low, own[j + lane] + off[j + lane]);
      if (low < best) { best = low; block = j; }
    }
    for (; j < columns_; ++j)
      if (own[j] + off[j] < best) { best = own[j] + off[j]; block = j; }
    Index pending = -1;
    for (Index p = columns_; p < next_; ++p)
      if (dead_[p] == 0 && row(p)[i] < best) { best = row(p)[i]; pending = p; }
    if (prefer >= 0 && distance(i, prefer) <= best) return prefer;
    if (pending >= 0) return pending;
    while (own[block] + off[block] > best) ++block;
    return block;
  }

  // Join a and b into a new cluster (Lance-Williams), whose row takes the place of a's.
  void merge(Index a, Index b) {
    merges_.push_back({leaf_[a], leaf_[b], distance(a, b)});
    const Index made = next_++;
    size_[made] = size_[a] + size_[b];
    leaf_[made] = leaf_[a];
    const float share_a = size_[a] / size_[made], share_b = size_[b] / size_[made];
    dead_[a] = dead_[b] = kFar;
    float to_pending[kLine];  // before row a is overwritten; columns of dead clusters must hold numbers, too
    for (Index p = columns_; p < made; ++p)
      to_pending[p - columns_] = dead_[p] == 0 ? share_a * row(p)[a] + share_b * row(p)[b] : kFar;
    float* joined = row(a);
    const float* other = row(b);
    for (Index k = 0; k < columns_; ++k) joined[k] = share_a * joined[k] + share_b * other[k];
    row_[made] = row_[a];
    for (Index p = columns_; p < made; ++p) {
      joined[p] = to_pending[p - columns_];
      if (dead_[p] == 0) row(p)[made] = joined[p];
    }
    joined[made] = kFar;
    dead_[made] = 0;
    if (next_ == columns_ + kLine) flush();
  }

  // Write the pending columns into the rows of all clusters, a cache line a row.
  void flush() {
    const float* source[kLine];
    for (Index p = 0; p < kLine; ++p) source[p] = dead_[columns_ + p] == 0 ? row(columns_ + p) : nullptr;
    for (Index k = 0; k < columns_; ++k) {
      if (dead_[k] != 0) continue;
      float* out = row(k) + columns_;
      for (Index p = 0; p < kLine; ++p) out[p] = source[p] != nullptr ? source[p][k] : kFar;
    }
    columns_ = next_;
  }

  // Close the gaps that dead columns leave.
  void compact(std::vector<Index>& chain) {
    std::vector<Index> keep, place(next_, -1);
    for (Index k = 0; k < next_; ++k)
      if (dead_[k] == 0) { place[k] = keep.size(); keep.push_back(k); }
    const Index n = keep.size(), width = round_up(n, kLine);
    for (Index k = columns_; k < next_; ++k)
      for (Index i = 0; i < columns_; ++i)
        if (dead_[k] == 0 && dead_[i] == 0) row(i)[k] = row(k)[i];
    for (Index k = 0; k < n; ++k) {
      float* own = row(keep[k]);
      for (Index j = 0; j < n; ++j) own[j] = own[keep[j]];
      std::fill(own + n, own + width, kFar);
    }
    for (Index k = 0; k < n; ++k) {
      row_[k] = row_[keep[k]];
      size_[k] = size_[keep[k]];
      leaf_[k] = leaf_[keep[k]];
    }
    std::fill(dead_.begin(), dead_.end(), kFar);
    std::fill(dead_.begin(), dead_.begin() + n, 0.0f);
    for (Index& cluster : chain) cluster = place[cluster];
    columns_ = next_ = width;
  }

  Index tokens_, stride_, live_ = 0;
  Index columns_ = 0, next_ = 0;  // columns written in all rows; columns given out
  float* matrix_;
  std::vector<Index> row_, leaf_;      // by cluster: its row, one of its leaves
  std::vector<float> size_, dead_;    // by cluster: tokens in it; 0 for a cluster, kFar for none
  std::vector<Merge> merges_;
};

Index root(std::vector<Index>& parent, Index leaf) {
  while (parent[leaf] != leaf) leaf = parent[leaf] = parent[parent[leaf]];
  return leaf;
}

// Merges in rising order of height, numbered as SciPy does: leaves 0..n-1, merge m makes cluster n + m.
void number(std::vector<Merge> merges, Index tokens, int32_t* children, double* heights) {
  std::vector<Index> parent(tokens), name(tokens);
  std::iota(parent.begin(), parent.end(), 0);
  std::iota(name.begin(), name.end(), 0);
  std::stable_sort(merges.begin(), merges.end(), [](const Merge& p, const Merge& q) { return p.height < q.height; });
  for (Index m = 0; m < tokens - 1; ++m) {
    const Index a = root(parent, merges[m].first), b = root(parent, merges[m].second);
    children[2 * m] = static_cast<int32_t>(std::min(name[a], name[b]));
    children[2 * m + 1] = static_cast<int32_t>(std::max(name[a], name[b]));
    heights[m] = merges[m].height;
    parent[b] = a;
    name[a] = tokens + m;
  }
}

}  // namespace

// features [images, tokens, channels] -> children [images, tokens - 1, 2], heights [images, tokens - 1].
extern "C" void average_linkage(const float* features, int64_t images, int64_t tokens, int64_t channels,
                                int32_t* children, double* heights, int64_t threads) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    Clusters clusters(tokens);
    for (int64_t i = next++; i < images; i = next++)
      number(clusters.link(features + i * tokens * channels, channels), tokens, children + i * (tokens - 1) * 2,
             heights + i * (tokens - 1));
  };
  std::vector<std::thread> pool;
  for (int64_t t = 1; t < std::min(threads, images); ++t) pool.emplace_back(work);
  work();
  for (auto& thread : pool) thread.join();
}
