#include "selector/calibration.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <numeric>
#include <random>
#include <utility>

#include "base/check.h"
#include "selector/text.h"

namespace prehoc {
namespace {
using selector_internal::ParseNumber;
using selector_internal::PrintNumber;
using selector_internal::Quote;

constexpr std::string_view kAccepted = "max_dropped_mass<=0.05 alpha=0.1 [confidence=0.9] [method=rcps|conformal]";
constexpr int64_t kMostUnits = 100'000'000;

Status Refused(std::string what) { return {StatusCode::kInvalid, std::move(what)}; }

// ln(n!) - ln(sqrt(2 pi n) (n/e)^n): what Stirling's formula leaves out. Requires n >= 1.
double StirlingRest(int64_t n) {
  const auto x = static_cast<double>(n);
  if (n < 16) {
    double factorial = 1;  // exact below 2^53
    for (int64_t i = 2; i <= n; ++i) factorial *= static_cast<double>(i);
    return std::log(factorial) - 0.5 * std::log(2 * std::numbers::pi * x) - x * std::log(x) + x;
  }
  const double y = 1 / (x * x);
  return (1.0 / 12 - y * (1.0 / 360 - y * (1.0 / 1260 - y / 1680))) / x;
}

// P(X = x) for 0 < p < 1, in the saddle-point form: nothing of the size of ln(n!) cancels.
double BinomialPmf(int64_t x, int64_t n, double p) {
  const auto a = static_cast<double>(x), b = static_cast<double>(n - x), m = static_cast<double>(n);
  if (x == 0) return std::exp(m * std::log1p(-p));
  if (x == n) return std::exp(m * std::log(p));
  const double deviance = a * std::log(a / (m * p)) + b * std::log(b / (m * (1 - p)));
  const double rest = StirlingRest(n) - StirlingRest(x) - StirlingRest(n - x);
  return std::exp(rest - deviance) * std::sqrt(m / (2 * std::numbers::pi * a * b));
}

// Sums falling terms from `first` on, until they no longer count. `ratio(i)` is term i + 1 over term i.
template <class Ratio>
double SumFalling(double first, int64_t count, Ratio ratio) {
  double sum = first, term = first;
  for (int64_t i = 0; i + 1 < count && term > sum * 1e-18; ++i) sum += term *= ratio(i);
  return sum;
}

// What the next point is judged by: units in the order of the table.
struct Judge {
  const LossTable& table;
  const CalibrationClaim& claim;

  bool conformal() const { return claim.method == CalibrationMethod::kConformal; }

  // In [0, 1].
  double Loss(int64_t unit, int64_t point) const {
    const double raw = table.losses[static_cast<size_t>(unit * table.grid + point)];
    if (!std::isfinite(raw)) return 1;
    return table.kind == LossKind::kGraded ? raw : raw > claim.delta_max ? 1 : 0;
  }

  GridPoint At(std::span<const double> losses) const {
    GridPoint result;
    result.units = static_cast<int64_t>(losses.size());
    const double sum = std::accumulate(losses.begin(), losses.end(), 0.0);
    result.violations = std::count_if(losses.begin(), losses.end(), [](double loss) { return loss > 0; });
    result.mean_loss = sum / static_cast<double>(losses.size());
    if (conformal()) {
      result.upper_limit = std::min(1.0, (sum + 1) / static_cast<double>(losses.size() + 1));
    } else if (table.kind == LossKind::kViolation) {
      result.upper_limit = ClopperPearsonUpper(result.violations, result.units, claim.delta_c());
    } else {
      result.upper_limit = WsrUpper(losses, claim.delta_c());
    }
    return result;
  }

  // Over `units` of the table. Stops at the first failure unless `all`.
  Calibration Run(std::span<const int64_t> units, bool all) const {
    Calibration result;
    std::vector<double> losses(units.size(), 0.0);
    bool failed = false;
    for (int64_t point = 0; point < table.grid && (all || !failed); ++point) {
      for (size_t i = 0; i < units.size(); ++i) {
        const double loss = Loss(units[i], point);
        losses[i] = conformal() ? std::max(losses[i], loss) : loss;
      }
      result.points.push_back(At(losses));
      failed = failed || !(result.points.back().upper_limit <= claim.alpha);
      if (!failed) result.chosen = point;
    }
    return result;
  }

