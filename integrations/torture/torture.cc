#include "integrations/torture/torture.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>
#include <utility>

#include "base/executor.h"
#include "base/units.h"
#include "integrations/torture/faulty_medium.h"
#include "integrations/torture/faulty_seams.h"
#include "integrations/torture/truth.h"
#include "transfer/memory_chunk_store.h"
#include "transfer/memory_transfer_engine.h"
#include "transfer/rocksdb_store.h"

namespace prehoc::torture {
namespace {

constexpr int kActorsPerThread = 3;
constexpr int kMostTries = 12;       // of one step, before a sequence is given up with the error
// Too few for all sequences, so that blocks leave and come back; enough for what the threads pin at once.
constexpr int64_t HostBlocks(int threads) { return 8 + 15 * threads; }
constexpr size_t kKeptMessages = 20;

Result<SelectorOptions> SelectorOfRound(int64_t round) {
  constexpr std::pair<SelectorKind, const char*> kSelectors[] = {
      {SelectorKind::kTwoClock, "tc.theta=0"}, {SelectorKind::kDense, ""}, {SelectorKind::kCis, ""}, {SelectorKind::kQuest, "quest.page=16"}};
  const auto& [kind, knob] = kSelectors[static_cast<size_t>(round / 2) % std::size(kSelectors)];
  SelectorOptions selector;
  selector.kind = kind;
  selector.budget.sinks = 4;
  selector.budget.local = 8;
  selector.budget.tokens = 48;
  const std::string_view assignment = knob;
  if (const size_t equals = assignment.find('='); equals != std::string_view::npos) {
    PREHOC_RETURN_IF_ERROR(selector.Set(assignment.substr(0, equals), assignment.substr(equals + 1)));
  }
  if (kind == SelectorKind::kTwoClock) {
    // So that rows move behind the steps, too.
    PREHOC_RETURN_IF_ERROR(selector.Set("tc.refresh", "2"));
    PREHOC_RETURN_IF_ERROR(selector.Set("tc.lag", "1"));
  }
  return selector;
}

// Errors that say that something failed. Others would say that the caller did something wrong, and nobody did.
bool MayBeTold(StatusCode code) {
  switch (code) {
    case StatusCode::kNotFound:
    case StatusCode::kBusy:
    case StatusCode::kDeadline:
    case StatusCode::kOutOfSpace:
    case StatusCode::kIoError:
    case StatusCode::kCorrupt: return true;
    default: return false;
  }
}

// What all sequences of a round add up. Safe from any thread.
class Ledger {
 public:
  void Wrong(std::string what) {
    MutexLock lock(mutex_);
    ++wrong_count_;
    if (wrong_.size() < kKeptMessages) wrong_.push_back(std::move(what));
  }
  void Told(const Status& status) {
    MutexLock lock(mutex_);
    ++told_[std::string(StatusCodeName(status.code()))];
  }
  void AddTo(TortureResult* result, int64_t round) {
    MutexLock lock(mutex_);
    result->sequences += sequences;
    result->finished += finished;
    result->steps += steps;
    result->outputs += outputs;
    result->restored += restored;
    result->repaired += repaired;
    result->retried += retried;
    result->late += late;
    result->opened += opened;
    for (const auto& [code, count] : told_) result->told[code] += count;
    result->wrong_count += wrong_count_;
    for (std::string& what : wrong_) {
      if (result->wrong.size() < kKeptMessages) result->wrong.push_back("round " + std::to_string(round) + ": " + what);
    }
  }
  std::atomic<uint64_t> sequences{0}, finished{0}, steps{0}, outputs{0}, restored{0}, repaired{0}, retried{0}, late{0}, opened{0};

 private:
  Mutex mutex_;
  uint64_t wrong_count_ PREHOC_GUARDED_BY(mutex_) = 0;
  std::vector<std::string> wrong_ PREHOC_GUARDED_BY(mutex_);
  std::map<std::string, uint64_t> told_ PREHOC_GUARDED_BY(mutex_);
};

// One sequence after the other. For one thread at a time.
class Actor {
 public:
  Actor(KvCache* cache, const Truth* truth, FaultPlan* plan, Ledger* ledger, uint64_t seed, uint64_t device_bytes, double memory_rate)
      : cache_(cache), truth_(truth), plan_(plan), ledger_(ledger), random_(seed), device_bytes_(device_bytes), memory_rate_(memory_rate) {}

