// The inner loops of the vector backends: what is compiled once per instruction set. Everything around them (checks,
// splitting over threads, merging, control flow of choose) is plain code that both backends share.
//
// This header is seen by files built with -mavx2 or -mavx512*. It holds plain structs only, because an inline function
// that such a file emits may be the copy that the linker keeps for the whole program, also for CPUs without AVX.
// Loops have no alignment needs; head_dim is a multiple of 16, at most 256.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/code_block.h"  // for constants only
#include "kernels/function_table.h"

namespace prehoc {

// A place in a list of runs.
struct RowPlace {
  const RowRun* run = nullptr;
  int32_t skip = 0;  // rows of *run before the place
};

// Attention of `group` queries over `count` rows: an unnormalised part, to be merged.
struct AttendPart {
  const float* q = nullptr;  // [group, head_dim], times log2(e) / sqrt(head_dim)
  RowPlace from;
  int64_t count = 0;
  float* acc = nullptr;      // [group, head_dim] SUM 2^(z - top) v
  float* top = nullptr;      // [group] the largest z (base 2), finite; very low without rows
  float* sum = nullptr;      // [group] SUM 2^(z - top)
};

// Exact logits of `count` rows.
struct ScorePart {
  const float* q = nullptr;  // [group, head_dim], times 1 / sqrt(head_dim)
  RowPlace from;
  int64_t count = 0;
  float* z = nullptr;        // [group] rows, `z_stride` floats apart
  int64_t z_stride = 0;
};

inline constexpr int kPrefillKeys = 48;   // keys of a block: K, V and weights of a block stay in the first-level cache
inline constexpr int kPrefillPanel = 48;  // query vectors that are worked on together

// Working room of a prefill tile, in floats from its begin.
struct PrefillRoom {
  int32_t panels = 0;  // of kPrefillPanel vectors, the last one padded
  size_t k = 0;        // [kPrefillKeys, head_dim]
  size_t v = 0;        // [kPrefillKeys, head_dim]
  size_t weights = 0;  // [kPrefillKeys, kPrefillPanel]
  size_t q = 0;        // [panels, head_dim, kPrefillPanel], scaled
  size_t acc = 0;      // [panels, kPrefillPanel, head_dim]
  size_t state = 0;    // [panels, 5, kPrefillPanel]: top, sum, keep; int32: last visible position, start
  size_t floats = 0;   // in all
};

// Causal attention of a tile of query vectors: vector r is head r % group of query r / group of the tile.
struct PrefillTile {
  const RowRun* runs = nullptr;    // positions 0, 1, ...
  const float* q = nullptr;        // of the first query; queries are q_stride floats apart
  int64_t q_stride = 0;
  float scale = 0;                 // log2(e) / sqrt(head_dim)
  float* out = nullptr;
  int64_t out_stride = 0;
  const int32_t* start = nullptr;  // [queries] of the tile, or null for 0
  int32_t queries = 0;
  int32_t first = 0;               // position of the first query of the tile
  int32_t sinks = 0;
  int32_t group = 0, head_dim = 0;
  PrefillRoom room;
  float* scratch = nullptr;        // [room.floats]
};

// Logits of `groups` code blocks.
struct ScanPart {
  const float* q = nullptr;           // [group, head_dim], times 1 / sqrt(head_dim)
  const float* q_norm = nullptr;      // [group] |q|, rounded up; read only with err and error norms
  const std::byte* blocks = nullptr;
  int32_t groups = 0;
  float* z = nullptr;
  float* err = nullptr;
  int64_t z_stride = 0;
  const uint64_t* seeds = nullptr;    // [groups] of the blocks; read only if dithered
  float* variance = nullptr;          // [group] rows, or null; not without err
  float* bias = nullptr;              // as variance, or null
  int64_t variance_stride = 0;
};
struct ScanShape {
  int32_t bits = 0, group_tokens = 0, group = 0, head_dim = 0;
  bool error_norms = false, dither = false;
  size_t step = 0, norm = 0, pages = 0, page_bytes = 0, block_bytes = 0;  // CodeBlockLayout
};

// Scores of the middle, as keys whose signed order is the order of the scores.
struct ScoreKeysPart {
  const float* z = nullptr;           // [group] rows, from the first position of the part on
  int64_t z_stride = 0;
  int32_t count = 0;
  const float* lse = nullptr;         // [group]
  int32_t group = 0;
  GroupRule rule = GroupRule::kMaxWeight;
  const uint64_t* resident = nullptr; // a bit per position, or null
  int64_t first_bit = 0;              // of the first position of the part
  float log_theta = 0;
  float* pooled = nullptr;            // of the part, or null
  bool pool_reset = false;
  int32_t* keys = nullptr;            // [count rounded up to 16]; kNoCandidate where excluded and past the end
};
inline constexpr int32_t kNoCandidate = INT32_MIN;

struct VectorOps {
  // rows.inc
  void (*append)(const AppendTask& task, RowFormat format, int32_t head_dim);
  void (*copy_rows)(const RowCopy* rows, int64_t count, RowFormat format, int32_t head_dim);  // format of what is copied
  // encode.inc
  void (*encode)(const EncodeTask& task, const ScanShape& shape);
  // gate.inc: the smallest cosine; -2 if a norm is zero or not finite
  float (*min_cosine)(const float* q, const float* anchor, int32_t group, int32_t head_dim);
  // scan.inc
  void (*scan)(const ScanPart& part, const ScanShape& shape);
  // attend.inc
  void (*score)(const ScorePart& part, int32_t group, int32_t head_dim);
  void (*attend)(const AttendPart& part, int32_t group, int32_t head_dim);
  // prefill.inc
  void (*prefill)(const PrefillTile& tile);
  // score_pages.inc: q times 1 / sqrt(head_dim)
  void (*score_pages)(const float* q, const Half* lo, const Half* hi, int32_t pages, float* z, int64_t z_stride,
                      int32_t group, int32_t head_dim);
  // choose.inc
  float (*max_of)(const float* x, const float* plus, int64_t n);  // of x (+ plus, if given); -inf for n = 0
  // e[i] = exp(x[i] + sign * plus[i] - top); returns the sum. `e` may be null.
  double (*exp_sum)(const float* x, const float* plus, float sign, float top, int64_t n, float* e);
  double (*sum_of)(const float* x, int64_t n);
  void (*score_keys)(const ScoreKeysPart& part);
  void (*float_keys)(const float* score, int32_t count, int32_t* keys);  // keys as ScoreKeysPart
  int64_t (*count_at_least)(const int32_t* keys, int64_t n, int32_t key);  // n a multiple of 16
  // The keys >= `key` and their indices plus `base`, in order; room for 16 more in both. n a multiple of 16.
  int64_t (*keep_at_least)(const int32_t* keys, int64_t n, int32_t key, int32_t base, int32_t* kept, int32_t* where);
};

extern const VectorOps kAvx2Ops;
extern const VectorOps kAvx512Ops;

}  // namespace prehoc
