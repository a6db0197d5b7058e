// Another process, for tests of locks, crashes and full disks. It never closes a store: whatever ends it is a crash.
//   hold PATH FLUSHED MORE: puts FLUSHED records, flushes, puts MORE, says "ready", and waits for its input to end
//   pump PATH: puts records without end, flushes every 10, and writes a byte after each flush
//   full-disk PATH: mounts a small tmpfs at PATH for itself alone, fills it, frees it; exit code 77 where it may not mount
#include <fcntl.h>
#include <sched.h>
#include <sys/mount.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>

#include "tests/support/chunk_data.h"
#include "transfer/rocksdb_store.h"

namespace prehoc {
namespace {

constexpr size_t kBytes = 4096;

RocksDbStore::Options OptionsFor(const std::string& path) {
  RocksDbStore::Options options;
  options.path = path;
  options.identity = TestIdentity();
  options.chunk_bytes = kBytes;
  options.budget = 32 << 20;
  return options;
}

// Says where it went wrong; the parent only sees the code.
int Fail(int line, const Status& status) {
  std::fprintf(stderr, "rocksdb_store_child:%d: %s\n", line, status.ToString().c_str());
  return 1;
}
#define CHECK_OK(expr)                                                              \
  do {                                                                              \
    const ::prehoc::Status status_ = (expr);                                        \
    if (!status_.ok()) return ::prehoc::Fail(__LINE__, status_);                    \
  } while (false)
#define CHECK_THAT(cond)                                                                            \
  do {                                                                                              \
    if (!(cond)) return ::prehoc::Fail(__LINE__, {::prehoc::StatusCode::kInvalid, "expected " #cond}); \
  } while (false)

int Hold(const std::string& path, int flushed, int more) {
  auto opened = RocksDbStore::Open(OptionsFor(path));
  CHECK_OK(opened.status());
  RocksDbStore& store = **opened;
  for (int i = 0; i < flushed; ++i) CHECK_OK(store.Put(TestKey(i), TestChunk(i, kBytes)));
  CHECK_OK(store.Flush());
  for (int i = flushed; i < flushed + more; ++i) CHECK_OK(store.Put(TestKey(i), TestChunk(i, kBytes)));
  std::puts("ready");
  std::fflush(stdout);
  char byte;
  while (::read(0, &byte, 1) > 0) {
  }
  ::_exit(0);
}

int Pump(const std::string& path) {
  auto opened = RocksDbStore::Open(OptionsFor(path));
  CHECK_OK(opened.status());
  RocksDbStore& store = **opened;
  for (int i = 0;; ++i) {
    const Status status = store.Put(TestKey(i), TestChunk(i, kBytes));
    if (!status.ok() && status.code() != StatusCode::kBusy) return Fail(__LINE__, status);
    if (i % 10 != 9) continue;
    CHECK_OK(store.Flush());
    if (::write(1, "r", 1) != 1) ::_exit(0);  // nobody listens any more
  }
}

bool WriteText(const char* path, const std::string& text) {
  const int fd = ::open(path, O_WRONLY | O_CLOEXEC);
  if (fd < 0) return false;
  const bool written = ::write(fd, text.data(), text.size()) == static_cast<ssize_t>(text.size());
  ::close(fd);
  return written;
}

// A file system of its own in a name space of its own: needs no privileges where user name spaces are allowed.
bool MountSmallDisk(const std::string& path) {
  const std::string uid = std::to_string(::getuid()), gid = std::to_string(::getgid());
  if (::unshare(CLONE_NEWUSER | CLONE_NEWNS) != 0) return false;
  return WriteText("/proc/self/setgroups", "deny") && WriteText("/proc/self/uid_map", "0 " + uid + " 1") &&
         WriteText("/proc/self/gid_map", "0 " + gid + " 1") &&
         ::mount("none", path.c_str(), "tmpfs", 0, "size=12m") == 0;
}

int FullDisk(const std::string& path) {
  std::filesystem::create_directories(path);
  if (!MountSmallDisk(path)) return 77;
  RocksDbStore::Options options = OptionsFor(path + "/store");
  options.min_free_bytes = 0;
  options.segment_bytes = 512 << 10;
  auto opened = RocksDbStore::Open(options);
  CHECK_OK(opened.status());
  RocksDbStore& store = **opened;
  // Somebody else takes all but 2 MiB.
  std::string ballast(9 << 20, 'x');
  std::ofstream(path + "/ballast", std::ios::binary) << ballast;
  Status status;
  int stored = 0, dropped = 0, first_refused = -1;
  for (int i = 0; i < 3000 && dropped < 100; ++i) {
    status = store.Put(TestKey(i), TestChunk(i, kBytes));
    if (status.code() == StatusCode::kBusy) status = store.Flush(), --i;
    if (status.ok()) {
      ++stored;
    } else {
      ++dropped;
      if (first_refused < 0) first_refused = i;
      CHECK_THAT(status.code() == StatusCode::kOutOfSpace || status.code() == StatusCode::kIoError);
    }
  }
  CHECK_THAT(dropped == 100);
  CHECK_THAT(stored > 200);
  // What was stored is served.
  std::vector<std::byte> out(kBytes);
  CHECK_OK(store.Get(TestKey(0), out));
  CHECK_THAT(out == TestChunk(0, kBytes));
  for (int i = 0; i < first_refused; ++i) {
    status = store.Get(TestKey(i), out);
    CHECK_THAT(!status.ok() || out == TestChunk(i, kBytes));
  }
  CHECK_OK(store.CheckInvariants());
  // Room again: the store goes on without being reopened.
  std::filesystem::remove(path + "/ballast");
  for (int i = 5000; i < 5200; ++i) {
    status = store.Put(TestKey(i), TestChunk(i, kBytes));
    if (status.code() == StatusCode::kBusy) {
      CHECK_OK(store.Flush());
      --i;
      continue;
    }
    CHECK_OK(status);
  }
  CHECK_OK(store.Flush());
  for (int i = 5000; i < 5200; ++i) {
    CHECK_OK(store.Get(TestKey(i), out));
    CHECK_THAT(out == TestChunk(i, kBytes));
  }
  return 0;
}

int Main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "hold" && argc == 5) return Hold(argv[2], std::atoi(argv[3]), std::atoi(argv[4]));
  if (mode == "pump" && argc == 3) return Pump(argv[2]);
  if (mode == "full-disk" && argc == 3) return FullDisk(argv[2]);
  return 2;
}

}  // namespace
}  // namespace prehoc

int main(int argc, char** argv) {
  const int code = prehoc::Main(argc, argv);
  std::fflush(stderr);
  ::_exit(code);
}
