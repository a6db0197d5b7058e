// The command line as data: read by ParseCommandLine(), checked as far as it can be without opening a file.
#pragma once
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/precision.h"
#include "base/result.h"
#include "integrations/cli/fidelity_plan.h"
#include "integrations/cli/log.h"
#include "kernels/function_table.h"
#include "selector/options.h"

namespace prehoc::cli {

inline constexpr int64_t kDefaultContext = 6000;
inline constexpr std::string_view kDefaultModel = "smollm2-135m";
inline constexpr std::string_view kDefaultQuestion = "Who killed Abel?";

// A flag that says something about the selector, kept to be compared with what a calibration says.
struct PinnedFlag {
  std::string flag, knob, value;  // knob "codes" for --codes
};

struct AnswerOptions {
  std::string model = std::string(kDefaultModel);  // a name, a .gguf file or a directory
  std::string lora;
  std::string random_weights;  // a shape of random_model.h in the place of `model`; or empty
  int64_t positions = 0;       // that the model takes, whatever it was made for; 0 = its own
  std::string document;        // empty = the King James text that scripts/fetch_document.sh writes
  int64_t context = 0;         // tokens of the document, from its start; 0 = kDefaultContext or what there is
  std::string question = std::string(kDefaultQuestion);
  int64_t max_new_tokens = 64;
  SelectorOptions selector;
  CodeFormat codes;
  std::string calibration;     // file; then selector and codes come from it, and `pinned` has the flags given beside it
  std::vector<PinnedFlag> pinned;
  int64_t audit_every = 64;
  uint64_t device_budget = uint64_t{256} << 20;
  uint64_t host_budget = uint64_t{1} << 30;
  RowFormat rows = RowFormat::kF16;  // in host memory and in the store
  std::string store;           // directory of the disk tier; empty = none
  uint64_t store_budget = uint64_t{8} << 30;
  int64_t store_deadline_ms = 2000;  // of one read; 0 = none
  std::string tenant;
  int threads = 0;             // 0 = one per CPU
  std::string kernels;         // empty = the fastest that this CPU runs
  std::optional<bool> cuda;    // --device: model, kernels and device tier on the GPU; not given: where a GPU is, if no kernels are named
  PromptPrecision prompt_precision = PromptPrecision::kSplit;  // on a GPU
  bool compare_dense = false;
  std::string json;            // file; empty = none
  std::string trace;           // file of the run's spans (trace_log.h); empty = none
  std::string metrics;         // file of counters (metrics.h); empty = none
  LogLevel log = LogLevel::kOff;
};

struct DoctorOptions {
  std::string store;  // directory whose disk is measured; empty = the cache directory
  uint64_t test_bytes = uint64_t{256} << 20;
};

struct InspectOptions {
  std::string store;  // directory; required
  bool verify = false, repair = false;
  std::string json;   // file; empty = none
};

struct TortureFlags {
  double seconds = 60;
  uint64_t seed = 1;
  std::string faults = "all";
  double rate = 0.25;  // share of reads that go wrong
  std::string store;   // directory on the disk to use; empty = that of temporary files
  int64_t round = -1;  // only this one; -1 = as many as there is time for
  int threads = 3;
  RowFormat rows = RowFormat::kF16;
  std::string json;    // file; empty = none
};

enum class CommandKind { kPrintText, kAnswer, kFidelity, kInspect, kTorture, kDoctor };

struct Command {
  CommandKind kind = CommandKind::kPrintText;
  std::string text;  // kPrintText: help, version or the knobs; for stdout
  AnswerOptions answer;
  FidelityOptions fidelity;
  InspectOptions inspect;
  TortureFlags torture;
  DoctorOptions doctor;
};

// `args` without the program's name. kInvalid: one line that names the flag, what was wrong and what to do.
Result<Command> ParseCommandLine(std::span<const std::string> args);

// Memory and combinations: what one flag alone cannot know. `memory_bytes` of the machine, 0 = unknown.
Status CheckAnswerOptions(const AnswerOptions& options, uint64_t memory_bytes);

// True if the selector's kind looks at `knob`.
bool UsesKnob(const SelectorOptions& options, std::string_view knob);

// kInvalid if `name` is no --kernels at all; whether this CPU runs them is another question.
Status CheckKernelsName(const std::string& name);

// "f16", "int8" or "e4m3". kInvalid that begins with `flag`.
Result<RowFormat> ParseRows(const std::string& flag, std::string_view text);

// "4/64", "2/16+norms", "4/64+dither": bits, tokens of a group, error norms, dither. kInvalid with what is accepted.
Result<CodeFormat> ParseCodes(std::string_view text);
std::string CodesToString(const CodeFormat& format);

}  // namespace prehoc::cli
