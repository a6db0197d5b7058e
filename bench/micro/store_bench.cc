// How fast do blocks come back from disk, verified?
//
// Writes --gib of random blocks to a RocksDbStore and the same number of bytes to a plain file beside it, then reads
// all of them with 1, 2, 4 and 8 threads, in the order of writing and in random order: the plain file with O_DIRECT and
// one pread a block (the floor), the same and then one load from every cache line (what the bytes cost whoever first
// looks at them), the store with and without checking its checksums, and the latter with such a load. Bytes moved are those of the blocks. Direct I/O
// everywhere, so that nothing comes from the page cache; --dir must lie on a disk, not on tmpfs.
//
//   store_bench --dir=DIR [--gib=2] [--block_kib=192] [--buffered] [Google Benchmark flags]
//
// 192 KiB is a block of the default model: 256 tokens x 3 KV heads x (64 + 64) x 2 bytes.
#include <benchmark/benchmark.h>
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <charconv>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "base/clock.h"
#include "base/rng.h"
#include "base/units.h"
#include "transfer/rocksdb_store.h"

namespace prehoc {
namespace {

struct Settings {
  std::string dir;
  double gib = 2;
  uint64_t block_bytes = 192 * kKiB;
  bool direct_io = true;
  int64_t blocks() const {
    return static_cast<int64_t>(gib * static_cast<double>(kGiB)) / static_cast<int64_t>(block_bytes);
  }
};

[[noreturn]] void Die(const std::string& what) {
  std::fprintf(stderr, "store_bench: %s\n", what.c_str());
  std::exit(1);
}
void Check(const Status& status) {
  if (!status.ok()) Die(status.ToString());
}

struct FreeAligned {
  void operator()(std::byte* data) const { std::free(data); }
};
using AlignedBuffer = std::unique_ptr<std::byte[], FreeAligned>;
AlignedBuffer NewAligned(uint64_t bytes) {
  return AlignedBuffer(static_cast<std::byte*>(std::aligned_alloc(4096, RoundUp(bytes, 4096))));
}

void FillRandom(uint64_t seed, std::byte* out, uint64_t bytes) {
  Rng rng(seed);
  for (uint64_t i = 0; i < bytes; i += 8) {
    const uint64_t word = rng.Next();
    std::memcpy(out + i, &word, std::min<uint64_t>(8, bytes - i));
  }
}

ChunkKey KeyOf(int64_t block) {
  Rng rng(static_cast<uint64_t>(block) + 1);
  ChunkKey key;
  for (uint8_t& byte : key.chain) byte = static_cast<uint8_t>(rng.Next());
  return key;
}

// A directory of our own within --dir, gone with the program.
class World {
 public:
  explicit World(const Settings& settings)
      : settings_(settings), path_(settings.dir + "/store_bench." + std::to_string(::getpid())) {
    std::filesystem::create_directories(path_);
    block_stride_ = RoundUp(settings.block_bytes, 4096);
    for (int64_t i = 0; i < settings.blocks(); ++i) keys_.push_back(KeyOf(i));
    WriteFile();
    WriteStore();
  }
  ~World() {
    store_.reset();
    if (fd_ >= 0) ::close(fd_);
    std::error_code error;
    std::filesystem::remove_all(path_, error);
  }
  World(const World&) = delete;
  World& operator=(const World&) = delete;

  void ReadRaw(int64_t block, std::byte* out) const {
    for (uint64_t done = 0; done < block_stride_;) {
      const ssize_t n = ::pread(fd_, out + done, block_stride_ - done,
                                static_cast<off_t>(static_cast<uint64_t>(block) * block_stride_ + done));
      if (n <= 0 && errno != EINTR) Die("pread: " + std::string(std::strerror(errno)));
      if (n > 0) done += static_cast<uint64_t>(n);
    }
  }
  void ReadStore(int64_t block, std::byte* out) {
    Check(store_->Get(keys_[static_cast<size_t>(block)], {out, settings_.block_bytes}));
  }
  void OpenStore(bool verify) {
    store_.reset();
    RocksDbStore::Options options;
    options.path = path_ + "/store";
    options.identity.layout = "bench";
    options.chunk_bytes = settings_.block_bytes;
    const uint64_t data = static_cast<uint64_t>(settings_.blocks()) * settings_.block_bytes;
    options.budget = std::max(64 * kMiB, 2 * data);
    options.direct_io = settings_.direct_io;
    options.verify = verify;
    auto store = RocksDbStore::Open(options);
    Check(store.status());
    store_ = std::move(*store);
  }
  double write_gbps() const { return write_gbps_; }

