// Every selector through the whole pipeline: the same positions as its plain reference says, and exact attention over them,
// whether everything is resident or rows have to be fetched.
#include <gtest/gtest.h>

#include <map>

#include "selector/reference.h"
#include "tests/cache/pipeline_world.h"
#include "tests/support/compare.h"

namespace prehoc {
namespace {

constexpr int64_t kPrompt = 150;
constexpr int64_t kSteps = 40;

struct Case {
  std::string name;
  std::map<std::string, std::string> knobs;  // "selector" apart
  std::string selector;
};

void PrintTo(const Case& c, std::ostream* os) { *os << c.name; }

std::vector<Case> Cases() {
  return {
      {"dense", {}, "dense"},
      {"window", {}, "window"},
      {"oracle", {}, "oracle"},
      {"oracle_fraction", {{"budget", "1/4"}}, "oracle"},
      {"oracle_mass", {{"budget", "mass(0.9,cap=64)"}}, "oracle"},
      {"cis", {}, "cis"},
      {"cis_low_tau", {{"cis.tau", "0.5"}}, "cis"},
      {"cis_always", {{"cis.tau", "-1"}}, "cis"},
      {"cis_never", {{"cis.tau", "1"}}, "cis"},
      {"cis_star", {{"cis.budget", "cis*"}}, "cis"},
      {"cis_plain", {{"cis.r", "0"}}, "cis"},
      {"cis_wide", {{"cis.r", "2"}, {"cis.m", "k"}}, "cis"},
      {"cis_staggered", {{"cis.phase", "staggered"}, {"cis.tau", "-1"}}, "cis"},
      {"cis_decode_anchor", {{"cis.first_anchor", "decode"}}, "cis"},
      {"cis_anchor_plain", {{"cis.anchor_attends", "plain"}, {"cis.tau", "0.5"}}, "cis"},
      {"cis_once", {{"cis.fail", "reselect_once"}, {"cis.tau", "0.5"}}, "cis"},
      {"cis_fail_dense", {{"cis.fail", "dense"}, {"cis.tau", "0.5"}}, "cis"},
      {"cis_per_query_head", {{"cis.gqa_set", "per_query_head"}, {"cis.tau", "0.5"}}, "cis"},
      {"cis_mean", {{"cis.gqa_set", "mean_weight"}}, "cis"},
      {"cis_max_logit", {{"cis.gqa_set", "max_logit"}}, "cis"},
      {"cis_gate_mean", {{"cis.gate_scope", "group_mean"}, {"cis.tau", "0.6"}}, "cis"},
      {"cis_gate_layer", {{"cis.gate_scope", "layer"}, {"cis.tau", "0.3"}}, "cis"},
      {"cis_held", {{"cis.local_edge", "held"}, {"cis.tau", "0.3"}}, "cis"},
      {"cis_held_long", {{"cis.local_edge", "held"}, {"cis.tau", "-1"}, {"cis.block", "60"}, {"local", "40"}, {"budget", "64"}}, "cis"},
      {"cis_certified", {{"cis.gate", "certified"}, {"cis.delta_max", "0.9"}, {"local", "16"}}, "cis"},
      {"cis_visible", {{"cis.clip", "visible"}, {"cis.tau", "0.3"}}, "cis"},
      {"cis_half", {{"cis.precision", "f16"}}, "cis"},
      {"cis_pages", {{"cis.scorer", "pages"}, {"cis.tau", "0.5"}}, "cis"},
      {"psaw", {{"psaw.c", "0.5"}}, "psaw"},
      {"psaw_no_sink", {{"psaw.c", "0.5"}, {"psaw.keep_sink", "false"}}, "psaw"},
      {"etf", {{"etf.c", "0.7"}}, "etf"},
      {"cpe", {{"psaw.c", "0.5"}, {"cis.tau", "0.5"}}, "cpe"},
      {"cpe_filter", {{"psaw.c", "0.5"}, {"cis.tau", "-1"}, {"psaw.cis_filter", "step"}}, "cpe"},
      {"tc_exact", {{"tc.scorer", "exact"}, {"tc.theta", "0"}, {"tc.tau", "0.6"}}, "tc"},
      {"tc_mass", {{"tc.scorer", "exact"}, {"tc.gate", "mass"}, {"tc.epsilon", "0.2"}}, "tc"},
      {"tc_mass_strict", {{"tc.scorer", "exact"}, {"tc.gate", "mass"}, {"tc.epsilon", "0.02"}, {"tc.max_age", "3"}}, "tc"},
      {"tc_exact_old", {{"tc.scorer", "exact"}, {"tc.theta", "0"}, {"tc.tau", "-1"}, {"tc.max_age", "5"}}, "tc"},
      {"tc_exact_off", {{"tc.scorer", "exact"}, {"tc.theta", "0"}, {"tc.tau", "off"}}, "tc"},
      {"tc_certify", {{"tc.scorer", "exact"}, {"tc.theta", "0"}, {"tc.tau", "-1"}, {"certify_every", "3"}}, "tc"},
      {"sc", {}, "sc"},
      {"quest", {{"budget", "64"}, {"quest.dense_layers", "1"}}, "quest"},
      {"quest_fraction", {{"budget", "1/2"}}, "quest"},
      {"quest_sink", {{"budget", "64"}, {"quest.dense_layers", "1"}, {"quest.sinks", "1"}}, "quest"},
      {"quest_shared", {{"budget", "48"}, {"quest.dense_layers", "0"}, {"quest.gqa_set", "max_weight"}}, "quest"},
      {"quest_raw", {{"budget", "48"}, {"quest.dense_layers", "0"}, {"quest.gqa_set", "max_logit"}}, "quest"},
      {"hshare", {}, "hshare"},
      {"hshare_alone", {{"hshare.layers", "1"}, {"hshare.heads", "1"}, {"hshare.steps", "1"}}, "hshare"},
      {"hshare_half", {{"hshare.layers", "1/2"}, {"hshare.heads", "1/2"}, {"hshare.steps", "5"}}, "hshare"},
      {"hshare_fraction", {{"budget", "1/3"}, {"hshare.layers", "0.1"}, {"hshare.steps", "3"}}, "hshare"},
      {"hshare_keep", {{"hshare.list", "keep"}, {"hshare.heads", "1/2"}, {"hshare.steps", "4"}}, "hshare"},
      {"hshare_shared", {{"hshare.gqa_set", "max_weight"}, {"hshare.heads", "1/2"}}, "hshare"},
      {"hshare_mean", {{"hshare.gqa_set", "mean_weight"}, {"hshare.heads", "1/2"}, {"hshare.bits", "16"}}, "hshare"},
      {"hshare_raw", {{"hshare.gqa_set", "max_logit"}, {"hshare.channels", "1/2"}}, "hshare"},
      {"hshare_odd", {{"hshare.channels", "0.32"}, {"hshare.map_queries", "7"}, {"hshare.heads", "1/2"}}, "hshare"},
      {"quest_wide", {{"budget", "100"}, {"quest.dense_layers", "0"}, {"quest.page", "32"}}, "quest"},
      {"max_dropped", {{"tc.scorer", "exact"}, {"tc.theta", "0"}, {"max_dropped_mass", "0.1"}}, "tc"},
  };
}

WorldOptions OptionsOf(const Case& c) {
  WorldOptions options = WorldOptions::Default();
  SelectorOptions& selector = options.cache.selector;
  selector.kind = ParseSelectorKind(c.selector).value();
  for (const auto& [knob, value] : c.knobs) {
    if (knob == "budget") {
      const Budget parsed = Budget::Parse(value).value();
      const Budget before = selector.budget;
      selector.budget = parsed;
      selector.budget.sinks = before.sinks;
      selector.budget.local = before.local;
    } else if (knob == "local") {
      selector.budget.local = std::stoi(value);
    } else {
      const Status status = selector.Set(knob, value);
      EXPECT_TRUE(status.ok()) << status;
    }
  }
  return options;
}

class PipelineSemantics : public testing::TestWithParam<Case> {
 protected:
  // Runs the prompt and the steps, and holds every one against the reference.
  void Check(const WorldOptions& options, bool all_resident) {
    World world(options);
    const KvGeometry geometry = SmallGeometry();
    const Stream stream(geometry, kPrompt + kSteps, 7);
    auto opened = world.cache().Open({.max_tokens = kPrompt + kSteps});
    ASSERT_TRUE(opened.ok()) << opened.status();
    Sequence& sequence = **opened;
    selector_ = options.cache.selector;
    channels_.clear();
    std::vector<std::unique_ptr<ReferenceTrace>> traces;
    for (int32_t l = 0; l < geometry.layers; ++l) {
      ReferenceShape shape{.layer = l, .layers = geometry.layers, .kv_heads = geometry.kv_heads, .group = geometry.group(),
                           .head_dim = geometry.head_dim};
      traces.push_back(std::make_unique<ReferenceTrace>(options.cache.selector, shape, all_resident));
    }
    ASSERT_OK(PrefillAll(sequence, stream, kPrompt, 64));
    for (int32_t l = 0; l < geometry.layers; ++l) Reference(*traces[static_cast<size_t>(l)], stream, l, 0, kPrompt - 1);
    if (GetParam().selector == "hshare") ReferenceTrace::ShareLayers(traces);
    int64_t selected = 0;
    for (int64_t u = 1; u <= kSteps; ++u) {
      Outputs out;
      ASSERT_OK(DecodeOne(sequence, stream, &out));
      ASSERT_OK(sequence.CheckInvariants());
      for (int32_t l = 0; l < geometry.layers; ++l) {
        const ReferenceDecision want = Reference(*traces[static_cast<size_t>(l)], stream, l, u, kPrompt + u - 1);
        selected += Compare(sequence, stream, want, out[static_cast<size_t>(l)], l, u);
        if (testing::Test::HasFailure()) return;
      }
    }
    EXPECT_EQ(sequence.Report().bound_violations, 0);
    EXPECT_LE(world.device().peak(), options.device_budget);
    EXPECT_LE(world.Counter("host.peak_bytes"), static_cast<double>(options.cache.host_budget));
    const bool alone = world.cache().selector().ChoosesPerQueryHead();
    if (GetParam().selector != "sc") {
      EXPECT_EQ(sequence.Report().retrievals, alone ? selected : selected / geometry.group());
    }
    report_ = sequence.Report();
  }

