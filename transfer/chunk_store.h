// The storage seam: immutable, checksummed records under 256-bit keys. Disk and remote tiers are ChunkStores;
// MemoryChunkStore is the RAM-only one.
#pragma once
#include <array>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <span>
#include <string>

#include "base/counters.h"
#include "base/result.h"
#include "base/status.h"

namespace prehoc {

// Names one chunk of one layer: a chained SHA-256 (cache/chunk_key.h) plus the layer. Never 64-bit, never unsalted.
struct ChunkKey {
  std::array<uint8_t, 32> chain{};  // tenant salt, model fingerprint, layout, method, all tokens up to the chunk's end
  int32_t layer = 0;
  friend auto operator<=>(const ChunkKey&, const ChunkKey&) = default;
  std::string ToString() const;  // 16 hex digits and the layer, for messages
};
struct ChunkKeyHash {
  size_t operator()(const ChunkKey& key) const {
    size_t h;
    std::memcpy(&h, key.chain.data(), sizeof h);
    return h ^ (static_cast<size_t>(key.layer) * 0x9e3779b97f4a7c15ull);
  }
};

// Where a chunk stands in its sequence. Goes into the record beside the key, so that a store can be looked through without the
// prompts that filled it; nothing is found by it. A tag is the first 8 bytes of a SHA-256.
struct ChunkOrigin {
  uint64_t tenant = 0;  // tag of the tenant's salt
  uint64_t parent = 0;  // tag of the chunk before, or of the root that tenant, model, layout and method have in common
  int32_t chunk = 0;    // 0-based
  bool branch = false;  // holds rows that depend on more than the tokens: only the sequence that wrote it can ask for it
  friend bool operator==(const ChunkOrigin&, const ChunkOrigin&) = default;
};
inline uint64_t ChainTag(const std::array<uint8_t, 32>& chain) {
  uint64_t tag;
  std::memcpy(&tag, chain.data(), sizeof tag);
  return tag;
}

// By which bytes are known again: Hash128(bytes, seed) == hash (transfer/record_format.h). The seed is a hash of the key and of
// whatever else the bytes are bound to.
struct ChunkSeal {
  uint64_t seed = 0;
  std::array<uint64_t, 2> hash{};
  friend bool operator==(const ChunkSeal&, const ChunkSeal&) = default;
};

// What a store was made for. A store opened with another identity is refused, with both values in the message.
struct StoreIdentity {
  std::array<uint8_t, 32> model{};  // model fingerprint
  std::string model_name;           // for messages only
  std::string dtype = "f16";
  std::string layout;               // e.g. "rows-kv/l30/h3/d64/p16/c256"
  uint32_t format_version = 2;      // transfer/record_format.h
  friend bool operator==(const StoreIdentity& a, const StoreIdentity& b) {
    return a.model == b.model && a.dtype == b.dtype && a.layout == b.layout && a.format_version == b.format_version;
  }
};

// Safe from any thread. Every record is verified (checksum bound to its key) before its bytes are given out.
class ChunkStore {
 public:
  virtual ~ChunkStore() = default;

  // Copies the record of `key` into `out` [chunk_bytes()], and what `out` was compared with into `seal`, unless that is null: whoever
  // keeps the bytes can compare them again and need not read them for that now. Waits for the bytes.
  // Returns kInvalid (size of out), kNotFound, kIoError, kCorrupt (checksum, or a record of another key, layout
  // or version; the damaged record is dropped and counted), kDeadline. `out` and `seal` are unspecified on error.
  Status Get(const ChunkKey& key, std::span<std::byte> out, ChunkSeal* seal = nullptr);

  // Stores a copy of `data` [chunk_bytes()]; a key that is present is left as it is (records are immutable).
  // May shed older records to stay within the store's byte budget.
  // Returns kInvalid (size), kBusy (would have to stall: the write was dropped and counted), kOutOfSpace (disk or
  // budget), kIoError (the store then refuses writes until reopened).
  Status Put(const ChunkKey& key, std::span<const std::byte> data, const ChunkOrigin& origin = {});

