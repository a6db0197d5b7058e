#include "integrations/cli/torture.h"

#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>

#include "integrations/cli/exit_code.h"
#include "integrations/cli/format.h"
#include "integrations/cli/interrupt.h"
#include "integrations/cli/output_file.h"
#include "integrations/cli/progress.h"
#include "integrations/cli/text_table.h"
#include "integrations/torture/torture.h"

namespace prehoc::cli {
namespace {

namespace fs = std::filesystem;
using torture::Fault;
using torture::FaultPlan;
using torture::InfoOf;
using torture::kFaults;
using torture::TortureResult;
using Json = nlohmann::ordered_json;

// A directory of its own, that goes with all that is in it.
class OwnDirectory {
 public:
  static Result<std::unique_ptr<OwnDirectory>> Create(const std::string& flag) {
    std::error_code error;
    const fs::path parent = flag.empty() ? fs::temp_directory_path(error) : fs::path(flag);
    const std::string named = flag.empty() ? "the directory of temporary files" : "--store " + flag;
    if (error) return {StatusCode::kIoError, named + ": " + error.message() + "; name one with --store"};
    std::string path = (parent / "prehoc-torture-XXXXXX").string();
    if (::mkdtemp(path.data()) == nullptr) {
      return {StatusCode::kIoError, named + ": cannot make a directory in it: " + std::strerror(errno)};
    }
    return std::unique_ptr<OwnDirectory>(new OwnDirectory(std::move(path)));
  }
  ~OwnDirectory() {
    std::error_code error;
    fs::remove_all(path_, error);
  }
  const std::string& path() const { return path_; }