  ReferenceDecision Reference(ReferenceTrace& trace, const Stream& stream, int32_t layer, int64_t u, int64_t t) {
    const KvGeometry& geometry = stream.geometry();
    std::vector<double> z, scores;
    if (GetParam().selector == "hshare") {
      if (u == 0) RankChannels(stream, layer, t);
      scores = LabelScores(stream, layer, t);
    }
    std::vector<KeyBall> balls;
    std::vector<float> variance;
    for (int32_t h = 0; h < geometry.kv_heads; ++h) {
      std::vector<float> keys;
      for (int64_t i = 0; i <= t; ++i) keys.insert(keys.end(), stream.key(layer, i, h), stream.key(layer, i, h) + geometry.head_dim);
      const std::span<const float> of_group(stream.q(layer, t) + h * geometry.group() * geometry.head_dim,
                                            static_cast<size_t>(geometry.group() * geometry.head_dim));
      const auto of_heads = ReferenceLogits(of_group, keys, geometry.head_dim);
      z.insert(z.end(), of_heads.begin(), of_heads.end());
      if (selector_.kind == SelectorKind::kCis && selector_.cis.scorer == Scorer::kPages) BoundWholePages(of_group, keys, &z);
      if (GetParam().selector == "quest") {
        const auto bounds = ReferencePageBounds(of_group, keys, geometry.head_dim, selector_.quest.page);
        scores.insert(scores.end(), bounds.begin(), bounds.end());
      }
      for (int32_t c = 0; c < geometry.head_dim; ++c) {
        double sum = 0, squares = 0;
        for (int64_t i = 0; i <= t; ++i) {
          const double x = stream.key(layer, i, h)[c];
          sum += x, squares += x * x;
        }
        const auto count = static_cast<double>(t + 1);
        variance.push_back(static_cast<float>(squares / count - sum / count * sum / count));
      }
      // The centre is the mean of the first piece, as the pipeline meets it.
      const auto dim = static_cast<size_t>(geometry.head_dim);
      KeyBall ball(std::span<const float>(keys).first(std::min<size_t>(keys.size(), 64 * dim)), geometry.head_dim);
      for (size_t i = 64 * dim; i < keys.size(); i += dim) ball.Add(std::span<const float>(keys).subspan(i, dim));
      balls.push_back(std::move(ball));
    }
    ReferenceInput input;
    input.step = u;
    input.n = t + 1;
    input.z = z;
    input.scores = scores;
    input.q = {stream.q(layer, t), static_cast<size_t>(geometry.heads * geometry.head_dim)};
    input.q_pre = input.q;
    input.balls = balls;
    input.variance = variance;
    std::vector<std::vector<double>> of_rows;
    std::vector<ReferenceRow> rows;
    if (GetParam().selector == "hshare" && u == 0) {
      for (int64_t at = std::max<int64_t>(0, t + 1 - selector_.hshare.map_queries); at <= t; ++at) {
        of_rows.push_back(LabelScores(stream, layer, at));
        rows.push_back({at + 1, {}});
      }
      for (size_t r = 0; r < rows.size(); ++r) rows[r].scores = of_rows[r];
    }
    input.rows = rows;
    return trace.Step(input);
  }

