#include "integrations/cli/calibration_file.h"

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>
#include <vector>

#include "integrations/cli/exit_code.h"
#include "integrations/cli/format.h"
#include "integrations/reference/loader/json.h"

namespace prehoc::cli {
namespace {
using nlohmann::ordered_json;
using reference::loader::JsonFields;

constexpr int64_t kMostUnits = 100'000'000;
constexpr int64_t kMostTokens = int64_t{1} << 30;
constexpr double kSameLimit = 1e-6;  // between a limit as written and as worked out

// Names come from strangers: no control character reaches a terminal, and no message grows without end.
bool IsControl(std::string_view text, size_t at) {
  const auto byte = static_cast<unsigned char>(text[at]);
  const bool c1 = byte == 0xc2 && at + 1 < text.size() && static_cast<unsigned char>(text[at + 1]) < 0xa0;
  return byte < 0x20 || byte == 0x7f || c1;
}

bool HasControl(std::string_view text) {
  for (size_t i = 0; i < text.size(); ++i) {
    if (IsControl(text, i)) return true;
  }
  return false;
}

std::string Shown(std::string_view text) {
  constexpr size_t kShown = 120;
  std::string shown;
  for (size_t i = 0; i < std::min(text.size(), kShown); ++i) shown += IsControl(text, i) ? '?' : text[i];
  return shown + (text.size() > kShown ? "..." : "");
}

std::string Quoted(std::string_view text) { return "\"" + Shown(text) + "\""; }

bool IsSha256(std::string_view text) {
  constexpr std::string_view kDigits = "0123456789abcdef";
  return text.size() == 64 && text.find_first_not_of(kDigits) == std::string_view::npos;
}

// "12.3", as this program prints it.
bool IsHead(std::string_view text) {
  const size_t dot = text.find('.');
  const auto number = [](std::string_view part) {
    return !part.empty() && part.size() <= 6 && part.find_first_not_of("0123456789") == std::string_view::npos && (part == "0" || part[0] != '0');
  };
  return dot != std::string_view::npos && number(text.substr(0, dot)) && number(text.substr(dot + 1));
}

std::string Listed(const std::vector<std::string>& names) {
  std::string list;
  for (const std::string& name : names) list += (list.empty() ? "" : ", ") + name;
  return list.empty() ? "nothing" : Shown(list);
}

// The fields of one object, all of them required. Every error is kCorrupt.
class Reader {
 public:
  Reader(JsonFields fields, std::string name, std::vector<std::string> known)
      : fields_(std::move(fields)), name_(std::move(name)), known_(std::move(known)) {}

  Status Bad(const std::string& what) const { return {StatusCode::kCorrupt, name_ + ": " + what}; }

  Status CheckKeys() const {
    const std::vector<std::string> found = fields_.Keys();
    for (const std::string& key : known_) {
      if (!fields_.Names(key.c_str())) return Bad("field " + fields_.NameOf(key) + " is missing; found " + Listed(found));
    }
    for (const std::string& key : found) {
      if (std::find(known_.begin(), known_.end(), key) != known_.end()) continue;
      return Bad("unknown field " + Shown(fields_.NameOf(key)) + "; known: " + Listed(known_));
    }
    return {};
  }

  Result<Reader> Object(const char* key, std::vector<std::string> known) const {
    PREHOC_ASSIGN_OR_RETURN(auto fields, Required(key, fields_.Object(key)));
    Reader reader(std::move(fields), name_, std::move(known));
    PREHOC_RETURN_IF_ERROR(reader.CheckKeys());
    return reader;
  }

  Result<std::string> Text(const char* key) const {
    PREHOC_ASSIGN_OR_RETURN(auto text, Required(key, fields_.String(key)));
    if (HasControl(text)) return Bad(fields_.NameOf(key) + " " + Quoted(text) + " holds control characters");
    return text;
  }

  Result<std::string> Digest(const char* key) const {
    PREHOC_ASSIGN_OR_RETURN(auto text, Text(key));
    if (!IsSha256(text)) return Bad(fields_.NameOf(key) + " " + Quoted(text) + ": expected 64 hex digits, lower case");
    return text;
  }

  Result<std::vector<std::string>> Texts(const char* key) const {
    PREHOC_ASSIGN_OR_RETURN(auto texts, Required(key, fields_.Strings(key)));
    for (const std::string& text : texts) {
      if (HasControl(text)) return Bad(fields_.NameOf(key) + " " + Quoted(text) + " holds control characters");
    }
    return texts;
  }

  Result<int64_t> Whole(const char* key, int64_t least, int64_t most) const {
    return Required(key, fields_.Integer(key, least, most));
  }
  Result<double> Real(const char* key) const { return Required(key, fields_.Float(key)); }
  Result<std::optional<double>> RealOrNull(const char* key) const {
    const auto value = fields_.Float(key);
    if (!value.ok()) return Status(StatusCode::kCorrupt, value.status().message());
    return *value;
  }

