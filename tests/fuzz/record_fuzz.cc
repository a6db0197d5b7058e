// Records as a disk or a peer may give them back: any bytes, and a good record with the input as damage.
#include <algorithm>
#include <cstring>
#include <vector>

#include "tests/fuzz/fuzz_target.h"
#include "tests/support/chunk_data.h"
#include "transfer/record_format.h"

using namespace prehoc;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const RecordContext context = RecordContext::Create(TestIdentity()).value();
  static const ChunkKey key = TestKey(1, 5);
  const std::span<const std::byte> input = std::as_bytes(std::span(data, size));
  for (const VerifyPayload verify : {VerifyPayload::kYes, VerifyPayload::kNo}) {
    const auto parsed = ParseRecord(context, key, input, verify);
    fuzz::CheckStatus(parsed.status());
    if (!parsed.ok()) continue;
    fuzz::Touch(*parsed);
    if (verify == VerifyPayload::kNo) continue;
    // What passes is what would have been written.
    RecordHeader found;
    std::memcpy(&found, data, sizeof found);
    const RecordHeader header = EncodeHeader(context, key, *parsed, OriginOf(found));
    PREHOC_CHECK(std::memcmp(&header, data, sizeof header) == 0);
  }
  static const std::vector<std::byte> payload = TestChunk(1, 64);
  std::vector<std::byte> record(sizeof(RecordHeader) + payload.size());
  const RecordHeader header = EncodeHeader(context, key, payload);
  std::memcpy(record.data(), &header, sizeof header);
  std::copy(payload.begin(), payload.end(), record.begin() + sizeof header);
  bool damaged = false;
  for (size_t i = 0; i < std::min(record.size(), size); ++i) {
    record[i] ^= input[i];
    damaged |= data[i] != 0;
  }
  PREHOC_CHECK(ParseRecord(context, key, record).ok() == !damaged);
  return 0;
}
