#include "transfer/memory_chunk_store.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <string>
#include <vector>

#include "base/units.h"

namespace prehoc {

Status MemoryChunkStore::Options::Validate() const {
  if (chunk_bytes == 0) return {StatusCode::kInvalid, "memory store: chunk_bytes=0; give the bytes of one chunk"};
  if (chunk_bytes > (uint64_t{1} << 40)) {
    return {StatusCode::kInvalid, "memory store: chunk_bytes=" + std::to_string(chunk_bytes) + " is over 1 TiB"};
  }
  if (budget < sizeof(RecordHeader) + chunk_bytes) {
    return {StatusCode::kInvalid, "memory store: budget=" + std::to_string(budget) + " holds no record of " +
                                      std::to_string(sizeof(RecordHeader) + chunk_bytes) + " bytes; raise it"};
  }
  return {};
}

MemoryChunkStore::MemoryChunkStore(const Options& options, RecordContext context)
    : ChunkStore(options.chunk_bytes), context_(std::move(context)), budget_(options.budget), tap_(options.tap) {}

Result<std::unique_ptr<MemoryChunkStore>> MemoryChunkStore::Create(const Options& options) {
  PREHOC_RETURN_IF_ERROR(options.Validate());
  PREHOC_ASSIGN_OR_RETURN(RecordContext context, RecordContext::Create(options.identity));
  return std::unique_ptr<MemoryChunkStore>(new MemoryChunkStore(options, std::move(context)));
}

Status MemoryChunkStore::DoGet(const ChunkKey& key, std::span<std::byte> out, ChunkSeal* seal) {
  Record record;
  {
    MutexLock lock(mutex_);
    ++counters_.gets;
    const auto found = index_.find(key);
    if (found == index_.end()) {
      ++counters_.misses;
      return {StatusCode::kNotFound, "memory store: no chunk " + key.ToString()};
    }
    lru_.splice(lru_.begin(), lru_, found->second);
    record = found->second->record;
  }
  // The copy runs unlocked: `record` keeps the bytes, and keeps them from being evicted.
  RecordHeader header;
  std::memcpy(&header, record.get(), sizeof header);
  std::memcpy(out.data(), record.get() + sizeof header, out.size());
  const Status check = Check(key, &header, out);
  MutexLock lock(mutex_);
  if (!check.ok()) {
    if (check.code() != StatusCode::kCorrupt) return check.WithContext("memory store");
    ++counters_.corrupt;
    const auto found = index_.find(key);
    if (found != index_.end() && found->second->record == record) EraseLocked(found->second);
    return check.WithContext("memory store");
  }
  *seal = SealOf(header);
  ++counters_.hits;
  counters_.read_bytes += out.size();
  return {};
}

Status MemoryChunkStore::Check(const ChunkKey& key, RecordHeader* header, std::span<std::byte> payload) const {
  const std::span<std::byte> header_bytes = std::as_writable_bytes(std::span(header, 1));
  if (tap_ == nullptr) return CheckRecord(context_, key, header_bytes, payload);
  uint64_t ticket = 0;
  PREHOC_RETURN_IF_ERROR(tap_->OnRead(key, header_bytes, payload, &ticket));
  const Status check = CheckRecord(context_, key, header_bytes, payload);
  tap_->OnChecked(key, ticket, check);
  return check;
}

Status MemoryChunkStore::DoPut(const ChunkKey& key, std::span<const std::byte> data, const ChunkOrigin& origin) {
  return Write(key, data, origin, /*replace=*/false);
}

Status MemoryChunkStore::DoReplace(const ChunkKey& key, std::span<const std::byte> data, const ChunkOrigin& origin) {
  return Write(key, data, origin, /*replace=*/true);
}

Result<ChunkSeal> MemoryChunkStore::DoPeek(const ChunkKey& key) {
  MutexLock lock(mutex_);
  const auto found = index_.find(key);
  if (found == index_.end()) return {StatusCode::kNotFound, "memory store: no chunk " + key.ToString()};
  RecordHeader header;
  std::memcpy(&header, found->second->record.get(), sizeof header);
  PREHOC_RETURN_IF_ERROR(CheckHeader(context_, key, header, chunk_bytes()).WithContext("memory store"));
  return SealOf(header);
}

Status MemoryChunkStore::Write(const ChunkKey& key, std::span<const std::byte> data, const ChunkOrigin& origin, bool replace) {
  {
    MutexLock lock(mutex_);
    if (!replace && index_.contains(key)) return {};
    PREHOC_RETURN_IF_ERROR(ReserveLocked());
  }
  Record record(new (std::nothrow) std::byte[record_bytes()]);
  if (record != nullptr) {
    const RecordHeader header = EncodeHeader(context_, key, data, origin);
    std::memcpy(record.get(), &header, sizeof header);
    std::memcpy(record.get() + sizeof header, data.data(), data.size());
    const std::span<std::byte> bytes(record.get(), record_bytes());
    if (tap_ != nullptr && !tap_->OnWrite(key, bytes.first(sizeof header), bytes.subspan(sizeof header))) {
      MutexLock lock(mutex_);
      --reserved_;
      return {};
    }
  }
  MutexLock lock(mutex_);
  --reserved_;
  if (record == nullptr) {
    ++counters_.put_dropped;
    return {StatusCode::kOutOfSpace, "memory store: the system has no memory for " +
                                         FormatBytes(static_cast<double>(record_bytes()))};
  }
  if (const auto there = index_.find(key); there == index_.end()) {
    Lru fresh;
    fresh.push_front({key, std::move(record)});
    index_.emplace(key, fresh.begin());  // may throw; what follows does not
    lru_.splice(lru_.begin(), fresh);
  } else if (replace) {
    Record& old = there->second->record;
    if (old.use_count() > 1) removed_.push_back(old);  // may throw; what follows does not
    old = std::move(record);
    lru_.splice(lru_.begin(), lru_, there->second);
  } else {
    return {};  // another thread stored the same chunk meanwhile
  }
  ++counters_.puts;
  counters_.written_bytes += data.size();
  return {};
}

Status MemoryChunkStore::ReserveLocked() {
  ReapLocked();
  const uint64_t limit = budget_ / record_bytes();
  auto victim = lru_.end();
  while (HeldLocked() >= limit && victim != lru_.begin()) {
    --victim;
    // Readers take their copy under the mutex, so a count of one cannot grow behind our back.
    if (victim->record.use_count() > 1) continue;
    const auto next = std::next(victim);
    EraseLocked(victim);
    victim = next;
    ++counters_.evicted;
  }
  if (HeldLocked() >= limit) {
    ++counters_.put_dropped;
    return {StatusCode::kBusy, "memory store: all " + std::to_string(limit) + " records of the budget are in use"};
  }
  ++reserved_;
  counters_.peak_bytes = std::max(counters_.peak_bytes, HeldLocked() * record_bytes());
  return {};
}

void MemoryChunkStore::EraseLocked(Lru::iterator it) {
  if (it->record.use_count() > 1) removed_.push_back(it->record);
  index_.erase(it->key);
  lru_.erase(it);
}

void MemoryChunkStore::ReapLocked() {
  removed_.remove_if([](const Record& record) { return record.use_count() == 1; });
}

bool MemoryChunkStore::DoContains(const ChunkKey& key) const {
  MutexLock lock(mutex_);
  return index_.contains(key);
}

Status MemoryChunkStore::DoDelete(const ChunkKey& key) {
  MutexLock lock(mutex_);
  const auto found = index_.find(key);
  if (found != index_.end()) EraseLocked(found->second);
  return {};
}

uint64_t MemoryChunkStore::DoResidentBytes() const {
  MutexLock lock(mutex_);
  return lru_.size() * record_bytes();
}

void MemoryChunkStore::DoVisitCounters(const CounterVisitor& visit) const {
  Counters c;
  uint64_t resident = 0;
  {
    MutexLock lock(mutex_);
    c = counters_;
    resident = lru_.size() * record_bytes();
  }
  const auto show = [&](const char* name, uint64_t value) { visit(name, static_cast<double>(value)); };
  show("store.gets", c.gets);
  show("store.hits", c.hits);
  show("store.misses", c.misses);
  show("store.corrupt", c.corrupt);
  show("store.puts", c.puts);
  show("store.put_dropped", c.put_dropped);
  show("store.evicted", c.evicted);
  show("store.read_bytes", c.read_bytes);
  show("store.written_bytes", c.written_bytes);
  show("store.resident_bytes", resident);
  show("store.peak_bytes", c.peak_bytes);
  show("store.budget_bytes", budget_);
}

Status MemoryChunkStore::FlipBitForTest(const ChunkKey& key, size_t bit) {
  MutexLock lock(mutex_);
  const auto found = index_.find(key);
  if (found == index_.end()) return {StatusCode::kNotFound, "no chunk " + key.ToString()};
  if (bit / 8 >= record_bytes()) return {StatusCode::kInvalid, "bit " + std::to_string(bit)};
  found->second->record[bit / 8] ^= std::byte{1} << (bit % 8);
  return {};
}

Status MemoryChunkStore::CheckInvariants() const {
  MutexLock lock(mutex_);
  if (index_.size() != lru_.size()) return {StatusCode::kCorrupt, "index and list differ in size"};
  for (auto it = lru_.begin(); it != lru_.end(); ++it) {
    const auto found = index_.find(it->key);
    if (found == index_.end() || &*found->second != &*it) {
      return {StatusCode::kCorrupt, "chunk " + it->key.ToString() + " is in the list but not indexed"};
    }
  }
  if (HeldLocked() * record_bytes() > budget_) {
    return {StatusCode::kCorrupt, "records exceed the budget"};
  }
  return {};
}

}  // namespace prehoc
