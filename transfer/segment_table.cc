#include "transfer/segment_table.h"

#include <algorithm>
#include <unordered_set>
#include <utility>

#include "base/check.h"

namespace prehoc {

std::optional<SegmentTable::Place> SegmentTable::PlaceLocked(const Entry& entry) const {
  Place place{entry.number, entry.segment, entry.block_offset, nullptr};
  if (const auto segment = segments_.find(entry.segment); segment != segments_.end()) place.file = segment->second.file;
  return place;
}

std::optional<SegmentTable::Place> SegmentTable::Find(const ChunkKey& key) const {
  MutexLock lock(mutex_);
  const auto found = index_.find(key);
  return found == index_.end() ? std::nullopt : PlaceLocked(found->second);
}

std::optional<SegmentTable::Place> SegmentTable::FindToRead(const ChunkKey& key) {
  MutexLock lock(mutex_);
  const auto found = index_.find(key);
  if (found == index_.end()) return std::nullopt;
  found->second.read = true;
  return PlaceLocked(found->second);
}

std::optional<uint64_t> SegmentTable::Erase(const ChunkKey& key, std::optional<uint64_t> number) {
  MutexLock lock(mutex_);
  const auto found = index_.find(key);
  if (found == index_.end() || (number && found->second.number != *number)) return std::nullopt;
  const uint64_t erased = found->second.number;
  index_.erase(found);
  return erased;
}

void SegmentTable::BeginWrite(uint64_t number, uint64_t bytes) {
  MutexLock lock(mutex_);
  pending_.push_back({number, bytes});
  totals_.pending_bytes += bytes;
  UpdatePeakLocked();
}

void SegmentTable::AbortWrite(uint64_t number) {
  MutexLock lock(mutex_);
  // Writes come one after the other, so it is the last one, unless a flush passed its number.
  if (pending_.empty() || pending_.back().number != number) return;
  totals_.pending_bytes -= pending_.back().bytes;
  pending_.pop_back();
}

void SegmentTable::Publish(const ChunkKey& key, uint64_t number) {
  MutexLock lock(mutex_);
  Entry& entry = index_[key];
  entry = {number, 0, 0, false};
  // Its file may be there already: the newest ones know.
  for (auto segment = segments_.rbegin(); segment != segments_.rend(); ++segment) {
    const auto& records = segment->second.records;
    const auto record = std::lower_bound(records.begin(), records.end(), number,
                                         [](const ListedRecord& r, uint64_t n) { return r.number < n; });
    if (record != records.end() && record->number == number) {
      entry.segment = segment->first;
      entry.block_offset = record->block_offset;
    }
    if (!records.empty() && records.front().number <= number) break;
  }
}

void SegmentTable::AddSegment(uint64_t segment, std::string name, uint64_t bytes, uint64_t last_number,
                              SegmentKeys keys) {
  MutexLock lock(mutex_);
  while (!pending_.empty() && pending_.front().number <= last_number) {
    totals_.pending_bytes -= pending_.front().bytes;
    pending_.pop_front();
  }
  for (const ListedRecord& record : keys.records) {
    if (!IsLiveLocked(record)) continue;
    Entry& entry = index_.find(record.key)->second;
    entry.segment = segment;
    entry.block_offset = record.block_offset;
  }
  segments_.emplace(segment, Segment{std::move(name), bytes, 0, std::move(keys.records), nullptr});
  totals_.segment_bytes += bytes;
  UpdatePeakLocked();
}

void SegmentTable::Load(std::vector<Found> files) {
  MutexLock lock(mutex_);
  std::unordered_set<uint64_t> dead;
  for (Found& file : files) {
    for (const ListedRecord& record : file.keys.records) {
      Entry& entry = index_[record.key];
      if (record.number > entry.number) entry = {record.number, file.segment, record.block_offset, false};
    }
    dead.insert(file.keys.tombstones.begin(), file.keys.tombstones.end());
    totals_.segment_bytes += file.bytes;
    segments_.emplace(file.segment,
                      Segment{std::move(file.name), file.bytes, 0, std::move(file.keys.records), nullptr});
  }
  std::erase_if(index_, [&](const auto& item) { return dead.contains(item.second.number); });
  UpdatePeakLocked();
}

std::optional<SegmentTable::Oldest> SegmentTable::FindOldest(uint64_t most) const {
  MutexLock lock(mutex_);
  if (segments_.empty()) return std::nullopt;
  const auto& [number, segment] = *segments_.begin();
  Oldest oldest{number, segment.name, {}};
  for (const ListedRecord& record : segment.records) {
    if (segment.moved + oldest.wanted.size() >= most) break;
    if (IsLiveLocked(record) && index_.find(record.key)->second.read) oldest.wanted.push_back(record);
  }
  return oldest;
}

void SegmentTable::CountMoved(uint64_t segment) {
  MutexLock lock(mutex_);
  const auto found = segments_.find(segment);
  PREHOC_CHECK(found != segments_.end());
  ++found->second.moved;
}

SegmentTable::Dropped SegmentTable::DropOldest() {
  MutexLock lock(mutex_);
  PREHOC_CHECK(!segments_.empty());
  const auto oldest = segments_.begin();
  Dropped dropped{oldest->second.bytes, 0, std::move(oldest->second.file)};
  for (const ListedRecord& record : oldest->second.records) {
    if (!IsLiveLocked(record)) continue;
    index_.erase(record.key);
    ++dropped.records;
  }
  segments_.erase(oldest);
  totals_.segment_bytes -= dropped.bytes;
  totals_.leaving_bytes += dropped.bytes;
  return dropped;
}

void SegmentTable::Left(uint64_t bytes) {
  MutexLock lock(mutex_);
  totals_.leaving_bytes -= bytes;
}

void SegmentTable::KeepFile(uint64_t segment, std::shared_ptr<const DirectFile> file) {
  std::shared_ptr<const DirectFile> closed;  // after the lock is gone
  MutexLock lock(mutex_);
  const auto found = segments_.find(segment);
  if (found == segments_.end() || found->second.file != nullptr) return;
  found->second.file = std::move(file);
  open_files_.push_back(segment);
  while (open_files_.size() > max_open_files_) {
    const auto old = segments_.find(open_files_.front());
    if (old != segments_.end()) closed = std::move(old->second.file);
    open_files_.pop_front();
  }
}

std::vector<SegmentTable::Listed> SegmentTable::ListRecords() const {
  std::vector<Listed> records;
  {
    MutexLock lock(mutex_);
    records.reserve(index_.size());
    for (const auto& [key, entry] : index_) {
      if (entry.segment != 0) records.push_back({key, entry.number, entry.segment});
    }
  }
  std::sort(records.begin(), records.end(), [](const Listed& a, const Listed& b) { return a.number < b.number; });
  return records;
}

std::vector<SegmentTable::File> SegmentTable::ListFiles() const {
  MutexLock lock(mutex_);
  std::vector<File> files;
  for (const auto& [number, segment] : segments_) files.push_back({number, segment.name, segment.bytes});
  return files;
}

SegmentTable::Totals SegmentTable::totals() const {
  MutexLock lock(mutex_);
  Totals totals = totals_;
  totals.records = index_.size();
  totals.segments = segments_.size();
  return totals;
}

void SegmentTable::UpdatePeakLocked() { totals_.peak_bytes = std::max(totals_.peak_bytes, totals_.disk_bytes()); }

bool SegmentTable::IsLiveLocked(const ListedRecord& record) const {
  const auto found = index_.find(record.key);
  return found != index_.end() && found->second.number == record.number;
}

Status SegmentTable::CheckInvariants() const {
  MutexLock lock(mutex_);
  const auto bad = [](const std::string& what) { return Status(StatusCode::kCorrupt, "segment table: " + what); };
  uint64_t segment_bytes = 0, pending_bytes = 0, in_segments = 0;
  for (const auto& [number, segment] : segments_) {
    segment_bytes += segment.bytes;
    for (const ListedRecord& record : segment.records) {
      if (!IsLiveLocked(record)) continue;
      ++in_segments;
      if (index_.find(record.key)->second.segment != number) {
        return bad("chunk " + record.key.ToString() + " is not where its file is");
      }
    }
  }
  for (const Pending& pending : pending_) pending_bytes += pending.bytes;
  if (segment_bytes != totals_.segment_bytes) return bad("bytes of files are miscounted");
  if (pending_bytes != totals_.pending_bytes) return bad("bytes of memtables are miscounted");
  if (!std::is_sorted(pending_.begin(), pending_.end(), [](auto& a, auto& b) { return a.number < b.number; })) {
    return bad("writes are out of order");
  }
  const auto filed = std::count_if(index_.begin(), index_.end(), [](const auto& i) { return i.second.segment != 0; });
  if (static_cast<uint64_t>(filed) != in_segments) return bad("records point to files that do not list them");
  return {};
}

}  // namespace prehoc
