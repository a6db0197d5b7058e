// A cache over all of its tiers, at work until something ends it: for tests that kill it.
#pragma once
#include <algorithm>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/device_memory.h"
#include "base/executor.h"
#include "base/rng.h"
#include "cache/kv_cache.h"
#include "integrations/torture/truth.h"
#include "transfer/rocksdb_store.h"

namespace prehoc {

// What a flush made durable: the first `chunks` chunks, in every layer, of a prompt that begins as `stream` does.
struct Acknowledged {
  int32_t variant = 0, stream = 0, chunks = 0;
};

inline std::string VariantName(int64_t variant) { return "v" + std::to_string(variant); }

inline SelectorOptions LifeSelector(SelectorKind kind) {
  SelectorOptions selector;
  selector.kind = kind;
  selector.budget.sinks = 4;
  selector.budget.local = 8;
  selector.budget.tokens = 48;
  if (kind == SelectorKind::kTwoClock) {
    for (const auto& [name, value] : {std::pair{"tc.theta", "0"}, {"tc.refresh", "2"}, {"tc.lag", "1"}}) selector.Set(name, value).IgnoreError();
  }
  return selector;
}

inline RocksDbStore::Options LifeStore(const std::string& path, rocksdb::Env* env) {
  RocksDbStore::Options options;
  options.path = path;
  options.identity.model_name = "crash";
  options.identity.layout = torture::TortureGeometry().LayoutName();
  options.chunk_bytes = torture::TortureGeometry().block_bytes();
  options.budget = 16 << 20;  // of a few dozen variants: segments are dropped all the time
  options.segment_bytes = 512 << 10;
  options.min_free_bytes = 0;
  options.env = env;
  return options;
}

// One cache from its opening to its end. For one thread; what it runs on has threads of its own.
class Life {
 public:
  struct Options {
    std::string path;
    rocksdb::Env* env = nullptr;
    bool direct_io = true;
    bool read_only = false;  // whoever only looks leaves the store as it found it
    SelectorKind selector = SelectorKind::kTwoClock;
    bool guard_store = true;
    int64_t host_blocks = 24;  // hold one of its sequences and a half
  };
  static Result<std::unique_ptr<Life>> Begin(const Options& options, const torture::Truth* truth) {
    std::unique_ptr<Life> life(new Life(truth));
    RocksDbStore::Options store = LifeStore(options.path, options.env);
    store.direct_io = options.direct_io;
    store.read_only = options.read_only;
    PREHOC_ASSIGN_OR_RETURN(life->store_, RocksDbStore::Open(store));
    PREHOC_ASSIGN_OR_RETURN(life->pool_, ThreadPool::Create({.loop_threads = 1, .job_threads = 2, .spin_iterations = 0}));
    CacheOptions cache;
    cache.geometry = torture::TortureGeometry();
    cache.host_budget = static_cast<uint64_t>(options.host_blocks) * cache.geometry.block_bytes();
    cache.huge_pages = false;
    cache.audit_every = 0;
    cache.selector = LifeSelector(options.selector);
    cache.codes.group_tokens = 16;
    cache.guard_store = options.guard_store;
    CacheResources resources;
    resources.executor = life->pool_.get();
    resources.device = &life->device_;
    resources.store = life->store_.get();
    PREHOC_ASSIGN_OR_RETURN(life->cache_, KvCache::Create(cache, resources));
    while (!life->cache_->Open({.max_tokens = torture::kMaxTokens, .device_bytes = life->device_bytes_}).ok()) {
      life->device_bytes_ += 1 << 10;
      if (life->device_bytes_ > life->device_.budget()) return Status(StatusCode::kOutOfSpace, "a sequence does not fit the device");
    }
    return life;
  }

