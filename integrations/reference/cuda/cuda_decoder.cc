#include "integrations/reference/cuda/cuda_decoder.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "base/cuda/buffer.h"
#include "base/cuda/device.h"
#include "base/cuda/error.h"
#include "base/cuda/graph.h"
#include "base/cuda/stream.h"
#include "integrations/reference/cuda/device_model.h"
#include "integrations/reference/cuda/device_ops.h"
#include "integrations/reference/engine/rope.h"

namespace prehoc::reference {
namespace {

// [count] T on the device or pinned.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  Status Create(CudaPlace place, int64_t count, size_t* total) {
    PREHOC_ASSIGN_OR_RETURN(CudaBytes bytes, CudaBytes::Create(place, static_cast<size_t>(count) * sizeof(T)));
    *total += bytes.size();
    bytes_ = std::make_unique<CudaBytes>(std::move(bytes));
    return {};
  }
  T* data() const { return bytes_ ? reinterpret_cast<T*>(bytes_->data()) : nullptr; }

 private:
  std::unique_ptr<CudaBytes> bytes_;
};

class CudaDecoder final : public TokenDecoder {
 public:
  // What a step on the device takes beside the stream: one for copies behind it, and the events that join them.
  struct Side {
    CudaStream stream;
    CudaEvent begun, done;
  };
  CudaDecoder(const Model& model, const EngineOptions& options, CudaStream stream, Side side, std::unique_ptr<DeviceModel> weights)
      : config_(model.config), options_(options), stream_(std::move(stream)), side_(std::move(side)), weights_(std::move(weights)),
        rope_(config_, options.max_batch_tokens), q_width_(int64_t{config_.heads} * config_.head_dim),
        kv_width_(int64_t{config_.kv_heads} * config_.head_dim) {}
  ~CudaDecoder() override {
    stream_.Synchronize().IgnoreError();
    side_.stream.Synchronize().IgnoreError();
  }

  Status Allocate() {
    const int64_t n = options_.max_batch_tokens, half = config_.head_dim / 2;
    const auto make = [&](Buffer<float>& buffer, CudaPlace place, int64_t width) { return buffer.Create(place, n * width, &bytes_); };
    for (const auto& [buffer, width] : {std::pair{&hidden_, int64_t{config_.hidden}}, std::pair{&normed_, int64_t{config_.hidden}},
                                        std::pair{&qkv_, q_width_ + 2 * kv_width_}, std::pair{&attended_, q_width_},
                                        std::pair{&gate_up_, int64_t{2} * config_.intermediate}, std::pair{&gated_, int64_t{config_.intermediate}},
                                        std::pair{&cos_, half}, std::pair{&sin_, half}}) {
      PREHOC_RETURN_IF_ERROR(make(*buffer, CudaPlace::kDevice, width));
    }
    PREHOC_RETURN_IF_ERROR(make(angles_, CudaPlace::kPinned, 2 * half));
    PREHOC_RETURN_IF_ERROR(MakeRoom(CudaPlace::kPinned, 1));
    for (const auto& [buffer, width] : {std::pair{&step_q_, q_width_}, std::pair{&step_k_, kv_width_}, std::pair{&step_v_, kv_width_}}) {
      PREHOC_RETURN_IF_ERROR(buffer->Create(CudaPlace::kDevice, width, &bytes_));
    }
    PREHOC_RETURN_IF_ERROR(tokens_.Create(CudaPlace::kPinned, n, &bytes_));
    return logits_.Create(CudaPlace::kPinned, config_.vocab, &bytes_);
  }

