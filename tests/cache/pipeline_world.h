// A cache with small tiers and a model's K, V and queries made up from one seed, for tests of the pipeline.
#pragma once
#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <vector>

#include "base/clock.h"
#include "base/device_memory.h"
#include "base/executor.h"
#include "base/half.h"
#include "base/rng.h"
#include "cache/kv_cache.h"
#include "kernels/row_codec.h"
#include "tests/support/status_matchers.h"
#include "transfer/memory_chunk_store.h"

namespace prehoc {

inline KvGeometry SmallGeometry() {
  KvGeometry geometry;
  geometry.layers = 3;
  geometry.heads = 4;
  geometry.kv_heads = 2;
  geometry.head_dim = 16;
  geometry.chunk_tokens = 64;
  return geometry;
}

// K, V and queries of every token, the same for every run with this seed. Keys are heavy-tailed with a strong first
// token; queries drift from step to step and now and then jump, so that gates hold at some steps and fail at others.
class Stream {
 public:
  Stream(const KvGeometry& geometry, int64_t tokens, uint64_t seed) : geometry_(geometry), tokens_(tokens) {
    Rng rng(seed);
    const auto kv = static_cast<size_t>(geometry.kv_heads * geometry.head_dim);
    const auto all = static_cast<size_t>(geometry.heads * geometry.head_dim);
    for (int64_t t = 0; t < tokens; ++t) ids_.push_back(static_cast<int32_t>(rng.Int(0, 999)));
    for (int32_t l = 0; l < geometry.layers; ++l) {
      std::vector<float> k, v, q, current(all);
      for (float& x : current) x = static_cast<float>(rng.Normal());
      for (int64_t t = 0; t < tokens; ++t) {
        const double scale = t == 0 ? 2.5 : (rng.Chance(0.1) ? 2 : 0.7);
        for (size_t i = 0; i < kv; ++i) k.push_back(Round(scale * rng.Normal()));
        for (size_t i = 0; i < kv; ++i) v.push_back(Round(rng.Normal()));
        const double turn = rng.Chance(0.2) ? 1.0 : 0.25;
        for (float& x : current) x = static_cast<float>(x * std::sqrt(1 - turn * turn) + 1.0 * turn * rng.Normal());
        q.insert(q.end(), current.begin(), current.end());
      }
      k_.push_back(std::move(k));
      v_.push_back(std::move(v));
      q_.push_back(std::move(q));
    }
  }
  // One channel of every key of token `t`.
  void SetKeys(int64_t t, float value) {
    for (std::vector<float>& k : k_) {
      for (int32_t h = 0; h < geometry_.kv_heads; ++h) k[static_cast<size_t>((t * geometry_.kv_heads + h) * geometry_.head_dim)] = value;
    }
  }
  // Small queries attend to everything alike.
  void ScaleQueries(float by) {
    for (std::vector<float>& q : q_) {
      for (float& x : q) x *= by;
    }
  }
  // K and V become what rows of `format` hold of them.
  void RoundTo(RowFormat format) {
    const auto dim = static_cast<size_t>(geometry_.head_dim);
    std::vector<Half> row(2 * dim);
    std::vector<std::byte> stored(RowBytes(format, geometry_.head_dim));
    for (size_t l = 0; l < k_.size(); ++l) {
      for (size_t at = 0; at < k_[l].size(); at += dim) {
        float* const k = k_[l].data() + at;
        float* const v = v_[l].data() + at;
        for (size_t c = 0; c < dim; ++c) row[c] = FloatToHalf(k[c]), row[dim + c] = FloatToHalf(v[c]);
        NarrowRow(row.data(), format, geometry_.head_dim, stored.data());
        WidenRow(stored.data(), format, geometry_.head_dim, row.data());
        for (size_t c = 0; c < dim; ++c) k[c] = HalfToFloat(row[c]), v[c] = HalfToFloat(row[dim + c]);
      }
    }
  }
  int64_t tokens() const { return tokens_; }
  std::span<const int32_t> ids(int64_t first, int64_t count) const {
    return std::span(ids_).subspan(static_cast<size_t>(first), static_cast<size_t>(count));
  }
  const float* k(int32_t layer, int64_t t) const { return k_[static_cast<size_t>(layer)].data() + t * geometry_.kv_heads * geometry_.head_dim; }
  const float* v(int32_t layer, int64_t t) const { return v_[static_cast<size_t>(layer)].data() + t * geometry_.kv_heads * geometry_.head_dim; }
  const float* q(int32_t layer, int64_t t) const { return q_[static_cast<size_t>(layer)].data() + t * geometry_.heads * geometry_.head_dim; }
  const float* key(int32_t layer, int64_t t, int32_t kv_head) const { return k(layer, t) + kv_head * geometry_.head_dim; }
  const float* value(int32_t layer, int64_t t, int32_t kv_head) const { return v(layer, t) + kv_head * geometry_.head_dim; }
  const KvGeometry& geometry() const { return geometry_; }

