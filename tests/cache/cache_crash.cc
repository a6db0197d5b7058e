// A whole cache (device, host memory, store) that is ended again and again in the midst of prefill, decode, write-behind, eviction and
// closing; each time what is left must open, hold nothing but right bytes, serve right prefixes, and have what a flush acknowledged.
//   cache_crash ROUNDS SEED              ended by SIGKILL: within the n-th change of the file system, or after n steps
//   cache_crash ROUNDS SEED power        the disk loses power at the n-th change, and with it what was not synced
//   cache_crash ROUNDS SEED power lie    it lies about syncs: exit code 1 if nobody notices
// Exit code 1, and the round, if something is not as it must be.
#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>

#include "cache/chunk_key.h"
#include "tests/cache/crash_life.h"
#include "tests/fakes/killing_env.h"
#include "tests/fakes/unsynced_env.h"
#include "tests/support/temp_dir.h"

namespace prehoc {
namespace {

using torture::Truth;

constexpr uint64_t kTextSeed = 7;       // of the streams, the same in every process
constexpr int32_t kWindow = 6;          // variants used last; far fewer than the store has room for
constexpr int64_t kStepsOfLife = 400;   // at most, from opening to closing

// What whoever survives knows.
struct Model {
  int32_t variant = 0;  // the newest
  std::map<std::pair<int32_t, int32_t>, int32_t> acknowledged;  // (variant, stream) -> chunks
  int64_t steps = 0, acknowledgements = 0, loads = 0, evicted = 0;
  // Of what was found afterwards.
  int64_t records = 0, branches = 0, prefixes = 0, restored = 0, outputs = 0;

  void Note(const Acknowledged& flushed) {
    int32_t& chunks = acknowledged[{flushed.variant, flushed.stream}];
    chunks = std::max(chunks, flushed.chunks);
    ++acknowledgements;
    acknowledged.erase(acknowledged.begin(), acknowledged.lower_bound({variant - kWindow, 0}));
  }
};

bool Wrong(const std::string& what) {
  std::fprintf(stderr, "%s\n", what.c_str());
  return false;
}

// Looks at what is left, in a process that had nothing to do with it.
class Inspector {
 public:
  Inspector(std::string path, rocksdb::Env* env, bool direct_io) : path_(std::move(path)), env_(env), direct_io_(direct_io), truth_(kTextSeed) {}

  bool Check(Model* model, Rng* rng) {
    while (known_variants_ <= model->variant + 2) LearnKeys(known_variants_++);
    return CheckRecords(model) && CheckPrefixes(model, rng);
  }
  const Truth& truth() const { return truth_; }

 private:
  // Which block a key stands for.
  struct Place {
    int32_t stream = 0, chunk = 0;
  };

  void LearnKeys(int32_t variant) {
    const KvGeometry geometry = torture::TortureGeometry();
    const std::string layout = geometry.LayoutName(), method = VariantName(variant);
    for (int32_t s = 0; s < torture::kStreams; ++s) {
      const ChunkKeyChain keys = ChainOf({.tenant_salt = "", .model = {}, .dtype = "f16", .layout = layout, .method = method},
                                         truth_.stream(s).tokens(0, torture::kMaxTokens), geometry.chunk_tokens);
      for (int32_t chunk = 0; chunk < keys.size(); ++chunk) {
        for (int32_t l = 0; l < geometry.layers; ++l) places_[keys.Key(ChunkIndex(chunk), LayerId(l))] = {s, chunk};
      }
    }
  }

