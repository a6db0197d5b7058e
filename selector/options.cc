#include "selector/options.h"

#include <algorithm>
#include <array>
#include <functional>
#include <initializer_list>
#include <limits>
#include <utility>

#include "selector/text.h"

namespace prehoc {
namespace {
using selector_internal::Nearest;
using selector_internal::ParseFraction;
using selector_internal::ParseNumber;
using selector_internal::PrintFraction;
using selector_internal::PrintNumber;
using selector_internal::Quote;

constexpr std::array<std::pair<std::string_view, SelectorKind>, 11> kKinds = {{
    {"dense", SelectorKind::kDense},
    {"window", SelectorKind::kWindow},
    {"oracle", SelectorKind::kOracle},
    {"cis", SelectorKind::kCis},
    {"psaw", SelectorKind::kPsaw},
    {"etf", SelectorKind::kEtf},
    {"cpe", SelectorKind::kCpe},
    {"sc", SelectorKind::kSharedCandidates},
    {"tc", SelectorKind::kTwoClock},
    {"quest", SelectorKind::kQuest},
    {"hshare", SelectorKind::kHShare},
}};

using Kinds = uint32_t;  // a bit per SelectorKind
constexpr Kinds Bit(SelectorKind kind) { return Kinds{1} << static_cast<uint32_t>(kind); }
constexpr Kinds kDense = Bit(SelectorKind::kDense);
constexpr Kinds kWindow = Bit(SelectorKind::kWindow);
constexpr Kinds kOracle = Bit(SelectorKind::kOracle);
constexpr Kinds kPsaw = Bit(SelectorKind::kPsaw);
constexpr Kinds kEtf = Bit(SelectorKind::kEtf);
constexpr Kinds kCpe = Bit(SelectorKind::kCpe);
constexpr Kinds kCis = Bit(SelectorKind::kCis) | kCpe;
constexpr Kinds kSc = Bit(SelectorKind::kSharedCandidates);
constexpr Kinds kTc = Bit(SelectorKind::kTwoClock);
constexpr Kinds kQuest = Bit(SelectorKind::kQuest);
constexpr Kinds kHShare = Bit(SelectorKind::kHShare);
constexpr Kinds kChoosing = kOracle | kCis | kSc | kTc;  // and estimate what they drop
constexpr Kinds kAll = kDense | kWindow | kChoosing | kPsaw | kEtf | kQuest | kHShare;

struct Knob {
  std::string name;
  Kinds kinds = 0;       // who uses it
  std::string accepted;  // for messages
  std::function<bool(SelectorOptions&, std::string_view)> set;  // false: not accepted
  std::function<std::string(const SelectorOptions&)> get;       // reads back as the same value
};

// `field` is [](auto& options) -> auto& in all of these, so that one lambda both reads and writes.
template <class Field>
Knob Real(std::string name, Kinds kinds, std::string accepted, Field field, bool (*ok)(double), bool as_fraction = false) {
  return {std::move(name), kinds, std::move(accepted),
          [=](SelectorOptions& o, std::string_view text) {
            const auto value = as_fraction ? ParseFraction(text) : ParseNumber<double>(text);
            if (!value || !ok(*value)) return false;
            field(o) = *value;
            return true;
          },
          [=](const SelectorOptions& o) { return as_fraction ? PrintFraction(field(o)) : PrintNumber(field(o)); }};
}

// As `knob`, but `word` stands for `value`, and is printed for it.
Knob WithWord(std::string_view word, Knob knob, double value, double (*get)(const SelectorOptions&),
              void (*set)(SelectorOptions&, double)) {
  knob.accepted += " or " + std::string(word);
  knob.set = [=, inner = knob.set](SelectorOptions& o, std::string_view text) {
    if (text != word) return inner(o, text);
    set(o, value);
    return true;
  };
  knob.get = [=, inner = knob.get](const SelectorOptions& o) { return get(o) == value ? std::string(word) : inner(o); };
  return knob;
}

template <class Field>
Knob Whole(std::string name, Kinds kinds, int32_t least, Field field,
           int32_t most = std::numeric_limits<int32_t>::max()) {
  std::string accepted = "a whole number from " + std::to_string(least);
  if (most != std::numeric_limits<int32_t>::max()) accepted += " to " + std::to_string(most);
  return {std::move(name), kinds, std::move(accepted),
          [=](SelectorOptions& o, std::string_view text) {
            const auto value = ParseNumber<int32_t>(text);
            if (!value || *value < least || *value > most) return false;
            field(o) = *value;
            return true;
          },
          [=](const SelectorOptions& o) { return std::to_string(field(o)); }};
}

template <class Value>
using Words = std::vector<std::pair<std::string_view, Value>>;

template <class Field, class Value>
Knob Word(std::string name, Kinds kinds, Field field, Words<Value> words) {
  std::string accepted;
  for (const auto& word : words) accepted += (accepted.empty() ? "" : " | ") + std::string(word.first);
  return {std::move(name), kinds, std::move(accepted),
          [=](SelectorOptions& o, std::string_view text) {
            for (const auto& [word, value] : words) {
              if (word != text) continue;
              field(o) = value;
              return true;
            }
            return false;
          },
          [=](const SelectorOptions& o) {
            for (const auto& [word, value] : words) {
              if (value == field(o)) return std::string(word);
            }
            return "#" + std::to_string(static_cast<int>(field(o)));  // refused when read back
          }};
}

Knob BudgetKnob() {
  return {"budget", kWindow | kChoosing | kQuest | kHShare, "1/16, 0.1, 512, mass(0.95), mass(0.95,cap=1/8) or mass(0.95,cap=1024)",
          [](SelectorOptions& o, std::string_view text) {
            Result<Budget> parsed = Budget::Parse(text);
            if (!parsed.ok()) return false;
            parsed->sinks = o.budget.sinks;  // knobs of their own
            parsed->local = o.budget.local;
            o.budget = *parsed;
            return true;
          },
          [](const SelectorOptions& o) { return o.budget.ToString(); }};
}

// The one place that knows the knobs: names, who uses them, what they accept, where they live.
std::vector<Knob> MakeKnobs() {
  using C = CisOptions;
  using P = PsawOptions;
  using E = EtfOptions;
  constexpr auto any = [](double) { return true; };
  constexpr auto share = [](double x) { return x > 0 && x <= 1; };
  constexpr auto below_one = [](double x) { return x >= 0 && x < 1; };
  constexpr auto probability = [](double x) { return x >= 0 && x <= 1; };
  constexpr auto factor = [](double x) { return x >= 1 && x <= 1e6; };
  const std::string tau = "a number (<= -1 always shares, >= 1 never)";
  const Words<Scorer> scorers = {{"exact", Scorer::kExact}, {"codes", Scorer::kCodes}};
  Words<Scorer> cis_scorers = scorers;
  cis_scorers.emplace_back("pages", Scorer::kPages);
  const Words<C::GqaSet> gqa_sets = {{"max_weight", C::GqaSet::kMaxWeight},
                                     {"mean_weight", C::GqaSet::kMeanWeight},
                                     {"max_logit", C::GqaSet::kMaxLogit},
                                     {"per_query_head", C::GqaSet::kPerQueryHead}};
  const std::string some = "a share in (0, 1], such as 3/4";
  const std::string layers = "a share of the layers in [0, 1), such as 1/2";
  return {
      Word("selector", kAll, [](auto& o) -> auto& { return o.kind; },
           Words<SelectorKind>(kKinds.begin(), kKinds.end())),
      BudgetKnob(),
      Whole("budget.sinks", kWindow | kChoosing | kPsaw | kHShare, 0, [](auto& o) -> auto& { return o.budget.sinks; }, 1 << 30),
      Whole("budget.local", kWindow | kChoosing | kPsaw | kHShare, 1, [](auto& o) -> auto& { return o.budget.local; }, 1 << 30),
      WithWord("off", Real("max_dropped_mass", kChoosing, "a number in [0, 1]",
                           [](auto& o) -> auto& { return o.max_dropped_mass; }, probability),
               -1, [](const SelectorOptions& o) { return o.max_dropped_mass; },
               [](SelectorOptions& o, double off) { o.max_dropped_mass = off; }),
      Word("bound", kChoosing, [](auto& o) -> auto& { return o.bound; },
           Words<BoundKind>{{"none", BoundKind::kNone}, {"proven", BoundKind::kProven}, {"statistical", BoundKind::kStatistical}}),
      Real("bound.confidence", kChoosing, "a number in [0.5, 1)", [](auto& o) -> auto& { return o.bound_confidence; },
           [](double x) { return x >= 0.5 && x < 1; }),
      Word("bound.scope", kChoosing, [](auto& o) -> auto& { return o.bound_scope; },
           Words<SelectorOptions::BoundScope>{{"head", SelectorOptions::BoundScope::kHead}, {"set", SelectorOptions::BoundScope::kSet}}),
      Whole("certify_every", kChoosing, 0, [](auto& o) -> auto& { return o.certify_every; }),

      Whole("cis.block", kCis, 1, [](auto& o) -> auto& { return o.cis.block; }),
      Real("cis.tau", kCis, tau, [](auto& o) -> auto& { return o.cis.tau; }, any),
      Word("cis.cos_stage", kCis, [](auto& o) -> auto& { return o.cis.cos_stage; },
           Words<C::CosStage>{{"post_rope", C::CosStage::kPostRope}, {"pre_rope", C::CosStage::kPreRope}}),
      Word("cis.gate_scope", kCis, [](auto& o) -> auto& { return o.cis.gate_scope; },
           Words<C::GateScope>{{"kv_head", C::GateScope::kKvHead},
                               {"query_head", C::GateScope::kQueryHead},
                               {"group_mean", C::GateScope::kGroupMean},
                               {"layer", C::GateScope::kLayer}}),
      Word("cis.gate_batch", kCis, [](auto& o) -> auto& { return o.cis.gate_batch; },
           Words<bool>{{"sequence", false}, {"batch", true}}),
      Word("cis.fail", kCis, [](auto& o) -> auto& { return o.cis.fail; },
           Words<C::OnFail>{{"reselect", C::OnFail::kReselect},
                            {"reselect_once", C::OnFail::kReselectOnce},
                            {"dense", C::OnFail::kDense}}),
      Word("cis.phase", kCis, [](auto& o) -> auto& { return o.cis.stagger; },
           Words<bool>{{"aligned", false}, {"staggered", true}}),
      Word("cis.first_anchor", kCis, [](auto& o) -> auto& { return o.cis.first_anchor_prompt; },
           Words<bool>{{"prompt", true}, {"decode", false}}),
      Word("cis.anchor_attends", kCis, [](auto& o) -> auto& { return o.cis.anchor_dilated; },
           Words<bool>{{"dilated", true}, {"plain", false}}),
      Word("cis.m", kCis, [](auto& o) -> auto& { return o.cis.m; },
           Words<C::DilateCount>{{"ceil(k/3)", C::DilateCount::kCeilThird},
                                 {"floor(k/3)", C::DilateCount::kFloorThird},
                                 {"k", C::DilateCount::kAll},
                                 {"0", C::DilateCount::kNone}}),
      Whole("cis.r", kCis, 0, [](auto& o) -> auto& { return o.cis.r; }, 64),
      Word("cis.clip", kCis, [](auto& o) -> auto& { return o.cis.clip_middle; },
           Words<bool>{{"middle", true}, {"visible", false}}),
      Word("cis.gqa_set", kCis, [](auto& o) -> auto& { return o.cis.gqa_set; }, gqa_sets),
      Word("cis.precision", kCis, [](auto& o) -> auto& { return o.cis.half_logits; },
           Words<bool>{{"f32", false}, {"f16", true}}),
      Word("cis.local_edge", kCis, [](auto& o) -> auto& { return o.cis.local_edge_held; },
           Words<bool>{{"slides", false}, {"held", true}}),
      Word("cis.budget", kCis, [](auto& o) -> auto& { return o.cis.exact_budget; },
           Words<bool>{{"cis", false}, {"cis*", true}}),
      Word("cis.scorer", kCis, [](auto& o) -> auto& { return o.cis.scorer; }, cis_scorers),
      Word("cis.gate", kCis, [](auto& o) -> auto& { return o.cis.gate; },
           Words<C::Gate>{{"cosine", C::Gate::kCosine}, {"certified", C::Gate::kCertified}}),
      Real("cis.delta_max", kCis, "a number in [0, 1]", [](auto& o) -> auto& { return o.cis.delta_max; }, probability),

      Word("psaw.phase", kPsaw | kCpe, [](auto& o) -> auto& { return o.psaw.phase; },
           Words<P::Phase>{{"both", P::Phase::kBoth},
                           {"prefill", P::Phase::kPrefill},
                           {"decode", P::Phase::kDecode},
                           {"off", P::Phase::kOff}}),
      Real("psaw.c", kPsaw | kCpe, "a number in (0, 1]", [](auto& o) -> auto& { return o.psaw.c; }, share),
      // etf.l_s = psaw reads it too.
      Real("psaw.l_s", kPsaw | kCpe | kEtf, layers, [](auto& o) -> auto& { return o.psaw.l_s; }, below_one, true),
      Word("psaw.keep_sink", kPsaw | kCpe, [](auto& o) -> auto& { return o.psaw.keep_sink; },
           Words<bool>{{"true", true}, {"false", false}}),
      Word("psaw.layer_base", kPsaw | kCpe, [](auto& o) -> auto& { return o.psaw.layer_base_one; },
           Words<bool>{{"1", true}, {"0", false}}),
      Whole("psaw.round", kPsaw | kCpe, 1, [](auto& o) -> auto& { return o.psaw.round; }, 1 << 20),
      Word("psaw.evict", kPsaw | kCpe, [](auto& o) -> auto& { return o.psaw.evict; },
           Words<bool>{{"false", false}, {"true", true}}),
      Word("psaw.cis_filter", kCpe, [](auto& o) -> auto& { return o.psaw.filter_each_step; },
           Words<bool>{{"select", false}, {"step", true}}),

      Word("etf.mode", kEtf | kCpe, [](auto& o) -> auto& { return o.etf.mode; },
           Words<E::Mode>{{"carry", E::Mode::kCarry}, {"reuse_kv", E::Mode::kReuseKv}}),
      Word("etf.reuse_from", kEtf | kCpe, [](auto& o) -> auto& { return o.etf.reuse_from; },
           Words<E::ReuseFrom>{{"start", E::ReuseFrom::kStart}, {"last", E::ReuseFrom::kLast}}),
      Real("etf.c", kEtf | kCpe, "a number in (0, 1]", [](auto& o) -> auto& { return o.etf.c; }, share),
      WithWord("psaw", Real("etf.l_s", kEtf | kCpe, layers, [](auto& o) -> auto& { return o.etf.l_s; }, below_one, true),
               E::kAsPsaw, [](const SelectorOptions& o) { return o.etf.l_s; },
               [](SelectorOptions& o, double as_psaw) { o.etf.l_s = as_psaw; }),
      Word("etf.n", kEtf | kCpe, [](auto& o) -> auto& { return o.etf.n; },
           Words<E::Extent>{{"prompt", E::Extent::kPrompt}, {"chunk", E::Extent::kChunk}}),

      Word("tc.gate", kTc, [](auto& o) -> auto& { return o.tc.gate; },
           Words<TwoClockOptions::Gate>{{"cosine", TwoClockOptions::Gate::kCosine}, {"mass", TwoClockOptions::Gate::kMass}}),
      Real("tc.epsilon", kTc, "a number in [0, 1]", [](auto& o) -> auto& { return o.tc.epsilon; }, probability),
      WithWord("off", Real("tc.tau", kTc, tau, [](auto& o) -> auto& { return o.tc.tau; }, any), 1,
               [](const SelectorOptions& o) { return o.tc.tau; },
               [](SelectorOptions& o, double off) { o.tc.tau = off; }),
      Word("tc.cos_stage", kTc, [](auto& o) -> auto& { return o.tc.cos_stage; },
           Words<C::CosStage>{{"post_rope", C::CosStage::kPostRope}, {"pre_rope", C::CosStage::kPreRope}}),
      // The heads of a KV head choose together, so they have no gates of their own.
      Word("tc.gate_scope", kTc, [](auto& o) -> auto& { return o.tc.gate_scope; },
           Words<C::GateScope>{{"kv_head", C::GateScope::kKvHead},
                               {"group_mean", C::GateScope::kGroupMean},
                               {"layer", C::GateScope::kLayer}}),
      Whole("tc.max_age", kTc, 0, [](auto& o) -> auto& { return o.tc.max_age; }),
      Word("tc.scorer", kTc, [](auto& o) -> auto& { return o.tc.scorer; }, scorers),
      WithWord("auto", Real("tc.theta", kTc, "a number in [0, 1]", [](auto& o) -> auto& { return o.tc.theta; }, probability), TwoClockOptions::kAuto,
               [](const SelectorOptions& o) { return o.tc.theta; },
               [](SelectorOptions& o, double as_it_pays) { o.tc.theta = as_it_pays; }),
      Real("tc.factor", kTc, "a number from 1", [](auto& o) -> auto& { return o.tc.factor; }, factor),
      Whole("tc.refresh", kTc, 0, [](auto& o) -> auto& { return o.tc.refresh; }),
      Whole("tc.pool", kTc, 1, [](auto& o) -> auto& { return o.tc.pool; }),
      Whole("tc.lag", kTc, 0, [](auto& o) -> auto& { return o.tc.lag; }),
      WithWord("auto", Whole("tc.dense_below", kTc, 0, [](auto& o) -> auto& { return o.tc.dense_below; }), TwoClockOptions::kAuto,
               [](const SelectorOptions& o) { return static_cast<double>(o.tc.dense_below); },
               [](SelectorOptions& o, double) { o.tc.dense_below = TwoClockOptions::kAuto; }),
      Word("tc.stagger", kTc, [](auto& o) -> auto& { return o.tc.stagger; },
           Words<bool>{{"true", true}, {"false", false}}),

      Real("sc.factor", kSc, "a number from 1", [](auto& o) -> auto& { return o.sc.factor; }, factor),
      Whole("sc.refresh", kSc, 1, [](auto& o) -> auto& { return o.sc.refresh; }),
      Whole("sc.pool", kSc, 1, [](auto& o) -> auto& { return o.sc.pool; }),
      Whole("sc.lag", kSc, 0, [](auto& o) -> auto& { return o.sc.lag; }),
      Word("sc.inner", kSc, [](auto& o) -> auto& { return o.sc.inner; }, scorers),

      Word("quest.page", kQuest, [](auto& o) -> auto& { return o.quest.page; },
           Words<int32_t>{{"16", 16}, {"32", 32}, {"64", 64}}),
      Whole("quest.dense_layers", kQuest, 0, [](auto& o) -> auto& { return o.quest.dense_layers; }),
      Whole("quest.sinks", kQuest, 0, [](auto& o) -> auto& { return o.quest.sinks; }, QuestOptions::kLeastPages - 1),
      Word("quest.gqa_set", kQuest, [](auto& o) -> auto& { return o.quest.gqa_set; }, gqa_sets),

      Real("hshare.layers", kHShare, some, [](auto& o) -> auto& { return o.hshare.layers; }, share, true),
      Real("hshare.heads", kHShare, some, [](auto& o) -> auto& { return o.hshare.heads; }, share, true),
      Whole("hshare.steps", kHShare, 1, [](auto& o) -> auto& { return o.hshare.steps; }, 1 << 20),
      Real("hshare.channels", kHShare, some, [](auto& o) -> auto& { return o.hshare.channels; }, share, true),
      Word("hshare.bits", kHShare, [](auto& o) -> auto& { return o.hshare.bits; }, Words<int32_t>{{"4", 4}, {"16", 16}}),
      Word("hshare.list", kHShare, [](auto& o) -> auto& { return o.hshare.keep_list; },
           Words<bool>{{"discard", false}, {"keep", true}}),
      Whole("hshare.map_queries", kHShare, 1, [](auto& o) -> auto& { return o.hshare.map_queries; }, 1 << 20),
      Word("hshare.gqa_set", kHShare, [](auto& o) -> auto& { return o.hshare.gqa_set; }, gqa_sets),
  };
}

const std::vector<Knob>& Knobs() {
  static const auto* const knobs = new std::vector<Knob>(MakeKnobs());
  return *knobs;
}

Status Refused(std::string what) { return {StatusCode::kInvalid, std::move(what)}; }

// What single knobs cannot know: combinations that would promise more than the method can keep.
Status CheckBound(const SelectorOptions& o) {
  const BoundKind bound = o.BoundInForce();
  if (bound == BoundKind::kNone) return {};
  const bool promises = o.max_dropped_mass >= 0;
  const bool statistical = bound == BoundKind::kStatistical;
  const std::string named = statistical ? "bound=statistical: " : "bound=proven: ";
  const std::string knob = promises ? "max_dropped_mass=" + PrintNumber(o.max_dropped_mass) + ": " : named;
  const bool cis = o.kind == SelectorKind::kCis || o.kind == SelectorKind::kCpe;
  const bool cuts = o.kind == SelectorKind::kPsaw || o.kind == SelectorKind::kCpe;
  if (o.kind == SelectorKind::kWindow) return Refused(knob + "a window is chosen by position and bounds nothing");
  if (o.kind == SelectorKind::kQuest) return Refused(knob + "bounds of whole pages order them, and prove next to nothing");
  if (o.kind == SelectorKind::kHShare) return Refused(knob + "labels order positions, and prove nothing");
  if (promises && o.budget.mass > 0) {
    return Refused(knob + "takes the place of budget=" + o.budget.ToString() + "; give the least to keep as 1/16 or 512");
  }
  if (cis && o.cis.scorer == Scorer::kPages) return Refused(knob + "needs cis.scorer exact or codes, not pages");
  if (cis && o.cis.half_logits) return Refused(knob + "needs cis.precision=f32");
  if (cuts && o.psaw.c < 1 && (o.psaw.phase == PsawOptions::Phase::kBoth || o.psaw.phase == PsawOptions::Phase::kDecode)) {
    return Refused(knob + "what PSAW cuts in decode is never scored; set psaw.phase to prefill or off");
  }
  if (o.kind == SelectorKind::kSharedCandidates && o.sc.inner == Scorer::kExact && !promises) {
    return Refused(knob + "between refreshes sc.inner=exact looks at residents only; set sc.inner=codes or max_dropped_mass");
  }
  const bool codes = (cis && o.cis.scorer == Scorer::kCodes) ||
                     (o.kind == SelectorKind::kSharedCandidates && o.sc.inner == Scorer::kCodes) ||
                     (o.kind == SelectorKind::kTwoClock && o.tc.scorer == Scorer::kCodes);
  const bool chooses = cis || o.kind == SelectorKind::kSharedCandidates || o.kind == SelectorKind::kTwoClock ||
                       o.kind == SelectorKind::kOracle;
  if (statistical && chooses && !codes) return Refused(named + "needs scores from codes; exact ones leave nothing to chance");
  return {};
}

Status CheckCertifiedGate(const SelectorOptions& o) {
  const bool cis = o.kind == SelectorKind::kCis || o.kind == SelectorKind::kCpe;
  if (!cis || o.cis.gate != CisOptions::Gate::kCertified) return {};
  if (o.cis.scorer == Scorer::kPages) return Refused("cis.gate=certified: needs cis.scorer exact or codes, not pages");
  if (o.cis.half_logits) return Refused("cis.gate=certified: needs cis.precision=f32");
  if (!o.cis.local_edge_held && o.budget.local < o.cis.block) {
    return Refused("cis.gate=certified: budget.local=" + std::to_string(o.budget.local) + " is less than cis.block=" +
                   std::to_string(o.cis.block) + "; enlarge it or set cis.local_edge=held");
  }
  return {};
}

// Sinks and local window are kept whatever the budget says, so a smaller one would be exceeded at every step.
Status CheckBudget(const SelectorOptions& o) {
  const int64_t kept = int64_t{o.budget.sinks} + o.budget.local;
  const int32_t tokens = o.budget.mass > 0 ? o.budget.cap_tokens : o.budget.tokens;
  if (tokens == 0 || tokens >= kept) return {};
  return Refused("budget=" + o.budget.ToString() + ": less than budget.sinks + budget.local = " + std::to_string(kept));
}

// The rivals' scores only order positions.
Status CheckRival(const SelectorOptions& o) {
  if (o.kind != SelectorKind::kQuest && o.kind != SelectorKind::kHShare) return {};
  const std::string name(SelectorKindName(o.kind));
  if (o.budget.mass > 0) {
    return Refused("budget=" + o.budget.ToString() + ": " + name + " estimates no mass; give a share or a number");
  }
  if (o.certify_every > 0) {
    return Refused("certify_every=" + std::to_string(o.certify_every) + ": " + name + " estimates no mass that could age");
  }
  return {};
}

// Sinks and local window are no rule of Quest's: what it keeps in any case are pages.
Status CheckQuest(const SelectorOptions& o) {
  if (o.kind != SelectorKind::kQuest) return {};
  const int32_t least = QuestOptions::kLeastPages * o.quest.page;
  if (o.budget.tokens == 0 || o.budget.tokens >= least) return {};
  return Refused("budget=" + o.budget.ToString() + ": less than the " + std::to_string(QuestOptions::kLeastPages) +
                 " pages of " + std::to_string(o.quest.page) + " that quest keeps");
}

// A later refresh takes the place of one that is still under way: with a lag longer than that, none would ever land.
Status CheckLag(const char* name, int32_t lag, int32_t refresh) {
  if (lag <= refresh) return {};
  const std::string what = name + ("lag=" + std::to_string(lag));
  if (refresh == 0) return Refused(what + ": without a refresh nothing is fetched behind the steps; set " + name + "refresh, or no lag");
  return Refused(what + ": more than the " + std::to_string(refresh) + " steps between two refreshes");
}

Status CheckEvict(const SelectorOptions& o) {
  if (!o.psaw.evict || (o.kind != SelectorKind::kPsaw && o.kind != SelectorKind::kCpe)) return {};
  if (o.psaw.phase != PsawOptions::Phase::kBoth && o.psaw.phase != PsawOptions::Phase::kDecode) {
    return Refused("psaw.evict=true: decode reads what only prefill cuts; set psaw.phase to both or decode");
  }
  if (o.kind == SelectorKind::kCpe && !o.psaw.filter_each_step) {
    return Refused("psaw.evict=true: an inherited set may lie below the edge; set psaw.cis_filter=step");
  }
  return {};
}

}  // namespace

BoundKind SelectorOptions::BoundInForce() const {
  return bound == BoundKind::kNone && max_dropped_mass >= 0 ? BoundKind::kProven : bound;
}

DepthOptions SelectorOptions::EtfDepth() const {
  return {.c = etf.c, .l_s = etf.l_s == EtfOptions::kAsPsaw ? psaw.l_s : etf.l_s};
}

Budget SelectorOptions::Kept() const {
  Budget kept = budget;
  if (kind == SelectorKind::kQuest) {
    kept.sinks = quest.sinks * quest.page;
    kept.local = 0;
  }
  return kept;
}

Status SelectorOptions::Set(std::string_view name, std::string_view value) {
  for (const Knob& knob : Knobs()) {
    if (knob.name != name) continue;
    if (knob.set(*this, value)) return {};
    std::string message = knob.name + "=" + Quote(value) + ": accepted: " + knob.accepted;
    if (knob.name == "selector") return ParseSelectorKind(value).status();
    return Refused(std::move(message));
  }
  return Refused("no knob " + Quote(name) + "; nearest: " + Nearest(name, KnobNames()));
}

Status SelectorOptions::Validate() const {
  // A field holds a sane value exactly if its knob would accept what it prints.
  SelectorOptions scratch;
  for (const Knob& knob : Knobs()) {
    const std::string value = knob.get(*this);
    if (!knob.set(scratch, value)) return Refused(knob.name + "=" + value + ": accepted: " + knob.accepted);
  }
  if (kind == SelectorKind::kWindow && budget.mass > 0) {
    return Refused("budget=" + budget.ToString() + ": a window scores nothing and knows no mass");
  }
  const bool sized = kind != SelectorKind::kDense && kind != SelectorKind::kPsaw && kind != SelectorKind::kEtf;
  if (sized && kind != SelectorKind::kQuest) PREHOC_RETURN_IF_ERROR(CheckBudget(*this));
  if (kind == SelectorKind::kTwoClock) PREHOC_RETURN_IF_ERROR(CheckLag("tc.", tc.lag, tc.refresh));
  if (kind == SelectorKind::kSharedCandidates) {
    const int32_t refresh = certify_every > 0 ? std::min(sc.refresh, certify_every) : sc.refresh;
    PREHOC_RETURN_IF_ERROR(CheckLag("sc.", sc.lag, refresh));
  }
  PREHOC_RETURN_IF_ERROR(CheckRival(*this));
  PREHOC_RETURN_IF_ERROR(CheckQuest(*this));
  PREHOC_RETURN_IF_ERROR(CheckEvict(*this));
  PREHOC_RETURN_IF_ERROR(CheckBound(*this));
  return CheckCertifiedGate(*this);
}

std::vector<std::string> SelectorOptions::Describe() const {
  std::vector<std::string> result;
  for (const Knob& knob : Knobs()) {
    if (knob.kinds & Bit(kind)) result.push_back(knob.name + "=" + knob.get(*this));
  }
  return result;
}

Result<SelectorKind> ParseSelectorKind(std::string_view name) {
  for (const auto& [known, kind] : kKinds) {
    if (known == name) return kind;
  }
  return Refused("no selector " + Quote(name) + "; nearest: " + Nearest(name, SelectorKindNames()));
}

std::string_view SelectorKindName(SelectorKind kind) {
  for (const auto& [name, known] : kKinds) {
    if (known == kind) return name;
  }
  return "unknown";
}

std::vector<std::string_view> SelectorKindNames() {
  std::vector<std::string_view> names;
  for (const auto& entry : kKinds) names.push_back(entry.first);
  return names;
}

std::vector<std::string> KnobNames() {
  std::vector<std::string> names;
  for (const Knob& knob : Knobs()) names.push_back(knob.name);
  return names;
}

}  // namespace prehoc
