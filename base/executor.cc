#include "base/executor.h"

#include <algorithm>
#include <atomic>
#include <system_error>
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

// Between two looks at a variable that another thread is about to change. Now and then gives the CPU to whoever else
// wants it: with more threads than CPUs, that may be the very thread that is waited for.
void Relax(int spin) { spin % 64 == 63 ? std::this_thread::yield() : Pause(); }

constexpr int kLoopGap = 256;      // pauses of a worker before it thinks of others: the next loop is about to come
constexpr int kPatientSpins = 64;  // of a caller whose workers have their last bodies in hand
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
  if (spin_iterations < 0) {
    return {StatusCode::kInvalid, "spin_iterations=" + std::to_string(spin_iterations) + "; use 0 or more"};
  }
  return {};
}

// One loop at a time, which is an object of its caller. Its life:
//   idle --(caller: busy = true)--> filled --(remaining = count, release)--> running --(done == count)--> idle
// An index is taken by whoever lowers `remaining` from i + 1 to i (acquire). That alone is the right to read `body`:
// the loop cannot end before the taker has raised `done` (release), and the caller waits for that (acquire). A worker
// that comes late finds `remaining` at 0 and has touched nothing. Each of the atomics has a cache line of its own.
struct ThreadPool::Impl {
  Options options;
  std::vector<std::thread> workers;
  std::vector<std::thread> job_workers;

  alignas(64) std::atomic<bool> busy{false};
  const LoopBody* body = nullptr;  // of the running loop, as the next
  int64_t count = 0;
  alignas(64) std::atomic<int64_t> remaining{0};
  alignas(64) std::atomic<int64_t> done{0};
  std::atomic<bool> caller_sleeps{false};
  std::atomic<bool> failed{false};  // a body had no memory; the rest of the loop is passed over

  // Who found nothing to do for a while sleeps here: workers until there is work, a caller until the last body is done.
  alignas(64) std::atomic<int> sleepers{0};
  std::atomic<bool> stop{false};
  Mutex sleep_mutex;
  CondVar work_cv;
  CondVar done_cv;

  Mutex job_mutex;
  CondVar job_cv;
  CondVar idle_cv;
  std::deque<std::function<void()>> jobs PREHOC_GUARDED_BY(job_mutex);
  int running PREHOC_GUARDED_BY(job_mutex) = 0;
  bool closed PREHOC_GUARDED_BY(job_mutex) = false;

  // Takes bodies until none is left and runs them; returns how many. Whoever has not counted what it took keeps
  // the loop from ending, so all of them are of one loop.
  int64_t TakeBodies() {
    int64_t taken = 0;
    int64_t left = remaining.load(std::memory_order_relaxed);
    while (left > 0) {
      if (!remaining.compare_exchange_weak(left, left - 1, std::memory_order_acquire, std::memory_order_relaxed)) {
        continue;
      }
      try {
        if (!failed.load(std::memory_order_relaxed)) (*body)(count - left);
      } catch (const std::bad_alloc&) {
        failed.store(true, std::memory_order_relaxed);  // counted in `done` like any other, and so seen by the caller
      }
      ++taken;
      left = remaining.load(std::memory_order_relaxed);
    }
    return taken;
  }

  void LoopWorker() {
    while (WaitForWork()) {
      const int64_t taken = TakeBodies();
      if (taken == 0) continue;
      done.fetch_add(taken, std::memory_order_seq_cst);
      if (caller_sleeps.load(std::memory_order_seq_cst)) {
        MutexLock lock(sleep_mutex);
        done_cv.NotifyAll();
      }
    }
  }