 private:
  static float Round(double x) { return HalfToFloat(FloatToHalf(static_cast<float>(x))); }  // as it will be stored
  const KvGeometry geometry_;
  const int64_t tokens_;
  std::vector<int32_t> ids_;
  std::vector<std::vector<float>> k_, v_, q_;
};

struct WorldOptions {
  CacheOptions cache;
  uint64_t device_budget = 64 << 20;
  uint64_t store_budget = 64 << 20;
  bool with_store = true;
  const step::StepKernels* step_kernels = nullptr;
  const KernelTable* kernels = nullptr;
  static WorldOptions Default() {
    WorldOptions options;
    options.cache.geometry = SmallGeometry();
    options.cache.host_budget = 32 << 20;
    options.cache.huge_pages = false;
    options.cache.audit_every = 1;
    options.cache.selector.budget.sinks = 4;
    options.cache.selector.budget.local = 8;
    options.cache.selector.budget.tokens = 32;
    options.cache.codes.group_tokens = 16;
    return options;
  }
};

class World {
 public:
  explicit World(const WorldOptions& options, ChunkStore* other_store = nullptr, DeviceMemory* other_device = nullptr)
      : device_(options.device_budget) {
    executor_ = ThreadPool::Create({.loop_threads = 2, .job_threads = 1, .spin_iterations = 100}).value();
    MemoryChunkStore::Options store;
    store.chunk_bytes = options.cache.geometry.block_bytes();
    store.identity.layout = options.cache.geometry.LayoutName();
    store.identity.dtype = RowFormatName(options.cache.geometry.rows);
    store.budget = options.store_budget;
    store_ = MemoryChunkStore::Create(store).value();
    ChunkStore* used = other_store ? other_store : store_.get();
    CacheResources resources;
    resources.executor = executor_.get();
    resources.device = other_device ? other_device : &device_;
    resources.store = options.with_store ? used : nullptr;
    resources.step_kernels = options.step_kernels;
    resources.kernels = options.kernels;
    auto cache = KvCache::Create(options.cache, resources);
    EXPECT_TRUE(cache.ok()) << cache.status();
    cache_ = std::move(cache).value();
  }
  KvCache& cache() { return *cache_; }
  DeviceMemory& device() { return device_; }
  MemoryChunkStore& store() { return *store_; }
  double Counter(std::string_view name) const {
    double found = -1;
    cache_->VisitCounters([&](std::string_view shown, double value) {
      if (shown == name) found = value;
    });
    return found;
  }

