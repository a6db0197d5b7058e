#include "selector/reference.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <limits>
#include <numeric>
#include <set>

#include "base/check.h"
#include "base/half.h"
#include "selector/selector.h"

namespace prehoc {
namespace {
constexpr double kInfinity = std::numeric_limits<double>::infinity();
using Positions = std::vector<int32_t>;  // sorted unless said otherwise

double LogSumExp(const std::vector<double>& values) {
  double most = -kInfinity;
  for (const double value : values) most = std::max(most, value);
  if (most == -kInfinity) return most;
  double sum = 0;
  for (const double value : values) sum += std::exp(value - most);
  return most + std::log(sum);
}

// What a step can see at all, in three disjoint pieces and in order: [0, sinks), [lo, hi), [hi, n).
struct Sight {
  int32_t sinks = 0, lo = 0, hi = 0, n = 0;

  Positions All() const {
    Positions all(static_cast<size_t>(sinks));
    std::iota(all.begin(), all.end(), 0);
    for (int32_t i = lo; i < n; ++i) all.push_back(i);
    return all;
  }
  bool InMiddle(int64_t i) const { return i >= lo && i < hi; }
};

// What a choice found, sorted.
struct Chosen {
  Positions plain, dilated;
  bool retrieval = true;  // everything in sight was scored for it
};

// Who decides together: the query heads of a KV head, or (gqa_set = per_query_head) one of them.
struct Unit {
  int32_t first_head = 0, heads = 0, kv_head = 0;
  bool has_set = false;
  int64_t chosen_at = 0;   // step
  int32_t local_left = 0;  // first local position at that step
  std::vector<float> anchor, anchor_pre;  // [heads, head_dim]
  Positions middle;
  std::vector<double> lse_dropped;  // [heads]: L_D
  std::vector<double> dropped;  // [heads], of the choice when it was made
  // Shared candidates: what is resident now, and what will be.
  std::deque<std::vector<double>> scans;  // scores by position, oldest first
  Positions candidates, next_candidates;
  int32_t edge = 0, next_edge = 0;  // positions from here on were local at the refresh, and stay
  int64_t next_at = -1;
};
}  // namespace

std::vector<double> ReferenceLogits(std::span<const float> q, std::span<const float> keys, int32_t head_dim) {
  const auto dim = static_cast<size_t>(head_dim);
  std::vector<double> z;
  for (size_t h = 0; h < q.size() / dim; ++h) {
    for (size_t i = 0; i < keys.size() / dim; ++i) {
      double dot = 0;
      for (size_t c = 0; c < dim; ++c) dot += static_cast<double>(q[h * dim + c]) * keys[i * dim + c];
      z.push_back(dot / std::sqrt(static_cast<double>(head_dim)));
    }
  }
  return z;
}

std::vector<double> ReferencePageBounds(std::span<const float> q, std::span<const float> keys, int32_t head_dim,
                                        int32_t page) {
  const auto dim = static_cast<size_t>(head_dim), size = static_cast<size_t>(page);
  const size_t n = keys.size() / dim;
  std::vector<double> bounds;
  for (size_t h = 0; h < q.size() / dim; ++h) {
    for (size_t i = 0; i < n; ++i) {
      double sum = 0;
      for (size_t c = 0; c < dim; ++c) {
        double most = -kInfinity;  // of q_c k_c over the page: the larger of those at the two ends
        for (size_t j = i / size * size; j < std::min(n, i / size * size + size); ++j) {
          most = std::max(most, static_cast<double>(q[h * dim + c]) * keys[j * dim + c]);
        }
        sum += most;
      }
      bounds.push_back(sum / std::sqrt(static_cast<double>(head_dim)));
    }
  }
  return bounds;
}

std::vector<int32_t> ReferenceChannels(std::span<const float> queries, std::span<const float> keys, int32_t head_dim,
                                       int32_t count) {
  const auto dim = static_cast<size_t>(head_dim);
  std::vector<double> q(dim, 0), k(dim, 0);
  for (size_t i = 0; i < queries.size(); ++i) q[i % dim] += std::abs(queries[i]);
  for (size_t i = 0; i < keys.size(); ++i) k[i % dim] += std::abs(keys[i]);
  std::vector<int32_t> channels(dim);
  std::iota(channels.begin(), channels.end(), 0);
  std::stable_sort(channels.begin(), channels.end(), [&](int32_t a, int32_t b) {
    const auto at = static_cast<size_t>(a), bt = static_cast<size_t>(b);
    return q[at] * k[at] > q[bt] * k[bt];
  });
  channels.resize(static_cast<size_t>(count));
  return channels;
}

namespace {
// As stored and read back: the step of a key's label is kept as fp16.
std::vector<float> Label(std::span<const float> vector, std::span<const int32_t> channels, int32_t bits, bool key) {
  std::vector<float> label;
  for (const int32_t c : channels) label.push_back(vector[static_cast<size_t>(c)]);
  if (bits == 16) return label;
  const auto [least, most] = std::minmax_element(label.begin(), label.end());
  const float lo = *least;
  float step = (*most - lo) / 15;
  if (key) step = HalfToFloat(FloatToHalf(step));
  for (float& x : label) x = step > 0 ? lo + std::min(15.0f, std::floor((x - lo) / step + 0.5f)) * step : lo;
  return label;
}
}  // namespace

std::vector<double> ReferenceLabelScores(std::span<const float> q, std::span<const float> keys, int32_t head_dim,
                                         std::span<const int32_t> channels, int32_t bits) {
  const auto dim = static_cast<size_t>(head_dim);
  std::vector<std::vector<float>> of_keys;
  for (size_t i = 0; i < keys.size(); i += dim) of_keys.push_back(Label(keys.subspan(i, dim), channels, bits, true));
  std::vector<double> scores;
  for (size_t h = 0; h < q.size(); h += dim) {
    const std::vector<float> of_query = Label(q.subspan(h, dim), channels, bits, false);
    for (const auto& key : of_keys) {
      double dot = 0;
      for (size_t c = 0; c < key.size(); ++c) dot += static_cast<double>(of_query[c]) * key[c];
      scores.push_back(dot / std::sqrt(static_cast<double>(channels.size())));
    }
  }
  return scores;
}

struct ReferenceTrace::Impl {
  const SelectorOptions options;
  const ReferenceShape shape;
  const bool all_resident;
  std::vector<Unit> units;
  int64_t last_step = -1, last_n = 0;
  // hshare.
  const Impl* source = nullptr;          // the layer that this one borrows from
  std::vector<size_t> head_source;       // by unit; empty: all choose
  std::vector<std::vector<Positions>> prompt_sets;  // [rows][units]