  void Step() {
    ++ledger_->steps;
    if (plan_->Draw(Fault::kMemory, memory_rate_)) {
      const uint64_t pick = plan_->Next(), bit = plan_->Next();
      if (cache_->FlipIdleBitForTest(pick, bit)) plan_->Injected(Fault::kMemory);
    }
    if (sequence_ == nullptr) return Open();
    if (sequence_->length() < prompt_) return Prefill();
    if (sequence_->length() < prompt_ + steps_) return Decode();
    Close();
  }
  uint64_t digest() const { return digest_; }
  void End() { sequence_.reset(); }

 private:
  void Open() {
    stream_ = static_cast<int64_t>(random_.Below(kStreams));
    prompt_ = kPrompts[random_.Below(kPrompts.size())];
    // Half of them come for the prefix and little more: that is where most is read.
    steps_ = random_.Below(2) == 0 ? 1 : 1 + static_cast<int64_t>(random_.Below(kMaxSteps));
    auto opened = cache_->OpenWithPrefix({.max_tokens = kMaxTokens, .device_bytes = device_bytes_}, text().tokens(0, prompt_));
    ++ledger_->sequences;
    if (!opened.ok()) return GiveUp(opened.status());
    sequence_ = std::move(opened).value();
    ledger_->restored += static_cast<uint64_t>(sequence_->restored());
    Note(static_cast<uint64_t>(sequence_->restored()));
  }

  void Prefill() {
    const int64_t first = sequence_->length();
    const int64_t count = std::min<int64_t>(prompt_ - first, 1 + static_cast<int64_t>(random_.Below(80)));
    if (!Run(count, prompt_)) return;
    Compare(truth_->PrefillIsRight(stream_, first, count, outputs_), "prompt tokens from " + std::to_string(first));
  }

  void Decode() {
    const int64_t step = sequence_->length() - prompt_;
    if (!Run(1, 0)) return;
    Compare(truth_->StepIsRight(stream_, prompt_, step, outputs_), "decode step " + std::to_string(step));
  }

  void Close() {
    const Status invariants = sequence_->CheckInvariants();
    if (!invariants.ok()) ledger_->Wrong("a sequence breaks its rules: " + invariants.message());
    ++ledger_->finished;
    sequence_.reset();
  }

  // Runs tokens, again and again where a fault may pass; false if the sequence was given up.
  bool Run(int64_t count, int64_t prompt) {
    Status status;
    for (int tries = 0; tries < kMostTries; ++tries) {
      status = RunTokens(*sequence_, text(), count, prompt, &outputs_);
      if (status.ok()) return true;
      ++ledger_->retried;
      uint64_t repaired = 0;
      const Status repair = RepairLost(*sequence_, text(), &repaired);
      ledger_->repaired += repaired;
      if (!repair.ok() && !MayBeTold(repair.code())) break;
    }
    GiveUp(status);
    return false;
  }

  void GiveUp(const Status& status) {
    if (!MayBeTold(status.code()) || status.message().empty()) ledger_->Wrong("an error that no fault explains: " + status.ToString());
    ledger_->Told(status);
    Note(static_cast<uint64_t>(status.code()));
    sequence_.reset();
  }

  void Compare(bool right, const std::string& what) {
    ledger_->outputs += static_cast<uint64_t>(TortureGeometry().layers);
    if (!right) {
      ledger_->Wrong("stream " + std::to_string(stream_) + ", prompt of " + std::to_string(prompt_) + ", " + what + ": output is not what it is without faults");
    }
    for (const auto& layer : outputs_) {
      for (const float x : layer) Note(std::bit_cast<uint32_t>(x));
    }
  }

  void Note(uint64_t value) { digest_ = (digest_ ^ value) * 0x100000001b3u; }
  const Stream& text() const { return truth_->stream(stream_); }

