// Sequences over all tiers while everything below them fails on purpose; every byte compared with the truth.
#pragma once
#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/row_format.h"
#include "base/result.h"
#include "integrations/torture/fault_plan.h"

namespace prehoc::torture {

// A run is a series of rounds, each with a seed of its own that follows from `seed` and the round's number. Even rounds run in
// one thread over a store in memory: the same seed gives the same faults and the same answers, to the last bit. Odd rounds run
// in several threads over a disk store, which is closed and opened again between them: the same seed gives the same work and the
// same faults, but not the same order.
struct TortureOptions {
  uint64_t seed = 1;
  FaultSet faults{};
  double seconds = 60;         // no round begins after that
  int64_t max_rounds = INT64_MAX;
  int64_t only_round = -1;     // this one and no other
  int64_t steps = 20'000;        // of all sequences of a round: tokens, prompts or prefixes
  double rate = 0.25;         // share of reads that go wrong; everything else is derived from it
  std::string directory;       // for the disk store; must exist, and be empty. Empty = no disk rounds
  int threads = 3;             // of disk rounds
  RowFormat rows = RowFormat::kF16;  // in host memory and in the store
  const Clock* clock = nullptr;
  // Asked between steps; true ends the run after the step.
  std::function<bool()> stop = [] { return false; };
  std::function<void(uint64_t faults, double seconds)> progress = [](uint64_t, double) {};
};

struct TortureResult {
  std::array<FaultPlan::Count, kFaults> counts{};
  int64_t rounds = 0;
  double seconds = 0;
  uint64_t sequences = 0, finished = 0;  // opened; ended as they should
  uint64_t steps = 0;
  uint64_t reads = 0, writes = 0;        // of the store, compared with the truth
  uint64_t outputs = 0;                  // of layers, compared with the truth
  uint64_t restored = 0;                 // tokens taken from a tier
  uint64_t repaired = 0;                 // chunks made anew
  uint64_t retried = 0;                  // steps run again after an error that may pass
  uint64_t late = 0, opened = 0;         // reads given up at their deadline; times that the store was left alone
  std::map<std::string, uint64_t> told;  // sequences given up with an error, by its code
  std::vector<std::string> wrong;        // what must not be, each with its round; at most 20 are kept
  uint64_t wrong_count = 0;
  uint64_t digest = 0;                   // of faults and answers of the even rounds

  uint64_t injected() const;
};

// An error of the machine (the directory, memory), not of what is tested.
Result<TortureResult> RunTorture(const TortureOptions& options);

}  // namespace prehoc::torture
