// What the runs of one `prehoc answer` measured: filled by the runs, shown by table.h and json.h.
#pragma once
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "base/geometry.h"
#include "cache/kv_cache.h"
#include "cache/report.h"
#include "integrations/cli/compare.h"
#include "integrations/cli/generate.h"

namespace prehoc::cli {

// One sequence through one cache.
struct RunFigures {
  std::string selector;
  std::vector<std::string> knobs;  // "name=value"
  std::string codes, kernels, prompt_precision;
  uint64_t device_budget = 0, host_budget = 0, store_budget = 0;  // [bytes]; no store: 0
  double open_seconds = 0;         // opening the sequence, restoring its prefix included
  Generated generated;
  SequenceReport report;
  Sequence::Residency residency;   // at the end
  std::map<std::string, double> counters;  // of cache, tiers and engine, by their own names

  double first_token_seconds() const;  // 0 if there was none
  double prefill_rate() const;     // computed tokens/s; 0 if none
  double decode_rate() const;      // tokens/s, audits not counted
  double per_step(int64_t total) const;  // of a decode step; 0 without any
  std::optional<double> counter(const std::string& name) const;
};

struct AnswerFigures {
  std::string model_name, model_path, lora, architecture, fingerprint;
  KvGeometry geometry;
  size_t weight_bytes = 0;
  double load_seconds = 0;
  std::string document_path;
  int64_t document_tokens = 0, context = 0, prompt_tokens = 0;
  std::string question, answer, store;
  std::string calibration;          // what was promised, or why it does not cover this prompt; empty = nothing
  std::string cpu;
  int threads = 0;
  int64_t peak_resident_bytes = 0;  // of the process, before a comparison
  RunFigures selected;
  std::optional<RunFigures> dense;
  std::optional<Agreement> agreement;
  std::string dense_answer;         // with `agreement`
};

}  // namespace prehoc::cli
