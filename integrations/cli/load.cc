#include "integrations/cli/load.h"

#include <openssl/sha.h>

#include <algorithm>
#include <array>
#include <utility>

#include "integrations/cli/exit_code.h"
#include "integrations/cli/progress.h"
#include "integrations/reference/loader/random_model.h"

namespace prehoc::cli {

int64_t LoadedModel::positions() const {
  const reference::ModelConfig& config = model->config;
  return config.sliding_window > 0 ? std::min(config.sliding_window, config.max_positions) : config.max_positions;
}

namespace {
Result<LoadedModel> WithTokenizer(const std::string& flag, LoadedModel loaded) {
  auto tokenizer = reference::Tokenizer::Create(loaded.model->tokenizer);
  if (!tokenizer.ok()) return RuntimeError(tokenizer.status(), flag + ": tokenizer");
  loaded.tokenizer = std::move(tokenizer).value();
  loaded.fingerprint = Hex(loaded.model->fingerprint);
  return loaded;
}
}  // namespace

Result<LoadedModel> MakeRandom(const std::string& name, const std::string& shape, const Environment& environment, std::ostream& err,
                               const Clock& clock) {
  const int64_t start = clock.NowNanos();
  ProgressBar bar(err, environment.stderr_terminal, "making weights", clock);
  const std::string flag = "--random-weights " + shape;
  const auto progress = [&](double share) { bar.Update(static_cast<int64_t>(share * 100), 100, "percent"); };
  auto model = reference::MakeRandomModel({.shape = shape, .progress = progress});
  if (!model.ok()) return RuntimeError(model.status(), flag);
  PREHOC_ASSIGN_OR_RETURN(LoadedModel loaded, WithTokenizer(flag, {name, {name, ""}, std::move(model).value(), nullptr, "", 0}));
  loaded.seconds = clock.SecondsSince(start);
  return loaded;
}

Result<LoadedModel> Load(const std::string& name, const ModelPaths& paths, const Environment& environment, std::ostream& err, const Clock& clock,
                         int64_t positions) {
  const int64_t start = clock.NowNanos();
  ProgressBar bar(err, environment.stderr_terminal, "loading the model", clock);
  reference::LoadOptions load{paths.path, paths.lora, [&](double share) { bar.Update(static_cast<int64_t>(share * 100), 100, "percent"); }};
  load.positions = positions;
  auto model = reference::LoadModel(load);
  if (!model.ok()) return RuntimeError(model.status(), "--model " + name);
  PREHOC_ASSIGN_OR_RETURN(LoadedModel loaded, WithTokenizer("--model " + name, {name, paths, std::move(model).value(), nullptr, "", 0}));
  loaded.seconds = clock.SecondsSince(start);
  return loaded;
}

Result<const KernelTable*> ChooseKernels(const std::string& name) {
  if (name.empty()) return nullptr;
  const KernelTable* found = FindKernels(name);
  if (found) return found;
  return UsageError("--kernels " + name + ": this CPU cannot run them; leave the flag out for " + std::string(BestCpuKernels().name));
}

std::string Hex(std::span<const uint8_t> bytes) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (const uint8_t byte : bytes) {
    text += kDigits[byte >> 4];
    text += kDigits[byte & 15];
  }
  return text;
}

std::string Sha256Hex(std::string_view text) {
  std::array<uint8_t, SHA256_DIGEST_LENGTH> digest{};
  SHA256(reinterpret_cast<const uint8_t*>(text.data()), text.size(), digest.data());
  return Hex(digest);
}

}  // namespace prehoc::cli
