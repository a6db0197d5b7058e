// How far one run's predictions are from another's, step by step on the same tokens.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace prehoc::cli {

// log softmax, in fp32 from fp64 sums.
std::vector<float> LogSoftmax(std::span<const float> logits);

// KL(p || q) = SUM p (log p - log q) in nats, from log probabilities; never negative.
double KlDivergence(std::span<const float> log_p, std::span<const float> log_q);

// Keeps the log probabilities of the first steps of a run, as many as `max_bytes` hold; at least one.
class LogitsRecord {
 public:
  explicit LogitsRecord(size_t max_bytes) : max_bytes_(max_bytes) {}
  void Add(std::span<const float> logits);
  size_t steps() const { return steps_.size(); }
  std::span<const float> step(size_t i) const { return steps_[i]; }

 private:
  const size_t max_bytes_;
  std::vector<std::vector<float>> steps_;
};

struct Agreement {
  int64_t same_tokens = 0;         // decisions that are the same when both see the same tokens before
  int64_t decisions = 0;
  std::vector<double> kl;          // KL(dense || selected) per recorded decision; the first follows from prefill alone
  double kl_mean() const;          // over decode steps; of the first decision where there is no other
  double kl_max() const;
  bool same_answer = false;        // decoding densely on its own gives the same tokens
};

}  // namespace prehoc::cli
