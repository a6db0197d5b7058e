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

}  // namespace prehoc::cli