 private:
  template <class T>
  Result<T> Required(const char* key, Result<std::optional<T>> value) const {
    if (!value.ok()) return Status(StatusCode::kCorrupt, value.status().message());
    if (!*value) return Bad("field " + fields_.NameOf(key) + " is null");
    return std::move(**value);
  }

  JsonFields fields_;
  std::string name_;
  std::vector<std::string> known_;
};

Status ReadSelector(const Reader& top, CalibrationFile* file) {
  PREHOC_ASSIGN_OR_RETURN(const Reader selector, top.Object("selector", {"name", "knobs", "codes"}));
  PREHOC_ASSIGN_OR_RETURN(const std::string name, selector.Text("name"));
  Status set = file->selector.Set("selector", name);
  if (!set.ok()) return top.Bad("selector.name: " + set.message());
  PREHOC_ASSIGN_OR_RETURN(std::vector<std::string> knobs, selector.Texts("knobs"));
  for (const std::string& line : knobs) {
    const size_t equals = line.find('=');
    if (equals == std::string::npos) return top.Bad("selector.knobs: " + Quoted(line) + ": expected NAME=VALUE");
    set = file->selector.Set(line.substr(0, equals), std::string_view(line).substr(equals + 1));
    if (!set.ok()) return top.Bad("selector.knobs: " + set.message());
  }
  // All of them, once, as they are printed: a knob that is not there would have today's default, not the calibrated one.
  std::vector<std::string> all = file->selector.Describe();
  std::sort(all.begin(), all.end());
  std::sort(knobs.begin(), knobs.end());
  const auto [want, got] = std::mismatch(all.begin(), all.end(), knobs.begin(), knobs.end());
  if (want != all.end() || got != knobs.end()) {
    return top.Bad("selector.knobs of " + name + ": expected " + (want == all.end() ? "no more" : Quoted(*want)) +
                   ", found " + (got == knobs.end() ? "no more" : Quoted(*got)));
  }
  const Status valid = file->selector.Validate();
  if (!valid.ok()) return top.Bad("selector.knobs: " + valid.message());
  if (file->selector.kind == SelectorKind::kTwoClock && file->selector.tc.theta == TwoClockOptions::kAuto) {
    return top.Bad("selector.knobs: \"tc.theta=auto\" differs from tier to tier; expected the number that was calibrated with");
  }
  PREHOC_ASSIGN_OR_RETURN(const std::string codes, selector.Text("codes"));
  const Result<CodeFormat> parsed = ParseCodes(codes);
  if (!parsed.ok()) return top.Bad("selector.codes " + Quoted(codes) + ": expected bits over tokens, such as 4/64");
  file->codes = *parsed;
  return {};
}

Status ReadCalibrated(const Reader& top, CalibrationFile* file) {
  PREHOC_ASSIGN_OR_RETURN(const Reader calibrated, top.Object("calibrated", {"knob", "value"}));
  PREHOC_ASSIGN_OR_RETURN(file->knob, calibrated.Text("knob"));
  PREHOC_ASSIGN_OR_RETURN(file->value, calibrated.Text("value"));
  const std::vector<std::string> all = file->selector.Describe();
  const std::string line = file->knob + "=" + file->value;
  if (std::find(all.begin(), all.end(), line) != all.end()) return {};
  return top.Bad("calibrated " + Quoted(line) + ": not among selector.knobs");
}

Status ReadClaim(const Reader& top, CalibrationClaim* claim) {
  PREHOC_ASSIGN_OR_RETURN(const std::string method, top.Text("method"));
  const bool rcps = method == CalibrationMethodName(CalibrationMethod::kRcps);
  if (!rcps && method != CalibrationMethodName(CalibrationMethod::kConformal)) {
    return top.Bad("method " + Quoted(method) + ": expected rcps or conformal");
  }
  claim->method = rcps ? CalibrationMethod::kRcps : CalibrationMethod::kConformal;
  PREHOC_ASSIGN_OR_RETURN(claim->alpha, top.Real("alpha"));
  PREHOC_ASSIGN_OR_RETURN(claim->delta_max, top.Real("delta_max"));
  PREHOC_ASSIGN_OR_RETURN(const std::optional<double> confidence, top.RealOrNull("confidence"));
  if (confidence.has_value() != rcps) {
    return top.Bad(rcps ? "confidence is null: rcps needs one" : "confidence: conformal has none; expected null");
  }
  if (confidence) claim->confidence = *confidence;
  const Status valid = claim->Validate();
  return valid.ok() ? valid : top.Bad(valid.message());
}

double UpperLimit(const CalibrationFile& file) {
  if (file.claim.method == CalibrationMethod::kRcps) {
    return ClopperPearsonUpper(file.violations, file.units, file.claim.delta_c());
  }
  return static_cast<double>(file.violations + 1) / static_cast<double>(file.units + 1);
}

// A promise that its own numbers do not bear out is none.
Status ReadEvidence(const Reader& top, CalibrationFile* file) {
  PREHOC_ASSIGN_OR_RETURN(file->units, top.Whole("units", 1, kMostUnits));
  PREHOC_ASSIGN_OR_RETURN(file->violations, top.Whole("violations", 0, file->units));
  PREHOC_ASSIGN_OR_RETURN(file->upper_limit, top.Real("upper_limit"));
  if (!(file->upper_limit >= 0 && file->upper_limit <= 1)) return top.Bad("upper_limit: expected a number from 0 to 1");
  const double limit = UpperLimit(*file);
  if (std::abs(limit - file->upper_limit) > kSameLimit) {
    return top.Bad("upper_limit " + FormatNumber(file->upper_limit) + ": " + std::to_string(file->violations) +
                   " violations in " + std::to_string(file->units) + " units give " + FormatNumber(limit));
  }
  if (limit > file->claim.alpha) {
    return top.Bad("upper_limit " + FormatNumber(limit) + " exceeds alpha " + FormatNumber(file->claim.alpha));
  }
  PREHOC_ASSIGN_OR_RETURN(const std::string guarantee, top.Text("guarantee"));
  if (guarantee == file->claim.Guarantee()) return {};
  return top.Bad("guarantee " + Quoted(guarantee) + ": its numbers say \"" + file->claim.Guarantee() + "\"");
}

}  // namespace

std::string FormatCalibration(const CalibrationFile& file) {
  const bool rcps = file.claim.method == CalibrationMethod::kRcps;
  ordered_json json;
  json["schema"] = kCalibrationSchema;
  json["model"] = {{"fingerprint", file.model_fingerprint}, {"name", file.model_name}};
  json["text"] = {{"path", file.text_path}, {"sha256", file.text_sha256}};
  json["selector"] = {{"name", SelectorKindName(file.selector.kind)},
                      {"knobs", file.selector.Describe()},
                      {"codes", CodesToString(file.codes)}};
  json["calibrated"] = {{"knob", file.knob}, {"value", file.value}};
  json["method"] = CalibrationMethodName(file.claim.method);
  json["alpha"] = file.claim.alpha;
  json["confidence"] = rcps ? ordered_json(file.claim.confidence) : ordered_json(nullptr);
  json["delta_max"] = file.claim.delta_max;
  json["units"] = file.units;
  json["violations"] = file.violations;
  json["upper_limit"] = file.upper_limit;
  json["guarantee"] = file.claim.Guarantee();
  json["unprotected"] = file.unprotected;
  json["prompt_tokens"] = {{"from", file.least_prompt_tokens}, {"to", file.most_prompt_tokens}};
  return json.dump(2, ' ', false, ordered_json::error_handler_t::replace) + "\n";
}

Result<CalibrationFile> ParseCalibration(std::string_view text, const std::string& name) {
  if (text.size() > kMaxCalibrationBytes) {
    return {StatusCode::kCorrupt, name + ": more than 1 MiB; no calibration is that large"};
  }
  PREHOC_ASSIGN_OR_RETURN(const auto json, reference::loader::ParseJsonObject(text, name));
  const JsonFields fields(json, name);
  // The schema first: another one may have any fields.
  const auto schema = fields.String("schema");
  const std::string expected = "; expected \"" + std::string(kCalibrationSchema) + "\"";
  if (!schema.ok() || !*schema) {
    const std::string found = Listed(fields.Keys());
    return {StatusCode::kUnsupported, name + ": field schema is missing or no text; found " + found + expected};
  }
  if (**schema != kCalibrationSchema) return {StatusCode::kUnsupported, name + ": schema " + Quoted(**schema) + expected};
  const Reader top(fields, name, {"schema", "model", "text", "selector", "calibrated", "method", "alpha", "confidence",
                                  "delta_max", "units", "violations", "upper_limit", "guarantee", "unprotected", "prompt_tokens"});
  PREHOC_RETURN_IF_ERROR(top.CheckKeys());
  CalibrationFile file;
  PREHOC_ASSIGN_OR_RETURN(const Reader model, top.Object("model", {"fingerprint", "name"}));
  PREHOC_ASSIGN_OR_RETURN(file.model_fingerprint, model.Digest("fingerprint"));
  PREHOC_ASSIGN_OR_RETURN(file.model_name, model.Text("name"));
  PREHOC_ASSIGN_OR_RETURN(const Reader source, top.Object("text", {"path", "sha256"}));
  PREHOC_ASSIGN_OR_RETURN(file.text_path, source.Text("path"));
  PREHOC_ASSIGN_OR_RETURN(file.text_sha256, source.Digest("sha256"));
  PREHOC_RETURN_IF_ERROR(ReadSelector(top, &file));
  PREHOC_RETURN_IF_ERROR(ReadCalibrated(top, &file));
  PREHOC_RETURN_IF_ERROR(ReadClaim(top, &file.claim));
  PREHOC_RETURN_IF_ERROR(ReadEvidence(top, &file));
  PREHOC_ASSIGN_OR_RETURN(file.unprotected, top.Texts("unprotected"));
  for (const std::string& head : file.unprotected) {
    if (!IsHead(head)) return top.Bad("unprotected " + Quoted(head) + ": expected LAYER.HEAD, such as 0.3");
  }
  PREHOC_ASSIGN_OR_RETURN(const Reader band, top.Object("prompt_tokens", {"from", "to"}));
  PREHOC_ASSIGN_OR_RETURN(file.least_prompt_tokens, band.Whole("from", 1, kMostTokens));
  PREHOC_ASSIGN_OR_RETURN(file.most_prompt_tokens, band.Whole("to", file.least_prompt_tokens, kMostTokens));
  return file;
}

Result<CalibrationFile> ReadCalibration(const std::string& path) {
  const std::string name = "--calibration " + path;
  std::error_code error;
  if (std::filesystem::is_directory(path, error)) return {StatusCode::kUnsupported, name + ": a directory; give a file"};
  errno = 0;
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    const StatusCode code = errno == ENOENT ? StatusCode::kNotFound : StatusCode::kIoError;
    return {code, name + ": " + std::strerror(errno) + "; give a file that can be read"};
  }
  std::string text(kMaxCalibrationBytes + 1, '\0');
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  if (file.bad()) return {StatusCode::kIoError, name + ": reading failed: " + std::strerror(errno)};
  text.resize(static_cast<size_t>(file.gcount()));
  return ParseCalibration(text, name);
}