  bool CheckRecords(Model* model) {
    RocksDbStore::Options options = LifeStore(path_, env_);
    options.direct_io = direct_io_;
    auto opened = RocksDbStore::Open(options);
    if (!opened.ok()) return Wrong("does not open: " + opened.status().ToString());
    RocksDbStore& store = **opened;
    if (const Status rules = store.CheckInvariants(); !rules.ok()) return Wrong(rules.ToString());
    std::vector<std::byte> bytes(store.chunk_bytes());
    for (const auto& record : store.ListRecords()) {
      const auto header = store.Inspect(record.key, VerifyPayload::kNo);
      if (!header.ok()) return Wrong("unreadable: " + header.status().ToString());
      if (const Status read = store.Get(record.key, bytes); !read.ok()) return Wrong("torn: " + read.ToString());
      const ChunkOrigin origin = OriginOf(*header);
      ++model->records;
      model->branches += origin.branch;
      if (origin.branch) {
        // Its key is nobody else's; but it holds rows of some stream, at its place.
        if (!truth_.BlockIsRight(origin.chunk, record.key.layer, bytes)) return Wrong("a branch holds other bytes: " + record.key.ToString());
        continue;
      }
      const auto place = places_.find(record.key);
      if (place == places_.end() || place->second.chunk != origin.chunk) return Wrong("a record that nobody wrote: " + record.key.ToString());
      if (bytes != truth_.stream(place->second.stream).Block(origin.chunk, record.key.layer)) {
        return Wrong("chunk " + std::to_string(origin.chunk) + " holds other bytes: " + record.key.ToString());
      }
    }
    return true;
  }

  // Every prefix that was acknowledged, and one that may have been, in a new cache.
  bool CheckPrefixes(Model* model, Rng* rng) {
    const SelectorKind selector = rng->Chance(0.5) ? SelectorKind::kDense : SelectorKind::kTwoClock;
    if (const Status ready = truth_.Prepare(LifeSelector(selector)); !ready.ok()) return Wrong(ready.ToString());
    auto life = Life::Begin({.path = path_, .env = env_, .direct_io = direct_io_, .read_only = true, .selector = selector, .guard_store = false,
                             .host_blocks = 64},
                            &truth_);
    if (!life.ok()) return Wrong("no cache over it: " + life.status().ToString());
    auto wanted = model->acknowledged;
    wanted.try_emplace({model->variant, static_cast<int32_t>(rng->Below(torture::kStreams))}, 0);
    for (const auto& [place, chunks] : wanted) {
      if (place.first <= model->variant - kWindow) continue;
      auto run = Life::Run::Open(life->get(), place.first, place.second, torture::kPrompts.back(), 3);
      if (!run.ok()) return Wrong("a prefix does not open: " + run.status().ToString());
      // The last token is run at any rate, so the last chunk of a whole prompt does not come back.
      const int64_t least = std::min<int64_t>(chunks, (torture::kPrompts.back() - 1) / torture::TortureGeometry().chunk_tokens);
      if ((*run)->restored() < least * torture::TortureGeometry().chunk_tokens) {
        return Wrong("of " + std::to_string(chunks) + " acknowledged chunks only " + std::to_string((*run)->restored()) + " tokens come back");
      }
      ++model->prefixes;
      while (!(*run)->done()) {
        if (const Status step = (*run)->Step(64); !step.ok()) return Wrong(step.ToString());
      }
    }
    model->restored += (*life)->restored();
    model->outputs += (*life)->outputs();
    return true;
  }

