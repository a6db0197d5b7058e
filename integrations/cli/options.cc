#include "integrations/cli/options.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <optional>
#include <utility>

#include "base/units.h"
#include "integrations/cli/exit_code.h"
#include "integrations/cli/fidelity_flags.h"
#include "integrations/cli/flag_values.h"
#include "integrations/cli/help_text.h"
#include "integrations/cli/nearest.h"
#include "integrations/cli/store_flags.h"
#include "integrations/cli/version.h"
#include "integrations/reference/loader/random_model.h"

namespace prehoc::cli {
namespace {

// Values as typed.
struct RawAnswer {
  std::string model, lora, random_weights, positions, document, context, question, max_new_tokens;
  std::string selector, budget, max_dropped_mass, codes, audit_every, calibration;
  std::vector<std::string> set;
  std::string prompt_precision, device_budget, host_budget, rows, store, store_budget, store_deadline, tenant;
  std::string threads, kernels, device, compare, json, trace, metrics, log;
  bool show_knobs = false;
};
struct RawDoctor {
  std::string store, test_size;
};

void AddAnswerFlags(CLI::App& app, RawAnswer& raw) {
  const char* what = "What to answer";
  AddText(app, "--model", raw.model, "NAME|FILE|DIR",
          "smollm2-135m (default), smollm2-128k, a .gguf file or a Hugging Face directory", what);
  AddText(app, "--lora", raw.lora, "DIR", "PEFT adapter, merged when the model is loaded", what);
  AddText(app, "--random-weights", raw.random_weights, "SHAPE",
          "random weights instead of a model, for measurements: llama-3.1-8b, llama-2-7b, mistral-7b, qwen3-8b or tiny", what);
  AddText(app, "--positions", raw.positions, "N",
          "positions that the model takes, for measurements: beyond those that it was made for its text is of no worth", what);
  AddText(app, "--document", raw.document, "FILE", "UTF-8 text; default: the King James text", what);
  AddText(app, "--context", raw.context, "N", "tokens of the document, from its start; default 6000 or all of it", what);
  AddText(app, "--question", raw.question, "TEXT", "default: \"Who killed Abel?\"", what);
  AddText(app, "--max-new-tokens", raw.max_new_tokens, "N", "at most so many tokens of answer; default 64", what);

  const char* method = "How positions are chosen";
  AddText(app, "--selector", raw.selector, "NAME",
          "tc (two clocks, default), cis, psaw, etf, cpe, sc, quest, hshare, oracle, window, dense", method);
  AddText(app, "--budget", raw.budget, "B",
          "positions per KV head and step: 1/16 (default), 512, mass(0.95), mass(0.95,cap=1/8)", method);
  AddText(app, "--max-dropped-mass", raw.max_dropped_mass, "X",
          "widen each head's set until at most this share of its attention is left out, by a bound (--set bound=..)", method);
  app.add_option("--set", raw.set, "any knob of the selector, such as tc.tau=0.7; may be repeated")
      ->type_name("KNOB=VALUE")->group(method)->allow_extra_args(false);
  app.add_flag("--show-knobs", raw.show_knobs, "print the selector's knobs with their values, and stop")->group(method);
  AddText(app, "--codes", raw.codes, "BITS/TOKENS", "index codes: 2, 3, 4, 5 or 8 bits over 16 or 64 tokens, "
          "+norms for tighter bounds, +dither for statistical ones; default 4/64", method);
  AddText(app, "--calibration", raw.calibration, "FILE", "selector, knobs and codes as calibrated there", method);
  AddText(app, "--audit-every", raw.audit_every, "N",
          "steps between audits of the dropped mass with exact scores; default 64, 0 = never", method);

  const char* tiers = "Where the KV cache lies";
  AddText(app, "--device-budget", raw.device_budget, "SIZE", "default 256MiB", tiers);
  AddText(app, "--host-budget", raw.host_budget, "SIZE", "default 1GiB", tiers);
  AddText(app, "--rows", raw.rows, "FORMAT", "f16 (default), int8 or e4m3: how K and V lie in host memory and on disk; 8 bits take about half the room", tiers);
  AddText(app, "--store", raw.store, "DIR", "disk tier, kept between runs; default: none", tiers);
  AddText(app, "--store-budget", raw.store_budget, "SIZE", "default 8GiB", tiers);
  AddText(app, "--store-deadline", raw.store_deadline, "MS", "what a read of the disk may take before its rows are computed anew; default 2000, 0 = any time", tiers);
  AddText(app, "--tenant", raw.tenant, "TEXT", "what was stored under one tenant is never used for another", tiers);

  const char* run = "How it runs";
  AddText(app, "--threads", raw.threads, "N", "default: one per CPU", run);
  AddText(app, "--device", raw.device, "NAME", "cpu or cuda: where the model, the kernels and the device tier are; default: cuda where a GPU is", run);
  AddText(app, "--prompt-precision", raw.prompt_precision, "NAME", "of a prompt's products with --device cuda: fp32 (default), or half, which rounds activations to 16 bits, as serving engines do, and takes half the time", run);
  AddText(app, "--kernels", raw.kernels, "NAME", "reference, avx2 or avx512; default: the fastest that runs here", run);
  AddText(app, "--compare", raw.compare, "dense", "run dense attention too, and compare", run);
  AddText(app, "--json", raw.json, "FILE", "write all figures there", run);
  AddText(app, "--metrics", raw.metrics, "FILE", "write all counters there as text for Prometheus, every second and at the end", run);
  AddText(app, "--trace", raw.trace, "FILE", "write there what ran when, as a Chrome trace (chrome://tracing, ui.perfetto.dev)", run);
  AddText(app, "--log", raw.log, "LEVEL", "events as lines of JSON on standard error: error, warning, info or debug; default off", run);
}

void AddDoctorFlags(CLI::App& app, RawDoctor& raw) {
  AddText(app, "--store", raw.store, "DIR", "directory whose disk is measured; default: the cache directory", "Flags");
  AddText(app, "--test-size", raw.test_size, "SIZE", "bytes written and read to measure it; default 256MiB", "Flags");
}

// --- values -----------------------------------------------------------------------------------------------------

Status SetKnob(const std::string& flag, std::string_view knob, std::string_view value, SelectorOptions* options) {
  const Status status = options->Set(knob, value);
  if (!status.ok()) return UsageError(flag + ": " + status.message());
  if (UsesKnob(*options, knob)) return {};
  return UsageError(flag + ": the selector " + std::string(SelectorKindName(options->kind)) + " does not use " +
                    std::string(knob) + "; leave it out, or choose another with --selector");
}

Status ReadSelector(const Flags& flags, const RawAnswer& raw, SelectorOptions* options) {
  if (flags.Given("--selector")) {
    const Result<SelectorKind> kind = ParseSelectorKind(raw.selector);
    if (!kind.ok()) return UsageError("--selector: " + kind.status().message());
    options->kind = *kind;
  }
  if (flags.Given("--budget")) PREHOC_RETURN_IF_ERROR(SetKnob("--budget", "budget", raw.budget, options));
  if (flags.Given("--max-dropped-mass")) {
    PREHOC_RETURN_IF_ERROR(SetKnob("--max-dropped-mass", "max_dropped_mass", raw.max_dropped_mass, options));
  }
  for (const std::string& assignment : raw.set) {
    const size_t equals = assignment.find('=');
    if (equals == std::string::npos) return Bad("--set", assignment, "KNOB=VALUE, such as tc.tau=0.7");
    const std::string knob = assignment.substr(0, equals);
    if (knob == "selector") return UsageError("--set selector: choose it with --selector");
    PREHOC_RETURN_IF_ERROR(SetKnob("--set", knob, std::string_view(assignment).substr(equals + 1), options));
  }
  const Status valid = options->Validate();
  return valid.ok() ? valid : UsageError("--selector " + std::string(SelectorKindName(options->kind)) + ": " + valid.message());
}

// Beside --calibration: whether the flags agree with it is known once the file has been read.
Status ReadPinned(const Flags& flags, const RawAnswer& raw, AnswerOptions* options) {
  PREHOC_RETURN_IF_ERROR(ReadText(flags, "--calibration", raw.calibration, &options->calibration));
  if (raw.show_knobs) return UsageError("--show-knobs: with --calibration the knobs are those of the file; leave one out");
  const auto pin = [&](const char* flag, const char* knob, const std::string& value) {
    if (flags.Given(flag)) options->pinned.push_back({flag, knob, value});
  };
  pin("--selector", "selector", raw.selector);
  pin("--budget", "budget", raw.budget);
  pin("--max-dropped-mass", "max_dropped_mass", raw.max_dropped_mass);
  for (const std::string& assignment : raw.set) {
    const size_t equals = assignment.find('=');
    if (equals == std::string::npos) return Bad("--set", assignment, "KNOB=VALUE, such as tc.tau=0.7");
    options->pinned.push_back({"--set", assignment.substr(0, equals), assignment.substr(equals + 1)});
  }
  for (const PinnedFlag& flag : options->pinned) {
    if (flag.flag == "--set" && flag.knob == "selector") return UsageError("--set selector: choose it with --selector");
    const Status status = SelectorOptions().Set(flag.knob, flag.value);
    if (!status.ok()) return UsageError(flag.flag + ": " + status.message());
  }
  pin("--codes", "codes", raw.codes);
  return {};
}

Status ReadRandomWeights(const Flags& flags, const RawAnswer& raw, AnswerOptions* options) {
  PREHOC_RETURN_IF_ERROR(ReadText(flags, "--random-weights", raw.random_weights, &options->random_weights));
  if (options->random_weights.empty()) return {};
  const std::span<const std::string_view> shapes = reference::RandomModelShapes();
  if (std::find(shapes.begin(), shapes.end(), options->random_weights) == shapes.end()) {
    std::string known;
    for (const std::string_view shape : shapes) known += (known.empty() ? "" : shape == shapes.back() ? " or " : ", ") + std::string(shape);
    return Bad("--random-weights", options->random_weights, known);
  }
  for (const char* flag : {"--model", "--lora", "--positions", "--calibration"}) {
    if (flags.Given(flag)) return UsageError("--random-weights: no model is loaded then; leave out " + std::string(flag));
  }
  options->model = "random:" + options->random_weights;
  return {};
}

Result<AnswerOptions> ReadAnswer(const Flags& flags, const RawAnswer& raw) {
  AnswerOptions options;
  PREHOC_RETURN_IF_ERROR(ReadText(flags, "--model", raw.model, &options.model));
  PREHOC_RETURN_IF_ERROR(ReadText(flags, "--lora", raw.lora, &options.lora));
  PREHOC_RETURN_IF_ERROR(ReadRandomWeights(flags, raw, &options));
  PREHOC_RETURN_IF_ERROR(ReadText(flags, "--document", raw.document, &options.document));
  PREHOC_RETURN_IF_ERROR(ReadText(flags, "--question", raw.question, &options.question));
  PREHOC_RETURN_IF_ERROR(ReadText(flags, "--store", raw.store, &options.store));
  PREHOC_RETURN_IF_ERROR(ReadText(flags, "--tenant", raw.tenant, &options.tenant));
  PREHOC_RETURN_IF_ERROR(ReadText(flags, "--json", raw.json, &options.json));
  PREHOC_RETURN_IF_ERROR(ReadText(flags, "--metrics", raw.metrics, &options.metrics));
  PREHOC_RETURN_IF_ERROR(ReadText(flags, "--trace", raw.trace, &options.trace));
  if (flags.Given("--log")) {
    PREHOC_ASSIGN_OR_RETURN(options.log, ParseLogLevel(raw.log));
  }
  constexpr int64_t kMostTokens = int64_t{1} << 30;
  PREHOC_RETURN_IF_ERROR(ReadWhole<int64_t>(flags, "--context", raw.context, 1, kMostTokens, &options.context));
  PREHOC_RETURN_IF_ERROR(ReadWhole<int64_t>(flags, "--positions", raw.positions, 1, kMostTokens, &options.positions));
  PREHOC_RETURN_IF_ERROR(
      ReadWhole<int64_t>(flags, "--max-new-tokens", raw.max_new_tokens, 1, kMostTokens, &options.max_new_tokens));
  PREHOC_RETURN_IF_ERROR(ReadWhole<int64_t>(flags, "--audit-every", raw.audit_every, 0, kMostTokens, &options.audit_every));
  PREHOC_RETURN_IF_ERROR(ReadWhole<int>(flags, "--threads", raw.threads, 1, 1024, &options.threads));
  PREHOC_RETURN_IF_ERROR(ReadBytes(flags, "--device-budget", raw.device_budget, kMiB, &options.device_budget));
  PREHOC_RETURN_IF_ERROR(ReadBytes(flags, "--host-budget", raw.host_budget, kMiB, &options.host_budget));
  PREHOC_RETURN_IF_ERROR(ReadBytes(flags, "--store-budget", raw.store_budget, 16 * kMiB, &options.store_budget));
  PREHOC_RETURN_IF_ERROR(ReadWhole<int64_t>(flags, "--store-deadline", raw.store_deadline, 0, 3'600'000, &options.store_deadline_ms));
  PREHOC_RETURN_IF_ERROR(flags.Given("--calibration") ? ReadPinned(flags, raw, &options)
                                                      : ReadSelector(flags, raw, &options.selector));
  PREHOC_RETURN_IF_ERROR(ReadDevice(flags, raw.device, raw.kernels, &options.cuda));
  if (flags.Given("--kernels")) {
    PREHOC_RETURN_IF_ERROR(CheckKernelsName(raw.kernels));
    options.kernels = raw.kernels;
    options.cuda = false;
  }
  PREHOC_RETURN_IF_ERROR(ReadPromptPrecision(flags, raw.prompt_precision, &options.prompt_precision));
  if (flags.Given("--rows")) {
    PREHOC_ASSIGN_OR_RETURN(options.rows, ParseRows("--rows", raw.rows));
    if (options.rows != RowFormat::kF16 && !options.calibration.empty()) {
      return UsageError("--rows " + raw.rows + ": what --calibration promises was measured with rows of f16; leave one out");
    }
  }
  if (flags.Given("--codes")) {
    const Result<CodeFormat> codes = ParseCodes(raw.codes);
    if (!codes.ok()) return codes.status();
    options.codes = *codes;
  }
  if (UsesKnob(options.selector, "bound") && options.selector.BoundInForce() == BoundKind::kStatistical && !options.codes.dither) {
    return UsageError("--set bound=statistical: needs dithered codes; add --codes " + CodesToString(options.codes) + "+dither");
  }
  if (flags.Given("--compare")) {
    if (raw.compare != "dense") return Bad("--compare", raw.compare, "dense");
    options.compare_dense = true;
  }
  for (const char* flag : {"--store-budget", "--store-deadline"}) {
    if (options.store.empty() && flags.Given(flag)) {
      return UsageError(std::string(flag) + ": there is no disk tier; name its directory with --store DIR");
    }
  }
  return options;
}

Result<DoctorOptions> ReadDoctor(const Flags& flags, const RawDoctor& raw) {
  DoctorOptions options;
  PREHOC_RETURN_IF_ERROR(ReadText(flags, "--store", raw.store, &options.store));
  PREHOC_RETURN_IF_ERROR(ReadBytes(flags, "--test-size", raw.test_size, kMiB, &options.test_bytes));
  return options;
}

std::string KnobsText(const SelectorOptions& options) {
  std::string text;
  for (const std::string& line : options.Describe()) text += line + "\n";
  return text;
}

// --- errors of the line itself ---------------------------------------------------------------------------------

std::vector<std::string> FlagNames(const CLI::App& app) {
  std::vector<std::string> names;
  for (const CLI::Option* option : app.get_options()) names.push_back(option->get_name());
  return names;
}

Status UnknownArgument(const CLI::App& app, const std::string& argument) {
  const std::string help = "; see " + (app.get_parent() ? "prehoc " + app.get_name() : std::string("prehoc")) + " --help";
  if (!argument.starts_with("-")) {
    const std::vector<std::string> commands = {"answer", "fidelity", "inspect", "torture", "doctor"};
    if (app.get_parent()) return UsageError("unexpected argument \"" + argument + "\": values follow their flag" + help);
    return UsageError("unknown command \"" + argument + "\": did you mean " + std::string(Nearest(argument, commands)) + "?" + help);
  }
  const std::string flag = argument.substr(0, argument.find('='));
  return UsageError("unknown flag " + flag + ": did you mean " + std::string(Nearest(flag, FlagNames(app))) + "?" + help);
}

// As a shell would take it.
std::string LineOf(std::span<const std::string> args) {
  std::string line = "prehoc";
  for (const std::string& arg : args) {
    const bool plain = !arg.empty() && arg.find_first_not_of("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_./=:,+") == std::string::npos;
    line += plain ? " " + arg : " '" + arg + "'";
  }
  return line;
}

std::string OneLine(std::string text) {
  std::replace(text.begin(), text.end(), '\n', ' ');
  while (!text.empty() && text.back() == ' ') text.pop_back();
  return text;
}

}  // namespace

bool UsesKnob(const SelectorOptions& options, std::string_view knob) {
  const std::vector<std::string> used = options.Describe();
  return std::any_of(used.begin(), used.end(), [&](const std::string& line) {
    return line.size() > knob.size() && line.starts_with(knob) && line[knob.size()] == '=';
  });
}

Status CheckKernelsName(const std::string& name) {
  constexpr std::string_view kNames[] = {"reference", "avx2", "avx512"};
  if (std::find(std::begin(kNames), std::end(kNames), name) != std::end(kNames)) return {};
  return Bad("--kernels", name, "reference, avx2 or avx512");
}

Result<CodeFormat> ParseCodes(std::string_view text) {
  CodeFormat format;
  std::string_view rest = text;
  const auto take = [&](std::string_view suffix, bool* flag) {
    if (*flag || !rest.ends_with(suffix)) return false;
    rest.remove_suffix(suffix.size());
    return *flag = true;
  };
  while (take("+norms", &format.error_norms) || take("+dither", &format.dither)) {
  }
  for (const int bits : {2, 3, 4, 5, 8}) {
    for (const int tokens : {16, 64}) {
      if (rest != std::to_string(bits) + "/" + std::to_string(tokens)) continue;
      format.bits = bits;
      format.group_tokens = tokens;
      return format;
    }
  }
  return Bad("--codes", text, "2, 3, 4, 5 or 8 bits over 16 or 64 tokens, such as 4/64, 8/16+norms or 4/64+dither");
}

Result<RowFormat> ParseRows(const std::string& flag, std::string_view text) {
  const std::optional<RowFormat> rows = FindRowFormat(text);
  if (!rows) return Bad(flag.c_str(), std::string(text), "f16, int8 or e4m3");
  return *rows;
}

std::string CodesToString(const CodeFormat& format) {
  return std::to_string(format.bits) + "/" + std::to_string(format.group_tokens) + (format.error_norms ? "+norms" : "") +
         (format.dither ? "+dither" : "");
}

Status CheckAnswerOptions(const AnswerOptions& options, uint64_t memory_bytes) {
  if (memory_bytes == 0) return {};
  const std::string memory = FormatBytes(static_cast<double>(memory_bytes));
  const auto check = [&](const char* flag, uint64_t budget) -> Status {
    if (budget <= memory_bytes) return {};
    return UsageError(std::string(flag) + " " + FormatBytes(static_cast<double>(budget)) +
                      ": this machine has " + memory + " of memory; give less");
  };
  if (options.cuda.value_or(false)) return check("--host-budget", options.host_budget);
  PREHOC_RETURN_IF_ERROR(check("--device-budget", options.device_budget));
  PREHOC_RETURN_IF_ERROR(check("--host-budget", options.host_budget));
  if (options.device_budget + options.host_budget <= memory_bytes) return {};
  return UsageError("--device-budget and --host-budget together: this machine has " + memory +
                    " of memory, and both lie in it on a CPU; give less to one of them");
}

Result<Command> ParseCommandLine(std::span<const std::string> args) {
  CLI::App app(kProgramHelp, "prehoc");
  app.footer(kProgramFooter);
  app.set_version_flag("--version", std::string("prehoc ") + kVersion, "print the version and stop");
  app.allow_extras();
  app.require_subcommand(0, 1);
  RawAnswer raw_answer;
  CLI::App* answer = app.add_subcommand("answer", "Answer a question about a document");
  answer->footer(kAnswerFooter);
  answer->allow_extras();
  AddAnswerFlags(*answer, raw_answer);
  RawDoctor raw_doctor;
  RawFidelity raw_fidelity;
  CLI::App* fidelity = app.add_subcommand("fidelity", "Measure what selection saves and what it costs, on your model and text");
  fidelity->footer(kFidelityFooter);
  fidelity->allow_extras();
  AddFidelityFlags(*fidelity, raw_fidelity);
  RawInspect raw_inspect;
  CLI::App* inspect = app.add_subcommand("inspect", "Show what a disk store holds, verify it, and drop what is damaged");
  inspect->footer(kInspectFooter);
  inspect->allow_extras();
  AddInspectFlags(*inspect, raw_inspect);
  RawTorture raw_torture;
  CLI::App* torture = app.add_subcommand("torture", "Let everything below the cache fail on purpose, and compare every byte with the truth");
  torture->footer(kTortureFooter);
  torture->allow_extras();
  AddTortureFlags(*torture, raw_torture);
  CLI::App* doctor = app.add_subcommand("doctor", "Show what this machine offers, and what will be used and why");
  doctor->footer(kDoctorFooter);
  doctor->allow_extras();
  AddDoctorFlags(*doctor, raw_doctor);

  Command command;
  try {
    app.parse(std::vector<std::string>(args.rbegin(), args.rend()));  // CLI11 takes them in reverse
  } catch (const CLI::CallForVersion& version) {
    command.text = std::string(version.what()) + "\n";
    return command;
  } catch (const CLI::CallForHelp&) {
    command.text = app.help();
    for (const CLI::App* part : {answer, fidelity, inspect, torture, doctor}) {
      if (part->parsed()) command.text = part->help();
    }
    return command;
  } catch (const CLI::ParseError& error) {
    return UsageError(OneLine(error.what()) + "; see prehoc --help");
  }
  for (const CLI::App* part : std::initializer_list<const CLI::App*>{&app, answer, fidelity, inspect, torture, doctor}) {
    const std::vector<std::string> extras = part->remaining();
    if (!extras.empty()) return UnknownArgument(*part, extras.front());
  }
  if (answer->parsed()) {
    PREHOC_ASSIGN_OR_RETURN(command.answer, ReadAnswer({answer}, raw_answer));
    command.kind = raw_answer.show_knobs ? CommandKind::kPrintText : CommandKind::kAnswer;
    if (raw_answer.show_knobs) command.text = KnobsText(command.answer.selector);
    return command;
  }
  if (fidelity->parsed()) {
    PREHOC_ASSIGN_OR_RETURN(command.fidelity, ReadFidelity({fidelity}, raw_fidelity));
    command.fidelity.command = LineOf(args);
    command.kind = CommandKind::kFidelity;
    return command;
  }
  if (inspect->parsed()) {
    PREHOC_ASSIGN_OR_RETURN(command.inspect, ReadInspect({inspect}, raw_inspect));
    command.kind = CommandKind::kInspect;
    return command;
  }
  if (torture->parsed()) {
    PREHOC_ASSIGN_OR_RETURN(command.torture, ReadTorture({torture}, raw_torture));
    command.kind = CommandKind::kTorture;
    return command;
  }
  if (doctor->parsed()) {
    PREHOC_ASSIGN_OR_RETURN(command.doctor, ReadDoctor({doctor}, raw_doctor));
    command.kind = CommandKind::kDoctor;
    return command;
  }
  return UsageError("no command: give answer, fidelity, inspect, torture or doctor; see prehoc --help");
}

}  // namespace prehoc::cli
