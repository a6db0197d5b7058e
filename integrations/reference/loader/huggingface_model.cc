#include "integrations/reference/loader/huggingface_model.h"

#include <algorithm>
#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>

#include "integrations/reference/loader/assemble.h"
#include "integrations/reference/loader/huggingface_config.h"
#include "integrations/reference/loader/json.h"
#include "integrations/reference/loader/mapped_file.h"
#include "integrations/reference/loader/safetensors.h"
#include "integrations/reference/loader/text.h"
#include "integrations/reference/tokenizer/huggingface.h"

namespace prehoc::reference::loader {
namespace {

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();
constexpr size_t kMaxTokenizerBytes = size_t{128} << 20;

// Empty where there is no such file.
Result<std::string> ReadIfThere(const std::string& path, size_t limit) {
  auto text = ReadTextFile(path, limit);
  if (!text.ok() && text.status().code() == StatusCode::kNotFound) return std::string();
  return text;
}

class TokenizerReader {
 public:
  TokenizerReader(const std::string& directory, const HuggingFaceConfig& config)
      : directory_(directory), config_(config) {}

  Result<TokenizerSpec> Read() {
    const std::string path = directory_ + "/tokenizer.json";
    PREHOC_ASSIGN_OR_RETURN(const std::string json, ReadIfThere(path, kMaxTokenizerBytes));
    if (json.empty()) return TokenizerSpec{};
    PREHOC_ASSIGN_OR_RETURN(const std::string config, ReadIfThere(directory_ + "/tokenizer_config.json", kMaxJsonBytes));
    auto spec = TokenizerSpecFromHuggingFace(json, config);
    if (!spec.ok()) return spec.status().WithContext(directory_);
    spec_ = std::move(spec).value();
    if (spec_.tokens.size() > static_cast<size_t>(config_.model.vocab)) {
      return FileError(StatusCode::kCorrupt, path, "has ", spec_.tokens.size(), " tokens, config.json says vocab_size ",
                       config_.model.vocab);
    }
    PREHOC_ASSIGN_OR_RETURN(auto chat, ReadIfThere(directory_ + "/chat_template.jinja", kMaxJsonBytes));
    if (!chat.empty()) spec_.chat_template = std::move(chat);
    PREHOC_RETURN_IF_ERROR(ReadEndOfGeneration());
    return std::move(spec_);
  }

 private:
  // Ids count only where the tokenizer has them: model files of one family share defaults that need not fit.
  void AddEnd(int64_t id) {
    if (id < 0 || id >= static_cast<int64_t>(spec_.tokens.size())) return;
    const auto token = static_cast<int32_t>(id);
    if (spec_.eos_id < 0) spec_.eos_id = token;
    if (std::ranges::find(spec_.eog_ids, token) == spec_.eog_ids.end()) spec_.eog_ids.push_back(token);
  }

  Status ReadEndOfGeneration() {
    for (const int64_t id : config_.eos_ids) AddEnd(id);
    const std::string path = directory_ + "/generation_config.json";
    PREHOC_ASSIGN_OR_RETURN(const std::string text, ReadIfThere(path, kMaxJsonBytes));
    if (!text.empty()) {
      PREHOC_ASSIGN_OR_RETURN(const Json json, ParseJsonObject(text, path));
      PREHOC_ASSIGN_OR_RETURN(const auto ids, JsonFields(json, path).IntegerOrList("eos_token_id", -1, kMaxInt32));
      for (const int64_t id : ids) AddEnd(id);
    }
    if (spec_.bos_id < 0 && config_.bos_id && *config_.bos_id < static_cast<int64_t>(spec_.tokens.size())) {
      spec_.bos_id = static_cast<int32_t>(*config_.bos_id);
    }
    std::ranges::sort(spec_.eog_ids);
    return {};
  }

  const std::string& directory_;
  const HuggingFaceConfig& config_;
  TokenizerSpec spec_;
};

}  // namespace

Result<std::shared_ptr<Model>> LoadHuggingFace(const std::string& directory) {
  const std::string config_path = directory + "/config.json";
  PREHOC_ASSIGN_OR_RETURN(const std::string text, ReadTextFile(config_path, kMaxJsonBytes));
  PREHOC_ASSIGN_OR_RETURN(HuggingFaceConfig config, ReadHuggingFaceConfig(text, config_path));
  config.model.name = std::filesystem::path(directory).lexically_normal().filename().string();
  if (config.model.name.empty()) config.model.name = config.model.architecture;
  PREHOC_ASSIGN_OR_RETURN(TokenizerSpec tokenizer, TokenizerReader(directory, config).Read());
  PREHOC_ASSIGN_OR_RETURN(SafetensorsFiles weights, OpenSafetensors(directory));
  // Old files carry the frequencies that the configuration already tells.
  weights.tensors.IgnoreIf([](std::string_view name) { return name.ends_with(".rotary_emb.inv_freq"); });
  PREHOC_ASSIGN_OR_RETURN(auto model,
                          AssembleModel(config.model, kHuggingFaceNames, config.parts, &weights.tensors));
  model->tokenizer = std::move(tokenizer);
  for (auto& file : weights.files) model->owners.push_back(std::move(file));
  return model;
}

}  // namespace prehoc::reference::loader