  KvCache* const cache_;
  const Truth* const truth_;
  FaultPlan* const plan_;
  Ledger* const ledger_;
  Rng random_;
  const uint64_t device_bytes_;
  const double memory_rate_;
  std::unique_ptr<Sequence> sequence_;
  int64_t stream_ = 0, prompt_ = 0, steps_ = 0;
  Outputs outputs_;
  uint64_t digest_ = 0;
};

CacheOptions OptionsOfCache(const SelectorOptions& selector, const KvGeometry& geometry, int threads) {
  CacheOptions options;
  options.geometry = geometry;
  constexpr uint64_t kPage = 4096;  // of memory: blocks take whole ones
  options.host_budget = static_cast<uint64_t>(HostBlocks(threads)) * RoundUp(geometry.block_bytes(), kPage);
  options.huge_pages = false;
  options.verify_pins = true;
  options.audit_every = 0;
  options.selector = selector;
  options.codes.group_tokens = 16;
  options.tenant_salt = "torture";
  options.health.backoff_nanos = 1'000'000;  // or a store of which a quarter fails would hardly be asked
  return options;
}

// What a sequence needs of the device at least, to 1 KiB, and a little more: rows go up and down.
Result<uint64_t> DeviceBytes(const SelectorOptions& selector, const KvGeometry& geometry) {
  ManualExecutor executor;
  HostDeviceMemory device(64 << 20);
  CacheResources resources;
  resources.executor = &executor;
  resources.device = &device;
  PREHOC_ASSIGN_OR_RETURN(const auto cache, KvCache::Create(OptionsOfCache(selector, geometry, 1), resources));
  for (uint64_t bytes = 8 << 10; bytes < device.budget(); bytes += 1 << 10) {
    const auto opened = cache->Open({.max_tokens = kMaxTokens, .device_bytes = bytes});
    if (opened.ok()) return bytes + (4 << 10);
    if (opened.status().code() != StatusCode::kOutOfSpace) return opened.status();
  }
  return {StatusCode::kOutOfSpace, "a sequence does not fit the device"};
}

// One cache over its tiers, all of them faulty.
class World {
 public:
  static Result<std::unique_ptr<World>> Create(const TortureOptions& options, bool disk, uint64_t seed, const SelectorOptions& selector,
                                               const Truth* truth, TruthStore::Known known) {
    std::unique_ptr<World> world(new World(options, disk, seed));
    world->plan_.Pause(true);  // what is tested begins when it stands
    PREHOC_RETURN_IF_ERROR(world->OpenStore(truth));
    world->truth_store_->GiveKnown(std::move(known));
    PREHOC_ASSIGN_OR_RETURN(world->device_bytes_, DeviceBytes(selector, truth->geometry()));
    if (disk) {
      PREHOC_ASSIGN_OR_RETURN(world->pool_, ThreadPool::Create({.loop_threads = 1, .job_threads = 2, .spin_iterations = 0}));
      PREHOC_ASSIGN_OR_RETURN(world->readers_, ThreadPool::Create({.loop_threads = 1, .job_threads = 4, .spin_iterations = 0}));
    }
    Executor* const jobs = disk ? static_cast<Executor*>(world->pool_.get()) : &world->manual_;
    world->jobs_ = std::make_unique<FaultyJobs>(jobs, &world->plan_, options.rate / 8);
    world->engine_ = std::make_unique<MemoryTransferEngine>(world->jobs_.get());
    world->copies_ = std::make_unique<FaultyCopies>(world->engine_.get(), &world->plan_, options.rate / 8);
    CacheResources resources;
    resources.executor = &world->loops_;
    resources.background = world->jobs_.get();
    resources.device = &world->device_;
    resources.store = world->truth_store_.get();
    resources.transfer = world->copies_.get();
    resources.clock = &world->clock_;
    CacheOptions cache = OptionsOfCache(selector, truth->geometry(), disk ? options.threads : 1);
    if (disk) {
      // Time leaps, so reads come late now and then.
      resources.io = world->readers_.get();
      cache.read_deadline_nanos = 100'000'000;
    }
    PREHOC_ASSIGN_OR_RETURN(world->cache_, KvCache::Create(cache, resources));
    world->plan_.Pause(false);
    return world;
  }

  std::unique_ptr<Actor> NewActor(const Truth* truth, Ledger* ledger, uint64_t seed, double rate) {
    return std::make_unique<Actor>(cache_.get(), truth, &plan_, ledger, seed, device_bytes_, rate / 4);
  }
  FaultPlan& plan() { return plan_; }
  ManualExecutor& manual() { return manual_; }
  ManualClock& time() { return manual_clock_; }
  TruthStore& truth_store() { return *truth_store_; }

