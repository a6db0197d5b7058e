// HostTier in random use: against a model, with a store that fails at random, and from many threads. The bytes of a block
// follow from its number, so that a wrong one is noticed wherever it comes from.
#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <list>
#include <map>
#include <set>
#include <thread>
#include <vector>

#include "cache/host_tier.h"
#include "tests/cache/host_tier_world.h"
#include "tests/support/seeded_rng.h"

namespace prehoc {
namespace {

// What is in memory, by the rules of host_tier.h and nothing else.
struct Model {
  size_t capacity;
  std::vector<int> streamed;  // used last at the back
  std::list<int> kept;        // used last at the back
  std::map<int, int> pins;
  std::map<int, BlockUse> use;

  bool InMemory(int n) const {
    return pins.contains(n) || std::count(kept.begin(), kept.end(), n) + std::count(streamed.begin(), streamed.end(), n);
  }
  bool MakeRoom() {
    if (streamed.size() + kept.size() + pins.size() < capacity) return true;
    if (!streamed.empty()) return streamed.pop_back(), true;
    if (!kept.empty()) return kept.pop_front(), true;
    return false;
  }
  void Rest(int n) { use[n] == BlockUse::kStream ? streamed.push_back(n) : kept.push_back(n); }
  bool Seal(int n) {  // through a tail of its own, which needs room first
    if (!MakeRoom()) return false;
    use.try_emplace(n, BlockUse::kKeep);
    if (!InMemory(n)) Rest(n);
    return true;
  }
  bool Pin(int n) {
    if (!InMemory(n) && !MakeRoom()) return false;
    std::erase(streamed, n), kept.remove(n), ++pins[n];
    return true;
  }
  void Unpin(int n, BlockUse how) {
    if (--pins[n] > 0) return;
    pins.erase(n), use[n] = how, Rest(n);
  }
};

TEST(HostTierModelTest, RandomUseMatchesTheModel) {
  constexpr int kKeys = 14;
  SeededRng rng;
  HostTierWorld world({.blocks = 6});
  Model model{.capacity = 6};
  std::vector<BlockRef> refs(kKeys);
  struct Held {
    int n;
    BlockUse use;
    BlockPin pin;
  };
  std::vector<Held> held;
  int refused = 0;
  for (int step = 0; step < 20'000; ++step) {
    const int n = static_cast<int>(rng.Int(0, kKeys - 1));
    BlockRef& ref = refs[static_cast<size_t>(n)];
    const double what = rng.Uniform();
    if (what < 0.15 || ref == nullptr) {
      const Result<BlockRef> sealed = world.Sealed(n);
      ASSERT_EQ(sealed.ok(), model.Seal(n)) << step;
      if (sealed.ok()) ref = *sealed;
    } else if (what < 0.55) {
      const BlockUse use = rng.Chance(0.5) ? BlockUse::kStream : BlockUse::kKeep;
      Result<BlockPin> pin = world.tier->Pin(ref, use);
      ASSERT_EQ(pin.ok(), model.Pin(n)) << step << " " << pin.status();
      refused += !pin.ok();
      if (pin.ok()) held.push_back({n, use, std::move(pin).value()});
    } else if (what < 0.95 && !held.empty()) {
      const auto last = static_cast<size_t>(rng.Int(0, static_cast<int64_t>(held.size()) - 1));
      std::swap(held[last], held.back());
      if (step % 16 == 0) {
        ASSERT_TRUE(HoldsBytesOf(held.back().pin, held.back().n)) << step;
      }
      model.Unpin(held.back().n, held.back().use);
      held.pop_back();
    } else if (world.background.queued() > 0) {
      world.background.RunAt(static_cast<size_t>(rng.Int(0, static_cast<int64_t>(world.background.queued()) - 1)));
    }
    for (int key = 0; key < kKeys; ++key) {
      const BlockRef& block = refs[static_cast<size_t>(key)];
      if (block == nullptr) continue;
      ASSERT_EQ(world.tier->state(block) == BlockState::kHost, model.InMemory(key)) << "step " << step << " key " << key;
    }
    ASSERT_LE(world.tier->used_blocks(), 6);
    ASSERT_OK(world.tier->CheckInvariants());
  }
  EXPECT_GT(refused, 10);
  EXPECT_GT(world.Counter("host.loads"), 1000);
  EXPECT_EQ(world.Counter("host.lost"), 0);
  EXPECT_LE(world.Counter("host.peak_bytes"), world.Counter("host.capacity_bytes"));
}

// A block that somebody holds is lost only if the store said so; every pin has the right bytes; every error is a named one.
TEST(HostTierModelTest, AStoreThatFailsAtRandomLosesNothingByItself) {
  constexpr int kKeys = 12;
  SeededRng rng;
  HostTierWorld world({.blocks = 5, .max_queued_writes = 3});
  std::set<ChunkKey> said_lost;
  world.store->on_put = [&](const ChunkKey&) {
    if (rng.Chance(0.6)) return OkStatus();
    return Status(rng.Pick(std::vector{StatusCode::kBusy, StatusCode::kIoError, StatusCode::kOutOfSpace}), "as drawn");
  };
  world.store->on_get = [&](const ChunkKey& key) {
    if (rng.Chance(0.7)) return OkStatus();
    const StatusCode code = rng.Pick(
        std::vector{StatusCode::kCorrupt, StatusCode::kNotFound, StatusCode::kIoError, StatusCode::kDeadline});
    if (code == StatusCode::kCorrupt || code == StatusCode::kNotFound) said_lost.insert(key);
    return Status(code, "as drawn");
  };
  std::vector<BlockRef> refs(kKeys);
  std::map<StatusCode, int> codes;
  std::vector<std::pair<int, BlockPin>> held;
  for (int step = 0; step < 20'000; ++step) {
    const int n = static_cast<int>(rng.Int(0, kKeys - 1));
    BlockRef& ref = refs[static_cast<size_t>(n)];
    const double what = rng.Uniform();
    if (ref == nullptr || what < 0.15) {
      const Result<BlockRef> sealed = world.Sealed(n);
      ++codes[sealed.status().code()];
      if (!sealed.ok()) continue;
      ASSERT_TRUE(ref == nullptr || ref == *sealed);
      ref = *sealed;
      ASSERT_NE(world.tier->state(ref), BlockState::kLost);
      said_lost.erase(TestKey(n));
    } else if (what < 0.5) {
      Result<BlockPin> pin = world.tier->Pin(ref, rng.Chance(0.5) ? BlockUse::kStream : BlockUse::kKeep);
      ++codes[pin.status().code()];
      if (pin.ok()) {
        ASSERT_TRUE(HoldsBytesOf(*pin, n)) << step;
        if (held.size() < 4) held.emplace_back(n, std::move(pin).value());
      }
    } else if (what < 0.7 && !held.empty()) {
      ASSERT_TRUE(HoldsBytesOf(held.front().second, held.front().first)) << step;
      held.erase(held.begin());
    } else if (what < 0.8) {
      world.tier->Prefetch({&ref, 1});
    } else if (what < 0.85) {
      // Sheds a record. If the block is in memory it has to be written again, else it is gone.
      if (world.tier->state(ref) != BlockState::kHost) said_lost.insert(TestKey(n));
      ASSERT_OK(world.memory->Delete(TestKey(n)));
    } else if (what < 0.87) {
      ++codes[world.tier->Flush().code()];
    } else if (world.background.queued() > 0) {
      world.background.RunAt(static_cast<size_t>(rng.Int(0, static_cast<int64_t>(world.background.queued()) - 1)));
    }
    for (int key = 0; key < kKeys; ++key) {
      const BlockRef& block = refs[static_cast<size_t>(key)];
      if (block == nullptr || world.tier->state(block) != BlockState::kLost) continue;
      ASSERT_TRUE(said_lost.contains(TestKey(key))) << "step " << step << " key " << key;
    }
    ASSERT_OK(world.tier->CheckInvariants());
  }
  const std::set<StatusCode> possible{StatusCode::kOk,       StatusCode::kOutOfSpace, StatusCode::kIoError,
                                      StatusCode::kDeadline, StatusCode::kCorrupt,    StatusCode::kNotFound};
  codes.erase(StatusCode::kBusy);  // from Flush(), if the store stalls long enough
  for (const auto& [code, count] : codes) EXPECT_TRUE(possible.contains(code)) << StatusCodeName(code) << " " << count;
  for (const StatusCode code : possible) EXPECT_TRUE(codes.contains(code)) << StatusCodeName(code) << " never happens";
  EXPECT_GT(world.Counter("host.healed"), 10);
  EXPECT_GT(world.Counter("write_behind.shed"), 0);
}

// One thread of many: holds a few blocks and pins, and does something at random.
class Worker {
 public:
  Worker(HostTierWorld* world, Rng rng, int keys) : world_(world), rng_(rng), keys_(keys) {}

