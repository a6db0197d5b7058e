// The thread seam: background jobs, and parallel loops that the caller takes part in.
#pragma once
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <type_traits>
#include <utility>

#include "base/mutex.h"
#include "base/result.h"
#include "base/status.h"

namespace prehoc {

// A non-owning reference to a callable `void(int64_t)`; costs no allocation. Must not outlive the callable.
class LoopBody {
 public:
  template <class Fn>
    requires(!std::is_same_v<std::remove_cvref_t<Fn>, LoopBody>)
  LoopBody(const Fn& fn)  // NOLINT: implicit on purpose, so that lambdas pass
      : object_(&fn), call_([](const void* object, int64_t i) { (*static_cast<const Fn*>(object))(i); }) {}
  void operator()(int64_t i) const { call_(object_, i); }

 private:
  const void* object_;
  void (*call_)(const void*, int64_t);
};

class Executor {
 public:
  virtual ~Executor() = default;

  // Queues `job`; it runs once, on some thread, in any order with others. Jobs must not throw.
  // Returns kBusy if the queue is full or closed, kOutOfSpace if there is no memory for it: the job was not taken.
  template <class Job>
  Status Post(Job&& job) {
    return WithinMemory([&] { return DoPost(std::function<void()>(std::forward<Job>(job))); });
  }

  // Runs body(0) .. body(count - 1), in any order and possibly at once; returns when all are done. The
  // caller's thread works too. Safe from any thread, from inside a body as well. Bodies throw nothing but std::bad_alloc: it
  // comes out of this call, when all bodies that had begun have ended; others may not have run.
  void ParallelFor(int64_t count, LoopBody body) {
    if (count == 1) body(0);
    if (count > 1) DoParallelFor(count, body);
  }

  // Waits until every job posted before this call has run, and what these posted in turn; longer if others go on
  // posting. Not from inside a job.
  void Drain() { DoDrain(); }

  // Threads that a loop may use, the caller's included; at least 1.
  int concurrency() const { return DoConcurrency(); }

 private:
  virtual Status DoPost(std::function<void()> job) = 0;
  virtual void DoParallelFor(int64_t count, LoopBody body) = 0;
  virtual void DoDrain() = 0;
  virtual int DoConcurrency() const = 0;
};

// Real threads. Loop workers spin for a short while after a loop (a decode step has hundreds of them, a few
// microseconds apart), giving way to other threads now and then, and sleep after that. A loop waits for nobody who has
// not begun a body of it: where the workers' CPUs are taken, the caller does the work. While one loop runs, others (of
// other threads, or from inside a body) run on their caller alone. Jobs have threads of their own and never delay a
// loop.
class ThreadPool final : public Executor {
 public:
  struct Options {
    int loop_threads = 0;      // threads of a loop, the caller's included; 0 = one per CPU
    int job_threads = 1;       // background threads; at least 1
    int max_queued_jobs = 4096;
    int spin_iterations = 20000;  // pauses (about 50 ns each) before a loop worker sleeps; 0 = sleep at once
    Status Validate() const;
  };
  static Result<std::unique_ptr<ThreadPool>> Create(const Options& options);
  ~ThreadPool() override;  // runs what is queued, then joins

 private:
  struct Impl;
  explicit ThreadPool(std::unique_ptr<Impl> impl);
  Status DoPost(std::function<void()> job) override;
  void DoParallelFor(int64_t count, LoopBody body) override;
  void DoDrain() override;
  int DoConcurrency() const override;
  std::unique_ptr<Impl> impl_;
};

// No threads: a job runs when the test says so; loops run in order on the caller.
class ManualExecutor final : public Executor {
 public:
  explicit ManualExecutor(size_t max_queued_jobs = SIZE_MAX) : max_queued_(max_queued_jobs) {}
  size_t queued() const;
  bool RunNext();              // the job posted longest ago; false if there is none
  bool RunAt(size_t index);    // the index-th queued job: any order is a legal one

 private:
  Status DoPost(std::function<void()> job) override;
  void DoParallelFor(int64_t count, LoopBody body) override;
  void DoDrain() override;
  int DoConcurrency() const override { return 1; }

  const size_t max_queued_;
  mutable Mutex mutex_;
  std::deque<std::function<void()>> jobs_ PREHOC_GUARDED_BY(mutex_);
};

}  // namespace prehoc
