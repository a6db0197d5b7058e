// Mutex, MutexLock, CondVar with clang's thread-safety annotations: a lock that is not held fails to compile.
#pragma once
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>

#if defined(__clang__)
#define PREHOC_TSA(x) __attribute__((x))
#else
#define PREHOC_TSA(x)
#endif
#define PREHOC_CAPABILITY(x) PREHOC_TSA(capability(x))
#define PREHOC_SCOPED_CAPABILITY PREHOC_TSA(scoped_lockable)
#define PREHOC_GUARDED_BY(x) PREHOC_TSA(guarded_by(x))
#define PREHOC_REQUIRES(...) PREHOC_TSA(requires_capability(__VA_ARGS__))
#define PREHOC_EXCLUDES(...) PREHOC_TSA(locks_excluded(__VA_ARGS__))
#define PREHOC_ACQUIRE(...) PREHOC_TSA(acquire_capability(__VA_ARGS__))
#define PREHOC_RELEASE(...) PREHOC_TSA(release_capability(__VA_ARGS__))
#define PREHOC_NO_TSA PREHOC_TSA(no_thread_safety_analysis)

namespace prehoc {

class PREHOC_CAPABILITY("mutex") Mutex {
 public:
  void Lock() PREHOC_ACQUIRE() { mutex_.lock(); }
  void Unlock() PREHOC_RELEASE() { mutex_.unlock(); }

 private:
  friend class CondVar;
  std::mutex mutex_;
};

class PREHOC_SCOPED_CAPABILITY MutexLock {
 public:
  explicit MutexLock(Mutex& mutex) PREHOC_ACQUIRE(mutex) : mutex_(mutex) { mutex_.Lock(); }
  ~MutexLock() PREHOC_RELEASE() { mutex_.Unlock(); }
  MutexLock(const MutexLock&) = delete;
  MutexLock& operator=(const MutexLock&) = delete;

 private:
  Mutex& mutex_;
};

class CondVar {
 public:
  // Releases `mutex`, waits, takes it again. May wake without reason: loop over the condition.
  void Wait(Mutex& mutex) PREHOC_REQUIRES(mutex) PREHOC_NO_TSA {
    std::unique_lock<std::mutex> lock(mutex.mutex_, std::adopt_lock);
    cv_.wait(lock);
    lock.release();
  }
  // As Wait(), but no longer than `nanos` of the system's time.
  void WaitFor(Mutex& mutex, int64_t nanos) PREHOC_REQUIRES(mutex) PREHOC_NO_TSA {
    std::unique_lock<std::mutex> lock(mutex.mutex_, std::adopt_lock);
    cv_.wait_for(lock, std::chrono::nanoseconds(nanos));
    lock.release();
  }
  void NotifyOne() { cv_.notify_one(); }
  void NotifyAll() { cv_.notify_all(); }

 private:
  std::condition_variable cv_;
};

}  // namespace prehoc
