#include "integrations/reference/loader/random_model.h"

#include <openssl/evp.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <new>
#include <vector>

#include "base/executor.h"
#include "base/half.h"
#include "base/rng.h"
#include "integrations/reference/tokenizer/byte_alphabet.h"

namespace prehoc::reference {
namespace {

constexpr std::array<std::string_view, 5> kNames = {"llama-3.1-8b", "llama-2-7b", "mistral-7b", "qwen3-8b", "tiny"};

ModelConfig ConfigOf(std::string_view shape) {
  ModelConfig c;
  c.architecture = "llama";
  c.name = "random " + std::string(shape);
  c.layers = 32, c.heads = 32, c.kv_heads = 8, c.head_dim = 128, c.hidden = 4096, c.intermediate = 14336;
  if (shape == "llama-3.1-8b") {
    c.vocab = 128256, c.max_positions = 131072, c.rope_theta = 500000;
    c.rope_scaling.type = RopeScaling::Type::kLlama3;
    c.rope_scaling.factor = 8;
    c.rope_scaling.original_max_positions = 8192;
  } else if (shape == "llama-2-7b") {
    c.kv_heads = 32, c.intermediate = 11008, c.vocab = 32000, c.max_positions = 4096;
  } else if (shape == "mistral-7b") {
    c.architecture = "mistral";
    c.vocab = 32768, c.max_positions = 32768, c.rope_theta = 1000000;
  } else if (shape == "qwen3-8b") {
    c.architecture = "qwen3";
    c.layers = 36, c.intermediate = 12288, c.vocab = 151936, c.max_positions = 40960, c.rope_theta = 1000000, c.rms_eps = 1e-6f;
  } else {
    c.layers = 2, c.heads = 4, c.kv_heads = 2, c.head_dim = 64, c.hidden = 128, c.intermediate = 256, c.vocab = 300, c.max_positions = 8192;
  }
  return c;
}

// The normal deviate below which a share of `p` lies.
double Quantile(double p) {
  double low = -8, high = 8;
  for (int i = 0; i < 60; ++i) {
    const double mid = (low + high) / 2;
    (0.5 * std::erfc(-mid / std::sqrt(2.0)) < p ? low : high) = mid;
  }
  return low;
}

// One draw of 16 bits is one weight: a table of quantiles turns it into a normal number.
class WeightMaker {
 public:
  WeightMaker(uint64_t seed, Executor* executor) : seed_(seed), executor_(executor) {
    const size_t half = kSteps / 2;
    executor_->ParallelFor(kParts, [&](int64_t part) {
      for (size_t i = half / kParts * static_cast<size_t>(part); i < half / kParts * static_cast<size_t>(part + 1); ++i) {
        const double x = Quantile((static_cast<double>(i) + 0.5) / kSteps);
        deviates_[i] = static_cast<float>(x);
        deviates_[kSteps - 1 - i] = static_cast<float>(-x);
      }
    });
  }

  Result<WeightMatrix> Matrix(int64_t rows, int64_t cols, Model* model) {
    const auto width = static_cast<size_t>(cols);
    const auto size = static_cast<size_t>(rows) * width;
    const std::shared_ptr<Half[]> data(new (std::nothrow) Half[size]);  // touched first by who fills it
    if (!data) return {StatusCode::kOutOfSpace, "no memory for a matrix of " + std::to_string(size * sizeof(Half)) + " bytes"};
    std::vector<Half> table(kSteps);
    const float scale = 1 / std::sqrt(static_cast<float>(cols));
    std::transform(deviates_.begin(), deviates_.end(), table.begin(), [&](float x) { return FloatToHalf(x * scale); });
    const uint64_t matrix = ++matrices_;
    executor_->ParallelFor(rows, [&](int64_t r) {
      Half* const row = data.get() + static_cast<size_t>(r) * width;
      uint64_t state = Mix(Mix(seed_ + matrix * kGolden) + static_cast<uint64_t>(r) * kGolden);
      for (size_t c = 0; c < width; c += 4) {
        const uint64_t bits = Mix(state += kGolden);
        for (size_t i = 0; i < 4; ++i) row[c + i] = table[bits >> (16 * i) & (kSteps - 1)];
      }
    });
    model->owners.push_back(data);
    model->weight_bytes += size * sizeof(Half);
    return WeightMatrix{WeightType::kF16, rows, cols, reinterpret_cast<const std::byte*>(data.get()), width * sizeof(Half)};
  }

