#include "integrations/cli/inspect.h"

#include <fmt/format.h>
#include <sys/stat.h>

#include <algorithm>
#include <ctime>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/executor.h"
#include "base/units.h"
#include "integrations/cli/exit_code.h"
#include "integrations/cli/format.h"
#include "integrations/cli/interrupt.h"
#include "integrations/cli/output_file.h"
#include "integrations/cli/progress.h"
#include "integrations/cli/text_table.h"
#include "integrations/cli/utf8.h"
#include "transfer/rocksdb_store.h"
#include "transfer/store_directory.h"
#include "transfer/store_survey.h"

namespace prehoc::cli {
namespace {

using Json = nlohmann::ordered_json;

std::string Bytes(uint64_t bytes) { return FormatBytes(static_cast<double>(bytes)); }
std::string Hex(uint64_t tag) { return fmt::format("{:016x}", tag); }

// Of a file's time: clocks move back, so a time that is still to come counts as now.
std::string FormatAge(int64_t seconds) {
  if (seconds < 120) return std::to_string(std::max<int64_t>(0, seconds)) + " s";
  if (seconds < 2 * 3600) return std::to_string(seconds / 60) + " min";
  if (seconds < 48 * 3600) return std::to_string(seconds / 3600) + " h";
  return std::to_string(seconds / 86400) + " days";
}

struct Damage {
  std::string what;   // a chunk or a file
  std::string why;
  bool repaired = false;
};

class Inspector {
 public:
  Inspector(const InspectOptions& options, const Environment& environment, std::ostream& out, std::ostream& err, const Clock& clock)
      : options_(options), environment_(environment), out_(out), err_(err), clock_(clock) {}

  Status Run() {
    if (!options_.json.empty()) {
      PREHOC_ASSIGN_OR_RETURN(OutputFile file, OutputFile::Create("--json", options_.json));
      json_ = std::make_unique<OutputFile>(std::move(file));
    }
    PREHOC_RETURN_IF_ERROR(ReadDirectory());
    PREHOC_RETURN_IF_ERROR(OpenStore());
    PREHOC_RETURN_IF_ERROR(ReadRecords());
    survey_ = SurveyRecords(records_, layout_.layers);
    if (options_.repair && !InterruptGuard::Requested()) PREHOC_RETURN_IF_ERROR(Repair());
    Print();
    return json_ != nullptr ? json_->Commit(ToJson().dump(2, ' ', false, Json::error_handler_t::replace) + "\n") : Status();
  }

  bool damage_stays() const {
    return std::any_of(damage_.begin(), damage_.end(), [](const Damage& damage) { return !damage.repaired; });
  }

 private:
  Status ReadDirectory() {
    auto note = ReadStoreNote(options_.store);
    if (!note.ok()) return Told(note.status());
    note_ = std::move(note).value();
    layout_ = ParseLayoutNumbers(note_.identity.layout);
    auto files = ListStoreFiles(options_.store);
    if (!files.ok()) return Told(files.status());
    files_ = std::move(files).value();
    return {};
  }

  RocksDbStore::Options StoreOptions() const {
    RocksDbStore::Options options;
    options.path = options_.store;
    options.identity = note_.identity;
    options.chunk_bytes = note_.chunk_bytes;
    options.budget = uint64_t{1} << 46;  // looking at a store must not make it smaller
    options.min_free_bytes = 0;
    options.create_if_missing = false;
    options.read_only = !options_.repair;
    return options;
  }

  Status OpenStore() {
    auto store = RocksDbStore::Open(StoreOptions());
    if (!store.ok() && store.status().code() == StatusCode::kCorrupt) {
      if (!options_.repair) return Told(Status(StatusCode::kCorrupt, store.status().message() + "; --repair keeps what can be read"));
      const std::string why = store.status().message();
      auto gone = RocksDbStore::Salvage(StoreOptions());
      if (!gone.ok()) return Told(gone.status());
      for (const std::string& name : *gone) damage_.push_back({"file " + name, "cannot be read, deleted", true});
      if (gone->empty()) damage_.push_back({"list of files", why, true});
      store = RocksDbStore::Open(StoreOptions());
    }
    if (!store.ok()) return Told(store.status());
    store_ = std::move(store).value();
    return {};
  }

  // Messages speak of options of the library, and may name the store once more.
  Status Told(const Status& status) const {
    const std::string own = "store " + options_.store + ": ";
    std::string message = status.message();
    if (message.starts_with(own)) message.erase(0, own.size());
    if (const size_t at = message.find(", or open with read_only"); at != std::string::npos) {
      message.replace(at, 24, "; without --repair it can be looked at meanwhile");
    }
    return RuntimeError({status.code(), message}, "--store " + options_.store);
  }

