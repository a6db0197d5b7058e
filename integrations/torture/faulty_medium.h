// The medium below a store's checks, as a bad disk or a bad cable makes it.
#pragma once
#include <deque>
#include <unordered_map>
#include <vector>

#include "base/mutex.h"
#include "integrations/torture/fault_plan.h"
#include "transfer/record_tap.h"

namespace prehoc::torture {

// Faults of `plan` on every record that passes, at `rate` (the share of reads and of writes that go wrong). Knows what it did
// to each record, and so what a check must have found.
class FaultyMedium final : public RecordTap {
 public:
  FaultyMedium(FaultPlan* plan, double rate) : plan_(plan), rate_(rate) {}

  Status OnRead(const ChunkKey& key, std::span<std::byte> header, std::span<std::byte> payload, uint64_t* ticket) override;
  void OnChecked(const ChunkKey& key, uint64_t ticket, const Status& check) override;
  bool OnWrite(const ChunkKey& key, std::span<std::byte> header, std::span<std::byte> payload) override;

  // Keys whose record was written wrong and was not read since.
  std::vector<ChunkKey> UnreadDamage() const;
  void ForgetDamage(const ChunkKey& key);  // its record is gone: counted as never read

 private:
  using Record = std::vector<std::byte>;  // [header, payload]
  static Record Join(std::span<const std::byte> header, std::span<const std::byte> payload);
  bool Spoil(Fault fault, std::span<std::byte> header, std::span<std::byte> payload);
  bool Other(const ChunkKey& key, bool old, Record* record) const;

  FaultPlan* const plan_;
  const double rate_;
  mutable Mutex mutex_;
  std::deque<std::pair<ChunkKey, Record>> written_ PREHOC_GUARDED_BY(mutex_);  // the last ones, newest at the back
  struct Damage {
    Fault fault;
    bool seen = false;
  };
  std::unordered_map<ChunkKey, Damage, ChunkKeyHash> damaged_ PREHOC_GUARDED_BY(mutex_);
};

}  // namespace prehoc::torture
