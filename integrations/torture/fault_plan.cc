#include "integrations/torture/fault_plan.h"

#include <algorithm>

namespace prehoc::torture {
namespace {

constexpr std::array<FaultInfo, kFaults> kInfos = {{
    {"flip", "one bit of a record read", true},
    {"torn", "sectors of another record within one read", true},
    {"short", "the end of a record never arrives", true},
    {"stale", "an older record read in the place of this one", true},
    {"swapped", "the record of another key, whole", true},
    {"wrong-key", "the right payload under another header", true},
    {"read-error", "a read fails", false},
    {"delay", "a read takes its time", false},
    {"write-flip", "one bit changes on its way to the medium", true},
    {"write-torn", "the end of a record is not written", true},
    {"lost", "a write is acknowledged and does not happen", false},
    {"write-error", "a write fails", false},
    {"memory", "one bit of a block in host memory", true},
    {"copy-error", "a copy between tiers does not start", false},
    {"copy-half", "a copy stops halfway and says so", false},
    {"job-refused", "a background job is refused", false},
    {"job-late", "background jobs run late and out of order", false},
    {"device", "the device has no memory left", false},
    {"clock", "time leaps ahead", false},
}};

}  // namespace

const FaultInfo& InfoOf(Fault fault) { return kInfos[static_cast<size_t>(fault)]; }

Result<FaultSet> ParseFaults(std::string_view text) {
  FaultSet set{};
  if (text == "all") set.fill(true);
  if (text == "all" || text == "none") return set;
  while (true) {
    const std::string_view name = text.substr(0, text.find(','));
    const auto found = std::find_if(kInfos.begin(), kInfos.end(), [&](const FaultInfo& info) { return info.name == name; });
    if (found == kInfos.end()) {
      std::string known = "all, none";
      for (const FaultInfo& info : kInfos) known += ", " + std::string(info.name);
      return {StatusCode::kInvalid, "there is no fault \"" + std::string(name.substr(0, 40)) + "\": give " + known};
    }
    set[static_cast<size_t>(found - kInfos.begin())] = true;
    if (name.size() == text.size()) return set;
    text.remove_prefix(name.size() + 1);
  }
}

bool FaultPlan::Draw(Fault fault, double probability) {
  MutexLock lock(mutex_);
  if (paused_ || !enabled_[static_cast<size_t>(fault)]) return false;
  const bool happens = random_.Uniform() < probability;
  digest_ = (digest_ ^ (static_cast<uint64_t>(fault) << 1 | (happens ? 1 : 0))) * 0x100000001b3u;
  return happens;
}

uint64_t FaultPlan::Next() {
  MutexLock lock(mutex_);
  return random_.Next();
}

void FaultPlan::Pause(bool paused) {
  MutexLock lock(mutex_);
  paused_ = paused;
}

FaultPlan::Count FaultPlan::Of(Fault fault) const {
  MutexLock lock(mutex_);
  return counts_[static_cast<size_t>(fault)];
}

uint64_t FaultPlan::digest() const {
  MutexLock lock(mutex_);
  return digest_;
}

void FaultPlan::Add(Fault fault, uint64_t Count::*field, uint64_t n) {
  MutexLock lock(mutex_);
  counts_[static_cast<size_t>(fault)].*field += n;
}

}  // namespace prehoc::torture
