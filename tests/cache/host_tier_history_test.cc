// What threads see of the host tier, as a history of calls: is there one order of all calls on a key, in which none comes before one
// that had ended when it began, that a register without threads would have given the same answers in? (Wing and Gong's search, with
// what was tried remembered, as in Lowe, "Testing for linearizability", 2016.)
#include <gtest/gtest.h>

#include <atomic>
#include <map>
#include <set>
#include <thread>
#include <vector>

#include "base/mutex.h"
#include "base/test_point.h"
#include "tests/cache/host_tier_world.h"
#include "tests/support/seeded_rng.h"

namespace prehoc {
namespace {

// Versions of a key's bytes are 1, 2, ...; 0 = nothing is there.
struct Call {
  enum class Kind : uint8_t { kSeal, kRead } kind;
  int version;           // sealed, or what was read
  int64_t begin, end;    // of one counter for all threads
};

// The register: a Seal() where there is nothing sets it, and where there is something changes nothing; a read gives what is there.
// With `forgets` what is there may go at any time.
class Linearizer {
 public:
  Linearizer(std::vector<Call> calls, bool forgets) : calls_(std::move(calls)), forgets_(forgets) {}
  bool Search() { return calls_.size() <= 64 && From(0, 0); }

 private:
  bool From(uint64_t done, int version) {
    if (std::popcount(done) == static_cast<int>(calls_.size())) return true;
    if (!tried_.insert({done, version}).second) return false;
    int64_t first_end = INT64_MAX;
    for (size_t i = 0; i < calls_.size(); ++i) {
      if ((done >> i & 1) == 0) first_end = std::min(first_end, calls_[i].end);
    }
    for (size_t i = 0; i < calls_.size(); ++i) {
      if ((done >> i & 1) != 0 || calls_[i].begin > first_end) continue;
      const uint64_t then = done | uint64_t{1} << i;
      const Call& call = calls_[i];
      if (call.kind == Call::Kind::kRead && call.version == version && From(then, version)) return true;
      if (call.kind == Call::Kind::kSeal && From(then, version == 0 ? call.version : version)) return true;
    }
    return forgets_ && version != 0 && From(done, 0);
  }

  const std::vector<Call> calls_;
  const bool forgets_;
  std::set<std::pair<uint64_t, int>> tried_;
};

using Kind = Call::Kind;
std::string ToText(std::vector<Call> calls) {
  std::sort(calls.begin(), calls.end(), [](const Call& a, const Call& b) { return a.begin < b.begin; });
  std::string text;
  for (const Call& call : calls) {
    text += std::string(call.kind == Kind::kSeal ? "seal " : "read ") + std::to_string(call.version) + " in [" + std::to_string(call.begin) + ", " +
            std::to_string(call.end) + "]\n";
  }
  return text;
}
bool IsLinear(std::vector<Call> calls, bool forgets = false) { return Linearizer(std::move(calls), forgets).Search(); }

TEST(LinearizerTest, RefusesWhatNoOrderExplains) {
  EXPECT_TRUE(IsLinear({{Kind::kSeal, 1, 0, 1}, {Kind::kRead, 1, 2, 3}}));
  EXPECT_FALSE(IsLinear({{Kind::kSeal, 1, 0, 1}, {Kind::kRead, 0, 2, 3}}));  // gone
  EXPECT_TRUE(IsLinear({{Kind::kSeal, 1, 0, 1}, {Kind::kRead, 0, 2, 3}}, /*forgets=*/true));
  EXPECT_FALSE(IsLinear({{Kind::kRead, 1, 0, 1}, {Kind::kSeal, 1, 2, 3}}));  // before it was there
  EXPECT_TRUE(IsLinear({{Kind::kRead, 1, 0, 3}, {Kind::kSeal, 1, 2, 4}}));   // at once
  EXPECT_FALSE(IsLinear({{Kind::kSeal, 1, 0, 1}, {Kind::kSeal, 2, 2, 3}, {Kind::kRead, 2, 4, 5}}));  // the first one stays
  EXPECT_TRUE(IsLinear({{Kind::kSeal, 1, 0, 3}, {Kind::kSeal, 2, 1, 4}, {Kind::kRead, 2, 5, 6}}));
  // One or the other, but the same for all.
  EXPECT_FALSE(IsLinear({{Kind::kSeal, 1, 0, 9}, {Kind::kSeal, 2, 0, 9}, {Kind::kRead, 2, 1, 2}, {Kind::kRead, 1, 3, 4}}));
  EXPECT_FALSE(IsLinear({{Kind::kSeal, 1, 0, 1}, {Kind::kRead, 2, 2, 3}}, /*forgets=*/true));
}

constexpr int kThreads = 4, kKeys = 4, kCalls = 28, kVersions = 64;

class HostTierHistoryTest : public testing::Test {
 protected:
  static std::vector<std::byte> Bytes(int key, int version) { return TestChunk(key * kVersions + version, kTestBlockBytes); }