  std::vector<float> Norm(int32_t size) {
    Rng rng(Mix(seed_ + ++matrices_ * kGolden));
    std::vector<float> norm(static_cast<size_t>(size));
    for (float& x : norm) x = static_cast<float>(1 + 0.1 * rng.Normal());
    return norm;
  }

 private:
  static constexpr size_t kSteps = 65536;
  static constexpr int64_t kParts = 64;
  static constexpr uint64_t kGolden = 0x9e3779b97f4a7c15;
  // SplitMix64's finaliser.
  static uint64_t Mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return x ^ (x >> 31);
  }
  const uint64_t seed_;
  Executor* const executor_;
  std::vector<float> deviates_ = std::vector<float>(kSteps);
  uint64_t matrices_ = 0;
};

TokenizerSpec ByteTokenizer(int32_t vocab) {
  constexpr int32_t kBytes = 256;
  TokenizerSpec spec;
  spec.pre = PreTokenizer::kNone;
  for (int32_t id = 0; id < vocab; ++id) {
    const char byte = static_cast<char>(id);
    spec.tokens.push_back(id < kBytes ? PrintableOfBytes({&byte, 1}) : id == kBytes ? "<|end|>" : "<|unused_" + std::to_string(id) + "|>");
    spec.types.push_back(id < kBytes ? TokenType::kNormal : id == kBytes ? TokenType::kControl : TokenType::kUnused);
  }
  spec.eos_id = kBytes;
  spec.eog_ids = {kBytes};
  return spec;
}

Status NameIt(const RandomModelOptions& options, Model* model) {
  const std::string text = "prehoc random weights 1 " + options.shape + " " + std::to_string(options.seed);
  unsigned int length = 0;
  const bool done = EVP_Digest(text.data(), text.size(), model->fingerprint.data(), &length, EVP_sha256(), nullptr) == 1;
  return done && length == model->fingerprint.size() ? Status() : Status(StatusCode::kInvalid, "the crypto library refuses SHA-256");
}
}  // namespace

std::span<const std::string_view> RandomModelShapes() { return kNames; }

Result<std::shared_ptr<const Model>> MakeRandomModel(const RandomModelOptions& options) {
  if (std::find(kNames.begin(), kNames.end(), options.shape) == kNames.end()) {
    std::string known;
    for (const std::string_view name : kNames) known += (known.empty() ? "" : ", ") + std::string(name);
    return {StatusCode::kInvalid, "no shape is called \"" + options.shape + "\"; give one of " + known};
  }
  PREHOC_ASSIGN_OR_RETURN(auto executor, ThreadPool::Create({.spin_iterations = 0}));
  auto model = std::make_shared<Model>();
  const ModelConfig& c = model->config = ConfigOf(options.shape);
  model->tokenizer = ByteTokenizer(c.vocab);
  PREHOC_RETURN_IF_ERROR(NameIt(options, model.get()));
  WeightMaker make(options.seed, executor.get());
  const int64_t q_width = int64_t{c.heads} * c.head_dim, kv_width = int64_t{c.kv_heads} * c.head_dim;
  PREHOC_ASSIGN_OR_RETURN(model->embedding, make.Matrix(c.vocab, c.hidden, model.get()));
  PREHOC_ASSIGN_OR_RETURN(model->output, make.Matrix(c.vocab, c.hidden, model.get()));
  model->output_norm = make.Norm(c.hidden);
  for (int32_t l = 0; l < c.layers; ++l) {
    LayerWeights& w = model->layers.emplace_back();
    const struct {
      WeightMatrix* matrix;
      int64_t rows, cols;
    } matrices[] = {{&w.q, q_width, c.hidden}, {&w.k, kv_width, c.hidden}, {&w.v, kv_width, c.hidden}, {&w.o, c.hidden, q_width},
                    {&w.gate, c.intermediate, c.hidden}, {&w.up, c.intermediate, c.hidden}, {&w.down, c.hidden, c.intermediate}};
    for (const auto& m : matrices) {
      PREHOC_ASSIGN_OR_RETURN(*m.matrix, make.Matrix(m.rows, m.cols, model.get()));
    }
    w.attention_norm = make.Norm(c.hidden);
    w.ffn_norm = make.Norm(c.hidden);
    if (c.architecture == "qwen3") {
      w.q_norm = make.Norm(c.head_dim);
      w.k_norm = make.Norm(c.head_dim);
    }
    if (options.progress) options.progress(static_cast<double>(l + 1) / c.layers);
  }
  return std::shared_ptr<const Model>(std::move(model));
}

}  // namespace prehoc::reference
