// Products of several weight matrices with one set of rows, spread over an executor.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>

#include "base/executor.h"
#include "integrations/reference/engine/aligned_floats.h"
#include "integrations/reference/engine/kernel_table.h"
#include "integrations/reference/model.h"

namespace prehoc::reference {

// A non-owning reference to a callable `void(int64_t row, float* out)` that writes one row of an input.
class RowSource {
 public:
  template <class Fn>
    requires(!std::is_same_v<std::remove_cvref_t<Fn>, RowSource>)
  RowSource(const Fn& fn)  // NOLINT: implicit on purpose, so that lambdas pass
      : object_(&fn),
        call_([](const void* object, int64_t row, float* out) { (*static_cast<const Fn*>(object))(row, out); }) {}
  void operator()(int64_t row, float* out) const { call_(object_, row, out); }

 private:
  const void* object_;
  void (*call_)(const void*, int64_t, float*);
};

// out[row] = W input[row] + bias, for the input's rows from `first_row` on.
struct Product {
  const WeightMatrix* weights = nullptr;
  std::span<const float> bias;  // [weights.rows] or empty
  float* out = nullptr;         // [rows, stride], indexed by the row of the input
  int64_t stride = 0;           // [floats], at least weights.rows
  bool add = false;             // out += instead
  int64_t first_row = 0;        // rows before it may or may not be written
};

// How a set of rows meets the weights.
enum class ProductMode {
  kVector,  // one row times the weights as stored; fast for a single one
  kMatrix,  // weights expanded to fp32, panel by panel; an output has the same bits whatever rows stand beside it
};

// Holds the input of the products that follow, in the layout of the kernels. One user at a time.
class Products {
 public:
  // Inputs of up to max_rows x max_cols. `kernels` and `executor` outlive this.
  Products(const EngineKernels& kernels, Executor& executor, int64_t max_rows, int64_t max_cols);

  // Calls source(row, out[cols]) for every row, from the executor's threads. kVector requires rows == 1.
  void SetInput(ProductMode mode, int64_t rows, int64_t cols, RowSource source);
  // Runs all products in one loop. Requires weights.cols == cols of the input. No two may write the same place.
  void Run(std::span<const Product> products);

  size_t bytes() const;

 private:
  void RunVector(std::span<const Product> products);
  void RunMatrix(std::span<const Product> products);
  void RunPanel(const Product& product, int64_t first, float* panel);
  void ExpandPanel(const WeightMatrix& weights, int64_t first, int64_t count, int64_t k0, int64_t depth,
                   float* expanded, float* panel) const;
  void MultiplyPanel(const Product& product, int64_t first, int64_t count, int64_t k0, int64_t depth,
                     const float* panel) const;

  const EngineKernels& kernels_;
  Executor& executor_;
  const int64_t max_cols_;
  ProductMode mode_ = ProductMode::kVector;
  int64_t rows_ = 0, cols_ = 0;
  AlignedFloats packed_;                // kMatrix: [tiles, cols, tile_rows]; kVector: [cols]
  AlignedArray<int16_t> codes_;         // [max_cols]
  AlignedFloats scale_, sum_;           // [blocks], padded
  AlignedFloats scratch_;               // per thread: a panel, then a row of input or rows being expanded
  int64_t scratch_stride_ = 0;          // [floats]
};

}  // namespace prehoc::reference
