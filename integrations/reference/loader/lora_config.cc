#include "integrations/reference/loader/lora_config.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "integrations/reference/loader/json.h"
#include "integrations/reference/loader/text.h"

namespace prehoc::reference::loader {
namespace {

constexpr int64_t kMaxRank = 4096;

// Read below, or without a say in what the trained weights are.
constexpr std::string_view kKnownFields[] = {
    "peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "bias", "init_lora_weights", "auto_mapping",
    "base_model_name_or_path", "inference_mode", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size",
    "revision", "runtime_config", "task_type"};

// Ways to start training that leave the base weights as they are; others store the difference to a changed base.
constexpr std::string_view kHarmlessInits[] = {"gaussian", "eva", "orthogonal"};

bool IsSet(const Json& value) {
  if (value.is_structured()) return !value.empty();
  if (value.is_string()) return !value.get_ref<const std::string&>().empty();
  return !value.is_null() && value != false;
}

class Reader {
 public:
  Reader(const Json& json, std::string_view file) : json_(json), f_(json, file) {}

  Result<LoraConfig> Read() {
    PREHOC_ASSIGN_OR_RETURN(const auto type, f_.String("peft_type"));
    if (!type) return FileError(StatusCode::kInvalid, f_.file(), "'peft_type' is missing");
    if (*type != "LORA") {
      return FileError(StatusCode::kUnsupported, f_.file(), "'peft_type' is ", Quoted(*type), "; supported: LORA");
    }
    PREHOC_RETURN_IF_ERROR(RefuseWhatWeLack());
    PREHOC_RETURN_IF_ERROR(ReadScale());
    PREHOC_RETURN_IF_ERROR(ReadModules());
    return std::move(c_);
  }

 private:
  Status Unsupported(const std::string& key, std::string_view supported) const {
    return FileError(StatusCode::kUnsupported, f_.file(), Quoted(key), " is ",
                     Quoted(json_[key].dump(-1, ' ', true, Json::error_handler_t::replace)), "; supported: ", supported);
  }

  Status RefuseWhatWeLack() const {
    for (const auto& [key, value] : json_.items()) {
      if (std::ranges::find(kKnownFields, key) != std::end(kKnownFields) || !IsSet(value)) continue;
      return Unsupported(key, "adapters without it");
    }
    PREHOC_ASSIGN_OR_RETURN(const auto bias, f_.String("bias"));
    if (bias.value_or("none") != "none") return Unsupported("bias", "none");
    const auto init = json_.find("init_lora_weights");
    const bool harmless = init == json_.end() || !init->is_string() ||
                          std::ranges::find(kHarmlessInits, init->get_ref<const std::string&>()) != std::end(kHarmlessInits);
    return harmless ? Status() : Unsupported("init_lora_weights", "true, false, gaussian, eva, orthogonal");
  }

  Status ReadScale() {
    PREHOC_ASSIGN_OR_RETURN(const auto rank, f_.Integer("r", 1, kMaxRank));
    PREHOC_ASSIGN_OR_RETURN(const auto alpha, f_.Float("lora_alpha"));
    PREHOC_ASSIGN_OR_RETURN(const auto by_root, f_.Bool("use_rslora"));
    if (!rank || !alpha) {
      return FileError(StatusCode::kInvalid, f_.file(), rank ? "'lora_alpha'" : "'r'", " is missing");
    }
    c_.rank = *rank;
    const auto r = static_cast<double>(*rank);
    c_.scale = *alpha / (by_root.value_or(false) ? std::sqrt(r) : r);
    return {};
  }

  Status ReadModules() {
    const auto targets = json_.find("target_modules");
    if (targets != json_.end() && *targets == "all-linear") {
      for (int m = 0; m < kNumLoraModules; ++m) c_.modules.push_back(static_cast<LoraModule>(m));
      return {};
    }
    PREHOC_ASSIGN_OR_RETURN(const auto names, f_.Strings("target_modules"));
    if (!names || names->empty()) return FileError(StatusCode::kInvalid, f_.file(), "'target_modules' is missing or empty");
    for (const std::string& name : *names) {
      const auto* known = std::ranges::find_if(kLoraModuleNames, [&](std::string_view full) {
        return full == name || full.substr(full.find('.') + 1) == name;
      });
      if (known == std::end(kLoraModuleNames)) {
        return FileError(StatusCode::kUnsupported, f_.file(), "'target_modules' has ", Quoted(name),
                         "; supported: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj");
      }
      c_.modules.push_back(static_cast<LoraModule>(known - kLoraModuleNames));
    }
    std::ranges::sort(c_.modules);
    c_.modules.erase(std::unique(c_.modules.begin(), c_.modules.end()), c_.modules.end());
    return {};
  }

  const Json& json_;
  const JsonFields f_;
  LoraConfig c_;
};

}  // namespace

Result<LoraConfig> ReadLoraConfig(std::string_view json, std::string_view file) {
  PREHOC_ASSIGN_OR_RETURN(const Json object, ParseJsonObject(json, file));
  return Reader(object, file).Read();
}

}  // namespace prehoc::reference::loader
