#include "integrations/reference/loader/fingerprint.h"

#include <openssl/evp.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <span>
#include <string_view>

namespace prehoc::reference::loader {
namespace {

using Digest = std::array<uint8_t, 32>;
constexpr size_t kPieceBytes = size_t{16} << 20;
// Part of what is hashed: a change of what goes in, or of its order, changes this.
constexpr std::string_view kFormat = "prehoc model fingerprint 1";


bool Sha256(std::span<const std::byte> bytes, Digest* digest) {
  unsigned int length = 0;
  return EVP_Digest(bytes.data(), bytes.size(), digest->data(), &length, EVP_sha256(), nullptr) == 1 &&
         length == digest->size();
}

// Fields in a fixed order and width, so that no two configurations spell the same bytes.
class Canonical {
 public:
  void Bytes(const void* data, size_t size) {
    const auto* p = static_cast<const std::byte*>(data);
    bytes_.insert(bytes_.end(), p, p + size);
  }
  void Int(int64_t value) { Bytes(&value, sizeof value); }
  void Float(double value) { Int(std::bit_cast<int64_t>(value)); }
  void Text(std::string_view text) {
    Int(static_cast<int64_t>(text.size()));
    Bytes(text.data(), text.size());
  }
  template <class T>
  void Floats(const std::vector<T>& values) {
    Int(static_cast<int64_t>(values.size()));
    for (const T value : values) Float(static_cast<double>(value));
  }
  std::span<const std::byte> bytes() const { return bytes_; }

 private:
  std::vector<std::byte> bytes_;
};

void AppendConfig(const ModelConfig& c, Canonical* out) {
  out->Text(c.architecture);
  for (const int64_t v : {int64_t{c.layers}, int64_t{c.heads}, int64_t{c.kv_heads}, int64_t{c.head_dim},
                          int64_t{c.hidden}, int64_t{c.intermediate}, int64_t{c.vocab}, c.max_positions,
                          int64_t{c.tied_embeddings}, c.sliding_window, int64_t{static_cast<uint8_t>(c.rope_layout)}}) {
    out->Int(v);
  }
  out->Float(static_cast<double>(c.rms_eps));
  out->Float(c.rope_theta);
  const RopeScaling& s = c.rope_scaling;
  out->Int(static_cast<uint8_t>(s.type));
  for (const double v : {s.factor, s.low_freq_factor, s.high_freq_factor, s.beta_fast, s.beta_slow, s.mscale,
                         s.mscale_all_dim, s.attention_factor.value_or(-1)}) {
    out->Float(v);
  }
  out->Int(s.original_max_positions);
  out->Int(s.truncate);
  out->Floats(s.short_factor);
  out->Floats(s.long_factor);
  out->Floats(c.rope_freq_factors);
}

// All weights in one order: shapes go to the canonical bytes, contents to pieces.
class WeightList {
 public:
  explicit WeightList(Canonical* canonical) : canonical_(canonical) {}
  std::span<const std::span<const std::byte>> pieces() const { return pieces_; }

  void Add(const WeightMatrix& m) {
    canonical_->Int(static_cast<uint8_t>(m.type));
    canonical_->Int(m.rows);
    canonical_->Int(m.cols);
    AddBytes({m.data, m.row_bytes * static_cast<size_t>(m.rows)});
  }
  void Add(const std::vector<float>& v) {
    canonical_->Int(static_cast<int64_t>(v.size()));
    AddBytes(std::as_bytes(std::span(v)));
  }
  void AddModel(const Model& model) {
    Add(model.embedding);
    if (!model.config.tied_embeddings) Add(model.output);
    Add(model.output_norm);
    for (const LayerWeights& w : model.layers) {
      for (const auto* m : {&w.q, &w.k, &w.v, &w.o, &w.gate, &w.up, &w.down}) Add(*m);
      for (const auto* v : {&w.attention_norm, &w.ffn_norm, &w.q_bias, &w.k_bias, &w.v_bias, &w.o_bias, &w.q_norm,
                            &w.k_norm}) {
        Add(*v);
      }
    }
  }

 private:
  void AddBytes(std::span<const std::byte> bytes) {
    for (size_t at = 0; at < bytes.size(); at += kPieceBytes) {
      pieces_.push_back(bytes.subspan(at, std::min(kPieceBytes, bytes.size() - at)));
    }
  }
  Canonical* canonical_;
  std::vector<std::span<const std::byte>> pieces_;
};

}  // namespace

Result<std::array<uint8_t, 32>> FingerprintOf(const Model& model, Executor& executor) {
  Canonical canonical;
  canonical.Text(kFormat);
  AppendConfig(model.config, &canonical);
  WeightList weights(&canonical);
  weights.AddModel(model);
  const auto pieces = weights.pieces();
  std::vector<Digest> digests(pieces.size());
  std::atomic<bool> ok{true};
  executor.ParallelFor(static_cast<int64_t>(pieces.size()), [&](int64_t i) {
    const auto index = static_cast<size_t>(i);
    if (!Sha256(pieces[index], &digests[index])) ok.store(false, std::memory_order_relaxed);
  });
  canonical.Bytes(digests.data(), digests.size() * sizeof(Digest));
  Digest fingerprint;
  if (!ok.load() || !Sha256(canonical.bytes(), &fingerprint)) {
    return {StatusCode::kInvalid, "SHA-256 is not available from the crypto library; is a restricted provider set?"};
  }
  return fingerprint;
}

}  // namespace prehoc::reference::loader
