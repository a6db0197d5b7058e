// RocksDB's file system, as a process sees it that is killed in the middle of an operation.
#pragma once
#include <rocksdb/env.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <memory>
#include <string>

namespace prehoc {

// Writes, syncs, renames, deletions and new files are counted; within the n-th of them this process ends by SIGKILL. Of a write half
// has happened then.
class KillingEnv final : public rocksdb::EnvWrapper {
 public:
  explicit KillingEnv(int64_t n) : EnvWrapper(rocksdb::Env::Default()), left_(n) {}

  rocksdb::Status NewWritableFile(const std::string& name, std::unique_ptr<rocksdb::WritableFile>* file,
                                  const rocksdb::EnvOptions& options) override {
    if (IsTheOne()) Die();
    const rocksdb::Status status = target()->NewWritableFile(name, file, options);
    if (status.ok()) file->reset(new File(this, std::move(*file)));
    return status;
  }
  rocksdb::Status NewDirectory(const std::string& name, std::unique_ptr<rocksdb::Directory>* directory) override {
    const rocksdb::Status status = target()->NewDirectory(name, directory);
    if (status.ok()) directory->reset(new Names(this, std::move(*directory)));
    return status;
  }
  rocksdb::Status RenameFile(const std::string& from, const std::string& to) override {
    if (IsTheOne()) Die();
    return target()->RenameFile(from, to);
  }
  rocksdb::Status DeleteFile(const std::string& name) override {
    if (IsTheOne()) Die();
    return target()->DeleteFile(name);
  }

 private:
  class File final : public rocksdb::WritableFileWrapper {
   public:
    File(KillingEnv* env, std::unique_ptr<rocksdb::WritableFile> base) : WritableFileWrapper(base.get()), env_(env), base_(std::move(base)) {}
    rocksdb::Status Append(const rocksdb::Slice& data) override {
      if (env_->IsTheOne()) Die(base_->Append(Half(data)));
      return base_->Append(data);
    }
    rocksdb::Status Append(const rocksdb::Slice& data, const rocksdb::DataVerificationInfo& info) override {
      if (env_->IsTheOne()) Die(base_->Append(Half(data)));
      return base_->Append(data, info);
    }
    rocksdb::Status PositionedAppend(const rocksdb::Slice& data, uint64_t offset) override {
      if (env_->IsTheOne()) Die(base_->PositionedAppend(Half(data), offset));
      return base_->PositionedAppend(data, offset);
    }
    rocksdb::Status PositionedAppend(const rocksdb::Slice& data, uint64_t offset, const rocksdb::DataVerificationInfo& info) override {
      if (env_->IsTheOne()) Die(base_->PositionedAppend(Half(data), offset));
      return base_->PositionedAppend(data, offset, info);
    }
    rocksdb::Status Sync() override {
      if (env_->IsTheOne()) Die();
      return base_->Sync();
    }
    rocksdb::Status Fsync() override {
      if (env_->IsTheOne()) Die();
      return base_->Fsync();
    }

   private:
    // Direct I/O takes whole pages.
    rocksdb::Slice Half(const rocksdb::Slice& data) const {
      return {data.data(), base_->use_direct_io() ? data.size() / 2 / 4096 * 4096 : data.size() / 2};
    }
    KillingEnv* const env_;
    const std::unique_ptr<rocksdb::WritableFile> base_;
  };

  class Names final : public rocksdb::Directory {
   public:
    Names(KillingEnv* env, std::unique_ptr<rocksdb::Directory> base) : env_(env), base_(std::move(base)) {}
    rocksdb::Status Fsync() override {
      if (env_->IsTheOne()) Die();
      return base_->Fsync();
    }
    rocksdb::Status Close() override { return base_->Close(); }

   private:
    KillingEnv* const env_;
    const std::unique_ptr<rocksdb::Directory> base_;
  };

  bool IsTheOne() { return left_.fetch_sub(1, std::memory_order_relaxed) == 1; }
  [[noreturn]] static void Die(const rocksdb::Status& = {}) {
    ::kill(::getpid(), SIGKILL);
    while (true) ::pause();
  }

  std::atomic<int64_t> left_;
};

}  // namespace prehoc