  const std::string path_;
  rocksdb::Env* const env_;
  const bool direct_io_;
  Truth truth_;
  int32_t known_variants_ = 0;
  std::unordered_map<ChunkKey, Place, ChunkKeyHash> places_;
};

// ---- ended by SIGKILL ----

struct Message {
  enum Kind : int32_t { kStep, kFlushed } kind;
  int32_t variant, a, b;  // kStep: loads and evictions since the last one; kFlushed: stream and chunks
};

void Tell(const Message& message) {
  if (::write(1, &message, sizeof message) != sizeof message) ::_exit(0);
}

// Ended from outside, from within, or by the first thing that is wrong.
[[noreturn]] void Child(const std::string& path, int32_t variant, uint64_t seed, int64_t operations) {
  Rng rng(seed);
  Truth truth(kTextSeed);
  std::optional<KillingEnv> env;
  if (operations > 0) env.emplace(operations);
  const auto fail = [](const Status& status) {
    std::fprintf(stderr, "child: %s\n", status.ToString().c_str());
    ::_exit(3);
  };
  while (true) {
    const SelectorKind selector = rng.Chance(0.5) ? SelectorKind::kDense : SelectorKind::kTwoClock;
    if (const Status ready = truth.Prepare(LifeSelector(selector)); !ready.ok()) fail(ready);
    auto life = Life::Begin({.path = path, .env = env ? &*env : nullptr, .selector = selector, .guard_store = rng.Chance(0.5)}, &truth);
    if (!life.ok()) fail(life.status());
    double loads = 0, evicted = 0;
    for (int64_t steps = rng.Int(20, kStepsOfLife); steps > 0; --steps) {
      const double loads_now = (*life)->Counter("host.loads"), evicted_now = (*life)->Counter("host.evicted");
      Tell({Message::kStep, variant, static_cast<int32_t>(loads_now - loads), static_cast<int32_t>(evicted_now - evicted)});
      loads = loads_now;
      evicted = evicted_now;
      const Status status = (*life)->Work(&rng, &variant, [](const Acknowledged& now) { Tell({Message::kFlushed, now.variant, now.stream, now.chunks}); });
      if (!status.ok()) fail(status);
    }
    life->reset();
  }
}

// Lets a child work until its end.
bool KillOne(const std::string& path, Rng* rng, Model* model) {
  int pipes[2];
  if (::pipe2(pipes, O_CLOEXEC) != 0) return false;
  // Within a change of the file system, which it does itself; else at a step, which is done from here.
  const bool within = rng->Chance(0.5);
  const int64_t operations = within ? (rng->Chance(0.2) ? rng->Int(1, 12) : rng->Int(1, 150)) : 0;
  int64_t steps = within ? INT64_MAX : rng->Int(0, 600);
  const std::string arguments[] = {path, std::to_string(model->variant), std::to_string(rng->Next()), std::to_string(operations)};
  // A program of its own, not only a process: threads do not survive a fork.
  const pid_t pid = ::fork();
  if (pid == 0) {
    ::dup2(pipes[1], 1);
    ::execl("/proc/self/exe", "cache_crash", "child", arguments[0].c_str(), arguments[1].c_str(), arguments[2].c_str(), arguments[3].c_str(),
            static_cast<char*>(nullptr));
    ::_exit(127);
  }
  ::close(pipes[1]);
  Message message{};
  bool killed = false;
  while (::read(pipes[0], &message, sizeof message) == sizeof message) {
    model->variant = std::max(model->variant, message.variant);
    if (message.kind == Message::kFlushed) {
      model->Note({message.variant, message.a, message.b});
      continue;
    }
    ++model->steps;
    model->loads += message.a;
    model->evicted += message.b;
    if (--steps < 0 && !std::exchange(killed, true)) ::kill(pid, SIGKILL);
  }
  int status = 0;
  ::waitpid(pid, &status, 0);
  ::close(pipes[0]);
  if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGKILL) return Wrong("the child ended by itself with status " + std::to_string(status));
  return true;
}

int Kill(int rounds, uint64_t seed) {
  TempDir dir;
  const std::string path = dir.path() + "/store";
  Rng rng(seed);
  Model model;
  Inspector inspector(path, nullptr, /*direct_io=*/true);
  for (int round = 0; round < rounds; ++round) {
    if (KillOne(path, &rng, &model) && inspector.Check(&model, &rng)) continue;
    std::fprintf(stderr, "cache_crash: round %d of seed %llu\n", round, static_cast<unsigned long long>(seed));
    return 1;
  }
  if (model.acknowledgements == 0 || model.loads == 0 || model.evicted == 0 || model.restored == 0 || model.branches == 0) {
    std::fprintf(stderr, "cache_crash: the children hardly got to work\n");
    return 1;
  }
  std::printf("killed %d times in %lld steps: %lld blocks evicted from host memory, %lld read back, %lld prefixes acknowledged; afterwards %lld records (%lld of branches) "
              "and %lld outputs compared, %lld prefixes with %lld tokens restored; nothing torn, nothing lost\n",
              rounds, static_cast<long long>(model.steps), static_cast<long long>(model.evicted), static_cast<long long>(model.loads),
              static_cast<long long>(model.acknowledgements), static_cast<long long>(model.records), static_cast<long long>(model.branches),
              static_cast<long long>(model.outputs), static_cast<long long>(model.prefixes), static_cast<long long>(model.restored));
  return 0;
}

// ---- ended by a loss of power ----

class PowerLoss {
 public:
  PowerLoss(uint64_t seed, bool lie)
      : rng_(seed), env_(dir_.path() + "/limbo", seed + 1), inspector_(dir_.path() + "/store", &env_, /*direct_io=*/false), truth_(kTextSeed) {
    if (lie) env_.LieAboutSyncs();
  }