  Status Run(AttentionBackend& backend, std::span<const int32_t> tokens, int64_t prompt_tokens) override {
    first_ = backend.length();
    count_ = static_cast<int32_t>(tokens.size());
    on_device_ = prompt_tokens > 0 && backend.takes_device_memory();
    PREHOC_RETURN_IF_ERROR(MakeRoom(on_device_ ? CudaPlace::kDevice : CudaPlace::kPinned, count_));
    // A prompt's last token may be alone in its piece; it takes the same way as its neighbours, to the same bits.
    vector_ = count_ == 1 && prompt_tokens == 0;
    const Clock& clock = *options_.clock;
    int64_t start = clock.NowNanos();
    PREHOC_RETURN_IF_ERROR(backend.Begin(tokens, prompt_tokens));
    seconds_.attention += clock.SecondsSince(start);
    has_logits_ = false;
    start = clock.NowNanos();
    if (vector_) {
      const AttendCall io{.first = first_, .count = 1, .q = step_q_.data(), .k = step_k_.data(), .v = step_v_.data(), .out = attended_.data()};
      auto plan = backend.Plan(io);
      if (!plan.ok() || plan->id != 0) {
        Status status = plan.status();
        if (status.ok()) status = RunStep(backend, *plan, tokens);
        if (status.ok()) status = backend.End();
        if (!status.ok()) {
          stream_.Synchronize().IgnoreError();  // nothing of the step runs on while it is undone
          side_.stream.Synchronize().IgnoreError();
          backend.Rollback();
        }
        seconds_.steps += clock.SecondsSince(start);
        return status;
      }
    }
    Status status = Embed(tokens, prompt_tokens);
    seconds_.embedding += clock.SecondsSince(start);
    for (int32_t layer = 0; layer < config_.layers && status.ok(); ++layer) status = RunLayer(backend, layer);
    start = clock.NowNanos();
    if (status.ok()) status = stream_.Synchronize();
    if (status.ok()) status = backend.End();
    seconds_.attention += clock.SecondsSince(start);
    if (!status.ok()) backend.Rollback();
    return status;
  }

  Status LogitsOf(int64_t index, float* logits) override {
    const int64_t start = options_.clock->NowNanos();
    if (!has_logits_) {
      PREHOC_RETURN_IF_ERROR(EnqueueLogits(index));
      PREHOC_RETURN_IF_ERROR(stream_.Synchronize());
    }
    std::copy_n(logits_.data(), config_.vocab, logits);
    seconds_.logits += options_.clock->SecondsSince(start);
    return {};
  }
  Status AllLogits(float* logits) override {
    for (int64_t t = 0; t < count_; ++t) PREHOC_RETURN_IF_ERROR(LogitsOf(t, logits + t * config_.vocab));
    return {};
  }

  const EngineSeconds& seconds() const override { return seconds_; }
  size_t bytes() const override { return bytes_ + here_bytes_ + pinned_bytes_ + rope_.bytes(); }

 private:
  // What a layer gives to the backend and gets from it, for `tokens`: few in decode, a piece where a prompt goes this way.
  struct Handed {
    Buffer<float> q, q_before, k, v, out;
    int64_t tokens = 0;
  };
  Status MakeRoom(CudaPlace place, int64_t tokens) {
    Handed& handed = place == CudaPlace::kDevice ? here_ : pinned_;
    if (handed.tokens >= tokens) return {};
    const int64_t n = tokens == 1 ? 1 : options_.max_batch_tokens;
    handed = {};
    size_t bytes = 0;
    const auto make = [&](Buffer<float>& buffer, int64_t width) { return buffer.Create(place, n * width, &bytes); };
    PREHOC_RETURN_IF_ERROR(make(handed.q, q_width_));
    PREHOC_RETURN_IF_ERROR(make(handed.k, kv_width_));
    PREHOC_RETURN_IF_ERROR(make(handed.v, kv_width_));
    if (place == CudaPlace::kPinned) PREHOC_RETURN_IF_ERROR(make(handed.out, q_width_));
    if (options_.keep_q_pre_rope) PREHOC_RETURN_IF_ERROR(make(handed.q_before, q_width_));
    handed.tokens = n;
    (place == CudaPlace::kDevice ? here_bytes_ : pinned_bytes_) = bytes;
    return {};
  }