Status WriteCalibration(const CalibrationFile& file, OutputFile* out) {
  const std::string text = FormatCalibration(file);
  PREHOC_RETURN_IF_ERROR(ParseCalibration(text, "calibration").status());
  return out->Commit(text);
}

Status ApplyCalibration(const CalibrationFile& file, AnswerOptions* options) {
  const std::string source = "--calibration " + options->calibration;
  const std::string selector(SelectorKindName(file.selector.kind));
  const std::vector<std::string> knobs = file.selector.Describe();
  for (const PinnedFlag& pin : options->pinned) {
    const std::string given = pin.flag + " " + (pin.flag == "--set" ? pin.knob + "=" + pin.value : pin.value);
    std::string calibrated = CodesToString(file.codes);
    bool same = pin.value == calibrated;
    if (pin.knob != "codes") {
      const std::string prefix = pin.knob + "=";
      const auto line = std::find_if(knobs.begin(), knobs.end(), [&](const auto& text) { return text.starts_with(prefix); });
      if (line == knobs.end()) {
        return UsageError(given + ": the selector " + selector + " of " + source + " does not use " + pin.knob +
                          "; leave it out");
      }
      SelectorOptions trial = file.selector;
      const Status set = trial.Set(pin.knob, pin.value);
      if (!set.ok()) return UsageError(pin.flag + ": " + set.message());
      calibrated = line->substr(prefix.size());
      same = trial.Describe() == knobs;
    }
    if (same) continue;
    return UsageError(given + " contradicts " + source + ", where " + pin.knob + " is " + calibrated +
                      "; leave one of them out");
  }
  options->selector = file.selector;
  options->codes = file.codes;
  return {};
}

Status CheckCalibratedModel(const CalibrationFile& file, const std::string& path, const std::string& fingerprint,
                            const std::string& flag) {
  if (file.model_fingerprint == fingerprint) return {};
  return {StatusCode::kUnsupported, "--calibration " + path + ": made for model " + Shown(file.model_name) +
                                        " with fingerprint " + file.model_fingerprint + ", and " + flag + " has " +
                                        fingerprint + "; give the model it was made for, or calibrate this one"};
}

std::string OutsideBand(const CalibrationFile& file, int64_t prompt_tokens) {
  if (prompt_tokens >= file.least_prompt_tokens && prompt_tokens <= file.most_prompt_tokens) return {};
  return "the prompt has " + FormatCount(prompt_tokens) + " tokens, and prompts of " +
         FormatCount(file.least_prompt_tokens) + " to " + FormatCount(file.most_prompt_tokens) +
         " were calibrated: nothing is promised for it";
}

}  // namespace prehoc::cli
