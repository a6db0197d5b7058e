// GGUF files: parse, build a model, read every weight, make the tokenizer.
#include "integrations/reference/loader/gguf_model.h"
#include "integrations/reference/tokenizer/tokenizer.h"
#include "tests/fuzz/fuzz_target.h"

using namespace prehoc;
using namespace prehoc::reference;

namespace {

void ReadAll(const Model& model) {
  const auto matrix = [](const WeightMatrix& m) { fuzz::Touch({m.data, m.row_bytes * static_cast<size_t>(m.rows)}); };
  matrix(model.embedding);
  matrix(model.output);
  for (const LayerWeights& w : model.layers) {
    for (const auto* m : {&w.q, &w.k, &w.v, &w.o, &w.gate, &w.up, &w.down}) matrix(*m);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto* bytes = reinterpret_cast<const std::byte*>(data);
  const auto model = loader::LoadGguf(loader::MappedFile::FromBytes("fuzz", {bytes, bytes + size}));
  fuzz::CheckStatus(model.status());
  if (!model.ok()) return 0;
  ReadAll(**model);
  fuzz::CheckStatus(Tokenizer::Create((*model)->tokenizer).status());
  return 0;
}