  Status Embed(std::span<const int32_t> tokens, int64_t prompt_tokens) {
    PrepareTokens(tokens, prompt_tokens);
    return EnqueueEmbedding();
  }
  void PrepareTokens(std::span<const int32_t> tokens, int64_t prompt_tokens) {
    rope_.Prepare(first_, count_, std::max<int64_t>(prompt_tokens, first_ + count_));
    const int64_t angles = int64_t{count_} * (config_.head_dim / 2);
    std::copy_n(rope_.cos(), angles, angles_.data());
    std::copy_n(rope_.sin(), angles, angles_.data() + angles);
    std::copy(tokens.begin(), tokens.end(), tokens_.data());
  }
  Status EnqueueEmbedding() {
    const int64_t angles = int64_t{count_} * (config_.head_dim / 2);
    const auto bytes = static_cast<size_t>(angles) * sizeof(float);
    PREHOC_CUDA_TRY(cudaMemcpyAsync(cos_.data(), angles_.data(), bytes, cudaMemcpyHostToDevice, stream_.get()));
    PREHOC_CUDA_TRY(cudaMemcpyAsync(sin_.data(), angles_.data() + angles, bytes, cudaMemcpyHostToDevice, stream_.get()));
    return EmbedTokens(weights_->embedding(), weights_->type(), tokens_.data(), hidden_.data(), count_, config_.hidden, stream_.get());
  }

  // y (+)= W x, x normalised first if `norm` is given.
  Status Multiply(const void* weights, int64_t rows, int64_t cols, const float* x, const float* norm, const float* bias, float* y, bool add) {
    if (vector_) {
      return MultiplyVector({.weights = weights, .x = x, .norm = norm, .eps = config_.rms_eps, .bias = bias, .y = y, .add = add,
                             .rows = static_cast<int32_t>(rows), .cols = static_cast<int32_t>(cols), .type = weights_->type()}, stream_.get());
    }
    if (norm != nullptr) {
      PREHOC_RETURN_IF_ERROR(NormRows(x, norm, config_.rms_eps, normed_.data(), count_, static_cast<int32_t>(cols), stream_.get()));
      x = normed_.data();
    }
    // What no product reads or writes meanwhile: the MLP's inner rows while others are multiplied, and the other way round.
    const bool down = x == gated_.data();
    float* const workspace = down ? gate_up_.data() : cols <= config_.intermediate ? gated_.data() : nullptr;
    return MultiplyMatrix({.weights = weights, .x = x, .bias = bias, .y = y, .add = add, .workspace = workspace, .tokens = count_,
                           .rows = static_cast<int32_t>(rows), .cols = static_cast<int32_t>(cols), .type = weights_->type(),
                           .precision = options_.prompt_precision}, stream_.get());
  }

  Status EnqueueLogits(int64_t index) {
    return MultiplyVector({.weights = weights_->output(), .x = hidden_.data() + index * config_.hidden, .norm = weights_->output_norm(),
                           .eps = config_.rms_eps, .y = logits_.data(), .rows = config_.vocab, .cols = config_.hidden, .type = weights_->type()},
                          stream_.get());
  }

  // One token with everything on the device: replayed where the plan is known, logits included.
  Status RunStep(AttentionBackend& backend, const StepPlan& plan, std::span<const int32_t> tokens) {
    PrepareTokens(tokens, 0);
    if (plan.pause) {
      PREHOC_RETURN_IF_ERROR(EnqueueStep(backend, true));
    } else {
      auto known = std::find_if(graphs_.begin(), graphs_.end(), [&](const auto& graph) { return graph.first == plan.id; });
      if (known == graphs_.end()) {
        constexpr size_t kMostGraphs = 4;
        if (graphs_.size() == kMostGraphs) graphs_.erase(graphs_.begin());
        PREHOC_ASSIGN_OR_RETURN(CudaGraph graph, CudaGraph::Capture(stream_, [&] { return EnqueueStep(backend, false); }));
        graphs_.emplace_back(plan.id, std::move(graph));
        known = graphs_.end() - 1;
      }
      PREHOC_RETURN_IF_ERROR(known->second.Launch(stream_));
    }
    PREHOC_RETURN_IF_ERROR(stream_.Synchronize());
    has_logits_ = true;
    return {};
  }
  Status EnqueueStep(AttentionBackend& backend, bool pause) {
    void* const stream = stream_.get();
    PREHOC_RETURN_IF_ERROR(EnqueueEmbedding());
    // From the step's start: 54 MB of rows take 2 ms over the link, eight times as long as the output matrix (that beside it: 9.4 instead of 8.8 ms a
    // step of 128K with random weights, where every turn wants other rows). A few rows would cost 0.1 ms less there.
    PREHOC_RETURN_IF_ERROR(side_.begun.Record(stream_.get()));
    PREHOC_RETURN_IF_ERROR(side_.begun.Before(side_.stream.get()));
    PREHOC_RETURN_IF_ERROR(backend.EnqueueBehind(side_.stream.get()));
    PREHOC_RETURN_IF_ERROR(side_.done.Record(side_.stream.get()));
    for (int32_t layer = 0; layer < config_.layers; ++layer) {
      const DeviceLayer& w = weights_->layer(layer);
      PREHOC_RETURN_IF_ERROR(ProjectStep(w, RotationOf(w, step_q_.data(), nullptr, step_k_.data(), step_v_.data())));
      PREHOC_RETURN_IF_ERROR(backend.EnqueueLayer(layer, stream));
      if (pause) {
        PREHOC_RETURN_IF_ERROR(stream_.Synchronize());
        PREHOC_RETURN_IF_ERROR(backend.AfterLayer(layer));
      }
      PREHOC_RETURN_IF_ERROR(FinishLayer(w));
    }
    PREHOC_RETURN_IF_ERROR(EnqueueLogits(0));
    PREHOC_RETURN_IF_ERROR(side_.done.Before(stream_.get()));
    return backend.EnqueueLast(stream);
  }

