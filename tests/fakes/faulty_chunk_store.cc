#include "tests/fakes/faulty_chunk_store.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace prehoc {

void FaultyChunkStore::FailGet(int nth, Status with) {
  MutexLock lock(mutex_);
  fail_get_ = gets_ + nth;
  get_status_ = std::move(with);
}

void FaultyChunkStore::FailPut(int nth, Status with) {
  MutexLock lock(mutex_);
  fail_put_ = puts_ + nth;
  put_status_ = std::move(with);
}

void FaultyChunkStore::FlipBitInGet(int nth, size_t bit) {
  MutexLock lock(mutex_);
  flip_get_ = gets_ + nth;
  flip_bit_ = bit;
}

void FaultyChunkStore::TearGet(int nth, size_t good_bytes) {
  MutexLock lock(mutex_);
  tear_get_ = gets_ + nth;
  good_bytes_ = good_bytes;
}

void FaultyChunkStore::LosePut(int nth) {
  MutexLock lock(mutex_);
  lose_put_ = puts_ + nth;
}

void FaultyChunkStore::Crash() {
  std::set<ChunkKey> lost;
  {
    MutexLock lock(mutex_);
    lost.swap(unsynced_);
  }
  for (const ChunkKey& key : lost) base()->Delete(key).IgnoreError();  // a crash reports nothing
}

int FaultyChunkStore::gets() const {
  MutexLock lock(mutex_);
  return gets_;
}

int FaultyChunkStore::puts() const {
  MutexLock lock(mutex_);
  return puts_;
}

Status FaultyChunkStore::DoGet(const ChunkKey& key, std::span<std::byte> out, ChunkSeal* seal) {
  bool flip = false, tear = false;
  size_t bit = 0, good = 0;
  {
    MutexLock lock(mutex_);
    ++gets_;
    if (gets_ == fail_get_) return get_status_;
    flip = gets_ == flip_get_;
    tear = gets_ == tear_get_;
    bit = flip_bit_;
    good = std::min(good_bytes_, out.size());
  }
  if (tear) {
    std::vector<std::byte> whole(out.size());
    PREHOC_RETURN_IF_ERROR(base()->Get(key, whole, seal));
    std::memcpy(out.data(), whole.data(), good);
    return {};
  }
  PREHOC_RETURN_IF_ERROR(base()->Get(key, out, seal));
  if (flip) out[(bit / 8) % out.size()] ^= std::byte{1} << (bit % 8);
  return {};
}

Status FaultyChunkStore::DoPut(const ChunkKey& key, std::span<const std::byte> data, const ChunkOrigin& origin) {
  {
    MutexLock lock(mutex_);
    ++puts_;
    if (puts_ == fail_put_) return put_status_;
    if (puts_ == lose_put_) return {};
  }
  const bool present = base()->Contains(key);
  PREHOC_RETURN_IF_ERROR(base()->Put(key, data, origin));
  MutexLock lock(mutex_);
  if (!present) unsynced_.insert(key);
  return {};
}

Status FaultyChunkStore::DoDelete(const ChunkKey& key) {
  PREHOC_RETURN_IF_ERROR(base()->Delete(key));
  MutexLock lock(mutex_);
  unsynced_.erase(key);
  return {};
}

Status FaultyChunkStore::DoFlush() {
  PREHOC_RETURN_IF_ERROR(base()->Flush());
  MutexLock lock(mutex_);
  unsynced_.clear();
  return {};
}

}  // namespace prehoc
