#include "kernels/validate.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "kernels/code_block.h"

namespace prehoc {
namespace {

// The first thing that is wrong with a call; checks after it are skipped.
class Check {
 public:
  explicit Check(const char* kernel) : kernel_(kernel) {}

  Check& Task(size_t index) {
    task_ = static_cast<int64_t>(index);
    return *this;
  }
  // `wanted` completes the sentence "field=value; ...".
  Check& That(bool holds, const char* field, int64_t value, const char* wanted) {
    if (!holds && status_.ok()) Fail(StatusCode::kInvalid, std::string(field) + "=" + std::to_string(value) + "; " + wanted);
    return *this;
  }
  Check& AtLeast(const char* field, int64_t value, int64_t least, const char* what) {
    if (value < least && status_.ok()) {
      Fail(StatusCode::kInvalid, std::string(field) + "=" + std::to_string(value) + " is below " + what + " = " +
                                     std::to_string(least));
    }
    return *this;
  }
  Check& Given(bool needed, const void* pointer, const char* field) {
    if (needed && pointer == nullptr && status_.ok()) {
      Fail(StatusCode::kInvalid, std::string(field) + " is null; the task needs it");
    }
    return *this;
  }
  Check& NotNan(float value, const char* field) {
    if (std::isnan(value) && status_.ok()) Fail(StatusCode::kInvalid, std::string(field) + " is NaN; give a number");
    return *this;
  }
  Check& HeadDim(int32_t head_dim) {
    if (status_.ok() && (head_dim < 16 || head_dim > 256 || head_dim % 16 != 0)) {
      Fail(StatusCode::kUnsupported, "head_dim=" + std::to_string(head_dim) + "; use a multiple of 16 from 16 to 256");
    }
    return *this;
  }
  Check& Group(int32_t group) {
    if (status_.ok() && (group < 1 || group > 256)) {
      Fail(StatusCode::kUnsupported, "group=" + std::to_string(group) + "; use 1 to 256 query heads per KV head");
    }
    return *this;
  }
  Check& Format(const CodeFormat& format) {
    if (status_.ok() && !IsCodeFormat(format, 16)) {
      Fail(StatusCode::kUnsupported, "format is bits=" + std::to_string(format.bits) + ", group_tokens=" +
                                         std::to_string(format.group_tokens) +
                                         "; use bits 2, 3, 4, 5 or 8 and group_tokens 16 or 64");
    }
    return *this;
  }
  Check& Rows(const char* field, RowFormat format) {
    return That(IsRowFormat(format), field, static_cast<int64_t>(format), "use 1 (f16), 2 (int8) or 3 (e4m3)");
  }
  Check& Runs(std::span<const RowRun> runs) {
    for (size_t i = 0; i < runs.size() && status_.ok(); ++i) {
      // A step has thousands of runs: no strings for those that are right.
      if (IsRowFormat(runs[i].format) && (runs[i].count == 0 || (runs[i].count > 0 && runs[i].rows != nullptr))) continue;
      const std::string run = "runs[" + std::to_string(i) + "].";
      Rows((run + "format").c_str(), runs[i].format);
      That(runs[i].count >= 0, (run + "count").c_str(), runs[i].count, "use 0 or more");
      Given(runs[i].count > 0, runs[i].rows, (run + "rows").c_str());
    }
    return *this;
  }
  // Rows of an output [rows, width], `stride` floats apart.
  Check& Stride(const char* field, int64_t stride, int64_t rows, int64_t width, const char* what) {
    return rows > 1 ? AtLeast(field, stride, width, what) : *this;
  }
  bool ok() const { return status_.ok(); }
  Status Take() { return std::move(status_); }

 private:
  void Fail(StatusCode code, std::string what) {
    std::string where = kernel_;
    if (task_ >= 0) where += ": task " + std::to_string(task_);
    status_ = Status(code, where + ": " + what);
  }