  bool is_cis() const { return options.kind == SelectorKind::kCis || options.kind == SelectorKind::kCpe; }
  bool is_sc() const { return options.kind == SelectorKind::kSharedCandidates; }
  bool is_tc() const { return options.kind == SelectorKind::kTwoClock; }
  bool is_quest() const { return options.kind == SelectorKind::kQuest; }
  bool is_hshare() const { return options.kind == SelectorKind::kHShare; }

  // PSAW's edge. Layers count from 1, or from 0 by psaw.layer_base.
  int32_t Edge(int64_t n) const {
    const PsawOptions& psaw = options.psaw;
    if (options.kind != SelectorKind::kPsaw && options.kind != SelectorKind::kCpe) return 0;
    if (psaw.phase == PsawOptions::Phase::kPrefill || psaw.phase == PsawOptions::Phase::kOff) return 0;
    const double l = psaw.layer_base_one ? shape.layer + 1 : shape.layer;
    const double l_s = psaw.l_s * shape.layers;
    if (l < l_s) return 0;
    const double x = (l - l_s) / (shape.layers - l_s);
    const double cut = std::floor((1 - std::pow(psaw.c, x)) * static_cast<double>(n) + 1e-9);
    const auto edge = static_cast<int32_t>(std::max(0.0, std::min(cut, static_cast<double>(n - options.budget.local))));
    return edge / psaw.round * psaw.round;
  }

  Sight Look(int64_t n64) const {
    const auto n = static_cast<int32_t>(n64);
    const Budget& budget = options.budget;
    if (is_quest()) {
      const int32_t page = options.quest.page, sinks = options.quest.sinks * page, last = std::max(0, n - 1) / page * page;
      return last < sinks ? Sight{n, n, n, n} : Sight{sinks, sinks, last, n};
    }
    if (n < int64_t{budget.sinks} + budget.local) return {n, n, n, n};
    const int32_t edge = Edge(n);
    Sight sight{budget.sinks, std::max(budget.sinks, edge), n - budget.local, n};
    if (!options.psaw.keep_sink && edge > 0 && edge >= budget.sinks) sight.sinks = 0;
    return sight;
  }