  // The version whose bytes these are; -1: nobody's.
  static int VersionOf(int key, std::span<const std::byte> bytes) {
    for (int version = 1; version < kVersions; ++version) {
      const auto want = Bytes(key, version);
      if (std::equal(want.begin(), want.end(), bytes.begin(), bytes.end())) return version;
    }
    return -1;
  }

  // Whoever seals or finds a block holds it to the end of the round, as a sequence does, unless it is to be forgotten.
  using Held = std::vector<BlockRef>;
  static bool Seal(HostTier& tier, int key, int version, Held* held) {
    auto tail = tier.NewTail();
    if (!tail.ok()) return false;
    {
      const auto pin = tier.Pin(*tail);
      if (!pin.ok()) return false;
      const auto bytes = Bytes(key, version);
      std::copy(bytes.begin(), bytes.end(), pin->bytes().begin());
    }
    BlockRef block = tier.Seal(std::move(tail).value(), TestKey(key));
    if (held) held->push_back(std::move(block));
    return true;
  }

  // -2: an error that says nothing of what is there.
  static int Read(HostTier& tier, int key, BlockUse use, Held* held) {
    const auto block = tier.Find(TestKey(key));
    if (!block) return 0;
    if (held) held->push_back(*block);
    const auto pin = tier.Pin(*block, use);
    if (pin.ok()) return VersionOf(key, pin->bytes());
    return pin.status().code() == StatusCode::kNotFound ? 0 : -2;
  }

