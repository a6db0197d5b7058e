// What does a prompt cost in the product, and a step after it? Engine and cache as the command `prehoc` has them, random weights, random tokens.
//
//   prompt_bench --out=FILE.json [--commit=ID] [--random-weights=llama-3.1-8b] [--prefill=16384] [--chunk=8192] [--runs=off,tc,dense]
//                [--steps=32] [--device-budget=4GiB] [--dense-budget=24GiB] [--host-budget=24GiB] [--threads=0] [--set=KNOB=VALUE,...]
//                [--precision=fp32|half]
//
// off:    layers and attention alone: K and V stay on the device, nothing goes to the host, nothing is indexed.
// tc:     two clocks within --device-budget, rows to the host tier behind the layers, then --steps tokens of decode.
// dense:  the selector that attends to everything, all rows on the device (--dense-budget) and in the host tier.
// Every run is one prompt, from the first token to the choice of the next, and a warm one of two pieces before it. The host tier is pinned as
// it fills, as in the product, and then stays so: a cache's prompt runs twice, first_prefill_seconds is of the time that pinned (with a
// --host-budget of little more than one prompt the second takes the blocks of the first). Random weights make attention flat: what a
// step chooses says nothing about a model, only what it costs.
#include <algorithm>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "base/cuda/device_memory.h"
#include "base/cuda/host_registrar.h"
#include "base/rng.h"
#include "base/units.h"
#include "bench/gpu/support.h"
#include "integrations/reference/cache_backend.h"
#include "integrations/reference/cuda/cuda_decoder.h"
#include "integrations/reference/engine/engine.h"
#include "integrations/reference/loader/random_model.h"
#include "kernels/cuda/device_kernels.h"
#include "kernels/cuda/kernel_table.h"
#include "kernels/cuda/run_kernels.h"
#include "transfer/cuda_transfer_engine.h"

namespace prehoc {
namespace {

// K and V in one array a layer on the device, read there; for prompts only.
class DeviceBackend final : public reference::AttentionBackend {
 public:
  DeviceBackend(const reference::ModelConfig& config, int64_t tokens, PromptPrecision precision)
      : config_(config), tokens_(tokens), precision_(precision), stream_(OrExit(CudaStream::Create())), layers_(OrExit(CudaEvent::Create())),
        tasks_(OrExit(CudaBytes::Create(CudaPlace::kPinned, size_t(config.kv_heads) * kTaskBytes))) {
    for (int32_t l = 0; l < config.layers; ++l) rows_.emplace_back(size_t(config.kv_heads) * size_t(tokens) * Row());
  }
  int64_t length() const override { return length_; }
  Status Begin(std::span<const int32_t> tokens, int64_t) override {
    added_ = static_cast<int64_t>(tokens.size());
    return length_ + added_ <= tokens_ ? Status() : Status(StatusCode::kOutOfSpace, "more tokens than the arrays hold");
  }
  bool takes_device_memory() const override { return true; }
  reference::FreezeRule Freeze(int32_t) const override { return {}; }
  Status Attend(const reference::AttendCall& call) override {
    const int32_t d = config_.head_dim, group = config_.heads / config_.kv_heads;
    // Kernels read the tasks where they are: nothing waits for a copy of them.
    auto* const append = reinterpret_cast<cuda::RunAppendTask*>(tasks_.data());
    auto* const attend = reinterpret_cast<cuda::RunPrefillTask*>(append + config_.kv_heads);
    for (int32_t h = 0; h < config_.kv_heads; ++h) {
      Half* const rows = rows_[size_t(call.layer)].data() + size_t(h) * size_t(tokens_) * Row();
      append[h] = {call.k + h * d, call.v + h * d, int64_t{config_.kv_heads} * d, rows + size_t(call.first) * Row(), int32_t(call.count)};
      attend[h] = {.q = call.q + h * group * d, .q_stride = int64_t{config_.heads} * d, .out = call.out + h * group * d,
                   .out_stride = int64_t{config_.heads} * d, .rows = rows};
    }
    PREHOC_RETURN_IF_ERROR(layers_.Record(static_cast<cudaStream_t>(call.stream)));
    PREHOC_RETURN_IF_ERROR(layers_.Before(stream_.get()));
    PREHOC_RETURN_IF_ERROR(cuda::AppendRuns(append, config_.kv_heads, int32_t(call.count), d, stream_.get()));
    PREHOC_RETURN_IF_ERROR(cuda::PrefillRuns({.tasks = attend, .num_tasks = config_.kv_heads, .queries = int32_t(call.count),
                                              .first = int32_t(call.first), .group = group, .head_dim = d, .rows = rows_[size_t(call.layer)].data(),
                                              .pitch = tokens_ * int64_t(Row()), .precision = precision_}, stream_.get()));
    return stream_.Synchronize();
  }
  Status End() override {
    length_ += added_;
    return {};
  }
  void Rollback() override {}