  double Z(const ReferenceInput& in, int32_t head, int32_t i) const {
    const double z = in.z[static_cast<size_t>(head) * static_cast<size_t>(in.n) + static_cast<size_t>(i)];
    return is_cis() && options.cis.half_logits ? HalfToFloat(FloatToHalf(static_cast<float>(z))) : z;
  }
  double Error(const ReferenceInput& in, int32_t head, int32_t i) const {
    return in.err.empty() ? 0 : in.err[static_cast<size_t>(head) * static_cast<size_t>(in.n) + static_cast<size_t>(i)];
  }
  double Lse(const ReferenceInput& in, int32_t head, const Positions& at, double errors = 0) const {
    std::vector<double> values;
    for (const int32_t i : at) values.push_back(Z(in, head, i) + errors * Error(in, head, i));
    return LogSumExp(values);
  }

  // Quest: all pages of the budget, the last one included, but no fewer than three.
  int64_t Pages(int64_t n) const {
    const Budget& budget = options.budget;
    const int64_t total = budget.tokens > 0 ? budget.tokens
                                            : static_cast<int64_t>(std::floor(budget.fraction * static_cast<double>(n) + 1e-9));
    return std::max<int64_t>(3, total / options.quest.page);
  }

  // What orders a position.
  double Rankable(const ReferenceInput& in, int32_t head, int32_t i) const {
    return in.scores.empty() ? Z(in, head, i)
                             : in.scores[static_cast<size_t>(head) * static_cast<size_t>(in.n) + static_cast<size_t>(i)];
  }

  // What CIS ranks by, with the other group rules of cis.gqa_set. By position; only the middle is filled. Weights are
  // shares of the mass of `scored`.
  std::vector<double> Scores(const Unit& unit, const Sight& sight, const ReferenceInput& in,
                             const Positions& scored) const {
    using Rule = CisOptions::GqaSet;
    const Rule rule = is_cis()      ? options.cis.gqa_set
                      : is_quest()  ? options.quest.gqa_set
                      : is_hshare() ? options.hshare.gqa_set
                                    : Rule::kMaxWeight;
    std::vector<double> scores(static_cast<size_t>(sight.hi), -kInfinity);
    std::vector<double> lse;
    for (int32_t h = 0; h < unit.heads; ++h) {
      std::vector<double> values;
      for (const int32_t i : scored) values.push_back(Rankable(in, unit.first_head + h, i));
      lse.push_back(LogSumExp(values));
    }
    for (int32_t i = sight.lo; i < sight.hi; ++i) {
      std::vector<double> of_heads;
      for (int32_t h = 0; h < unit.heads; ++h) {
        const double z = Rankable(in, unit.first_head + h, i);
        of_heads.push_back(rule == Rule::kMaxLogit ? z : z - lse[static_cast<size_t>(h)]);
      }
      scores[static_cast<size_t>(i)] = rule == Rule::kMeanWeight ? LogSumExp(of_heads)
                                                                 : *std::max_element(of_heads.begin(), of_heads.end());
    }
    return scores;
  }

  // Best first, ties to the lower position.
  static Positions Rank(const std::vector<double>& scores, Positions candidates) {
    std::stable_sort(candidates.begin(), candidates.end(), [&](int32_t a, int32_t b) {
      return scores[static_cast<size_t>(a)] > scores[static_cast<size_t>(b)];
    });
    return candidates;
  }
  static Positions First(const Positions& ranked, size_t count) {
    return {ranked.begin(), ranked.begin() + static_cast<std::ptrdiff_t>(std::min(count, ranked.size()))};
  }
  static Positions Sorted(Positions positions) {
    std::sort(positions.begin(), positions.end());
    return positions;
  }

  Positions With(const Sight& sight, const Positions& middle, int32_t local_left) const {
    std::set<int32_t> all(middle.begin(), middle.end());
    for (int32_t i = 0; i < sight.sinks; ++i) all.insert(i);
    for (int32_t i = std::max(local_left, sight.lo); i < sight.n; ++i) all.insert(i);
    return {all.begin(), all.end()};
  }
  static Positions Without(const Positions& all, const Positions& some) {
    Positions rest;
    std::set_difference(all.begin(), all.end(), some.begin(), some.end(), std::back_inserter(rest));
    return rest;
  }

  // How many of `ranked` it takes, from `least` to `most`, until every head's dropped mass of `scored` is at most
  // `target`: by estimate (errors = 0), or at worst (errors = 1).
  struct Goal {
    double target = 0, errors = 0;
    size_t least = 0, most = 0;
  };
  size_t UntilMass(const Unit& unit, const Sight& sight, const ReferenceInput& in, const Positions& ranked,
                   const Positions& scored, const Goal& goal) const {
    const size_t most = std::min(goal.most, ranked.size());
    for (size_t count = std::min(goal.least, most);; ++count) {
      const Positions kept = With(sight, First(ranked, count), sight.hi);
      const Positions rest = Without(scored, kept);
      bool met = true;
      for (int32_t h = unit.first_head; h < unit.first_head + unit.heads; ++h) {
        const double out = Lse(in, h, rest, goal.errors), in_set = Lse(in, h, kept, -goal.errors);
        const double dropped = rest.empty() ? 0 : 1 / (1 + std::exp(in_set - out));
        met = met && dropped <= goal.target;
      }
      if (met || count == most) return count;
    }
  }