  // Threads work on the keys [base, base + kKeys) at once; every history must have an order.
  void Round(HostTierWorld& world, int base, uint64_t seed, bool forgets) {
    std::atomic<int64_t> time{0};
    std::array<std::atomic<int>, kKeys> versions{};
    std::vector<std::map<int, std::vector<Call>>> seen(kThreads);
    std::vector<Held> held(kThreads);
    std::vector<std::thread> threads;
    for (int t = 0; t < kThreads; ++t) {
      threads.emplace_back([&, t] {
        Held* const mine = forgets ? nullptr : &held[static_cast<size_t>(t)];
        Rng rng(seed * kThreads + static_cast<uint64_t>(t));
        for (int i = 0; i < kCalls; ++i) {
          const int key = static_cast<int>(rng.Int(0, kKeys - 1));
          Call call{rng.Chance(0.3) ? Kind::kSeal : Kind::kRead, 0, 0, 0};
          if (call.kind == Kind::kSeal) call.version = ++versions[static_cast<size_t>(key)];
          call.begin = time.fetch_add(1);
          if (call.kind == Kind::kSeal && !Seal(*world.tier, base + key, call.version, mine)) continue;
          if (call.kind == Kind::kRead) call.version = Read(*world.tier, base + key, rng.Chance(0.5) ? BlockUse::kStream : BlockUse::kKeep, mine);
          call.end = time.fetch_add(1);
          if (call.version != -2) seen[static_cast<size_t>(t)][key].push_back(call);
          if (rng.Chance(0.2)) {
            const auto block = world.tier->Find(TestKey(base + static_cast<int>(rng.Int(0, kKeys - 1))));
            if (block) world.tier->Prefetch({&*block, 1});
          }
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    for (int key = 0; key < kKeys; ++key) {
      std::vector<Call> calls;
      for (auto& of_thread : seen) calls.insert(calls.end(), of_thread[key].begin(), of_thread[key].end());
      ASSERT_LE(calls.size(), 64u);
      for (const Call& call : calls) ASSERT_NE(call.version, -1) << "bytes that nobody sealed";
      checked_ += static_cast<int64_t>(calls.size());
      EXPECT_TRUE(IsLinear(calls, forgets)) << "key " << key << " of round " << base / kKeys << ":\n" << ToText(calls);
    }
    EXPECT_OK(world.tier->CheckInvariants());
  }

  int64_t checked_ = 0;
};

// With a store that takes everything nothing is ever lost, wherever it is meanwhile.
TEST_F(HostTierHistoryTest, AFullTierOverAStoreIsARegisterOfEveryKey) {
  SeededRng rng;
  const auto pool = ThreadPool::Create({.loop_threads = 1, .job_threads = 2, .spin_iterations = 0}).value();
  HostTierWorld world({.blocks = kThreads + 2, .background = pool.get()});
#ifdef PREHOC_TEST_POINTS
  // Others get a turn where it hurts most.
  std::vector<std::unique_ptr<TestPointHook>> hooks;
  for (const char* point : {"host_tier.load", "host_tier.write", "host_tier.reserve", "host_tier.verify"}) {
    hooks.push_back(std::make_unique<TestPointHook>(point, [] { std::this_thread::yield(); }));
  }
#endif
  for (int round = 0; round < 60 && !HasFailure(); ++round) Round(world, round * kKeys, rng.Next(), /*forgets=*/false);
  pool->Drain();
  EXPECT_GT(world.Counter("host.loads"), 0);
  EXPECT_GT(world.Counter("host.duplicates"), 0);
  EXPECT_GT(checked_, 60 * 80);
}

// A key that nobody holds, that only the store has, and that is computed again, is no register: the newer version takes the place of the
// older one. But whoever holds its block sees one version, from memory and from the store, as long as he holds it.
TEST_F(HostTierHistoryTest, WhoeverHoldsABlockSeesOneVersion) {
  SeededRng rng;
  const auto pool = ThreadPool::Create({.loop_threads = 1, .job_threads = 2, .spin_iterations = 0}).value();
  HostTierWorld world({.blocks = kThreads + 2, .background = pool.get()});
  world.store->after_get = [](const ChunkKey&) {  // others get a turn where a record is read and not yet used
    for (int i = 0; i < 8; ++i) std::this_thread::yield();
  };
  std::atomic<int> versions[2 * kKeys] = {};
  std::atomic<int> changed{0}, lost{0};
  Mutex mutex;
  std::string first;  // of the blocks that were lost, why
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, seed = rng.Next()] {
      Rng random(seed);
      struct Holding {
        BlockRef block;
        int version = 0;  // 0 = not read yet
      };
      std::map<int, Holding> held;
      for (int i = 0; i < 1500; ++i) {
        const int key = static_cast<int>(random.Int(0, 2 * kKeys - 1));
        const auto use = random.Chance(0.5) ? BlockUse::kStream : BlockUse::kKeep;
        const auto holding = held.find(key);
        if (holding == held.end()) {
          const int version = 1 + versions[key].fetch_add(1) % (kVersions - 1);
          Held fresh;
          if (auto found = random.Chance(0.7) ? world.tier->Find(TestKey(key)) : std::nullopt; found) fresh.push_back(*found);
          if (fresh.empty() && !Seal(*world.tier, key, version, &fresh)) continue;
          held[key] = {fresh.back()};
        } else if (random.Chance(0.3)) {
          held.erase(holding);
        } else if (const auto pin = world.tier->Pin(holding->second.block, use); !pin.ok()) {
          if (pin.status().code() == StatusCode::kOutOfSpace) continue;
          MutexLock lock(mutex);
          if (lost++ == 0) first = pin.status().ToString();
        } else {
          const int version = VersionOf(key, pin->bytes());
          changed += holding->second.version != 0 && holding->second.version != version;
          holding->second.version = version;
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  pool->Drain();
  EXPECT_EQ(changed, 0);
  EXPECT_EQ(lost, 0) << first;
  EXPECT_GT(world.Counter("write_behind.replaced"), 0);
  EXPECT_GT(world.Counter("host.loads"), 0);
  EXPECT_OK(world.tier->CheckInvariants());
}

// Without one, what nobody holds may go; but what is read was sealed, and stays the same until it is gone.
TEST_F(HostTierHistoryTest, AFullTierWithoutAStoreForgetsAndIsARegisterOtherwise) {
  SeededRng rng;
  HostTierWorld world({.blocks = kThreads + 1, .store_blocks = 0});
  for (int round = 0; round < 60 && !HasFailure(); ++round) Round(world, round * kKeys, rng.Next(), /*forgets=*/true);
  EXPECT_GT(world.Counter("host.forgotten"), 0);
}

}  // namespace
}  // namespace prehoc
