// The step kernels in loops over the table's: what step_kernels.h says, entry by entry, task after task.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "kernels/code_block.h"
#include "kernels/reference/half_rows.h"
#include "kernels/step_kernels.h"

namespace prehoc::step {
namespace {
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr int32_t kNowhere = std::numeric_limits<int32_t>::max();  // as a ref: a row that no array has

// The first thing that is wrong with a call.
class Check {
 public:
  Check(const char* kernel, const void* tasks, int32_t num_tasks) : kernel_(kernel) {
    That(num_tasks >= 0, "num_tasks", num_tasks, "use 0 or more");
    if (num_tasks > 0 && tasks == nullptr && status_.ok()) status_ = Status(StatusCode::kInvalid, std::string(kernel) + ": tasks is null");
  }
  Check& That(bool holds, const char* field, int64_t value, const char* wanted, StatusCode code = StatusCode::kInvalid) {
    if (!holds && status_.ok()) status_ = Status(code, std::string(kernel_) + ": " + field + "=" + std::to_string(value) + "; " + wanted);
    return *this;
  }
  Check& HeadDim(int32_t d) {
    return That(d >= 16 && d <= 256 && d % 16 == 0, "head_dim", d, "use a multiple of 16 from 16 to 256", StatusCode::kUnsupported);
  }
  Check& Group(int32_t group) {
    return That(group >= 1 && group <= 256, "group", group, "use 1 to 256 query heads per KV head", StatusCode::kUnsupported);
  }
  Check& Type(RowType type) {
    return That(type == RowType::kF16, "type", static_cast<int64_t>(type), "use kF16 here", StatusCode::kUnsupported);
  }
  Check& Rows(const char* field, RowFormat format) {
    return That(IsRowFormat(format), field, static_cast<int64_t>(format), "use 1 (f16), 2 (int8) or 3 (e4m3)");
  }
  Check& Format(const CodeFormat& format) {
    That(!format.dither, "dither", format.dither, "use codes without dither", StatusCode::kUnsupported);
    That(IsCodeFormat({.bits = format.bits, .group_tokens = 64}, 64), "bits", format.bits, "use 2, 3, 4, 5 or 8", StatusCode::kUnsupported);
    return That(IsCodeFormat(format, 64), "group_tokens", format.group_tokens, "use 16 or 64", StatusCode::kUnsupported);
  }
  Check& Rule(GroupRule rule) { return That(rule <= GroupRule::kMaxLogit, "rule", static_cast<int64_t>(rule), "use 0, 1 or 2"); }
  Check& MaxN(int32_t max_n) { return That(max_n >= 0, "max_n", max_n, "use 0 or more"); }
  Status Take() { return std::move(status_); }

