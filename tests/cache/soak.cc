// Sequences opened, used and closed, over and over, with memory that must not grow.
//   soak SEQUENCES SEED    exit code 1 if resident memory grew by more than 1 MiB after the first tenth, or a rule broke
// Prompts share prefixes, so chunks are found, restored, evicted and written all the time; some sequences end within a step,
// some after an error. Budgets hold a few sequences.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "base/rng.h"
#include "cache/kv_cache.h"
#include "transfer/memory_chunk_store.h"

namespace prehoc {
namespace {

constexpr int64_t kMost = 96;  // tokens of a sequence
constexpr int64_t kGrowth = 1 << 20;

KvGeometry Geometry() {
  KvGeometry geometry;
  geometry.layers = 2;
  geometry.heads = 2;
  geometry.kv_heads = 1;
  geometry.head_dim = 16;
  geometry.chunk_tokens = 16;
  return geometry;
}

int64_t ResidentBytes() {
  std::FILE* file = std::fopen("/proc/self/statm", "r");
  if (file == nullptr) return 0;
  long size = 0, resident = 0;
  const int read = std::fscanf(file, "%ld %ld", &size, &resident);
  std::fclose(file);
  return read == 2 ? resident * ::sysconf(_SC_PAGESIZE) : 0;
}

class Soak {
 public:
  explicit Soak(uint64_t seed) : rng_(seed), device_(512 << 10) {
    for (float& x : numbers_) x = static_cast<float>(rng_.Normal());
    executor_ = ThreadPool::Create({.loop_threads = 1, .job_threads = 1, .spin_iterations = 0}).value();
    MemoryChunkStore::Options store;
    store.chunk_bytes = Geometry().block_bytes();
    store.identity.layout = Geometry().LayoutName();
    store.budget = 200 * (store.chunk_bytes + 128);
    store_ = MemoryChunkStore::Create(store).value();
    options_.geometry = Geometry();
    options_.host_budget = 64 * Geometry().block_bytes();
    options_.huge_pages = false;
    options_.selector.budget.sinks = 2;
    options_.selector.budget.local = 4;
    options_.selector.budget.tokens = 16;
    options_.codes.group_tokens = 16;
    cache_ = KvCache::Create(options_, {.executor = executor_.get(), .device = &device_, .store = store_.get()}).value();
  }

  // False, and says why, where something is as it must not be.
  bool RunOne() {
    const int64_t prompt = rng_.Int(1, 64);
    std::vector<int32_t> tokens(static_cast<size_t>(prompt));
    const int64_t family = rng_.Int(0, 199);
    for (int64_t i = 0; i < prompt; ++i) tokens[static_cast<size_t>(i)] = static_cast<int32_t>(i < 48 ? family : rng_.Int(0, 9));
    // One in a hundred asks for more than there is.
    const uint64_t bytes = rng_.Chance(0.01) ? 64 : 128 << 10;
    auto opened = cache_->OpenWithPrefix({.max_tokens = kMost, .device_bytes = bytes}, tokens);
    ++opens_;
    if (!opened.ok()) return bytes == 64 || Wrong("open", opened.status());
    Sequence& sequence = **opened;
    restored_ += sequence.restored();
    if (Status status = Prompt(sequence, tokens); !status.ok()) return Lost(status) || Wrong("prompt", status);
    for (int64_t steps = rng_.Int(0, 3); steps > 0; --steps) {
      if (Status status = Step(sequence); !status.ok()) return Lost(status) || Wrong("step", status);
    }
    return true;
  }

  bool Check(int64_t done) {
    executor_->Drain();
    int64_t tails = -1;
    bool within = true;
    double budget = 0;
    cache_->VisitCounters([&](std::string_view name, double value) {
      if (name == "host.tails") tails = static_cast<int64_t>(value);
      if (name.ends_with(".budget_bytes") || name == "host.capacity_bytes") budget = value;
      if (name == "device.peak_bytes") within &= value <= budget;
    });
    if (tails != 0 || device_.used() != 0 || device_.peak() > device_.budget() || !within) {
      std::fprintf(stderr, "soak: after %lld sequences %lld tails and %zu device bytes are left\n", static_cast<long long>(done),
                   static_cast<long long>(tails), device_.used());
      return false;
    }
    return true;
  }
  int64_t restored() const { return restored_; }
  int64_t lost() const { return lost_; }