  // In the place of the last logits in `z`, the heads' of `q`: the bounds of whole pages, where neither sinks nor window are.
  void BoundWholePages(std::span<const float> q, std::span<const float> keys, std::vector<double>* z) const {
    const int32_t dim = SmallGeometry().head_dim;
    const auto bounds = ReferencePageBounds(q, keys, dim, 16);
    const size_t n = keys.size() / static_cast<size_t>(dim), window = static_cast<size_t>(selector_.budget.local);
    for (size_t i = 0; i < bounds.size(); ++i) {
      const size_t position = i % n;
      const bool bounded = position >= static_cast<size_t>(selector_.budget.sinks) && position + window < n && position < n / 16 * 16;
      if (bounded) (*z)[z->size() - bounds.size() + i] = bounds[i];
    }
  }

  // [n, head_dim] of positions [0, t].
  static std::vector<float> Keys(const Stream& stream, int32_t layer, int64_t t, int32_t kv_head) {
    std::vector<float> keys;
    for (int64_t i = 0; i <= t; ++i) {
      keys.insert(keys.end(), stream.key(layer, i, kv_head), stream.key(layer, i, kv_head) + stream.geometry().head_dim);
    }
    return keys;
  }
  std::span<const float> Group(const Stream& stream, int32_t layer, int64_t t, int32_t kv_head) {
    const auto floats = static_cast<size_t>(stream.geometry().group() * stream.geometry().head_dim);
    return {stream.q(layer, t) + static_cast<size_t>(kv_head) * floats, floats};
  }
  void RankChannels(const Stream& stream, int32_t layer, int64_t t) {
    const int32_t dim = stream.geometry().head_dim;
    for (int32_t h = 0; h < stream.geometry().kv_heads; ++h) {
      std::vector<float> queries;
      for (int64_t at = std::max<int64_t>(0, t + 1 - selector_.hshare.map_queries); at <= t; ++at) {
        const auto q = Group(stream, layer, at, h);
        queries.insert(queries.end(), q.begin(), q.end());
      }
      channels_[{layer, h}] = ReferenceChannels(queries, Keys(stream, layer, t, h), dim,
                                                static_cast<int32_t>(selector_.hshare.channels * dim + 1e-9));
    }
  }
  std::vector<double> LabelScores(const Stream& stream, int32_t layer, int64_t t) {
    std::vector<double> scores;
    for (int32_t h = 0; h < stream.geometry().kv_heads; ++h) {
      const auto of_group = ReferenceLabelScores(Group(stream, layer, t, h), Keys(stream, layer, t, h), stream.geometry().head_dim,
                                                 channels_[{layer, h}], selector_.hshare.bits);
      scores.insert(scores.end(), of_group.begin(), of_group.end());
    }
    return scores;
  }