  // False when the pool ends.
  bool WaitForWork() {
    for (int spin = 0; spin < options.spin_iterations; ++spin) {
      if (remaining.load(std::memory_order_relaxed) > 0) return true;
      if (stop.load(std::memory_order_relaxed)) return false;
      spin < kLoopGap ? Pause() : Relax(spin);
    }
    MutexLock lock(sleep_mutex);
    // Either the caller sees us asleep, or we see its work: both are sequentially consistent.
    sleepers.fetch_add(1, std::memory_order_seq_cst);
    while (remaining.load(std::memory_order_seq_cst) == 0 && !stop.load(std::memory_order_relaxed)) {
      work_cv.Wait(sleep_mutex);
    }
    sleepers.fetch_sub(1, std::memory_order_relaxed);
    return !stop.load(std::memory_order_relaxed);
  }

  void WakeWorkers(int64_t most) {
    if (sleepers.load(std::memory_order_seq_cst) == 0) return;
    MutexLock lock(sleep_mutex);
    for (int64_t i = std::min<int64_t>(most, sleepers.load(std::memory_order_relaxed)); i > 0; --i) work_cv.NotifyOne();
  }

  // Returns when workers have done `bodies` of them.
  void WaitForOthers(int64_t bodies) {
    for (int spin = 0; spin < options.spin_iterations || spin < kPatientSpins; ++spin) {
      if (done.load(std::memory_order_acquire) == bodies) return;
      Relax(spin);
    }
    caller_sleeps.store(true, std::memory_order_seq_cst);
    {
      MutexLock lock(sleep_mutex);
      while (done.load(std::memory_order_seq_cst) != bodies) done_cv.Wait(sleep_mutex);
    }
    caller_sleeps.store(false, std::memory_order_relaxed);
  }

  void StartThreads() {
    for (int i = 1; i < options.loop_threads; ++i) workers.emplace_back([this] { LoopWorker(); });
    for (int i = 0; i < options.job_threads; ++i) job_workers.emplace_back([this] { JobWorker(); });
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

ThreadPool::ThreadPool(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

Result<std::unique_ptr<ThreadPool>> ThreadPool::Create(const Options& options) {
  PREHOC_RETURN_IF_ERROR(options.Validate().WithContext("ThreadPool"));
  auto impl = std::make_unique<Impl>();
  impl->options = options;
  if (options.loop_threads == 0) {
    impl->options.loop_threads = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  }
  std::unique_ptr<ThreadPool> pool(new ThreadPool(std::move(impl)));
  try {
    pool->impl_->StartThreads();
  } catch (const std::system_error& error) {  // the pool's end joins those that were started
    return {StatusCode::kOutOfSpace, std::string("ThreadPool: the system gives no more threads: ") + error.what() +
                                         "; lower loop_threads or job_threads"};
  } catch (const std::bad_alloc&) {
    return OutOfMemory();
  }
  return pool;
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
    impl_->work_cv.NotifyAll();
  }
  for (std::thread& thread : impl_->workers) thread.join();
}

Status ThreadPool::DoPost(std::function<void()> job) {
  MutexLock lock(impl_->job_mutex);
  if (impl_->closed) return {StatusCode::kBusy, "the thread pool is ending and takes no more jobs"};
  if (static_cast<int>(impl_->jobs.size()) >= impl_->options.max_queued_jobs) {
    return {StatusCode::kBusy, "job queue full (" + std::to_string(impl_->options.max_queued_jobs) + ")"};
  }
  impl_->jobs.push_back(std::move(job));
  impl_->job_cv.NotifyOne();
  return {};
}

void ThreadPool::DoParallelFor(int64_t count, LoopBody body) {
  Impl& impl = *impl_;
  if (impl.workers.empty() || impl.busy.exchange(true, std::memory_order_acquire)) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  impl.body = &body;
  impl.count = count;
  impl.done.store(0, std::memory_order_relaxed);
  impl.remaining.store(count, std::memory_order_seq_cst);
  impl.WakeWorkers(count - 1);
  impl.WaitForOthers(count - impl.TakeBodies());
  const bool failed = impl.failed.exchange(false, std::memory_order_relaxed);
  impl.busy.store(false, std::memory_order_release);
  if (failed) throw std::bad_alloc();
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
