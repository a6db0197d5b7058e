#include "base/executor.h"

#include <atomic>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace prehoc {
namespace {
void Pause() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}
}  // namespace

Status ThreadPool::Options::Validate() const {
  if (loop_threads < 0 || loop_threads > 1024) {
    return {StatusCode::kInvalid, "loop_threads=" + std::to_string(loop_threads) + "; use 0 to 1024"};
  }
  if (job_threads < 1 || job_threads > 1024) {
    return {StatusCode::kInvalid, "job_threads=" + std::to_string(job_threads) + "; use 1 to 1024"};
  }
  if (max_queued_jobs < 1) {
    return {StatusCode::kInvalid, "max_queued_jobs=" + std::to_string(max_queued_jobs) + "; use 1 or more"};
  }
  return {};
}

// One loop at a time. A loop is an object on the caller's stack, published through `epoch`:
//   caller: take loop_mutex, fill loop, active = workers, epoch += 1 (release), wake, take indices, wait
//           until active == 0, release loop_mutex.
//   worker: sees a new epoch (acquire), takes indices until none is left, active -= 1 (release).
// A worker touches the loop only between its epoch and its decrement, so the caller may return after.
struct ThreadPool::Impl {
  Options options;
  std::vector<std::thread> workers;
  std::vector<std::thread> job_workers;

  // The loop being run; written by the caller before the epoch is published.
  Mutex loop_mutex;
  const LoopBody* body = nullptr;
  int64_t count = 0;
  std::atomic<int64_t> next{0};
  std::atomic<int> active{0};
  std::atomic<uint64_t> epoch{0};
  std::atomic<bool> stop{false};

  Mutex sleep_mutex;
  CondVar sleep_cv;
  std::atomic<int> sleepers{0};

  Mutex job_mutex;
  CondVar job_cv;
  CondVar idle_cv;
  std::deque<std::function<void()>> jobs PREHOC_GUARDED_BY(job_mutex);
  int running PREHOC_GUARDED_BY(job_mutex) = 0;
  bool closed PREHOC_GUARDED_BY(job_mutex) = false;

  void TakeIndices() {
    for (int64_t i = next.fetch_add(1, std::memory_order_relaxed); i < count;
         i = next.fetch_add(1, std::memory_order_relaxed)) {
      (*body)(i);
    }
  }

  void LoopWorker() {
    uint64_t seen = 0;
    while (true) {
      for (int spin = 0; epoch.load(std::memory_order_acquire) == seen && spin < options.spin_iterations &&
                         !stop.load(std::memory_order_relaxed);
           ++spin) {
        Pause();
      }
      if (epoch.load(std::memory_order_acquire) == seen) {
        MutexLock lock(sleep_mutex);
        sleepers.fetch_add(1, std::memory_order_seq_cst);
        while (epoch.load(std::memory_order_seq_cst) == seen && !stop.load(std::memory_order_relaxed)) {
          sleep_cv.Wait(sleep_mutex);
        }
        sleepers.fetch_sub(1, std::memory_order_relaxed);
      }
      if (stop.load(std::memory_order_relaxed)) return;
      seen = epoch.load(std::memory_order_acquire);
      TakeIndices();
      active.fetch_sub(1, std::memory_order_release);
    }
  }

  void JobWorker() {
    while (true) {
      std::function<void()> job;
      {
        MutexLock lock(job_mutex);
        while (jobs.empty() && !closed) job_cv.Wait(job_mutex);
        if (jobs.empty()) return;
        job = std::move(jobs.front());
        jobs.pop_front();
        ++running;
      }
      job();
      job = nullptr;
      MutexLock lock(job_mutex);
      --running;
      if (jobs.empty() && running == 0) idle_cv.NotifyAll();
    }
  }
};

