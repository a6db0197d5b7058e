#include "integrations/reference/engine/products.h"

#include <algorithm>
#include <atomic>

#include "base/check.h"
#include "base/units.h"

namespace prehoc::reference {
namespace {

constexpr int64_t kPanelTiles = 2;    // tiles of weight rows that are expanded together
constexpr int64_t kPanelDepth = 768;  // columns expanded at once: whole blocks of every type; a panel stays in L2
constexpr int64_t kExpandDepth = 256;  // columns expanded at a time before they are transposed: they stay in L1
constexpr int64_t kExpandStride = kExpandDepth + 16;  // [floats]: rows 1 KiB apart would share few cache sets
constexpr int64_t kPiecesPerThread = 4;
constexpr int64_t kMinPieceRows = 16;

int64_t PaddedBlocks(int64_t cols) { return static_cast<int64_t>(RoundUp(static_cast<uint64_t>(CeilDiv(cols, 32)), 8)); }

// Calls body(i, slot) for all i < count; no two calls with the same slot run at once.
template <class Body>
void ForEachWithSlot(Executor& executor, int64_t count, const Body& body) {
  const int64_t slots = std::min<int64_t>(executor.concurrency(), count);
  std::atomic<int64_t> next{0};
  executor.ParallelFor(slots, [&](int64_t slot) {
    for (int64_t i = next.fetch_add(1, std::memory_order_relaxed); i < count;
         i = next.fetch_add(1, std::memory_order_relaxed)) {
      body(i, slot);
    }
  });
}

// Finds the product that part `index` belongs to, where a product has Parts(product) of them; `index` becomes the
// part within it.
template <class Parts>
const Product& Locate(std::span<const Product> products, int64_t& index, const Parts& parts) {
  size_t p = 0;
  for (; index >= parts(products[p]); ++p) index -= parts(products[p]);
  return products[p];
}

}  // namespace

Products::Products(const EngineKernels& kernels, Executor& executor, int64_t max_rows, int64_t max_cols)
    : kernels_(kernels), executor_(executor), max_cols_(max_cols) {
  const int64_t tiles = CeilDiv(max_rows, kernels.tile_rows);
  packed_ = AlignedFloats(tiles * kernels.tile_rows * max_cols);
  codes_ = AlignedArray<int16_t>(32 * PaddedBlocks(max_cols));
  scale_ = AlignedFloats(PaddedBlocks(max_cols));
  sum_ = AlignedFloats(PaddedBlocks(max_cols));
  const int64_t panel = kPanelTiles * kernels.tile_cols * kPanelDepth;
  const int64_t rest = std::max(max_cols, kernels.tile_cols * kExpandStride);
  scratch_stride_ = panel + static_cast<int64_t>(RoundUp(static_cast<uint64_t>(rest), 16));
  scratch_ = AlignedFloats(scratch_stride_ * executor.concurrency());
}

size_t Products::bytes() const {
  return packed_.bytes() + codes_.bytes() + scale_.bytes() + sum_.bytes() + scratch_.bytes();
}

void Products::SetInput(ProductMode mode, int64_t rows, int64_t cols, RowSource source) {
  PREHOC_DCHECK(cols <= max_cols_ && (mode == ProductMode::kMatrix || rows == 1));
  mode_ = mode;
  rows_ = rows;
  cols_ = cols;
  if (mode == ProductMode::kVector) {
    source(0, packed_.data());
    if (kernels_.quantize == nullptr || cols % 32 != 0) return;
    kernels_.quantize(packed_.data(), cols, codes_.data(), scale_.data(), sum_.data());
    std::fill(scale_.data() + cols / 32, scale_.data() + PaddedBlocks(cols), 0.0f);
    std::fill(sum_.data() + cols / 32, sum_.data() + PaddedBlocks(cols), 0.0f);
    return;
  }
  const int64_t tile_rows = kernels_.tile_rows;
  ForEachWithSlot(executor_, CeilDiv(rows, tile_rows), [&](int64_t tile, int64_t slot) {
    float* row = scratch_.data() + slot * scratch_stride_;
    float* packed = packed_.data() + tile * tile_rows * cols;
    for (int64_t r = 0; r < tile_rows; ++r) {
      if (tile * tile_rows + r < rows) {
        source(tile * tile_rows + r, row);
      } else {
        std::fill(row, row + cols, 0.0f);
      }
      for (int64_t k = 0; k < cols; ++k) packed[k * tile_rows + r] = row[k];
    }
  });
}

void Products::Run(std::span<const Product> products) {
  for (const Product& product : products) PREHOC_DCHECK(product.weights->cols == cols_);
  if (mode_ == ProductMode::kVector) {
    RunVector(products);
  } else {
    RunMatrix(products);
  }
}

void Products::RunVector(std::span<const Product> products) {
  const Activation x{packed_.data(), codes_.data(), scale_.data(), sum_.data()};
  int64_t total = 0;
  for (const Product& product : products) total += product.weights->rows;
  const int64_t piece = std::max(kMinPieceRows, CeilDiv(total, kPiecesPerThread * executor_.concurrency()));
  const auto pieces_of = [&](const Product& p) { return CeilDiv(p.weights->rows, piece); };
  int64_t pieces = 0;
  for (const Product& product : products) pieces += pieces_of(product);

  executor_.ParallelFor(pieces, [&](int64_t index) {
    const Product& product = Locate(products, index, pieces_of);
    const WeightMatrix& w = *product.weights;
    const int64_t end = std::min(w.rows, (index + 1) * piece);
    constexpr int64_t kStretch = 64;
    for (int64_t r = index * piece; r < end; r += kStretch) {
      const int64_t n = std::min(kStretch, end - r);
      float y[kStretch];
      kernels_.dot_rows[static_cast<size_t>(w.type)](w.row(r), w.row_bytes, n, cols_, x, y);
      float* out = product.out + r;
      if (!product.bias.empty()) {
        for (int64_t i = 0; i < n; ++i) y[i] += product.bias[static_cast<size_t>(r + i)];
      }
      for (int64_t i = 0; i < n; ++i) out[i] = product.add ? out[i] + y[i] : y[i];
    }
  });
}

void Products::RunMatrix(std::span<const Product> products) {
  const int64_t panel_rows = kPanelTiles * kernels_.tile_cols;
  const auto panels_of = [&](const Product& p) { return CeilDiv(p.weights->rows, panel_rows); };
  int64_t panels = 0;
  for (const Product& product : products) panels += panels_of(product);
  ForEachWithSlot(executor_, panels, [&](int64_t index, int64_t slot) {
    const Product& product = Locate(products, index, panels_of);
    RunPanel(product, index * panel_rows, scratch_.data() + slot * scratch_stride_);
  });
}

void Products::RunPanel(const Product& product, int64_t first, float* panel) {
  const int64_t panel_rows = kPanelTiles * kernels_.tile_cols;
  const int64_t count = std::min(panel_rows, product.weights->rows - first);
  float* expanded = panel + panel_rows * kPanelDepth;
  for (int64_t k0 = 0; k0 < cols_; k0 += kPanelDepth) {
    const int64_t depth = std::min(kPanelDepth, cols_ - k0);
    ExpandPanel(*product.weights, first, count, k0, depth, expanded, panel);
    MultiplyPanel(product, first, count, k0, depth, panel);
  }
  if (product.bias.empty()) return;
  for (int64_t row = product.first_row; row < rows_; ++row) {
    float* out = product.out + row * product.stride + first;
    for (int64_t j = 0; j < count; ++j) out[j] += product.bias[static_cast<size_t>(first + j)];
  }
}

// Weight rows [first, first + count), columns [k0, k0 + depth) -> panel [tiles, depth, tile_cols].
void Products::ExpandPanel(const WeightMatrix& weights, int64_t first, int64_t count, int64_t k0, int64_t depth,
                           float* expanded, float* panel) const {
  const int64_t tile_cols = kernels_.tile_cols;
  for (int64_t j0 = 0; j0 < count; j0 += tile_cols, panel += depth * tile_cols) {
    const int64_t rows = std::min(tile_cols, count - j0);
    if (rows < tile_cols) std::fill(expanded, expanded + tile_cols * kExpandStride, 0.0f);
    for (int64_t k = 0; k < depth; k += kExpandDepth) {
      // Exact: every stretch starts at a whole number of blocks.
      const size_t offset = weights.row_bytes * static_cast<size_t>(k0 + k) / static_cast<size_t>(weights.cols);
      const int64_t n = std::min(kExpandDepth, depth - k);
      for (int64_t j = 0; j < rows; ++j) {
        DequantizeRow(weights.type, weights.row(first + j0 + j) + offset, n, expanded + j * kExpandStride);
      }
      kernels_.transpose(expanded, kExpandStride, n, panel + k * tile_cols);
    }
  }
}

void Products::MultiplyPanel(const Product& product, int64_t first, int64_t count, int64_t k0, int64_t depth,
                             const float* panel) const {
  const int64_t tile_rows = kernels_.tile_rows, tile_cols = kernels_.tile_cols;
  const bool accumulate = product.add || k0 > 0;
  for (int64_t tile = product.first_row / tile_rows; tile * tile_rows < rows_; ++tile) {
    const float* x = packed_.data() + tile * tile_rows * cols_ + k0 * tile_rows;
    const auto rows = static_cast<int32_t>(std::min(tile_rows, rows_ - tile * tile_rows));
    for (int64_t j = 0; j < count; j += tile_cols) {
      float* out = product.out + tile * tile_rows * product.stride + first + j;
      if (j + tile_cols <= count) {
        kernels_.tile(depth, rows, x, panel + j * depth, out, product.stride, accumulate);
        continue;
      }
      // The last columns of a matrix: through a tile of our own, so that nothing beyond them is touched.
      alignas(64) float sums[kMaxTileRows * kMaxTileCols];
      kernels_.tile(depth, rows, x, panel + j * depth, sums, tile_cols, false);
      for (int32_t r = 0; r < rows; ++r) {
        for (int64_t i = 0; i < count - j; ++i) {
          float& to = out[r * product.stride + i];
          to = accumulate ? to + sums[r * tile_cols + i] : sums[r * tile_cols + i];
        }
      }
    }
  }
}

}  // namespace prehoc::reference