 private:
  // The store is small: it may evict a chunk that nobody else has, in whose place an engine would compute it anew (Sequence::BeginRepair).
  bool Lost(const Status& status) {
    const bool lost = status.code() == StatusCode::kNotFound;
    lost_ += lost;
    return lost;
  }
  static bool Wrong(const char* what, const Status& status) {
    std::fprintf(stderr, "soak: %s: %s\n", what, status.ToString().c_str());
    return false;
  }

  LayerInput Input(int32_t layer, int64_t first) {
    // The same for the same token of the same layer: it does not matter here what prompts say.
    const size_t at = static_cast<size_t>(layer * 977 + first * 31) % 1000;
    LayerInput input;
    input.q = input.q_pre_rope = numbers_.data() + at;
    input.k = numbers_.data() + at + 100;
    input.v = numbers_.data() + at + 200;
    input.out = out_.data();
    return input;
  }

  Status Prompt(Sequence& sequence, const std::vector<int32_t>& tokens) {
    const int64_t first = sequence.length();
    PREHOC_RETURN_IF_ERROR(sequence.Begin(std::span(tokens).subspan(static_cast<size_t>(first)), static_cast<int64_t>(tokens.size())));
    const bool cut = rng_.Chance(0.05);
    for (int32_t l = 0; l < Geometry().layers; ++l) {
      if (cut && l == 1) {
        if (rng_.Chance(0.5)) return {};  // the sequence ends within the call
        sequence.Rollback();
        return Prompt(sequence, tokens);
      }
      PREHOC_RETURN_IF_ERROR(sequence.Prefill(LayerId(l), Input(l, first)));
    }
    return sequence.End();
  }

  Status Step(Sequence& sequence) {
    const int32_t token = 7;
    Status status = sequence.Begin({&token, 1}, 0);
    if (!status.ok()) return status.code() == StatusCode::kInvalid ? Status() : status;  // its prompt was left open
    for (int32_t l = 0; l < Geometry().layers; ++l) PREHOC_RETURN_IF_ERROR(sequence.Attend(LayerId(l), Input(l, sequence.length())));
    return sequence.End();
  }

  Rng rng_;
  std::vector<float> numbers_ = std::vector<float>(64 * 64 + 2000), out_ = std::vector<float>(64 * 64);
  HostDeviceMemory device_;
  std::unique_ptr<ThreadPool> executor_;
  std::unique_ptr<MemoryChunkStore> store_;
  CacheOptions options_;
  std::unique_ptr<KvCache> cache_;
  int64_t opens_ = 0, restored_ = 0, lost_ = 0;
};

int Main(int64_t sequences, uint64_t seed) {
  Soak soak(seed);
  const int64_t tenth = std::max<int64_t>(1, sequences / 10);
  int64_t settled = 0, most = 0;
  for (int64_t done = 1; done <= sequences; ++done) {
    if (!soak.RunOne()) return 1;
    if (done % tenth != 0) continue;
    if (!soak.Check(done)) return 1;
    const int64_t resident = ResidentBytes();
    if (settled == 0) settled = resident;
    most = std::max(most, resident);
    std::printf("%10lld sequences, %lld tokens restored, %lld KiB resident\n", static_cast<long long>(done),
                static_cast<long long>(soak.restored()), static_cast<long long>(resident / 1024));
    std::fflush(stdout);
  }
  if (soak.restored() == 0) {
    std::fprintf(stderr, "soak: nothing was ever restored\n");
    return 1;
  }
  if (soak.lost() > sequences / 100) {
    std::fprintf(stderr, "soak: %lld sequences lost a chunk\n", static_cast<long long>(soak.lost()));
    return 1;
  }
  if (most - settled > kGrowth) {
    std::fprintf(stderr, "soak: resident memory grew by %lld KiB\n", static_cast<long long>((most - settled) / 1024));
    return 1;
  }
  return 0;
}

}  // namespace
}  // namespace prehoc

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  return prehoc::Main(std::atoll(argv[1]), std::strtoull(argv[2], nullptr, 10));
}
