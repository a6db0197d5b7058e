// adapter_config.json of PEFT: what an adapter of type LORA changes, and by how much.
#pragma once
#include <cstdint>
#include <string_view>
#include <vector>

#include "base/result.h"

namespace prehoc::reference::loader {

// The linear layers that an adapter may change, in the order of LayerWeights.
enum class LoraModule : uint8_t { kQ, kK, kV, kO, kGate, kUp, kDown };
constexpr std::string_view kLoraModuleNames[] = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
                                                 "self_attn.o_proj", "mlp.gate_proj",    "mlp.up_proj",
                                                 "mlp.down_proj"};
constexpr int kNumLoraModules = 7;

struct LoraConfig {
  int64_t rank = 0;
  double scale = 0;  // of B A: alpha / rank, or alpha / sqrt(rank) with use_rslora
  std::vector<LoraModule> modules;  // in every layer; sorted, each once
};

// `file` begins messages. Returns kCorrupt (no JSON object), kInvalid (a field's value) or kUnsupported: any other
// adapter type, and every field that is set and not known to leave the merged weights alone.
Result<LoraConfig> ReadLoraConfig(std::string_view json, std::string_view file);

}  // namespace prehoc::reference::loader
