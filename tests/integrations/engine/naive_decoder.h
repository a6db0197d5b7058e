// The model's formulas in fp64, token by token, with no cache, no batches and no vector code: the truth of the engine.
#pragma once
#include <cmath>
#include <functional>
#include <span>
#include <vector>

#include "integrations/reference/attention_backend.h"
#include "integrations/reference/engine/rope.h"
#include "tests/integrations/engine/random_model.h"

namespace prehoc::reference {

class NaiveDecoder {
 public:
  using Vector = std::vector<double>;
  explicit NaiveDecoder(const Model& model) : m_(model), c_(model.config) {}

  // Logits [tokens][vocab] of a prompt whose layer l follows freeze(l).
  std::vector<Vector> Run(const std::vector<int32_t>& tokens,
                          const std::function<FreezeRule(int32_t)>& freeze = [](int32_t) { return FreezeRule(); }) {
    const size_t n = tokens.size();
    frequencies_ = MakeRopeFrequencies(c_, static_cast<int64_t>(n));
    std::vector<Vector> h(n), k(n), v(n);
    std::vector<std::vector<Vector>> all_k, all_v;  // by layer
    for (size_t t = 0; t < n; ++t) h[t] = Row(m_.embedding, tokens[t]);
    for (int32_t l = 0; l < c_.layers; ++l) {
      const LayerWeights& w = m_.layers[static_cast<size_t>(l)];
      const FreezeRule rule = freeze(l);
      for (size_t t = 0; t < n; ++t) {
        const bool frozen = static_cast<int64_t>(t) < rule.frozen;
        if (!frozen || !rule.reuse_kv || l == 0) {
          const Vector x = Norm(h[t], w.attention_norm);
          k[t] = Heads(Times(w.k, x, w.k_bias), w.k_norm, t);
          v[t] = Times(w.v, x, w.v_bias);
        } else if (rule.reuse_layer >= 0) {
          k[t] = all_k[static_cast<size_t>(rule.reuse_layer)][t];
          v[t] = all_v[static_cast<size_t>(rule.reuse_layer)][t];
        }
        if (!frozen) RunToken(w, t, k, v, h[t]);
      }
      all_k.push_back(k);
      all_v.push_back(v);
    }
    std::vector<Vector> logits(n);
    for (size_t t = 0; t < n; ++t) logits[t] = Times(m_.output, Norm(h[t], m_.output_norm), {});
    return logits;
  }

 private:
  void RunToken(const LayerWeights& w, size_t t, const std::vector<Vector>& k, const std::vector<Vector>& v, Vector& h) {
    const Vector q = Heads(Times(w.q, Norm(h, w.attention_norm), w.q_bias), w.q_norm, t);
    Add(Times(w.o, Attend(q, t, k, v), w.o_bias), h);
    const Vector x = Norm(h, w.ffn_norm);
    Vector gate = Times(w.gate, x, {});
    const Vector up = Times(w.up, x, {});
    for (size_t i = 0; i < gate.size(); ++i) gate[i] = gate[i] / (1 + std::exp(-gate[i])) * up[i];
    Add(Times(w.down, gate, {}), h);
  }
  Vector Attend(const Vector& q, size_t t, const std::vector<Vector>& k, const std::vector<Vector>& v) const {
    const auto d = static_cast<size_t>(c_.head_dim);
    Vector out(q.size());
    for (size_t head = 0; head < static_cast<size_t>(c_.heads); ++head) {
      const size_t from = head / static_cast<size_t>(c_.heads / c_.kv_heads) * d;
      double sum = 0;
      for (size_t i = 0; i <= t; ++i) {
        double z = 0;
        for (size_t j = 0; j < d; ++j) z += q[head * d + j] * k[i][from + j];
        const double e = std::exp(z / std::sqrt(static_cast<double>(d)));
        sum += e;
        for (size_t j = 0; j < d; ++j) out[head * d + j] += e * v[i][from + j];
      }
      for (size_t j = 0; j < d; ++j) out[head * d + j] /= sum;
    }
    return out;
  }
  // QK norm and RoPE of every head of a q or k.
  Vector Heads(Vector x, const std::vector<float>& norm, size_t position) const {
    const auto d = static_cast<size_t>(c_.head_dim);
    for (size_t at = 0; at < x.size(); at += d) {
      if (!norm.empty()) {
        const Vector normed = Norm(Vector(x.begin() + static_cast<std::ptrdiff_t>(at),
                                          x.begin() + static_cast<std::ptrdiff_t>(at + d)), norm);
        std::copy(normed.begin(), normed.end(), x.begin() + static_cast<std::ptrdiff_t>(at));
      }
      for (size_t i = 0; i < d / 2; ++i) {
        const bool half = c_.rope_layout == RopeLayout::kHalf;
        double& a = x[at + (half ? i : 2 * i)];
        double& b = x[at + (half ? i + d / 2 : 2 * i + 1)];
        const double angle = static_cast<double>(position) * static_cast<double>(frequencies_.inverse[i]);
        const double cos = std::cos(angle) * frequencies_.magnitude, sin = std::sin(angle) * frequencies_.magnitude;
        const double x0 = a, x1 = b;
        a = x0 * cos - x1 * sin;
        b = x1 * cos + x0 * sin;
      }
    }
    return x;
  }
  Vector Norm(const Vector& x, const std::vector<float>& weight) const {
    double squares = 0;
    for (const double value : x) squares += value * value;
    const double scale = 1 / std::sqrt(squares / static_cast<double>(x.size()) + c_.rms_eps);
    Vector out(x.size());
    for (size_t i = 0; i < x.size(); ++i) out[i] = x[i] * scale * weight[i];
    return out;
  }
  static Vector Row(const WeightMatrix& w, int64_t r) {
    std::vector<float> row(static_cast<size_t>(w.cols));
    DequantizeRow(w.type, w.row(r), w.cols, row.data());
    return Vector(row.begin(), row.end());
  }
  static Vector Times(const WeightMatrix& w, const Vector& x, const std::vector<float>& bias) {
    Vector y(static_cast<size_t>(w.rows));
    for (size_t r = 0; r < y.size(); ++r) {
      const Vector row = Row(w, static_cast<int64_t>(r));
      y[r] = bias.empty() ? 0 : bias[r];
      for (size_t i = 0; i < x.size(); ++i) y[r] += row[i] * x[i];
    }
    return y;
  }
  static void Add(const Vector& x, Vector& y) {
    for (size_t i = 0; i < x.size(); ++i) y[i] += x[i];
  }

  const Model& m_;
  const ModelConfig& c_;
  RopeFrequencies frequencies_;
};

// The largest difference of a row of logits / the largest magnitude of the truth.
template <class Got, class Want>
double RelativeError(const Got& got, const Want& want) {
  double difference = 0, largest = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    difference = std::max(difference, std::abs(static_cast<double>(got[i]) - static_cast<double>(want[i])));
    largest = std::max(largest, std::abs(static_cast<double>(want[i])));
    if (!std::isfinite(static_cast<double>(got[i]))) return INFINITY;
  }
  return difference / largest;
}

}  // namespace prehoc::reference