  void Run(int steps) {
    for (int step = 0; step < steps; ++step) Step();
    pins_.clear();
    refs_.clear();
  }
  int wrong() const { return wrong_; }
  int64_t right() const { return right_; }
  const std::set<StatusCode>& codes() const { return codes_; }

 private:
  void Step() {
    const int n = static_cast<int>(rng_.Int(0, keys_ - 1));
    const double what = rng_.Uniform();
    if (what < 0.5) {
      PinSome(n);
    } else if (what < 0.7) {
      if (!pins_.empty()) Check(pins_.front().second, pins_.front().first), pins_.erase(pins_.begin());
    } else if (what < 0.85) {
      SealSome(n);
    } else if (what < 0.9) {
      if (const auto found = world_->tier->Find(TestKey(n))) refs_[n] = *found;
    } else if (what < 0.95) {
      refs_.erase(n);
    } else if (what < 0.99) {
      std::vector<BlockRef> some;
      for (const auto& [key, ref] : refs_) some.push_back(ref);
      world_->tier->Prefetch(some);
    } else {
      Note(world_->tier->Flush());
    }
    if (world_->tier->used_blocks() > world_->tier->capacity_blocks()) ++wrong_;
  }

  void SealSome(int n) {
    const Result<BlockRef> sealed = world_->Sealed(n);
    Note(sealed.status());
    if (sealed.ok()) refs_[n] = *sealed;
  }