  Status Refusal(const GridPoint& first) const {
    const std::string promise = claim.ToString();
    const std::string given = std::to_string(first.units);
    const int64_t least = UnitsNeeded(claim);
    if (first.units < least) {
      return Refused(promise + ": needs at least " + std::to_string(least) +
                     " units, and more with any violation; " + given + " given");
    }
    std::string text = promise + ": the most conservative grid point has an upper limit of " +
                       PrintNumber(first.upper_limit) + " (" + std::to_string(first.violations) + " violations in " + given + " units)";
    const int64_t needed = table.kind == LossKind::kViolation ? UnitsNeeded(claim, first.mean_loss) : 0;
    if (needed > first.units) {
      return Refused(text + "; with the same share of violations about " + std::to_string(needed) + " units would do");
    }
    return Refused(text + "; begin the grid at a more conservative value, or attend densely");
  }
};

Status CheckTable(const LossTable& table) {
  if (table.units < 1) return Refused("no units: a calibration needs some");
  if (table.grid < 1) return Refused("no grid points: give the knob's values, most conservative first");
  const auto size = static_cast<int64_t>(table.losses.size());
  if (table.units > size / table.grid || table.units * table.grid != size) {
    return Refused(std::to_string(size) + " losses for " + std::to_string(table.units) + " units and " +
                   std::to_string(table.grid) + " grid points");
  }
  if (table.kind != LossKind::kGraded) return {};
  for (const double loss : table.losses) {
    if (!std::isfinite(loss) || (loss >= 0 && loss <= 1)) continue;
    return Refused("graded loss " + PrintNumber(loss) + ": must be in [0, 1]");
  }
  return {};
}

std::vector<int64_t> AllUnits(int64_t units) {
  std::vector<int64_t> order(static_cast<size_t>(units));
  std::iota(order.begin(), order.end(), int64_t{0});
  return order;
}

bool IsProbability(double value) { return value > 0 && value < 1; }

// One word of a claim. False: unknown, or a value that is no number.
bool ReadWord(std::string_view word, CalibrationClaim* claim, std::string_view* name) {
  constexpr std::string_view kMass = "max_dropped_mass<=", kAlpha = "alpha=";
  constexpr std::string_view kConfidence = "confidence=", kMethod = "method=";
  const auto number = [&](std::string_view prefix, double* out) {
    *name = prefix;
    const auto value = ParseNumber<double>(word.substr(prefix.size()));
    if (value) *out = *value;
    return value.has_value();
  };
  if (word.starts_with(kMass)) return number(kMass, &claim->delta_max);
  if (word.starts_with(kAlpha)) return number(kAlpha, &claim->alpha);
  if (word.starts_with(kConfidence)) return number(kConfidence, &claim->confidence);
  if (!word.starts_with(kMethod)) return false;
  *name = kMethod;
  for (const CalibrationMethod method : {CalibrationMethod::kRcps, CalibrationMethod::kConformal}) {
    if (word.substr(kMethod.size()) != CalibrationMethodName(method)) continue;
    claim->method = method;
    return true;
  }
  return false;
}

}  // namespace

std::string_view CalibrationMethodName(CalibrationMethod method) {
  return method == CalibrationMethod::kRcps ? "rcps" : "conformal";
}

Result<CalibrationClaim> CalibrationClaim::Parse(std::string_view text) {
  CalibrationClaim claim;
  std::vector<std::string_view> seen;
  const auto bad = [](std::string_view word, std::string_view what) {
    return Refused("calibration claim: " + Quote(word) + std::string(what) + "; accepted: " + std::string(kAccepted));
  };
  std::string_view rest = text;
  while (true) {
    rest.remove_prefix(std::min(rest.find_first_not_of(' '), rest.size()));
    if (rest.empty()) break;
    const std::string_view word = rest.substr(0, rest.find(' '));
    rest.remove_prefix(word.size());
    std::string_view name;
    if (!ReadWord(word, &claim, &name)) return bad(word, name.empty() ? " is not a part of one" : " has no such value");
    if (std::find(seen.begin(), seen.end(), name) != seen.end()) return bad(word, " is given twice");
    seen.push_back(name);
  }
  const auto given = [&](std::string_view name) { return std::find(seen.begin(), seen.end(), name) != seen.end(); };
  for (const std::string_view name : {std::string_view("max_dropped_mass<="), std::string_view("alpha=")}) {
    if (!given(name)) return bad(text, name == "alpha=" ? " lacks alpha=" : " lacks max_dropped_mass<=");
  }
  if (claim.method == CalibrationMethod::kConformal && given("confidence=")) {
    return bad(text, ": conformal promises an average and has no confidence; leave it out, or take rcps");
  }
  PREHOC_RETURN_IF_ERROR(claim.Validate());
  return claim;
}

Status CalibrationClaim::Validate() const {
  if (!(delta_max >= 0 && delta_max < 1)) {
    return Refused("max_dropped_mass<=" + PrintNumber(delta_max) + ": accepted: from 0 to below 1");
  }
  if (!IsProbability(alpha)) return Refused("alpha=" + PrintNumber(alpha) + ": accepted: between 0 and 1");
  if (method == CalibrationMethod::kRcps && !IsProbability(confidence)) {
    return Refused("confidence=" + PrintNumber(confidence) + ": accepted: between 0 and 1, such as 0.9");
  }
  return {};
}

std::string CalibrationClaim::ToString() const {
  std::string text = "max_dropped_mass<=" + PrintNumber(delta_max) + " alpha=" + PrintNumber(alpha);
  if (method == CalibrationMethod::kRcps) text += " confidence=" + PrintNumber(confidence);
  return text + " method=" + std::string(CalibrationMethodName(method));
}

std::string CalibrationClaim::Guarantee() const {
  const std::string what = "a protected head drops more than " + PrintNumber(delta_max) +
                           " of its attention mass at a decode step drawn at random";
  if (method == CalibrationMethod::kRcps) {
    return "with confidence " + PrintNumber(confidence) + " over the calibration requests, in at most " +
           PrintNumber(alpha) + " of requests like them " + what;
  }
  return "on average over calibration requests and the next one like them, with probability at most " +
         PrintNumber(alpha) + " " + what;
}

Result<Calibration> Calibrate(const LossTable& table, const CalibrationClaim& claim) {
  PREHOC_RETURN_IF_ERROR(claim.Validate());
  PREHOC_RETURN_IF_ERROR(CheckTable(table));
  const Judge judge{table, claim};
  Calibration result = judge.Run(AllUnits(table.units), true);
  if (result.chosen < 0) result.refusal = judge.Refusal(result.points.front());
  return result;
}

Result<std::vector<BucketCalibration>> CalibrateBuckets(std::span<const LossBucket> buckets,
                                                        const CalibrationClaim& claim) {
  std::vector<BucketCalibration> results;
  for (const LossBucket& bucket : buckets) {
    Result<Calibration> calibration = Calibrate(bucket.table, claim);
    if (!calibration.ok()) return calibration.status().WithContext("bucket " + bucket.name);
    results.push_back({bucket.name, std::move(calibration).value()});
  }
  return results;
}

Result<HeldOut> CheckHeldOut(const LossTable& table, const CalibrationClaim& claim, int64_t calibration_units,
                             int64_t splits, uint64_t seed) {
  PREHOC_RETURN_IF_ERROR(claim.Validate());
  PREHOC_RETURN_IF_ERROR(CheckTable(table));
  if (calibration_units < 1 || calibration_units >= table.units) {
    return Refused(std::to_string(calibration_units) + " calibration units of " + std::to_string(table.units) +
                   ": leave some held out");
  }
  if (splits < 1) return Refused(std::to_string(splits) + " splits: give at least 1");
  const Judge judge{table, claim};
  HeldOut result;
  result.splits = splits;
  std::vector<int64_t> order = AllUnits(table.units);
  std::mt19937_64 random(seed);
  for (int64_t split = 0; split < splits; ++split) {
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random() % i]);
    const std::span<const int64_t> all(order);
    const Calibration calibration = judge.Run(all.first(static_cast<size_t>(calibration_units)), false);
    if (calibration.chosen < 0) {
      ++result.refused;
      continue;
    }
    const auto rest = all.subspan(static_cast<size_t>(calibration_units));
    double sum = 0;
    for (const int64_t unit : rest) sum += judge.Loss(unit, calibration.chosen);
    const double share = sum / static_cast<double>(rest.size());
    result.mean_share += share;
    result.worst_share = std::max(result.worst_share, share);
    result.splits_over_alpha += share > claim.alpha;
  }
  if (result.splits > result.refused) result.mean_share /= static_cast<double>(result.splits - result.refused);
  return result;
}