  Status ReadRecords() {
    const auto places = store_->ListRecords();
    records_.resize(places.size());
    std::vector<Status> found(places.size());
    const VerifyPayload verify = options_.verify || options_.repair ? VerifyPayload::kYes : VerifyPayload::kNo;
    PREHOC_ASSIGN_OR_RETURN(const auto executor, ThreadPool::Create({.spin_iterations = 0}));
    ProgressBar bar(err_, environment_.stderr_terminal, verify == VerifyPayload::kYes ? "Verifying" : "Reading", clock_);
    constexpr size_t kBatch = 256;
    for (size_t first = 0; first < places.size() && !InterruptGuard::Requested(); first += kBatch) {
      const size_t count = std::min(kBatch, places.size() - first);
      executor->ParallelFor(static_cast<int64_t>(count), [&](int64_t i) {
        const size_t at = first + static_cast<size_t>(i);
        records_[at].key = places[at].key;
        records_[at].segment = places[at].segment;
        const auto header = store_->Inspect(places[at].key, verify);
        if (header.ok()) records_[at].origin = OriginOf(*header);
        records_[at].damaged = !header.ok();
        found[at] = header.status();
      });
      read_ = first + count;
      bar.Update(static_cast<int64_t>(read_), static_cast<int64_t>(places.size()), "records");
    }
    if (read_ < records_.size()) {
      records_.resize(read_);
      return {};
    }
    // Beside a writer, a record that is gone was dropped meanwhile: that is no damage.
    for (size_t i = 0; i < records_.size(); ++i) {
      if (found[i].ok() || (store_read_only() && found[i].code() == StatusCode::kNotFound)) continue;
      const std::string own = "store " + options_.store + ": ";
      std::string why = found[i].message();
      if (why.starts_with(own)) why.erase(0, own.size());
      damage_.push_back({"chunk " + records_[i].key.ToString(), why, false});
    }
    return {};
  }
  bool store_read_only() const { return !options_.repair; }

  Status Repair() {
    std::map<std::string, size_t> at;
    for (size_t i = 0; i < damage_.size(); ++i) at[damage_[i].what] = i;
    for (size_t i = 0; i < records_.size(); ++i) {
      if (survey_.why[i] == Unreachable::kNo) continue;
      const Status dropped = store_->Delete(records_[i].key);
      if (!dropped.ok()) return Told(dropped);
      ++dropped_[survey_.why[i]];
      const std::string what = "chunk " + records_[i].key.ToString();
      if (const auto found = at.find(what); found != at.end()) {
        damage_[found->second].repaired = true;
      } else {
        unreachable_.push_back({what, UnreachableName(survey_.why[i]), true});
      }
    }
    const Status flushed = store_->Flush();
    return flushed.ok() ? flushed : Told(flushed);
  }

  int64_t AgeOf(uint64_t segment) const {
    for (const auto& file : store_->ListSegments()) {
      struct stat info {};
      if (file.number == segment && ::stat((options_.store + "/" + file.name).c_str(), &info) == 0) return std::time(nullptr) - info.st_mtime;
    }
    return 0;
  }

  void Line(std::string_view name, std::string_view value) { out_ << fmt::format("{:<10}{}\n", name, value); }

  void Print() {
    const StoreIdentity& identity = note_.identity;
    Line("store", options_.store);
    Line("model", fmt::format("{} ({})", OneLineForTerminal(identity.model_name), Hex(ModelTag())));
    Line("format", fmt::format("store {}, records {}, {}, {}, blocks of {}", note_.store_version, identity.format_version, identity.dtype,
                               identity.layout, Bytes(note_.chunk_bytes)));
    Line("size", fmt::format("{} in {} files of records, {} records", Bytes(files_.bytes), FormatCount(static_cast<int64_t>(store_->segment_count())),
                             FormatCount(static_cast<int64_t>(records_.size()))));
    for (const std::string& name : files_.foreign) Line("foreign", OneLineForTerminal(name) + ": not of the store, left alone");
    if (InterruptGuard::Requested()) {
      Line("stopped", fmt::format("after {} of the records; nothing was changed", FormatCount(static_cast<int64_t>(read_))));
      return;
    }
    PrintTenants();
    for (const Unreachable why : {Unreachable::kBranch, Unreachable::kGap, Unreachable::kNoParent}) {
      if (const int64_t count = survey_.Count(why); count > 0) {
        Line("unusable", fmt::format("{} records, {}: {}", FormatCount(count), Bytes(static_cast<uint64_t>(count) * note_.chunk_bytes), UnreachableName(why)));
      }
    }
    for (const Damage& damage : damage_) Line("damaged", damage.what + ": " + OneLineForTerminal(damage.why) + (damage.repaired ? "; dropped" : ""));
    for (const Damage& dropped : unreachable_) Line("dropped", dropped.what + ": " + dropped.why);
    if (options_.verify || options_.repair) {
      const auto bad = static_cast<int64_t>(damage_.size());
      Line("verified", bad == 0 ? "every record is what was written"
                                : fmt::format("{} damaged{}", FormatCount(bad), damage_stays() ? "; drop them with --repair" : ", all dropped"));
    }
  }

