#include "integrations/cli/named_models.h"

#include <array>
#include <filesystem>
#include <string_view>

#include "integrations/cli/exit_code.h"

namespace prehoc::cli {
namespace {

struct NamedModel {
  std::string_view name, file, adapter;  // adapter: a directory in one of the adapter_dirs, or empty
};
constexpr std::array<NamedModel, 2> kModels = {{
    {"smollm2-135m", "SmolLM2-135M-Instruct.Q4_1.gguf", ""},
    {"smollm2-128k", "SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m-128k"},
}};

bool Exists(const std::string& path) {
  std::error_code error;
  return std::filesystem::exists(path, error);
}

Result<std::string> FindAdapter(const NamedModel& model, const Environment& environment) {
  std::string looked;
  for (const std::string& directory : environment.adapter_dirs) {
    const std::string path = directory + "/" + std::string(model.adapter);
    if (Exists(path)) return path;
    looked += (looked.empty() ? "" : " or ") + path;
  }
  return {StatusCode::kNotFound, "--model " + std::string(model.name) + ": its adapter is not at " + looked +
                                     "; run prehoc from a complete checkout or installation"};
}

Result<ModelPaths> ResolveNamed(const NamedModel& model, const std::string& lora, const Environment& environment) {
  const std::string flag = "--model " + std::string(model.name);
  if (environment.cache_dir.empty()) {
    return {StatusCode::kNotFound, flag + ": neither XDG_CACHE_HOME nor HOME is set, so there is no place where it could be"};
  }
  ModelPaths paths{environment.models_dir() + "/" + std::string(model.file), lora};
  if (!Exists(paths.path)) {
    return {StatusCode::kNotFound, flag + ": " + paths.path + " is missing; fetch it with scripts/fetch_model.sh"};
  }
  if (model.adapter.empty()) return paths;
  if (!lora.empty()) return UsageError("--lora: " + flag + " brings an adapter of its own; leave one of the two out");
  PREHOC_ASSIGN_OR_RETURN(paths.lora, FindAdapter(model, environment));
  return paths;
}

}  // namespace

Result<ModelPaths> ResolveModel(const std::string& name, const std::string& lora, const Environment& environment) {
  if (!lora.empty() && !Exists(lora)) {
    return {StatusCode::kNotFound, "--lora " + lora + ": no such directory"};
  }
  for (const NamedModel& model : kModels) {
    if (model.name == name) return ResolveNamed(model, lora, environment);
  }
  if (Exists(name)) return ModelPaths{name, lora};
  const bool looks_like_path = name.find('/') != std::string::npos || name.ends_with(".gguf");
  if (looks_like_path) return {StatusCode::kNotFound, "--model " + name + ": no such file or directory"};
  return UsageError("--model " + name +
                    ": neither a file nor a known name; give smollm2-135m, smollm2-128k, a .gguf file or a directory");
}

}  // namespace prehoc::cli