 private:
  size_t Row() const { return 2 * size_t(config_.head_dim); }
  const reference::ModelConfig& config_;
  const int64_t tokens_;
  const PromptPrecision precision_;
  CudaStream stream_;
  CudaEvent layers_;
  std::vector<Array<Half>> rows_;
  static constexpr size_t kTaskBytes = sizeof(cuda::RunAppendTask) + sizeof(cuda::RunPrefillTask);
  CudaBytes tasks_;  // of the layer that is at work
  int64_t length_ = 0, added_ = 0;
};

struct Settings {
  int64_t prefill = 0, chunk = 0, steps = 0;
  PromptPrecision precision = PromptPrecision::kSplit;
  uint64_t device_budget = 0, dense_budget = 0, host_budget = 0;
  std::vector<std::string> knobs;
};

class PromptBench {
 public:
  PromptBench(const std::string& shape, const Settings& settings, int threads) : settings_(settings) {
    executor_ = OrExit(ThreadPool::Create({.loop_threads = threads}));
    double start = Seconds();
    model_ = OrExit(reference::MakeRandomModel({.shape = shape}));
    model_seconds_ = Seconds() - start;
    start = Seconds();
    reference::EngineOptions options{.executor = executor_.get(), .max_batch_tokens = int32_t(settings.chunk)};
    options.max_tokens = settings.prefill + settings.steps + 8;
    options.make_decoder = reference::MakeCudaDecoder;
    options.prompt_precision = settings.precision;
    engine_ = OrExit(reference::Engine::Create(model_, options));
    engine_seconds_ = Seconds() - start;
    Rng rng(7);
    for (int64_t t = 0; t < options.max_tokens; ++t) tokens_.push_back(int32_t(rng.Below(uint64_t(model_->config.vocab))));
    logits_.resize(size_t(model_->config.vocab));
    std::printf("weights made in %.1f s, engine in %.1f s, %.2f GB of weights on the host\n", model_seconds_, engine_seconds_,
                double(model_->weight_bytes) / 1e9);
  }
  Json Describe() const {
    return {{"model", model_->config.name}, {"weight_bytes", model_->weight_bytes}, {"weights_seconds", model_seconds_},
            {"engine_seconds", engine_seconds_}, {"engine_scratch_bytes", engine_->scratch_bytes()}};
  }

  Json Run(const std::string& name) {
    Json row{{"name", name}, {"prompt", settings_.prefill}, {"chunk", settings_.chunk}, {"precision", PromptPrecisionName(settings_.precision)}};
    const size_t before = DriverBytes();
    if (name == "off") {
      for (const bool warm : {true, false}) {
        DeviceBackend backend(model_->config, settings_.prefill, settings_.precision);
        Prompt(backend, warm, &row);
        row["device_bytes"] = DriverBytes() - before;
      }
    } else {
      RunCache(name, before, &row);
    }
    std::printf("%-6s prompt of %lld: %.3f s, %.0f tokens/s", name.c_str(), static_cast<long long>(settings_.prefill),
                row["prefill_seconds"].get<double>(), row["tokens_per_second"].get<double>());
    if (row.contains("decode_ms")) std::printf("; step %.3f ms", row["decode_ms"].get<double>());
    if (row.contains("first_prefill_seconds")) std::printf("; first time %.3f s", row["first_prefill_seconds"].get<double>());
    std::printf("\n");
    std::fflush(stdout);
    return row;
  }

 private:
  // The first two pieces, or all of it.
  void Prompt(reference::AttentionBackend& backend, bool warm, Json* row) {
    const int64_t tokens = warm ? std::min(2 * settings_.chunk, settings_.prefill) : settings_.prefill;
    const reference::EngineSeconds from = engine_->seconds();
    const double start = Seconds();
    OrExit(engine_->Forward(backend, std::span(tokens_).first(size_t(tokens)), tokens, logits_));
    const double seconds = Seconds() - start;
    if (warm) return;
    const reference::EngineSeconds& to = engine_->seconds();
    (*row)["prefill_seconds"] = seconds;
    (*row)["tokens_per_second"] = double(tokens) / seconds;
    (*row)["seconds"] = {{"embedding", to.embedding - from.embedding}, {"projections", to.projections - from.projections},
                         {"attention", to.attention - from.attention}, {"logits", to.logits - from.logits}};
    if (!std::all_of(logits_.begin(), logits_.end(), [](float x) { return std::isfinite(x); })) Fail({StatusCode::kCorrupt, "a logit is not finite"});
    (*row)["last_logits"] = {logits_[0], logits_[1], logits_[2]};  // runs of one prompt agree
  }

