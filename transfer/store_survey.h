// What the records of a store are together: prompts whose chunks follow on each other, of which tenants, and what can be reached.
#pragma once
#include <cstdint>
#include <string_view>
#include <vector>

#include "transfer/chunk_store.h"

namespace prehoc {

// Numbers of a layout's name, "rows-kv/l30/h3/d64/p16/c256". 0 = not said.
struct LayoutNumbers {
  int32_t layers = 0, chunk_tokens = 0;
};
LayoutNumbers ParseLayoutNumbers(std::string_view layout);

struct SurveyRecord {
  ChunkKey key;
  ChunkOrigin origin;
  uint64_t segment = 0;
  bool damaged = false;  // cannot be read, or is not what was written; `origin` means nothing then
};

// Why no prompt can use a record.
enum class Unreachable : uint8_t {
  kNo,        // one can
  kDamaged,
  kBranch,    // only the sequence that wrote it could: rows of an answer, of a run that has ended
  kGap,       // a layer of its chunk is missing or damaged
  kNoParent,  // the chunk before it is not there, or cannot be used itself
};
const char* UnreachableName(Unreachable why);

// One tenant's prompts.
struct SurveyTenant {
  uint64_t tag = 0;             // ChunkOrigin::tenant
  int64_t prefixes = 0;         // prompts that end nowhere else: leaves of the tree that shared beginnings make
  int64_t longest_chunks = 0;   // of one of them
  int64_t chunks = 0;           // that can be used
  int64_t records = 0;          // of these chunks
  uint64_t oldest_segment = 0, newest_segment = 0;  // files that hold them
};

struct StoreSurvey {
  std::vector<Unreachable> why;       // [records]
  std::vector<SurveyTenant> tenants;  // by tag
  int64_t Count(Unreachable which) const;
};

// `layers`: records that a chunk needs; 0 = as many as the largest layer found says. O(records log records).
StoreSurvey SurveyRecords(const std::vector<SurveyRecord>& records, int32_t layers);

}  // namespace prehoc
