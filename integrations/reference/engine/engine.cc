#include "integrations/reference/engine/engine.h"

#include <algorithm>
#include <string>

#include "integrations/reference/engine/check_model.h"
#include "integrations/reference/engine/decoder.h"

namespace prehoc::reference {
namespace {

Status Invalid(std::string message) { return {StatusCode::kInvalid, std::move(message)}; }

int64_t LongestSequence(const ModelConfig& c, const EngineOptions& options) {
  const int64_t wanted = options.max_tokens > 0 ? options.max_tokens : c.max_positions;
  return c.sliding_window > 0 ? std::min(wanted, c.sliding_window) : wanted;
}

}  // namespace

Status EngineOptions::Validate() const {
  if (executor == nullptr) return Invalid("executor is null; give the engine one");
  if (clock == nullptr) return Invalid("clock is null; give the engine one");
  if (max_batch_tokens < 1 || max_batch_tokens > 65536) {
    return Invalid("max_batch_tokens=" + std::to_string(max_batch_tokens) + "; use 1 to 65536");
  }
  if (max_tokens < 0) return Invalid("max_tokens=" + std::to_string(max_tokens) + "; use 0 (the model's) or more");
  return {};
}

struct Engine::Impl {
  Impl(std::shared_ptr<const Model> m, const EngineOptions& o) : model(std::move(m)), options(o), max_tokens(LongestSequence(model->config, o)) {}

  Status CheckCall(const AttentionBackend& backend, std::span<const int32_t> tokens, int64_t prompt_tokens) const;
  // Runs the tokens piece by piece; after_piece(tokens done before the piece, tokens of the piece).
  template <class Fn>
  Status RunPieces(AttentionBackend& backend, std::span<const int32_t> tokens, int64_t prompt_tokens,
                   const Fn& after_piece);

