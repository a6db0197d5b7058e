// What a sequence did, in the terms of docs/selectors/README.md. Plain data: it merges, prints as JSON and compares in a test.
#pragma once
#include <array>
#include <cstdint>
#include <functional>
#include <string_view>

#include "base/counters.h"

namespace prehoc {

// Distribution of values in [0, 1] with a relative error of at most 2 % per quantile (of values above 1e-10; smaller
// ones answer with the minimum); count, mean and extremes are exact.
class UnitSketch {
 public:
  // Values outside are moved to the nearer end. NaN counts as 1: where a share of mass is not known, it is the worst.
  void Add(double value);
  void Merge(const UnitSketch& other);
  int64_t count() const { return count_; }
  double mean() const { return count_ ? sum_ / static_cast<double>(count_) : 0; }
  double min() const { return count_ ? min_ : 0; }
  double max() const { return max_; }
  // The smallest value that at least the share q of all values does not exceed; q in [0, 1], else the nearer end.
  // 0 when empty.
  double Quantile(double q) const;

 private:
  static constexpr int kBins = 1200;  // 2 % apart, from 1 down to 1e-10; the last bin holds what is smaller
  static int Bin(double value);
  std::array<int64_t, kBins> bins_{};
  int64_t count_ = 0;
  double sum_ = 0, min_ = 1, max_ = 0;
};

// Seconds of a step by part, audits excluded.
struct StepTimes {
  double append = 0, gate = 0, score = 0, choose = 0, plan = 0, fetch = 0, attend = 0, slow_clock = 0, prefill = 0;
  double audit = 0;  // not part of any other figure
  double Total() const { return append + gate + score + choose + plan + fetch + attend + slow_clock; }
};

struct SequenceReport {
  int64_t prompt_tokens = 0;     // given to Prefill
  int64_t restored_tokens = 0;   // of them, restored from a tier instead
  int64_t decode_steps = 0;
  // (layer, KV head, step) triples.
  int64_t triples = 0;           // of sparse decode steps (u >= 1, n > C): the denominator of rho
  int64_t dense_triples = 0;     // attended to everything visible
  int64_t retrievals = 0;        // triples that ran a selection
  int64_t inherited = 0;         // triples that kept an earlier one
  int64_t borrowed = 0;          // triples that took what another head or layer had selected (hshare)
  int64_t first_selections = 0;  // at u = 0, reported apart
  int64_t widened_dense = 0;     // heads that attended densely because no smaller set met max_dropped_mass
  double rho() const { return triples ? static_cast<double>(retrievals) / static_cast<double>(triples) : 0; }
  // Positions, summed over the triples (sparse ones only; dense ones would hide them).
  int64_t attended = 0;
  double mean_attended() const { return triples ? static_cast<double>(attended) / static_cast<double>(triples) : 0; }
  // Bytes over all decode steps. Scored: read in order to choose, with the gate's own. Fetched: K and V attended or moved.
  int64_t bytes_gate = 0, bytes_codes = 0, bytes_exact_keys = 0;
  int64_t bytes_scored() const { return bytes_gate + bytes_codes + bytes_exact_keys; }
  int64_t bytes_attended = 0;       // rows read by attention, wherever they were
  int64_t bytes_from_host = 0;      // rows that crossed from host to device, in a step or behind it, decode only
  int64_t bytes_from_disk = 0;      // blocks read from the store during decode
  // Rows attended in decode by where they were found.
  int64_t rows_device = 0, rows_host = 0, rows_disk = 0;
  int64_t rows_in_step = 0;         // gathered within a step
  int64_t triples_in_step = 0;      // heads that gathered within a step
  int64_t rows_behind = 0;          // moved by the slow clock
  int64_t failed_fetches = 0;       // copies behind the steps that brought nothing; their rows are fetched when chosen
  int64_t refreshes = 0;            // slow-clock turns of a (layer, KV head)
  // Dropped mass per (layer, query head, step).
  UnitSketch dropped_estimated;     // from the last scan and this step's log-sum-exp
  UnitSketch dropped_bound;         // proven, where the index gives bounds
  UnitSketch dropped_bound_statistical;  // in its place with bound = statistical: at its confidence
  UnitSketch dropped_audited;       // exact, on audited steps
  UnitSketch estimate_error;        // |estimate - exact| on audited steps
  UnitSketch output_error;          // |o_S - o| / |o| on audited steps, capped at 1
  double estimate_age_mean = 0;     // steps since the scan that an estimate rests on, over dropped_estimated
  int64_t bound_violations = 0;     // a proven bound below the audited truth: a bug
  // Statistical bounds compared with the audited truth, and those below it: a share of at most 1 - bound.confidence is due.
  int64_t statistical_checked = 0, statistical_violations = 0;
  int64_t audited_steps = 0;
  // Prefill.
  int64_t prefill_bytes_from_disk = 0;
  int64_t prefill_frozen_rows = 0;  // ETF: (layer, token) pairs that skipped attention
  int64_t prefill_cut_keys = 0;     // PSAW: (layer, query, key) triples out of the window
  // Integrity.
  int64_t corrupt_chunks = 0, missing_chunks = 0, recomputed_chunks = 0;
  StepTimes times;

  // As if both had been one sequence: counts add up, means weigh by what they are means of.
  void Merge(const SequenceReport& other);
  // sequence.{every field above by its name; rho, mean_attended, bytes_scored}, sequence.<sketch>.{count,mean,p50,p99,
  // min,max} and sequence.seconds.{every field of StepTimes, total}.
  void VisitCounters(const CounterVisitor& visit) const;
};

}  // namespace prehoc
