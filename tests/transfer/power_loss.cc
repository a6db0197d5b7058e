// A store whose disk loses power at random moments: after each the files are what was synced, with torn pieces of what was not, and the
// store must open, hold nothing but right bytes, and have everything that a flush acknowledged.
//   power_loss ROUNDS SEED         exit code 1, and the round, if a byte is wrong or something acknowledged is gone
//   power_loss ROUNDS SEED lie     the disk lies about syncs: exit code 1 if nobody notices
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <set>
#include <string>
#include <string_view>

#include "tests/fakes/unsynced_env.h"
#include "tests/support/chunk_data.h"
#include "tests/support/temp_dir.h"
#include "transfer/rocksdb_store.h"

namespace prehoc {
namespace {

constexpr size_t kBytes = 4096;
constexpr int kWindow = 1200;  // records of those put last; far fewer than the budget holds

struct Model {
  int next = 1;          // to be put
  int acknowledged = 0;  // everything up to this was flushed
  std::set<int> deleted;
};

class PowerLoss {
 public:
  PowerLoss(uint64_t seed, bool lie) : rng_(seed), env_(dir_.path() + "/limbo", seed + 1) {
    if (lie) env_.LieAboutSyncs();
  }

  // Works until the power fails.
  bool Work() {
    env_.PowerFailsAfter(rng_.Chance(0.2) ? rng_.Int(0, 40) : rng_.Int(0, 3000));
    while (true) {
      auto opened = RocksDbStore::Open(MakeOptions());
      if (!opened.ok()) return true;
      RocksDbStore& store = **opened;
      for (int64_t steps = rng_.Int(50, 600); steps > 0; --steps) {
        Status status;
        if (rng_.Chance(0.9)) {
          status = store.Put(TestKey(model_.next), TestChunk(model_.next, kBytes), {.chunk = model_.next});
          if (status.ok()) ++model_.next;
          if (status.code() == StatusCode::kBusy) status = Flush(store);
        } else if (rng_.Chance(0.3)) {
          // There is the old one or the new one, whenever the power goes.
          const auto n = static_cast<int>(rng_.Int(std::max(1, model_.next - kWindow), model_.next));
          if (store.Contains(TestKey(n))) status = store.Replace(TestKey(n), TestChunk(n, kBytes), {.chunk = n});
          replaced_ += status.ok();
        } else if (rng_.Chance(0.3)) {
          const auto n = static_cast<int>(rng_.Int(std::max(1, model_.next - kWindow), model_.next));
          model_.deleted.insert(n);
          status = store.Delete(TestKey(n));
        } else if (rng_.Chance(0.2)) {
          status = Flush(store);
        }
        if (status.code() == StatusCode::kIoError) return true;
      }
    }
  }

  // The disk comes back.
  bool Check() {
    env_.LoseUnsynced();
    auto opened = RocksDbStore::Open(MakeOptions());
    if (!opened.ok()) return Wrong("does not open: " + opened.status().ToString());
    RocksDbStore& store = **opened;
    if (const Status rules = store.CheckInvariants(); !rules.ok()) return Wrong(rules.ToString());
    std::vector<std::byte> out(kBytes);
    int last = 0;
    for (const auto& record : store.ListRecords()) {
      const auto header = store.Inspect(record.key, VerifyPayload::kNo);
      if (!header.ok()) return Wrong("unreadable: " + header.status().ToString());
      const int n = OriginOf(*header).chunk;
      last = std::max(last, n);
      if (record.key != TestKey(n) || !store.Get(record.key, out).ok() || out != TestChunk(n, kBytes)) {
        return Wrong("record " + std::to_string(n) + " holds other bytes");
      }
    }
    for (int n = std::max(1, model_.acknowledged - kWindow); n <= model_.acknowledged; ++n) {
      if (!model_.deleted.contains(n) && !store.Contains(TestKey(n))) {
        return Wrong("record " + std::to_string(n) + " of " + std::to_string(model_.acknowledged) + " acknowledged ones is gone");
      }
    }
    lost_ += model_.next - 1 - std::max(last, model_.acknowledged);
    model_.next = std::max(last, model_.acknowledged) + 1;
    return true;
  }

  void Tell(int rounds) const {
    std::printf("power lost %d times in %lld operations: %d records put, %d replaced, %d acknowledged, %d unacknowledged ones gone; nothing torn, nothing lost\n",
                rounds, static_cast<long long>(env_.operations()), model_.next - 1 + lost_, replaced_, model_.acknowledged, lost_);
  }
  bool worked() const { return model_.acknowledged > 0 && lost_ > 0; }

 private:
  RocksDbStore::Options MakeOptions() {
    RocksDbStore::Options options;
    options.path = dir_.path() + "/store";
    options.identity = TestIdentity();
    options.chunk_bytes = kBytes;
    options.budget = 16 << 20;  // so that segments are dropped all the time
    options.segment_bytes = 512 << 10;
    options.min_free_bytes = 0;
    options.direct_io = false;
    options.env = &env_;
    return options;
  }
  Status Flush(RocksDbStore& store) {
    const Status status = store.Flush();
    if (status.ok()) model_.acknowledged = model_.next - 1;
    return status;
  }
  static bool Wrong(const std::string& what) {
    std::fprintf(stderr, "%s\n", what.c_str());
    return false;
  }

  TempDir dir_;
  Rng rng_;
  UnsyncedEnv env_;
  Model model_;
  int lost_ = 0, replaced_ = 0;
};

int Main(int rounds, uint64_t seed, bool lie) {
  PowerLoss test(seed, lie);
  for (int round = 0; round < rounds; ++round) {
    if (test.Work() && test.Check()) continue;
    std::fprintf(stderr, "power_loss: round %d of seed %llu\n", round, static_cast<unsigned long long>(seed));
    return lie ? 0 : 1;
  }
  if (lie || !test.worked()) {
    std::fprintf(stderr, "power_loss: nothing was noticed\n");
    return 1;
  }
  test.Tell(rounds);
  return 0;
}

}  // namespace
}  // namespace prehoc

int main(int argc, char** argv) {
  if (argc < 3 || argc > 4 || (argc == 4 && std::string_view(argv[3]) != "lie")) return 2;
  return prehoc::Main(std::atoi(argv[1]), std::strtoull(argv[2], nullptr, 10), argc == 4);
}