double BinomialCdf(int64_t x, int64_t n, double p) {
  PREHOC_CHECK(n >= 0 && p >= 0 && p <= 1);
  if (x < 0) return 0;
  if (x >= n || p == 0) return 1;
  if (p == 1) return 0;
  const double odds = p / (1 - p);
  const auto count = static_cast<double>(n);
  if (static_cast<double>(x) <= count * p) {  // downwards from x
    const auto ratio = [&](int64_t i) {
      const auto k = static_cast<double>(x - i);
      return k / ((count - k + 1) * odds);
    };
    return std::min(1.0, SumFalling(BinomialPmf(x, n, p), x + 1, ratio));
  }
  const auto ratio = [&](int64_t i) {  // upwards from x + 1
    const auto k = static_cast<double>(x + 1 + i);
    return (count - k) / (k + 1) * odds;
  };
  return std::max(0.0, 1 - SumFalling(BinomialPmf(x + 1, n, p), n - x, ratio));
}

double ClopperPearsonUpper(int64_t x, int64_t n, double delta_c) {
  PREHOC_CHECK(n >= 1 && x >= 0 && IsProbability(delta_c));
  if (x >= n) return 1;
  double low = 0, high = 1;  // CDF(low) > delta_c >= CDF(high)
  while (true) {
    const double middle = low + (high - low) / 2;
    if (middle <= low || middle >= high) return high;
    (BinomialCdf(x, n, middle) > delta_c ? low : high) = middle;
  }
}

