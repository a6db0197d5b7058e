#include "integrations/reference/attention_backend.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "base/units.h"
#include "integrations/reference/engine/kernel_table.h"

namespace prehoc::reference {
namespace {

constexpr int64_t kQueriesPerTask = 16;

std::string Range(int64_t first, int64_t count) {
  return "tokens [" + std::to_string(first) + ", " + std::to_string(first + count) + ")";
}

}  // namespace

DenseBackend::DenseBackend(int32_t layers, int32_t heads, int32_t kv_heads, int32_t head_dim, int64_t max_tokens,
                           Executor* executor)
    : layers_(layers),
      heads_(heads),
      kv_heads_(kv_heads),
      head_dim_(head_dim),
      max_tokens_(max_tokens),
      executor_(executor),
      k_(static_cast<size_t>(layers)),
      v_(static_cast<size_t>(layers)) {}

Status DenseBackend::Begin(std::span<const int32_t> tokens, int64_t) {
  const auto count = static_cast<int64_t>(tokens.size());
  if (pending_ != 0) {
    return {StatusCode::kInvalid, "dense attention: " + Range(length_, pending_) + " are announced already; end or roll back"};
  }
  if (count == 0) return {StatusCode::kInvalid, "dense attention: no tokens announced"};
  if (length_ + count > max_tokens_) {
    return {StatusCode::kOutOfSpace, "dense attention: " + std::to_string(length_ + count) + " tokens, room for " +
                                         std::to_string(max_tokens_) + "; use a shorter context"};
  }
  pending_ = count;
  return {};
}

Status DenseBackend::Attend(const AttendCall& call) {
  if (call.layer < 0 || call.layer >= layers_) {
    return {StatusCode::kInvalid, "dense attention: layer " + std::to_string(call.layer) + " of " + std::to_string(layers_)};
  }
  if (call.first != length_ || call.count != pending_ || call.q_skip < 0 || call.q_skip > call.count) {
    return {StatusCode::kInvalid, "dense attention: " + Range(call.first, call.count) + " are not the announced " +
                                      Range(length_, pending_)};
  }
  Append(call);
  const int64_t queries = call.count - call.q_skip;
  const auto run = [&](int64_t task) {
    const auto head = static_cast<int32_t>(task % heads_);
    const int64_t begin = call.q_skip + task / heads_ * kQueriesPerTask;
    std::vector<float> scores;
    for (int64_t t = begin; t < std::min(call.count, begin + kQueriesPerTask); ++t) AttendOne(call, t, head, scores);
  };
  const int64_t tasks = CeilDiv(queries, kQueriesPerTask) * heads_;
  if (executor_ != nullptr) {
    executor_->ParallelFor(tasks, run);
  } else {
    for (int64_t task = 0; task < tasks; ++task) run(task);
  }
  return {};
}

void DenseBackend::Append(const AttendCall& call) {
  const int64_t width = int64_t{kv_heads_} * head_dim_;
  const auto layer = static_cast<size_t>(call.layer);
  for (const auto& [to, from] : {std::pair{&k_[layer], call.k}, std::pair{&v_[layer], call.v}}) {
    to->resize(static_cast<size_t>(call.first * width));  // forgets what was rolled back
    to->insert(to->end(), from, from + call.count * width);
  }
}

void DenseBackend::AttendOne(const AttendCall& call, int64_t token, int32_t head, std::vector<float>& scores) const {
  static const EngineKernels& kernels = KernelsFor(BestSimdLevel());
  const int64_t row = (token - call.q_skip) * heads_ + head, width = int64_t{kv_heads_} * head_dim_;
  const int64_t offset = int64_t{head / (heads_ / kv_heads_)} * head_dim_, visible = call.first + token + 1;
  const float* q = call.q + row * head_dim_;
  const float* k = k_[static_cast<size_t>(call.layer)].data() + offset;
  const float* v = v_[static_cast<size_t>(call.layer)].data() + offset;
  scores.resize(static_cast<size_t>(visible));
  const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim_));
  for (int64_t i = 0; i < visible; ++i) scores[static_cast<size_t>(i)] = scale * kernels.dot(q, k + i * width, head_dim_);
  const float max = *std::max_element(scores.begin(), scores.end());
  float* out = call.out + row * head_dim_;
  std::fill(out, out + head_dim_, 0.0f);
  double sum = 0;
  for (int64_t i = 0; i < visible; ++i) {
    const float weight = std::exp(scores[static_cast<size_t>(i)] - max);
    sum += weight;
    kernels.add_scaled(weight, v + i * width, head_dim_, out);
  }
  for (int64_t c = 0; c < head_dim_; ++c) out[c] = static_cast<float>(out[c] / sum);
}

Status DenseBackend::End() {
  if (pending_ == 0) return {StatusCode::kInvalid, "dense attention: no tokens announced"};
  for (size_t layer = 0; layer < k_.size(); ++layer) {
    if (static_cast<int64_t>(k_[layer].size()) == (length_ + pending_) * kv_heads_ * head_dim_) continue;
    return {StatusCode::kInvalid, "dense attention: layer " + std::to_string(layer) + " was not given " +
                                      Range(length_, pending_)};
  }
  length_ += pending_;
  pending_ = 0;
  return {};
}

}  // namespace prehoc::reference