  RotateParams RotationOf(const DeviceLayer& w, float* q, float* q_before, float* k, float* v) const {
    return {.qkv = qkv_.data(), .q_norm = w.q_norm, .k_norm = w.k_norm, .eps = config_.rms_eps, .cos = cos_.data(), .sin = sin_.data(),
            .interleaved = config_.rope_layout == RopeLayout::kInterleaved, .q = q, .q_before = q_before, .k = k, .v = v, .tokens = count_,
            .heads = config_.heads, .kv_heads = config_.kv_heads, .head_dim = config_.head_dim};
  }
  Status Project(const DeviceLayer& w, const RotateParams& rotation) {
    PREHOC_RETURN_IF_ERROR(Multiply(w.qkv, q_width_ + 2 * kv_width_, config_.hidden, hidden_.data(), w.attention_norm, w.qkv_bias, qkv_.data(), false));
    return RotateHeads(rotation, stream_.get());
  }
  // The same for a step's token, by one launch where heads have no norms.
  Status ProjectStep(const DeviceLayer& w, const RotateParams& rotation) {
    if (w.q_norm != nullptr || w.k_norm != nullptr) return Project(w, rotation);
    return MultiplyRotated({.weights = w.qkv, .x = hidden_.data(), .norm = w.attention_norm, .eps = config_.rms_eps, .bias = w.qkv_bias,
                            .rows = static_cast<int32_t>(q_width_ + 2 * kv_width_), .cols = config_.hidden, .type = weights_->type()},
                           rotation, stream_.get());
  }

  // What follows attention, from `attended_`.
  Status FinishLayer(const DeviceLayer& w) {
    PREHOC_RETURN_IF_ERROR(Multiply(w.o, config_.hidden, q_width_, attended_.data(), nullptr, w.o_bias, hidden_.data(), true));
    if (vector_) {
      PREHOC_RETURN_IF_ERROR(MultiplyVector({.weights = w.gate_up, .x = hidden_.data(), .norm = w.ffn_norm, .eps = config_.rms_eps,
                                             .y = gated_.data(), .gated = true, .rows = config_.intermediate, .cols = config_.hidden,
                                             .type = weights_->type()}, stream_.get()));
    } else {
      PREHOC_RETURN_IF_ERROR(Multiply(w.gate_up, int64_t{2} * config_.intermediate, config_.hidden, hidden_.data(), w.ffn_norm, nullptr,
                                      gate_up_.data(), false));
      PREHOC_RETURN_IF_ERROR(GateRows(gate_up_.data(), gated_.data(), count_, config_.intermediate, stream_.get()));
    }
    return Multiply(w.down, config_.hidden, config_.intermediate, gated_.data(), nullptr, nullptr, hidden_.data(), true);
  }