 private:
  const char* kernel_;
  Status status_;
};

bool Holds(const uint8_t* hold) { return hold != nullptr && *hold != 0; }

// -1: its chunk is not there.
int64_t HostRowOf(const HostRows& host, int64_t p) {
  int64_t row = host.head_row + p;
  if (host.chunk_row != nullptr) {
    if (host.chunk_tokens <= 0 || p / host.chunk_tokens >= host.num_chunks) return -1;
    const int64_t chunk = host.chunk_row[p / host.chunk_tokens];
    if (chunk < 0) return -1;
    row = chunk + host.head_row + p % host.chunk_tokens;
  }
  return row >= 0 && row < kNowhere ? row : -1;
}

// --- gate --------------------------------------------------------------------------------------------------------------------------
Status Gate(const GateParams& params, void*) {
  PREHOC_RETURN_IF_ERROR(Check("gate", params.tasks, params.num_tasks).HeadDim(params.head_dim).Group(params.group).Take());
  for (int32_t i = 0; i < params.num_tasks; ++i) {
    const GateTask& task = params.tasks[i];
    float cosine = 0;
    const prehoc::GateTask one[] = {{.q = task.q, .anchor = task.anchor, .cosine = &cosine}};
    PREHOC_RETURN_IF_ERROR(ReferenceKernels().gate({.tasks = one, .group = params.group, .head_dim = params.head_dim}, {}));
    if (task.cosine != nullptr) *task.cosine = cosine;
    const bool young = task.age == nullptr || *task.age < params.max_age;
    if (task.hold != nullptr) *task.hold = cosine > params.tau && young ? 1 : 0;
  }
  return {};
}

// --- append ------------------------------------------------------------------------------------------------------------------------
Status AppendOne(const AppendParams& params, const AppendTask& task) {
  const int64_t first = *task.first, d = params.head_dim, tokens = params.format.group_tokens, row = 2 * d;
  if (task.count <= 0 || task.count > params.max_count || first < 0 || task.ring_rows <= 0) return {};
  auto* const ring = static_cast<Half*>(task.rows);
  std::vector<Half> group_rows(static_cast<size_t>(tokens * row));
  for (int64_t p = first; p < first + task.count; ++p) {
    const int64_t from = (p - first) * task.stride;
    Half* const to = ring + p % task.ring_rows * row;
    const int64_t host_row = task.host_rows != nullptr ? HostRowOf(task.host, p) : -1;
    const bool on_host = host_row >= 0 && host_row < task.host_limit;
    std::byte* const stored = on_host ? static_cast<std::byte*>(task.host_rows) + static_cast<size_t>(host_row) * RowBytes(params.host_format, params.head_dim) : nullptr;
    const prehoc::AppendTask both[] = {{.k = task.k + from, .v = task.v + from, .stride = d, .rows = to, .count = 1, .widened = true},
                                       {.k = task.k + from, .v = task.v + from, .stride = d, .rows = stored, .count = on_host ? 1 : 0}};
    PREHOC_RETURN_IF_ERROR(ReferenceKernels().append({.tasks = both, .head_dim = params.head_dim, .format = params.host_format}, {}));
    if ((p + 1) % tokens != 0 || task.blocks == nullptr) continue;
    const int64_t group = p / tokens;
    for (int64_t t = 0; t < tokens; ++t) std::copy_n(ring + (group * tokens + t) % task.ring_rows * row, row, group_rows.data() + t * row);
    const bool bounds = task.page_lo != nullptr && task.page_hi != nullptr;
    const int64_t page = group * (tokens / kCodePageTokens) * d;
    const EncodeTask encode[] = {{.rows = group_rows.data(),
                                  .block = task.blocks + static_cast<int64_t>(LayoutOf(params.format, params.head_dim).bytes) * group,
                                  .page_lo = bounds ? task.page_lo + page : nullptr, .page_hi = bounds ? task.page_hi + page : nullptr}};
    PREHOC_RETURN_IF_ERROR(ReferenceKernels().encode({.tasks = encode, .format = params.format, .head_dim = params.head_dim}, {}));
  }
  return {};
}

Status Append(const AppendParams& params, void*) {
  PREHOC_RETURN_IF_ERROR(Check("append", params.tasks, params.num_tasks).HeadDim(params.head_dim).Type(params.type).Format(params.format)
                             .Rows("host_format", params.host_format)
                             .That(params.max_count >= 0, "max_count", params.max_count, "use 0 or more").Take());
  for (int32_t i = 0; i < params.num_tasks; ++i) PREHOC_RETURN_IF_ERROR(AppendOne(params, params.tasks[i]));
  return params.gate.num_tasks != 0 ? Gate(params.gate, nullptr) : Status();
}

// --- resolve -----------------------------------------------------------------------------------------------------------------------
int16_t SlotOf(const ResidencyState& at, int64_t p) { return at.slot_of != nullptr ? at.slot_of[p] : -1; }
void SetResident(const ResidencyState& at, int64_t p, bool resident) {
  if (at.resident == nullptr || p < 0 || p >= at.max_n) return;
  const uint64_t bit = uint64_t{1} << (p % 64);
  at.resident[p / 64] = resident ? at.resident[p / 64] | bit : at.resident[p / 64] & ~bit;
}

// Position p has no slot from now on; `n` as in RefreshTask.
void LoseSlot(const ResidencyState& at, int32_t p, const int32_t* n, int32_t ring_rows) {
  at.slot_of[p] = -1;
  const bool in_ring = n != nullptr && p <= *n && p > int64_t{*n} - ring_rows;  // of the next position
  if (!in_ring) SetResident(at, p, false);
}

// The slot for position p; -1: none is spare.
int16_t TakeSpare(const SpareSlots& spare, int32_t p) {
  const int32_t taken = spare.state->taken++;
  if (taken >= spare.state->free) return -1;
  spare.position[taken] = p;
  return spare.slot[taken];
}

Status Resolve(const ResolveParams& params, void*) {
  PREHOC_RETURN_IF_ERROR(Check("resolve", params.tasks, params.num_tasks).HeadDim(params.head_dim).Group(params.group).Take());
  for (int32_t t = 0; t < params.num_tasks; ++t) {
    const ResolveTask& task = params.tasks[t];
    const int32_t n = *task.n, count = *task.count;
    const int64_t leaves = int64_t{n} - task.ring_rows;  // the ring's oldest position
    const bool known = count >= 0 && count <= task.room;
    if (task.num_refs != nullptr) *task.num_refs = known ? count : -1;
    int32_t misses = 0, far = 0;
    for (int32_t i = 0; known && task.refs != nullptr && i < count; ++i) {
      const int32_t p = task.chosen[i];
      int32_t ref = kNowhere;
      if (p >= 0 && p < n && p < task.at.max_n) {
        if (p >= leaves) {
          ref = task.ring_row + p % task.ring_rows;
        } else if (SlotOf(task.at, p) >= 0) {
          ref = task.slot_row + task.at.slot_of[p];
          if (task.at.spare.state != nullptr) task.at.spare.used[task.at.slot_of[p]] = 1;
        } else if (const int64_t row = HostRowOf(task.host, p); row >= 0) {
          ref = ~static_cast<int32_t>(row);
          ++misses;
          if (task.keep != nullptr) task.keep[i] = TakeSpare(task.at.spare, p);
        } else {
          ++far;
        }
      }
      task.refs[i] = ref;
    }
    if (task.misses != nullptr) *task.misses += misses;
    if (task.far != nullptr) *task.far += far;
    const bool anew = !Holds(task.hold);
    if (anew && task.q != nullptr) std::copy_n(task.q, int64_t{params.group} * params.head_dim, task.anchor);
    if (task.age != nullptr) *task.age = anew ? 0 : *task.age + 1;
    if (task.ring_rows <= 0) continue;
    SetResident(task.at, int64_t{n} - 1, true);
    SetResident(task.at, leaves, leaves >= 0 && leaves < task.at.max_n && SlotOf(task.at, leaves) >= 0);
  }
  return {};
}

// --- choose, select ----------------------------------------------------------------------------------------------------------------
struct ChoiceShape {
  int32_t max_n, group;
  GroupRule rule;
  bool dilate;
};

void Refuse(const ChooseRule& rule, int32_t group) {
  *rule.count = -1;
  for (int32_t h = 0; h < group; ++h) {
    rule.lse_all[h] = kNan;
    if (rule.lse_out != nullptr) rule.lse_out[h] = kNan;
  }
}

// Pooled scores above a level: of all heads' logits whatever the rule, and NaN is no candidate for the maximum.
void Pool(const ChooseRule& rule, const float* z, int64_t z_stride, const std::vector<float>& level, int32_t lo, int32_t hi) {
  for (int64_t i = lo; i < hi; ++i) {
    float score = -kInfinity;
    for (size_t h = 0; h < level.size(); ++h) score = std::fmax(score, z[static_cast<int64_t>(h) * z_stride + i] - level[h]);
    rule.pooled[i] = rule.pool_reset != 0 ? score : std::fmax(rule.pooled[i], score);
  }
}

// Requires 0 <= n <= max_n.
Status ChooseFrom(const float* z, int64_t z_stride, int32_t n, const ChooseRule& rule, const ChoiceShape& shape) {
  const int32_t sinks = std::clamp(rule.sinks, 0, n);
  const int32_t hi = std::max(sinks, n - std::max(rule.local, 0));
  const int32_t lo = std::min(hi, std::max(sinks, n - std::max(rule.window, 0)));
  const int32_t k = std::clamp(rule.k, 0, hi - lo);
  if (rule.pooled != nullptr && rule.pool_level != nullptr) {  // before lse_all is written: it may be the level
    std::vector<float> level(rule.pool_level, rule.pool_level + shape.group);
    for (float& x : level) x = std::isfinite(x) ? x : 0;
    Pool(rule, z, z_stride, level, lo, hi);
  }
  std::vector<float> lse_out(static_cast<size_t>(shape.group));
  int32_t count = 0;
  prehoc::ChooseTask task{.z = z, .z_stride = z_stride, .n = n, .sinks = sinks, .lo = lo, .hi = hi, .k = k,
                          .dilate_m = shape.dilate ? std::clamp(rule.dilate_m, 0, k) : 0, .dilate_r = std::max(rule.dilate_r, 0),
                          .resident = rule.resident, .log_theta = std::isnan(rule.log_theta) ? kInfinity : rule.log_theta,
                          .rule = shape.rule, .pooled = rule.pool_level == nullptr ? rule.pooled : nullptr,
                          .pool_reset = rule.pool_reset != 0, .count = &count, .lse_all = rule.lse_all,
                          .lse_out = rule.lse_out != nullptr ? rule.lse_out : lse_out.data()};
  std::vector<int32_t> chosen(static_cast<size_t>(task.max_chosen()));
  task.chosen = chosen.data();
  const prehoc::ChooseTask one[] = {task};
  PREHOC_RETURN_IF_ERROR(ReferenceKernels().choose({.tasks = one, .group = shape.group}, {}));
  *rule.count = count <= rule.room ? count : -1;
  if (count <= rule.room) std::copy_n(chosen.begin(), count, rule.chosen);
  return {};
}

Status Choose(const ChooseParams& params, void*) {
  PREHOC_RETURN_IF_ERROR(Check("choose", params.tasks, params.num_tasks).MaxN(params.max_n).Group(params.group).Rule(params.rule).Take());
  const ChoiceShape shape{params.max_n, params.group, params.rule, params.dilate};
  for (int32_t i = 0; i < params.num_tasks; ++i) {
    const ChooseTask& task = params.tasks[i];
    const int32_t n = *task.n;
    if (Holds(task.rule.hold)) continue;
    if (n < 0 || n > params.max_n) {
      Refuse(task.rule, params.group);
    } else {
      PREHOC_RETURN_IF_ERROR(ChooseFrom(task.z, task.z_stride, n, task.rule, shape));
    }
  }
  return {};
}

// Logits [group, n]: of codes, and of the rows behind the last whole group.
Result<std::vector<float>> Logits(const SelectParams& params, const ScanSource& source, int32_t n) {
  const int32_t groups = n / params.format.group_tokens, coded = groups * params.format.group_tokens;
  std::vector<float> z(static_cast<size_t>(params.group) * static_cast<size_t>(n));
  const prehoc::ScanTask scan[] = {{.q = source.q, .blocks = source.blocks, .groups = groups, .z = z.data(), .z_stride = n}};
  PREHOC_RETURN_IF_ERROR(
      ReferenceKernels().scan({.tasks = scan, .format = params.format, .group = params.group, .head_dim = params.head_dim}, {}));
  std::vector<RowRun> runs;
  for (int32_t p = coded; p < n; ++p) {
    runs.push_back({static_cast<const Half*>(source.rows) + int64_t{p % std::max(source.ring_rows, 1)} * 2 * params.head_dim, 1});
  }
  const ScoreTask score[] = {{.q = source.q, .runs = runs, .z = z.data() + coded, .z_stride = n}};
  if (!runs.empty()) PREHOC_RETURN_IF_ERROR(ReferenceKernels().score({.tasks = score, .group = params.group, .head_dim = params.head_dim}, {}));
  return z;
}

Status CheckSelect(const SelectParams& params) {
  return Check("select", params.tasks, params.num_tasks).MaxN(params.max_n).HeadDim(params.head_dim).Group(params.group).Type(params.type)
      .Format(params.format).Rule(params.rule)
      .That(params.by <= SelectBy::kBars, "by", static_cast<int64_t>(params.by), "use kAny, kLogits or kBars")
      .That(params.gate.num_tasks == 0 || params.gate.num_tasks == params.num_tasks, "gate.num_tasks", params.gate.num_tasks, "use num_tasks, or 0").Take();
}

Status Select(const SelectParams& params, void*) {
  PREHOC_RETURN_IF_ERROR(CheckSelect(params));
  if (params.gate.num_tasks > 0) PREHOC_RETURN_IF_ERROR(Gate(params.gate, nullptr));
  const ChoiceShape shape{params.max_n, params.group, params.rule, params.dilate};
  for (int32_t i = 0; i < params.num_tasks; ++i) {
    const SelectTask& task = params.tasks[i];
    const int32_t n = *task.source.n;
    if (Holds(task.rule.hold)) continue;
    if (n < 0 || n > params.max_n) {
      Refuse(task.rule, params.group);
      continue;
    }
    PREHOC_ASSIGN_OR_RETURN(const std::vector<float> z, Logits(params, task.source, n));
    PREHOC_RETURN_IF_ERROR(ChooseFrom(z.data(), n, n, task.rule, shape));
  }
  if (params.resolves == nullptr) return {};
  return Resolve({.tasks = params.resolves, .num_tasks = params.num_tasks, .group = params.group, .head_dim = params.head_dim}, nullptr);
}

// --- attend ------------------------------------------------------------------------------------------------------------------------
// The rows that a task attends to; false if one of them does not exist.
bool RowsOf(const AttendTask& task, RowFormat host_format, int32_t d, std::vector<RowRun>* runs) {
  const int32_t n = std::max(0, *task.n), sinks = std::clamp(task.sinks, 0, n), local = std::clamp(task.local, 0, n - sinks);
  const int32_t num_refs = task.refs != nullptr ? *task.num_refs : 0;
  if (num_refs < 0 || num_refs > task.refs_room) return false;
  bool exist = true;
  const auto add = [&](const void* rows, int64_t row, int64_t limit, RowFormat format = RowFormat::kF16) {
    if (rows == nullptr || row < 0 || row >= limit) {
      exist = false;
    } else {
      runs->push_back({static_cast<const std::byte*>(rows) + static_cast<size_t>(row) * RowBytes(format, d), 1, format});
    }
  };
  for (int32_t p = 0; p < sinks; ++p) add(task.rows, int64_t{task.sink_row} + p, task.row_limit);
  for (int32_t i = 0; i < num_refs; ++i) {
    const int32_t ref = task.refs[i];
    if (ref >= 0) add(task.rows, ref, task.row_limit);
    else add(task.host_rows, ~ref, task.host_limit, host_format);
  }
  for (int32_t p = n - local; p < n; ++p) add(task.rows, int64_t{task.ring_row} + p % std::max(task.ring_rows, 1), task.row_limit);
  return exist;
}

// Rows of the host that were read stay in the slots that they are to be kept in.
void KeepRows(const AttendTask& task, RowFormat host_format, int32_t d) {
  const int32_t num_refs = task.refs != nullptr && task.keep != nullptr ? *task.num_refs : 0;
  for (int32_t i = 0; i < num_refs && num_refs <= task.refs_room; ++i) {
    const int64_t row = ~int64_t{task.refs[i]}, slot = task.keep[i];
    if (row < 0 || row >= task.host_limit || slot < 0 || slot >= task.slot_limit) continue;
    const std::byte* const from = static_cast<const std::byte*>(task.host_rows) + static_cast<size_t>(row) * RowBytes(host_format, d);
    Half* const to = static_cast<Half*>(task.slots) + slot * 2 * d;
    if (host_format == RowFormat::kF16) std::memcpy(to, from, RowBytes(host_format, d));
    else WidenRow(from, host_format, d, to);
  }
}

bool KeysAreFinite(const std::vector<RowRun>& runs, int32_t d) {
  const reference::HalfRows rows(runs, d);
  return std::ranges::all_of(rows.rows(), [&](const Half* key) {
    return std::all_of(key, key + d, [](Half k) { return std::isfinite(HalfToFloat(k)); });
  });
}

Status CheckAttend(const AttendParams& params) {
  return Check("attend", params.tasks, params.num_tasks).HeadDim(params.head_dim).Group(params.group).Type(params.type)
      .Rows("host_format", params.host_format).That(params.max_rows >= 0, "max_rows", params.max_rows, "use 0 or more").Take();
}

Status Attend(const AttendParams& params, void*) {
  PREHOC_RETURN_IF_ERROR(CheckAttend(params));
  const int64_t d = params.head_dim;
  for (int32_t i = 0; i < params.num_tasks; ++i) {
    const AttendTask& task = params.tasks[i];
    std::vector<RowRun> runs;
    std::vector<float> lse(static_cast<size_t>(params.group));
    float* const to = task.lse != nullptr ? task.lse : lse.data();
    KeepRows(task, params.host_format, params.head_dim);
    if (!RowsOf(task, params.host_format, params.head_dim, &runs) || !KeysAreFinite(runs, params.head_dim)) {
      std::fill_n(task.out, params.group * d, kNan);
      std::fill_n(to, params.group, kNan);
      continue;
    }
    const prehoc::AttendTask one[] = {{.q = task.q, .runs = runs, .out = task.out, .lse = to}};
    PREHOC_RETURN_IF_ERROR(ReferenceKernels().attend({.tasks = one, .group = params.group, .head_dim = params.head_dim}, {}));
  }
  return {};
}

// --- refresh, land -------------------------------------------------------------------------------------------------------------------
void RefreshOne(const RefreshTask& task) {
  const ResidencyState& at = task.at;
  const int32_t given = *task.wanted_count, count = given >= 0 && given <= at.slots ? given : 0;
  std::vector<bool> wanted(static_cast<size_t>(std::max(at.max_n, 0)));
  std::vector<int32_t> missing, spare;
  for (int32_t i = 0; i < count; ++i) {
    const int32_t p = task.wanted[i];
    if (p < 0 || p >= at.max_n || wanted[static_cast<size_t>(p)] || HostRowOf(task.host, p) < 0) continue;
    wanted[static_cast<size_t>(p)] = true;
    if (at.slot_of[p] < 0) missing.push_back(p);
  }
  for (int32_t slot = 0; slot < at.slots; ++slot) {
    if (at.owner[slot] == -1) spare.push_back(slot);
  }
  for (int32_t slot = 0; slot < at.slots; ++slot) {
    if (at.owner[slot] >= 0 && !wanted[static_cast<size_t>(at.owner[slot])]) spare.push_back(slot);
  }
  const size_t taken = std::min(missing.size(), spare.size());
  for (size_t i = 0; i < taken; ++i) {
    const int32_t slot = spare[i], old = at.owner[slot];
    if (old >= 0) LoseSlot(at, old, task.n, task.ring_rows);
    at.owner[slot] = -2;
    task.position[i] = missing[i];
    task.from_piece[i] = static_cast<int32_t>(HostRowOf(task.host, missing[i]));
    task.to_piece[i] = slot;
  }
  *task.count = static_cast<int32_t>(taken);
}

Status Refresh(const RefreshParams& params, void*) {
  PREHOC_RETURN_IF_ERROR(Check("refresh", params.tasks, params.num_tasks).MaxN(params.max_n).Take());
  for (int32_t i = 0; i < params.num_tasks; ++i) RefreshOne(params.tasks[i]);
  return {};
}

Status Land(const RefreshParams& params, void*) {
  PREHOC_RETURN_IF_ERROR(Check("land", params.tasks, params.num_tasks).MaxN(params.max_n).Take());
  for (int32_t t = 0; t < params.num_tasks; ++t) {
    const RefreshTask& task = params.tasks[t];
    for (int32_t i = 0; i < *task.count; ++i) {
      const int32_t p = task.position[i], slot = task.to_piece[i];
      task.at.owner[slot] = p;
      task.at.slot_of[p] = static_cast<int16_t>(slot);
      SetResident(task.at, p, true);
    }
    if (task.pooled != nullptr) std::fill_n(task.pooled, task.at.max_n, -kInfinity);
  }
  return {};
}

// --- adopt ------------------------------------------------------------------------------------------------------------------------
void AdoptOne(const AdoptTask& task) {
  const ResidencyState& at = task.at;
  const SpareSlots& spare = at.spare;
  if (spare.state == nullptr) return;
  SpareSlots::State& state = *spare.state;
  const int32_t kept = std::min(state.taken, state.free);
  for (int32_t i = 0; i < kept; ++i) {
    const int32_t p = spare.position[i], slot = spare.slot[i];
    at.owner[slot] = -1;
    if (at.slot_of[p] >= 0) continue;
    at.owner[slot] = p;
    at.slot_of[p] = static_cast<int16_t>(slot);
    SetResident(at, p, true);
  }
  std::copy(spare.slot + kept, spare.slot + state.free, spare.slot);
  state.free -= kept;
  state.taken = 0;
  for (int32_t looked = 0; looked < at.slots && state.free < spare.room; ++looked) {
    const int32_t slot = state.hand, owner = at.owner[slot];
    state.hand = (slot + 1) % at.slots;
    if (owner < -1) continue;
    if (owner >= 0) {
      if (std::exchange(spare.used[slot], uint8_t{0}) != 0) continue;
      LoseSlot(at, owner, task.n, task.ring_rows);
    }
    at.owner[slot] = -3;
    spare.slot[state.free++] = static_cast<int16_t>(slot);
  }
}

Status Adopt(const AdoptParams& params, void*) {
  PREHOC_RETURN_IF_ERROR(Check("adopt", params.tasks, params.num_tasks).Take());
  for (int32_t i = 0; i < params.num_tasks; ++i) AdoptOne(params.tasks[i]);
  return {};
}

// --- gather ------------------------------------------------------------------------------------------------------------------------
Status Gather(const GatherParams& params, void*) {
  PREHOC_RETURN_IF_ERROR(
      Check("gather", params.tasks, params.num_tasks)
          .That(params.piece_bytes > 0 && params.piece_bytes % 16 == 0, "piece_bytes", params.piece_bytes, "use a multiple of 16")
          .That(params.max_blocks > 0, "max_blocks", params.max_blocks, "use 1 or more").Rows("rows", params.rows).Take());
  const bool widens = params.rows != RowFormat::kF16;
  if (widens) {
    PREHOC_RETURN_IF_ERROR(Check("gather", params.tasks, params.num_tasks).HeadDim(params.head_dim)
                               .That(params.piece_bytes == static_cast<int64_t>(RowBytes(params.rows, params.head_dim)), "piece_bytes",
                                     params.piece_bytes, "use the bytes of a row").Take());
  }
  const auto to_bytes = widens ? static_cast<int64_t>(RowBytes(RowFormat::kF16, params.head_dim)) : params.piece_bytes;
  for (int32_t t = 0; t < params.num_tasks; ++t) {
    const GatherTask& task = params.tasks[t];
    for (int32_t i = 0; i < *task.count; ++i) {
      const int64_t from = task.from_piece[i], to = task.to_piece[i];
      if (from >= 0 && from < task.from_limit && to >= 0 && to < task.to_limit) {
        const std::byte* const piece = task.from + from * params.piece_bytes;
        std::byte* const slot = task.to + to * to_bytes;
        if (widens) WidenRow(piece, params.rows, params.head_dim, reinterpret_cast<Half*>(slot));
        else std::memcpy(slot, piece, static_cast<size_t>(to_bytes));
      } else if (task.refused != nullptr) {
        ++*task.refused;
      }
    }
  }
  return {};
}

// Tasks need not be there yet.
Result<size_t> SelectWorkspace(const SelectParams& params) {
  SelectParams shape = params;
  shape.gate = {};
  shape.num_tasks = 0;
  PREHOC_RETURN_IF_ERROR(CheckSelect(shape));
  return size_t{0};
}
Result<size_t> ChooseWorkspace(const ChooseParams&) { return size_t{0}; }
Result<size_t> AttendWorkspace(const AttendParams& params) {
  AttendParams shape = params;
  shape.num_tasks = 0;
  PREHOC_RETURN_IF_ERROR(CheckAttend(shape));
  return size_t{0};
}
}  // namespace

const StepKernels& ReferenceStepKernels() {
  static constexpr StepKernels kTable{.name = "reference", .append = Append, .gate = Gate, .select = Select, .resolve = Resolve,
                                      .attend = Attend, .choose = Choose, .refresh = Refresh, .land = Land, .adopt = Adopt, .gather = Gather,
                                      .select_workspace = SelectWorkspace, .choose_workspace = ChooseWorkspace,
                                      .attend_workspace = AttendWorkspace};
  return kTable;
}

}  // namespace prehoc::step