 private:
  explicit OwnDirectory(std::string path) : path_(std::move(path)) {}
  const std::string path_;
};

std::string Count(uint64_t n) { return FormatCount(static_cast<int64_t>(n)); }

std::string FormatTorture(const TortureResult& result) {
  TextTable table({"fault", "injected", "detected", "never read", "passed", ""});
  FaultPlan::Count bytes, all;
  for (size_t f = 0; f < kFaults; ++f) {
    const FaultPlan::Count& count = result.counts[f];
    const torture::FaultInfo& info = InfoOf(static_cast<Fault>(f));
    all.injected += count.injected;
    if (count.injected == 0) continue;
    if (!info.bytes) {
      table.Add({std::string(info.name), Count(count.injected)});
      continue;
    }
    bytes.injected += count.injected;
    bytes.detected += count.detected;
    bytes.unread += count.unread;
    bytes.missed += count.missed;
    table.Add({std::string(info.name), Count(count.injected), Count(count.detected), Count(count.unread), Count(count.missed)});
  }
  table.Add({"wrong bytes", Count(bytes.injected), Count(bytes.detected), Count(bytes.unread), Count(bytes.missed)});
  table.Add({"all", Count(all.injected)});
  return table.ToString();
}

Json JsonOf(const TortureFlags& flags, const TortureResult& result, bool complete) {
  Json json;
  json["schema"] = "prehoc.torture/1";
  json["seed"] = flags.seed;
  json["faults"] = flags.faults;
  json["rate"] = flags.rate;
  json["rows"] = RowFormatName(flags.rows);
  json["complete"] = complete;
  json["seconds"] = result.seconds;
  json["rounds"] = result.rounds;
  json["injected"] = result.injected();
  json["kinds"] = Json::object();
  for (size_t f = 0; f < kFaults; ++f) {
    const FaultPlan::Count& count = result.counts[f];
    const torture::FaultInfo& info = InfoOf(static_cast<Fault>(f));
    Json kind = {{"what", info.what}, {"injected", count.injected}};
    if (info.bytes) kind.update({{"detected", count.detected}, {"never_read", count.unread}, {"passed", count.missed}});
    json["kinds"][std::string(info.name)] = kind;
  }
  json["sequences"] = {{"opened", result.sequences}, {"finished", result.finished}, {"given_up", result.told}};
  json["steps"] = result.steps;
  json["compared"] = {{"store_reads", result.reads}, {"store_writes", result.writes}, {"outputs", result.outputs}};
  json["restored_tokens"] = result.restored;
  json["repaired_chunks"] = result.repaired;
  json["retried_steps"] = result.retried;
  json["late_reads"] = result.late;
  json["store_left_alone"] = result.opened;
  json["wrong"] = result.wrong_count;
  json["wrong_examples"] = result.wrong;
  return json;
}

void Print(const TortureResult& result, std::ostream& out) {
  out << FormatTorture(result) << "\n";
  uint64_t given_up = 0;
  std::string codes;
  for (const auto& [code, count] : result.told) {
    given_up += count;
    codes += (codes.empty() ? " (" : ", ") + code + " " + Count(count);
  }
  out << fmt::format("{} rounds in {}: {} steps of {} sequences, {} finished, {} given up with an error{}\n", result.rounds, FormatSeconds(result.seconds),
                     Count(result.steps), Count(result.sequences), Count(result.finished), Count(given_up), codes.empty() ? "" : codes + ")");
  out << fmt::format("compared with the truth: {} reads and {} writes of the store, {} outputs of layers\n", Count(result.reads), Count(result.writes), Count(result.outputs));
  out << fmt::format("{} tokens restored, {} chunks made anew, {} steps run again, {} reads given up, store left alone {} times\n", Count(result.restored),
                     Count(result.repaired), Count(result.retried), Count(result.late), Count(result.opened));
  out << (result.wrong_count == 0 ? "nothing wrong came back\n" : fmt::format("WRONG: {} times\n", Count(result.wrong_count)));
}

Result<TortureResult> Run(const TortureFlags& flags, const Environment& environment, std::ostream& out, std::ostream& err, const Clock& clock) {
  torture::TortureOptions options;
  auto faults = torture::ParseFaults(flags.faults);
  if (!faults.ok()) return UsageError("--faults: " + faults.status().message());
  options.faults = *faults;
  std::unique_ptr<OutputFile> json;
  if (!flags.json.empty()) {
    PREHOC_ASSIGN_OR_RETURN(OutputFile file, OutputFile::Create("--json", flags.json));
    json = std::make_unique<OutputFile>(std::move(file));
  }
  PREHOC_ASSIGN_OR_RETURN(const std::unique_ptr<OwnDirectory> directory, OwnDirectory::Create(flags.store));
  options.directory = directory->path();
  options.seed = flags.seed;
  options.seconds = flags.seconds;
  options.rate = flags.rate;
  options.only_round = flags.round;
  options.threads = flags.threads;
  options.rows = flags.rows;
  options.clock = &clock;
  options.stop = [] { return InterruptGuard::Requested(); };
  ProgressBar bar(err, environment.stderr_terminal, "faults", clock);
  options.progress = [&](uint64_t, double seconds) {
    bar.Update(std::min(static_cast<int64_t>(seconds), static_cast<int64_t>(flags.seconds)), static_cast<int64_t>(flags.seconds), "seconds");
  };
  auto result = torture::RunTorture(options);
  bar.Clear();
  if (!result.ok()) return RuntimeError(result.status(), "");
  Print(*result, out);
  if (json != nullptr) {
    PREHOC_RETURN_IF_ERROR(json->Commit(JsonOf(flags, *result, !InterruptGuard::Requested()).dump(2, ' ', false, Json::error_handler_t::replace) + "\n"));
  }
  return result;
}

}  // namespace

int RunTortureCommand(const TortureFlags& flags, const Environment& environment, std::ostream& out, std::ostream& err, const Clock& clock) {
  const InterruptGuard guard;
  const auto result = Run(flags, environment, out, err, clock);
  if (!result.ok()) {
    err << "prehoc: error: " << result.status().message() << std::endl;
    return ExitCodeOf(result.status());
  }
  for (const std::string& what : result->wrong) {
    const std::string round = what.substr(6, what.find(':') - 6);
    err << "prehoc: error: " << what << "; again: prehoc torture --seed " << flags.seed << " --faults " << flags.faults << " --rate " << flags.rate << " --round " << round << std::endl;
  }
  if (result->wrong_count > 0) return kExitRuntime;
  return InterruptGuard::Requested() ? InterruptGuard::ExitCode() : kExitOk;
}

}  // namespace prehoc::cli
