#include "cache/kv_cache.h"

#include <algorithm>

#include "cache/internal/cache_impl.h"
#include "cache/internal/fast_step.h"
#include "cache/internal/sequence_impl.h"
#include "transfer/memory_transfer_engine.h"

namespace prehoc {

Status CacheOptions::Validate() const {
  PREHOC_RETURN_IF_ERROR(geometry.Validate());
  PREHOC_RETURN_IF_ERROR(selector.Validate());
  if (audit_every < 0) return {StatusCode::kInvalid, "audit_every = " + std::to_string(audit_every) + " is negative"};
  if (geometry.chunk_tokens % codes.group_tokens != 0) {
    return {StatusCode::kInvalid, "chunk_tokens = " + std::to_string(geometry.chunk_tokens) +
                                      " is not a multiple of the codes' group of " + std::to_string(codes.group_tokens)};
  }
  if (selector.kind == SelectorKind::kQuest && geometry.chunk_tokens % selector.quest.page != 0) {
    return {StatusCode::kInvalid, "chunk_tokens = " + std::to_string(geometry.chunk_tokens) + " is not a multiple of quest.page=" +
                                      std::to_string(selector.quest.page)};
  }
  if (!selector.cis.clip_middle && selector.cis.exact_budget) {
    return {StatusCode::kUnsupported, "cis.clip=visible with cis.budget=cis*: an exact budget needs cis.clip=middle"};
  }
  return {};
}

ChunkKeyRoot CacheShared::KeyRoot(const std::string& method) const {
  return {.tenant_salt = options.tenant_salt, .model = options.model, .dtype = RowFormatName(options.geometry.rows),
          .layout = layout_name, .method = method};
}

KvCache::KvCache(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
KvCache::~KvCache() = default;

namespace {
// Says what these kernels do offer.
Status CodesNotOffered(const CodeFormat& codes, const KernelTable& kernels, int32_t head_dim) {
  std::string bits;
  for (int32_t b = 1; b <= 8; ++b) {
    if (kernels.code_block_bytes({.bits = b}, head_dim) > 0) bits += (bits.empty() ? "" : ", ") + std::to_string(b);
  }
  const bool dither = kernels.code_block_bytes({.dither = true}, head_dim) > 0;
  return {StatusCode::kInvalid, "codes of " + std::to_string(codes.bits) + " bits over " + std::to_string(codes.group_tokens) + " tokens" +
                                    (codes.dither ? ", dithered," : "") + " are not offered by the kernels " + std::string(kernels.name) + " at head_dim " +
                                    std::to_string(head_dim) + ": bits " + (bits.empty() ? "none" : bits) + ", over 16 or 64" +
                                    (dither ? "" : ", without dither")};
}
}  // namespace

// --- Every call of the facade that can need memory goes through WithinMemory(): below it std::bad_alloc may be thrown, and leaves things
// as the contract says of an error; no caller sees it. Jobs have a boundary of their own, where they call the store.

Result<std::unique_ptr<KvCache>> KvCache::Create(const CacheOptions& options, const CacheResources& resources) {
  return WithinMemory([&]() -> Result<std::unique_ptr<KvCache>> { return Impl::Create(options, resources); });
}

Result<std::unique_ptr<KvCache>> KvCache::Impl::Create(const CacheOptions& options, const CacheResources& resources) {
  PREHOC_RETURN_IF_ERROR(options.Validate());
  if (resources.executor == nullptr || resources.device == nullptr) {
    return {StatusCode::kInvalid, "a cache needs an executor and device memory"};
  }
  auto impl = std::make_unique<Impl>();
  impl->options = options;
  impl->layout_name = options.geometry.LayoutName();
  impl->resources = resources;
  CacheResources& own = impl->resources;
  if (own.background == nullptr) own.background = own.executor;
  if (own.io == nullptr) own.io = own.executor;
  if (own.kernels == nullptr) own.kernels = &BestCpuKernels();
  if (own.clock == nullptr) own.clock = &SteadyClock::Get();
  if (own.transfer == nullptr) {
    impl->own_transfer = std::make_unique<MemoryTransferEngine>(own.background);
    own.transfer = impl->own_transfer.get();
  }
  if (!own.device->host_accessible() && own.registrar == nullptr) {
    return {StatusCode::kInvalid, "device memory that host code cannot reach needs kernels of that device and a registrar"};
  }
  if (own.kernels->code_block_bytes(options.codes, options.geometry.head_dim) == 0) {
    return CodesNotOffered(options.codes, *own.kernels, options.geometry.head_dim);
  }
  if (own.store && own.store->chunk_bytes() != options.geometry.block_bytes()) {
    return {StatusCode::kInvalid, "the store keeps records of " + std::to_string(own.store->chunk_bytes()) +
                                      " bytes, this geometry has blocks of " + std::to_string(options.geometry.block_bytes())};
  }
  SelectorOptions& method = impl->options.selector;
  if (method.tc.dense_below == TwoClockOptions::kAuto) method.tc.dense_below = DenseBelow(options.geometry, *own.device);
  PREHOC_ASSIGN_OR_RETURN(impl->selector, Selector::Create(method));
  if (impl->selector->NeedsCodes() && options.selector.BoundInForce() == BoundKind::kStatistical && !options.codes.dither) {
    return {StatusCode::kInvalid, "bound=statistical: needs dithered codes (codes.dither, --codes 4/64+dither)"};
  }
  PREHOC_RETURN_IF_ERROR(CheckOffered(*impl));
  HostTier::Options host;
  host.block_bytes = options.geometry.block_bytes();
  if (resources.registrar != nullptr) host.row_bytes = options.geometry.stored_row_bytes();
  host.budget = options.host_budget;
  host.huge_pages = options.huge_pages;
  host.verify_pins = options.verify_pins;
  host.registrar = own.registrar;
  host.clock = own.clock;
  host.tracer = own.tracer;
  if (own.store != nullptr && options.guard_store) {
    PREHOC_RETURN_IF_ERROR(options.health.Validate());
    impl->health = std::make_unique<TierHealth>(options.health, own.clock);
  }
  host.health = impl->health.get();
  host.read_deadline_nanos = own.store != nullptr ? options.read_deadline_nanos : 0;
  host.write_deadline_nanos = own.store != nullptr ? options.write_deadline_nanos : 0;
  host.reader = own.io;
  PREHOC_ASSIGN_OR_RETURN(impl->host, HostTier::Create(host, own.executor, own.background, own.store));
  return std::unique_ptr<KvCache>(new KvCache(std::move(impl)));
}

Result<std::unique_ptr<Sequence>> KvCache::Open(const SequenceOptions& options) {
  return WithinMemory([&]() -> Result<std::unique_ptr<Sequence>> {
    PREHOC_ASSIGN_OR_RETURN(auto impl, Sequence::Impl::Open(impl_.get(), options));
    return std::unique_ptr<Sequence>(new Sequence(std::move(impl)));
  });
}

Result<std::unique_ptr<Sequence>> KvCache::OpenWithPrefix(const SequenceOptions& options, std::span<const int32_t> tokens) {
  return WithinMemory([&] { return RestoreAndOpen(options, tokens); });
}

Result<std::unique_ptr<Sequence>> KvCache::RestoreAndOpen(const SequenceOptions& options, std::span<const int32_t> tokens) {
  if (static_cast<int64_t>(tokens.size()) > options.max_tokens) {
    return {StatusCode::kInvalid, "a prompt of " + std::to_string(tokens.size()) + " tokens with max_tokens = " +
                                      std::to_string(options.max_tokens)};
  }
  TraceScope trace(impl_->resources.tracer, "open with prefix");
  PREHOC_ASSIGN_OR_RETURN(auto impl, Sequence::Impl::Open(impl_.get(), options));
  const Status restored = impl->RestorePrefix(tokens);
  if (!restored.ok()) {
    // A block that was there a moment ago is gone: begin without a prefix, as if nothing had been stored.
    const int64_t corrupt = impl->report.corrupt_chunks + (restored.code() == StatusCode::kCorrupt);
    const int64_t missing = impl->report.missing_chunks + (restored.code() != StatusCode::kCorrupt);
    impl.reset();
    PREHOC_ASSIGN_OR_RETURN(impl, Sequence::Impl::Open(impl_.get(), options));
    impl->report.corrupt_chunks = corrupt;
    impl->report.missing_chunks = missing;
  }
  trace.Say("restored_tokens", impl->restored_tokens);
  return std::unique_ptr<Sequence>(new Sequence(std::move(impl)));
}

Status KvCache::Flush() {
  return WithinMemory([&] { return impl_->host->Flush(); });
}
bool KvCache::FlipIdleBitForTest(uint64_t pick, uint64_t bit) { return impl_->host->FlipIdleBitForTest(pick, bit); }
const CacheOptions& KvCache::options() const { return impl_->options; }
const Selector& KvCache::selector() const { return *impl_->selector; }
const KernelTable& KvCache::kernels() const { return *impl_->resources.kernels; }

void KvCache::VisitCounters(const CounterVisitor& visit) const {
  const DeviceMemory& device = *impl_->resources.device;
  visit("device.budget_bytes", static_cast<double>(device.budget()));
  visit("device.used_bytes", static_cast<double>(device.used()));
  visit("device.peak_bytes", static_cast<double>(device.peak()));
  impl_->host->VisitCounters(visit);
  if (impl_->health) impl_->health->VisitCounters(visit);
  impl_->resources.transfer->VisitCounters(visit);
  if (impl_->resources.store) impl_->resources.store->VisitCounters(visit);
}

// --- Sequence: the facade of Sequence::Impl ----------------------------------------------------------------------------

Sequence::Sequence(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Sequence::~Sequence() = default;
int64_t Sequence::length() const { return impl_->length; }
int64_t Sequence::restored() const { return impl_->restored_tokens; }
int64_t Sequence::max_tokens() const { return impl_->max_tokens; }
int32_t Sequence::chunk_tokens() const { return impl_->geometry().chunk_tokens; }
int64_t Sequence::prompt_length() const { return impl_->last_prompt; }
bool Sequence::takes_device_memory() const { return impl_->kernels().settle != nullptr; }
std::span<const int32_t> Sequence::tokens() const {
  return std::span(impl_->tokens).first(static_cast<size_t>(impl_->length));
}

Status Sequence::Begin(std::span<const int32_t> tokens, int64_t prompt_tokens) {
  return WithinMemory([&] { return impl_->Begin(tokens, prompt_tokens); });
}
PrefillRule Sequence::FreezeRule(LayerId layer) const {
  return impl_->decoding() ? PrefillRule{} : impl_->RuleOfPrefill(layer.value());
}
Status Sequence::Prefill(LayerId layer, const LayerInput& input) {
  return WithinMemory([&]() -> Status {
    PREHOC_RETURN_IF_ERROR(impl_->CheckCall(layer, false));
    return impl_->Prefill(layer.value(), input);
  });
}
Status Sequence::WhileOthersWork() {
  return WithinMemory([&] { return impl_->FinishLayers(1); });
}
Status Sequence::Attend(LayerId layer, const LayerInput& input) {
  return WithinMemory([&]() -> Status {
    PREHOC_RETURN_IF_ERROR(impl_->CheckCall(layer, true));
    if (input.on_device) return {StatusCode::kInvalid, "on_device in decode: only Prefill() takes q, k and v there"};
    return impl_->Attend(layer.value(), input);
  });
}
Result<Sequence::StepPlan> Sequence::PlanStep(const LayerInput& io) {
  return WithinMemory([&] { return impl_->PlanStep(io); });
}
Status Sequence::EnqueueBehind(void* stream) {
  return impl_->InPlan([&] { return impl_->EnqueueBehind(stream); });
}
Status Sequence::EnqueueLayer(LayerId layer, void* stream) {
  return impl_->InPlan([&] { return impl_->EnqueueLayer(layer.value(), stream); });
}
Status Sequence::EnqueueLast(void* stream) {
  return impl_->InPlan([&] { return impl_->EnqueueLast(stream); });
}
Status Sequence::AfterLayer(LayerId layer) {
  return impl_->InPlan([&]() -> Status {
    PREHOC_RETURN_IF_ERROR(impl_->CheckCall(layer, true));
    return impl_->AfterLayer(layer.value());
  });
}
Status Sequence::End() {
  return WithinMemory([&] { return impl_->End(); });
}
void Sequence::Rollback() { impl_->Rollback(); }
std::vector<ChunkIndex> Sequence::LostChunks() const { return impl_->LostChunks(); }
Status Sequence::BeginRepair(ChunkIndex chunk) {
  return WithinMemory([&] { return impl_->BeginRepair(chunk); });
}
Status Sequence::EndRepair() {
  return WithinMemory([&] { return impl_->EndRepair(); });
}
const SequenceReport& Sequence::Report() const { return impl_->report; }
Status Sequence::CheckInvariants() const { return impl_->CheckInvariants(); }

Sequence::Residency Sequence::CountResidency() const {
  Residency count;
  const bool on_device = impl_->device_step != nullptr && impl_->device_step->active;
  if (on_device) count.device_rows = impl_->HeldByDevice();
  for (const LayerState& layer : impl_->layers) {
    for (const HeadState& head : layer.heads) {
      count.device_rows += impl_->length - std::min(impl_->length, impl_->ring_begin) + (on_device ? 0 : head.residency.held()) +
                           std::min<int64_t>(impl_->sinks, std::min(impl_->ring_begin, impl_->length));
      count.device_slots += impl_->layout.slots;
    }
    for (const BlockRef& block : layer.blocks) {
      const BlockState state = impl_->cache->host->state(block);
      count.host_blocks += state == BlockState::kTail || state == BlockState::kHost;
      count.disk_only_blocks += state == BlockState::kStoreOnly;
      count.lost_blocks += state == BlockState::kLost;
    }
  }
  return count;
}

Result<Sequence::HeadView> Sequence::LastStep(LayerId layer, KvHeadId head) const {
  const KvGeometry& geometry = impl_->geometry();
  if (layer.value() < 0 || layer.value() >= geometry.layers || head.value() < 0 || head.value() >= geometry.kv_heads) {
    return {StatusCode::kInvalid, "layer " + std::to_string(layer.value()) + ", KV head " + std::to_string(head.value()) +
                                      " of " + std::to_string(geometry.layers) + " and " + std::to_string(geometry.kv_heads)};
  }
  return WithinMemory([&] { return impl_->LastStep(layer.value(), head.value()); });
}

Result<Sequence::HeadView> Sequence::Impl::LastStep(int32_t layer, int32_t kv_head) const {
  HeadView view;
  view.cosine = 2;
  for (const Unit& unit : layers[static_cast<size_t>(layer)].units) {
    if (unit.kv_head != kv_head) continue;
    AttendedSet set = unit.attended;
    PREHOC_RETURN_IF_ERROR(ReadAttended(layer, kv_head, &set));
    const std::vector<int32_t> positions = set.Positions();
    view.attended.insert(view.attended.end(), positions.begin(), positions.end());
    view.selected |= unit.selected;
    view.cosine = std::min(view.cosine, unit.cosine);
  }
  std::sort(view.attended.begin(), view.attended.end());
  view.attended.erase(std::unique(view.attended.begin(), view.attended.end()), view.attended.end());
  return view;
}

}  // namespace prehoc