 private:
  void WriteFile() {
    const std::string name = path_ + "/plain";
    const int direct = settings_.direct_io ? O_DIRECT : 0;
    fd_ = ::open(name.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC | direct, 0600);
    if (fd_ < 0) Die(name + ": " + std::strerror(errno) + " (--buffered does without direct I/O)");
    AlignedBuffer buffer = NewAligned(block_stride_);
    for (int64_t i = 0; i < settings_.blocks(); ++i) {
      FillRandom(static_cast<uint64_t>(i), buffer.get(), block_stride_);
      if (::write(fd_, buffer.get(), block_stride_) != static_cast<ssize_t>(block_stride_)) {
        Die(name + ": write: " + std::strerror(errno));
      }
    }
    ::fsync(fd_);
  }
  void WriteStore() {
    OpenStore(true);
    AlignedBuffer buffer = NewAligned(settings_.block_bytes);
    double seconds = 0;
    for (int64_t i = 0; i < settings_.blocks(); ++i) {
      FillRandom(static_cast<uint64_t>(i), buffer.get(), settings_.block_bytes);
      const int64_t start = SteadyClock::Get().NowNanos();
      while (true) {
        const Status status = store_->Put(keys_[static_cast<size_t>(i)], {buffer.get(), settings_.block_bytes});
        if (status.ok()) break;
        if (status.code() != StatusCode::kBusy) Check(status);
        Check(store_->Flush());
      }
      seconds += SteadyClock::Get().SecondsSince(start);
    }
    const int64_t start = SteadyClock::Get().NowNanos();
    Check(store_->Flush());
    seconds += SteadyClock::Get().SecondsSince(start);
    write_gbps_ = static_cast<double>(settings_.blocks()) * static_cast<double>(settings_.block_bytes) / seconds / 1e9;
  }