  static size_t CountMiddle(const std::set<int32_t>& set, const Sight& sight) {
    return static_cast<size_t>(std::count_if(set.begin(), set.end(), [&](int32_t i) { return sight.InMiddle(i); }));
  }

  // Dilation, and CIS*.
  Positions Dilate(const Sight& sight, const Positions& plain_ranked, const Positions& ranked, size_t k) const {
    const CisOptions& cis = options.cis;
    size_t m = 0;
    switch (cis.m) {
      case CisOptions::DilateCount::kCeilThird: m = (k + 2) / 3; break;
      case CisOptions::DilateCount::kFloorThird: m = k / 3; break;
      case CisOptions::DilateCount::kAll: m = k; break;
      case CisOptions::DilateCount::kNone: m = 0; break;
    }
    std::set<int32_t> set;
    const Positions& walk = cis.exact_budget ? ranked : plain_ranked;
    for (size_t i = 0; i < walk.size(); ++i) {
      const auto add = [&](int32_t position) {
        // Neighbours in the local window (cis.clip = visible) are no positions of the middle: they cost no budget now.
        const bool allowed = cis.clip_middle || cis.m == CisOptions::DilateCount::kNone
                                 ? sight.InMiddle(position)
                                 : position >= sight.lo && position < sight.n;
        const bool full = cis.exact_budget && CountMiddle(set, sight) >= k;
        if (allowed && !(full && sight.InMiddle(position))) set.insert(position);
      };
      add(walk[i]);
      for (int32_t j = 1; i < m && j <= cis.r; ++j) {
        add(walk[i] - j);
        add(walk[i] + j);
      }
      if (cis.exact_budget && CountMiddle(set, sight) >= k) break;
    }
    return {set.begin(), set.end()};
  }

  // What shared candidates may choose among.
  Positions Candidates(const Unit& unit, const Sight& sight) const {
    Positions result;
    for (int32_t i = sight.lo; i < sight.hi; ++i) {
      if (!is_sc() || all_resident || options.max_dropped_mass >= 0 || i >= unit.edge ||
          std::binary_search(unit.candidates.begin(), unit.candidates.end(), i)) {
        result.push_back(i);
      }
    }
    return result;
  }

  // The slow clock of shared candidates. True if it turned: everything in sight was scored.
  bool Refresh(Unit* unit, const Sight& sight, const ReferenceInput& in) const {
    const SharedCandidatesOptions& sc = options.sc;
    if (in.step >= unit->next_at && unit->next_at >= 0) {
      unit->candidates = unit->next_candidates;
      unit->edge = unit->next_edge;
      unit->next_at = -1;
    }
    int64_t refresh = sc.refresh;
    if (options.certify_every > 0) refresh = std::min<int64_t>(refresh, options.certify_every);
    const bool first = unit->scans.empty();
    if (!first && in.step % refresh != 0) return false;
    unit->scans.push_back(Scores(*unit, sight, in, sight.All()));
    if (unit->scans.size() > static_cast<size_t>(sc.pool)) unit->scans.pop_front();
    std::vector<double> pooled(static_cast<size_t>(sight.hi), -kInfinity);
    for (const auto& scan : unit->scans) {
      for (size_t i = 0; i < scan.size(); ++i) pooled[i] = std::max(pooled[i], scan[i]);
    }
    Positions middle(static_cast<size_t>(sight.hi - sight.lo));
    std::iota(middle.begin(), middle.end(), sight.lo);
    const auto wanted = static_cast<size_t>(sc.factor * MostRows(in.n));
    Positions best = Sorted(First(Rank(pooled, middle), wanted));
    if (first || sc.lag == 0) {  // nothing is resident before the first refresh: it cannot lag
      unit->candidates = std::move(best);
      unit->edge = sight.hi;
    } else {
      unit->next_candidates = std::move(best);
      unit->next_edge = sight.hi;
      unit->next_at = in.step + sc.lag;
    }
    return true;
  }
  int32_t MostRows(int64_t n) const {
    return options.budget.mass > 0 ? options.budget.MiddleCap(n) : options.budget.MiddleK(n);
  }