  void PrintTenants() {
    if (survey_.tenants.empty()) return;
    TextTable table({"tenant", "prompts", "longest", "chunks", "records", "bytes", "oldest", "newest"});
    for (const SurveyTenant& tenant : survey_.tenants) {
      const int64_t tokens = tenant.longest_chunks * layout_.chunk_tokens;
      table.Add({Hex(tenant.tag), FormatCount(tenant.prefixes),
                 layout_.chunk_tokens > 0 ? FormatCount(tokens) + " tokens" : FormatCount(tenant.longest_chunks) + " chunks",
                 FormatCount(tenant.chunks), FormatCount(tenant.records), Bytes(static_cast<uint64_t>(tenant.records) * note_.chunk_bytes),
                 FormatAge(AgeOf(tenant.oldest_segment)), FormatAge(AgeOf(tenant.newest_segment))});
    }
    out_ << table.ToString();
  }

  uint64_t ModelTag() const {
    uint64_t tag = 0;
    for (size_t i = 0; i < 8; ++i) tag = tag << 8 | note_.identity.model[i];
    return tag;
  }

  // Names of files and models are whatever somebody made them.
  static std::string OneLineForTerminal(const std::string& text) {
    Utf8Stream stream(/*for_terminal=*/true);
    std::string line = stream.Feed(text);
    line += stream.Finish();
    std::replace(line.begin(), line.end(), '\n', ' ');
    return line;
  }

  Json ToJson() const {
    const StoreIdentity& identity = note_.identity;
    Json json;
    json["schema"] = "prehoc.inspect/1";
    json["store"] = options_.store;
    json["complete"] = !InterruptGuard::Requested();
    std::string model;
    for (const uint8_t byte : identity.model) model += fmt::format("{:02x}", byte);
    json["model"] = {{"fingerprint", model}, {"name", identity.model_name}};
    json["format"] = {{"store", note_.store_version}, {"record", identity.format_version}, {"dtype", identity.dtype},
                      {"layout", identity.layout}, {"chunk_bytes", note_.chunk_bytes}};
    json["bytes"] = files_.bytes;
    json["files"] = store_->segment_count();
    json["foreign_files"] = files_.foreign;
    json["records"] = records_.size();
    json["verified"] = options_.verify || options_.repair;
    json["tenants"] = Json::array();
    for (const SurveyTenant& tenant : survey_.tenants) {
      json["tenants"].push_back({{"tag", Hex(tenant.tag)}, {"prompts", tenant.prefixes}, {"longest_tokens", tenant.longest_chunks * layout_.chunk_tokens},
                                 {"chunks", tenant.chunks}, {"records", tenant.records},
                                 {"bytes", static_cast<uint64_t>(tenant.records) * note_.chunk_bytes},
                                 {"oldest_seconds", std::max<int64_t>(0, AgeOf(tenant.oldest_segment))},
                                 {"newest_seconds", std::max<int64_t>(0, AgeOf(tenant.newest_segment))}});
    }
    json["unusable_records"] = {{"of_answers", survey_.Count(Unreachable::kBranch)}, {"chunk_not_whole", survey_.Count(Unreachable::kGap)},
                                {"no_chunk_before", survey_.Count(Unreachable::kNoParent)}};
    json["damaged"] = Json::array();
    for (const Damage& damage : damage_) json["damaged"].push_back({{"what", damage.what}, {"why", damage.why}, {"dropped", damage.repaired}});
    int64_t dropped = 0;
    for (const auto& [why, count] : dropped_) dropped += count;
    json["dropped_records"] = dropped;
    return json;
  }

  const InspectOptions& options_;
  const Environment& environment_;
  std::ostream& out_;
  std::ostream& err_;
  const Clock& clock_;
  std::unique_ptr<OutputFile> json_;
  StoreNote note_;
  LayoutNumbers layout_;
  StoreFiles files_;
  std::unique_ptr<RocksDbStore> store_;
  std::vector<SurveyRecord> records_;
  size_t read_ = 0;
  StoreSurvey survey_;
  std::vector<Damage> damage_, unreachable_;
  std::map<Unreachable, int64_t> dropped_;
};

}  // namespace

int RunInspect(const InspectOptions& options, const Environment& environment, std::ostream& out, std::ostream& err, const Clock& clock) {
  const InterruptGuard guard;
  Inspector inspector(options, environment, out, err, clock);
  const Status status = inspector.Run();
  if (!status.ok()) {
    err << "prehoc: error: " << status.message() << std::endl;
    return ExitCodeOf(status);
  }
  if (InterruptGuard::Requested()) return InterruptGuard::ExitCode();
  return inspector.damage_stays() ? kExitRuntime : kExitOk;
}

}  // namespace prehoc::cli
