// A ChunkStore that fails on request, over any implementation.
#pragma once
#include <functional>
#include <set>
#include <string>

#include "base/mutex.h"
#include "transfer/chunk_store.h"

namespace prehoc {

// Faults count calls of their kind from 1, after they were set; 0 = none. Without faults it only forwards.
class FaultyChunkStore final : public ChunkStoreWrapper {
 public:
  using ChunkStoreWrapper::ChunkStoreWrapper;

  void FailGet(int nth, Status with);
  void FailPut(int nth, Status with);
  // Damage that the store below did not see, as between its check and our memory: the caller's bytes are wrong.
  void FlipBitInGet(int nth, size_t bit);
  void TearGet(int nth, size_t good_bytes);  // the rest of `out` stays as it was
  // The n-th Put() says OK and stores nothing.
  void LosePut(int nth);

  // As a crash would: what was put since the last Flush() is gone.
  void Crash();
  int gets() const;
  int puts() const;

 private:
  Status DoGet(const ChunkKey& key, std::span<std::byte> out, ChunkSeal* seal) override;
  Status DoPut(const ChunkKey& key, std::span<const std::byte> data, const ChunkOrigin& origin) override;
  Status DoDelete(const ChunkKey& key) override;
  Status DoFlush() override;

  mutable Mutex mutex_;
  int gets_ PREHOC_GUARDED_BY(mutex_) = 0;
  int puts_ PREHOC_GUARDED_BY(mutex_) = 0;
  int fail_get_ PREHOC_GUARDED_BY(mutex_) = 0;
  int fail_put_ PREHOC_GUARDED_BY(mutex_) = 0;
  int flip_get_ PREHOC_GUARDED_BY(mutex_) = 0;
  int tear_get_ PREHOC_GUARDED_BY(mutex_) = 0;
  int lose_put_ PREHOC_GUARDED_BY(mutex_) = 0;
  size_t flip_bit_ PREHOC_GUARDED_BY(mutex_) = 0;
  size_t good_bytes_ PREHOC_GUARDED_BY(mutex_) = 0;
  Status get_status_ PREHOC_GUARDED_BY(mutex_);
  Status put_status_ PREHOC_GUARDED_BY(mutex_);
  std::set<ChunkKey> unsynced_ PREHOC_GUARDED_BY(mutex_);
};

}  // namespace prehoc