  void RunCache(const std::string& name, size_t before, Json* row) {
    CacheOptions options;
    const reference::ModelConfig& config = model_->config;
    options.geometry = {.layers = config.layers, .heads = config.heads, .kv_heads = config.kv_heads, .head_dim = config.head_dim};
    options.selector.kind = OrExit(ParseSelectorKind(name));
    if (name == "tc") {
      for (const std::string& knob : settings_.knobs) {
        const size_t equals = knob.find('=');
        OrExit(options.selector.Set(knob.substr(0, equals), knob.substr(equals + 1)));
      }
    }
    options.host_budget = settings_.host_budget;
    options.model = model_->fingerprint;
    options.audit_every = 0;
    CudaHostRegistrar registrar;
    CudaDeviceMemory memory(name == "dense" ? settings_.dense_budget : settings_.device_budget);
    const auto kernels = OrExit(cuda::DeviceKernels::Create(&memory, {.prompt_precision = settings_.precision}));
    const auto transfer = OrExit(CudaTransferEngine::Create());
    const auto cache = OrExit(KvCache::Create(options, {.executor = executor_.get(), .device = &memory, .kernels = &cuda::DeviceKernels::Table(),
                                                        .stream = kernels->launch_stream(), .registrar = &registrar, .transfer = transfer.get(),
                                                        .step_kernels = &cuda::DeviceStepKernels()}));
    const std::vector<std::string> turns{"warm", "first", "second"};
    for (const std::string& turn : turns) {
      // Keys of one turn are nothing to another: no block is found again.
      const auto sequence = OrExit(cache->Open({.max_tokens = settings_.prefill + settings_.steps + 8, .variant = turn}));
      reference::CacheBackend backend(sequence.get());
      Prompt(backend, turn == "warm", row);
      if (turn == "first") (*row)["first_prefill_seconds"] = (*row)["prefill_seconds"], (*row)["first_seconds"] = (*row)["seconds"];
      if (turn != turns.back()) continue;
      std::vector<double> ms;
      for (int64_t s = 0; s < settings_.steps; ++s) {
        const double start = Seconds();
        OrExit(engine_->Forward(backend, std::span(tokens_).subspan(size_t(settings_.prefill + s), 1), 0, logits_));
        ms.push_back((Seconds() - start) * 1e3);
      }
      if (!ms.empty()) {
        const Spread spread = SpreadOf(ms);
        (*row)["decode_ms"] = spread.median, (*row)["decode_ms_least"] = spread.least, (*row)["decode_ms_most"] = spread.most;
      }
      Json counters;
      const auto visit = [&](std::string_view key, double value) { counters[std::string(key)] = value; };
      cache->VisitCounters(visit);
      kernels->VisitCounters(visit);
      sequence->Report().VisitCounters(visit);
      (*row)["device_bytes"] = DriverBytes() - before;  // rows, index and scratch
      (*row)["selector"] = options.selector.Describe();
      (*row)["counters"] = counters;
    }
  }

  const Settings settings_;
  std::unique_ptr<ThreadPool> executor_;
  std::shared_ptr<const reference::Model> model_;
  std::unique_ptr<reference::Engine> engine_;
  std::vector<int32_t> tokens_;
  std::vector<float> logits_;
  double model_seconds_ = 0, engine_seconds_ = 0;
};

int Main(int argc, char** argv) {
  Flags flags("prompt_bench", argc, argv);
  const std::string out = flags.Text("out", ""), commit = flags.Text("commit", "");
  const std::string shape = flags.Text("random-weights", "llama-3.1-8b");
  const auto size = [&](const char* name, const char* otherwise) { return OrExit(ParseBytes(flags.Text(name, otherwise))); };
  Settings settings;
  settings.prefill = flags.Int("prefill", 16384), settings.chunk = flags.Int("chunk", 8192), settings.steps = flags.Int("steps", 32);
  settings.device_budget = size("device-budget", "4GiB"), settings.dense_budget = size("dense-budget", "24GiB");
  settings.host_budget = size("host-budget", "24GiB");
  settings.precision = PrecisionOf(flags);
  settings.knobs = Split(flags.Text("set", "budget=2048"), ',');
  const std::vector<std::string> runs = Split(flags.Text("runs", "off,tc,dense"), ',');
  const int threads = flags.Int("threads", 0);
  flags.Finish();
  Json json = Header("prompt", flags, commit);
  PromptBench bench(shape, settings, threads);
  json["set-up"] = bench.Describe();
  for (const std::string& run : runs) json["rows"].push_back(bench.Run(run));
  WriteJson(json, out);
  return 0;
}

}  // namespace
}  // namespace prehoc

int main(int argc, char** argv) { return prehoc::Main(argc, argv); }
