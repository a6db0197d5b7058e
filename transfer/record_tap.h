// Where a store can be made to see another medium than it has: faults on purpose, below the checks that must find them.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>

#include "base/status.h"
#include "transfer/chunk_store.h"

namespace prehoc {

// Stands between a store and its medium: sees every record after it was read and before it is checked, and before it is
// written. Called from any thread, with no lock of the store's that a call of the store would want.
class RecordTap {
 public:
  virtual ~RecordTap() = default;

  // The medium gave these bytes. May change them, or fail the read by what it returns. `*ticket` comes back in OnChecked().
  virtual Status OnRead(const ChunkKey& key, std::span<std::byte> header, std::span<std::byte> payload, uint64_t* ticket) = 0;

  // What the store found when it checked the record of the OnRead() that gave `ticket`.
  virtual void OnChecked(const ChunkKey& key, uint64_t ticket, const Status& check) = 0;

  // A copy of the record on its way to the medium, checksum and all. What is left in it is written; false: nothing is, and
  // the store believes that it was.
  virtual bool OnWrite(const ChunkKey& key, std::span<std::byte> header, std::span<std::byte> payload) = 0;
};

}  // namespace prehoc
