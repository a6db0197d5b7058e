#include "integrations/cli/session.h"

#include <string_view>
#include <utility>

#include "base/units.h"
#include "integrations/cli/exit_code.h"
#include "integrations/reference/cache_backend.h"
#include "transfer/rocksdb_store.h"

namespace prehoc::cli {
namespace {

// The store takes one record per layer and chunk.
RocksDbStore::Options StoreOptions(const SessionOptions& options, const KvGeometry& geometry, const reference::Model& model) {
  RocksDbStore::Options result;
  result.path = options.store;
  result.budget = options.store_budget;
  result.chunk_bytes = geometry.block_bytes();
  result.identity.model = model.fingerprint;
  result.identity.model_name = model.config.name;
  result.identity.dtype = RowFormatName(geometry.rows);
  result.identity.layout = geometry.LayoutName();
  return result;
}

// With RoPE scaling that depends on the prompt's length, equal tokens have other keys; they must not meet.
std::string Variant(const SessionOptions& options, const reference::Engine& engine) {
  const int64_t variant = engine.RopeVariant(options.prompt_tokens);
  std::string text = variant == 0 ? std::string() : std::string("rope=").append(std::to_string(variant)).append(";");
  if (options.prompt_precision == PromptPrecision::kHalf) text += "half;";  // other K and V: no prefix of theirs stands for these
  return text;
}

std::string WithSize(const char* flag, uint64_t bytes) {
  return std::string(flag) + " " + FormatBytes(static_cast<double>(bytes));
}

// The libraries say what to do in terms of their options; people have flags.
Status InFlagWords(const Status& status) {
  constexpr std::pair<std::string_view, std::string_view> kWords[] = {
      {"open it with read_only", "give a directory that can be written to"},
      {" (min_free_bytes); free some, or lower it", "; free some"},
      {"raise the host budget", "give more with --host-budget, or a disk tier with --store and --store-budget"},
  };
  std::string message = status.message();
  for (const auto& [from, to] : kWords) {
    const size_t at = message.find(from);
    if (at != std::string::npos) message.replace(at, from.size(), to);
  }
  return status.ok() ? status : Status(status.code(), std::move(message));
}

Status StoreError(const Status& status, const std::string& directory) {
  const std::string own = "store " + directory + ": ";
  const Status told = InFlagWords(status);
  const bool named = told.message().starts_with(own);
  return RuntimeError(named ? Status(told.code(), told.message().substr(own.size())) : told, "--store " + directory);
}

// The facade names its options.
Status CreateError(const Status& status, const SessionOptions& options) {
  const std::string host = WithSize("--host-budget", options.host_budget);
  if (status.code() == StatusCode::kUnsupported) return UsageError("--device cuda: " + status.message() + ", or --device cpu");
  if (status.code() != StatusCode::kInvalid) return status.WithContext(host);
  if (status.message().find("host_budget") != std::string::npos) return UsageError(host + ": " + status.message());
  if (status.message().find("codes") != std::string::npos) return UsageError("--codes: " + status.message());
  return status;
}

Status OpenError(const Status& status, const SessionOptions& options) {
  if (status.code() != StatusCode::kOutOfSpace) return RuntimeError(status, "");
  const bool host = status.message().find("host budget") != std::string::npos;
  const std::string flag = host ? WithSize("--host-budget", options.host_budget) : WithSize("--device-budget", options.device_budget);
  return UsageError(flag + ": " + status.message());
}

}  // namespace

KvGeometry GeometryOf(const reference::ModelConfig& config, RowFormat rows) {
  KvGeometry geometry;
  geometry.rows = rows;
  geometry.layers = config.layers;
  geometry.heads = config.heads;
  geometry.kv_heads = config.kv_heads;
  geometry.head_dim = config.head_dim;
  return geometry;
}

Session::Session(std::shared_ptr<const reference::Model> model, const SessionOptions& options)
    : model_(std::move(model)), options_(options), geometry_(GeometryOf(model_->config, options.rows)) {}

Session::~Session() = default;

Result<std::unique_ptr<Session>> Session::Create(std::shared_ptr<const reference::Model> model, const SessionOptions& options) {
  std::unique_ptr<Session> session(new Session(std::move(model), options));
  const Status geometry = session->geometry_.Validate();
  if (!geometry.ok()) return RuntimeError(geometry, "--model");
  auto executor = ThreadPool::Create({.loop_threads = options.threads});
  if (!executor.ok()) return RuntimeError(executor.status(), "--threads");
  session->executor_ = std::move(executor).value();
  // A disk serves several requests at once, and whoever waits for one takes no CPU.
  constexpr int kIoThreadsPerCpu = 3;
  const int io_threads = kIoThreadsPerCpu * session->executor_->concurrency();
  auto io = ThreadPool::Create({.loop_threads = io_threads, .job_threads = io_threads, .spin_iterations = 0});
  if (!io.ok()) return RuntimeError(io.status(), "--threads");
  session->io_ = std::move(io).value();
  if (options.prompt_precision != PromptPrecision::kSplit && !options.cuda) {
    return UsageError("--prompt-precision half: the CPU computes in fp32; leave it out, or give --device cuda");
  }
  if (options.cuda) {
    auto side = CudaSide(options.device_budget, options.prompt_precision);
    if (!side.ok()) return RuntimeError(side.status(), "--device cuda");
    session->device_ = std::move(side).value();
    session->registrar_ = std::move(session->device_.registrar);
  } else {
    session->device_ = CpuSide(options.device_budget, options.kernels);
  }
  PREHOC_RETURN_IF_ERROR(session->OpenStore());
  PREHOC_RETURN_IF_ERROR(session->CreateEngine());
  PREHOC_RETURN_IF_ERROR(session->CreateCache());
  return session;
}

Status Session::OpenStore() {
  if (options_.store.empty()) return {};
  auto store = RocksDbStore::Open(StoreOptions(options_, geometry_, *model_));
  if (!store.ok()) return StoreError(store.status(), options_.store);
  store_ = std::move(store).value();
  return {};
}

Status Session::CreateEngine() {
  PREHOC_ASSIGN_OR_RETURN(const auto selector, Selector::Create(options_.selector));
  reference::EngineOptions engine;
  engine.executor = executor_.get();
  engine.max_tokens = options_.max_tokens;
  engine.max_batch_tokens = piece_tokens();
  engine.keep_q_pre_rope = selector->NeedsPreRope() || options_.observer;
  engine.make_decoder = device_.make_decoder;
  engine.prompt_precision = options_.prompt_precision;
  auto created = reference::Engine::Create(model_, engine);
  if (!created.ok()) return RuntimeError(created.status(), "--model");
  engine_ = std::move(created).value();
  return {};
}

Status Session::CreateCache() {
  CacheOptions cache;
  cache.geometry = geometry_;
  cache.host_budget = options_.host_budget;
  cache.model = model_->fingerprint;
  cache.selector = options_.selector;
  cache.codes = options_.codes;
  cache.audit_every = options_.audit_every;
  cache.tenant_salt = options_.tenant;
  cache.persist_decode = options_.persist_decode;
  cache.read_deadline_nanos = options_.store_deadline_ms * 1'000'000;
  cache.write_deadline_nanos = 10 * cache.read_deadline_nanos;  // a flush writes tens of MiB

  CacheResources resources;
  resources.executor = executor_.get();
  resources.io = io_.get();
  resources.device = device_.memory.get();
  resources.stream = device_.stream;
  resources.step_kernels = device_.step_kernels;
  resources.registrar = registrar_.get();
  resources.store = store_.get();
  resources.kernels = device_.kernels;
  resources.transfer = device_.transfer.get();
  resources.tracer = options_.tracer;
  auto created = KvCache::Create(cache, resources);
  if (!created.ok()) return CreateError(created.status(), options_);
  cache_ = std::move(created).value();
  return {};
}

Status Session::Open(std::span<const int32_t> prompt) {
  sequence_.reset();
  SequenceOptions sequence;
  sequence.max_tokens = options_.max_tokens;
  sequence.variant = Variant(options_, *engine_);
  sequence.device_slots = options_.device_slots;
  sequence.observer = options_.observer;
  auto opened = cache_->OpenWithPrefix(sequence, prompt);
  if (!opened.ok()) return OpenError(opened.status(), options_);
  sequence_ = std::move(opened).value();
  return {};
}

Forward Session::forward() {
  return [this](std::span<const int32_t> tokens, int64_t prompt_tokens, std::span<float> logits) {
    return RuntimeError(InFlagWords(reference::RunWithRepair(*engine_, *sequence_, tokens, prompt_tokens, logits)), "");
  };
}

Status Session::Flush() {
  const Status status = cache_->Flush();
  return status.ok() || options_.store.empty() ? status : StoreError(status, options_.store);
}

std::map<std::string, double> Session::Counters() const {
  std::map<std::string, double> counters;
  const CounterVisitor visit = [&](std::string_view name, double value) { counters[std::string(name)] = value; };
  cache_->VisitCounters(visit);
  engine_->VisitCounters(visit);
  device_.visit_counters(visit);
  return counters;
}

}  // namespace prehoc::cli