  const char* kernel_;
  int64_t task_ = -1;
  Status status_;
};
}  // namespace

int64_t RowCount(std::span<const RowRun> runs) {
  int64_t rows = 0;
  for (const RowRun& run : runs) rows += run.count;
  return rows;
}

Status Validate(const AppendParams& params) {
  Check check("append");
  check.HeadDim(params.head_dim).Rows("format", params.format);
  for (size_t i = 0; i < params.tasks.size() && check.ok(); ++i) {
    const AppendTask& task = params.tasks[i];
    const bool any = task.count > 0;
    check.Task(i).That(task.count >= 0, "count", task.count, "use 0 or more");
    check.Given(any, task.k, "k").Given(any, task.v, "v").Given(any, task.rows, "rows");
    check.Stride("stride", task.stride, task.count, params.head_dim, "head_dim");
  }
  return check.Take();
}

Status Validate(const EncodeParams& params) {
  Check check("encode");
  check.HeadDim(params.head_dim).Format(params.format).Rows("rows", params.rows);
  for (size_t i = 0; i < params.tasks.size() && check.ok(); ++i) {
    const EncodeTask& task = params.tasks[i];
    check.Task(i).Given(true, task.rows, "rows").Given(true, task.block, "block");
    check.Given(task.page_hi != nullptr, task.page_lo, "page_lo").Given(task.page_lo != nullptr, task.page_hi, "page_hi");
  }
  return check.Take();
}

Status Validate(const GateParams& params) {
  Check check("gate");
  check.HeadDim(params.head_dim).Group(params.group);
  for (size_t i = 0; i < params.tasks.size() && check.ok(); ++i) {
    const GateTask& task = params.tasks[i];
    check.Task(i).Given(true, task.q, "q").Given(true, task.anchor, "anchor").Given(task.spread == nullptr, task.cosine, "cosine");
    check.Given(task.spread != nullptr, task.variance, "variance");
  }
  return check.Take();
}

Status Validate(const ScanParams& params) {
  Check check("scan");
  check.HeadDim(params.head_dim).Group(params.group).Format(params.format);
  for (size_t i = 0; i < params.tasks.size() && check.ok(); ++i) {
    const ScanTask& task = params.tasks[i];
    const bool any = task.groups > 0;
    check.Task(i).That(task.groups >= 0, "groups", task.groups, "use 0 or more");
    check.Given(any, task.q, "q").Given(any, task.blocks, "blocks").Given(any, task.z, "z");
    check.Given(any && task.variance != nullptr, task.err, "err");
    check.Given(any && task.bias != nullptr, task.variance, "variance");
    check.That(task.variance == nullptr || params.format.dither, "format.dither", 0, "variance is of dithered codes");
    const int64_t tokens = int64_t{task.groups} * params.format.group_tokens;
    check.Stride("z_stride", task.z_stride, params.group, tokens, "groups * group_tokens");
  }
  return check.Take();
}

Status Validate(const ScoreParams& params) {
  Check check("score");
  check.HeadDim(params.head_dim).Group(params.group);
  for (size_t i = 0; i < params.tasks.size() && check.ok(); ++i) {
    const ScoreTask& task = params.tasks[i];
    check.Task(i).Runs(task.runs);
    const int64_t rows = RowCount(task.runs);
    check.Given(rows > 0, task.q, "q").Given(rows > 0, task.z, "z");
    check.Stride("z_stride", task.z_stride, params.group, rows, "the rows of all runs");
  }
  return check.Take();
}

Status Validate(const ScorePagesParams& params) {
  Check check("score_pages");
  check.HeadDim(params.head_dim).Group(params.group);
  for (size_t i = 0; i < params.tasks.size() && check.ok(); ++i) {
    const ScorePagesTask& task = params.tasks[i];
    const bool any = task.pages > 0;
    check.Task(i).That(task.pages >= 0, "pages", task.pages, "use 0 or more");
    check.Given(any, task.q, "q").Given(any, task.lo, "lo").Given(any, task.hi, "hi").Given(any, task.z, "z");
    check.Stride("z_stride", task.z_stride, params.group, task.pages, "pages");
  }
  return check.Take();
}

Status Validate(const ChooseParams& params) {
  Check check("choose");
  check.Group(params.group);
  for (size_t i = 0; i < params.tasks.size() && check.ok(); ++i) {
    const ChooseTask& task = params.tasks[i];
    check.Task(i).That(task.n >= 0, "n", task.n, "use 0 or more");
    check.That(task.sinks >= 0, "sinks", task.sinks, "use 0 or more");
    check.AtLeast("lo", task.lo, task.sinks, "sinks").AtLeast("hi", task.hi, task.lo, "lo");
    check.AtLeast("n", task.n, task.hi, "hi");
    check.That(task.k >= 0, "k", task.k, "use 0 or more");
    check.That(task.dilate_m >= 0, "dilate_m", task.dilate_m, "use 0 or more");
    check.That(task.dilate_r >= 0, "dilate_r", task.dilate_r, "use 0 or more");
    check.That(task.rule <= GroupRule::kMaxLogit, "rule", static_cast<int64_t>(task.rule), "use 0, 1 or 2");
    check.NotNan(task.target_drop, "target_drop");
    if (task.resident != nullptr) check.NotNan(task.log_theta, "log_theta");
    const int32_t middle = task.hi - task.lo;
    if (task.target_drop >= 0) {
      check.AtLeast("cap", task.cap, std::min(task.k, middle), "k (or all of the middle)");
    }
    check.Given(task.n > 0, task.z, "z").Given(true, task.count, "count").Given(true, task.lse_all, "lse_all");
    check.Given(true, task.lse_out, "lse_out").Given(task.max_chosen() > 0, task.chosen, "chosen");
    check.Stride("z_stride", task.z_stride, params.group, task.n, "n");
  }
  return check.Take();
}

Status Validate(const TopKParams& params) {
  Check check("top_k");
  for (size_t i = 0; i < params.tasks.size() && check.ok(); ++i) {
    const TopKTask& task = params.tasks[i];
    check.Task(i).That(task.lo >= 0, "lo", task.lo, "use 0 or more").AtLeast("hi", task.hi, task.lo, "lo");
    check.That(task.k >= 0, "k", task.k, "use 0 or more");
    const bool any = task.k > 0 && task.hi > task.lo;
    check.Given(any, task.score, "score").Given(any, task.chosen, "chosen").Given(true, task.count, "count");
  }
  return check.Take();
}

Status Validate(const GatherParams& params) {
  Check check("gather");
  check.HeadDim(params.head_dim).Rows("format", params.format);
  for (size_t i = 0; i < params.rows.size() && check.ok(); ++i) {
    check.Task(i).Given(true, params.rows[i].from, "from").Given(true, params.rows[i].to, "to");
  }
  return check.Take();
}

Status Validate(const AttendParams& params) {
  Check check("attend");
  check.HeadDim(params.head_dim).Group(params.group);
  for (size_t i = 0; i < params.tasks.size() && check.ok(); ++i) {
    const AttendTask& task = params.tasks[i];
    check.Task(i).Runs(task.runs).Given(RowCount(task.runs) > 0, task.q, "q");
    check.Given(true, task.out, "out").Given(true, task.lse, "lse");
  }
  return check.Take();
}

Status Validate(const PrefillParams& params) {
  Check check("prefill");
  check.HeadDim(params.head_dim).Group(params.group);
  check.That(params.queries >= 0, "queries", params.queries, "use 0 or more");
  check.That(params.first >= 0, "first", params.first, "use 0 or more");
  check.That(params.sinks >= 0, "sinks", params.sinks, "use 0 or more");
  if (params.queries == 0) return check.Take();
  const int64_t width = int64_t{params.group} * params.head_dim;
  for (size_t i = 0; i < params.tasks.size() && check.ok(); ++i) {
    const PrefillTask& task = params.tasks[i];
    check.Task(i).Given(true, task.q, "q").Given(true, task.out, "out").Runs(task.runs);
    check.Stride("q_stride", task.q_stride, params.queries, width, "group * head_dim");
    check.Stride("out_stride", task.out_stride, params.queries, width, "group * head_dim");
    check.AtLeast("rows of all runs", RowCount(task.runs), int64_t{params.first} + params.queries, "first + queries");
    for (int32_t t = 0; task.start != nullptr && t < params.queries && check.ok(); ++t) {
      const int32_t start = task.start[t];
      if (start >= 0 && start <= params.first + t) continue;
      check.That(false, ("start[" + std::to_string(t) + "]").c_str(), start, "use 0 to first + t");
    }
  }
  return check.Take();
}

}  // namespace prehoc
