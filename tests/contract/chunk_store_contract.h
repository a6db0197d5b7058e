// What every ChunkStore does, whatever it is made of. A test program names its worlds with
//   INSTANTIATE_TEST_SUITE_P(Memory, ChunkStoreContract, ::testing::Values(world), ChunkStoreWorldName);
#pragma once
#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "transfer/chunk_store.h"

namespace prehoc {

// Owns a store and whatever lies under it.
class ChunkStoreUnderTest {
 public:
  virtual ~ChunkStoreUnderTest() = default;
  virtual ChunkStore& store() = 0;
};

struct ChunkStoreWorld {
  std::string name;
  // A store for records of kContractChunkBytes that holds at least kContractRecords of them.
  std::function<std::unique_ptr<ChunkStoreUnderTest>()> make;
};
inline constexpr size_t kContractChunkBytes = 4096;
inline constexpr int kContractRecords = 256;
inline std::string ChunkStoreWorldName(const ::testing::TestParamInfo<ChunkStoreWorld>& info) {
  return info.param.name;
}
inline void PrintTo(const ChunkStoreWorld& world, std::ostream* os) { *os << world.name; }

class ChunkStoreContract : public ::testing::TestWithParam<ChunkStoreWorld> {
 protected:
  ChunkStoreContract() : world_(GetParam().make()) {}
  ChunkStore& store() { return world_->store(); }
  double Counter(const std::string& name);

 private:
  std::unique_ptr<ChunkStoreUnderTest> world_;
};

}  // namespace prehoc