  // Returns the number of query heads that selected.
  int64_t Compare(const Sequence& sequence, const Stream& stream, const ReferenceDecision& want, const std::vector<float>& out,
                  int32_t layer, int64_t u) {
    const KvGeometry& geometry = stream.geometry();
    int64_t selected = 0;
    for (int32_t kv = 0; kv < geometry.kv_heads; ++kv) {
      const auto view = sequence.LastStep(LayerId(layer), KvHeadId(kv)).value();
      std::vector<int32_t> together;
      bool any = false;
      for (int32_t h = kv * geometry.group(); h < (kv + 1) * geometry.group(); ++h) {
        const auto& attended = want.attended[static_cast<size_t>(h)];
        together.insert(together.end(), attended.begin(), attended.end());
        any |= want.selected[static_cast<size_t>(h)];
        selected += want.selected[static_cast<size_t>(h)];
        const auto exact = NaiveAttention(stream, layer, kPrompt + u - 1, h, attended);
        const std::span<const float> got(out.data() + h * geometry.head_dim, static_cast<size_t>(geometry.head_dim));
        EXPECT_TRUE(AllClose(got, exact, {2e-5, 2e-5})) << "layer " << layer << " head " << h << " step " << u;
      }
      std::sort(together.begin(), together.end());
      together.erase(std::unique(together.begin(), together.end()), together.end());
      EXPECT_EQ(view.attended, together) << "layer " << layer << " KV head " << kv << " step " << u;
      // Where everything is resident, shared candidates look at everything at every step.
      if (GetParam().selector == "sc") continue;
      EXPECT_EQ(view.selected, any) << "layer " << layer << " KV head " << kv << " step " << u;
    }
    return selected;
  }

