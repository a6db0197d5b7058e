// The methods are told twice: as rules, carried out by RuleTrace, and step by step, in reference.cc. Random settings
// over random layers must give the same decisions.
#include <algorithm>
#include <map>

#include "tests/selector/rule_trace.h"
#include "tests/selector/selector_test_util.h"
#include "tests/support/seeded_rng.h"

namespace prehoc {
namespace {

struct Choice {
  const char* knob;
  std::vector<const char*> values;
};

const std::vector<Choice>& Choices() {
  static const auto* const choices = new std::vector<Choice>{
      {"budget", {"20", "30", "70", "1/4", "1/8", "mass(0.8,cap=30)", "mass(0.95,cap=1/2)", "mass(0.3)"}},
      {"budget.sinks", {"0", "1", "4"}},
      {"budget.local", {"1", "3", "8", "12"}},
      {"max_dropped_mass", {"off", "off", "off", "0.2", "0.02"}},
      {"certify_every", {"0", "0", "0", "1", "3", "7"}},
      {"cis.block", {"1", "3", "8", "16"}},
      {"cis.tau", {"-1", "0", "0.5", "0.8", "0.9", "1"}},
      {"cis.cos_stage", {"post_rope", "pre_rope"}},
      {"cis.gate_scope", {"kv_head", "query_head", "group_mean", "layer"}},
      {"cis.gate_batch", {"sequence", "batch"}},
      {"cis.fail", {"reselect", "reselect_once", "dense"}},
      {"cis.phase", {"aligned", "staggered"}},
      {"cis.first_anchor", {"prompt", "decode"}},
      {"cis.anchor_attends", {"dilated", "plain"}},
      {"cis.m", {"ceil(k/3)", "floor(k/3)", "k", "0"}},
      {"cis.r", {"0", "1", "2"}},
      {"cis.clip", {"middle", "visible"}},
      {"cis.gqa_set", {"max_weight", "mean_weight", "max_logit", "per_query_head"}},
      {"cis.precision", {"f32", "f32", "f16"}},
      {"cis.local_edge", {"slides", "held"}},
      {"cis.budget", {"cis", "cis*"}},
      {"cis.gate", {"cosine", "cosine", "certified"}},
      {"cis.delta_max", {"0.5", "0.95"}},
      {"psaw.phase", {"both", "prefill", "decode", "off"}},
      {"psaw.c", {"0.9", "0.5", "0.1", "1"}},
      {"psaw.l_s", {"0", "1/2", "3/4"}},
      {"psaw.keep_sink", {"true", "false"}},
      {"psaw.layer_base", {"1", "0"}},
      {"psaw.round", {"1", "8"}},
      {"psaw.cis_filter", {"select", "step"}},
      {"etf.c", {"0.5", "1"}},
      {"tc.tau", {"-1", "0.5", "0.8", "off"}},
      {"tc.cos_stage", {"post_rope", "pre_rope"}},
      {"tc.gate_scope", {"kv_head", "kv_head", "group_mean", "layer"}},
      {"tc.max_age", {"0", "2", "16"}},
      {"sc.factor", {"1", "1.5", "4"}},
      {"sc.refresh", {"1", "4", "16"}},
      {"sc.pool", {"1", "3"}},
      {"sc.lag", {"0", "1", "3"}},
      {"quest.page", {"16", "16", "32"}},
      {"quest.dense_layers", {"0", "0", "2"}},
      {"quest.sinks", {"0", "1", "2"}},
      {"hshare.heads", {"1", "0.75", "1/2", "0.1"}},
      {"hshare.steps", {"1", "2", "5"}},
      {"hshare.list", {"discard", "keep"}},
      {"hshare.gqa_set", {"per_query_head", "per_query_head", "max_weight", "mean_weight", "max_logit"}},
      {"quest.gqa_set", {"per_query_head", "max_weight", "mean_weight", "max_logit"}},
  };
  return *choices;
}

// The largest logit of each page, and something on top.
std::vector<double> PageBounds(const ReferenceInput& input, size_t page, Rng* rng) {
  std::vector<double> bounds(input.z.size());
  const auto n = static_cast<size_t>(input.n);
  for (size_t first = 0; first < bounds.size(); first += n) {
    for (size_t i = 0; i < n; i += page) {
      const auto end = static_cast<std::ptrdiff_t>(first + std::min(n, i + page));
      const auto begin = static_cast<std::ptrdiff_t>(first + i);
      const double bound = *std::max_element(input.z.begin() + begin, input.z.begin() + end) + rng->Uniform(0, 2);
      std::fill(bounds.begin() + begin, bounds.begin() + end, bound);
    }
  }
  return bounds;
}

// Logits, off by something: what labels are.
std::vector<double> LabelScores(std::span<const double> z, Rng* rng) {
  std::vector<double> scores(z.begin(), z.end());
  for (double& score : scores) score += rng->Uniform(-1, 1);
  return scores;
}

std::string Text(const SelectorOptions& options) {
  std::string text;
  for (const std::string& line : options.Describe()) text += line + " ";
  return text;
}

TEST(RulesAgainstReference, AgreeOnRandomSettings) {
  SeededRng rng;
  std::map<std::string_view, int> runs;
  int64_t retrievals = 0, inherited = 0, certified = 0, steps = 0;
  for (int i = 0; i < 1500; ++i) {
    SelectorOptions options = Options(rng.Pick(SelectorKindNames()));
    for (const Choice& choice : Choices()) {
      if (rng.Chance(0.4)) continue;
      ASSERT_OK(options.Set(choice.knob, rng.Pick(choice.values)));
    }
    if (!options.Validate().ok()) continue;
    const ReferenceShape shape{.layer = static_cast<int32_t>(rng.Int(0, 3)),
                               .layers = 4,
                               .kv_heads = static_cast<int32_t>(rng.Int(1, 2)),
                               .group = static_cast<int32_t>(rng.Int(1, 3)),
                               .head_dim = 8};
    const bool all_resident = rng.Chance(0.3);
    SCOPED_TRACE(Text(options) + "layer " + std::to_string(shape.layer) + " heads " + std::to_string(shape.kv_heads) + "x" +
                 std::to_string(shape.group) + (all_resident ? " all resident" : "") + " run " + std::to_string(i));
    ++runs[SelectorKindName(options.kind)];
    RandomLayer layer(&rng, shape, rng.Int(1, 60), /*jump=*/0.1, /*drift=*/rng.Chance(0.5) ? 0.3 : 0.03);
    ReferenceTrace reference(options, shape, all_resident);
    RuleTrace rules(options, shape, all_resident);
    const bool noisy = rng.Chance(0.3), batched = rng.Chance(0.5);
    for (int u = 0; u < 40; ++u) {
      ReferenceInput input = layer.Next();
      std::vector<double> err(noisy ? input.z.size() : 0), batch(batched ? static_cast<size_t>(shape.heads()) : 0);
      for (double& e : err) e = rng.Uniform(0, 0.2);
      for (double& cosine : batch) cosine = rng.Uniform(0.4, 1);
      input.err = err;
      std::vector<double> bounds;
      if (options.kind == SelectorKind::kQuest) {
        bounds = PageBounds(input, static_cast<size_t>(options.quest.page), &rng);
        input.scores = bounds;
      }
      std::vector<ReferenceRow> rows;
      std::vector<std::vector<double>> of_rows;
      if (options.kind == SelectorKind::kHShare) {
        bounds = LabelScores(input.z, &rng);
        input.scores = bounds;
        // Prompt queries that see less and less; each with scores of its own.
        for (int64_t n = input.n; u == 0 && n > 0 && n > input.n - 3; --n) {
          std::vector<double> of_row;
          while (of_row.size() < static_cast<size_t>(shape.heads() * n)) of_row.push_back(rng.Normal() + input.z[of_row.size()]);
          of_rows.push_back(std::move(of_row));
          rows.push_back({n, {}});
        }
        for (size_t r = 0; r < rows.size(); ++r) rows[r].scores = of_rows[r];
        input.rows = rows;
      }
      input.batch = batch;
      const ReferenceDecision want = reference.Step(input), got = rules.Step(input);
      ASSERT_EQ(got.attended, want.attended) << "step " << u;
      ASSERT_EQ(got.selected, want.selected) << "step " << u;
      for (size_t h = 0; h < want.dropped.size(); ++h) {
        ASSERT_NEAR(got.dropped[h], want.dropped[h], 1e-9) << "step " << u;
        ASSERT_NEAR(got.bound[h], want.bound[h], 1e-9) << "step " << u;
        ++steps;
        retrievals += want.selected[h];
        certified += want.bound[h] >= 0;
        inherited += !want.selected[h] && want.dropped[h] > 0;
      }
    }
  }
  // Every kind was met, and every way through a step.
  EXPECT_EQ(runs.size(), SelectorKindNames().size());
  for (const auto& [kind, count] : runs) EXPECT_GT(count, 20) << kind;
  EXPECT_GT(retrievals, steps / 20);
  EXPECT_GT(inherited, steps / 20);
  EXPECT_GT(certified, 50);
}

}  // namespace
}  // namespace prehoc
