// RocksDB's file system, as a disk whose power fails leaves it: what was not synced is gone, or partly there.
#pragma once
#include <rocksdb/env.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "base/mutex.h"
#include "base/rng.h"

namespace prehoc {

// Writes, syncs, renames and deletions of one directory are counted; after PowerFailsAfter(n) of them nothing reaches the files any more
// (and says so). LoseUnsynced() then leaves of each file what was synced and a part of the rest, torn at any byte, and
// takes back the last of the new names, renames and deletions that no sync of the directory covered: how much is decided by the
// seed. For one database at a time.
class UnsyncedEnv final : public rocksdb::EnvWrapper {
 public:
  // `limbo`: a directory on the same file system, where deleted files wait for the directory's sync.
  UnsyncedEnv(std::string limbo, uint64_t seed) : EnvWrapper(rocksdb::Env::Default()), limbo_(std::move(limbo)), rng_(seed) {
    std::filesystem::create_directories(limbo_);
  }

  void PowerFailsAfter(int64_t operations) {
    MutexLock lock(mutex_);
    left_ = operations;
  }
  // A disk that says it has synced and has not: for the test of the test.
  void LieAboutSyncs() {
    MutexLock lock(mutex_);
    lies_ = true;
  }
  int64_t operations() const {
    MutexLock lock(mutex_);
    return done_;
  }

  // The database is closed. Counting begins anew, with power.
  void LoseUnsynced() {
    MutexLock lock(mutex_);
    namespace fs = std::filesystem;
    // A journal keeps the order of changes of a directory, which RocksDB relies on: all from some point on are lost.
    const auto kept = entries_.begin() + static_cast<std::ptrdiff_t>(rng_.Int(0, static_cast<int64_t>(entries_.size())));
    for (auto entry = entries_.end(); entry != kept;) {
      --entry;
      if (entry->kind == Entry::Kind::kCreated) fs::remove(entry->name);
      if (entry->kind == Entry::Kind::kDeleted && !fs::exists(entry->name)) fs::rename(entry->limbo, entry->name);
      if (entry->kind == Entry::Kind::kReplaced) {
        fs::remove(entry->name);
        if (entry->before) std::ofstream(entry->name, std::ios::binary) << *entry->before;
      }
    }
    for (const auto& [name, synced] : synced_) {
      std::error_code error;
      const uint64_t size = fs::file_size(name, error);
      if (error || size <= synced) continue;
      const auto unsynced = static_cast<int64_t>(size - synced);
      fs::resize_file(name, synced + static_cast<uint64_t>(rng_.Chance(0.5) ? 0 : rng_.Int(0, unsynced)));
    }
    for (const auto& file : fs::directory_iterator(limbo_)) fs::remove(file.path());
    entries_.clear();
    synced_.clear();
    left_ = INT64_MAX;
  }

  rocksdb::Status NewWritableFile(const std::string& name, std::unique_ptr<rocksdb::WritableFile>* file,
                                  const rocksdb::EnvOptions& options) override {
    if (!Happens()) return NoPower();
    const bool fresh = !std::filesystem::exists(name);
    rocksdb::Status status = target()->NewWritableFile(name, file, options);
    if (!status.ok()) return status;
    MutexLock lock(mutex_);
    if (fresh) entries_.push_back({Entry::Kind::kCreated, name, {}, {}});
    synced_[name] = 0;
    file->reset(new File(this, name, std::move(*file)));
    return status;
  }
  void SleepForMicroseconds(int) override {}  // after a flush that failed, before it would try again
  rocksdb::Status ReopenWritableFile(const std::string&, std::unique_ptr<rocksdb::WritableFile>*, const rocksdb::EnvOptions&) override {
    return rocksdb::Status::NotSupported("the store reopens no file");
  }
  rocksdb::Status ReuseWritableFile(const std::string&, const std::string&, std::unique_ptr<rocksdb::WritableFile>*,
                                    const rocksdb::EnvOptions&) override {
    return rocksdb::Status::NotSupported("the store reuses no file");
  }
  rocksdb::Status NewDirectory(const std::string& name, std::unique_ptr<rocksdb::Directory>* directory) override {
    const rocksdb::Status status = target()->NewDirectory(name, directory);
    if (status.ok()) directory->reset(new Names(this, std::move(*directory)));
    return status;
  }
  rocksdb::Status RenameFile(const std::string& from, const std::string& to) override {
    if (!Happens()) return NoPower();
    MutexLock lock(mutex_);
    Entry entry{Entry::Kind::kReplaced, to, {}, {}};
    if (std::ifstream before(to, std::ios::binary); before) entry.before.emplace(std::istreambuf_iterator<char>(before), std::istreambuf_iterator<char>());
    const rocksdb::Status status = target()->RenameFile(from, to);
    if (!status.ok()) return status;
    synced_[to] = synced_[from];
    synced_.erase(from);
    std::erase_if(entries_, [&](const Entry& other) { return other.name == from; });
    entries_.push_back(std::move(entry));
    return status;
  }
  rocksdb::Status DeleteFile(const std::string& name) override {
    if (!Happens()) return NoPower();
    MutexLock lock(mutex_);
    const std::string limbo = limbo_ + "/" + std::to_string(++deleted_);
    std::error_code error;
    std::filesystem::create_hard_link(name, limbo, error);
    const rocksdb::Status status = target()->DeleteFile(name);
    if (status.ok() && !error) entries_.push_back({Entry::Kind::kDeleted, name, limbo, {}});
    return status;
  }

