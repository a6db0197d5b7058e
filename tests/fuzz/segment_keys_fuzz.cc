// The list of keys in a segment's properties: any bytes.
#include <vector>

#include "tests/fuzz/fuzz_target.h"
#include "transfer/segment_table.h"

using namespace prehoc;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text = fuzz::TextOf(data, size);
  fuzz::CheckStatus(ParseSegmentKeys(text, size).status());
  auto keys = ParseSegmentKeys(text, size / kListedKeyBytes);
  fuzz::CheckStatus(keys.status());
  if (!keys.ok()) return 0;
  const uint64_t records = keys->records.size();
  PREHOC_CHECK(records + keys->tombstones.size() == size / kListedKeyBytes);
  SegmentTable table(4);
  table.Load({{1, "/1", size, std::move(*keys)}});
  PREHOC_CHECK(table.totals().records <= records);
  return 0;
}
