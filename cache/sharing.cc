// HShare's part of the fast clock (docs/selectors/hshare.md): labels of all keys, positions ordered by them, and choices that
// are taken from another head or layer.
#include <algorithm>
#include <cmath>

#include "cache/internal/fast_step.h"
#include "cache/internal/labels.h"
#include "cache/internal/sequence_impl.h"

namespace prehoc {
namespace {
constexpr int64_t kScoredAtOnce = 1024;  // [labels] of one loop body
}

// --- labels -------------------------------------------------------------------------------------------------------------

// The prompt's last queries are kept until it ends: rows of [heads, head_dim], those of the call that is open at the end.
void Sequence::Impl::KeepQueries(LayerState& layer, const LayerInput& in) {
  if (!selector().NeedsLabels()) return;
  const int64_t row = int64_t{geometry().heads} * geometry().head_dim;
  const int64_t most = cache->options.selector.hshare.map_queries;
  // Earlier calls are finished; what this one adds, a rollback takes away again.
  const auto held = static_cast<int64_t>(layer.queries.size()) / row;
  const auto begin = layer.queries.begin();
  if (held > most) layer.queries.erase(begin, begin + static_cast<std::ptrdiff_t>((held - most) * row));
  const int64_t added = std::min(count - in.q_skip, most);
  const float* end = in.q + (count - in.q_skip) * row;
  layer.queries.insert(layer.queries.end(), end - added * row, end);
  layer.queries_end = visible();
}

void Sequence::Impl::ForgetQueries(LayerState& layer) {
  if (layer.queries_end <= length) return;
  const int64_t added = std::min<int64_t>(layer.queries_end - length, cache->options.selector.hshare.map_queries);
  const auto floats = static_cast<size_t>(added * geometry().heads * geometry().head_dim);
  layer.queries.resize(layer.queries.size() - std::min(layer.queries.size(), floats));
  layer.queries_end = length;
}

std::span<const float> Sequence::Impl::LastQueries(const LayerState& layer) const {
  const auto row = static_cast<size_t>(geometry().heads) * static_cast<size_t>(geometry().head_dim);
  const size_t most = static_cast<size_t>(cache->options.selector.hshare.map_queries) * row;
  return std::span(layer.queries).last(std::min(layer.queries.size(), most));
}

// Ranks the channels of every KV head by `queries` (rows as above) and all keys, and labels the keys anew.
Status Sequence::Impl::BuildLabels(int32_t layer_index, LayerBlocks& rows, std::span<const float> queries) {
  LayerState& layer = layers[static_cast<size_t>(layer_index)];
  const LabelFormat format = LabelFormat::Of(cache->options.selector.hshare, geometry().head_dim);
  const auto dim = static_cast<size_t>(geometry().head_dim);
  const size_t of_group = static_cast<size_t>(geometry().group()) * dim;
  layer.labelled = 0;
  for (int32_t h = 0; h < geometry().kv_heads; ++h) {
    std::vector<double> of_queries(dim, 0), of_keys(dim, 0);
    const size_t row = static_cast<size_t>(geometry().kv_heads) * of_group;
    for (size_t at = static_cast<size_t>(h) * of_group; at < queries.size(); at += row) {
      for (size_t i = 0; i < of_group; ++i) of_queries[i % dim] += std::abs(queries[at + i]);
    }
    for (int64_t i = 0; i < visible(); ++i) {
      PREHOC_ASSIGN_OR_RETURN(const Half* key, rows.WideRow(i, h));
      for (size_t c = 0; c < dim; ++c) of_keys[c] += std::abs(HalfToFloat(key[c]));
    }
    layer.heads[static_cast<size_t>(h)].channels = RankChannels(of_queries, of_keys, format.channels);
  }
  return LabelRows(layer_index, rows, visible());
}

// Labels of the rows up to `end`, once the channels are known.
Status Sequence::Impl::LabelRows(int32_t layer_index, LayerBlocks& rows, int64_t end) {
  LayerState& layer = layers[static_cast<size_t>(layer_index)];
  if (!selector().NeedsLabels() || layer.heads.front().channels.empty()) return {};
  const LabelFormat format = LabelFormat::Of(cache->options.selector.hshare, geometry().head_dim);
  for (int32_t h = 0; h < geometry().kv_heads; ++h) {
    HeadState& head = layer.heads[static_cast<size_t>(h)];
    for (int64_t i = layer.labelled; i < end; ++i) {
      PREHOC_ASSIGN_OR_RETURN(const Half* key, rows.WideRow(i, h));
      EncodeLabel(format, head.channels, key, head.labels + static_cast<size_t>(i) * format.bytes());
    }
  }
  layer.labelled = end;
  return {};
}

// z of the middle, for the units that choose. The labels of a KV head are read once for all of its query heads that do.
Status Sequence::Impl::ScoreByLabels(FastStep& s) {
  LayerState& layer = layers[static_cast<size_t>(s.layer)];
  if (layer.heads.front().channels.empty()) {  // decode without a prompt
    PREHOC_RETURN_IF_ERROR(BuildLabels(
        s.layer, *s.blocks, {s.in.q, static_cast<size_t>(geometry().heads) * static_cast<size_t>(geometry().head_dim)}));
  }
  const LabelFormat format = LabelFormat::Of(cache->options.selector.hshare, geometry().head_dim);
  const int64_t lo = s.rule.lo, hi = s.n - s.rule.local;
  PREHOC_CHECK(hi <= layer.labelled);
  struct Task {
    const HeadState* head = nullptr;
    std::vector<int32_t> heads;
    std::vector<float> queries;  // [heads, channels]
  };
  std::vector<Task> tasks(layer.heads.size());
  for (size_t i = 0; i < layer.units.size(); ++i) {
    if (s.units[i].way != Way::kSelect) continue;
    const Unit& unit = layer.units[i];
    Task& task = tasks[static_cast<size_t>(unit.kv_head)];
    task.head = &layer.heads[static_cast<size_t>(unit.kv_head)];
    for (int32_t h = unit.first_head; h < unit.first_head + unit.heads; ++h) {
      const std::vector<float> query = QueryLabel(format, task.head->channels, s.in.q + int64_t{h} * geometry().head_dim);
      task.queries.insert(task.queries.end(), query.begin(), query.end());
      task.heads.push_back(h);
    }
  }
  const int64_t pieces = CeilDiv(hi - lo, kScoredAtOnce);
  cache->resources.executor->ParallelFor(static_cast<int64_t>(tasks.size()) * pieces, [&](int64_t i) {
    const Task& task = tasks[static_cast<size_t>(i / pieces)];
    const int64_t begin = lo + i % pieces * kScoredAtOnce, num = std::min(kScoredAtOnce, hi - begin);
    std::vector<float> scores(task.heads.size() * static_cast<size_t>(num));
    if (task.heads.empty()) return;
    ScoreLabels(format, task.head->labels + static_cast<size_t>(begin) * format.bytes(), num, task.queries, scores.data(), num);
    for (size_t h = 0; h < task.heads.size(); ++h) {
      std::copy_n(scores.data() + static_cast<int64_t>(h) * num, num, z(task.heads[h]) + begin);
    }
  });
  for (const Task& task : tasks) {
    if (!task.heads.empty()) step_report.bytes_codes += (hi - lo) * static_cast<int64_t>(format.bytes());
  }
  return {};
}

// --- who borrows ----------------------------------------------------------------------------------------------------------

// At the end of the prompt: what every head would have chosen for its last queries, and whom each resembles most.
Status Sequence::Impl::FindSources(FastStep& s) {
  LayerState& layer = layers[static_cast<size_t>(s.layer)];
  const HShareOptions& hshare = cache->options.selector.hshare;
  const std::span<const float> queries = LastQueries(layer);
  const auto row = static_cast<size_t>(geometry().heads) * static_cast<size_t>(geometry().head_dim);
  const int64_t num_rows = static_cast<int64_t>(queries.size() / row);
  const auto num_units = static_cast<int32_t>(layer.units.size());
  layer.prompt_sets.assign(layer.units.size(), {});
  const int32_t n = s.n;
  const float* const q = s.in.q;
  for (int64_t r = 0; r < num_rows; ++r) {
    s.n = static_cast<int32_t>(visible() - num_rows + r + 1);
    s.in.q = queries.data() + static_cast<size_t>(r) * row;
    const bool any = s.n - s.rule.local > s.rule.lo;
    if (any) PREHOC_RETURN_IF_ERROR(ScoreByLabels(s));
    if (any) PREHOC_RETURN_IF_ERROR(Choose(s, /*plain=*/false));
    for (size_t i = 0; i < layer.units.size(); ++i) {
      layer.prompt_sets[i].push_back(any ? s.units[i].chosen : std::vector<int32_t>{});
    }
  }
  s.n = n;
  s.in.q = q;
  std::vector<int64_t> common(layer.units.size() * layer.units.size(), 0);
  for (size_t i = 0; i < layer.units.size(); ++i) {
    for (size_t j = 0; j < i; ++j) {
      for (size_t r = 0; r < static_cast<size_t>(num_rows); ++r) {
        common[i * layer.units.size() + j] += InCommon(layer.prompt_sets[i][r], layer.prompt_sets[j][r]);
      }
    }
  }
  layer.head_source = GreedyBorrowMap(common, num_units, Borrowers(hshare.heads, num_units));
  return {};
}

// The same for layers, when the last one has chosen. Their sets are not needed any more then.
void Sequence::Impl::FindLayerSources() {
  const auto num_layers = static_cast<int32_t>(layers.size());
  std::vector<int64_t> common(layers.size() * layers.size(), 0);
  cache->resources.executor->ParallelFor(num_layers, [&](int64_t index) {
    const auto i = static_cast<size_t>(index);
    for (size_t j = 0; j < i; ++j) {
      const auto &a = layers[i].prompt_sets, &b = layers[j].prompt_sets;
      for (size_t u = 0; u < a.size(); ++u) {
        for (size_t r = 0; r < std::min(a[u].size(), b[u].size()); ++r) {
          common[i * layers.size() + j] += InCommon(a[u][r], b[u][r]);
        }
      }
    }
  });
  layer_source = GreedyBorrowMap(common, num_layers, Borrowers(cache->options.selector.hshare.layers, num_layers));
  for (LayerState& layer : layers) layer.prompt_sets.clear();
}

// --- borrowing ------------------------------------------------------------------------------------------------------------

const Unit* Sequence::Impl::SourceOf(const FastStep& s, size_t index) const {
  const auto at = static_cast<size_t>(s.layer);
  if (!s.rule.borrows || layer_source.empty()) return nullptr;
  if (layer_source[at] != s.layer) return &layers[static_cast<size_t>(layer_source[at])].units[index];
  const auto source = static_cast<size_t>(layers[at].head_source[index]);
  return source == index ? nullptr : &layers[at].units[source];
}

// Who would choose, but has a source, does not.
void Sequence::Impl::MarkBorrowers(FastStep& s) {
  for (size_t i = 0; i < s.units.size(); ++i) {
    if (s.units[i].way == Way::kSelect && SourceOf(s, i) != nullptr) s.units[i].way = Way::kBorrow;
  }
}

// Sources have chosen: they come before those who borrow, in the layer and among the layers.
void Sequence::Impl::TakeBorrowed(FastStep& s) {
  for (size_t i = 0; i < s.units.size(); ++i) {
    if (s.units[i].way != Way::kBorrow) continue;
    const Unit* source = SourceOf(s, i);
    PREHOC_CHECK(source != nullptr && source->chosen_at == s.u);
    s.units[i].chosen = source->chosen;
    Keep(s, i);
  }
}

}  // namespace prehoc
