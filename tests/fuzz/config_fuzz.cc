// config.json, config_overrides.json and adapter_config.json: the same text as each of them.
#include "integrations/reference/loader/huggingface_config.h"
#include "integrations/reference/loader/lora_config.h"
#include "tests/fuzz/fuzz_target.h"

using namespace prehoc;
using namespace prehoc::reference;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text = fuzz::TextOf(data, size);
  auto config = loader::ReadHuggingFaceConfig(text, "config.json");
  fuzz::CheckStatus(config.status());
  ModelConfig model;
  if (config.ok()) {
    // What was read passes for valid again.
    model = std::move(config->model);
    PREHOC_CHECK(loader::ValidateConfig(model, "again").ok());
  }
  fuzz::CheckStatus(loader::ApplyConfigOverrides(text, "config_overrides.json", &model));
  const auto lora = loader::ReadLoraConfig(text, "adapter_config.json");
  fuzz::CheckStatus(lora.status());
  if (lora.ok()) PREHOC_CHECK(!lora->modules.empty() && lora->rank > 0);
  return 0;
}
