// A store that is killed again and again: a child process writes, reads, deletes, evicts, flushes, closes and opens, and is ended
// by SIGKILL at a random moment; then this process opens the store and looks at everything in it.
//   crash_loop ROUNDS SEED    exit code 1, and the round, if a byte is wrong or something acknowledged is gone
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>
#include <string>

#include "tests/support/chunk_data.h"
#include "tests/support/temp_dir.h"
#include "transfer/rocksdb_store.h"

namespace prehoc {
namespace {

constexpr size_t kBytes = 4096;
constexpr int32_t kTick = INT32_MIN;  // a message: one step begins
constexpr int kWindow = 1500;  // records of those put last; far fewer than the budget holds

RocksDbStore::Options OptionsFor(const std::string& path) {
  RocksDbStore::Options options;
  options.path = path;
  options.identity = TestIdentity();
  options.chunk_bytes = kBytes;
  options.budget = 16 << 20;  // so that segments are dropped all the time
  options.segment_bytes = 1 << 20;
  options.min_free_bytes = 0;
  return options;
}

// Says "the store has everything up to this" or "this one is deleted" (negative).
void Tell(int fd, int32_t message) {
  if (::write(fd, &message, sizeof message) != sizeof message) ::_exit(0);
}

// Never returns: ended from outside, or by the first thing that is wrong.
[[noreturn]] void Child(const std::string& path, int next, uint64_t seed, int fd) {
  Rng rng(seed);
  std::vector<std::byte> out(kBytes);
  while (true) {
    auto opened = RocksDbStore::Open(OptionsFor(path));
    if (!opened.ok()) {
      std::fprintf(stderr, "child: %s\n", opened.status().ToString().c_str());
      ::_exit(3);
    }
    RocksDbStore& store = **opened;
    const int64_t steps = rng.Int(20, 400);
    for (int64_t i = 0; i < steps; ++i) {
      Status status;
      Tell(fd, kTick);
      if (rng.Chance(0.85)) {
        status = store.Put(TestKey(next), TestChunk(next, kBytes), {.chunk = next});
        if (status.ok()) ++next;
      } else if (rng.Chance(0.1)) {
        const auto n = static_cast<int32_t>(rng.Int(std::max(1, next - kWindow), next));
        Tell(fd, -n);  // before: it may be gone from here on
        status = store.Delete(TestKey(n));
      } else if (rng.Chance(0.15)) {
        status = store.Flush();
        if (status.ok()) Tell(fd, next - 1);
      } else {
        const auto n = static_cast<int>(rng.Int(std::max(1, next - kWindow), next));
        status = store.Get(TestKey(n), out);
        if (status.ok() && out != TestChunk(n, kBytes)) ::_exit(4);
      }
      if (status.code() == StatusCode::kCorrupt || status.code() == StatusCode::kIoError) {
        std::fprintf(stderr, "child: %s\n", status.ToString().c_str());
        ::_exit(5);
      }
    }
    opened->reset();  // flushes
    Tell(fd, next - 1);
  }
}

struct Model {
  int next = 1;             // to be put
  int acknowledged = 0;     // everything up to this was flushed
  std::set<int> deleted;
};

// Listens to the child until it is time to kill it.
bool Round(const std::string& path, Rng* rng, Model* model) {
  int pipes[2];
  if (::pipe2(pipes, O_CLOEXEC) != 0) return false;
  const uint64_t seed = rng->Next();
  const int first = model->next;
  // A program of its own, not only a process: RocksDB's threads do not survive a fork.
  const pid_t pid = ::fork();
  if (pid == 0) {
    ::dup2(pipes[1], 1);
    const std::string next = std::to_string(first), seeded = std::to_string(seed);
    ::execl("/proc/self/exe", "crash_loop", "child", path.c_str(), next.c_str(), seeded.c_str(), static_cast<char*>(nullptr));
    ::_exit(127);
  }
  ::close(pipes[1]);
  // Now and then while it opens what the last one left; else at some step of its work, and a moment later.
  int64_t ticks = rng->Chance(0.15) ? -1 : rng->Int(0, 500);
  int32_t message = 0;
  const auto note = [&] {
    if (message == kTick) {
      --ticks;
    } else if (message < 0) {
      model->deleted.insert(-message);
    } else {
      model->acknowledged = message;
    }
  };
  while (ticks >= 0 && ::read(pipes[0], &message, sizeof message) == sizeof message) note();
  // The moment is the test: anywhere within a step, or between two.
  const auto moment = std::chrono::steady_clock::now() + std::chrono::microseconds(rng->Int(0, 5'000));
  while (true) {
    const auto left = std::chrono::duration_cast<std::chrono::nanoseconds>(moment - std::chrono::steady_clock::now()).count();
    const timespec wait{0, std::max<int64_t>(0, left)};
    pollfd listening{pipes[0], POLLIN, 0};
    if (left <= 0 || ::ppoll(&listening, 1, &wait, nullptr) <= 0) break;
    if (::read(pipes[0], &message, sizeof message) != sizeof message) break;
    note();
  }
  ::kill(pid, SIGKILL);
  int status = 0;
  ::waitpid(pid, &status, 0);
  while (::read(pipes[0], &message, sizeof message) == sizeof message) note();
  ::close(pipes[0]);
  if (WIFEXITED(status)) {
    std::fprintf(stderr, "the child ended by itself with code %d\n", WEXITSTATUS(status));
    return false;
  }
  return true;
}

// Opens what is left and compares.
bool Check(const std::string& path, Model* model) {
  auto opened = RocksDbStore::Open(OptionsFor(path));
  if (!opened.ok()) {
    std::fprintf(stderr, "does not open: %s\n", opened.status().ToString().c_str());
    return false;
  }
  RocksDbStore& store = **opened;
  if (const Status rules = store.CheckInvariants(); !rules.ok()) {
    std::fprintf(stderr, "%s\n", rules.ToString().c_str());
    return false;
  }
  std::vector<std::byte> out(kBytes);
  int last = 0;
  for (const auto& record : store.ListRecords()) {
    const auto header = store.Inspect(record.key, VerifyPayload::kNo);
    if (!header.ok()) {
      std::fprintf(stderr, "unreadable: %s\n", header.status().ToString().c_str());
      return false;
    }
    const int n = OriginOf(*header).chunk;
    last = std::max(last, n);
    if (record.key != TestKey(n) || !store.Get(record.key, out).ok() || out != TestChunk(n, kBytes)) {
      std::fprintf(stderr, "record %d holds other bytes\n", n);
      return false;
    }
  }
  for (int n = std::max(1, model->acknowledged - kWindow); n <= model->acknowledged; ++n) {
    if (model->deleted.contains(n) || store.Contains(TestKey(n))) continue;
    std::fprintf(stderr, "record %d of %d acknowledged ones is gone\n", n, model->acknowledged);
    return false;
  }
  model->next = std::max(last, model->acknowledged) + 1;
  return true;
}

int Main(int rounds, uint64_t seed) {
  TempDir dir;
  const std::string path = dir.path() + "/store";
  Rng rng(seed);
  Model model;
  {
    // Full from the start: the children drop segments.
    auto opened = RocksDbStore::Open(OptionsFor(path));
    if (!opened.ok()) return 1;
    while (model.next < 3600) {
      const Status status = (*opened)->Put(TestKey(model.next), TestChunk(model.next, kBytes), {.chunk = model.next});
      if (status.ok()) ++model.next;
      if (status.code() == StatusCode::kBusy && (*opened)->Flush().ok()) continue;
      if (!status.ok()) return 1;
    }
  }
  model.acknowledged = model.next - 1;
  for (int round = 0; round < rounds; ++round) {
    if (!Round(path, &rng, &model) || !Check(path, &model)) {
      std::fprintf(stderr, "crash_loop: round %d of seed %llu\n", round, static_cast<unsigned long long>(seed));
      return 1;
    }
  }
  if (model.acknowledged < 3700) {
    std::fprintf(stderr, "crash_loop: the children hardly got to work\n");
    return 1;
  }
  const auto left = RocksDbStore::Open(OptionsFor(path));
  if (!left.ok() || (*left)->Contains(TestKey(1))) {
    std::fprintf(stderr, "crash_loop: nothing was evicted\n");
    return 1;
  }
  std::printf("killed %d times: %d records put, %d acknowledged, %zu deleted; nothing torn, nothing lost\n", rounds, model.next - 1,
              model.acknowledged, model.deleted.size());
  return 0;
}

}  // namespace
}  // namespace prehoc

int main(int argc, char** argv) {
  if (argc == 5 && std::string(argv[1]) == "child") prehoc::Child(argv[2], std::atoi(argv[3]), std::strtoull(argv[4], nullptr, 10), 1);
  if (argc != 3) return 2;
  return prehoc::Main(std::atoi(argv[1]), std::strtoull(argv[2], nullptr, 10));
}