double WsrUpper(std::span<const double> losses, double delta_c) {
  PREHOC_CHECK(IsProbability(delta_c));
  const double target = -std::log(delta_c);
  const auto count = static_cast<double>(losses.size());
  std::vector<double> bets;  // each from the losses before it
  double sum = 0.5, squares = 0.25, variance = 0.25;
  for (size_t i = 0; i < losses.size(); ++i) {
    bets.push_back(std::min(1.0, std::sqrt(2 * target / (count * variance))));
    const double seen = static_cast<double>(i) + 2;
    sum += losses[i];
    const double away = losses[i] - sum / seen;
    squares += away * away;
    variance = squares / seen;
  }
  // Whether the mean `mu` would have lost the bet; once true, true for every larger one.
  const auto rejected = [&](double mu) {
    double log_capital = 0;
    for (size_t i = 0; i < losses.size(); ++i) {
      log_capital += std::log1p(-bets[i] * (losses[i] - mu));
      if (log_capital >= target) return true;
    }
    return false;
  };
  double low = 0, high = 1;
  if (!rejected(high)) return 1;
  for (int i = 0; i < 60; ++i) {
    const double middle = low + (high - low) / 2;
    (rejected(middle) ? high : low) = middle;
  }
  return high;
}

int64_t ConformalRank(int64_t units, double alpha) {
  PREHOC_CHECK(units >= 0 && IsProbability(alpha));
  // floor(alpha (n + 1)) by the quotient, which is exact where alpha is the double next to it.
  const auto slots = static_cast<double>(units + 1);
  auto above = static_cast<int64_t>(alpha * slots);
  while (static_cast<double>(above + 1) / slots <= alpha) ++above;
  while (static_cast<double>(above) / slots > alpha) --above;
  return units + 1 - above;
}

int64_t UnitsNeeded(const CalibrationClaim& claim, double violating) {
  if (!claim.Validate().ok() || !(violating < claim.alpha) || violating < 0) return 0;
  const auto enough = [&](int64_t units) {
    const auto violations = static_cast<int64_t>(std::ceil(violating * static_cast<double>(units)));
    if (claim.method == CalibrationMethod::kConformal) {
      return static_cast<double>(violations + 1) / static_cast<double>(units + 1) <= claim.alpha;
    }
    return BinomialCdf(violations, units, claim.alpha) <= claim.delta_c();
  };
  int64_t most = 1;
  while (!enough(most)) {
    if ((most *= 2) > kMostUnits) return 0;
  }
  int64_t least = most / 2;
  while (most - least > 1) {
    const int64_t middle = least + (most - least) / 2;
    (enough(middle) ? most : least) = middle;
  }
  return most;
}

}  // namespace prehoc
