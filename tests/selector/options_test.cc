// Knobs: each has a name, a default, values that are accepted, values that are refused with what would be accepted, and
// an effect on the options.
#include <algorithm>
#include <cctype>
#include <filesystem>
#include <fstream>
#include <map>
#include <set>

#include "tests/selector/selector_test_util.h"
#include "tests/support/seeded_rng.h"
#include "tests/support/source_paths.h"

namespace prehoc {
namespace {

struct KnobCase {
  const char* name;
  const char* fallback;                // the default, as printed
  std::vector<const char*> accepted;   // as printed, other than the default
  std::vector<const char*> refused;
  const char* users;                   // kinds that use it
};
constexpr char kChoosers[] = "oracle cis cpe sc tc";

// The tables of the methods, one row per knob.
const std::vector<KnobCase>& Cases() {
  static const auto* const cases = new std::vector<KnobCase>{
      {"selector", "tc", {"dense", "window", "oracle", "cis", "psaw", "etf", "cpe", "sc", "quest", "hshare"}, {"", "CIS", "top-k"},
       "dense window oracle cis psaw etf cpe sc tc quest hshare"},
      {"budget", "1/16", {"1/8", "512", "0.15", "mass(0.9,cap=1/4)"}, {"0", "2.0", "mass(2)"}, "window oracle cis cpe sc tc quest hshare"},
      {"budget.sinks", "8", {"0", "4"}, {"-1", "1.5", "1073741825", ""}, "window oracle cis cpe sc tc psaw hshare"},
      {"budget.local", "32", {"1", "64"}, {"0", "-1", "x"}, "window oracle cis cpe sc tc psaw hshare"},
      {"max_dropped_mass", "off", {"0", "0.05", "1"}, {"-1", "1.1", "on", "nan"}, kChoosers},
      {"bound", "none", {"proven", "statistical"}, {"deterministic", "off", ""}, kChoosers},
      {"bound.confidence", "0.999", {"0.5", "0.6", "0.999999"}, {"1", "0.49", "nan", "99%"}, kChoosers},
      {"bound.scope", "head", {"set"}, {"layer", ""}, kChoosers},
      {"certify_every", "0", {"1", "16"}, {"-1", "1.5"}, kChoosers},
      {"cis.block", "16", {"1", "4", "8", "32"}, {"0", "-4", "16.0"}, "cis cpe"},
      {"cis.tau", "0.8", {"0.5", "0.95", "-1", "1", "2"}, {"", "nan", "inf", "high"}, "cis cpe"},
      {"cis.cos_stage", "post_rope", {"pre_rope"}, {"rope"}, "cis cpe"},
      {"cis.gate_scope", "kv_head", {"query_head", "group_mean", "layer"}, {"head"}, "cis cpe"},
      {"cis.gate_batch", "sequence", {"batch"}, {"pooled"}, "cis cpe"},
      {"cis.fail", "reselect", {"reselect_once", "dense"}, {"ignore"}, "cis cpe"},
      {"cis.phase", "aligned", {"staggered"}, {"both"}, "cis cpe"},
      {"cis.first_anchor", "prompt", {"decode"}, {"0"}, "cis cpe"},
      {"cis.anchor_attends", "dilated", {"plain"}, {"all"}, "cis cpe"},
      {"cis.m", "ceil(k/3)", {"floor(k/3)", "k", "0"}, {"k/3", "7"}, "cis cpe"},
      {"cis.r", "1", {"0", "2"}, {"-1", "65"}, "cis cpe"},
      {"cis.clip", "middle", {"visible"}, {"none"}, "cis cpe"},
      {"cis.gqa_set", "max_weight", {"mean_weight", "max_logit", "per_query_head"}, {"max"}, "cis cpe"},
      {"cis.precision", "f32", {"f16"}, {"f64"}, "cis cpe"},
      {"cis.local_edge", "slides", {"held"}, {"fixed"}, "cis cpe"},
      {"cis.budget", "cis", {"cis*"}, {"CIS*"}, "cis cpe"},
      {"cis.scorer", "exact", {"codes", "pages"}, {"none", "labels"}, "cis cpe"},
      {"cis.gate", "cosine", {"certified"}, {"off"}, "cis cpe"},
      {"cis.delta_max", "0.05", {"0", "1"}, {"-0.1", "1.5", "off"}, "cis cpe"},
      {"psaw.phase", "both", {"prefill", "decode", "off"}, {"none"}, "psaw cpe"},
      {"psaw.c", "0.9", {"0.7", "0.5", "1"}, {"0", "1.1", "-1"}, "psaw cpe"},
      {"psaw.l_s", "1/2", {"1/4", "0.75", "0"}, {"1", "-0.1", "15"}, "psaw cpe etf"},
      {"psaw.keep_sink", "true", {"false"}, {"yes", "1"}, "psaw cpe"},
      {"psaw.layer_base", "1", {"0"}, {"2"}, "psaw cpe"},
      {"psaw.round", "1", {"16", "64"}, {"0", "-1", "page"}, "psaw cpe"},
      {"psaw.cis_filter", "select", {"step"}, {"both"}, "cpe"},
      {"psaw.evict", "false", {"true"}, {"1"}, "psaw cpe"},
      {"etf.mode", "carry", {"reuse_kv"}, {"share"}, "etf cpe"},
      {"etf.reuse_from", "start", {"last"}, {"first"}, "etf cpe"},
      {"etf.c", "0.9", {"0.7", "0.5", "1"}, {"0", "2"}, "etf cpe"},
      {"etf.l_s", "psaw", {"1/4", "0.75", "0"}, {"1", "same"}, "etf cpe"},
      {"etf.n", "prompt", {"chunk"}, {"T"}, "etf cpe"},
      {"tc.tau", "0.9", {"off", "0.5", "-1"}, {"nan", "on"}, "tc"},
      {"tc.cos_stage", "post_rope", {"pre_rope"}, {"rope"}, "tc"},
      {"tc.gate_scope", "kv_head", {"group_mean", "layer"}, {"query_head"}, "tc"},
      {"tc.max_age", "16", {"0", "64"}, {"-1"}, "tc"},
      {"tc.scorer", "codes", {"exact"}, {"pages"}, "tc"},
      {"tc.gate", "cosine", {"mass"}, {"certified"}, "tc"},
      {"tc.epsilon", "0.01", {"0", "0.5", "1"}, {"-0.1", "2"}, "tc"},
      {"tc.theta", "auto", {"0", "0.001", "0.002", "0.01", "1"}, {"-0.1", "-1", "1.1"}, "tc"},
      {"tc.factor", "4", {"1", "2", "2.5"}, {"0.5", "1e9", "nan"}, "tc"},
      {"tc.refresh", "0", {"1", "16", "64"}, {"-1"}, "tc"},
      {"tc.pool", "16", {"1"}, {"0"}, "tc"},
      {"tc.lag", "0", {"8"}, {"-1"}, "tc"},
      {"tc.stagger", "true", {"false"}, {"maybe"}, "tc"},
      {"tc.dense_below", "auto", {"0", "65536"}, {"-1", "1/2"}, "tc"},
      {"sc.factor", "4", {"2", "8"}, {"0", "-4"}, "sc"},
      {"sc.refresh", "16", {"64"}, {"0"}, "sc"},
      {"sc.pool", "1", {"16"}, {"0"}, "sc"},
      {"sc.lag", "0", {"4"}, {"-1"}, "sc"},
      {"sc.inner", "exact", {"codes"}, {"pages"}, "sc"},
      {"quest.page", "16", {"32", "64"}, {"0", "8", "17", "128"}, "quest"},
      {"quest.dense_layers", "2", {"0", "4"}, {"-1", "1/2"}, "quest"},
      {"quest.sinks", "0", {"1", "2"}, {"3", "-1"}, "quest"},
      {"quest.gqa_set", "per_query_head", {"max_weight", "mean_weight", "max_logit"}, {"union"}, "quest"},
      {"hshare.layers", "0.75", {"1/2", "1", "0.875"}, {"0", "1.1", "24"}, "hshare"},
      {"hshare.heads", "0.75", {"1/2", "1", "0.875"}, {"0", "1.1", "24"}, "hshare"},
      {"hshare.steps", "2", {"1", "8"}, {"0", "1/2"}, "hshare"},
      {"hshare.channels", "1/4", {"1/8", "1"}, {"0", "16"}, "hshare"},
      {"hshare.bits", "4", {"16"}, {"8", "0"}, "hshare"},
      {"hshare.list", "discard", {"keep"}, {"drop"}, "hshare"},
      {"hshare.map_queries", "32", {"1", "256"}, {"0", "all"}, "hshare"},
      {"hshare.gqa_set", "per_query_head", {"max_weight", "mean_weight", "max_logit"}, {"union"}, "hshare"},
  };
  return *cases;
}

bool Uses(const KnobCase& knob, std::string_view kind) {
  const std::string users = " " + std::string(knob.users) + " ";
  return users.find(" " + std::string(kind) + " ") != std::string::npos;
}

std::map<std::string, std::string> Described(const SelectorOptions& options) {
  std::map<std::string, std::string> knobs;
  for (const std::string& line : options.Describe()) {
    const size_t equals = line.find('=');
    EXPECT_TRUE(knobs.emplace(line.substr(0, equals), line.substr(equals + 1)).second) << line;
  }
  return knobs;
}

std::string_view AnyUser(const KnobCase& knob) {
  const std::string_view users = knob.users;
  return users.substr(0, users.find(' '));
}

TEST(Options, EveryKnobIsInTheTableOfThisTest) {
  std::set<std::string> known;
  for (const KnobCase& knob : Cases()) known.insert(knob.name);
  const std::vector<std::string> names = KnobNames();
  EXPECT_EQ(known, std::set<std::string>(names.begin(), names.end()));
  EXPECT_EQ(known.size(), names.size());
}

TEST(Options, EachKindDescribesTheKnobsItUsesWithTheirDefaults) {
  for (const std::string_view kind : SelectorKindNames()) {
    const auto described = Described(Options(kind));
    for (const KnobCase& knob : Cases()) {
      const auto found = described.find(knob.name);
      ASSERT_EQ(found != described.end(), Uses(knob, kind)) << kind << " " << knob.name;
      if (found == described.end()) continue;
      const std::string_view want = std::string_view(knob.name) == "selector" ? kind : std::string_view(knob.fallback);
      EXPECT_EQ(found->second, want) << kind << " " << knob.name;
    }
  }
}

TEST(Options, AcceptedValuesAreHeldAndPrinted) {
  for (const KnobCase& knob : Cases()) {
    for (const char* value : knob.accepted) {
      if (std::string_view(knob.name) == "selector") continue;  // below
      SelectorOptions options = Options(AnyUser(knob));
      ASSERT_OK(options.Set(knob.name, value)) << knob.name << "=" << value;
      EXPECT_EQ(Described(options)[knob.name], value);
      // Nothing else has moved.
      auto others = Described(options), before = Described(Options(AnyUser(knob)));
      others.erase(knob.name), before.erase(knob.name);
      EXPECT_EQ(others, before) << knob.name << "=" << value;
    }
  }
}

TEST(Options, RefusedValuesNameTheKnobAndChangeNothing) {
  for (const KnobCase& knob : Cases()) {
    for (const char* value : knob.refused) {
      SelectorOptions options = Options(AnyUser(knob));
      const auto before = options.Describe();
      const Status status = options.Set(knob.name, value);
      const bool kind = std::string_view(knob.name) == "selector";
      EXPECT_STATUS(StatusCode::kInvalid, kind ? "nearest" : "accepted", status);
      EXPECT_STATUS(StatusCode::kInvalid, knob.name, status);
      EXPECT_EQ(status.message().find('\n'), std::string::npos);
      EXPECT_EQ(options.Describe(), before) << knob.name << "=" << value;
    }
  }
}

TEST(Options, UnknownNamesGiveNearOnes) {
  SelectorOptions options;
  EXPECT_STATUS(StatusCode::kInvalid, "no knob \"cis.tao\"; nearest: cis.tau", options.Set("cis.tao", "1"));
  EXPECT_STATUS(StatusCode::kInvalid, "tau", options.Set("tau", "1"));  // without its prefix
  EXPECT_STATUS(StatusCode::kInvalid, "max_dropped_mass", options.Set("max-dropped-mass", "1"));
  EXPECT_STATUS(StatusCode::kInvalid, "no selector \"ciss\"; nearest: cis", options.Set("selector", "ciss"));
  EXPECT_STATUS(StatusCode::kInvalid, "nearest: oracle", ParseSelectorKind("orcale"));
  EXPECT_LT(options.Set(std::string(100'000, 'x'), "1").message().size(), 200u);
}

TEST(Options, KindsHaveNames) {
  EXPECT_EQ(SelectorKindNames(),
            (std::vector<std::string_view>{"dense", "window", "oracle", "cis", "psaw", "etf", "cpe", "sc", "tc", "quest", "hshare"}));
  for (const std::string_view name : SelectorKindNames()) {
    const auto kind = ParseSelectorKind(name);
    ASSERT_OK(kind);
    EXPECT_EQ(SelectorKindName(*kind), name);
    EXPECT_EQ(MakeSelector(Options(name))->name(), name);
  }
  EXPECT_EQ(SelectorKindName(static_cast<SelectorKind>(99)), "unknown");
}

// Describe() -> Set() gives the same rules, for random settings.
TEST(Options, WhatIsDescribedCanBeSetAgain) {
  SeededRng rng;
  int valid = 0;
  for (int i = 0; i < 3000; ++i) {
    const std::string_view kind = rng.Pick(SelectorKindNames());
    SelectorOptions options = Options(kind);
    for (const KnobCase& knob : Cases()) {
      if (std::string_view(knob.name) == "selector" || !Uses(knob, kind) || rng.Chance(0.5)) continue;
      ASSERT_OK(options.Set(knob.name, rng.Pick(knob.accepted)));
    }
    SelectorOptions again;
    for (const std::string& line : options.Describe()) {
      const size_t equals = line.find('=');
      ASSERT_OK(again.Set(line.substr(0, equals), line.substr(equals + 1))) << line;
    }
    EXPECT_EQ(again.Describe(), options.Describe());
    EXPECT_EQ(again.Validate().ok(), options.Validate().ok());
    if (!options.Validate().ok()) continue;
    ++valid;
    const auto a = MakeSelector(options), b = MakeSelector(again);
    for (const int64_t n : {5, 300, 5000}) {
      const StepContext context{.layer = 3, .layers = 4, .step = 7, .n = n};
      EXPECT_EQ(a->Rule(context).k, b->Rule(context).k);
      EXPECT_EQ(a->Rule(context).lo, b->Rule(context).lo);
      EXPECT_EQ(a->Rule(context).may_inherit, b->Rule(context).may_inherit);
      EXPECT_EQ(a->MethodTag(n), b->MethodTag(n));
    }
  }
  EXPECT_GT(valid, 500);
}

// Fields set in code are held to the same limits as those set by name.
TEST(Options, ValidateFindsFieldsThatNoKnobWouldAccept) {
  const auto refused = [](std::string_view text, auto change) {
    SelectorOptions options;
    change(options);
    EXPECT_STATUS(StatusCode::kInvalid, text, options.Validate());
    EXPECT_STATUS(StatusCode::kInvalid, text, Selector::Create(options));
  };
  refused("budget=", [](auto& o) { o.budget.tokens = -5; });
  refused("budget=", [](auto& o) { o.budget.fraction = 0; });
  refused("budget=", [](auto& o) { o.budget.fraction = std::nan(""); });
  refused("budget=", [](auto& o) { o.budget.mass = -1; });
  refused("budget.sinks=-1", [](auto& o) { o.budget.sinks = -1; });
  refused("budget.local=0", [](auto& o) { o.budget.local = 0; });
  refused("cis.block=0", [](auto& o) { o.cis.block = 0; });
  refused("cis.tau=", [](auto& o) { o.cis.tau = std::nan(""); });
  refused("cis.fail=", [](auto& o) { o.cis.fail = static_cast<CisOptions::OnFail>(7); });
  refused("cis.scorer=", [](auto& o) { o.cis.scorer = Scorer::kNone; });
  refused("psaw.c=", [](auto& o) { o.psaw.c = 0; });
  refused("psaw.l_s=", [](auto& o) { o.psaw.l_s = -1; });  // "as PSAW" is for ETF
  refused("psaw.round=0", [](auto& o) { o.psaw.round = 0; });
  refused("etf.l_s=", [](auto& o) { o.etf.l_s = 1; });
  refused("tc.refresh=-1", [](auto& o) { o.tc.refresh = -1; });
  refused("tc.factor=", [](auto& o) { o.tc.factor = 0; });
  refused("tc.scorer=", [](auto& o) { o.tc.scorer = Scorer::kPages; });
  refused("max_dropped_mass=", [](auto& o) { o.max_dropped_mass = 2; });
  refused("bound=#", [](auto& o) { o.bound = static_cast<BoundKind>(9); });
  refused("bound.confidence=1", [](auto& o) { o.bound_confidence = 1; });
  refused("certify_every=-1", [](auto& o) { o.certify_every = -1; });
  refused("selector=", [](auto& o) { o.kind = static_cast<SelectorKind>(50); });
}

TEST(Options, BudgetsBelowSinksAndLocalAreRefused) {
  SelectorOptions options;
  ASSERT_OK(options.Set("budget", "39"));
  EXPECT_STATUS(StatusCode::kInvalid, "budget=39: less than budget.sinks + budget.local = 40", options.Validate());
  ASSERT_OK(options.Set("budget", "40"));
  EXPECT_OK(options.Validate());
  ASSERT_OK(options.Set("budget", "mass(0.9,cap=39)"));
  EXPECT_STATUS(StatusCode::kInvalid, "39", options.Validate());
  ASSERT_OK(options.Set("selector", "quest"));  // pages instead
  ASSERT_OK(options.Set("budget", "47"));
  EXPECT_STATUS(StatusCode::kInvalid, "budget=47: less than the 3 pages of 16", options.Validate());
  ASSERT_OK(options.Set("budget", "48"));
  EXPECT_OK(options.Validate());
  ASSERT_OK(options.Set("quest.page", "32"));
  EXPECT_STATUS(StatusCode::kInvalid, "3 pages of 32", options.Validate());
  ASSERT_OK(options.Set("selector", "psaw"));  // has no budget
  EXPECT_OK(options.Validate());
}

TEST(Options, PromisesThatAMethodCannotKeepAreRefused) {
  const auto refused = [](std::string_view text, std::string_view kind, std::initializer_list<std::string_view> knobs) {
    SelectorOptions options;
    EXPECT_OK(options.Set("selector", kind));
    for (const std::string_view knob : knobs) {
      const size_t equals = knob.find('=');
      EXPECT_OK(options.Set(knob.substr(0, equals), knob.substr(equals + 1)));
    }
    EXPECT_STATUS(StatusCode::kInvalid, text, options.Validate());
  };
  refused("window", "window", {"max_dropped_mass=0.1"});
  refused("cis.scorer", "cis", {"max_dropped_mass=0.1", "cis.scorer=pages"});
  refused("max_dropped_mass=0.1: bounds of whole pages", "quest", {"max_dropped_mass=0.1"});
  refused("quest estimates no mass", "quest", {"budget=mass(0.9)"});
  refused("certify_every=4", "quest", {"certify_every=4"});
  refused("max_dropped_mass=0.1: labels", "hshare", {"max_dropped_mass=0.1"});
  refused("hshare estimates no mass", "hshare", {"budget=mass(0.9)"});
  refused("certify_every=4", "hshare", {"certify_every=4"});
  refused("cis.precision", "cis", {"max_dropped_mass=0.1", "cis.precision=f16"});
  refused("takes the place of budget=mass(0.9", "tc", {"max_dropped_mass=0.1", "budget=mass(0.9)"});
  for (const char* bound : {"bound=proven", "bound=statistical"}) {
    refused(std::string(bound) + ": needs cis.scorer", "cis", {bound, "cis.scorer=pages"});
    refused(std::string(bound) + ": needs cis.precision", "cis", {bound, "cis.precision=f16"});
    refused(std::string(bound) + ": what PSAW cuts", "cpe", {bound, "psaw.phase=both"});
    refused(std::string(bound) + ": between refreshes", "sc", {bound, "sc.inner=exact"});
    EXPECT_OK(Options("tc", {bound, "budget=mass(0.9)"}).Validate());
    EXPECT_OK(Options("sc", {bound, "sc.inner=codes"}).Validate());
    EXPECT_OK(Options("cis", {bound, "cis.scorer=codes"}).Validate());
  }
  refused("bound=statistical: needs scores from codes", "oracle", {"bound=statistical"});
  refused("bound=statistical: needs scores from codes", "tc", {"bound=statistical", "tc.scorer=exact"});
  refused("bound=statistical: needs scores from codes", "cis", {"bound=statistical", "max_dropped_mass=0.1"});
  EXPECT_OK(Options("sc", {"bound=proven", "max_dropped_mass=0.1"}).Validate());
  refused("cis.scorer", "cis", {"cis.gate=certified", "cis.scorer=pages"});
  refused("cis.precision", "cpe", {"cis.gate=certified", "cis.precision=f16"});
  refused("less than cis.block=33", "cis", {"cis.gate=certified", "cis.block=33"});
  EXPECT_OK(Options("cis", {"cis.gate=certified", "cis.block=33", "cis.local_edge=held"}).Validate());
  EXPECT_OK(Options("cis", {"cis.gate=certified", "cis.block=32"}).Validate());
}

TEST(Options, APromiseIsProvenUnlessToldOtherwise) {
  EXPECT_EQ(Options("tc", {}).BoundInForce(), BoundKind::kNone);
  EXPECT_EQ(Options("tc", {"max_dropped_mass=0.1"}).BoundInForce(), BoundKind::kProven);
  EXPECT_EQ(Options("tc", {"max_dropped_mass=0.1", "bound=statistical"}).BoundInForce(), BoundKind::kStatistical);
  EXPECT_EQ(Options("tc", {"bound=proven"}).BoundInForce(), BoundKind::kProven);
  for (const char* knob : {"bound=proven", "bound=statistical"}) {
    const auto selector = Selector::Create(Options("tc", {knob, "bound.confidence=0.9"})).value();
    EXPECT_TRUE(selector->NeedsErrorBounds());
    const StepRule rule = selector->Rule({.layer = 0, .layers = 2, .step = 1, .n = 4096});
    EXPECT_EQ(rule.bound, selector->options().bound);
    EXPECT_EQ(rule.confidence, rule.bound == BoundKind::kStatistical ? 0.9 : 0);
    EXPECT_LT(rule.target_drop, 0);   // it reports, and changes no choice
    EXPECT_TRUE(rule.may_inherit);
  }
}

// docs/selectors has a row "| `knob` | `default` .. |" for each knob, which names its other values.
TEST(Options, KnobsAreDocumentedWithTheirDefaults) {
  std::vector<std::string> rows;
  for (const auto& page : std::filesystem::directory_iterator(SourcePath("/docs/selectors"))) {
    std::ifstream file(page.path());
    for (std::string line; std::getline(file, line);) rows.push_back(line);
  }
  for (const KnobCase& knob : Cases()) {
    if (std::string_view(knob.name) == "selector") continue;
    const std::string start = "| `" + std::string(knob.name) + "` | `" + knob.fallback + "`";
    const auto row = std::find_if(rows.begin(), rows.end(), [&](const auto& line) { return line.starts_with(start); });
    ASSERT_TRUE(row != rows.end()) << start;
    for (const std::string value : knob.accepted) {
      const bool word = std::isalpha(static_cast<unsigned char>(value.front())) && value.find('(') == std::string::npos;
      EXPECT_TRUE(!word || value == "false" || row->find("`" + value) != std::string::npos) << start << " " << value;
    }
  }
  for (const std::string_view kind : SelectorKindNames()) {
    EXPECT_TRUE(std::filesystem::exists(SourcePath("/docs/selectors/") + std::string(kind) + ".md")) << kind;
  }
}

TEST(Options, BudgetKeepsSinksAndLocal) {
  SelectorOptions options = Options("tc", {"budget.sinks=3", "budget.local=5", "budget=100"});
  EXPECT_EQ(options.budget.sinks, 3);
  EXPECT_EQ(options.budget.MiddleK(1000), 92);
  ASSERT_OK(options.Set("budget", "1/10"));
  EXPECT_EQ(options.budget.MiddleK(1000), 92);  // the number of before is gone
}

}  // namespace
}  // namespace prehoc
