#include <filesystem>
#include <string>

#include "base/executor.h"
#include "integrations/reference/loader/fingerprint.h"
#include "integrations/reference/loader/gguf_model.h"
#include "integrations/reference/loader/huggingface_model.h"
#include "integrations/reference/loader/lora.h"
#include "integrations/reference/loader/text.h"
#include "integrations/reference/model.h"

namespace prehoc::reference {
namespace {

Result<std::shared_ptr<Model>> LoadBase(const std::string& path) {
  std::error_code error;
  if (std::filesystem::is_directory(path, error)) return loader::LoadHuggingFace(path);
  PREHOC_ASSIGN_OR_RETURN(auto file, loader::MappedFile::Open(path));
  return loader::LoadGguf(std::move(file));
}

}  // namespace

Result<std::shared_ptr<const Model>> LoadModel(const LoadOptions& options) {
  const auto report = [&](double fraction) {
    if (options.progress) options.progress(fraction);
  };
  if (options.path.empty()) return {StatusCode::kInvalid, "no model path given"};
  if (options.positions < 0) return {StatusCode::kInvalid, "positions=" + std::to_string(options.positions) + "; use 0 (the model's) or more"};
  report(0);
  PREHOC_ASSIGN_OR_RETURN(auto executor, ThreadPool::Create({.spin_iterations = 0}));
  PREHOC_ASSIGN_OR_RETURN(auto model, LoadBase(options.path));
  report(0.1);
  if (!options.lora.empty()) {
    const auto merged = [&](double fraction) { report(0.1 + 0.6 * fraction); };
    PREHOC_RETURN_IF_ERROR(loader::MergeLora(options.lora, *executor, merged, model.get()));
  }
  if (options.positions > 0) model->config.max_positions = options.positions;
  PREHOC_ASSIGN_OR_RETURN(model->fingerprint, loader::FingerprintOf(*model, *executor));
  report(1);
  return std::shared_ptr<const Model>(std::move(model));
}

}  // namespace prehoc::reference