 private:
  HostDeviceMemory device_;
  std::unique_ptr<Executor> executor_;
  std::unique_ptr<MemoryChunkStore> store_;
  std::unique_ptr<KvCache> cache_;
};

// The least device budget [bytes] that a sequence opens with, to 512 bytes.
inline uint64_t SmallestDevice(const WorldOptions& options, int64_t max_tokens) {
  World world(options);
  for (uint64_t bytes = 4096;; bytes += 512) {
    if (world.cache().Open({.max_tokens = max_tokens, .device_bytes = bytes}).ok()) return bytes;
  }
}

// Outputs of all layers for tokens [first, first + count): [layers][count * heads * head_dim].
using Outputs = std::vector<std::vector<float>>;

inline Status RunLayers(Sequence& sequence, const Stream& stream, int64_t first, int64_t count, bool decode, Outputs* out,
                        int32_t layers = -1) {
  const KvGeometry& geometry = stream.geometry();
  out->assign(static_cast<size_t>(geometry.layers),
              std::vector<float>(static_cast<size_t>(count * geometry.heads * geometry.head_dim), -99.0f));
  for (int32_t l = 0; l < (layers < 0 ? geometry.layers : layers); ++l) {
    LayerInput input;
    input.q = stream.q(l, first);
    input.q_pre_rope = stream.q(l, first);
    input.k = stream.k(l, first);
    input.v = stream.v(l, first);
    input.out = (*out)[static_cast<size_t>(l)].data();
    PREHOC_RETURN_IF_ERROR(decode ? sequence.Attend(LayerId(l), input) : sequence.Prefill(LayerId(l), input));
  }
  return {};
}

inline Status PrefillPiece(Sequence& sequence, const Stream& stream, int64_t count, int64_t prompt, Outputs* out) {
  const int64_t first = sequence.length();
  PREHOC_RETURN_IF_ERROR(sequence.Begin(stream.ids(first, count), prompt));
  Status status = RunLayers(sequence, stream, first, count, false, out);
  if (status.ok()) status = sequence.End();
  if (!status.ok()) sequence.Rollback();
  return status;
}

inline Status PrefillAll(Sequence& sequence, const Stream& stream, int64_t prompt, int64_t piece) {
  Outputs out;
  while (sequence.length() < prompt) {
    PREHOC_RETURN_IF_ERROR(PrefillPiece(sequence, stream, std::min(piece, prompt - sequence.length()), prompt, &out));
  }
  return {};
}

inline Status DecodeOne(Sequence& sequence, const Stream& stream, Outputs* out) {
  const int64_t first = sequence.length();
  PREHOC_RETURN_IF_ERROR(sequence.Begin(stream.ids(first, 1), 0));
  Status status = RunLayers(sequence, stream, first, 1, true, out);
  if (status.ok()) status = sequence.End();
  if (!status.ok()) sequence.Rollback();
  return status;
}

// Decodes `steps` tokens and returns all their outputs, layer after layer.
inline std::vector<float> Decode(Sequence& sequence, const Stream& stream, int64_t steps) {
  std::vector<float> all;
  for (int64_t i = 0; i < steps; ++i) {
    Outputs out;
    EXPECT_OK(DecodeOne(sequence, stream, &out));
    for (const auto& layer : out) all.insert(all.end(), layer.begin(), layer.end());
  }
  return all;
}

inline std::unique_ptr<Sequence> Open(World& world, int64_t max_tokens) {
  auto opened = world.cache().Open({.max_tokens = max_tokens});
  EXPECT_TRUE(opened.ok()) << opened.status();
  return std::move(opened).value();
}

// Exact attention of one query head over `positions`, in fp64.
inline std::vector<double> NaiveAttention(const Stream& stream, int32_t layer, int64_t t, int32_t head,
                                          std::span<const int32_t> positions) {
  const KvGeometry& geometry = stream.geometry();
  const int32_t kv_head = head / geometry.group();
  const float* q = stream.q(layer, t) + head * geometry.head_dim;
  std::vector<double> z;
  double most = -1e300;
  for (const int32_t i : positions) {
    double dot = 0;
    for (int32_t c = 0; c < geometry.head_dim; ++c) dot += static_cast<double>(q[c]) * stream.key(layer, i, kv_head)[c];
    z.push_back(dot / std::sqrt(static_cast<double>(geometry.head_dim)));
    most = std::max(most, z.back());
  }
  std::vector<double> out(static_cast<size_t>(geometry.head_dim), 0.0);
  double sum = 0;
  for (size_t i = 0; i < z.size(); ++i) {
    const double weight = std::exp(z[i] - most);
    sum += weight;
    for (size_t c = 0; c < out.size(); ++c) out[c] += weight * stream.value(layer, positions[i], kv_head)[c];
  }
  for (double& x : out) x /= sum;
  return out;
}

}  // namespace prehoc