  Status RunLayer(AttentionBackend& backend, int32_t index) {
    if (backend.Freeze(index).frozen > 0) {
      return {StatusCode::kUnsupported, "a prompt with frozen tokens (etf, cpe) is not offered by the CUDA engine; use another selector"};
    }
    const DeviceLayer& w = weights_->layer(index);
    const Handed& to = on_device_ ? here_ : pinned_;
    float* const out = on_device_ ? attended_.data() : to.out.data();
    const Clock& clock = *options_.clock;
    int64_t start = clock.NowNanos();
    PREHOC_RETURN_IF_ERROR(Project(w, RotationOf(w, to.q.data(), to.q_before.data(), to.k.data(), to.v.data())));
    // On the device the backend prepares its work while that is done.
    if (!on_device_) PREHOC_RETURN_IF_ERROR(stream_.Synchronize());
    seconds_.projections += clock.SecondsSince(start);
    start = clock.NowNanos();
    PREHOC_RETURN_IF_ERROR(backend.Attend({.layer = index, .first = first_, .count = count_, .q = to.q.data(), .q_pre_rope = to.q_before.data(),
                                           .k = to.k.data(), .v = to.v.data(), .out = out, .on_device = on_device_,
                                           .stream = on_device_ ? stream_.get() : nullptr}));
    seconds_.attention += clock.SecondsSince(start);
    start = clock.NowNanos();
    if (!on_device_) {
      PREHOC_CUDA_TRY(cudaMemcpyAsync(attended_.data(), out, static_cast<size_t>(count_ * q_width_) * sizeof(float), cudaMemcpyHostToDevice,
                                      stream_.get()));
    }
    PREHOC_RETURN_IF_ERROR(FinishLayer(w));
    if (on_device_) PREHOC_RETURN_IF_ERROR(backend.WhileOthersWork());
    seconds_.projections += clock.SecondsSince(start);
    return {};
  }

  const ModelConfig& config_;
  const EngineOptions& options_;
  const CudaStream stream_;
  const Side side_;
  const std::unique_ptr<DeviceModel> weights_;
  RopeTables rope_;
  const int64_t q_width_, kv_width_;  // [floats] of a token's q, and of its k or v
  size_t bytes_ = 0;
  // Of the piece, [max_batch_tokens, width]; the second line is pinned.
  Buffer<float> hidden_, normed_, qkv_, attended_, gate_up_, gated_, cos_, sin_;
  Buffer<float> angles_, logits_;
  Handed here_, pinned_;
  size_t here_bytes_ = 0, pinned_bytes_ = 0;
  bool on_device_ = false;  // of the open piece
  Buffer<int32_t> tokens_;
  int64_t first_ = 0;
  int32_t count_ = 0;
  bool vector_ = true;
  // Steps on the device: one token's q, k and v there; the graphs of the last plans, by id; whether logits_ are those of the last step.
  Buffer<float> step_q_, step_k_, step_v_;
  std::vector<std::pair<uint64_t, CudaGraph>> graphs_;
  bool has_logits_ = false;
  EngineSeconds seconds_;
};
}  // namespace

Result<std::unique_ptr<TokenDecoder>> MakeCudaDecoder(const Model& model, const EngineOptions& options) {
  PREHOC_RETURN_IF_ERROR(CurrentCudaDevice().status());
  for (const int32_t width : {model.config.hidden, model.config.intermediate, model.config.heads * model.config.head_dim}) {
    if (width % 8 != 0) return {StatusCode::kUnsupported, "the CUDA engine takes widths that are multiples of 8, not " + std::to_string(width)};
  }
  PREHOC_ASSIGN_OR_RETURN(CudaStream stream, CudaStream::Create());
  PREHOC_ASSIGN_OR_RETURN(auto weights, DeviceModel::Create(model, *options.executor));
  PREHOC_ASSIGN_OR_RETURN(CudaStream side, CudaStream::Create());
  PREHOC_ASSIGN_OR_RETURN(CudaEvent begun, CudaEvent::Create());
  PREHOC_ASSIGN_OR_RETURN(CudaEvent done, CudaEvent::Create());
  auto decoder = std::make_unique<CudaDecoder>(model, options, std::move(stream),
                                               CudaDecoder::Side{std::move(side), std::move(begun), std::move(done)}, std::move(weights));
  PREHOC_RETURN_IF_ERROR(decoder->Allocate());
  return std::unique_ptr<TokenDecoder>(std::move(decoder));
}

}  // namespace prehoc::reference