  const Settings settings_;
  const std::string path_;
  uint64_t block_stride_ = 0;
  std::vector<ChunkKey> keys_;
  int fd_ = -1;
  std::unique_ptr<RocksDbStore> store_;
  double write_gbps_ = 0;
};

std::vector<int64_t> Order(int64_t blocks, bool random) {
  std::vector<int64_t> order(static_cast<size_t>(blocks));
  std::iota(order.begin(), order.end(), 0);
  if (random) Rng(42).Shuffle(order);
  return order;
}

// Reads every block once with `threads` threads; returns seconds.
double ReadAll(const std::vector<int64_t>& order, int threads, uint64_t block_bytes,
               const std::function<void(int64_t, std::byte*)>& read) {
  std::atomic<size_t> next{0};
  const auto work = [&](std::byte* out) {
    for (size_t i = next++; i < order.size(); i = next++) read(order[i], out);
  };
  std::vector<AlignedBuffer> buffers;
  for (int t = 0; t < threads; ++t) {
    buffers.push_back(NewAligned(block_bytes));
    std::memset(buffers.back().get(), 1, RoundUp(block_bytes, 4096));  // page faults are not the question
  }
  const int64_t start = SteadyClock::Get().NowNanos();
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back(work, buffers[static_cast<size_t>(t)].get());
  work(buffers[0].get());
  for (std::thread& thread : others) thread.join();
  return SteadyClock::Get().SecondsSince(start);
}

enum class What { kRaw, kRawTouched, kVerified, kUnverified, kUnverifiedTouched };

void Touch(const std::byte* data, uint64_t bytes) {
  unsigned sum = 0;
  for (uint64_t i = 0; i < bytes; i += 64) sum += std::to_integer<unsigned>(data[i]);
  benchmark::DoNotOptimize(sum);
}

struct Question {
  What what;
  int threads;
  bool random;
  std::string Name() const {
    const char* whats[] = {"raw", "raw_touched", "store_verified", "store_unverified", "store_unverified_touched"};
    return std::string(whats[static_cast<int>(what)]) + (random ? "/random" : "/sequential") + "/threads:" +
           std::to_string(threads);
  }
};

// The best raw rate seen with the same threads and order: what percentages refer to.
std::map<std::pair<int, bool>, double>& RawRates() {
  static std::map<std::pair<int, bool>, double> rates;
  return rates;
}

void Run(benchmark::State& state, World& world, const Settings& settings, const Question& question) {
  const std::vector<int64_t> order = Order(settings.blocks(), question.random);
  const bool raw = question.what == What::kRaw || question.what == What::kRawTouched;
  if (!raw) world.OpenStore(question.what == What::kVerified);
  const double bytes = static_cast<double>(settings.blocks()) * static_cast<double>(settings.block_bytes);
  double seconds = 0;
  int64_t passes = 0;
  for (auto _ : state) {
    const double pass = ReadAll(order, question.threads, settings.block_bytes, [&](int64_t block, std::byte* out) {
      raw ? world.ReadRaw(block, out) : world.ReadStore(block, out);
      if (question.what == What::kRawTouched || question.what == What::kUnverifiedTouched) Touch(out, settings.block_bytes);
    });
    state.SetIterationTime(pass);
    seconds += pass;
    ++passes;
  }
  const double gbps = bytes * static_cast<double>(passes) / seconds / 1e9;
  double& raw_gbps = RawRates()[{question.threads, question.random}];
  if (question.what == What::kRaw) raw_gbps = std::max(raw_gbps, gbps);
  state.counters["GB/s"] = gbps;
  state.counters["percent_of_raw"] = raw_gbps > 0 ? 100 * gbps / raw_gbps : 0;
  state.counters["bytes"] = bytes;
}

bool TakeFlag(std::string_view argument, Settings* settings) {
  const auto value = [&](std::string_view name) {
    return argument.starts_with(name) ? argument.substr(name.size()) : std::string_view();
  };
  const auto number = [&](std::string_view text) {
    double parsed = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), parsed);
    if (error != std::errc() || end != text.data() + text.size() || parsed <= 0) {
      Die(std::string(argument) + ": not a positive number");
    }
    return parsed;
  };
  if (argument == "--buffered") {
    settings->direct_io = false;
  } else if (const auto dir = value("--dir="); !dir.empty()) {
    settings->dir = dir;
  } else if (const auto gib = value("--gib="); !gib.empty()) {
    settings->gib = number(gib);
  } else if (const auto kib = value("--block_kib="); !kib.empty()) {
    settings->block_bytes = static_cast<uint64_t>(number(kib)) * kKiB;
  } else {
    return false;
  }
  return true;
}

int Main(int argc, char** argv) {
  Settings settings;
  std::vector<char*> rest;
  for (int i = 0; i < argc; ++i) {
    if (i == 0 || !TakeFlag(argv[i], &settings)) rest.push_back(argv[i]);
  }
  int rest_count = static_cast<int>(rest.size());
  benchmark::Initialize(&rest_count, rest.data());
  if (benchmark::ReportUnrecognizedArguments(rest_count, rest.data())) return 2;
  if (settings.dir.empty()) Die("--dir=DIR is missing: a directory on the disk to be measured");

  World world(settings);
  benchmark::AddCustomContext("question", "how fast do blocks come back from disk, verified?");
  benchmark::AddCustomContext("blocks", std::to_string(settings.blocks()) + " x " +
                                            FormatBytes(static_cast<double>(settings.block_bytes)) +
                                            (settings.direct_io ? ", direct I/O" : ", buffered"));
  benchmark::AddCustomContext("store_write_GB/s", std::to_string(world.write_gbps()));
  for (const bool random : {false, true}) {
    for (const int threads : {1, 2, 4, 8}) {
      for (const What what : {What::kRaw, What::kRawTouched, What::kVerified, What::kUnverified, What::kUnverifiedTouched}) {
        const Question question{what, threads, random};
        benchmark::RegisterBenchmark(question.Name().c_str(), [&, question](benchmark::State& state) {
          Run(state, world, settings, question);
        })->UseManualTime()->Iterations(1)->Unit(benchmark::kMillisecond);
      }
    }
  }
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}

}  // namespace
}  // namespace prehoc

int main(int argc, char** argv) { return prehoc::Main(argc, argv); }