  SequenceReport report_;
  SelectorOptions selector_;
  std::map<std::pair<int32_t, int32_t>, std::vector<int32_t>> channels_;  // of (layer, KV head): hshare's labels
};

TEST_P(PipelineSemantics, AllResident) { Check(OptionsOf(GetParam()), true); }

// A device tier with few slots, a host tier with few blocks: what is attended to does not change.
TEST_P(PipelineSemantics, SmallTiers) {
  WorldOptions options = OptionsOf(GetParam());
  options.cache.host_budget = static_cast<uint64_t>(options.cache.geometry.layers + 3) * options.cache.geometry.block_bytes() + 4096 * 8;
  options.device_budget = SmallestDevice(options, kPrompt + kSteps);
  if (GetParam().selector == "sc") GTEST_SKIP() << "what shared candidates choose among depends on the tiers";
  Check(options, true);
  if (HasFailure() || GetParam().selector == "window") return;  // a window lies in the ring: nothing is fetched
  EXPECT_GT(report_.rows_host + report_.rows_disk, 0);
}

INSTANTIATE_TEST_SUITE_P(Selectors, PipelineSemantics, testing::ValuesIn(Cases()),
                         [](const testing::TestParamInfo<Case>& c) { return c.param.name; });

}  // namespace
}  // namespace prehoc
