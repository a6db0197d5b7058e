// A model with its tokenizer, from what the command line names.
#pragma once
#include <memory>
#include <ostream>
#include <span>
#include <string>
#include <string_view>

#include "base/clock.h"
#include "base/result.h"
#include "integrations/cli/environment.h"
#include "integrations/cli/named_models.h"
#include "integrations/reference/model.h"
#include "integrations/reference/tokenizer/tokenizer.h"
#include "kernels/function_table.h"

namespace prehoc::cli {

struct LoadedModel {
  std::string name;         // as on the command line
  ModelPaths paths;
  std::shared_ptr<const reference::Model> model;
  std::unique_ptr<reference::Tokenizer> tokenizer;
  std::string fingerprint;  // 64 hex digits
  double seconds = 0;       // that it took

  // Positions that the model was made for. Beyond a sliding window the engine offers nothing.
  int64_t positions() const;
};

// Shows progress on `err`. Errors name --model.
// `positions`: that the model takes, whatever it was made for; 0 = its own.
Result<LoadedModel> Load(const std::string& name, const ModelPaths& paths, const Environment& environment, std::ostream& err, const Clock& clock,
                         int64_t positions = 0);

// Likewise, for --random-weights SHAPE; `name` stands for the model.
Result<LoadedModel> MakeRandom(const std::string& name, const std::string& shape, const Environment& environment, std::ostream& err,
                               const Clock& clock);

// The kernels of --kernels NAME; null = the fastest (an empty name). kInvalid: this CPU cannot run them.
Result<const KernelTable*> ChooseKernels(const std::string& name);

std::string Hex(std::span<const uint8_t> bytes);
std::string Sha256Hex(std::string_view text);

}  // namespace prehoc::cli