  Chosen Select(Unit* unit, const Sight& sight, const ReferenceInput& in) const {
    Chosen chosen;
    chosen.retrieval = !is_sc() || options.max_dropped_mass >= 0;
    if (is_sc()) chosen.retrieval = Refresh(unit, sight, in) || chosen.retrieval;
    const Positions candidates = Candidates(*unit, sight);
    // Page bounds and labels are looked at in the middle alone.
    const bool middle_only = is_quest() || is_hshare();
    const Positions scored = middle_only        ? candidates
                             : chosen.retrieval ? sight.All()
                                                : With(sight, candidates, sight.hi);
    const Positions ranked = Rank(Scores(*unit, sight, in, scored), candidates);
    // The positions of a page have the same score, so whole pages come first.
    const auto k = static_cast<size_t>(is_quest() ? (Pages(in.n) - 1 - options.quest.sinks) * options.quest.page : options.budget.MiddleK(in.n));
    const Positions plain_ranked = First(ranked, HowMany(*unit, sight, in, ranked, scored, k));
    const bool fixed_k = options.max_dropped_mass < 0 && options.budget.mass == 0;
    chosen.plain = Sorted(plain_ranked);
    chosen.dilated = is_cis() && fixed_k ? Dilate(sight, plain_ranked, ranked, k) : chosen.plain;
    return chosen;
  }

  size_t HowMany(const Unit& unit, const Sight& sight, const ReferenceInput& in, const Positions& ranked,
                 const Positions& scored, size_t k) const {
    if (options.max_dropped_mass >= 0) {
      return UntilMass(unit, sight, in, ranked, scored, {options.max_dropped_mass, 1, k, ranked.size()});
    }
    if (options.budget.mass > 0) {
      const auto cap = static_cast<size_t>(options.budget.MiddleCap(in.n));
      return UntilMass(unit, sight, in, ranked, scored, {1 - options.budget.mass, 0, 0, cap});
    }
    return k;
  }

  // The choice becomes the one in force. Its certificate counts the oldest local positions as dropped: they may leave
  // the window within the block.
  void Keep(Unit* unit, const Sight& sight, const ReferenceInput& in, const Chosen& chosen) const {
    const size_t dim = static_cast<size_t>(shape.head_dim);
    const auto slice = [&](std::span<const float> q) {
      const auto part = q.subspan(static_cast<size_t>(unit->first_head) * dim, static_cast<size_t>(unit->heads) * dim);
      return std::vector<float>(part.begin(), part.end());
    };
    unit->has_set = true;
    unit->chosen_at = in.step;
    unit->local_left = sight.hi;
    unit->middle = chosen.dilated;
    unit->anchor = slice(in.q);
    if (!in.q_pre.empty()) unit->anchor_pre = slice(in.q_pre);
    unit->dropped.clear();
    const Positions all = sight.All(), out = Without(all, With(sight, chosen.dilated, sight.hi));
    for (int32_t h = 0; h < unit->heads; ++h) {
      unit->dropped.push_back(out.empty() ? 0 : std::exp(Lse(in, unit->first_head + h, out) - Lse(in, unit->first_head + h, all)));
    }
    unit->lse_dropped.clear();
    if (!is_cis() || options.cis.gate != CisOptions::Gate::kCertified) return;
    Positions outside = Without(sight.All(), With(sight, chosen.dilated, sight.hi));
    if (!options.cis.local_edge_held) {
      for (int32_t i = sight.hi; i < sight.n && i - sight.hi < options.cis.block - 1; ++i) outside.push_back(i);
    }
    for (int32_t h = 0; h < unit->heads; ++h) unit->lse_dropped.push_back(Lse(in, unit->first_head + h, outside, 1));
  }

  // cos of one query head with its anchor; -2 if a norm is zero or not finite.
  double Cosine(const Unit& unit, int32_t head, const ReferenceInput& in) const {
    const bool pre = (is_cis() ? options.cis.cos_stage : options.tc.cos_stage) == CisOptions::CosStage::kPreRope;
    const std::span<const float> q = pre ? in.q_pre : in.q;
    const std::vector<float>& anchor = pre ? unit.anchor_pre : unit.anchor;
    const size_t dim = static_cast<size_t>(shape.head_dim);
    double dot = 0, qq = 0, aa = 0;
    for (size_t c = 0; c < dim; ++c) {
      const double x = q[static_cast<size_t>(head) * dim + c];
      const double a = anchor[static_cast<size_t>(head - unit.first_head) * dim + c];
      dot += x * a;
      qq += x * x;
      aa += a * a;
    }
    const double cosine = dot / (std::sqrt(qq) * std::sqrt(aa));
    if (qq == 0 || aa == 0 || !std::isfinite(cosine)) return -2;
    return std::clamp(cosine, -1.0, 1.0);
  }