  // No more faults: everything is written, and what was written wrong and not read since is read now.
  void Settle(Ledger* ledger) {
    plan_.Pause(true);
    jobs_->Drain();
    cache_->Flush().IgnoreError();  // a block that was damaged in memory is lost, and said so
    jobs_->Drain();
    uint64_t found = 0;
    cache_->VisitCounters([&](std::string_view name, double value) {
      if (name == "host.corrupt") found = static_cast<uint64_t>(value);
      if (name == "host.late") ledger->late += static_cast<uint64_t>(value);
      if (name == "health.opened") ledger->opened += static_cast<uint64_t>(value);
    });
    const uint64_t flipped = plan_.Of(Fault::kMemory).injected;
    for (uint64_t i = 0; i < std::min(found, flipped); ++i) plan_.Detected(Fault::kMemory);
    plan_.Unread(Fault::kMemory, flipped - std::min(found, flipped));
    if (found > flipped) ledger->Wrong("host memory was found damaged more often than it was damaged");
    std::vector<std::byte> out(store_->chunk_bytes());
    for (const ChunkKey& key : medium_.UnreadDamage()) {
      const Status status = truth_store_->Get(key, out);
      if (status.code() == StatusCode::kNotFound) medium_.ForgetDamage(key);
    }
    cache_.reset();
  }

 private:
  World(const TortureOptions& options, bool disk, uint64_t seed)
      : options_(options), disk_(disk), plan_(options.faults, seed), medium_(&plan_, options.rate),
        clock_(disk ? static_cast<const Clock*>(&SteadyClock::Get()) : &manual_clock_, &plan_, options.rate / 1024),
        memory_(uint64_t{256} << 20), device_(&memory_, &plan_, options.rate / 8) {}

  Status OpenStore(const Truth* truth) {
    const KvGeometry& geometry = truth->geometry();
    StoreIdentity identity;
    identity.model_name = "torture";
    identity.dtype = RowFormatName(geometry.rows);
    identity.layout = geometry.LayoutName();
    if (disk_) {
      RocksDbStore::Options store;
      store.path = options_.directory + "/store";
      store.identity = identity;
      store.chunk_bytes = geometry.block_bytes();
      store.budget = 16 << 20;
      store.min_free_bytes = 0;
      store.tap = &medium_;
      PREHOC_ASSIGN_OR_RETURN(store_, RocksDbStore::Open(store));
    } else {
      MemoryChunkStore::Options store;
      store.identity = identity;
      store.chunk_bytes = geometry.block_bytes();
      store.budget = 160 * (geometry.block_bytes() + 128);  // not for everything either
      store.tap = &medium_;
      PREHOC_ASSIGN_OR_RETURN(store_, MemoryChunkStore::Create(store));
    }
    truth_store_ = std::make_unique<TruthStore>(store_.get(), truth, &plan_, options_.rate / 8);
    return {};
  }

  // In the order in which they need each other.
  const TortureOptions& options_;
  const bool disk_;
  FaultPlan plan_;
  FaultyMedium medium_;
  ManualClock manual_clock_;
  LeapingClock clock_;
  HostDeviceMemory memory_;
  FaultyDevice device_;
  std::unique_ptr<ChunkStore> store_;
  std::unique_ptr<TruthStore> truth_store_;
  ManualExecutor loops_;   // loops run on their caller
  ManualExecutor manual_;  // jobs run when the round says so
  std::unique_ptr<ThreadPool> pool_, readers_;
  std::unique_ptr<FaultyJobs> jobs_;
  std::unique_ptr<MemoryTransferEngine> engine_;
  std::unique_ptr<FaultyCopies> copies_;
  std::unique_ptr<KvCache> cache_;
  uint64_t device_bytes_ = 0;
};

class Run {
 public:
  explicit Run(const TortureOptions& options)
      : options_(options), clock_(options.clock != nullptr ? *options.clock : SteadyClock::Get()), start_(clock_.NowNanos()), truth_(options.seed, options.rows) {}