  void PinSome(int n) {
    const auto ref = refs_.find(n);
    if (ref == refs_.end()) return SealSome(n);
    Result<BlockPin> pin = world_->tier->Pin(ref->second, rng_.Chance(0.5) ? BlockUse::kStream : BlockUse::kKeep);
    Note(pin.status());
    if (!pin.ok()) return;
    Check(*pin, n);
    if (pins_.size() < 2) pins_.emplace_back(n, std::move(pin).value());
  }

  void Note(const Status& status) { codes_.insert(status.code()); }
  void Check(const BlockPin& pin, int n) { HoldsBytesOf(pin, n) ? static_cast<void>(++right_) : static_cast<void>(++wrong_); }

  HostTierWorld* world_;
  Rng rng_;
  const int keys_;
  std::map<int, BlockRef> refs_;
  std::vector<std::pair<int, BlockPin>> pins_;
  std::set<StatusCode> codes_;
  int wrong_ = 0;
  int64_t right_ = 0;
};

// Runs `threads` workers, then checks what all of them may rely on.
std::set<StatusCode> RunWorkers(HostTierWorld* world, Executor* background, Rng* rng, int threads, int steps) {
  std::vector<Worker> workers;
  for (int t = 0; t < threads; ++t) workers.emplace_back(world, rng->Fork(), /*keys=*/40);
  std::vector<std::thread> running;
  for (Worker& worker : workers) running.emplace_back([&worker, steps] { worker.Run(steps); });
  for (std::thread& thread : running) thread.join();
  background->Drain();
  std::set<StatusCode> codes;
  for (const Worker& worker : workers) {
    EXPECT_EQ(worker.wrong(), 0);
    EXPECT_GT(worker.right(), steps / 20);
    codes.insert(worker.codes().begin(), worker.codes().end());
  }
  EXPECT_OK(world->tier->CheckInvariants());
  EXPECT_EQ(world->Counter("host.pinned"), 0);
  EXPECT_EQ(world->Counter("host.tails"), 0);
  EXPECT_EQ(world->Counter("host.waiting"), 0);
  EXPECT_EQ(world->Counter("write_behind.queued"), 0);
  EXPECT_EQ(world->Counter("host.blocks"), static_cast<double>(world->tier->used_blocks()));
  EXPECT_LE(world->Counter("host.peak_bytes"), world->Counter("host.capacity_bytes"));
  return codes;
}

std::unique_ptr<ThreadPool> JobThreads(int count) {
  ThreadPool::Options options;
  options.loop_threads = 1;
  options.job_threads = count;
  options.max_queued_jobs = 16;  // so that it refuses at times
  return ThreadPool::Create(options).value();
}

TEST(HostTierThreadsStressTest, ManyThreadsOverASoundStore) {
  SeededRng rng;
  const auto background = JobThreads(2);
  HostTierWorld world({.blocks = 16, .max_queued_writes = 8, .background = background.get()});
  const std::set<StatusCode> codes = RunWorkers(&world, background.get(), &rng, 4, 2000);
  // 4 threads hold at most 2 pins, a tail and a load each, in 16 blocks: there is always one that can go.
  EXPECT_EQ(codes, std::set<StatusCode>{StatusCode::kOk});
  EXPECT_GT(world.Counter("host.loads"), 500);
  EXPECT_EQ(world.Counter("host.lost"), 0);
  EXPECT_EQ(world.Counter("host.forgotten"), 0);
}

TEST(HostTierThreadsStressTest, ManyThreadsOverAStoreThatShedsStallsAndFails) {
  SeededRng rng;
  const auto background = JobThreads(2);
  HostTierWorld world({.blocks = 10, .store_blocks = 20, .max_queued_writes = 4, .background = background.get()});
  std::atomic<uint64_t> calls = 0;
  const uint64_t salt = rng.Next();
  const auto draw = [&](std::vector<StatusCode> codes) {
    Rng call(salt + calls.fetch_add(1));
    return call.Chance(0.1) ? Status(call.Pick(codes), "as drawn") : OkStatus();
  };
  world.store->on_put = [&](const ChunkKey&) {
    return draw({StatusCode::kBusy, StatusCode::kOutOfSpace, StatusCode::kIoError});
  };
  world.store->on_get = [&](const ChunkKey&) {
    return draw({StatusCode::kCorrupt, StatusCode::kNotFound, StatusCode::kDeadline, StatusCode::kIoError});
  };
  const std::set<StatusCode> codes = RunWorkers(&world, background.get(), &rng, 4, 2000);
  EXPECT_TRUE(codes.contains(StatusCode::kOk));
  EXPECT_GT(world.Counter("host.lost"), 10);
  EXPECT_GT(world.Counter("host.healed"), 0);
}

TEST(HostTierThreadsStressTest, ManyThreadsWithoutAStore) {
  SeededRng rng;
  const auto background = JobThreads(1);
  HostTierWorld world({.blocks = 30, .store_blocks = 0, .background = background.get()});
  const std::set<StatusCode> codes = RunWorkers(&world, background.get(), &rng, 4, 2000);
  EXPECT_EQ(codes, (std::set{StatusCode::kOk, StatusCode::kOutOfSpace}));
  EXPECT_GT(world.Counter("host.evicted"), 10);
  EXPECT_EQ(world.Counter("host.evicted"), world.Counter("host.forgotten"));
}

}  // namespace
}  // namespace prehoc
