// The note in a store's directory: any text.
#include "tests/fuzz/fuzz_target.h"
#include "tests/support/chunk_data.h"
#include "transfer/store_directory.h"

using namespace prehoc;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text = fuzz::TextOf(data, size);
  const auto note = ParseStoreNote(text);
  fuzz::CheckStatus(note.status());
  if (!note.ok()) return 0;
  // What passes is what would have been written.
  PREHOC_CHECK(FormatStoreNote(*note) == text);
  PREHOC_CHECK(CheckStoreNote(*note, *note).ok());
  fuzz::CheckStatus(CheckStoreNote(*note, {kStoreVersion, TestIdentity(), 4096}));
  return 0;
}
