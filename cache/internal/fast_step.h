// The working memory of one step in one layer; kept from step to step for its allocations.
#pragma once
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "cache/internal/layer_blocks.h"
#include "cache/internal/sequence_impl.h"
#include "cache/kv_cache.h"
#include "selector/certificate.h"

namespace prehoc {

// What one unit does at this step.
// kBorrow: the choice that another head or layer makes at this step.
enum class Way : uint8_t { kInherit, kSelect, kSelectOnce, kEverything, kBorrow };

struct UnitStep {
  Way way = Way::kInherit;
  bool attended = false;       // its output is written
  bool met = true;             // target_drop was reached
  std::vector<int32_t> chosen; // fresh middle positions
  int32_t chosen_count = 0;
  uint8_t met_byte = 1;
  std::vector<float> lse_all, lse_out, lse_out_bound, lse;  // [heads]; lse: of what was attended
  std::vector<RowRun> runs;
  int64_t missed = 0;          // middle positions that were fetched in the step
};

struct FastStep {
  // Prepares for a layer; the lists keep their memory.
  void Reset(int32_t of_layer, const std::vector<Unit>& of_units, size_t kv_heads);

  int32_t layer = 0;
  int64_t u = 0;
  int32_t n = 0;
  StepRule rule;
  LayerInput in;
  std::optional<LayerBlocks> blocks;
  std::vector<UnitStep> units;
  // Rows that found no slot: read where they lie in host memory. Sorted by position, per KV head.
  std::vector<std::vector<std::pair<int32_t, const std::byte*>>> direct;

  // Task lists.
  std::vector<AppendTask> append;
  std::vector<GateTask> gate;
  std::vector<float> cosines, spreads;
  std::vector<ScanTask> scan;
  std::vector<float> variance, bias, proven;  // [units, group, groups] of dithered codes; proven: the largest proven error
  std::vector<DitheredBlock> blocks_outside;  // of one head
  std::vector<uint8_t> outside;               // of one head, per position
  std::vector<ScoreTask> score;
  std::vector<std::vector<RowRun>> score_runs;
  std::vector<ScorePagesTask> pages;
  std::vector<float> page_scores;
  std::vector<ChooseTask> choose;
  std::vector<size_t> choosing;  // unit of each task
  std::vector<RowCopy> copies;
  std::vector<AttendTask> attend;
  std::vector<int32_t> missing;

  // Of the slow clock.
  std::vector<int32_t> due_heads, found;
  std::vector<TopKTask> top_k;
  std::vector<WantedRows> wanted;
  Arrivals arrivals;
};

}  // namespace prehoc
