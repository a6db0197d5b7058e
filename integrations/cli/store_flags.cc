#include "integrations/cli/store_flags.h"

namespace prehoc::cli {

void AddInspectFlags(CLI::App& app, RawInspect& raw) {
  AddText(app, "--store", raw.store, "DIR", "directory of the disk store; required", "Flags");
  app.add_flag("--verify", raw.verify, "read every record and compare it with its checksum")->group("Flags");
  app.add_flag("--repair", raw.repair, "verify, then drop what is damaged and what no prompt can reach")->group("Flags");
  AddText(app, "--json", raw.json, "FILE", "write all figures there", "Flags");
}

Result<InspectOptions> ReadInspect(const Flags& flags, const RawInspect& raw) {
  InspectOptions options;
  PREHOC_RETURN_IF_ERROR(ReadText(flags, "--store", raw.store, &options.store));
  PREHOC_RETURN_IF_ERROR(ReadText(flags, "--json", raw.json, &options.json));
  if (options.store.empty()) return UsageError("--store is missing: name the directory of the store to look at");
  options.verify = raw.verify;
  options.repair = raw.repair;
  return options;
}

void AddTortureFlags(CLI::App& app, RawTorture& raw) {
  AddText(app, "--seconds", raw.seconds, "N", "no round begins after that; default 60", "Flags");
  AddText(app, "--seed", raw.seed, "S", "where all work and all faults come from; default 1", "Flags");
  AddText(app, "--faults", raw.faults, "LIST", "kinds with commas between, all (default) or none", "Flags");
  AddText(app, "--rate", raw.rate, "X", "share of reads that go wrong, over 0 and at most 0.9; other faults in proportion; default 0.25", "Flags");
  AddText(app, "--store", raw.store, "DIR", "existing directory on the disk to use; default: that of temporary files", "Flags");
  AddText(app, "--round", raw.round, "R", "only this round of the seed", "Flags");
  AddText(app, "--threads", raw.threads, "N", "of rounds on disk; default 3", "Flags");
  AddText(app, "--rows", raw.rows, "FORMAT", "f16 (default), int8 or e4m3: how K and V lie in host memory and on disk", "Flags");
  AddText(app, "--json", raw.json, "FILE", "write all figures there", "Flags");
}

Result<TortureFlags> ReadTorture(const Flags& flags, const RawTorture& raw) {
  TortureFlags options;
  int64_t seconds = static_cast<int64_t>(options.seconds);
  PREHOC_RETURN_IF_ERROR(ReadWhole<int64_t>(flags, "--seconds", raw.seconds, 1, 1'000'000, &seconds));
  options.seconds = static_cast<double>(seconds);
  PREHOC_RETURN_IF_ERROR(ReadWhole<uint64_t>(flags, "--seed", raw.seed, 0, UINT64_MAX, &options.seed));
  PREHOC_RETURN_IF_ERROR(ReadText(flags, "--faults", raw.faults, &options.faults));
  if (flags.Given("--rate")) {
    const auto [end, error] = std::from_chars(raw.rate.data(), raw.rate.data() + raw.rate.size(), options.rate);
    if (error != std::errc() || end != raw.rate.data() + raw.rate.size() || !(options.rate > 0 && options.rate <= 0.9)) {
      return Bad("--rate", raw.rate, "a number over 0 and at most 0.9");
    }
  }
  PREHOC_RETURN_IF_ERROR(ReadText(flags, "--store", raw.store, &options.store));
  PREHOC_RETURN_IF_ERROR(ReadWhole<int64_t>(flags, "--round", raw.round, 0, int64_t{1} << 40, &options.round));
  PREHOC_RETURN_IF_ERROR(ReadWhole<int>(flags, "--threads", raw.threads, 1, 64, &options.threads));
  if (flags.Given("--rows")) {
    PREHOC_ASSIGN_OR_RETURN(options.rows, ParseRows("--rows", raw.rows));
  }
  PREHOC_RETURN_IF_ERROR(ReadText(flags, "--json", raw.json, &options.json));
  return options;
}

}  // namespace prehoc::cli