  // A sequence that begins as `stream` does, up to `prompt` tokens and some steps, a piece at each call.
  class Run {
   public:
    static Result<std::unique_ptr<Run>> Open(Life* life, int32_t variant, int32_t stream, int64_t prompt, int64_t steps) {
      PREHOC_ASSIGN_OR_RETURN(auto sequence,
                              life->cache_->OpenWithPrefix({.max_tokens = torture::kMaxTokens, .device_bytes = life->device_bytes_, .variant = VariantName(variant)},
                                                           life->truth_->stream(stream).tokens(0, prompt)));
      std::unique_ptr<Run> run(new Run);
      run->life_ = life;
      run->sequence_ = std::move(sequence);
      run->variant_ = variant;
      run->stream_ = stream;
      run->prompt_ = prompt;
      run->steps_ = steps;
      life->restored_ += run->sequence_->restored();
      return run;
    }
    // kCorrupt if an output is not what it is where nothing was ever stored. After the steps the user asks again: chunks with rows of
    // both kinds.
    Status Step(int64_t piece) {
      const int64_t first = sequence_->length();
      const bool decode = first >= prompt_ && first < prompt_ + steps_;
      const int64_t end = first < prompt_ ? prompt_ : std::min(prompt_ + steps_ + 40, torture::kPrompts.back());
      const int64_t count = decode ? 1 : std::min(piece, end - first);
      PREHOC_RETURN_IF_ERROR(Try(count, decode ? 0 : end));
      const bool right = decode ? life_->truth_->StepIsRight(stream_, prompt_, first - prompt_, outputs_)
                                : life_->truth_->PrefillIsRight(stream_, first, count, outputs_);
      ++life_->outputs_;
      if (right) return {};
      return {StatusCode::kCorrupt, VariantName(variant_) + " stream " + std::to_string(stream_) + ", prompt of " + std::to_string(prompt_) + ", " +
                                        std::to_string(sequence_->restored()) + " restored: the output of " + std::to_string(count) + " tokens from " +
                                        std::to_string(first) + " is wrong"};
    }
    bool done() const {
      return sequence_->length() >= prompt_ + steps_ && sequence_->length() >= std::min(prompt_ + steps_ + 40, torture::kPrompts.back());
    }
    int64_t restored() const { return sequence_->restored(); }
    Acknowledged held() const {
      return {variant_, stream_, static_cast<int32_t>(std::min(sequence_->length(), prompt_) / torture::TortureGeometry().chunk_tokens)};
    }

   private:
    // The store drops old records, so that a chunk which only it had may be gone.
    Status Try(int64_t count, int64_t prompt) {
      Status status;
      for (int tries = 0; tries < 12; ++tries) {
        status = torture::RunTokens(*sequence_, life_->truth_->stream(stream_), count, prompt, &outputs_);
        if (status.code() != StatusCode::kNotFound) break;
        PREHOC_RETURN_IF_ERROR(torture::RepairLost(*sequence_, life_->truth_->stream(stream_), &life_->repaired_));
      }
      return status;
    }
    Life* life_ = nullptr;
    std::unique_ptr<Sequence> sequence_;
    int32_t variant_ = 0, stream_ = 0;
    int64_t prompt_ = 0, steps_ = 0;
    torture::Outputs outputs_;
  };

  // One piece of work, drawn at random. `*variant` grows as time goes by; `flushed` hears what a flush made durable.
  Status Work(Rng* rng, int32_t* variant, const std::function<void(const Acknowledged&)>& flushed) {
    if (rng->Chance(0.03)) {
      std::vector<Acknowledged> held;
      for (const auto& run : runs_) {
        if (run) held.push_back(run->held());
      }
      PREHOC_RETURN_IF_ERROR(cache_->Flush());
      for (const Acknowledged& now : held) flushed(now);
      return {};
    }
    std::unique_ptr<Run>& run = runs_[rng->Below(runs_.size())];
    if (!run) {
      *variant += rng->Chance(0.15);
      const auto of = static_cast<int32_t>(std::max<int64_t>(0, *variant - rng->Int(0, 2)));
      const int64_t prompt = torture::kPrompts[rng->Below(torture::kPrompts.size())];
      PREHOC_ASSIGN_OR_RETURN(run, Run::Open(this, of, static_cast<int32_t>(rng->Below(torture::kStreams)), prompt, rng->Int(0, torture::kMaxSteps)));
      return {};
    }
    if (run->done()) {
      run.reset();
      return {};
    }
    return run->Step(rng->Int(1, 80));
  }

  double Counter(std::string_view name) const {
    double found = -1;
    cache_->VisitCounters([&](std::string_view shown, double value) {
      if (shown == name) found = value;
    });
    return found;
  }
  RocksDbStore& store() { return *store_; }
  int64_t restored() const { return restored_; }
  int64_t outputs() const { return outputs_; }  // compared

 private:
  explicit Life(const torture::Truth* truth) : truth_(truth), device_(8 << 20), runs_(2) {}

  const torture::Truth* const truth_;
  HostDeviceMemory device_;
  uint64_t device_bytes_ = 8 << 10;
  std::unique_ptr<RocksDbStore> store_;
  std::unique_ptr<ThreadPool> pool_;
  std::unique_ptr<KvCache> cache_;
  std::vector<std::unique_ptr<Run>> runs_;
  int64_t restored_ = 0, outputs_ = 0;
  uint64_t repaired_ = 0;
};

}  // namespace prehoc