  // The gate's figure for one unit, over the heads of its scope. An unusable head spoils it.
  double GateCosine(const Unit& asking, const ReferenceInput& in) const {
    using Scope = CisOptions::GateScope;
    const Scope scope = is_cis() ? options.cis.gate_scope : options.tc.gate_scope;
    double least = 2, sum = 0;
    int32_t count = 0;
    for (const Unit& unit : units) {
      const bool same_kv = unit.kv_head == asking.kv_head;
      const bool same_unit = unit.first_head == asking.first_head;
      const bool in_scope = scope == Scope::kLayer || (scope == Scope::kQueryHead ? same_unit : same_kv);
      if (!in_scope || !unit.has_set) continue;
      for (int32_t h = 0; h < unit.heads; ++h) {
        const double cosine = Cosine(unit, unit.first_head + h, in);
        least = std::min(least, cosine);
        sum += cosine;
        ++count;
      }
    }
    const double own = scope == Scope::kGroupMean && least > -2 ? sum / count : least;
    if (!is_cis() || !options.cis.gate_batch || in.batch.empty()) return own;
    const auto others = in.batch.subspan(static_cast<size_t>(asking.first_head), static_cast<size_t>(asking.heads));
    return std::min(own, *std::min_element(others.begin(), others.end()));
  }

  std::vector<double> Bounds(const Unit& unit, const ReferenceInput& in, const Positions& attended) const {
    const size_t dim = static_cast<size_t>(shape.head_dim);
    std::vector<double> bounds;
    for (int32_t h = 0; h < unit.heads; ++h) {
      const auto at = static_cast<size_t>(h);
      const double u = DroppedLseBound(unit.lse_dropped[at], in.balls[static_cast<size_t>(unit.kv_head)],
                                       std::span(unit.anchor).subspan(at * dim, dim),
                                       in.q.subspan(static_cast<size_t>(unit.first_head + h) * dim, dim));
      bounds.push_back(DroppedMassBound(Lse(in, unit.first_head + h, attended), u));
    }
    return bounds;
  }

  // The mass gate's figure, the worst of the unit's heads.
  double MostMissed(const Unit& unit, const ReferenceInput& in) const {
    const auto dim = static_cast<size_t>(shape.head_dim);
    double most = 0;
    for (int32_t h = 0; h < unit.heads; ++h) {
      double square = 0;
      for (size_t c = 0; c < dim; ++c) {
        const double moved = static_cast<double>(in.q[static_cast<size_t>(unit.first_head + h) * dim + c]) - unit.anchor[static_cast<size_t>(h) * dim + c];
        square += moved * moved * in.variance[static_cast<size_t>(unit.kv_head) * dim + c];
      }
      most = std::max(most, ExpectedMiss(unit.dropped[static_cast<size_t>(h)], std::sqrt(square / shape.head_dim)));
    }
    return most;
  }

  // What an inherited set means at this step.
  Positions Inherited(const Unit& unit, const Sight& sight) const {
    Positions middle = unit.middle;
    if (options.psaw.filter_each_step) std::erase_if(middle, [&](int32_t i) { return i < sight.lo; });
    const bool held = is_cis() ? options.cis.local_edge_held : is_hshare() && !options.hshare.keep_list;
    return With(sight, middle, held ? unit.local_left : sight.hi);
  }

  // True if no gate is asked: no set yet, a block start, or too old.
  bool MustSelect(const Unit& unit, const ReferenceInput& in) const {
    if (!unit.has_set || options.max_dropped_mass >= 0) return true;
    const int64_t age = in.step - unit.chosen_at;
    if (options.certify_every > 0 && age >= options.certify_every) return true;
    if (is_tc()) return age > options.tc.max_age;
    if (is_hshare()) return in.n % options.hshare.steps == 0;
    if (!is_cis()) return true;
    return (in.step + (options.cis.stagger ? shape.layer : 0)) % options.cis.block == 0;
  }

  bool Share(const Unit& unit, const ReferenceInput& in, const Positions& inherited, std::vector<double>* bounds) const {
    if (is_cis() && options.cis.gate == CisOptions::Gate::kCertified) {
      *bounds = Bounds(unit, in, inherited);
      return *std::max_element(bounds->begin(), bounds->end()) <= options.cis.delta_max;
    }
    if (is_hshare()) return true;
    if (is_tc() && options.tc.gate == TwoClockOptions::Gate::kMass) return MostMissed(unit, in) <= options.tc.epsilon;
    const double tau = is_cis() ? options.cis.tau : options.tc.tau;
    if (tau <= -1) return true;
    if (tau >= 1) return false;
    return GateCosine(unit, in) > tau;
  }