  const std::shared_ptr<const Model> model;
  const EngineOptions options;
  const int64_t max_tokens;
  std::unique_ptr<TokenDecoder> decoder;
  int64_t tokens_run = 0, pieces_run = 0;
};

Engine::Engine(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Engine::~Engine() = default;

Result<std::unique_ptr<Engine>> Engine::Create(std::shared_ptr<const Model> model, const EngineOptions& options) {
  PREHOC_RETURN_IF_ERROR(options.Validate().WithContext("engine"));
  if (model == nullptr) return Invalid("engine: model is null; load one first");
  PREHOC_RETURN_IF_ERROR(CheckModel(*model).WithContext("engine"));
  if (!SimdLevelAvailable(options.simd)) {
    return {StatusCode::kUnsupported, "engine: this CPU has no " + std::string(SimdLevelName(options.simd)) +
                                          "; use " + std::string(SimdLevelName(BestSimdLevel()))};
  }
  auto impl = std::make_unique<Impl>(std::move(model), options);
  if (options.make_decoder) {
    PREHOC_ASSIGN_OR_RETURN(impl->decoder, options.make_decoder(*impl->model, impl->options));
  } else {
    impl->decoder = std::make_unique<Decoder>(*impl->model, impl->options);
  }
  return std::unique_ptr<Engine>(new Engine(std::move(impl)));
}

Status Engine::Impl::CheckCall(const AttentionBackend& backend, std::span<const int32_t> tokens,
                               int64_t prompt_tokens) const {
  if (tokens.empty()) return Invalid("no tokens to run");
  if (prompt_tokens < 0) return Invalid("prompt_tokens=" + std::to_string(prompt_tokens) + "; use 0 in decode");
  const int64_t vocab = model->config.vocab;
  for (const int32_t token : tokens) {
    if (token < 0 || token >= vocab) {
      return Invalid("token " + std::to_string(token) + " is not in the vocabulary of " + std::to_string(vocab));
    }
  }
  const int64_t end = backend.length() + static_cast<int64_t>(tokens.size());
  if (end <= max_tokens && prompt_tokens <= max_tokens) return {};
  const bool window = max_tokens == model->config.sliding_window;
  return Invalid("a sequence of " + std::to_string(std::max(end, prompt_tokens)) + " tokens, but " +
                 (window ? "the model's sliding window is " : "the limit is ") + std::to_string(max_tokens) +
                 "; use a shorter context");
}

template <class Fn>
Status Engine::Impl::RunPieces(AttentionBackend& backend, std::span<const int32_t> tokens, int64_t prompt_tokens,
                               const Fn& after_piece) {
  for (size_t done = 0; done < tokens.size();) {
    const auto piece = tokens.subspan(done, std::min(tokens.size() - done, static_cast<size_t>(options.max_batch_tokens)));
    PREHOC_RETURN_IF_ERROR(decoder->Run(backend, piece, prompt_tokens));
    PREHOC_RETURN_IF_ERROR(after_piece(done, piece.size()));
    done += piece.size();
    tokens_run += static_cast<int64_t>(piece.size());
    ++pieces_run;
  }
  return {};
}

Status Engine::Forward(AttentionBackend& backend, std::span<const int32_t> tokens, int64_t prompt_tokens,
                       std::span<float> logits) {
  Impl& impl = *impl_;
  PREHOC_RETURN_IF_ERROR(impl.CheckCall(backend, tokens, prompt_tokens));
  const auto vocab = static_cast<size_t>(config().vocab);
  if (!logits.empty() && logits.size() != vocab) {
    return Invalid("logits for " + std::to_string(logits.size()) + " tokens of the vocabulary, expected " +
                   std::to_string(vocab) + " or none");
  }
  return impl.RunPieces(backend, tokens, prompt_tokens, [&](size_t done, size_t count) {
    const bool last = !logits.empty() && done + count == tokens.size();
    return last ? impl.decoder->LogitsOf(static_cast<int64_t>(count) - 1, logits.data()) : Status();
  });
}

Status Engine::ForwardAll(AttentionBackend& backend, std::span<const int32_t> tokens, int64_t prompt_tokens,
                          std::span<float> logits) {
  Impl& impl = *impl_;
  PREHOC_RETURN_IF_ERROR(impl.CheckCall(backend, tokens, prompt_tokens));
  const auto vocab = static_cast<size_t>(config().vocab);
  if (logits.size() != tokens.size() * vocab) {
    return Invalid("room for " + std::to_string(logits.size()) + " logits, expected " +
                   std::to_string(tokens.size()) + " x " + std::to_string(vocab));
  }
  return impl.RunPieces(backend, tokens, prompt_tokens,
                        [&](size_t done, size_t) { return impl.decoder->AllLogits(logits.data() + done * vocab); });
}

const ModelConfig& Engine::config() const { return impl_->model->config; }
int64_t Engine::max_tokens() const { return impl_->max_tokens; }
int64_t Engine::RopeVariant(int64_t prompt_tokens) const { return RopeVariantOf(config(), prompt_tokens); }
size_t Engine::scratch_bytes() const { return impl_->decoder->bytes(); }
const EngineSeconds& Engine::seconds() const { return impl_->decoder->seconds(); }

void Engine::VisitCounters(const CounterVisitor& visit) const {
  visit("engine.tokens", static_cast<double>(impl_->tokens_run));
  visit("engine.pieces", static_cast<double>(impl_->pieces_run));
  visit("engine.scratch_bytes", static_cast<double>(scratch_bytes()));
  visit("engine.weight_bytes", static_cast<double>(impl_->model->weight_bytes));
  visit("engine.seconds.projections", seconds().projections);
  visit("engine.seconds.attention", seconds().attention);
  visit("engine.seconds.logits", seconds().logits);
  visit("engine.seconds.embedding", seconds().embedding);
  visit("engine.seconds.steps", seconds().steps);
}

}  // namespace prehoc::reference
