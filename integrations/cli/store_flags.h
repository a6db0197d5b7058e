// The flags of the commands that look after a store.
#pragma once
#include <string>

#include "base/result.h"
#include "integrations/cli/flag_values.h"
#include "integrations/cli/options.h"

namespace prehoc::cli {

// Values as typed.
struct RawInspect {
  std::string store, json;
  bool verify = false, repair = false;
};

struct RawTorture {
  std::string seconds, seed, faults, rate, store, round, threads, rows, json;
};

void AddInspectFlags(CLI::App& app, RawInspect& raw);
Result<InspectOptions> ReadInspect(const Flags& flags, const RawInspect& raw);
void AddTortureFlags(CLI::App& app, RawTorture& raw);
Result<TortureFlags> ReadTorture(const Flags& flags, const RawTorture& raw);

}  // namespace prehoc::cli
