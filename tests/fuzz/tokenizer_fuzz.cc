// tokenizer.json and, after a NUL, tokenizer_config.json: what loads must encode and decode any text.
#include "integrations/reference/tokenizer/chat.h"
#include "integrations/reference/tokenizer/huggingface.h"
#include "integrations/reference/tokenizer/tokenizer.h"
#include "integrations/reference/tokenizer/unicode.h"
#include "tests/fuzz/fuzz_target.h"

using namespace prehoc;
using namespace prehoc::reference;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text = fuzz::TextOf(data, size);
  const size_t nul = text.find('\0');
  const std::string_view config = nul == std::string_view::npos ? std::string_view() : text.substr(nul + 1);
  auto spec = TokenizerSpecFromHuggingFace(text.substr(0, nul), config);
  fuzz::CheckStatus(spec.status());
  if (!spec.ok()) return 0;
  RenderChat(*spec, "", "a");
  auto tokenizer = Tokenizer::Create(std::move(spec).value());
  fuzz::CheckStatus(tokenizer.status());
  if (!tokenizer.ok()) return 0;
  for (const std::string_view sample : {std::string_view("a b  c\n 12'll <s> \xC3\xA9\xE2\x96\x81"), text}) {
    const auto ids = (*tokenizer)->Encode(sample);
    fuzz::CheckStatus(ids.status());
    PREHOC_CHECK(ids.ok() == !FindInvalidUtf8(sample).has_value());
    if (!ids.ok()) continue;
    for (const int32_t id : *ids) PREHOC_CHECK(id >= 0 && id < (*tokenizer)->vocab_size());
    (*tokenizer)->Decode(*ids, true);
  }
  return 0;
}