  // As Put(), but in the place of a record of this key, if there is one. After a crash there is the old one or the new one. On error the
  // old one stays, as long as the store's bounds let it.
  Status Replace(const ChunkKey& key, std::span<const std::byte> data, const ChunkOrigin& origin = {});

  // What Get() would compare the record of `key` with, without reading its payload (nor noticing damage there).
  // Codes of Get(); drops and counts nothing.
  Result<ChunkSeal> Peek(const ChunkKey& key) { return DoPeek(key); }

  // True if Get() would probably find the key; costs no read of the record. Never true for a dropped key.
  bool Contains(const ChunkKey& key) const { return DoContains(key); }

  // Drops the record; OK if there is none.
  Status Delete(const ChunkKey& key) { return DoDelete(key); }

  // Returns once all that Put() accepted survives a crash of the process.
  Status Flush() { return DoFlush(); }

  size_t chunk_bytes() const { return chunk_bytes_; }
  uint64_t resident_bytes() const { return DoResidentBytes(); }  // [bytes] of live records, headers included
  uint64_t budget() const { return DoBudget(); }                 // [bytes]; UINT64_MAX = unbounded
  // store.{gets,hits,misses,corrupt,puts,put_dropped,evicted,read_bytes,written_bytes,resident_bytes,peak_bytes,
  // budget_bytes}
  void VisitCounters(const CounterVisitor& visit) const { DoVisitCounters(visit); }

 protected:
  explicit ChunkStore(size_t chunk_bytes) : chunk_bytes_(chunk_bytes) {}

 private:
  virtual Status DoGet(const ChunkKey& key, std::span<std::byte> out, ChunkSeal* seal) = 0;  // `seal` is never null
  virtual Status DoPut(const ChunkKey& key, std::span<const std::byte> data, const ChunkOrigin& origin) = 0;
  virtual Status DoReplace(const ChunkKey& key, std::span<const std::byte> data, const ChunkOrigin& origin) = 0;
  virtual Result<ChunkSeal> DoPeek(const ChunkKey& key) = 0;
  virtual bool DoContains(const ChunkKey& key) const = 0;
  virtual Status DoDelete(const ChunkKey& key) = 0;
  virtual Status DoFlush() = 0;
  virtual uint64_t DoResidentBytes() const = 0;
  virtual uint64_t DoBudget() const = 0;
  virtual void DoVisitCounters(const CounterVisitor& visit) const = 0;

  const size_t chunk_bytes_;
};

// Forwards everything, so that a test or a decorator overrides a single method.
class ChunkStoreWrapper : public ChunkStore {
 public:
  explicit ChunkStoreWrapper(ChunkStore* base) : ChunkStore(base->chunk_bytes()), base_(base) {}

 protected:
  ChunkStore* base() const { return base_; }

 private:
  Status DoGet(const ChunkKey& key, std::span<std::byte> out, ChunkSeal* seal) override { return base_->Get(key, out, seal); }
  Status DoPut(const ChunkKey& key, std::span<const std::byte> data, const ChunkOrigin& origin) override {
    return base_->Put(key, data, origin);
  }
  Status DoReplace(const ChunkKey& key, std::span<const std::byte> data, const ChunkOrigin& origin) override {
    return base_->Replace(key, data, origin);
  }
  Result<ChunkSeal> DoPeek(const ChunkKey& key) override { return base_->Peek(key); }
  bool DoContains(const ChunkKey& key) const override { return base_->Contains(key); }
  Status DoDelete(const ChunkKey& key) override { return base_->Delete(key); }
  Status DoFlush() override { return base_->Flush(); }
  uint64_t DoResidentBytes() const override { return base_->resident_bytes(); }
  uint64_t DoBudget() const override { return base_->budget(); }
  void DoVisitCounters(const CounterVisitor& visit) const override { base_->VisitCounters(visit); }
  ChunkStore* base_;
};

}  // namespace prehoc
