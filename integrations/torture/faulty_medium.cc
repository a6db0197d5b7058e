#include "integrations/torture/faulty_medium.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>
#include <thread>

#include "transfer/record_format.h"

namespace prehoc::torture {
namespace {

constexpr size_t kRemembered = 64;     // records that can come back in the place of others
constexpr size_t kSector = 512;
constexpr uint64_t kDamagedBefore = 1u << 8;  // ticket: the record itself is bad, not this read

constexpr Fault kReadFaults[] = {Fault::kFlip, Fault::kTorn, Fault::kShort, Fault::kStale, Fault::kSwapped, Fault::kWrongKey,
                                 Fault::kReadError, Fault::kDelay};

}  // namespace

FaultyMedium::Record FaultyMedium::Join(std::span<const std::byte> header, std::span<const std::byte> payload) {
  Record record(header.begin(), header.end());
  record.insert(record.end(), payload.begin(), payload.end());
  return record;
}

// A record of another key: one written long ago, or one of the last.
bool FaultyMedium::Other(const ChunkKey& key, bool old, Record* record) const {
  const uint64_t pick = plan_->Next();
  MutexLock lock(mutex_);
  const size_t half = written_.size() / 2;
  if (half == 0) return false;
  const auto& [other, bytes] = written_[old ? pick % half : half + pick % (written_.size() - half)];
  if (other == key) return false;
  *record = bytes;
  return true;
}

bool FaultyMedium::Spoil(Fault fault, std::span<std::byte> header, std::span<std::byte> payload) {
  const auto flip = [&](uint64_t at) {
    const uint64_t bit = at % (8 * (header.size() + payload.size()));
    std::byte& byte = bit / 8 < header.size() ? header[bit / 8] : payload[bit / 8 - header.size()];
    byte ^= std::byte{1} << (bit % 8);
    return true;
  };
  RecordHeader here;
  std::memcpy(&here, header.data(), sizeof here);
  const ChunkKey key{here.chain, here.layer};
  Record other;
  switch (fault) {
    case Fault::kFlip:
    case Fault::kWriteFlip:
      return flip(plan_->Next());
    case Fault::kShort:
    case Fault::kWriteTorn: {
      // What was in memory, or on the medium, before.
      const size_t good = plan_->Next() % payload.size();
      const bool changes = std::any_of(payload.begin() + static_cast<std::ptrdiff_t>(good), payload.end(),
                                       [](std::byte b) { return b != std::byte{0xdd}; });
      std::fill(payload.begin() + static_cast<std::ptrdiff_t>(good), payload.end(), std::byte{0xdd});
      return changes;
    }
    case Fault::kTorn: {
      if (!Other(key, false, &other)) return false;
      const size_t sectors = std::max<size_t>(1, payload.size() / kSector);
      const size_t first = plan_->Next() % sectors * kSector;
      const size_t bytes = std::min(payload.size() - first, (1 + plan_->Next() % sectors) * kSector);
      const std::byte* from = other.data() + header.size() + first;
      if (std::memcmp(payload.data() + first, from, bytes) == 0) return false;
      std::memcpy(payload.data() + first, from, bytes);
      return true;
    }
    case Fault::kStale:
    case Fault::kSwapped:
      if (!Other(key, fault == Fault::kStale, &other)) return false;
      std::memcpy(header.data(), other.data(), header.size());
      std::memcpy(payload.data(), other.data() + header.size(), payload.size());
      return true;
    case Fault::kWrongKey:
      if (!Other(key, false, &other)) return false;
      std::memcpy(header.data(), other.data(), header.size());
      return true;
    default:
      return false;
  }
}

Status FaultyMedium::OnRead(const ChunkKey& key, std::span<std::byte> header, std::span<std::byte> payload, uint64_t* ticket) {
  {
    MutexLock lock(mutex_);
    if (const auto found = damaged_.find(key); found != damaged_.end()) {
      *ticket = kDamagedBefore + static_cast<uint64_t>(found->second.fault);
      return {};
    }
  }
  const double each = rate_ / static_cast<double>(std::size(kReadFaults));
  for (const Fault fault : kReadFaults) {
    if (!plan_->Draw(fault, each)) continue;
    if (fault == Fault::kReadError) {
      plan_->Injected(fault);
      return {StatusCode::kIoError, "chunk " + key.ToString() + ": the medium failed on purpose"};
    }
    if (fault == Fault::kDelay) {
      plan_->Injected(fault);
      std::this_thread::sleep_for(std::chrono::microseconds(20 + plan_->Next() % 500));
      return {};
    }
    if (!Spoil(fault, header, payload)) return {};
    plan_->Injected(fault);
    *ticket = 1 + static_cast<uint64_t>(fault);
    return {};
  }
  return {};
}

void FaultyMedium::OnChecked(const ChunkKey& key, uint64_t ticket, const Status& check) {
  if (ticket == 0) return;
  if (ticket < kDamagedBefore) {
    const auto fault = static_cast<Fault>(ticket - 1);
    return check.ok() ? plan_->Missed(fault) : plan_->Detected(fault);
  }
  const auto fault = static_cast<Fault>(ticket - kDamagedBefore);
  if (check.ok()) return plan_->Missed(fault);
  MutexLock lock(mutex_);
  const auto found = damaged_.find(key);
  if (found == damaged_.end() || found->second.seen) return;  // a second look at the same damage
  found->second.seen = true;
  plan_->Detected(fault);
}

bool FaultyMedium::OnWrite(const ChunkKey& key, std::span<std::byte> header, std::span<std::byte> payload) {
  ForgetDamage(key);
  {
    MutexLock lock(mutex_);
    written_.emplace_back(key, Join(header, payload));
    if (written_.size() > kRemembered) written_.pop_front();
  }
  const double each = rate_ / 3;
  if (plan_->Draw(Fault::kLost, each)) {
    plan_->Injected(Fault::kLost);
    return false;
  }
  for (const Fault fault : {Fault::kWriteFlip, Fault::kWriteTorn}) {
    if (!plan_->Draw(fault, each)) continue;
    if (!Spoil(fault, header, payload)) break;
    plan_->Injected(fault);
    MutexLock lock(mutex_);
    damaged_[key] = {fault, false};
    break;
  }
  return true;
}

std::vector<ChunkKey> FaultyMedium::UnreadDamage() const {
  MutexLock lock(mutex_);
  std::vector<ChunkKey> keys;
  for (const auto& [key, damage] : damaged_) {
    if (!damage.seen) keys.push_back(key);
  }
  return keys;
}

void FaultyMedium::ForgetDamage(const ChunkKey& key) {
  MutexLock lock(mutex_);
  const auto found = damaged_.find(key);
  if (found == damaged_.end()) return;
  if (!found->second.seen) plan_->Unread(found->second.fault);
  damaged_.erase(found);
}

}  // namespace prehoc::torture