  bool Round() {
    env_.PowerFailsAfter(rng_.Chance(0.2) ? rng_.Int(0, 40) : rng_.Int(0, 400));
    if (!Work()) return false;
    env_.LoseUnsynced();
    return inspector_.Check(&model_, &rng_);
  }
  void Tell(int rounds) const {
    std::printf("power lost %d times in %lld operations of %lld steps: %lld prefixes acknowledged; afterwards %lld records (%lld of branches) and %lld outputs compared, "
                "%lld prefixes with %lld tokens restored; nothing torn, nothing lost\n",
                rounds, static_cast<long long>(env_.operations()), static_cast<long long>(model_.steps), static_cast<long long>(model_.acknowledgements),
                static_cast<long long>(model_.records), static_cast<long long>(model_.branches), static_cast<long long>(model_.outputs),
                static_cast<long long>(model_.prefixes), static_cast<long long>(model_.restored));
  }
  bool worked() const { return model_.acknowledgements > 0 && model_.restored > 0; }

 private:
  // Until the power fails: whatever the cache then says, no output may be wrong. It may also go on without the store for a while.
  bool Work() {
    for (int lives = 0; lives < 4; ++lives) {
      const SelectorKind selector = rng_.Chance(0.5) ? SelectorKind::kDense : SelectorKind::kTwoClock;
      if (const Status ready = truth_.Prepare(LifeSelector(selector)); !ready.ok()) return Wrong(ready.ToString());
      auto life = Life::Begin({.path = dir_.path() + "/store", .env = &env_, .direct_io = false, .selector = selector, .guard_store = rng_.Chance(0.5)}, &truth_);
      if (!life.ok()) return true;
      for (int64_t steps = rng_.Int(20, kStepsOfLife); steps > 0; --steps) {
        ++model_.steps;
        const Status status = (*life)->Work(&rng_, &model_.variant, [&](const Acknowledged& now) { model_.Note(now); });
        if (status.code() == StatusCode::kCorrupt) return Wrong(status.ToString());
        if (!status.ok()) return true;
      }
    }
    return true;
  }

  TempDir dir_;
  Rng rng_;
  UnsyncedEnv env_;
  Inspector inspector_;
  Truth truth_;
  Model model_;
};

int Power(int rounds, uint64_t seed, bool lie) {
  PowerLoss test(seed, lie);
  for (int round = 0; round < rounds; ++round) {
    if (test.Round()) continue;
    std::fprintf(stderr, "cache_crash: round %d of seed %llu\n", round, static_cast<unsigned long long>(seed));
    return lie ? 0 : 1;
  }
  if (lie || !test.worked()) {
    std::fprintf(stderr, "cache_crash: nothing was noticed\n");
    return 1;
  }
  test.Tell(rounds);
  return 0;
}

int Main(int argc, char** argv) {
  const auto number = [&](int i) { return std::strtoull(argv[i], nullptr, 10); };
  const auto is = [&](int i, std::string_view word) { return i < argc && word == argv[i]; };
  if (argc == 6 && is(1, "child")) Child(argv[2], static_cast<int32_t>(number(3)), number(4), static_cast<int64_t>(number(5)));
  if (argc == 3) return Kill(static_cast<int>(number(1)), number(2));
  if ((argc == 4 || (argc == 5 && is(4, "lie"))) && is(3, "power")) return Power(static_cast<int>(number(1)), number(2), argc == 5);
  return 2;
}

}  // namespace
}  // namespace prehoc

int main(int argc, char** argv) { return prehoc::Main(argc, argv); }