ThreadPool::ThreadPool(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {
  for (int i = 1; i < impl_->options.loop_threads; ++i) {
    impl_->workers.emplace_back([impl = impl_.get()] { impl->LoopWorker(); });
  }
  for (int i = 0; i < impl_->options.job_threads; ++i) {
    impl_->job_workers.emplace_back([impl = impl_.get()] { impl->JobWorker(); });
  }
}

Result<std::unique_ptr<ThreadPool>> ThreadPool::Create(const Options& options) {
  PREHOC_RETURN_IF_ERROR(options.Validate().WithContext("ThreadPool"));
  auto impl = std::make_unique<Impl>();
  impl->options = options;
  if (options.loop_threads == 0) {
    impl->options.loop_threads = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  }
  return std::unique_ptr<ThreadPool>(new ThreadPool(std::move(impl)));
}

ThreadPool::~ThreadPool() {
  {
    MutexLock lock(impl_->job_mutex);
    impl_->closed = true;
    impl_->job_cv.NotifyAll();
  }
  for (std::thread& thread : impl_->job_workers) thread.join();
  {
    MutexLock lock(impl_->sleep_mutex);
    impl_->stop.store(true, std::memory_order_relaxed);
    impl_->sleep_cv.NotifyAll();
  }
  for (std::thread& thread : impl_->workers) thread.join();
}

Status ThreadPool::DoPost(std::function<void()> job) {
  MutexLock lock(impl_->job_mutex);
  if (impl_->closed || static_cast<int>(impl_->jobs.size()) >= impl_->options.max_queued_jobs) {
    return {StatusCode::kBusy, "job queue full (" + std::to_string(impl_->options.max_queued_jobs) + ")"};
  }
  impl_->jobs.push_back(std::move(job));
  impl_->job_cv.NotifyOne();
  return {};
}

void ThreadPool::DoParallelFor(int64_t count, LoopBody body) {
  Impl& impl = *impl_;
  if (impl.workers.empty()) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  MutexLock lock(impl.loop_mutex);
  impl.body = &body;
  impl.count = count;
  impl.next.store(0, std::memory_order_relaxed);
  impl.active.store(static_cast<int>(impl.workers.size()), std::memory_order_relaxed);
  impl.epoch.fetch_add(1, std::memory_order_seq_cst);
  if (impl.sleepers.load(std::memory_order_seq_cst) > 0) {
    MutexLock sleep_lock(impl.sleep_mutex);
    impl.sleep_cv.NotifyAll();
  }
  impl.TakeIndices();
  int spins = 0;
  while (impl.active.load(std::memory_order_acquire) > 0) {
    Pause();
    // With more threads than CPUs a spinning caller would keep the worker from its core.
    if (++spins > 2000) std::this_thread::yield();
  }
}

void ThreadPool::DoDrain() {
  MutexLock lock(impl_->job_mutex);
  while (!impl_->jobs.empty() || impl_->running > 0) impl_->idle_cv.Wait(impl_->job_mutex);
}

int ThreadPool::DoConcurrency() const { return static_cast<int>(impl_->workers.size()) + 1; }

size_t ManualExecutor::queued() const {
  MutexLock lock(mutex_);
  return jobs_.size();
}

bool ManualExecutor::RunNext() { return RunAt(0); }

bool ManualExecutor::RunAt(size_t index) {
  std::function<void()> job;
  {
    MutexLock lock(mutex_);
    if (index >= jobs_.size()) return false;
    job = std::move(jobs_[index]);
    jobs_.erase(jobs_.begin() + static_cast<std::ptrdiff_t>(index));
  }
  job();
  return true;
}

Status ManualExecutor::DoPost(std::function<void()> job) {
  MutexLock lock(mutex_);
  if (jobs_.size() >= max_queued_) return {StatusCode::kBusy, "job queue full"};
  jobs_.push_back(std::move(job));
  return {};
}

void ManualExecutor::DoParallelFor(int64_t count, LoopBody body) {
  for (int64_t i = 0; i < count; ++i) body(i);
}

void ManualExecutor::DoDrain() {
  while (RunNext()) {
  }
}

}  // namespace prehoc
