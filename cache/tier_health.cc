#include "cache/tier_health.h"

#include <algorithm>
#include <string>

namespace prehoc {
namespace {
// What a measurement counts when the next one comes: the last ten or so decide.
constexpr double kDecay = 0.9;
constexpr double kBlend = 0.3;  // of a new restore in the running mean
}  // namespace

Status TierHealth::Options::Validate() const {
  const auto bad = [](const char* field, int64_t value) {
    return Status(StatusCode::kInvalid, std::string("tier health: ") + field + "=" + std::to_string(value) + "; give 1 or more");
  };
  if (failures < 1) return bad("failures", failures);
  if (backoff_nanos < 1) return bad("backoff_nanos", backoff_nanos);
  if (max_backoff_nanos < backoff_nanos) return bad("max_backoff_nanos", max_backoff_nanos);
  if (probe_nanos < 1) return bad("probe_nanos", probe_nanos);
  return {};
}

bool TierHealth::Begin() {
  const int64_t now = clock_->NowNanos();
  MutexLock lock(mutex_);
  if (state_ == State::kOpen && now >= retry_at_) state_ = State::kHalfOpen;
  if (state_ == State::kClosed) return true;
  if (state_ == State::kHalfOpen && !trying_) {
    trying_ = true;
    return true;
  }
  ++refused_;
  return false;
}

bool TierHealth::Available() const {
  const int64_t now = clock_->NowNanos();
  MutexLock lock(mutex_);
  return state_ == State::kClosed || (state_ == State::kOpen ? now >= retry_at_ : !trying_);
}

void TierHealth::End(const Status& status) {
  MutexLock lock(mutex_);
  const bool late = status.code() == StatusCode::kDeadline;
  const bool failed = late || status.code() == StatusCode::kIoError;
  failures_ += failed;
  deadlines_ += late;
  const bool tried = state_ == State::kHalfOpen && trying_;
  trying_ = false;
  if (!failed) {
    in_a_row_ = 0;
    // One that began before the breaker opened says nothing about now.
    if (state_ == State::kOpen) return;
    state_ = State::kClosed;
    backoff_ = 0;
    return;
  }
  ++in_a_row_;
  if (state_ == State::kOpen) return;
  if (!tried && !late && in_a_row_ < options_.failures) return;
  backoff_ = backoff_ == 0 ? options_.backoff_nanos : std::min(options_.max_backoff_nanos, 2 * backoff_);
  retry_at_ = clock_->NowNanos() + backoff_;
  state_ = State::kOpen;
  ++opened_;
}

void TierHealth::OnRestore(int64_t blocks, int64_t nanos) {
  if (blocks < 1) return;
  const double each = static_cast<double>(std::max<int64_t>(0, nanos)) / static_cast<double>(blocks);
  const int64_t now = clock_->NowNanos();
  MutexLock lock(mutex_);
  block_nanos_ = block_nanos_ < 0 ? each : block_nanos_ + kBlend * (each - block_nanos_);
  restored_at_ = now;
}

void TierHealth::OnPrefill(int64_t first, int64_t tokens, int64_t nanos) {
  if (tokens < 1 || nanos < 0) return;
  const double x = static_cast<double>(first) + static_cast<double>(tokens) / 2;
  const double y = static_cast<double>(nanos) / static_cast<double>(tokens);
  MutexLock lock(mutex_);
  for (double* sum : {&weight_, &sum_x_, &sum_y_, &sum_xx_, &sum_xy_}) *sum *= kDecay;
  weight_ += 1;
  sum_x_ += x;
  sum_y_ += y;
  sum_xx_ += x * x;
  sum_xy_ += x * y;
}

double TierHealth::RestoreNanos(int64_t blocks) const {
  MutexLock lock(mutex_);
  return block_nanos_ < 0 ? -1 : block_nanos_ * static_cast<double>(blocks);
}

double TierHealth::PrefillNanos(int64_t first, int64_t tokens) const {
  MutexLock lock(mutex_);
  return PrefillNanosLocked(first, tokens);
}

double TierHealth::PrefillNanosLocked(int64_t first, int64_t tokens) const {
  if (weight_ == 0) return -1;
  const double mean_x = sum_x_ / weight_, mean_y = sum_y_ / weight_;
  const double spread = sum_xx_ / weight_ - mean_x * mean_x;
  // Attention grows with the position and never gets cheaper; one position alone says nothing of that.
  const double slope = spread > 1 ? std::max(0.0, (sum_xy_ / weight_ - mean_x * mean_y) / spread) : 0;
  const double x = static_cast<double>(first) + static_cast<double>(tokens) / 2;
  return std::max(0.0, mean_y + slope * (x - mean_x)) * static_cast<double>(tokens);
}

int64_t TierHealth::WorthRestoring(int64_t chunks, int64_t blocks, int64_t first, int64_t tokens) {
  const int64_t now = clock_->NowNanos();
  MutexLock lock(mutex_);
  const double prefill = PrefillNanosLocked(first, tokens);
  if (block_nanos_ < 0 || prefill < 0 || block_nanos_ * static_cast<double>(blocks) < prefill) return chunks;
  const bool probe = now - restored_at_ >= options_.probe_nanos;
  const int64_t taken = probe ? std::min<int64_t>(1, chunks) : 0;
  if (probe) restored_at_ = now;  // one at a time
  probes_ += probe;
  bypassed_ += static_cast<uint64_t>(chunks - taken);
  return taken;
}

void TierHealth::VisitCounters(const CounterVisitor& visit) const {
  MutexLock lock(mutex_);
  visit("health.state", static_cast<double>(state_));
  visit("health.opened", static_cast<double>(opened_));
  visit("health.refused", static_cast<double>(refused_));
  visit("health.failures", static_cast<double>(failures_));
  visit("health.deadlines", static_cast<double>(deadlines_));
  visit("health.bypassed_chunks", static_cast<double>(bypassed_));
  visit("health.probes", static_cast<double>(probes_));
  visit("health.restore_nanos_per_block", std::max(0.0, block_nanos_));
  visit("health.prefill_nanos_per_token", weight_ > 0 ? sum_y_ / weight_ : 0);
}

}  // namespace prehoc