  // Of each prompt query, what the units would choose: as many positions as at the last one.
  void ChooseForPrompt(const ReferenceInput& in) {
    prompt_sets.clear();
    for (const ReferenceRow& row : in.rows) {
      ReferenceInput as_step;
      as_step.n = row.n;
      as_step.scores = row.scores;
      const Sight sight = Look(row.n);
      Positions middle(static_cast<size_t>(sight.hi - sight.lo));
      std::iota(middle.begin(), middle.end(), sight.lo);
      std::vector<Positions> sets;
      for (const Unit& unit : units) {
        const Positions ranked = Rank(Scores(unit, sight, as_step, middle), middle);
        sets.push_back(Sorted(First(ranked, static_cast<size_t>(options.budget.MiddleK(in.n)))));
      }
      prompt_sets.push_back(std::move(sets));
    }
  }

  // Time and again the pair that has most in common, of those that still choose.
  static std::vector<size_t> WhoBorrows(const std::vector<std::vector<size_t>>& common, double choosing) {
    const size_t count = common.size();
    std::vector<size_t> from(count);
    std::iota(from.begin(), from.end(), size_t{0});
    size_t still = count;
    // As few as may choose, but at least the share that must.
    const auto must = static_cast<size_t>(std::max(1.0, std::ceil(choosing * static_cast<double>(count) - 1e-9)));
    for (; still > must; --still) {
      std::pair<size_t, size_t> best{0, 0};
      for (size_t i = 0; i < count; ++i) {
        for (size_t j = 0; j < i; ++j) {
          if (from[i] != i || from[j] != j) continue;
          const bool first = best.first == 0;
          if (first || common[i][j] > common[best.first][best.second]) best = {i, j};
        }
      }
      for (size_t& of : from) {
        if (of == best.first) of = best.second;
      }
    }
    return from;
  }

  static size_t Common(const Positions& a, const Positions& b) {
    Positions both;
    std::set_intersection(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(both));
    return both.size();
  }

  void ShareHeads() {
    std::vector<std::vector<size_t>> common(units.size(), std::vector<size_t>(units.size(), 0));
    for (const auto& sets : prompt_sets) {
      for (size_t i = 0; i < units.size(); ++i) {
        for (size_t j = 0; j < i; ++j) common[i][j] += Common(sets[i], sets[j]);
      }
    }
    head_source = WhoBorrows(common, options.hshare.heads);
  }

  // The unit whose choice of this step unit `index` takes; null: it chooses.
  const Unit* SourceOf(size_t index, const ReferenceInput& in) const {
    if (!is_hshare() || in.step == 0 || head_source.empty()) return nullptr;
    if (source != nullptr) {
      PREHOC_CHECK(source->last_step == in.step);
      return &source->units[index];
    }
    return head_source[index] == index ? nullptr : &units[head_source[index]];
  }

  // What the unit attends to, and whether it selected.
  Positions Decide(Unit* unit, const Sight& sight, const ReferenceInput& in, bool shares, bool* selected) const {
    using Fail = CisOptions::OnFail;
    const bool must = MustSelect(*unit, in);
    if (!must && shares) return Inherited(*unit, sight);
    if (!must && is_cis() && options.cis.fail == Fail::kDense) return sight.All();
    Chosen chosen;
    if (const Unit* lender = SourceOf(static_cast<size_t>(unit - units.data()), in)) {
      PREHOC_CHECK(lender->chosen_at == in.step);
      chosen = {lender->middle, lender->middle, false};
    } else {
      chosen = Select(unit, sight, in);
    }
    *selected = chosen.retrieval;
    const bool once = !must && is_cis() && options.cis.fail == Fail::kReselectOnce;
    if (!once) Keep(unit, sight, in, chosen);
    const bool plain = is_cis() && !options.cis.anchor_dilated;
    return With(sight, plain ? chosen.plain : chosen.dilated, sight.hi);
  }

