// One model through one cache: executor, tiers, engine and sequence, opened in the right order and closed in the other.
#pragma once
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>

#include "base/device_memory.h"
#include "base/executor.h"
#include "base/result.h"
#include "cache/kv_cache.h"
#include "integrations/cli/device_side.h"
#include "integrations/cli/generate.h"
#include "integrations/reference/engine/engine.h"
#include "integrations/reference/model.h"
#include "transfer/chunk_store.h"

namespace prehoc::cli {

// Prefill goes in pieces of this many tokens: a multiple of the cache's chunk, short enough for Ctrl-C to be answered soon. A GPU has more
// multiprocessors than a short piece has work, and every piece reads the rows before it over the link: with 2,048 tokens that takes longer than the layers.
inline constexpr int64_t kPieceTokens = 512, kGpuPieceTokens = 8192;

struct SessionOptions {
  SelectorOptions selector;
  CodeFormat codes;
  RowFormat rows = RowFormat::kF16;
  uint64_t device_budget = 0, host_budget = 0;  // [bytes]
  std::string store;            // directory, or empty
  uint64_t store_budget = 0;
  int64_t store_deadline_ms = 0;  // 0 = none
  std::string tenant;
  int64_t audit_every = 64;
  int64_t max_tokens = 0;       // prompt and answer
  int64_t prompt_tokens = 0;
  const KernelTable* kernels = nullptr;
  bool cuda = false;            // `kernels` is not looked at then
  PromptPrecision prompt_precision = PromptPrecision::kSplit;  // with `cuda`
  int threads = 0;
  bool persist_decode = true;
  int64_t device_slots = 0;     // SequenceOptions::device_slots
  Tracer* tracer = nullptr;     // CacheResources::tracer
  AuditObserver* observer = nullptr;  // then the engine keeps queries before RoPE, too
};

KvGeometry GeometryOf(const reference::ModelConfig& config, RowFormat rows = RowFormat::kF16);

class Session {
 public:
  // kInvalid: a budget that is too small, named as the flag that sets it. Anything else is a runtime error that names
  // what it is about: the store's directory, the model.
  static Result<std::unique_ptr<Session>> Create(std::shared_ptr<const reference::Model> model, const SessionOptions& options);
  ~Session();

  // Opens a sequence with as much of `prompt` as the tiers hold; one that was open is closed.
  Status Open(std::span<const int32_t> prompt);

  // Runs tokens on the open sequence; pieces that a tier lost are computed again on the way.
  Forward forward();
  bool is_open() const { return sequence_ != nullptr; }
  Sequence& sequence() const { return *sequence_; }
  reference::Engine& engine() { return *engine_; }

  // Waits until what was written behind is in the store. An error leaves the answer as it is.
  Status Flush();
  std::map<std::string, double> Counters() const;
  std::string_view kernels_name() const { return cache_->kernels().name; }
  int threads() const { return executor_->concurrency(); }
  int64_t piece_tokens() const { return options_.cuda ? kGpuPieceTokens : kPieceTokens; }

 private:
  Session(std::shared_ptr<const reference::Model> model, const SessionOptions& options);
  Status OpenStore();
  Status CreateEngine();
  Status CreateCache();

  const std::shared_ptr<const reference::Model> model_;
  const SessionOptions options_;
  const KvGeometry geometry_;
  std::unique_ptr<HostRegistrar> registrar_;  // outlives the executors, whose jobs touch and pin memory
  std::unique_ptr<ThreadPool> executor_;
  std::unique_ptr<ThreadPool> io_;  // threads that mostly wait for the disk
  DeviceSide device_;
  std::unique_ptr<ChunkStore> store_;
  std::unique_ptr<reference::Engine> engine_;
  std::unique_ptr<KvCache> cache_;
  std::unique_ptr<Sequence> sequence_;
};

}  // namespace prehoc::cli
