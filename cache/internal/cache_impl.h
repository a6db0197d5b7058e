// What all sequences of a cache share.
#pragma once
#include <atomic>
#include <memory>

#include "cache/chunk_key.h"
#include "cache/host_tier.h"
#include "cache/kv_cache.h"
#include "transfer/transfer_engine.h"

namespace prehoc {

struct CacheShared {
  CacheOptions options;
  CacheResources resources;  // every pointer set, but `store`
  std::unique_ptr<Selector> selector;
  std::unique_ptr<TransferEngine> own_transfer;  // where the caller gave none
  std::unique_ptr<TierHealth> health;            // with a store that is guarded; else null
  std::unique_ptr<HostTier> host;
  std::string layout_name;  // KvGeometry::LayoutName()
  std::atomic<int64_t> held_for_steps{0};  // blocks that sequences hold in host memory for whole steps on the device

  const KvGeometry& geometry() const { return options.geometry; }
  // What is indexed at once: a group of codes or, where only bounds are wanted, a page; and the format that gives it.
  int32_t index_group() const { return selector->NeedsCodes() ? options.codes.group_tokens : selector->PageTokens(); }
  CodeFormat index_format() const { return selector->NeedsCodes() ? options.codes : CodeFormat{.group_tokens = 16}; }
  Launch launch() const { return {.executor = resources.executor, .stream = resources.stream}; }
  // How keys of `prompt_tokens` long prompts begin.
  ChunkKeyRoot KeyRoot(const std::string& method) const;
};

// What needs host code in the device's memory, or kernels that only CPUs have: kUnsupported, naming the knob. OK where host code
// reaches `resources.device`.
Status CheckOffered(const CacheShared& cache);
// tc.dense_below=auto: how many positions a step reads faster than it chooses among them.
int32_t DenseBelow(const KvGeometry& geometry, const DeviceMemory& device);

struct KvCache::Impl : CacheShared {
  static Result<std::unique_ptr<KvCache>> Create(const CacheOptions& options, const CacheResources& resources);
};

}  // namespace prehoc