  ReferenceDecision Step(const ReferenceInput& in);
};

ReferenceDecision ReferenceTrace::Impl::Step(const ReferenceInput& in) {
  const auto heads = static_cast<size_t>(shape.heads());
  PREHOC_CHECK(in.step > last_step && in.n >= last_n);
  last_step = in.step;
  last_n = in.n;
  PREHOC_CHECK(in.z.size() == heads * static_cast<size_t>(in.n));
  ReferenceDecision decision;
  decision.attended.resize(heads);
  decision.selected.resize(heads);
  decision.dropped.resize(heads);
  decision.bound.assign(heads, -1);

  const Sight sight = Look(in.n);
  const Budget& budget = options.budget;
  const int64_t most = int64_t{budget.sinks} + budget.MiddleK(in.n) + budget.local;
  const bool chooses = is_cis() || is_tc() || is_sc() || is_quest() || is_hshare() || options.kind == SelectorKind::kOracle;
  const bool few = is_quest() ? (in.n + options.quest.page - 1) / options.quest.page <= Pages(in.n) : in.n <= most;
  const bool dense = few || (!chooses && options.kind != SelectorKind::kWindow) ||
                     (is_quest() && shape.layer < options.quest.dense_layers);
  const bool skips_prompt =
      options.kind == SelectorKind::kOracle || is_quest() || (is_cis() && !options.cis.first_anchor_prompt);

  if (is_hshare() && in.step == 0) {
    head_source.clear();
    source = nullptr;
    if (!dense) {  // a prompt within its budget tells nothing
      ChooseForPrompt(in);
      ShareHeads();
    }
  }

  // Gates are asked before any set changes: one layer-wide gate sees the anchors of all.
  std::vector<bool> shares(units.size());
  std::vector<std::vector<double>> bounds(units.size());
  for (size_t u = 0; u < units.size(); ++u) {
    if (!chooses || dense || in.step == 0 || MustSelect(units[u], in)) continue;
    shares[u] = Share(units[u], in, Inherited(units[u], sight), &bounds[u]);
  }
  for (size_t u = 0; u < units.size(); ++u) {
    Unit& unit = units[u];
    Positions attended;
    bool selected = false;
    if (dense || (in.step == 0 && skips_prompt)) {
      attended = sight.All();
    } else if (options.kind == SelectorKind::kWindow) {
      attended = With(sight, {}, sight.hi - budget.MiddleK(in.n));
    } else {
      attended = Decide(&unit, sight, in, shares[u], &selected);
    }
    const Positions rest = Without(sight.All(), attended);
    for (int32_t h = 0; h < unit.heads; ++h) {
      const int32_t head = unit.first_head + h;
      const auto at = static_cast<size_t>(head);
      decision.selected[at] = selected;
      decision.dropped[at] = rest.empty() ? 0 : std::exp(Lse(in, head, rest) - Lse(in, head, sight.All()));
      if (shares[u] && !bounds[u].empty()) decision.bound[at] = bounds[u][static_cast<size_t>(h)];
      if (in.step > 0) decision.attended[at] = attended;
    }
  }
  return decision;
}

ReferenceTrace::ReferenceTrace(const SelectorOptions& options, const ReferenceShape& shape, bool all_resident)
    : impl_(new Impl{options, shape, all_resident, {}}) {
  PREHOC_CHECK(options.Validate().ok());
  const auto set = impl_->is_quest()    ? options.quest.gqa_set
                   : impl_->is_hshare() ? options.hshare.gqa_set
                                        : options.cis.gqa_set;
  const bool alone = (impl_->is_cis() || impl_->is_quest() || impl_->is_hshare()) && set == CisOptions::GqaSet::kPerQueryHead;
  const int32_t together = alone ? 1 : shape.group;
  for (int32_t head = 0; head < shape.heads(); head += together) {
    Unit unit;
    unit.first_head = head;
    unit.heads = together;
    unit.kv_head = head / shape.group;
    impl_->units.push_back(std::move(unit));
  }
}

ReferenceTrace::~ReferenceTrace() = default;

void ReferenceTrace::ShareLayers(std::span<const std::unique_ptr<ReferenceTrace>> layers) {
  for (const auto& layer : layers) {
    if (layer->impl_->head_source.empty()) return;
  }
  std::vector<std::vector<size_t>> common(layers.size(), std::vector<size_t>(layers.size(), 0));
  for (size_t i = 0; i < layers.size(); ++i) {
    for (size_t j = 0; j < i; ++j) {
      const auto &a = layers[i]->impl_->prompt_sets, &b = layers[j]->impl_->prompt_sets;
      for (size_t row = 0; row < a.size(); ++row) {
        for (size_t u = 0; u < a[row].size(); ++u) common[i][j] += Impl::Common(a[row][u], b[row][u]);
      }
    }
  }
  const std::vector<size_t> from = Impl::WhoBorrows(common, layers.front()->impl_->options.hshare.layers);
  for (size_t i = 0; i < layers.size(); ++i) layers[i]->impl_->source = from[i] == i ? nullptr : layers[from[i]]->impl_.get();
}

ReferenceDecision ReferenceTrace::Step(const ReferenceInput& input) { return impl_->Step(input); }

}  // namespace prehoc
