#include "cache/report.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <string>

namespace prehoc {
namespace {

constexpr double kLogStep = 0.01980262729617973;  // log(1.02)

struct CountField {
  const char* name;
  int64_t SequenceReport::*member;
};
constexpr CountField kCounts[] = {
    {"prompt_tokens", &SequenceReport::prompt_tokens},
    {"restored_tokens", &SequenceReport::restored_tokens},
    {"decode_steps", &SequenceReport::decode_steps},
    {"triples", &SequenceReport::triples},
    {"dense_triples", &SequenceReport::dense_triples},
    {"retrievals", &SequenceReport::retrievals},
    {"inherited", &SequenceReport::inherited},
    {"borrowed", &SequenceReport::borrowed},
    {"first_selections", &SequenceReport::first_selections},
    {"widened_dense", &SequenceReport::widened_dense},
    {"attended", &SequenceReport::attended},
    {"bytes_gate", &SequenceReport::bytes_gate},
    {"bytes_codes", &SequenceReport::bytes_codes},
    {"bytes_exact_keys", &SequenceReport::bytes_exact_keys},
    {"bytes_attended", &SequenceReport::bytes_attended},
    {"bytes_from_host", &SequenceReport::bytes_from_host},
    {"bytes_from_disk", &SequenceReport::bytes_from_disk},
    {"rows_device", &SequenceReport::rows_device},
    {"rows_host", &SequenceReport::rows_host},
    {"rows_disk", &SequenceReport::rows_disk},
    {"rows_in_step", &SequenceReport::rows_in_step},
    {"triples_in_step", &SequenceReport::triples_in_step},
    {"rows_behind", &SequenceReport::rows_behind},
    {"failed_fetches", &SequenceReport::failed_fetches},
    {"refreshes", &SequenceReport::refreshes},
    {"bound_violations", &SequenceReport::bound_violations},
    {"statistical_checked", &SequenceReport::statistical_checked},
    {"statistical_violations", &SequenceReport::statistical_violations},
    {"audited_steps", &SequenceReport::audited_steps},
    {"prefill_bytes_from_disk", &SequenceReport::prefill_bytes_from_disk},
    {"prefill_frozen_rows", &SequenceReport::prefill_frozen_rows},
    {"prefill_cut_keys", &SequenceReport::prefill_cut_keys},
    {"corrupt_chunks", &SequenceReport::corrupt_chunks},
    {"missing_chunks", &SequenceReport::missing_chunks},
    {"recomputed_chunks", &SequenceReport::recomputed_chunks},
};

struct SketchField {
  const char* name;
  UnitSketch SequenceReport::*member;
};
constexpr SketchField kSketches[] = {
    {"dropped_estimated", &SequenceReport::dropped_estimated},
    {"dropped_bound", &SequenceReport::dropped_bound},
    {"dropped_bound_statistical", &SequenceReport::dropped_bound_statistical},
    {"dropped_audited", &SequenceReport::dropped_audited},
    {"estimate_error", &SequenceReport::estimate_error},
    {"output_error", &SequenceReport::output_error},
};

struct TimeField {
  const char* name;
  double StepTimes::*member;
};
constexpr TimeField kTimes[] = {
    {"append", &StepTimes::append},     {"gate", &StepTimes::gate},     {"score", &StepTimes::score},
    {"choose", &StepTimes::choose},     {"plan", &StepTimes::plan},     {"fetch", &StepTimes::fetch},
    {"attend", &StepTimes::attend},     {"slow_clock", &StepTimes::slow_clock},
    {"prefill", &StepTimes::prefill},   {"audit", &StepTimes::audit},
};

static_assert(sizeof(StepTimes) == std::size(kTimes) * sizeof(double), "a time is missing in kTimes");
static_assert(sizeof(SequenceReport) == std::size(kCounts) * sizeof(int64_t) +
                                            std::size(kSketches) * sizeof(UnitSketch) +
                                            sizeof(double) /* estimate_age_mean */ + sizeof(StepTimes),
              "a field is missing in a table: Merge() and VisitCounters() would forget it");

}  // namespace

int UnitSketch::Bin(double value) {
  if (value >= 1) return 0;
  if (value < 1e-10) return kBins - 1;  // also keeps log(0) out
  return std::min(static_cast<int>(-std::log(value) / kLogStep), kBins - 1);
}

void UnitSketch::Add(double value) {
  value = std::isnan(value) ? 1.0 : std::clamp(value, 0.0, 1.0);
  ++bins_[static_cast<size_t>(Bin(value))];
  ++count_;
  sum_ += value;
  min_ = std::min(min_, value);
  max_ = std::max(max_, value);
}

void UnitSketch::Merge(const UnitSketch& other) {
  for (size_t i = 0; i < bins_.size(); ++i) bins_[i] += other.bins_[i];
  count_ += other.count_;
  sum_ += other.sum_;
  min_ = std::min(min_, other.min_);
  max_ = std::max(max_, other.max_);
}

double UnitSketch::Quantile(double q) const {
  if (count_ == 0) return 0;
  if (!(q > 0)) return min_;
  if (q >= 1) return max_;
  const auto rank = std::max<int64_t>(1, static_cast<int64_t>(std::ceil(q * static_cast<double>(count_))));
  int64_t seen = 0;
  int bin = kBins - 1;  // the bins fall, so the smallest values are in the last
  while (bin > 0 && (seen += bins_[static_cast<size_t>(bin)]) < rank) --bin;
  if (bin == kBins - 1) return min_;
  return std::clamp(std::exp(-kLogStep * (bin + 0.5)), min_, max_);
}

void SequenceReport::Merge(const SequenceReport& other) {
  const auto ours = static_cast<double>(dropped_estimated.count());
  const auto theirs = static_cast<double>(other.dropped_estimated.count());
  if (theirs > 0) estimate_age_mean = (estimate_age_mean * ours + other.estimate_age_mean * theirs) / (ours + theirs);
  for (const CountField& field : kCounts) this->*field.member += other.*field.member;
  for (const SketchField& field : kSketches) (this->*field.member).Merge(other.*field.member);
  for (const TimeField& field : kTimes) times.*field.member += other.times.*field.member;
}

void SequenceReport::VisitCounters(const CounterVisitor& visit) const {
  const auto show = [&](const std::string& name, double value) { visit("sequence." + name, value); };
  for (const CountField& field : kCounts) show(field.name, static_cast<double>(this->*field.member));
  show("rho", rho());
  show("mean_attended", mean_attended());
  show("bytes_scored", static_cast<double>(bytes_scored()));
  show("estimate_age_mean", estimate_age_mean);
  for (const SketchField& field : kSketches) {
    const UnitSketch& sketch = this->*field.member;
    const std::string name = field.name;
    show(name + ".count", static_cast<double>(sketch.count()));
    show(name + ".mean", sketch.mean());
    show(name + ".p50", sketch.Quantile(0.5));
    show(name + ".p99", sketch.Quantile(0.99));
    show(name + ".min", sketch.min());
    show(name + ".max", sketch.max());
  }
  for (const TimeField& field : kTimes) show(std::string("seconds.") + field.name, times.*field.member);
  show("seconds.total", times.Total());
}

}  // namespace prehoc