 private:
  struct Entry {
    enum class Kind : uint8_t { kCreated, kDeleted, kReplaced } kind;
    std::string name, limbo;
    std::optional<std::string> before;
  };

  class File final : public rocksdb::WritableFileWrapper {
   public:
    File(UnsyncedEnv* env, std::string name, std::unique_ptr<rocksdb::WritableFile> base)
        : WritableFileWrapper(base.get()), env_(env), name_(std::move(name)), base_(std::move(base)) {}
    rocksdb::Status Append(const rocksdb::Slice& data) override { return env_->Happens() ? base_->Append(data) : NoPower(); }
    rocksdb::Status Append(const rocksdb::Slice& data, const rocksdb::DataVerificationInfo& info) override {
      return env_->Happens() ? base_->Append(data, info) : NoPower();
    }
    rocksdb::Status PositionedAppend(const rocksdb::Slice& data, uint64_t offset) override {
      return env_->Happens() ? base_->PositionedAppend(data, offset) : NoPower();
    }
    rocksdb::Status PositionedAppend(const rocksdb::Slice& data, uint64_t offset, const rocksdb::DataVerificationInfo& info) override {
      return env_->Happens() ? base_->PositionedAppend(data, offset, info) : NoPower();
    }
    rocksdb::Status Truncate(uint64_t size) override { return env_->Happens() ? base_->Truncate(size) : NoPower(); }
    // The page cache stands for the disk: that a sync was asked for is all that counts.
    rocksdb::Status Sync() override {
      if (!env_->Happens()) return NoPower();
      env_->FileSynced(name_);
      return rocksdb::Status::OK();
    }
    rocksdb::Status Fsync() override { return Sync(); }

   private:
    UnsyncedEnv* const env_;
    const std::string name_;
    const std::unique_ptr<rocksdb::WritableFile> base_;
  };

  class Names final : public rocksdb::Directory {
   public:
    Names(UnsyncedEnv* env, std::unique_ptr<rocksdb::Directory> base) : env_(env), base_(std::move(base)) {}
    rocksdb::Status Fsync() override {
      if (!env_->Happens()) return NoPower();
      env_->NamesSynced();
      return rocksdb::Status::OK();
    }
    rocksdb::Status Close() override { return base_->Close(); }

   private:
    UnsyncedEnv* const env_;
    const std::unique_ptr<rocksdb::Directory> base_;
  };

  static rocksdb::Status NoPower() { return rocksdb::Status::IOError("the power has failed"); }
  bool Happens() {
    MutexLock lock(mutex_);
    if (left_ == 0) return false;
    --left_;
    ++done_;
    return true;
  }
  void FileSynced(const std::string& name) {
    MutexLock lock(mutex_);
    if (lies_) return;
    std::error_code error;
    const uint64_t size = std::filesystem::file_size(name, error);
    if (!error) synced_[name] = size;
  }
  void NamesSynced() {
    MutexLock lock(mutex_);
    if (lies_) return;
    for (const Entry& entry : entries_) {
      if (!entry.limbo.empty()) std::filesystem::remove(entry.limbo);
    }
    entries_.clear();
  }

  const std::string limbo_;
  mutable Mutex mutex_;
  Rng rng_ PREHOC_GUARDED_BY(mutex_);
  int64_t left_ PREHOC_GUARDED_BY(mutex_) = INT64_MAX;
  int64_t done_ PREHOC_GUARDED_BY(mutex_) = 0;
  bool lies_ PREHOC_GUARDED_BY(mutex_) = false;
  int64_t deleted_ PREHOC_GUARDED_BY(mutex_) = 0;
  std::map<std::string, uint64_t> synced_ PREHOC_GUARDED_BY(mutex_);  // bytes, of files written here
  std::vector<Entry> entries_ PREHOC_GUARDED_BY(mutex_);              // of the directory, since it was synced
};

}  // namespace prehoc