  Result<TortureResult> All() {
    const int64_t first = std::max<int64_t>(0, options_.only_round);
    const int64_t end = options_.only_round >= 0 ? first + 1 : INT64_MAX;
    for (int64_t round = first; round < end && result_.rounds < options_.max_rounds && !options_.stop(); ++round) {
      if (round > first && clock_.SecondsSince(start_) >= options_.seconds) break;
      const bool disk = round % 2 == 1;
      if (disk && options_.directory.empty()) continue;
      PREHOC_RETURN_IF_ERROR(Round(round, disk));
    }
    result_.seconds = clock_.SecondsSince(start_);
    return std::move(result_);
  }

 private:
  Status Round(int64_t round, bool disk) {
    PREHOC_ASSIGN_OR_RETURN(const SelectorOptions selector, SelectorOfRound(round));
    PREHOC_RETURN_IF_ERROR(truth_.Prepare(selector));
    Rng random(options_.seed * 0x9e3779b97f4a7c15u + static_cast<uint64_t>(round));
    Ledger ledger;
    PREHOC_ASSIGN_OR_RETURN(const auto world, World::Create(options_, disk, random.Next(), selector, &truth_,
                                                            disk ? std::exchange(known_, {}) : TruthStore::Known{}));
    const int threads = disk ? options_.threads : 1;
    std::vector<std::unique_ptr<Actor>> actors;
    for (int i = 0; i < threads * kActorsPerThread; ++i) actors.push_back(world->NewActor(&truth_, &ledger, random.Next(), options_.rate));
    if (disk) {
      Threads(actors, threads, random.Next());
    } else {
      OneThread(*world, actors, random.Next());
    }
    for (auto& actor : actors) {
      if (!disk) result_.digest = (result_.digest ^ actor->digest()) * 0x100000001b3u;
      actor->End();
    }
    if (!disk) result_.digest = (result_.digest ^ world->plan().digest()) * 0x100000001b3u;
    world->Settle(&ledger);
    for (std::string& what : world->truth_store().TakeWrong()) ledger.Wrong(std::move(what));
    if (disk) known_ = world->truth_store().TakeKnown();
    result_.reads += world->truth_store().reads();
    result_.writes += world->truth_store().writes();
    for (size_t f = 0; f < kFaults; ++f) {
      const FaultPlan::Count count = world->plan().Of(static_cast<Fault>(f));
      if (count.missed > 0) ledger.Wrong(std::string(InfoOf(static_cast<Fault>(f)).name) + " passed a check " + std::to_string(count.missed) + " times");
      result_.counts[f].injected += count.injected;
      result_.counts[f].detected += count.detected;
      result_.counts[f].unread += count.unread;
      result_.counts[f].missed += count.missed;
    }
    ledger.AddTo(&result_, round);
    ++result_.rounds;
    options_.progress(result_.injected(), clock_.SecondsSince(start_));
    return {};
  }

  // Sequences take turns as the seed says, and so do background jobs.
  void OneThread(World& world, std::vector<std::unique_ptr<Actor>>& actors, uint64_t seed) {
    Rng random(seed);
    for (int64_t step = 0; step < options_.steps && !options_.stop(); ++step) {
      actors[random.Below(actors.size())]->Step();
      world.time().Advance(1000);
      while (world.manual().queued() > 0 && random.Below(4) != 0) world.manual().RunAt(random.Below(world.manual().queued()));
    }
  }

  void Threads(std::vector<std::unique_ptr<Actor>>& actors, int threads, uint64_t seed) {
    std::vector<std::thread> running;
    for (int t = 0; t < threads; ++t) {
      running.emplace_back([&, t] {
        Rng random(seed + static_cast<uint64_t>(t));
        const auto own = static_cast<size_t>(t) * kActorsPerThread;
        for (int64_t step = 0; step < options_.steps / threads && !options_.stop(); ++step) {
          actors[own + random.Below(kActorsPerThread)]->Step();
        }
      });
    }
    for (std::thread& thread : running) thread.join();
  }

  const TortureOptions& options_;
  const Clock& clock_;
  const int64_t start_;
  Truth truth_;
  TruthStore::Known known_;
  TortureResult result_;
};

}  // namespace

uint64_t TortureResult::injected() const {
  uint64_t sum = 0;
  for (const FaultPlan::Count& count : counts) sum += count.injected;
  return sum;
}

Result<TortureResult> RunTorture(const TortureOptions& options) { return Run(options).All(); }

}  // namespace prehoc::torture
