// Another process, for tests of locks and crashes: opens the store argv[1], puts keys 0 .. argv[2] - 1, flushes, puts
// argv[3] more, says "ready", waits for its input to end, and dies without closing anything.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

#include "tests/support/chunk_data.h"
#include "transfer/rocksdb_store.h"

namespace {
constexpr size_t kBytes = 4096;
}

int main(int argc, char** argv) {
  using namespace prehoc;
  if (argc != 4) return 2;
  RocksDbStore::Options options;
  options.path = argv[1];
  options.identity = TestIdentity();
  options.chunk_bytes = kBytes;
  options.budget = 32 << 20;
  auto store = RocksDbStore::Open(options);
  if (!store.ok()) return 3;
  const int flushed = std::atoi(argv[2]), more = std::atoi(argv[3]);
  for (int i = 0; i < flushed; ++i) {
    if (!(*store)->Put(TestKey(i), TestChunk(i, kBytes)).ok()) return 4;
  }
  if (!(*store)->Flush().ok()) return 5;
  for (int i = flushed; i < flushed + more; ++i) {
    if (!(*store)->Put(TestKey(i), TestChunk(i, kBytes)).ok()) return 6;
  }
  std::puts("ready");
  std::fflush(stdout);
  char byte;
  while (::read(0, &byte, 1) > 0) {
  }
  ::_exit(0);
}
